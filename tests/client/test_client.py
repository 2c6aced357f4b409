"""Both clients against the real routes, over HTTP."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from lathe_client import ApiStatusError, AsyncEnrichmentClient, EnrichmentClient, calls

from tests.client.conftest import serve
from tests.fakes.echo_engine import echo_vector
from tests.jobs.conftest import wait_until
from tests.service import openai_app
from tests.service.test_graph_routes import Service

MODELS: Any = {"model": "writer", "embedding_model": "encoder"}
NODES = [{"id": "n1", "text": "one"}, {"id": "n2", "text": ""}, {"id": "n3", "text": "three"}]
LETTERS = [
    {"id": "a", "text": "first", "label": "x", "split": "train"},
    {"id": "b", "text": "second"},
    {"id": "c", "text": "third"},
]


def test_enrich_gives_rows_texts_and_vectors(client: EnrichmentClient, service: Service) -> None:
    enriched = client.enrich(NODES, prompt="summary@1", returns=["text", "embedding"], **MODELS)
    assert enriched.node_ids == ["n1", "n2", "n3"]
    assert enriched.statuses == ["ok", "failed", "ok"]
    assert enriched.texts == ["ONE", None, "THREE"]
    assert enriched.has_embedding.tolist() == [True, False, True]
    assert enriched.embeddings.dtype == np.float16
    assert enriched.embeddings.shape == (3, 4)
    assert enriched.embeddings[1].tolist() == [0, 0, 0, 0]
    # The scripted encoder's vector is the number of tokens and their sum: "one\nONE" between two marks.
    ids = service.encoder.embedded[0]
    assert enriched.embeddings[0].tolist() == [len(ids), sum(ids), 0.5, 0.5]
    assert (enriched.model, enriched.embedding_model) == ("writer", "encoder")
    assert enriched.prompt.id == "summary"
    assert enriched.usage is not None
    assert enriched.usage.num_by_status["ok"] == 2
    first, second, third = enriched.rows()
    assert (first.node_id, first.text, second.error_code) == ("n1", "ONE", "empty_text")
    assert second.embedding is None
    assert third.embedding is not None
    exact = client.enrich(
        NODES, prompt="summary@1", returns=["embedding"], embedding_dtype="float32", **MODELS
    )
    assert exact.embeddings.dtype == np.float32
    assert exact.texts == [None, None, None]


@pytest.mark.anyio
async def test_embeddings_of_both_clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "MAX_NODES_PER_REQUEST", 2)
    service = openai_app.Service(tmp_path)
    with serve(service.app, lifespan="off") as url:
        arguments: Any = {"texts": ["a", "b", "a " * 20], "model": openai_app.ENCODER}
        with EnrichmentClient(url) as client:
            vectors = client.embeddings(**arguments, truncate=True)
            with pytest.raises(ApiStatusError) as caught:
                client.embeddings(**arguments)
            with pytest.raises(ValueError, match="no text"):
                client.embeddings([], model=openai_app.ENCODER)
        assert caught.value.code == "context_length_exceeded"
        assert [len(request.token_ids) for request in service.encoder.embed_requests[:2]] == [2, 1]
        tokens = [ids for one in service.encoder.embed_requests[:2] for ids in one.token_ids]
        expected = [echo_vector(ids, normalize=True) for ids in tokens]
        assert vectors.dtype == np.float32
        assert np.allclose(vectors, expected)
        async with AsyncEnrichmentClient(url) as aio:
            assert np.array_equal(await aio.embeddings(**arguments, truncate=True), vectors)


def test_vectors_of_the_text_alone_are_told_apart(
    client: EnrichmentClient, service: Service
) -> None:
    service.writer._answer = lambda prompt: "" if "three" in prompt else "written"
    enriched = client.enrich(NODES, prompt="summary@1", returns=["embedding"], **MODELS)
    assert enriched.statuses == ["ok", "failed", "invalid_output"]
    assert enriched.has_embedding.tolist() == [True, False, True]
    assert enriched.enriched_mask.tolist() == [True, False, False]
    *_, last = client.stream(NODES, prompt="summary@1", returns=["embedding"], **MODELS)
    assert (last.enriched_mask.shape, last.embeddings.shape) == ((0,), (0, 4))


def test_nothing_needs_pandas() -> None:
    """pyarrow imports it for some of its methods, and the client does not list it."""
    sources = Path(calls.__file__).parent.glob("*.py")
    assert [path.name for path in sources if "pandas" in path.read_text()] == []


def test_text_alone_has_no_vectors(client: EnrichmentClient) -> None:
    enriched = client.enrich(NODES, prompt="summary@1", **MODELS)
    assert enriched.embedding_model is None
    assert not enriched.has_embedding.any()
    assert not enriched.enriched_mask.any()
    with pytest.raises(ValueError, match="no embeddings"):
        _ = enriched.embeddings


def test_rows_come_as_they_finish_and_usage_last(client: EnrichmentClient) -> None:
    batches = list(
        client.stream(NODES, prompt="summary@1", returns=["text", "embedding"], **MODELS)
    )
    assert [batch.usage for batch in batches[:-1]] == [None] * (len(batches) - 1)
    last = batches[-1]
    assert len(last) == 0
    assert last.usage is not None
    assert last.usage.num_by_status["ok"] == 2
    rows = {row.node_id: row for batch in batches for row in batch.rows()}
    assert {node_id: row.text for node_id, row in rows.items()} == {
        "n1": "ONE",
        "n2": None,
        "n3": "THREE",
    }
    assert rows["n3"].embedding is not None
    graph = client.create_graph("letters", LETTERS, [])
    streamed = client.stream_graph(graph.id, ["b", "a"], prompt="summary@1", **MODELS)
    assert {node_id for batch in streamed for node_id in batch.node_ids} == {"a", "b"}


def test_leaving_a_stream_ends_the_work(client: EnrichmentClient, service: Service) -> None:
    service.writer.hold()
    stream = client.stream(NODES[1:], prompt="summary@1", **MODELS)
    assert next(iter(stream)).node_ids == ["n2"]  # the empty one, which needs no LLM
    wait_until(lambda: len(service.writer.prompts) == 1)
    assert service.writer.aborted == []
    stream.close()
    wait_until(lambda: len(service.writer.aborted) == 1)


def test_an_estimate_asks_no_model(client: EnrichmentClient, service: Service) -> None:
    client.enrich(NODES[:1], prompt="summary@1", **MODELS)
    asked = len(service.writer.prompts)
    estimate = client.estimate(NODES, prompt="summary@1", **MODELS)
    assert (estimate["num_nodes"], estimate["num_cached"], estimate["num_calls"]) == (3, 1, 1)
    graph = client.create_graph("letters", LETTERS, [])
    of_graph = client.estimate_graph(graph.id, ["a", "b"], prompt="summary@1", **MODELS)
    assert of_graph["num_calls"] == 2
    assert len(service.writer.prompts) == asked


def test_json_answers_come_as_fields_and_label(client: EnrichmentClient, service: Service) -> None:
    answer = {"labels": ["x"], "explanation": "It is the first letter."}
    service.writer._answer = lambda prompt: json.dumps(answer)
    enriched = client.enrich(
        NODES[:1], prompt="explain", classes=["x", "y"], returns=["text"], **MODELS
    )
    assert enriched.labels == ["x"]
    (row,) = enriched.rows()
    assert row.fields == answer
    assert row.text == "It is the first letter."


def test_many_nodes_go_out_in_pieces(client: EnrichmentClient, service: Service) -> None:
    nodes = [{"id": i, "text": f"text {i % 40}"} for i in range(1100)]
    enriched = client.enrich(nodes, prompt="summary@1", **MODELS)
    assert enriched.node_ids == list(range(1100))
    assert enriched.usage is not None
    assert enriched.usage.num_nodes == 1100
    assert enriched.usage.num_by_status["ok"] == 40
    assert len(service.writer.prompts) == 40
    with pytest.raises(ValueError, match="a budget is for one request"):
        client.enrich(nodes, prompt="summary@1", budget={"max_nodes": 3}, **MODELS)
    with pytest.raises(ValueError, match="no node"):
        client.enrich([], prompt="summary@1", **MODELS)


def test_graphs_from_create_to_delete(client: EnrichmentClient) -> None:
    graph = client.create_graph("letters", LETTERS, [("a", "b"), ("b", "c"), ("c", "c")])
    assert (graph.num_nodes, graph.num_edges, graph.num_self_loops) == (3, 2, 1)
    assert graph.has_labels
    assert client.graph(graph.id) == graph
    assert client.graphs() == [graph]
    selection = client.select(graph.id, "degree", budget={"nodes": 1}, order="high")
    assert selection.node_ids == ["b"]
    assert selection.raw["order"] == "high"
    enriched = client.enrich_graph(graph.id, ["c", "a"], prompt="summary@1", **MODELS)
    assert enriched.texts == ["THIRD", "FIRST"]
    client.delete_graph(graph.id)
    with pytest.raises(ApiStatusError) as caught:
        client.graph(graph.id)
    assert caught.value.code == "graph_not_found"
    assert caught.value.request_id is not None


def test_a_graph_from_tables_with_integer_ids_and_no_edge(client: EnrichmentClient) -> None:
    nodes = pa.table({"id": [7, 8], "text": ["seven", "eight"]})
    assert client.create_graph("t", nodes, []).id_type == "int64"
    edges = pa.table({"source": [7], "target": [8]})
    assert client.create_graph("t", nodes, edges, directed=True).num_edges == 1


def test_the_same_key_makes_one_graph(client: EnrichmentClient) -> None:
    made = [client.create_graph("g", LETTERS, [], idempotency_key="k").id for _ in range(2)]
    assert made[0] == made[1]
    with pytest.raises(ApiStatusError) as caught:
        client.create_graph("other", LETTERS, [], idempotency_key="k")
    assert caught.value.code == "idempotency_conflict"


@pytest.mark.parametrize("kind", [np.array, torch.tensor, lambda ids: list(np.array(ids))])
def test_ids_may_be_arrays_and_tensors(kind: Any, client: EnrichmentClient) -> None:
    graph = client.create_graph("g", [{"id": i, "text": f"text {i}"} for i in range(3)], [])
    ids = kind([2, 0])
    given: Any = {"prompt": "summary@1", **MODELS}
    assert client.enrich_graph(graph.id, ids, **given).node_ids == [2, 0]
    streamed = client.stream_graph(graph.id, ids, **given)
    assert {node_id for batch in streamed for node_id in batch.node_ids} == {0, 2}
    assert client.estimate_graph(graph.id, ids, **given)["num_nodes"] == 2


def test_refusals_name_the_field(client: EnrichmentClient) -> None:
    with pytest.raises(ApiStatusError) as caught:
        client.enrich(NODES, prompt="no-such-prompt", **MODELS)
    assert (caught.value.status, caught.value.param) == (404, "prompt")
    with pytest.raises(ApiStatusError) as caught:
        client.enrich([{"id": "a", "text": "t", "colour": "red"}], prompt="summary@1", **MODELS)
    assert caught.value.code == "unsupported_parameter"


def test_the_catalog(client: EnrichmentClient) -> None:
    assert "summary" in [prompt["id"] for prompt in client.prompts()]
    assert client.prompt("summary@1")["version"] == 1


def test_float16_on_the_wire_costs_few_bytes(client: EnrichmentClient, service: Service) -> None:
    """The mark of 1.6 KB per node at 384 numbers and about 700 bytes of text; here by size, not by time."""
    service.encoder.info = replace(service.encoder.info, hidden_size=384, max_model_len=500)
    texts = [f"{i:03} " + "lorem ipsum dolor " * 39 for i in range(64)]
    sizes: list[int] = []
    client._http.event_hooks["response"] = [
        lambda response: sizes.append(int(response.headers["content-length"]))
    ]
    nodes = [{"id": i, "text": text} for i, text in enumerate(texts)]
    enriched = client.enrich(
        nodes, prompt="summary@1", returns=["text", "embedding"], max_tokens=700, **MODELS
    )
    assert min(len(text or "") for text in enriched.texts) >= 690
    assert sizes[0] / 64 <= 1600


@pytest.mark.anyio
async def test_the_async_client_does_the_same(url: str) -> None:
    async with AsyncEnrichmentClient(url) as client:
        graph = await client.create_graph("letters", LETTERS, [("a", "b")])
        selection = await client.select(graph.id, "pagerank", budget={"fraction": 0.5})
        enriched = await client.enrich_graph(
            graph.id,
            selection.node_ids,
            prompt="summary@1",
            returns=["text", "embedding"],
            **MODELS,
        )
        assert enriched.texts == ["FIRST", "SECOND"]
        assert enriched.has_embedding.all()
        await client.delete_graph(graph.id)
        assert await client.graphs() == []
