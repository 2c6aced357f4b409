"""The query route over a real tiny decoder: bodies, what the answer says, refusals by name, tenants."""

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from transformers import LlamaForCausalLM

from engines.protocol import EmbedRequest, EmbedResult
from engines.transformers_engine import TransformersEngine
from graph.llaga import filling
from graph.llaga.filling import Template
from graph.llaga.projector import LoadedProjector, ProjectorRegistry, write_projector
from service.enrichment import build_text_vectors
from service.errors import ApiError
from service.routes import graph_query
from tests.graph.llaga.test_projector import manifest_of, tensors_of
from tests.graph.llaga.test_query import Awaited, Words, encode
from tests.service.event_loop import watch_off_loop
from tests.service.test_graph_routes import GRAPH, Caller, Service, error_of

DIM = 5
NAMES = ["a", "b", "c", "d"]


class Engines:
    """Stands for the engine pool: a real decoder, and an encoder whose vectors are drawn from the text's ids."""

    def __init__(self, model: Any) -> None:
        self.decoder = TransformersEngine(lambda: model, model_id="m", checkpoint_hash="a" * 64)
        self.embedded: list[tuple[int, ...]] = []
        self.encoder_hash = "b" * 64

    async def get(self, name: str) -> Any:
        if name == "m":
            return Awaited(self.decoder)
        if name == "e":
            info = SimpleNamespace(
                checkpoint_hash=self.encoder_hash, max_model_len=8, hidden_size=DIM, dtype="float32"
            )
            return SimpleNamespace(info=info, embed=self.embed)
        raise ApiError("model_not_found", f"the model {name!r} does not exist", "model")

    def entry(self, name: str) -> str:
        return name

    async def embed(self, request: EmbedRequest) -> EmbedResult:
        self.embedded += request.token_ids
        vectors = [np.random.default_rng(ids).normal(size=DIM) for ids in request.token_ids]
        return EmbedResult(dim=DIM, vectors=np.array(vectors, dtype="<f4").tobytes(), num_tokens=1)


class Texts:
    async def get(self, entry: str) -> Any:
        words = Words()
        tokenizer = SimpleNamespace(
            encode=encode, decode=words.decode, special_prefix=(1,), special_suffix=(2,),
            max_token_chars=9,
        )  # fmt: skip
        return SimpleNamespace(tokenizer=tokenizer, chat_template=None)


@pytest.fixture
def service(tmp_path: Path, tiny_llama: Path) -> Iterator[Service]:
    service = Service(tmp_path)
    service.app.include_router(graph_query.router)
    model = LlamaForCausalLM.from_pretrained(tiny_llama).eval().requires_grad_(False)
    service.state.engines = cast(Any, Engines(model))
    service.state.tokenizers = cast(Any, Texts())
    service.state.text_vectors = build_text_vectors(
        service.state.engines, service.state.tokenizers, service.state.cache
    )
    with service.client:
        yield service


def register(service: Service, name: str = "mine", **changes: Any) -> None:
    """A projector for the local tenant."""
    registry = ProjectorRegistry(service.state.settings.projectors_dir)
    template = Template(kind="ho", hops=2, operator="mean")
    manifest = replace(manifest_of(template), owner="local", **changes)
    tensors = tensors_of(manifest)[1]
    manifest = replace(manifest, hidden_size=64)
    wide = {
        key: np.resize(value, _shape(key, value, manifest.encoder_dim))
        for key, value in tensors.items()
    }
    folder = registry.new_folder()
    write_projector(folder, manifest, wide)
    registry.register(folder, name)


def _shape(name: str, value: Any, dim: int) -> tuple[int, ...]:
    if value.ndim == 1:
        return (64,)
    return (64, dim if name.startswith("layers.0") else 64)


CLASSIFY: dict[str, Any] = {
    "projector": "mine",
    "task": "node_classification",
    "node_ids": ["b", "a", "d"],
}


def query(service: Service, body: Any, graph_id: str | None = None) -> Any:
    path = f"/v1/graphs/{graph_id or service.graph_id()}/query"
    return service.client.post(path, json=body)


def test_classification(service: Service) -> None:
    register(service)
    response = query(service, CLASSIFY)
    assert response.status_code == 200, response.text
    answer = response.json()
    assert answer["model"] == "m"
    assert answer["num_encoded_nodes"] == 4
    assert [item["node_ids"] for item in answer["data"]] == [["b"], ["a"], ["d"]]
    # two hops from b: a, then c; from a both; d is alone
    nodes = [item["template_nodes"] for item in answer["data"]]
    assert nodes == [[["a", "b", "c"]], [["a", "b", "c"]], [["d"]]]
    for item in answer["data"]:
        assert set(item["probabilities"]) == {"x", "y"}
        assert sum(item["probabilities"].values()) == pytest.approx(1)
        assert item["text"] == max(item["logprobs"], key=item["logprobs"].get)
    (alone,) = query(service, CLASSIFY | {"node_ids": ["a"]}).json()["data"]
    assert alone["logprobs"] == pytest.approx(answer["data"][1]["logprobs"], abs=1e-5)


