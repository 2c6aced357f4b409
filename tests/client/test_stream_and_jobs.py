"""Streams, estimates, jobs and usage: the client against the real routes."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lathe_client import ApiStatusError, AsyncEnrichmentClient, EnrichmentClient, JobEndedError

from compression.import_model import import_folder
from compression.registry import ModelRegistry
from jobs.sqlite import SqliteJobStore
from jobs.worker import Worker, WorkerConfig
from service.app import build_app
from service.settings import Settings
from tests.client.conftest import serve
from tests.jobs.conftest import REPOSITORY, wait_until
from tests.jobs.test_enrich import Host
from tests.service.test_graph_routes import Service

MODELS: Any = {"model": "writer", "embedding_model": "encoder", "prompt": "summary@1"}
TINY: Any = {"model": "tiny", "embedding_model": "tiny", "prompt": "summary@1", "max_tokens": 8}
NODES = [{"id": f"n{i}", "text": "" if i == 5 else f"text {i}"} for i in range(12)]


def test_rows_come_in_batches_and_then_the_usage(
    client: EnrichmentClient, service: Service
) -> None:
    *batches, last = client.stream(NODES, returns=["text", "embedding"], **MODELS)
    assert len(batches) > 1
    assert all(batch.usage is None for batch in batches)
    assert len(last) == 0
    assert last.usage is not None
    assert (last.usage.num_nodes, last.usage.num_by_status["failed"]) == (12, 1)
    rows = {row.node_id: row for batch in batches for row in batch.rows()}
    assert set(rows) == {node["id"] for node in NODES}
    assert (rows["n3"].text, rows["n5"].error_code) == ("TEXT 3", "empty_text")
    whole = client.enrich(NODES, returns=["text", "embedding"], **MODELS)
    for row in whole.rows():
        same = rows[row.node_id]
        assert (same.text, same.embedding is None) == (row.text, row.embedding is None)
    with pytest.raises(ApiStatusError):
        list(client.stream(NODES, **{**MODELS, "model": "other"}))


def test_leaving_a_stream_ends_the_work(client: EnrichmentClient, service: Service) -> None:
    service.writer.hold()
    stream = client.stream([{"id": "a", "text": ""}, {"id": "b", "text": "held"}], **MODELS)
    assert next(stream).node_ids == ["a"]
    wait_until(lambda: service.writer.num_running == 1)
    stream.close()  # type: ignore[attr-defined]
    wait_until(lambda: len(service.writer.aborted) == 1)
    assert service.writer.num_running == 0


@pytest.mark.anyio
async def test_the_async_client_streams_a_graph(url: str) -> None:
    async with AsyncEnrichmentClient(url) as client:
        graph = await client.create_graph("g", NODES, [("n0", "n1")])
        ids = [node["id"] for node in NODES]
        seen = [batch async for batch in client.stream_graph(graph.id, ids, **MODELS)]
        assert sorted(i for batch in seen for i in batch.node_ids) == sorted(ids)
        assert (await client.estimate_graph(graph.id, ids, **MODELS))["num_cached"] == 11


def test_estimates(client: EnrichmentClient, service: Service) -> None:
    estimate = client.estimate(NODES, returns=["text", "embedding"], **MODELS)
    assert (estimate["num_calls"], estimate["num_empty"]) == (11, 1)
    assert service.writer.prompts == []


@pytest.fixture
def served(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[EnrichmentClient]:
    """A client of the whole application, with a worker and an engine host that echoes."""
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    import_folder(ModelRegistry(tmp_path / "models"), "tiny", tiny_llama, report=lambda _: None)
    host = Host(tmp_path)
    store, stop = SqliteJobStore(tmp_path / "lathe.db"), threading.Event()
    worker = threading.Thread(target=Worker(store, WorkerConfig(home=tmp_path)).run, args=(stop,))
    worker.start()
    with (
        serve(build_app(Settings(home=tmp_path))) as url,
        EnrichmentClient(url) as client,
    ):
        yield client
    stop.set()
    worker.join()
    store.close()
    host.kill()


def test_jobs_from_submission_to_rows(served: EnrichmentClient) -> None:
    nodes = [{"id": node["id"], "text": "abc" if node["text"] else ""} for node in NODES]
    graph = served.create_graph("g", nodes, [("n0", "n1"), ("n1", "n2")])
    select = {"strategy": "degree", "order": "high", "budget": {"nodes": 3}}
    job = served.submit_job(graph_id=graph.id, select=select, returns=["text", "embedding"], **TINY)
    assert served.wait(job.id, timeout_seconds=60).total == 3
    rows = served.job_result(job.id)
    assert rows.node_ids == ["n1", "n0", "n2"]
    assert rows.has_embedding.all()
    assert rows.usage is not None
    assert rows.usage.num_by_status["ok"] + rows.usage.num_by_status["cached"] == 3
    file_id = served.upload_nodes([{"id": 1, "text": "xyz"}, {"id": 2, "text": ""}])
    again = served.submit_job(file_id=file_id, **TINY)
    served.wait(again.id, timeout_seconds=60)
    assert served.job_result(again.id).statuses == ["ok", "failed"]
    assert served.usage()["total"]["items"] == 5
    served.delete_graph(graph.id)
    with pytest.raises(ApiStatusError) as caught:
        served.submit_job(graph_id=graph.id, **TINY)
    assert caught.value.code == "graph_not_found"


def test_a_cancelled_job_is_told(served: EnrichmentClient) -> None:
    texts = [{"id": i, "text": f"{chr(97 + i % 26)}{chr(97 + i // 26)}"} for i in range(600)]
    job = served.submit_job(file_id=served.upload_nodes(texts), **{**TINY, "max_tokens": 200})
    served.cancel_job(job.id)
    with pytest.raises(JobEndedError, match="cancelled"):
        served.wait(job.id, timeout_seconds=60)
