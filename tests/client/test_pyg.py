"""The PyTorch Geometric parts: a sampler against the definition, a hook that never waits, seeds told in time."""

import multiprocessing
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from lathe_client import ApiStatusError, EnrichmentClient, EnrichmentStore
from lathe_client.prefetch import Prefetcher, graph_fetch
from lathe_client.pyg import CsrSampler, EnrichHook, SeedSampler, upload
from torch_geometric.data import Data
from torch_geometric.loader import NodeLoader
from torch_geometric.nn import SAGEConv
from torch_geometric.sampler import EdgeSamplerInput, NodeSamplerInput

from tests.service.test_graph_routes import Service

NUM_NODES = 40
DIM = 4


@pytest.fixture
def data() -> Data:
    random = np.random.default_rng(0)
    edges = random.integers(0, NUM_NODES - 2, size=(2, 300))  # the last two nodes are isolated
    x = torch.arange(NUM_NODES * DIM, dtype=torch.float32).reshape(NUM_NODES, DIM)
    return Data(x=x, edge_index=torch.from_numpy(edges), num_nodes=NUM_NODES)


@pytest.fixture
def store(tmp_path: Path) -> EnrichmentStore:
    return EnrichmentStore(tmp_path / "store", num_nodes=NUM_NODES, dim=DIM, encoder="e")


def vectors_of(nodes: Any) -> Any:
    return np.repeat(-np.asarray(nodes, dtype=np.float32)[:, None] - 1, DIM, axis=1)


