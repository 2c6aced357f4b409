"""The PyTorch Geometric parts: a sampler against the definition, a hook that never waits, seeds told in time."""

import errno
import multiprocessing
import os
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from lathe_client import ApiStatusError, EnrichmentClient, EnrichmentStore
from lathe_client.prefetch import Prefetcher, _warn_once, graph_fetch, rest_seconds
from lathe_client.pyg import CsrSampler, EnrichHook, SeedSampler, upload
from torch_geometric.data import Data
from torch_geometric.loader import NodeLoader
from torch_geometric.nn import SAGEConv
from torch_geometric.sampler import EdgeSamplerInput, NodeSamplerInput

from engines.protocol import EngineError
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
        self.is_up = True
        self.asked = threading.Event()

    def __call__(self, nodes: Any) -> tuple[Any, Any, Any]:
        self.batches.append(nodes.tolist())
        self.asked.set()
        assert self.gate.wait(20)
        if self.error is not None:
            raise self.error
        there = (nodes != 13) & self.is_up  # which has no text
        return vectors_of(nodes), there, np.full(len(nodes), not self.is_up)


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


def test_a_full_disk_ends_the_fetching(
    store: EnrichmentStore, fetch: Fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("lathe_client.store.os.pwrite", full)
    prefetcher = Prefetcher(store, fetch)
    prefetcher.want(np.arange(3))
    with pytest.raises(OSError, match="No space"):
        prefetcher.drain()
    assert isinstance(prefetcher.failure, OSError)
    assert store.num_filled == 0
    with pytest.raises(OSError, match="No space"):
        prefetcher.close()


def test_what_an_engine_lost_is_asked_for_again(
    store: EnrichmentStore, fetch: Fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lathe_client.prefetch.FIRST_REST_SECONDS", 0.0)
    with Prefetcher(store, fetch, batch_size=8) as prefetcher:
        fetch.is_up = False
        prefetcher.want(np.arange(10, 20))
        prefetcher.drain()
        assert store.num_filled == 0
        fetch.is_up = True
        for _ in range(2):  # the second time nothing is left to ask for: node 13 itself is at fault
            prefetcher.want(np.arange(10, 20))
            prefetcher.drain()
        assert store.has(np.arange(10, 20)).tolist() == [i != 13 for i in range(10, 20)]
    nodes = [list(range(10, 18)), [18, 19]]
    assert fetch.batches == nodes * 2


def test_an_engine_that_is_away_is_left_alone_for_longer_each_time(
    store: EnrichmentStore, fetch: Fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [rest_seconds(n) for n in (0, 1, 2, 3, 7, 9999)] == [0, 1, 2, 4, 60, 60]
    monkeypatch.setattr("lathe_client.prefetch.FIRST_REST_SECONDS", 1e4)
    monkeypatch.setattr("lathe_client.prefetch.LONGEST_REST_SECONDS", 1e4)
    fetch.is_up = False
    with Prefetcher(store, fetch, batch_size=8) as prefetcher:
        prefetcher.want(np.arange(16))
        assert fetch.asked.wait(20)
    assert len(fetch.batches) == 1  # and a rest does not delay the end


def test_draining_what_is_closed_does_not_wait(store: EnrichmentStore, fetch: Fetch) -> None:
    prefetcher = Prefetcher(store, fetch)
    prefetcher.close()
    prefetcher._waiting.append(5)  # which came just before
    drain = threading.Thread(target=prefetcher.drain, daemon=True)
    drain.start()
    drain.join(20)
    assert not drain.is_alive()


def test_an_exception_does_not_wait_for_the_fetch_under_way(
    store: EnrichmentStore, fetch: Fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lathe_client.prefetch.EXIT_SECONDS", 0.01)
    fetch.gate.clear()
    prefetcher = Prefetcher(store, fetch)
    prefetcher.want(np.arange(3))
    assert fetch.asked.wait(20)
    with pytest.raises(KeyboardInterrupt), prefetcher:
        raise KeyboardInterrupt
    assert prefetcher._thread.is_alive()
    fetch.gate.set()
    prefetcher.close()


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


def test_a_worker_that_wants_in_vain_says_so_once(
    data: Data, store: EnrichmentStore, prefetcher: Prefetcher, caplog: pytest.LogCaptureFixture
) -> None:
    data.n_id = torch.arange(NUM_NODES)
    pid, prefetcher._pid = prefetcher._pid, -1  # as a fork sees it
    for hook in (EnrichHook(store, prefetcher), pickle.loads(pickle.dumps(EnrichHook(store, prefetcher)))):  # noqa: S301  # fmt: skip
        _warn_once.cache_clear()
        caplog.clear()
        for _ in range(2):
            assert not hook(data).enriched_mask.any()
        assert ["filter_per_worker=False" in record.message for record in caplog.records] == [True]
    prefetcher._pid = pid


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_neighbours_are_fetched_though_workers_sample(
    method: str, data: Data, store: EnrichmentStore, fetch: Fetch, prefetcher: Prefetcher
) -> None:
    seeds = torch.arange(8)
    loader = NodeLoader(
        data,
        CsrSampler(data.edge_index, NUM_NODES, [4]),
        input_nodes=seeds,
        batch_size=4,
        sampler=SeedSampler(seeds, prefetcher),
        transform=EnrichHook(store, prefetcher),
        num_workers=1,
        multiprocessing_context=method,
        filter_per_worker=False,
    )
    seen = {node for batch in loader for node in batch.n_id.tolist()}
    prefetcher.drain()
    assert {node for batch in fetch.batches for node in batch} == seen > set(seeds.tolist())


def test_workers_that_start_anew_draw_anew(data: Data) -> None:
    torch.manual_seed(0)
    sampler = CsrSampler(data.edge_index, NUM_NODES, [2])
    loader = NodeLoader(data, sampler, batch_size=NUM_NODES, num_workers=1)
    first, second = (next(iter(loader)).e_id.tolist() for _ in range(2))
    assert first != second
    torch.manual_seed(0)
    assert next(iter(loader)).e_id.tolist() == first


def test_a_mask_of_seeds_is_its_nodes(data: Data, fetch: Fetch, prefetcher: Prefetcher) -> None:
    mask = torch.zeros(NUM_NODES, dtype=torch.bool)
    mask[30:] = True
    loader = NodeLoader(
        data,
        CsrSampler(data.edge_index, NUM_NODES, [2]),
        input_nodes=mask,
        batch_size=8,
        sampler=SeedSampler(mask, prefetcher),
    )
    seeds = [node for batch in loader for node in batch.n_id[: batch.batch_size].tolist()]
    prefetcher.drain()
    assert sorted(seeds) == list(range(30, NUM_NODES))
    assert sorted(node for batch in fetch.batches for node in batch) == sorted(seeds)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.float16])
def test_vectors_stay_numbers_beside_whole_ones(
    dtype: torch.dtype, data: Data, store: EnrichmentStore
) -> None:
    store.write(np.array([1]), np.full((1, DIM), 0.5, dtype=np.float32))
    data.n_id = torch.arange(NUM_NODES)
    data.x = data.x.to(dtype)
    found = EnrichHook(store)(data).x_enriched
    assert found.dtype == (dtype if dtype.is_floating_point else torch.float32)
    assert found[1].tolist() == [0.5] * DIM
    assert torch.equal(found[2:], data.x[2:].to(found.dtype))


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
    assert upload(client, data) == graph_id
    data.text[0] = "another"
    assert upload(client, data) != graph_id
    del data.text
    with pytest.raises(ValueError, match="one text per node"):
        upload(client, data)


def test_rows_of_a_fetch_are_told_apart(
    data: Data, client: EnrichmentClient, service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    """Written by the LLM; at fault themselves; lost by an engine."""
    data.text = ["good", "", "mute", *["more"] * (NUM_NODES - 3)]
    graph_id = upload(client, data)
    options: Any = {"prompt": "summary@1", "model": "writer", "embedding_model": "encoder"}
    service.writer._answer = lambda prompt: "" if "mute" in prompt else "written"
    fetch = graph_fetch(client, graph_id, torch.arange(NUM_NODES), **options)  # type: ignore[arg-type]
    _, there, *again = fetch(np.array([0, 1, 2]))
    assert (there.tolist(), again[0].tolist()) == ([True, False, False], [False, False, False])
    assert "2 of 3 nodes were not enriched" in caplog.text
    service.encoder.embed_error = EngineError("engine_dead", "it died")
    _, there, *again = fetch(np.array([0, 1, 3]))
    assert (there.tolist(), again[0].tolist()) == ([True, False, False], [False, False, True])
    assert "engine_dead" in caplog.text
