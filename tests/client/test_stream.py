"""Streams and estimates: the client against the real routes."""

from typing import Any

import pytest
from lathe_client import ApiStatusError, AsyncEnrichmentClient, EnrichmentClient

from tests.jobs.conftest import wait_until
from tests.service.test_graph_routes import Service

MODELS: Any = {"model": "writer", "embedding_model": "encoder", "prompt": "summary@1"}
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
    stream.close()
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