class Fetch:
    """A network that a test holds. Attributes: batches: what was asked for."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None

    def __call__(self, nodes: Any) -> tuple[Any, Any]:
        self.batches.append(nodes.tolist())
        assert self.gate.wait(20)
        if self.error is not None:
            raise self.error
        return vectors_of(nodes), nodes != 13  # which has no text


@pytest.fixture
def fetch() -> Fetch:
    return Fetch()


@pytest.fixture
def prefetcher(store: EnrichmentStore, fetch: Fetch) -> Iterator[Prefetcher]:
    with Prefetcher(store, fetch, batch_size=8) as prefetcher:
        yield prefetcher
        fetch.gate.set()


@pytest.mark.parametrize("counts", [[3, 2], [-1], [1, 1, 1], [0], [100, 100], []])
def test_a_sample_is_what_the_definition_says(data: Data, counts: list[int]) -> None:
    sampler = CsrSampler(data.edge_index, NUM_NODES, counts, seed=3)
    seeds = torch.tensor([5, 0, NUM_NODES - 1, 17])
    out = sampler.sample_from_nodes(NodeSamplerInput(torch.arange(4), seeds))
    assert out.node[:4].tolist() == seeds.tolist()
    assert len(out.node.unique()) == len(out.node)
    # Every edge is the graph's own, and between the sampled nodes that it names.
    edges = data.edge_index[:, out.edge]
    assert torch.equal(out.node[out.row], edges[0])
    assert torch.equal(out.node[out.col], edges[1])
    assert len(out.edge.unique()) == len(out.edge)
    # Hop by hop: each node of a hop gets min(count, degree) of its incoming edges, and its new sources come next.
    assert sum(out.num_sampled_nodes) == len(out.node)
    assert sum(out.num_sampled_edges) == len(out.edge)
    degree = torch.bincount(data.edge_index[1], minlength=NUM_NODES)
    first_node = first_edge = 0
    for hop, count in enumerate(counts):
        frontier = range(first_node, first_node + out.num_sampled_nodes[hop])
        columns = out.col[first_edge : first_edge + out.num_sampled_edges[hop]]
        for number in frontier:
            full = int(degree[out.node[number]])
            assert int((columns == number).sum()) == (full if count < 0 else min(full, count))
        assert set(columns.tolist()) <= set(frontier)
        sources = out.row[first_edge : first_edge + out.num_sampled_edges[hop]]
        seen = first_node + out.num_sampled_nodes[hop]
        new = {number for number in sources.tolist() if number >= seen}
        assert new == set(range(seen, seen + out.num_sampled_nodes[hop + 1]))
        first_node, first_edge = seen, first_edge + out.num_sampled_edges[hop]


def test_each_neighbour_is_drawn_alike() -> None:
    edge_index = torch.tensor([[1, 2, 3, 4], [0, 0, 0, 0]])
    sampler = CsrSampler(edge_index, 5, [2], seed=1)
    drawn = np.zeros(5)
    for _ in range(2000):
        out = sampler.sample_from_nodes(NodeSamplerInput(None, torch.tensor([0])))
        drawn[out.node[1:].numpy()] += 1
    assert drawn.sum() == 4000
    assert np.abs(drawn[1:] / 2000 - 0.5).max() < 0.05  # 4.5 standard deviations; the seed is fixed


def test_the_same_seed_draws_the_same(data: Data) -> None:
    def draw(seed: int) -> list[list[int]]:
        sampler = CsrSampler(data.edge_index, NUM_NODES, [2, 2], seed=seed)
        inputs = NodeSamplerInput(None, torch.tensor([1, 2, 3]))
        return [sampler.sample_from_nodes(inputs).node.tolist() for _ in range(2)]

    first, second = draw(0)
    assert draw(0) == [first, second]
    assert first != second
    assert draw(1) != [first, second]


def test_what_a_sampler_cannot_do_is_refused(data: Data) -> None:
    sampler = CsrSampler(data.edge_index, NUM_NODES, [2])
    with pytest.raises(ValueError, match="twice"):
        sampler.sample_from_nodes(NodeSamplerInput(None, torch.tensor([1, 1])))
    with pytest.raises(ValueError, match="no times"):
        sampler.sample_from_nodes(NodeSamplerInput(None, torch.tensor([1]), time=torch.tensor([0])))
    with pytest.raises(NotImplementedError):
        sampler.sample_from_edges(EdgeSamplerInput(None, torch.tensor([1]), torch.tensor([2])))
    with pytest.raises(ValueError, match="beyond"):
        CsrSampler(data.edge_index, NUM_NODES - 5, [2])
    with pytest.raises(ValueError, match="-1"):
        CsrSampler(data.edge_index, NUM_NODES, [-2])


def test_a_loader_trains_on_what_the_store_has(data: Data, store: EnrichmentStore) -> None:
    store.write(np.arange(0, NUM_NODES, 2), vectors_of(range(0, NUM_NODES, 2)))
    sampler = CsrSampler(data.edge_index, NUM_NODES, [4, 4])
    loader = NodeLoader(data, sampler, batch_size=16, shuffle=True, transform=EnrichHook(store))
    layer = SAGEConv(DIM, 2)
    num_seeds = 0
    for batch in loader:
        even = batch.n_id % 2 == 0
        assert torch.equal(batch.enriched_mask, even)
        expected = torch.where(even[:, None], -batch.n_id[:, None].float() - 1, batch.x)
        assert torch.equal(batch.x_enriched, expected)
        assert torch.equal(batch.x, data.x[batch.n_id])
        layer(batch.x_enriched, batch.edge_index)[: batch.batch_size].sum().backward()
        num_seeds += batch.batch_size
    assert num_seeds == NUM_NODES


def test_other_widths_are_refused(data: Data, store: EnrichmentStore) -> None:
    data.n_id = torch.arange(NUM_NODES)
    data.x = data.x[:, :3]
    with pytest.raises(ValueError, match="3 wide and the enriched vectors 4"):
        EnrichHook(store)(data)
    del data.x
    assert EnrichHook(store)(data).x_enriched.shape == (NUM_NODES, DIM)


def test_the_hook_does_not_wait_and_the_thread_catches_up(
    data: Data, store: EnrichmentStore, fetch: Fetch, prefetcher: Prefetcher
) -> None:
    hook = EnrichHook(store, prefetcher)
    data.n_id = torch.arange(20)
    data = data.subgraph(torch.arange(20))
    fetch.gate.clear()
    assert not hook(data).enriched_mask.any()  # comes back though the network hangs
    fetch.gate.set()
    prefetcher.drain()
    mask = hook(data).enriched_mask
    assert mask.sum() == 19
    assert not mask[13]
    prefetcher.drain()
    assert sorted(node for batch in fetch.batches for node in batch) == list(range(20))
    assert max(map(len, fetch.batches)) <= 8


def test_only_selected_nodes_are_fetched(store: EnrichmentStore, fetch: Fetch) -> None:
    with Prefetcher(store, fetch, only=np.array([3, 5])) as prefetcher:
        prefetcher.want(np.arange(NUM_NODES))
        prefetcher.drain()
    assert fetch.batches == [[3, 5]]


def test_an_error_ends_the_fetching_and_is_raised_at_the_end(
    store: EnrichmentStore, fetch: Fetch
) -> None:
    fetch.error = ApiStatusError("gone", status=404, code="graph_not_found")
    prefetcher = Prefetcher(store, fetch)
    prefetcher.want(np.arange(3))
    with pytest.raises(ApiStatusError, match="gone"):
        prefetcher.drain()
    prefetcher.want(np.arange(3, 6))  # training goes on
    with pytest.raises(ApiStatusError, match="gone"):
        prefetcher.close()
    assert fetch.batches == [[0, 1, 2]]


def test_seeds_are_told_before_their_turn(
    store: EnrichmentStore, fetch: Fetch, prefetcher: Prefetcher
) -> None:
    seeds = torch.arange(30) + 1
    sampler = SeedSampler(seeds, prefetcher, ahead=8, seed=5)
    assert len(sampler) == 30
    order = []
    for position, index in enumerate(sampler):
        order.append(index)
        prefetcher.drain()
        told = {node for batch in fetch.batches for node in batch}
        assert {int(seeds[i]) for i in order} <= told
        assert len(told) <= position + 1 + 8
    assert sorted(order) == list(range(30))
    assert list(sampler) != order  # the next epoch
    plain = SeedSampler(seeds, prefetcher, shuffle=False)
    assert list(plain) == list(range(30))


def test_seeds_are_told_in_groups_once_each() -> None:
    """Telling has a cost of its own, so none for a seed."""
    told: list[list[int]] = []

    class Told:
        def want(self, indices: Any) -> None:
            told.append(indices.tolist())

    seeds = torch.arange(200) + 1
    order = list(SeedSampler(seeds, cast(Prefetcher, Told()), ahead=80))
    assert [node for group in told for node in group] == seeds[order].tolist()
    assert [len(group) for group in told] == [80, *[10] * 12, *[0] * 7]


def _in_child(hook: EnrichHook, data: Data, answers: Any) -> None:
    answers.put(int(hook(data).enriched_mask.sum()))


def test_a_forked_worker_reads_the_store_and_leaves_fetching_to_its_parent(
    data: Data, store: EnrichmentStore, fetch: Fetch, prefetcher: Prefetcher
) -> None:
    store.write(np.arange(5), vectors_of(range(5)))
    data.n_id = torch.arange(NUM_NODES)
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    with prefetcher._changed:  # a fork in a bad moment: the child must not touch the lock
        child = context.Process(
            target=_in_child, args=(EnrichHook(store, prefetcher), data, answers)
        )
        child.start()
        assert answers.get(timeout=20) == 5
    child.join(20)
    assert fetch.batches == []


def test_from_the_service_into_the_loader(
    data: Data, store: EnrichmentStore, client: EnrichmentClient, service: Service
) -> None:
    data.text = [f"text of {i}" for i in range(NUM_NODES)]
    graph_id = upload(client, data)
    assert client.graph(graph_id).num_nodes == NUM_NODES
    fetch = graph_fetch(
        client, graph_id, prompt="summary@1", model="writer", embedding_model="encoder"
    )
    data.n_id = torch.arange(NUM_NODES)
    with Prefetcher(store, fetch, batch_size=16) as prefetcher:
        hook = EnrichHook(store, prefetcher)
        assert not hook(data).enriched_mask.any()
        prefetcher.drain()
        assert hook(data).enriched_mask.all()
    assert len(service.writer.prompts) == NUM_NODES
    del data.text
    with pytest.raises(ValueError, match="one text per node"):
        upload(client, data)