def test_link_prediction_hides_the_partner(service: Service) -> None:
    register(service, tasks=("link_prediction",))
    body = {"projector": "mine", "task": "link_prediction", "pairs": [["b", "a"], ["b", "c"]]}
    answer = query(service, body).json()
    # without a, b has no neighbour; without b, a has c
    assert answer["data"][0]["template_nodes"] == [["b"], ["a", "c"]]
    assert answer["data"][1]["template_nodes"] == [["a", "b"], ["a", "c"]]
    assert set(answer["data"][0]["probabilities"]) == {"yes", "no"}


def test_only_nodes_in_reach_are_encoded(service: Service) -> None:
    register(service)
    engines = cast(Engines, service.state.engines)
    assert query(service, CLASSIFY | {"node_ids": ["d"]}).json()["num_encoded_nodes"] == 1
    assert engines.embedded == [(1, 2)]  # its text is empty


def test_vectors_are_kept(service: Service) -> None:
    """A node is encoded once for a tenant, and its kept vector gives the same answer."""
    register(service)
    engines = cast(Engines, service.state.engines)
    graph_id = service.graph_id()
    first = query(service, CLASSIFY | {"node_ids": ["b"]}, graph_id).json()
    assert (first["num_encoded_nodes"], len(engines.embedded)) == (3, 3)
    again = query(service, CLASSIFY | {"node_ids": ["b", "d"]}, graph_id).json()
    assert (again["num_encoded_nodes"], len(engines.embedded)) == (1, 4)
    assert again["data"][0] == first["data"][0]
    engines.encoder_hash = "c" * 64  # another encoder's vectors are not found under this name
    register(service, "second", encoder_hash="c" * 64)
    other = query(service, CLASSIFY | {"projector": "second", "node_ids": ["b"]}, graph_id).json()
    assert other["num_encoded_nodes"] == 3


def test_the_graphs_own_features(service: Service) -> None:
    """A projector without an encoder reads them, and only of the width that it was trained with."""
    register(service, encoder=None, encoder_hash=None)
    nodes = [node | {"features": [float(place)] * DIM} for place, node in enumerate(GRAPH["nodes"])]
    answer = query(service, CLASSIFY, service.create(GRAPH | {"nodes": nodes}).json()["id"]).json()
    assert answer["num_encoded_nodes"] == 0
    assert cast(Engines, service.state.engines).embedded == []
    assert answer["data"][0]["logprobs"] != answer["data"][2]["logprobs"]
    assert service.client.get("/v1/projectors").json()["data"][0]["embedding_model"] is None
    narrow = [node | {"features": node["features"][:3]} for node in nodes]
    for given in (GRAPH, GRAPH | {"nodes": narrow}):
        response = query(service, CLASSIFY, service.create(given).json()["id"])
        assert error_of(response) == ("invalid_value", "projector")


def test_description(service: Service) -> None:
    register(service, tasks=("node_description", "node_classification"))
    response = query(service, CLASSIFY | {"task": "node_description"})
    assert response.status_code == 200, response.text
    answer = response.json()
    assert [item["node_ids"] for item in answer["data"]] == [["b"], ["a"], ["d"]]
    for item in answer["data"]:
        assert isinstance(item["text"], str)
        assert (item["probabilities"], item["logprobs"]) == (None, None)
    assert answer["data"][2]["template_nodes"] == [["d"]]


def test_a_graph_that_is_deleted_meanwhile(service: Service) -> None:
    """What is open stays readable; who comes later is told."""
    register(service)
    graph_id = service.graph_id()
    engines = cast(Engines, service.state.engines)
    embed = engines.embed

    async def delete_and_embed(request: EmbedRequest) -> EmbedResult:
        service.state.graphs.delete(graph_id, "local")
        engines.embed = embed  # type: ignore[method-assign]
        return await embed(request)

    engines.embed = delete_and_embed  # type: ignore[method-assign]
    response = query(service, CLASSIFY, graph_id)
    assert response.status_code == 200, response.text
    assert response.json()["data"][0]["template_nodes"] == [["a", "b", "c"]]
    assert error_of(query(service, CLASSIFY, graph_id), 404)[0] == "graph_not_found"


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"projector": "other"}, "projector_not_found", "projector"),
        ({"projector": "../mine"}, "projector_not_found", "projector"),
        ({"node_ids": ["a", "zzz"]}, "invalid_value", "node_ids[1]"),
        ({"operator": "sym"}, "invalid_value", "operator"),
        ({"task": "node_description"}, "invalid_value", "task"),
        ({"node_ids": None}, "invalid_value", "node_ids"),
        ({"pairs": [["a", "b"]]}, "invalid_value", "pairs"),
        ({"task": "link_prediction", "node_ids": None, "pairs": [["a", "b"]]}, "invalid_value", "task"),
        ({"task": "link_prediction", "node_ids": None, "pairs": [["a", "c"], ["a", "a"]]}, "invalid_value", "pairs[1]"),
        ({"task": "link_prediction", "node_ids": None, "pairs": [["a", "q"]]}, "invalid_value", "pairs[0][1]"),
    ],
)  # fmt: skip
def test_refusals(service: Service, change: dict[str, Any], code: str, param: str) -> None:
    register(service)
    response = query(service, CLASSIFY | change)
    status = 404 if code == "projector_not_found" else 400
    assert error_of(response, status) == (code, param)


