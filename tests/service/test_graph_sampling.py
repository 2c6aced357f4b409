"""POST /v1/graphs/{id}/sample over scripted models: what the answer says, refusals by name, tenants."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engines.protocol import ContinuationScore, EngineError, ScoreRequest, ScoreResult
from service.routes import graph_sampling
from tests.service.test_graph_routes import Service, error_of

GRAPH: dict[str, Any] = {
    "name": "star",
    "nodes": [
        {"id": "c", "text": "centre", "label": "x", "split": "train"},
        {"id": "p", "text": "near", "label": "x", "split": "train"},
        {"id": "q", "text": "far", "label": "y", "split": "train"},
        {"id": "r", "text": "other", "label": "x", "split": "test"},
        {"id": "s", "text": "alone"},
    ],
    "edges": [["c", "p"], ["c", "q"], ["c", "r"], ["p", "q"]],
}
SAMPLE: dict[str, Any] = {"node_ids": ["c", "p", "s"], "fanout": 2, "noise": 0.0}


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    service = Service(tmp_path)
    service.app.include_router(graph_sampling.router)
    service.state.settings.embedding_model = "encoder"
    with service.client:
        yield service


def sample(service: Service, graph_id: str | None = None, **fields: Any) -> Any:
    graph_id = graph_id or service.create(GRAPH).json()["id"]
    return service.client.post(f"/v1/graphs/{graph_id}/sample", json={**SAMPLE, **fields})


def test_embed(service: Service) -> None:
    response = sample(service)
    assert response.status_code == 200, response.text
    body = response.json()
    assert {key: body[key] for key in ("object", "scorer", "fanout", "num_random", "noise", "seed")} == {
        "object": "graph.sample", "scorer": "embed", "fanout": 2, "num_random": 0, "noise": 0.0, "seed": 0,
    }  # fmt: skip
    assert (body["model"], body["embedding_model"], body["centre_prompt"]) == (None, "encoder", None)  # fmt: skip
    centre, small, alone = body["data"]
    assert [item["node_id"] for item in body["data"]] == ["c", "p", "s"]
    assert (centre["status"], centre["num_neighbors"], centre["error"]) == ("ok", 3, None)
    scores = {n["node_id"]: n["score"] for n in [*centre["kept"], *centre["dropped"]]}
    assert set(scores) == {"p", "q", "r"}
    assert all(0 <= score <= 1 for score in scores.values())
    best = sorted(scores, key=lambda name: -scores[name])
    assert [n["node_id"] for n in centre["kept"]] == best[:2]
    assert [n["node_id"] for n in centre["dropped"]] == best[2:]
    assert [(n["node_id"], n["score"], n["chosen_by"]) for n in small["kept"]] == [
        ("c", None, "all"),
        ("q", None, "all"),
    ]
    assert (alone["kept"], alone["num_neighbors"]) == ([], 0)
    # of c's edges q is no equal and r no training node; of p's, c is equal and q is not
    share = body["homophily"]
    assert (share["all"], share["num_all_edges"]) == (0.5, 4)
    usage = body["usage"]
    assert (usage["num_calls"], usage["num_cached"], usage["prompt_tokens"]) == (1, 0, 0)
    assert sample(service).json()["usage"]["num_calls"] == 0


def test_centre_prompt(service: Service) -> None:
    body = sample(service, centre_prompt="summary@1", model="writer").json()
    assert (body["model"], body["centre_prompt"]) == ("writer", "summary@1")
    # of the three nodes only one has neighbours to choose from
    assert len(service.writer.prompts) == 1
    assert body["usage"]["completion_tokens"] == len("CENTRE")
    raw = sample(service).json()
    assert body["data"][0]["kept"] != raw["data"][0]["kept"] or (
        body["data"][0]["kept"][0]["score"] != raw["data"][0]["kept"][0]["score"]
    )


def test_centre_prompts_that_need_more(service: Service) -> None:
    needs = sample(service, centre_prompt="rewrite@1", model="writer")
    assert error_of(needs) == ("invalid_value", "centre_prompt")
    unknown = sample(service, centre_prompt="nothing", model="writer")
    assert error_of(unknown, 404) == ("prompt_not_found", "centre_prompt")
    answer = json.dumps({"labels": ["x"], "explanation": "It is near."})
    service.writer._answer = lambda prompt: answer
    body = sample(service, centre_prompt="explain", model="writer").json()
    assert body["centre_prompt"] == "explain@1"
    assert body["data"][0]["status"] == "ok"
    assert "<classes>\nx\ny\n</classes>" in service.writer.prompts[0]


def test_llm_rank(service: Service) -> None:
    service.writer._answer = lambda prompt: json.dumps({"1": 0, "2": 5, "3": 10})
    body = sample(service, scorer="llm_rank", model="writer", num_random=1, seed=3).json()
    assert (body["scorer"], body["model"], body["embedding_model"]) == ("llm_rank", "writer", None)
    kept = body["data"][0]["kept"]
    assert (kept[0]["score"], kept[0]["chosen_by"]) == (1.0, "score")
    assert kept[1]["chosen_by"] == "random"
    assert body["usage"]["num_calls"] == 1


def test_a_node_that_cannot_be_judged(service: Service) -> None:
    service.writer._answer = lambda prompt: "{"
    body = sample(service, scorer="llm_rank", model="writer").json()
    centre, small, _ = body["data"]
    assert (centre["status"], centre["kept"], centre["error"]["code"]) == ("failed", [], "not_judged")  # fmt: skip
    assert "not complete JSON" in centre["error"]["message"]
    assert small["status"] == "ok"


def test_llm_pair(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    async def score(request: ScoreRequest) -> ScoreResult:
        yes = -1.0 if "far" in "".join(map(chr, request.context_ids)) else -5.0
        scores = [ContinuationScore(logprob=v, is_greedy=False, token_logprobs=(v,)) for v in (yes, -3.0)]  # fmt: skip
        return ScoreResult(scores=tuple(scores), num_tokens=7)

    monkeypatch.setattr(service.writer, "score", score)
    body = sample(service, scorer="llm_pair", model="writer").json()
    assert [n["node_id"] for n in body["data"][0]["kept"]] == ["q", "p"]
    assert body["data"][0]["kept"][0]["score"] == pytest.approx(1 / (1 + 2.718281828 ** (-2)))
    assert body["usage"]["prompt_tokens"] == 21


def test_an_engine_that_fails(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    async def score(request: ScoreRequest) -> ScoreResult:
        raise EngineError("engine_dead", "it died")

    monkeypatch.setattr(service.writer, "score", score)
    response = sample(service, scorer="llm_pair", model="writer")
    assert error_of(response, 503) == ("engine_dead", None)


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"fanout": 0}, "invalid_value", "fanout"),
        ({"fanout": 257}, "invalid_value", "fanout"),
        ({"num_random": 3}, "invalid_value", "num_random"),
        ({"noise": -1.0}, "invalid_value", "noise"),
        ({"seed": -1}, "invalid_value", "seed"),
        ({"scorer": "best"}, "invalid_value", "scorer"),
        ({"node_ids": []}, "invalid_value", "node_ids"),
        ({"node_ids": ["c", "z"]}, "invalid_value", "node_ids[1]"),
        ({"node_ids": ["c", "c"]}, "invalid_value", "node_ids[1]"),
        ({"node_ids": [1]}, "invalid_value", "node_ids[0]"),
        ({"model": "writer"}, "unsupported_parameter", "model"),
        ({"scorer": "llm_pair", "embedding_model": "encoder"}, "unsupported_parameter", "embedding_model"),
        ({"scorer": "llm_rank", "centre_prompt": "summary"}, "unsupported_parameter", "centre_prompt"),
        ({"temperature": 1}, "unsupported_parameter", "temperature"),
        ({"scorer": "llm_pair", "model": "encoder"}, "invalid_value", "model"),
    ],
)  # fmt: skip
def test_refusals(service: Service, fields: dict[str, Any], code: str, param: str) -> None:
    assert error_of(sample(service, **fields)) == (code, param)


def test_unknown_models_and_graphs(service: Service) -> None:
    response = sample(service, scorer="llm_pair", model="nobody")
    assert error_of(response, 404) == ("model_not_found", "model")
    response = sample(service, embedding_model="nobody")
    assert error_of(response, 404) == ("model_not_found", "embedding_model")
    assert error_of(sample(service, "graph-none"), 404)[0] == "graph_not_found"


def test_graphs_of_others(service: Service) -> None:
    mine = service.create(GRAPH).json()["id"]
    _, key = service.state.keys.create("other", ("inference",))
    response = service.client.post(
        f"/v1/graphs/{mine}/sample", json=SAMPLE, headers={"Authorization": f"Bearer {key}"}
    )
    assert error_of(response, 404)[0] == "graph_not_found"
    assert service.client.post(f"/v1/graphs/{mine}/sample", json=SAMPLE).status_code == 401
