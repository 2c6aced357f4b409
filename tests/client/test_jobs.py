"""Enrich jobs through the client: a whole service, whose engine host echoes."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastapi import FastAPI
from lathe_client import EnrichmentClient, JobEndedError
from lathe_client.pyg import EnrichTransform
from torch_geometric.data import Data

from compression.import_model import import_folder
from compression.registry import ModelRegistry
from jobs.sqlite import SqliteJobStore
from jobs.worker import Worker, WorkerConfig
from service.app import build_app
from service.settings import Settings
from tests.client.conftest import serve
from tests.jobs.conftest import REPOSITORY
from tests.jobs.test_enrich import Host

TEXTS = ["abc", "de", "", "fgh", "ijk"]
EDGES = [(0, 1), (1, 2), (1, 3), (1, 4), (3, 4)]
OPTIONS: Any = {
    "prompt": "summary@1",
    "model": "tiny",
    "embedding_model": "tiny",
    "max_tokens": 8,
}


@pytest.fixture(scope="module")
def home(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    import_folder(ModelRegistry(home / "models"), "tiny", tiny_llama, report=lambda _: None)
    return home


@pytest.fixture(scope="module")
def app(home: Path) -> FastAPI:
    return build_app(Settings(home=home))


@pytest.fixture(scope="module")
def client(home: Path, app: FastAPI) -> Iterator[EnrichmentClient]:
    host = Host(home)
    with serve(app) as url, EnrichmentClient(url) as client:
        yield client
    host.kill()


@pytest.fixture(scope="module")
def worker(home: Path) -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setenv("PYTHONPATH", str(REPOSITORY))
    store, stop = SqliteJobStore(home / "lathe.db"), threading.Event()
    thread = threading.Thread(target=Worker(store, WorkerConfig(home=home)).run, args=(stop,))
    thread.start()
    yield
    stop.set()
    thread.join()
    store.close()
    patch.undo()


def create_graph(client: EnrichmentClient) -> str:
    nodes = [{"id": f"n{i}", "text": text} for i, text in enumerate(TEXTS)]
    edges = [(f"n{a}", f"n{b}") for a, b in EDGES]
    return client.create_graph("letters", nodes, edges).id


def test_a_job_that_nobody_takes_is_cancelled(client: EnrichmentClient) -> None:
    job = client.submit_job(graph_id=create_graph(client), **OPTIONS)
    assert (job.type, job.status, job.has_ended) == ("enrich", "queued", False)
    with pytest.raises(TimeoutError, match="queued"):
        client.wait(job.id, timeout_seconds=0.3)
    assert client.cancel_job(job.id).status == "cancelled"
    with pytest.raises(JobEndedError):
        client.wait(job.id)


@pytest.mark.usefixtures("worker")
def test_a_selection_of_a_graph(client: EnrichmentClient) -> None:
    graph_id = create_graph(client)
    select: Any = {"strategy": "degree", "order": "high", "budget": {"nodes": 3}}
    job = client.submit_job(
        graph_id=graph_id, select=select, returns=["text", "embedding"], **OPTIONS
    )
    assert client.wait(job.id, timeout_seconds=60).step == 3
    enriched = client.job_result(job.id)
    assert enriched.node_ids == client.select(graph_id, **select).node_ids == ["n1", "n3", "n4"]
    assert enriched.has_embedding.all()
    assert enriched.usage is not None
    assert enriched.usage.num_by_status["ok"] == 3
    again = client.enrich_graph(graph_id, ["n4", "n1"], returns=["text"], **OPTIONS)
    assert again.statuses == ["cached", "cached"]
    assert again.texts == [enriched.texts[2], enriched.texts[0]]
    assert client.usage()["total"]["cached_tokens"] > 0


@pytest.mark.usefixtures("worker")
def test_a_file_of_nodes(client: EnrichmentClient) -> None:
    file_id = client.upload_nodes([{"id": i, "text": f"text {i}"} for i in range(3)])
    job = client.submit_job(file_id=file_id, **OPTIONS)
    client.wait(job.id, timeout_seconds=60)
    assert client.job_result(job.id).node_ids == [0, 1, 2]


@pytest.mark.usefixtures("worker")
def test_the_transform_writes_what_the_job_found(client: EnrichmentClient) -> None:
    x = torch.randn(5, _width(client))
    both = torch.tensor([*EDGES, *((b, a) for a, b in EDGES)]).t().contiguous()
    data = Data(x=x, edge_index=both, text=TEXTS)
    select: Any = {"strategy": "degree", "order": "high", "budget": {"nodes": 3}}
    transform = EnrichTransform(client, select=select, **OPTIONS)
    done = transform(data)
    assert done.enriched_mask.tolist() == [False, True, False, True, True]
    assert torch.equal(done.x_enriched[~done.enriched_mask], x[~done.enriched_mask])
    assert transform.enriched is not None
    vectors = torch.from_numpy(transform.enriched.embeddings.astype(np.float32))
    order = [transform.enriched.node_ids.index(i) for i in (1, 3, 4)]
    assert torch.equal(done.x_enriched[done.enriched_mask], vectors[order])


@pytest.mark.usefixtures("worker")
def test_the_transform_without_a_selection_is_of_the_whole_graph(
    client: EnrichmentClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    submit = client.submit_job

    def submitted(**options: Any) -> Any:
        asked.append(options["node_ids"])
        return submit(**options)

    monkeypatch.setattr(client, "submit_job", submitted)
    data = Data(edge_index=torch.tensor(EDGES).t().contiguous(), text=TEXTS, num_nodes=5)
    first = EnrichTransform(client, **OPTIONS)(data)
    assert first.enriched_mask.tolist() == [True, True, False, True, True]
    # The same data is the same graph: nothing is left behind at each call.
    num_graphs = len(client.graphs(limit=100))
    again = EnrichTransform(client, **OPTIONS)(data)
    assert torch.equal(again.x_enriched, first.x_enriched)
    assert len(client.graphs(limit=100)) == num_graphs
    graph_id = create_graph(client)
    named = EnrichTransform(
        client, graph_id=graph_id, node_ids=np.array([f"n{i}" for i in range(5)]), **OPTIONS
    )
    assert torch.equal(named(data).x_enriched, first.x_enriched)
    assert asked == [None, None, None]
    part = EnrichTransform(client, graph_id=graph_id, node_ids=["n1", "n0"], **OPTIONS)
    two = Data(edge_index=torch.empty((2, 0), dtype=torch.long), num_nodes=2)
    assert torch.equal(part(two).x_enriched, first.x_enriched[[1, 0]])
    assert asked[3] == ["n1", "n0"]
    other = EnrichTransform(client, graph_id=graph_id, node_ids=list("abcde"), **OPTIONS)
    with pytest.raises(ValueError, match="not in the data"):
        other(data)
    with pytest.raises(ValueError, match="'embedding'"):
        EnrichTransform(client, returns=["text"], **OPTIONS)


def _width(client: EnrichmentClient) -> int:
    found = client.enrich([{"id": 0, "text": "t"}], returns=["embedding"], **OPTIONS)
    return int(found.embeddings.shape[1])
