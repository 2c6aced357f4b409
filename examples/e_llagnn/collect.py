"""What the example asks the service for, kept in a folder: raw vectors, rankings of nodes, enriched vectors, samples.

Enriched vectors lie in an `EnrichmentStore` per recipe, and a `Prefetcher` fills it in the background: to wait for it
before training is blocking mode, to train meanwhile is overlap mode. What is in the folder is not asked for again; each
graph has its own, named by its content.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import numpy.typing as npt
from lathe_client import EnrichmentClient, EnrichmentStore, LatheError
from lathe_client.prefetch import Fetch, Prefetcher

from examples.e_llagnn.graphs import Indices, TextGraph

ENCODER = "all-minilm-l6-v2"
NODES_PER_REQUEST = 64
SAMPLED_PER_REQUEST = 256

Join = Literal["append", "separate", "replace"]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a node is enriched.

    Attributes:
        prompt: an id of the catalog with its version.
        join: of the node's text t and the LLM's text e. "append" encodes t and e as one text, t cut to leave e
            its place; "separate" takes the direction halfway between the vectors of t and e;
            "replace" encodes e alone.
    """

    prompt: str
    model: str
    join: Join
    max_tokens: int

    @property
    def name(self) -> str:
        return f"{self.model}-{self.prompt}-{self.max_tokens}-{self.join}".replace("@", ".v")