def test_another_encoder_or_model_is_refused(service: Service) -> None:
    register(service)
    engines = cast(Engines, service.state.engines)
    engines.encoder_hash = "c" * 64
    assert error_of(query(service, CLASSIFY)) == ("invalid_value", "projector")
    engines.encoder_hash = "b" * 64
    register(service, "older", model_hash="d" * 64)
    register(service, "wider", encoder_dim=DIM + 1)
    for name in ("older", "wider"):
        response = query(service, CLASSIFY | {"projector": name})
        assert error_of(response) == ("invalid_value", "projector")
    register(service, "orphan", model="gone")
    response = query(service, CLASSIFY | {"projector": "orphan"})
    assert error_of(response, 404) == ("model_not_found", "model")


def test_too_many_nodes_in_reach(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    register(service, tasks=("node_classification", "link_prediction"))
    pairs = {"projector": "mine", "task": "link_prediction", "pairs": [["b", "d"], ["b", "a"]]}
    for most, body, param, words in (
        (3, CLASSIFY, "node_ids", "the first 3 questions read more than 3 nodes, at most 3"),
        (2, CLASSIFY, "node_ids[0]", "more than 2 nodes for this one question, at most 2"),
        (2, CLASSIFY | {"node_ids": ["d", "a"]}, "node_ids[1]", "this one question"),
        (3, pairs, "pairs[0]", "more than 3 nodes for this one question, at most 3"),
    ):
        monkeypatch.setattr(graph_query, "MAX_TEMPLATE_NODES", most)
        response = query(service, body)
        assert error_of(response) == ("invalid_value", param)
        message = response.json()["error"]["message"]
        assert words in message
        assert ("ask fewer" in message) == (param == "node_ids")


def test_all_that_computes_is_off_the_event_loop(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(service)
    seen: list[str] = []

    for place, name in (
        (graph_query, "plan_within"),
        (filling, "needed_nodes"),
        (filling.Filling, "vectors"),
        (LoadedProjector, "project"),
        (graph_query, "_answer"),
        (graph_query, "json_response"),
    ):
        watch_off_loop(monkeypatch, seen, place, name)
    assert query(service, CLASSIFY).status_code == 200
    assert {name: seen.count(name) for name in seen} == {
        "plan_within": 1, "needed_nodes": 3, "vectors": 3, "project": 3, "_answer": 3,
        "json_response": 1,
    }  # fmt: skip


class Endless:
    """Plans until nobody waits. Attributes: begun, ended: once it does."""

    def __init__(self) -> None:
        self.begun, self.ended = threading.Event(), threading.Event()

    def __call__(self, *_: Any, is_stopped: Any, **__: Any) -> Any:
        self.begun.set()
        while not is_stopped():
            pass
        self.ended.set()
        raise filling.PlanStoppedError


@pytest.mark.anyio
async def test_planning_ends_when_the_client_leaves(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(service)
    plan = Endless()
    monkeypatch.setattr(graph_query, "plan_within", plan)
    path = f"/v1/graphs/{service.graph_id()}/query"
    caller = Caller(service, service.client.build_request("POST", path, json=CLASSIFY))
    assert await asyncio.to_thread(plan.begun.wait, 60)
    caller.left.set()
    await caller.task
    assert caller.status == 408
    assert await asyncio.to_thread(plan.ended.wait, 60)


def test_planning_ends_with_the_time_limit(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(service)
    plan = Endless()
    monkeypatch.setattr(graph_query, "plan_within", plan)
    graph_id = service.graph_id()
    service.state.settings = service.state.settings.model_copy(
        update={"request_timeout_seconds": 0.2}
    )
    assert error_of(query(service, CLASSIFY, graph_id), 408)[0] == "request_timeout"
    assert plan.ended.wait(60)


def test_unknown_graph(service: Service) -> None:
    register(service)
    assert error_of(query(service, CLASSIFY, "graph-none"), 404)[0] == "graph_not_found"


def test_projectors_are_listed_and_deleted(service: Service) -> None:
    register(service)
    register(service, "theirs")
    path = service.state.settings.projectors_dir / "theirs" / "projector.json"
    path.write_text(path.read_text().replace('"local"', '"somebody"'))
    (listed,) = service.client.get("/v1/projectors").json()["data"]
    assert (listed["id"], listed["operator"], listed["classes"]) == ("mine", "mean", ["x", "y"])
    for name in ("theirs", "nobody"):
        response = service.client.delete(f"/v1/projectors/{name}")
        assert error_of(response, 404) == ("projector_not_found", "projector_id")
        assert error_of(query(service, CLASSIFY | {"projector": name}), 404)[1] == "projector"
    assert service.client.delete("/v1/projectors/mine").json()["deleted"] is True
    assert service.client.get("/v1/projectors").json()["data"] == []
