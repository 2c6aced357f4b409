"""Enrichment in PyTorch Geometric: before training (`EnrichTransform`), while it runs (`EnrichHook`, `SeedSampler`),
and neighbour sampling without pyg-lib (`CsrSampler`).

A node that was not enriched keeps its own features, so the width is one for all of them: enriched vectors and `x` must
come from one encoder.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Unpack

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.sampler import (
    BaseSampler,
    EdgeSamplerInput,
    NodeSamplerInput,
    SamplerOutput,
)
from torch_geometric.transforms import BaseTransform

from lathe_client.api import EnrichmentClient
from lathe_client.calls import EnrichOptions, NodeIds, plain_ids
from lathe_client.prefetch import Prefetcher
from lathe_client.results import Enriched, NodeId
from lathe_client.store import EnrichmentStore, Indices


class EnrichTransform(BaseTransform):  # type: ignore[misc]
    """Selects nodes of a graph, has them enriched in a job, waits, and writes `x_enriched` and `enriched_mask`.

    Args:
        graph_id: a graph that the service has; None uploads the data, whose `text` is a list of one text per node.
        select: strategy and budget, such as {"strategy": "pagerank", "budget": {"fraction": 0.1}}; None is every node.
        node_ids: the service's id of each node index, of a graph that it has; None where they are the indices.
        options: how to enrich; `returns` must have "embedding".

    Attributes:
        enriched: rows of the last call, for texts, statuses and usage.
    """

    def __init__(
        self,
        client: EnrichmentClient,
        *,
        graph_id: str | None = None,
        select: Mapping[str, Any] | None = None,
        node_ids: NodeIds | None = None,
        **options: Unpack[EnrichOptions],
    ) -> None:
        if node_ids is not None and graph_id is None:
            raise ValueError("node_ids are those of a graph that the service has: name graph_id")
        self.client = client
        self.graph_id = graph_id
        self.select = select
        self.node_ids = None if node_ids is None else plain_ids(node_ids)
        self.options: EnrichOptions = {"returns": ["text", "embedding"], **options}
        if "embedding" not in self.options["returns"]:
            raise ValueError(f"returns must have 'embedding', got {self.options['returns']}")
        self.enriched: Enriched | None = None

    def forward(self, data: Data) -> Data:
        """Raises: LatheError; ValueError: the data lacks texts, has features of another width, or other nodes."""
        graph_id = self.graph_id or upload(self.client, data)
        ids = range(data.num_nodes) if self.node_ids is None else self.node_ids
        job = self.client.submit_job(
            graph_id=graph_id,
            node_ids=None if self._is_of_all(graph_id, ids) else ids,
            select=self.select,
            **self.options,
        )
        self.client.wait(job.id)
        self.enriched = self.client.job_result(job.id)
        index_of = {node_id: index for index, node_id in enumerate(ids)}
        unknown = [node_id for node_id in self.enriched.node_ids if node_id not in index_of]
        if unknown:
            raise ValueError(
                f"{len(unknown)} nodes of {graph_id} are not in the data: {unknown[:3]}"
            )
        there = self.enriched.enriched_mask
        indices = np.array([index_of[i] for i in self.enriched.node_ids], dtype=np.int64)[there]
        vectors = np.zeros((data.num_nodes, self.enriched.dim or 0), dtype=np.float32)
        vectors[indices] = self.enriched.embeddings[there]
        mask = np.zeros(data.num_nodes, dtype=bool)
        mask[indices] = True
        return _joined(data, vectors, mask)

    def _is_of_all(self, graph_id: str, ids: Sequence[NodeId]) -> bool:
        """Whether the service knows which nodes: a request takes no more than 100,000 ids."""
        return self.select is not None or len(ids) == self.client.graph(graph_id).num_nodes


def upload(client: EnrichmentClient, data: Data, name: str = "pyg") -> str:
    """The id of a graph made from `data.text` and `data.edge_index`; its node ids are the indices.

    The same data twice is one graph.

    Raises:
        ValueError: there is not one text per node.
    """
    texts = data.get("text")
    if texts is None or len(texts) != data.num_nodes:
        raise ValueError("data.text must be a list of one text per node")
    nodes = [{"id": index, "text": text} for index, text in enumerate(texts)]
    edges = [(source, target) for source, target in data.edge_index.t().tolist()]
    directed = not data.is_undirected()
    # With pyarrow's version: it writes the bytes that the service compares.
    content = json.dumps([name, list(texts), edges, directed, pa.__version__])
    key = f"pyg-{hashlib.sha256(content.encode()).hexdigest()}"
    return client.create_graph(name, nodes, edges, directed=directed, idempotency_key=key).id


class EnrichHook(BaseTransform):  # type: ignore[misc]
    """`NodeLoader(..., transform=EnrichHook(store))`: `x_enriched` and `enriched_mask` of a batch, by its `n_id`.

    It reads the local store and nothing else. Nodes that are not there are told to the prefetcher, which may have them
    for a later batch. A loader with workers needs `filter_per_worker=False`: otherwise PyG runs this in them, where no
    prefetcher is.
    """

    def __init__(self, store: EnrichmentStore, prefetcher: Prefetcher | None = None) -> None:
        self.store = store
        self.prefetcher = prefetcher

    def __call__(self, data: Data) -> Data:
        """Writes into the batch, which is the loader's own; a copy would cost as much as the look-up."""
        return self.forward(data)

    def forward(self, data: Data) -> Data:
        indices = data.n_id.cpu().numpy()
        vectors, mask = self.store.lookup(indices)
        if self.prefetcher is not None and not mask.all():
            self.prefetcher.want(indices[~mask])
        return _joined(data, vectors, mask)