class Source:
    """A graph at the service, and what is known of it on this machine.

    Attributes:
        digest: of the graph's content.
        folder: of what is known.
    """

    def __init__(
        self, url: str, graph: TextGraph, folder: Path, api_key: str | None = None
    ) -> None:
        self.graph = graph
        self.client = EnrichmentClient(url, api_key)
        self.digest = graph.digest()
        self.folder = folder / f"{graph.name.split(' ', maxsplit=1)[0]}-{self.digest[:16]}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._index = {node_id: index for index, node_id in enumerate(graph.ids)}
        self._graph_id: str | None = None
        self._raw: Floats | None = None

    def close(self) -> None:
        self.client.close()

    @property
    def graph_id(self) -> str:
        """Uploaded when first needed; the same graph again is the same one. It carries no label: none can leak."""
        if self._graph_id is None:
            graph = self.graph
            nodes = [
                {"id": i, "text": text} for i, text in zip(graph.ids, graph.texts, strict=True)
            ]
            edges = [(graph.ids[a], graph.ids[b]) for a, b in graph.edges.tolist()]
            self._graph_id = self.client.create_graph(
                graph.name, nodes, edges, idempotency_key=f"e-llagnn-{self.digest[:32]}"
            ).id
        return self._graph_id

    def raw(self) -> Floats:
        """x: vectors of the nodes' own texts (N, D)."""
        if self._raw is None:
            file = self.folder / "raw.npy"
            if not file.is_file():
                raw = self.embed(self.graph.texts)
                with replacing(file) as whole:
                    np.save(whole, raw, allow_pickle=False)
            self._raw = np.load(file, allow_pickle=False)
        return self._raw

    def embed(self, texts: list[str]) -> Floats:
        """Vectors of length 1 of the beginnings of texts."""
        return self.client.embeddings(texts, model=ENCODER, truncate=True)

    def ranking(self, strategy: str, **options: Any) -> Indices:
        """All nodes, those first that are most worth an LLM call: a budget takes the first so many."""
        digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:16]
        file = self.folder / f"ranking-{strategy}-{digest}.npy"
        if not file.is_file():
            chosen = self.client.select(
                self.graph_id, strategy, budget={"fraction": 1.0}, **options
            )
            order = np.array([self._index[node_id] for node_id in chosen.node_ids], np.int64)
            with replacing(file) as whole:
                np.save(whole, order, allow_pickle=False)
        ranking: Indices = np.load(file, allow_pickle=False)
        return ranking

    def store(self, recipe: Recipe) -> EnrichmentStore:
        raw = self.raw()
        return EnrichmentStore(
            self.folder / recipe.name,
            num_nodes=len(self.graph),
            dim=raw.shape[1],
            encoder=ENCODER,
            origin=f"{recipe.name} of {self.digest}",
            dtype="float32",
        )

    def prefetcher(self, recipe: Recipe, only: Indices | None = None) -> Prefetcher:
        """Fills the recipe's store with the nodes that it is told of."""
        return Prefetcher(
            self.store(recipe), self._fetch(recipe), only=only, batch_size=NODES_PER_REQUEST
        )

    def enriched(self, recipe: Recipe, nodes: Indices) -> EnrichmentStore:
        """The recipe's store when all of these nodes are in it that the LLM could write about."""
        store = self.store(recipe)
        if not store.has(nodes).all():
            with self.prefetcher(recipe) as prefetcher:
                prefetcher.want(nodes)
                prefetcher.drain()
        return store

    def _fetch(self, recipe: Recipe) -> Fetch:
        def fetch(nodes: Indices) -> tuple[Floats, npt.NDArray[np.bool_]]:
            rows = self.client.enrich_graph(
                self.graph_id,
                [self.graph.ids[node] for node in nodes],
                prompt=recipe.prompt,
                model=recipe.model,
                embedding_model=ENCODER,
                max_tokens=recipe.max_tokens,
                returns=["text", "embedding"],
                embedding_dtype="float32",
            )
            if set(rows.statuses) == {"failed"}:  # of one node it would be the node's fault
                reason = next(rows.rows()).error_message
                raise LatheError(f"none of {len(nodes)} nodes could be enriched: {reason}")
            there = np.array([status in ("ok", "cached") for status in rows.statuses])
            there &= np.array([bool(text) for text in rows.texts])
            if recipe.join == "append":
                return rows.embeddings, there & rows.has_embedding
            vectors = np.zeros((len(nodes), self.raw().shape[1]), np.float32)
            texts = rows.texts
            if there.any():
                vectors[there] = self.embed([texts[place] or "" for place in np.flatnonzero(there)])
            if recipe.join == "separate":
                vectors[there] = halfway(self.raw()[nodes[there]], vectors[there])
            return vectors, there

        return fetch

    def sample(self, scorer: str, *, fanout: int, seed: int) -> tuple[Indices, dict[str, Any]]:
        """Edges (2, E) to every node from those neighbours that the scorer keeps, and what the judging cost.

        "even" is no judge: as many neighbours, drawn evenly.
        """
        file = self.folder / f"sample-{scorer}-{fanout}-{seed}.npz"
        if not file.is_file():
            edges, cost = self._judge(scorer, fanout, seed)
            with replacing(file) as whole:
                np.savez(whole, edges=edges, cost=json.dumps(cost))
        with np.load(file, allow_pickle=False) as kept:
            return kept["edges"], json.loads(str(kept["cost"]))

    def _judge(self, scorer: str, fanout: int, seed: int) -> tuple[Indices, dict[str, float]]:
        options: dict[str, Any] = {"scorer": scorer, "fanout": fanout, "seed": seed}
        if scorer == "even":
            options |= {"scorer": "embed", "num_random": fanout}
        pairs: list[tuple[int, int]] = []
        cost: dict[str, float] = {}
        for first in range(0, len(self.graph), SAMPLED_PER_REQUEST):
            wanted = self.graph.ids[first : first + SAMPLED_PER_REQUEST]
            answer = self.client.sample(self.graph_id, node_ids=wanted, **options)
            pairs += [
                (self._index[kept["node_id"]], self._index[row["node_id"]])
                for row in answer["data"]
                for kept in row["kept"]
            ]
            for key, value in answer["usage"].items():
                cost[key] = cost.get(key, 0) + value
        return np.array(pairs, np.int64).reshape(-1, 2).T, cost


@contextmanager
def replacing(file: Path) -> Iterator[IO[bytes]]:
    """To write a file that is there only once it is whole."""
    temporary = file.with_name(f"{file.name}.tmp")
    with temporary.open("wb") as whole:
        yield whole
    temporary.replace(file)


def halfway(first: Floats, second: Floats) -> Floats:
    """Vectors of length 1 between two of length 1 each."""
    total = first + second
    result: Floats = total / np.linalg.norm(total, axis=1, keepdims=True)
    return result