def _joined(data: Data, vectors: npt.NDArray[Any], mask: npt.NDArray[np.bool_]) -> Data:
    """Raises: ValueError: `x` has another width."""
    enriched, enriched_mask = torch.from_numpy(vectors).float(), torch.from_numpy(mask)
    x = data.get("x")
    if x is not None:
        if x.shape[1] != enriched.shape[1]:
            raise ValueError(
                f"x is {x.shape[1]} wide and the enriched vectors {enriched.shape[1]}: features must come from"
                " the encoder that the service embeds with"
            )
        enriched = enriched.to(x.device, x.dtype if x.is_floating_point() else enriched.dtype)
        enriched_mask = enriched_mask.to(x.device)
        if not mask.all():
            enriched[~enriched_mask] = x[~enriched_mask].to(enriched.dtype)
    data.x_enriched, data.enriched_mask = enriched, enriched_mask
    return data


class SeedSampler(torch.utils.data.Sampler[int]):
    """The order of a loader's seeds, which tells a prefetcher of them before their turn comes.

    `NodeLoader(data, sampler, input_nodes=seeds, sampler=SeedSampler(seeds, prefetcher, ahead=1024))`

    Args:
        input_nodes: the loader's, as indices or as a mask.
        ahead: how many seeds the prefetcher knows of beyond those that the loader has taken.
        shuffle: anew in each epoch, the same ones for the same seed.
    """

    def __init__(
        self,
        input_nodes: Tensor,
        prefetcher: Prefetcher,
        *,
        ahead: int = 1024,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        is_mask = input_nodes.dtype == torch.bool
        nodes = input_nodes.nonzero().view(-1) if is_mask else input_nodes
        # A copy: a tensor that is sent to a worker moves to shared memory, from under its views.
        self._nodes = nodes.cpu().numpy().copy()
        self._prefetcher = prefetcher
        self._ahead = ahead
        self._shuffle = shuffle
        self._random = np.random.default_rng(seed)

    def __len__(self) -> int:
        return len(self._nodes)

    def __iter__(self) -> Iterator[int]:
        order = np.arange(len(self._nodes))
        if self._shuffle:
            order = self._random.permutation(order)
        step = max(1, self._ahead // 8)  # told in groups: one by one would cost more than it gives
        told = 0
        for start in range(0, len(order), step):
            upto = min(start + self._ahead, len(order))
            self._prefetcher.want(self._nodes[order[told:upto]])
            told = upto
            yield from order[start : start + step].tolist()


class CsrSampler(BaseSampler):  # type: ignore[misc]
    """Samples neighbours in NumPy, hop by hop, without replacement, as PyG's `NeighborSampler` does with pyg-lib.

    Messages go from `edge_index[0]` to `edge_index[1]`, so a node's neighbours are the sources of its incoming edges.
    Each node is expanded once, in the first hop that meets it. A draw depends on `seed`, on how many batches came
    before it in this process, on the batch's first nodes, and in a loader's worker on its seed, which PyTorch draws for
    each epoch: workers that start anew do not draw the same again.

    Args:
        num_neighbors: most neighbours per node of each hop; -1 takes all.
    """

    def __init__(
        self, edge_index: Tensor, num_nodes: int, num_neighbors: Sequence[int], *, seed: int = 0
    ) -> None:
        for count in num_neighbors:
            if count < -1:
                raise ValueError(f"num_neighbors must be at least -1, got {count}")
        source, target = edge_index.cpu().numpy()
        if (
            source.size
            and not 0
            <= min(source.min(), target.min())
            <= max(source.max(), target.max())
            < num_nodes
        ):
            raise ValueError(f"edge_index names nodes beyond the {num_nodes} there are")
        self._edge_ids: Indices = np.argsort(target, kind="stable")
        self._sources: Indices = source[self._edge_ids]
        self._indptr: Indices = np.zeros(num_nodes + 1, dtype=np.int64)
        np.cumsum(np.bincount(target, minlength=num_nodes), out=self._indptr[1:])
        self._num_neighbors = tuple(num_neighbors)
        self._seed = seed
        self._num_batches = 0

    @property
    def edge_permutation(self) -> None:
        """None: `SamplerOutput.edge` is in the numbers of `edge_index` already."""
        return None

    def sample_from_nodes(self, index: NodeSamplerInput, **_: Any) -> SamplerOutput:
        """Raises: ValueError: seeds have times, which this sampler does not look at; or a seed is there twice."""
        if index.time is not None:
            raise ValueError("CsrSampler knows no times: leave input_time out")
        seeds = index.node.numpy()
        worker = torch.utils.data.get_worker_info()
        entropy = (self._seed, self._num_batches, *seeds[:4].tolist())
        random = np.random.default_rng(entropy if worker is None else (*entropy, worker.seed))
        self._num_batches += 1
        known = _Known(seeds)
        frontier, first = seeds, 0
        rows, columns, edges = [], [], []
        num_nodes, num_edges = [len(seeds)], []
        for count in self._num_neighbors:
            places, owners = self._draw(frontier, count, random)
            rows.append(known.add(self._sources[places]))
            columns.append(owners + first)
            edges.append(self._edge_ids[places])
            first += len(frontier)
            frontier = known.nodes[first:]
            num_nodes.append(len(frontier))
            num_edges.append(len(places))
        none = np.empty(0, dtype=np.int64)
        return SamplerOutput(
            node=torch.from_numpy(known.nodes),
            row=torch.from_numpy(np.concatenate([none, *rows])),
            col=torch.from_numpy(np.concatenate([none, *columns])),
            edge=torch.from_numpy(np.concatenate([none, *edges])),
            num_sampled_nodes=num_nodes,
            num_sampled_edges=num_edges,
            metadata=(index.input_id, index.time),
        )

    def sample_from_edges(
        self, index: EdgeSamplerInput, neg_sampling: Any = None, **_: Any
    ) -> SamplerOutput:
        raise NotImplementedError("CsrSampler samples from nodes only")

    def _draw(
        self, frontier: Indices, count: int, random: np.random.Generator
    ) -> tuple[Indices, Indices]:
        """Places of drawn edges in the CSR arrays, and for each the frontier's node that it goes to."""
        starts = self._indptr[frontier]
        degrees = self._indptr[frontier + 1] - starts
        owners = np.repeat(np.arange(len(frontier)), degrees)
        begins = np.cumsum(degrees) - degrees
        ranks = np.arange(len(owners)) - begins[owners]
        places = starts[owners] + ranks
        if count < 0 or not len(places) or degrees.max() <= count:
            return places, owners
        # The `count` smallest of random keys within each node's edges: a draw without replacement.
        order = np.lexsort((random.random(len(places)), owners))
        kept = np.sort(order[ranks < count])
        return places[kept], owners[kept]


class _Known:
    """Numbers nodes in the order in which they are met."""

    def __init__(self, seeds: Indices) -> None:
        self.nodes = np.array(seeds, dtype=np.int64)
        if len(np.unique(self.nodes)) < len(self.nodes):
            raise ValueError("a seed is there twice in one batch")
        self._order = np.argsort(self.nodes, kind="stable")

    def add(self, nodes: Indices) -> Indices:
        """The number of each node."""
        values, first, inverse = np.unique(nodes, return_index=True, return_inverse=True)
        ordered = self.nodes[self._order]
        at = np.minimum(np.searchsorted(ordered, values), max(len(ordered) - 1, 0))
        old = ordered[at] == values if len(ordered) else np.zeros(len(values), dtype=bool)
        numbers = np.empty(len(values), dtype=np.int64)
        numbers[old] = self._order[at[old]]
        new = np.flatnonzero(~old)
        new = new[np.argsort(first[new])]  # as met, not by value
        numbers[new] = len(self.nodes) + np.arange(len(new))
        self.nodes = np.concatenate([self.nodes, values[new]])
        self._order = np.argsort(self.nodes, kind="stable")
        return numbers[inverse]
