"""Graph and enrichment routes over a scripted model: bodies, refusals, tenants, negotiation, disconnects."""

import asyncio
import base64
import contextlib
import dataclasses
import io
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.testclient import TestClient

from compression.registry import ModelRegistry
from engines.protocol import AsyncEngine, EmbedRequest, EmbedResult, EngineError
from graph import nodes
from graph.arrow_stream import MEDIA_TYPE
from graph.cache import EnrichmentCache
from graph.catalog import default_catalog
from graph.enrich import Enricher
from graph.enrich_types import EnrichEstimate, EnrichRequest
from graph.node_text import GAP, TextModel
from graph.selection.request import SelectRequest
from graph.store import GraphNotFoundError, GraphStore
from graph.text_vectors import TextVectors
from service.auth import LOCAL_IDENTITY, KeyStore
from service.deps import UPLOADS_AT_ONCE, AppState
from service.engine_pool import EnginePool
from service.enrichment import NDJSON, EnrichResponse
from service.errors import ApiError
from service.metrics import Metrics
from service.middleware import RequestMiddleware
from service.routes import enrich, graphs, prompts
from service.settings import Settings
from service.supervisor_client import SupervisorClient
from service.tokenizers import TokenizerCache
from tests.graph.fakes import CodePointText, ScriptedEngine, own_text
from tests.service.event_loop import watch_off_loop

GRAPH: dict[str, Any] = {
    "name": "letters",
    "nodes": [
        {"id": "a", "text": "first", "label": "x", "split": "train"},
        {"id": "b", "text": "second", "label": "y"},
        {"id": "c", "text": "third"},
        {"id": "d", "text": ""},
    ],
    "edges": [["a", "b"], ["a", "c"], ["c", "c"], ["b", "a"]],
}
ENRICH: dict[str, Any] = {
    "prompt": "summary@1",
    "nodes": [{"id": "n1", "text": "one"}, {"id": "n2", "text": "two"}],
    "model": "writer",
    "embedding_model": "encoder",
}


def build_test_app(state: AppState) -> FastAPI:
    """The routers of this file behind the service's middleware, and nothing else of the application."""
    app = FastAPI()
    app.state.lathe = state
    for module in (graphs, enrich, prompts):
        app.include_router(module.router)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        detail = error.errors()[0]
        if detail["type"] == "json_invalid":
            refused = ApiError("invalid_json", "the body is not valid JSON")
        else:
            unknown = detail["type"] == "extra_forbidden"
            code = "unsupported_parameter" if unknown else "invalid_value"
            place = "".join(
                f"[{part}]" if isinstance(part, int) else f".{part}" for part in detail["loc"][1:]
            )
            refused = ApiError(code, detail["msg"], place.lstrip(".") or None)
        return JSONResponse(refused.body(), refused.status)

    app.add_middleware(RequestMiddleware, settings=state.settings)
    return app


class Service:
    """The service, its scripted models, and a client."""

    def __init__(self, home: Path) -> None:
        self.writer = ScriptedEngine()
        self.encoder = ScriptedEngine(model="encoder", kind="encoder", checkpoint_hash="e", dim=4)
        settings = Settings(home=home)
        registry = ModelRegistry(settings.models_dir)
        supervisor = SupervisorClient(settings.supervisor_socket)
        metrics = Metrics()
        cache = EnrichmentCache(settings.cache_database)
        self.state = AppState(
            settings=settings,
            registry=registry,
            engines=EnginePool(settings, registry, supervisor),
            jobs=cast(Any, None),
            files=cast(Any, None),
            keys=KeyStore(settings.keys_file),
            metrics=metrics,
            tokenizers=TokenizerCache(),
            graphs=GraphStore(settings.graphs_dir),
            cache=cache,
            enricher=Enricher(
                engine_for=self._engine_for,
                text_for=self._text_for,
                cache=cache,
                observer=metrics,
            ),
            text_vectors=TextVectors(
                engine_for=self._engine_for,
                text_for=self._text_for,
                cache=EnrichmentCache(settings.cache_database),
            ),
        )
        self.app = build_test_app(self.state)
        self.client = TestClient(self.app, raise_server_exceptions=False)

    async def _engine_for(self, model: str, param: str) -> AsyncEngine:
        engines = {"writer": self.writer, "encoder": self.encoder}
        if model not in engines:
            raise ApiError("model_not_found", f"the model {model!r} does not exist", param)
        return engines[model]

    async def _text_for(self, model: str, param: str) -> TextModel:
        return CodePointText(marks=model == "encoder")

    def create(self, body: Any = None, **options: Any) -> Any:
        return self.client.post("/v1/graphs", json=GRAPH if body is None else body, **options)

    def graph_id(self) -> str:
        identifier: str = self.create().json()["id"]
        return identifier


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    service = Service(tmp_path)
    with service.client:
        yield service


class Caller:
    """A request that has been sent. Attributes: left: set it to leave; status: of the answer, once it has begun."""

    def __init__(self, service: Service, request: Any) -> None:
        self.left = asyncio.Event()
        self.status: int | None = None
        self._incoming = [{"type": "http.request", "body": request.read(), "more_body": False}]
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": request.method,
            "scheme": "http",
            "path": request.url.path,
            "raw_path": request.url.raw_path,
            "query_string": b"",
            "headers": [(name.lower(), value) for name, value in request.headers.raw],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
            "state": {},
        }
        self.task = asyncio.create_task(service.app(scope, self._receive, self._send))

    async def _receive(self) -> Any:
        if self._incoming:
            return self._incoming.pop()
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        self.status = message.get("status", self.status)


class Turns(asyncio.Semaphore):
    """Attributes: num_asked: callers so far."""

    num_asked = 0

    async def acquire(self) -> Any:
        self.num_asked += 1
        return await super().acquire()


def error_of(response: Any, status: int = 400) -> tuple[str, str | None]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error["code"], error["param"]


def parquet(columns: dict[str, list[Any]]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file)
    return file.getvalue()


def arrow(columns: dict[str, list[Any]]) -> bytes:
    file = io.BytesIO()
    table = pa.table(columns)
    with pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    return file.getvalue()


NODE_COLUMNS: dict[str, list[Any]] = {
    "id": ["a", "b", "c"],
    "text": ["first", "second", "third"],
    "label": ["x", "y", None],
}
EDGE_COLUMNS: dict[str, list[Any]] = {"source": ["a", "a"], "target": ["b", "c"]}


# Graphs


def test_create_get_list_delete(service: Service) -> None:
    created = service.create()
    assert created.status_code == 201
    graph = created.json()
    assert graph["id"].startswith("graph-")
    assert (graph["object"], graph["name"]) == ("graph", "letters")
    assert (graph["num_nodes"], graph["num_edges"]) == (4, 2)
    assert (graph["num_self_loops"], graph["num_duplicate_edges"]) == (1, 1)
    assert (graph["has_labels"], graph["has_splits"], graph["directed"]) == (True, True, False)
    assert service.client.get(f"/v1/graphs/{graph['id']}").json() == graph
    listed = service.client.get("/v1/graphs").json()
    assert (listed["data"], listed["has_more"]) == ([graph], False)
    deleted = service.client.delete(f"/v1/graphs/{graph['id']}")
    assert deleted.json() == {"id": graph["id"], "object": "graph", "deleted": True}
    assert error_of(service.client.get(f"/v1/graphs/{graph['id']}"), 404)[0] == "graph_not_found"
    assert error_of(service.client.delete(f"/v1/graphs/{graph['id']}"), 404)[0] == "graph_not_found"


def test_list_pages(service: Service) -> None:
    ids = [service.graph_id() for _ in range(3)]
    first = service.client.get("/v1/graphs", params={"limit": 2}).json()
    assert first["has_more"] is True
    rest = service.client.get("/v1/graphs", params={"after": first["last_id"]}).json()
    assert sorted(g["id"] for g in first["data"] + rest["data"]) == sorted(ids)
    unknown = service.client.get("/v1/graphs", params={"after": "x"})
    assert error_of(unknown, 404) == ("graph_not_found", "after")


@pytest.mark.parametrize("write", [parquet, arrow])
def test_create_from_files(
    service: Service, write: Callable[[dict[str, list[Any]]], bytes]
) -> None:
    files = {"nodes": write(NODE_COLUMNS), "edges": write(EDGE_COLUMNS)}
    created = service.client.post("/v1/graphs", data={"name": "files"}, files=files)
    assert created.status_code == 201, created.text
    assert (created.json()["num_nodes"], created.json()["num_edges"]) == (3, 2)


def test_json_and_files_give_the_same_graph(service: Service) -> None:
    body = {
        "name": "j",
        "nodes": [
            {"id": i, "text": t, "label": x} for i, t, x in zip(*NODE_COLUMNS.values(), strict=True)
        ],
        "edges": [["a", "b"], ["a", "c"]],
    }
    files = {"nodes": parquet(NODE_COLUMNS), "edges": parquet(EDGE_COLUMNS)}
    one = service.create(body).json()
    two = service.client.post("/v1/graphs", data={"name": "f"}, files=files).json()
    assert one["content_hash"] == two["content_hash"]


@pytest.mark.parametrize("write", [parquet, arrow])
def test_features_in_files_and_in_json_are_the_same(
    service: Service, write: Callable[[dict[str, list[Any]]], bytes]
) -> None:
    rows = [[0.1, 2.0], [-3.5, 0.0], [1e-8, 65504.0]]
    nodes = [
        {"id": i, "text": t, "label": x, "features": f}
        for i, t, x, f in zip(*NODE_COLUMNS.values(), rows, strict=True)
    ]
    one = service.create({"name": "j", "nodes": nodes, "edges": [["a", "b"], ["a", "c"]]}).json()
    columns = {**NODE_COLUMNS, "features": [np.array(row, dtype=np.float32) for row in rows]}
    files = {"nodes": write(columns), "edges": write(EDGE_COLUMNS)}
    two = service.client.post("/v1/graphs", data={"name": "f"}, files=files).json()
    assert one["feature_dim"] == two["feature_dim"] == 2
    assert one["content_hash"] == two["content_hash"]


def test_files_with_a_feature_that_is_no_number(service: Service) -> None:
    columns = {**NODE_COLUMNS, "features": [[1.0, 2.0], [float("nan"), 0.0], [0.0, 0.0]]}
    files = {"nodes": parquet(columns), "edges": parquet(EDGE_COLUMNS)}
    response = service.client.post("/v1/graphs", data={"name": "f"}, files=files)
    assert error_of(response) == ("invalid_value", "nodes[1].features")
    assert "'b'" in response.json()["error"]["message"]


def test_a_graph_with_a_text_of_a_megabyte(service: Service) -> None:
    """Kept, selected and enriched by its head; its length is its own."""
    body = change(
        nodes=[{"id": "a", "text": "word " * 200_000}, {"id": "b", "text": "x"}], edges=[]
    )
    graph_id = service.create(body).json()["id"]
    select = {"strategy": "text_length", "order": "high", "budget": {"nodes": 1}}
    answer = service.client.post(f"/v1/graphs/{graph_id}/select", json=select).json()
    assert (answer["node_ids"], answer["scores"]) == (["a"], [1_000_000.0])
    assert answer["estimate"]["tokens"] == 1024 + 256
    enrich_body = {"node_ids": ["a"], "prompt": "summary@1", "model": "writer"}
    answer = service.client.post(f"/v1/graphs/{graph_id}/enrich", json=enrich_body).json()
    assert answer["data"][0]["status"] == "ok"
    assert answer["data"][0]["truncated_tokens"] > 900_000


def test_a_graph_that_is_deleted_while_it_is_enriched(service: Service) -> None:
    graph_id = service.graph_id()
    answer_as_before = service.writer._answer

    def delete_and_answer(prompt: str) -> str:
        with contextlib.suppress(GraphNotFoundError):
            service.state.graphs.delete(graph_id, LOCAL_IDENTITY.tenant)
        return answer_as_before(prompt)

    service.writer._answer = delete_and_answer
    body = {"node_ids": ["a", "b", "c"], "prompt": "summary@1", "model": "writer"}
    answer = service.client.post(f"/v1/graphs/{graph_id}/enrich", json=body).json()
    assert [row["status"] for row in answer["data"]] == ["ok"] * 3
    again = service.client.post(f"/v1/graphs/{graph_id}/enrich", json=body)
    assert error_of(again, 404)[0] == "graph_not_found"


def test_directed_and_integer_ids(service: Service) -> None:
    body = {
        "name": "numbers",
        "directed": True,
        "nodes": [{"id": 2**40, "text": "x", "label": 1}, {"id": -1, "text": "y"}],
        "edges": [[-1, 2**40], [2**40, -1]],
    }
    graph = service.create(body).json()
    assert (graph["id_type"], graph["num_edges"], graph["directed"]) == ("int64", 2, True)
    selected = service.client.post(
        f"/v1/graphs/{graph['id']}/select", json={"strategy": "degree", "budget": {"nodes": 1}}
    )
    assert selected.json()["node_ids"] == [2**40]


def change(**fields: Any) -> dict[str, Any]:
    return {**GRAPH, **fields}


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        (change(edges=[["a", "b"], ["a", "q"]]), "invalid_value", "edges[1]"),
        (change(edges=[["a", 1]]), "invalid_value", "edges[0]"),
        (change(nodes=[]), "invalid_value", "nodes"),
        (change(nodes=[{"id": "a", "text": "x"}] * 2, edges=[]), "invalid_value", "nodes[1].id"),
        (change(nodes=[{"id": "a", "text": "x"}, {"id": 1, "text": "x"}]), "invalid_value", "nodes[1].id"),
        (change(nodes=[{"id": "a", "text": "x" * (2**20 + 1)}], edges=[]), "invalid_value", "nodes[0].text"),
        (change(extra=1), "unsupported_parameter", "extra"),
        (change(nodes=[{"id": "a", "text": "x", "weight": 1}]), "unsupported_parameter", "nodes[0].weight"),
        (change(nodes=[{"id": True, "text": "x"}]), "invalid_value", "nodes[0].id"),
        (change(nodes=[{"id": 1.5, "text": "x"}]), "invalid_value", "nodes[0].id"),
        (change(nodes=[{"id": 2**63, "text": "x"}]), "invalid_value", "nodes[0].id"),
        (change(nodes=[{"id": "a"}]), "invalid_value", "nodes[0].text"),
        (change(nodes=[{"id": "a", "text": None}]), "invalid_value", "nodes[0].text"),
        (change(nodes=[{"id": "a", "text": "x", "split": "validation"}]), "invalid_value", "nodes[0].split"),
        (change(directed=0), "invalid_value", "directed"),
        (change(name=""), "invalid_value", "name"),
        (change(name="a\u0000b"), "invalid_value", "name"),
        (change(edges=[["a"]]), "invalid_value", None),
        ([], "invalid_value", None),
        ({"name": "x"}, "invalid_value", "nodes"),
    ],
)  # fmt: skip
def test_bad_graphs(service: Service, body: Any, code: str, param: str | None) -> None:
    found_code, found_param = error_of(service.create(body))
    assert found_code == code
    if param is not None:
        assert found_param == param
    assert service.client.get("/v1/graphs").json()["data"] == []


@pytest.mark.parametrize(
    "body", [b"", b"{", b'{"name": "\xff"}', b"null", b'{"name": "\\ud800", "nodes": []}']
)
def test_bodies_that_are_no_json(service: Service, body: bytes) -> None:
    response = service.client.post(
        "/v1/graphs", content=body, headers={"content-type": "application/json"}
    )
    assert error_of(response)[0] in ("invalid_json", "invalid_value")


def test_deep_json(service: Service) -> None:
    body = b'{"name": ' + b"[" * 100_000
    response = service.client.post(
        "/v1/graphs", content=body, headers={"content-type": "application/json"}
    )
    assert error_of(response)[0] == "invalid_json"


@pytest.mark.parametrize(
    ("data", "files", "code", "param"),
    [
        ({}, {"nodes": b"PAR1", "edges": b""}, "invalid_value", "name"),
        ({"name": "x"}, {"nodes": b"PAR1", "edges": b""}, "invalid_value", "nodes"),
        ({"name": "x"}, {"nodes": parquet(NODE_COLUMNS)}, "invalid_value", "edges"),
        ({"name": "x", "edges": "text"}, {"nodes": parquet(NODE_COLUMNS)}, "invalid_value", "edges"),
        ({"name": "x"}, {"nodes": parquet(NODE_COLUMNS), "other": b"x"}, "unsupported_parameter", "other"),
        ({"name": "x", "directed": "maybe"}, {"nodes": parquet(NODE_COLUMNS), "edges": parquet(EDGE_COLUMNS)},
         "invalid_value", "directed"),
        ({"name": "x"}, {"nodes": parquet(EDGE_COLUMNS), "edges": parquet(EDGE_COLUMNS)}, "invalid_value", "nodes.id"),
        ({"name": "x"}, {"nodes": parquet(NODE_COLUMNS), "edges": parquet({"source": ["a"], "target": ["z"]})},
         "invalid_value", "edges[0]"),
    ],
)  # fmt: skip
def test_bad_files(
    service: Service, data: dict[str, str], files: dict[str, bytes], code: str, param: str
) -> None:
    response = service.client.post("/v1/graphs", data=data, files=files)
    assert error_of(response) == (code, param)


def test_multipart_that_is_none(service: Service) -> None:
    for boundary, body in [
        ("; boundary=x", b"no parts"),
        ("", b"--x\r\n"),
        ("; boundary=x", b"--x\r\n\r\n"),
    ]:
        response = service.client.post(
            "/v1/graphs", content=body, headers={"content-type": f"multipart/form-data{boundary}"}
        )
        assert error_of(response)[0] == "invalid_value"


def test_too_many_parts(service: Service) -> None:
    files = [("nodes", parquet(NODE_COLUMNS))] * 3
    assert error_of(service.client.post("/v1/graphs", files=files))[0] == "invalid_value"


@pytest.mark.parametrize("upload", ["json", "files"])
def test_idempotency(service: Service, upload: str) -> None:
    def create(name: str) -> Any:
        headers = {"Idempotency-Key": "key-1"}
        if upload == "json":
            return service.create(change(name=name), headers=headers)
        files = {"nodes": parquet(NODE_COLUMNS), "edges": parquet(EDGE_COLUMNS)}
        return service.client.post("/v1/graphs", data={"name": name}, files=files, headers=headers)

    first, again, other = create("one"), create("one"), create("two")
    assert (first.status_code, again.status_code) == (201, 201)
    assert again.json() == first.json()
    assert "Idempotent-Replayed" not in first.headers
    assert again.headers["Idempotent-Replayed"] == "true"
    assert error_of(other, 409) == ("idempotency_conflict", "Idempotency-Key")
    assert len(service.client.get("/v1/graphs").json()["data"]) == 1


@pytest.mark.anyio
@pytest.mark.parametrize("upload", ["json", "files"])
async def test_uploads_take_turns(
    tmp_path: Path, upload: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two are decoded at once; one that leaves while it waits is never decoded, and takes no turn."""
    service = Service(tmp_path)
    service.state.uploads = turns = Turns(UPLOADS_AT_ONCE)
    name = "_create_from_json" if upload == "json" else "_create_from_tables"
    create, may_end, lock = getattr(graphs, name), threading.Event(), threading.Lock()
    num_begun = num_running = most = 0

    def watched(*given: Any) -> Any:
        nonlocal num_begun, num_running, most
        with lock:
            num_begun, num_running = num_begun + 1, num_running + 1
            most = max(most, num_running)
        assert may_end.wait(60)
        try:
            return create(*given)
        finally:
            with lock:
                num_running -= 1

    monkeypatch.setattr(graphs, name, watched)
    files = {"nodes": parquet(NODE_COLUMNS), "edges": parquet(EDGE_COLUMNS)}
    body: Any = {"json": GRAPH} if upload == "json" else {"data": {"name": "x"}, "files": files}
    callers = [
        Caller(service, service.client.build_request("POST", "/v1/graphs", **body))
        for _ in range(6)
    ]
    async with asyncio.timeout(60):
        while turns.num_asked < 6 or num_begun < UPLOADS_AT_ONCE:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        waiting = callers[UPLOADS_AT_ONCE:]
        waiting[1].left.set()
        await waiting[1].task
        assert num_begun == UPLOADS_AT_ONCE
        may_end.set()
        await asyncio.gather(*(caller.task for caller in callers))
    assert [caller.status for caller in callers] == [201, 201, 201, 408, 201, 201]
    assert (num_begun, most) == (5, UPLOADS_AT_ONCE)
    for _ in range(UPLOADS_AT_ONCE):
        assert not turns.locked()
        await turns.acquire()
    assert turns.locked()


def test_graphs_belong_to_their_tenant(service: Service) -> None:
    keys = service.state.keys
    _, mine = keys.create("mine", ("inference",))
    _, theirs = keys.create("theirs", ("inference", "admin"))
    _, jobs = keys.create("jobs", ("jobs",))

    def bearer(secret: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {secret}"}

    graph_id = service.create(headers=bearer(mine)).json()["id"]
    path = f"/v1/graphs/{graph_id}"
    select = {"strategy": "random", "budget": {"nodes": 1}}
    enrich_body = {"prompt": "summary@1", "node_ids": ["a"], "model": "writer"}
    client = service.client
    assert client.get(path, headers=bearer(mine)).status_code == 200
    for response in (
        client.get(path, headers=bearer(theirs)),
        client.delete(path, headers=bearer(theirs)),
        client.post(f"{path}/select", json=select, headers=bearer(theirs)),
        client.post(f"{path}/enrich", json=enrich_body, headers=bearer(theirs)),
    ):
        assert error_of(response, 404)[0] == "graph_not_found"
    assert client.get("/v1/graphs", headers=bearer(theirs)).json()["data"] == []
    for method, route in [
        ("GET", "/v1/graphs"),
        ("POST", "/v1/enrich"),
        ("GET", "/v1/prompts"),
        ("GET", path),
    ]:
        assert error_of(client.request(method, route), 401)[0] == "invalid_api_key"
        forbidden = client.request(method, route, headers=bearer(jobs))
        assert error_of(forbidden, 403)[0] == "insufficient_scope"


@pytest.mark.parametrize("graph_id", ["graph-0", "..%2F..%2Fetc", "x", "graph-%00", "GRAPH-1"])
def test_unknown_graph_ids(service: Service, graph_id: str) -> None:
    for method, path, body in [
        ("GET", f"/v1/graphs/{graph_id}", None),
        ("DELETE", f"/v1/graphs/{graph_id}", None),
        ("POST", f"/v1/graphs/{graph_id}/select", {"strategy": "random", "budget": {"nodes": 1}}),
        ("POST", f"/v1/graphs/{graph_id}/enrich", {"prompt": "summary@1", "node_ids": ["a"]}),
    ]:
        assert service.client.request(method, path, json=body).status_code == 404


# Selection


def test_select(service: Service) -> None:
    graph_id = service.graph_id()
    response = service.client.post(
        f"/v1/graphs/{graph_id}/select", json={"strategy": "pagerank", "budget": {"fraction": 0.5}}
    )
    selection = response.json()
    assert selection["node_ids"] == ["a", "b"]
    assert (selection["strategy"], selection["order"], selection["seed"]) == (
        "pagerank",
        "high",
        None,
    )
    assert selection["scores"][0] > selection["scores"][1]
    assert selection["graph_id"] == graph_id


def test_select_within_several_budgets(service: Service) -> None:
    body = {
        "strategy": "text_length",
        "budget": {"fraction": 0.9, "tokens": 25, "seconds": 10.0, "cost": 0.5},
        "rates": {
            "tokens_per_node": 10,
            "tokens_per_second": 8.0,
            "cost_per_million_tokens": 0.5,
        },
    }
    answer = service.client.post(f"/v1/graphs/{service.graph_id()}/select", json=body).json()
    assert answer["node_ids"] == ["d", "a"]  # 10 and 12 tokens; the third would be 12 more
    assert answer["stopped_by"] == "tokens"
    assert answer["estimate"] == {"tokens": 22, "seconds": 2.75, "cost": 1.1e-5}
    assert answer["quotas"] is None


def test_select_by_the_servers_price(service: Service) -> None:
    service.state.settings.cost_per_million_tokens = 0.5
    body = {
        "strategy": "text_length",
        "budget": {"cost": 1.1e-5},
        "rates": {"tokens_per_node": 10},
    }
    path = f"/v1/graphs/{service.graph_id()}/select"
    answer = service.client.post(path, json=body).json()
    assert (answer["node_ids"], answer["stopped_by"]) == (["d", "a"], "cost")
    assert answer["estimate"] == {"tokens": 22, "seconds": None, "cost": 1.1e-5}
    body["rates"] = {"tokens_per_node": 10, "cost_per_million_tokens": 1.0}  # one's own comes first
    assert service.client.post(path, json=body).json()["node_ids"] == ["d"]


def test_select_by_predictions_mix_and_quotas(service: Service) -> None:
    path = f"/v1/graphs/{service.graph_id()}/select"
    predictions = {"a": [0.9, 0.1], "b": [0.5, 0.5], "c": [0.8, 0.2], "d": [1, 0]}
    body: dict[str, Any] = {
        "strategy": "mix",
        "mix": [
            {"strategy": "entropy", "weight": 1},
            {"strategy": "soft_homophily", "weight": 1.0, "order": "low"},
        ],
        "predictions": predictions,
        "quotas": {"per": "class"},
        "budget": {"nodes": 3},
    }
    answer = service.client.post(path, json=body).json()
    # entropy ranks b 1, c 2/3, a 1/3, d 0; homophily d 0, b 0.5, a 0.625, c 0.74: ranks 1, 2/3, 1/3, 0
    assert answer["node_ids"] == ["b", "d", "a"]
    assert answer["scores"] == pytest.approx([5 / 6, 1 / 2, 1 / 3])
    assert answer["stopped_by"] == "nodes"
    assert answer["quotas"] == [
        {"name": "x", "num_nodes": 1, "num_selected": 1},
        {"name": None, "num_nodes": 3, "num_selected": 2},
    ]


FEATURES = {"a": [0.0, 0.0], "b": [0.0, 1.0], "c": [0.0, 2.0], "d": [9.0, 1.0]}


def with_features(features: dict[str, Any]) -> dict[str, Any]:
    nodes = [
        {**node, **({"features": features[node["id"]]} if node["id"] in features else {})}
        for node in GRAPH["nodes"]
    ]
    return {**GRAPH, "nodes": nodes}


CLUSTERS: dict[str, Any] = {
    "strategy": "clustering_distance",
    "budget": {"nodes": 2},
    "num_clusters": 1,
}


def test_select_by_clusters_of_features(service: Service) -> None:
    graph = service.create(with_features(FEATURES)).json()
    assert graph["feature_dim"] == 2
    answer = service.client.post(f"/v1/graphs/{graph['id']}/select", json=CLUSTERS).json()
    # the mean is (2.25, 1): distances 2.46, 2.25, 2.46, 6.75
    assert answer["node_ids"] == ["d", "a"]
    assert answer["scores"] == pytest.approx([6.75, (2.25**2 + 1) ** 0.5])
    assert (answer["vectors_from"], answer["embedding_model"]) == ("features", None)
    assert (answer["num_clusters"], answer["seed"], answer["order"]) == (1, 0, "high")
    assert service.encoder.embedded == []


def test_select_by_clusters_of_texts(service: Service) -> None:
    graph = service.create(with_features(FEATURES)).json()
    path = f"/v1/graphs/{graph['id']}/select"
    body = {**CLUSTERS, "embedding_model": "encoder"}
    answers = [service.client.post(path, json=body).json() for _ in range(2)]
    assert answers[0] == answers[1]
    assert (answers[0]["vectors_from"], answers[0]["embedding_model"]) == ("texts", "encoder")
    # The scripted vector of a text is its length and the sum of its code points: "second" and "" lie farthest out.
    assert answers[0]["node_ids"] == ["d", "b"]
    assert (
        len(service.encoder.embedded) == 4
    )  # once, with the empty text; the second time from the cache
    assert graph["feature_dim"] == 2


def test_select_encodes_by_the_servers_encoder_where_there_are_no_features(
    service: Service,
) -> None:
    service.state.settings.embedding_model = "encoder"
    graph_id = service.graph_id()
    answer = service.client.post(f"/v1/graphs/{graph_id}/select", json=CLUSTERS).json()
    assert (answer["vectors_from"], answer["embedding_model"]) == ("texts", "encoder")
    # refused before a text is encoded
    refused = {**CLUSTERS, "num_clusters": 5, "embedding_model": "encoder"}
    service.encoder.embedded.clear()
    response = service.client.post(f"/v1/graphs/{graph_id}/select", json=refused)
    assert error_of(response) == ("invalid_value", "num_clusters")
    assert service.encoder.embedded == []


def test_select_by_an_encoder_that_is_not_there_or_fails(service: Service) -> None:
    path = f"/v1/graphs/{service.graph_id()}/select"
    response = service.client.post(path, json={**CLUSTERS, "embedding_model": "none"})
    assert error_of(response, 404) == ("model_not_found", "embedding_model")
    service.encoder.embed_error = EngineError("out_of_memory", "by script")
    response = service.client.post(path, json={**CLUSTERS, "embedding_model": "encoder"})
    assert error_of(response, 503)[0] == "out_of_memory"


def test_a_graph_that_is_deleted_while_its_texts_are_encoded(service: Service) -> None:
    """The selection finishes on the graph that it opened; the next one finds none."""
    graph_id = service.graph_id()
    path = f"/v1/graphs/{graph_id}/select"
    body = {**CLUSTERS, "embedding_model": "encoder"}
    expected = service.client.post(path, json=body).json()

    async def delete_then_embed(request: EmbedRequest) -> EmbedResult:
        service.state.graphs.delete(graph_id, LOCAL_IDENTITY.tenant)
        return await ScriptedEngine.embed(service.encoder, request)

    service.encoder.info = dataclasses.replace(service.encoder.info, checkpoint_hash="other")
    service.encoder.embed = delete_then_embed  # type: ignore[method-assign]
    answer = service.client.post(path, json=body)
    assert (answer.status_code, answer.json()) == (200, expected)
    assert error_of(service.client.post(path, json=body), 404)[0] == "graph_not_found"


@pytest.mark.parametrize(
    ("features", "param"),
    [
        ({**FEATURES, "c": [1.0]}, "nodes[2].features"),
        ({**FEATURES, "c": [1.0, 2.0, 3.0]}, "nodes[2].features"),
        ({**FEATURES, "c": [1.0, 1e39]}, "nodes[2].features"),
        ({"a": [1.0], "b": [1.0], "c": [1.0]}, "nodes[3].features"),
        ({**FEATURES, "c": []}, "nodes[2].features"),
        ({**FEATURES, "c": [1.0, "2"]}, "nodes[2].features[1]"),
        ({**FEATURES, "c": [1.0, None]}, "nodes[2].features[1]"),
        ({**FEATURES, "c": [1.0, True]}, "nodes[2].features[1]"),
        ({**FEATURES, "c": "1, 2"}, "nodes[2].features"),
    ],
)
def test_bad_features(service: Service, features: dict[str, Any], param: str) -> None:
    assert error_of(service.create(with_features(features))) == ("invalid_value", param)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400"])
def test_features_that_are_no_numbers(service: Service, number: str) -> None:
    body = json.dumps(with_features(FEATURES)).replace("9.0", number)
    response = service.client.post(
        "/v1/graphs", content=body, headers={"content-type": "application/json"}
    )
    assert error_of(response) == ("invalid_value", "nodes[3].features")
    assert "node 'd'" in response.json()["error"]["message"]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e400"])
def test_predictions_that_are_no_numbers(service: Service, number: str) -> None:
    body = json.dumps(
        {"strategy": "entropy", "budget": {"nodes": 1}, "predictions": {"a": [0.5, 9.5]}}
    ).replace("9.5", number)
    response = service.client.post(
        f"/v1/graphs/{service.graph_id()}/select",
        content=body,
        headers={"content-type": "application/json"},
    )
    assert error_of(response) == ("invalid_value", "predictions.a[1]")


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"strategy": "entropy", "budget": {"nodes": 1}}, "invalid_value", "predictions"),
        ({"strategy": "best", "budget": {"nodes": 1}}, "invalid_value", "strategy"),
        ({"strategy": "random", "budget": {}}, "invalid_value", "budget"),
        ({"strategy": "random", "budget": {"nodes": 0}}, "invalid_value", "budget.nodes"),
        ({"strategy": "random", "budget": {"fraction": 1.5}}, "invalid_value", "budget.fraction"),
        ({"strategy": "random", "budget": {"tokens": 0}}, "invalid_value", "budget.tokens"),
        ({"strategy": "random", "budget": {"seconds": 1}}, "invalid_value", "rates.tokens_per_second"),
        ({"strategy": "random", "budget": {"cost": 1}}, "invalid_value", "rates.cost_per_million_tokens"),
        ({"strategy": "random", "budget": {"gold": 1}}, "unsupported_parameter", "budget.gold"),
        ({"strategy": "mix", "budget": {"nodes": 1}}, "invalid_value", "mix"),
        ({"strategy": "mix", "mix": [], "budget": {"nodes": 1}}, "invalid_value", "mix"),
        ({"strategy": "mix", "mix": [{"strategy": "mix", "weight": 1}], "budget": {"nodes": 1}},
         "invalid_value", "mix[0].strategy"),
        ({"strategy": "mix", "mix": [{"strategy": "random", "weight": 0}], "budget": {"nodes": 1}},
         "invalid_value", "mix[0].weight"),
        ({"strategy": "random", "quotas": {"per": "label"}, "budget": {"nodes": 1}}, "invalid_value", "quotas.per"),
        ({"strategy": "random", "num_clusters": 2, "budget": {"nodes": 1}}, "unsupported_parameter", "num_clusters"),
        ({"strategy": "entropy", "predictions": {"a": [1.0]}, "budget": {"nodes": 1}}, "invalid_value", "predictions"),
        ({"strategy": "entropy", "predictions": {"a": [1.0], "z": [1.0]}, "budget": {"nodes": 1}},
         "invalid_value", "predictions.z"),
        ({"strategy": "entropy", "predictions": {"a": [1.0], "b": [0.5, 0.5]}, "budget": {"nodes": 1}},
         "invalid_value", "predictions.b"),
        ({"strategy": "entropy", "predictions": {"a": [0.9], "b": [1], "c": [1], "d": [1]}, "budget": {"nodes": 1}},
         "invalid_value", "predictions.a"),
        ({"strategy": "entropy", "predictions": {"a": ["1"]}, "budget": {"nodes": 1}},
         "invalid_value", "predictions.a[0]"),
        ({"strategy": "degree", "budget": {"nodes": 1}, "seed": 1}, "unsupported_parameter", "seed"),
        ({"strategy": "random", "budget": {"nodes": 1}, "order": "low"}, "unsupported_parameter", "order"),
        ({"strategy": "degree", "budget": {"nodes": 1}, "order": "up"}, "invalid_value", "order"),
        ({"strategy": "random", "budget": {"nodes": 1}, "seed": -1}, "invalid_value", "seed"),
    ],
)  # fmt: skip
def test_bad_selections(service: Service, body: Any, code: str, param: str) -> None:
    response = service.client.post(f"/v1/graphs/{service.graph_id()}/select", json=body)
    assert error_of(response) == (code, param)


def test_a_selection_is_read_in_a_thread(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parsed and validated; and described as if FastAPI did so itself."""
    seen: list[str] = []

    graph_id = service.graph_id()
    watch_off_loop(monkeypatch, seen, SelectRequest, "model_validate")
    loads = SimpleNamespace(**vars(json))
    watch_off_loop(monkeypatch, seen, loads, "loads")
    monkeypatch.setattr(graphs, "json", loads)
    body = {"strategy": "random", "budget": {"nodes": 1}}
    assert service.client.post(f"/v1/graphs/{graph_id}/select", json=body).status_code == 200
    assert seen == ["loads", "model_validate"]
    described = service.app.openapi()["paths"]["/v1/graphs/{graph_id}/select"]["post"]
    assert described["requestBody"] == {
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/SelectRequest"}}},
        "required": True,
    }


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        (b"", "invalid_value", "Field required"),
        (b"null", "invalid_value", "Input should be a valid dictionary or object"),
        (b"[]", "invalid_value", "Input should be a valid dictionary or object"),
        (b"{", "invalid_json", "not valid JSON"),
    ],
)
def test_bodies_that_are_no_selection(
    service: Service, body: bytes, code: str, message: str
) -> None:
    response = service.client.post(
        f"/v1/graphs/{service.graph_id()}/select",
        content=body,
        headers={"content-type": "application/json"},
    )
    assert error_of(response) == (code, None)
    assert message in response.json()["error"]["message"]


# Enrichment


def test_enrich_json(service: Service) -> None:
    response = service.client.post("/v1/enrich", json={**ENRICH, "return": ["text", "embedding"]})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert body["object"] == "list"
    first, second = body["data"]
    assert (first["node_id"], first["status"], first["text"]) == ("n1", "ok", "ONE")
    assert second["text"] == "TWO"
    assert first["embedding"][2:] == [0.5, 0.5]
    assert (first["model"], first["embedding_model"]) == ("writer", "encoder")
    assert (first["prompt_id"], first["prompt_version"]) == ("summary", 1)
    assert first["error"] is None
    usage = body["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + 6
    assert usage["num_by_status"] == {
        "ok": 2, "cached": 0, "skipped_budget": 0, "invalid_output": 0, "failed": 0,
    }  # fmt: skip
    EnrichResponse.model_validate(body)


def test_enrich_counts_its_items(service: Service) -> None:
    for _ in range(2):
        service.client.post("/v1/enrich", json=ENRICH)
    text = service.state.metrics.render().decode()
    assert 'lathe_enrich_items_total{outcome="ok"} 2.0' in text
    assert 'lathe_enrich_items_total{outcome="cached"} 2.0' in text
    assert 'lathe_enrich_cache_hits_total{layer="text"} 2.0' in text


def test_embeddings_as_base64_and_half(service: Service) -> None:
    def embedding(**options: str) -> Any:
        body = {**ENRICH, "return": ["embedding"], **options}
        return service.client.post("/v1/enrich", json=body).json()["data"][0]["embedding"]

    plain = embedding()
    packed = base64.b64decode(embedding(encoding_format="base64"))
    assert np.frombuffer(packed, "<f4").tolist() == plain
    half = base64.b64decode(embedding(encoding_format="base64", embedding_dtype="float16"))
    assert np.frombuffer(half, "<f2").tolist() == pytest.approx(plain, rel=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_enrich_arrow(service: Service, dtype: str) -> None:
    service.encoder.embed_error = None
    nodes = [{"id": "n1", "text": "one"}, {"id": "n2", "text": ""}]
    body = {**ENRICH, "nodes": nodes, "return": ["text", "embedding"], "embedding_dtype": dtype}
    response = service.client.post("/v1/enrich", json=body, headers={"Accept": MEDIA_TYPE})
    assert response.headers["content-type"] == MEDIA_TYPE
    table = pa.ipc.open_stream(response.content).read_all()
    table.validate(full=True)
    rows = table.to_pylist()
    assert [row["status"] for row in rows] == ["ok", "failed"]
    assert [row["text"] for row in rows] == ["ONE", None]
    assert rows[1]["embedding"] is None
    assert rows[1]["error_code"] == "empty_text"
    assert rows[0]["embedding"][2:] == [0.5, 0.5]
    value_type = pa.float16() if dtype == "float16" else pa.float32()
    assert table.schema.field("embedding").type == pa.list_(value_type, 4)
    metadata = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    assert (metadata["lathe.model"], metadata["lathe.embedding_model"]) == ("writer", "encoder")
    assert json.loads(metadata["lathe.prompt"])["id"] == "summary"
    plain = service.client.post("/v1/enrich", json=body).json()
    assert json.loads(metadata["lathe.usage"]).keys() == plain["usage"].keys()
    assert [row["content_hash"].hex() for row in rows] == [r["content_hash"] for r in plain["data"]]
    assert rows[0]["embedding"] == plain["data"][0]["embedding"]


def test_arrow_without_what_was_not_asked_for(service: Service) -> None:
    nodes = [{"id": 7, "text": "one"}]
    response = service.client.post(
        "/v1/enrich", json={**ENRICH, "nodes": nodes}, headers={"Accept": MEDIA_TYPE}
    )
    table = pa.ipc.open_stream(response.content).read_all()
    assert "embedding" not in table.column_names
    assert table.schema.field("node_id").type == pa.int64()


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("*/*", "application/json"),
        ("", "application/json"),
        ("application/*", "application/json"),
        ("text/html, */*;q=0.1", "application/json"),
        (f"{MEDIA_TYPE}, application/json;q=0.9", MEDIA_TYPE),
        (f"{MEDIA_TYPE};q=0.5, application/json", "application/json"),
        (f"application/json;q=0, {MEDIA_TYPE}", MEDIA_TYPE),
        (f"*/*, {MEDIA_TYPE};q=0", "application/json"),
        (NDJSON, NDJSON),
        (f"{NDJSON}, application/json;q=0.9", NDJSON),
        ("APPLICATION/JSON", "application/json"),
    ],
)
def test_negotiation(service: Service, accept: str, expected: str) -> None:
    response = service.client.post("/v1/enrich", json=ENRICH, headers={"Accept": accept})
    assert response.headers["content-type"] == expected


@pytest.mark.parametrize(
    "accept", ["text/html", "application/json;q=0", "application/json;q=x", "image/*"]
)
def test_not_acceptable(service: Service, accept: str) -> None:
    response = service.client.post("/v1/enrich", json=ENRICH, headers={"Accept": accept})
    assert error_of(response, 406)[0] == "not_acceptable"
    assert service.writer.prompts == []


def lines_of(response: Any) -> list[Any]:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith(NDJSON)
    return [json.loads(line) for line in response.text.splitlines()]


@pytest.mark.parametrize("how", [{"stream": True}, {}], ids=["stream", "Accept"])
def test_rows_as_lines(service: Service, how: dict[str, bool]) -> None:
    nodes = [*ENRICH["nodes"], {"id": "n3", "text": ""}]
    body = {**ENRICH, "nodes": nodes, "return": ["text", "embedding"]}
    headers = {} if how else {"Accept": NDJSON}
    *rows, last = lines_of(service.client.post("/v1/enrich", json={**body, **how}, headers=headers))
    plain = service.client.post("/v1/enrich", json=body).json()
    assert sorted(row["node_id"] for row in rows) == ["n1", "n2", "n3"]
    assert rows[0]["node_id"] == "n3"  # nothing had to be done for it
    by_id = {row["node_id"]: row for row in plain["data"]}
    for row in rows:
        again = by_id[row["node_id"]]
        assert {**row, "status": again["status"]} == again
    assert list(last) == ["usage"]
    assert last["usage"].keys() == plain["usage"].keys()
    assert last["usage"]["num_by_status"]["failed"] == 1
    assert last["usage"]["num_by_status"]["ok"] == 2


def test_rows_as_arrow_batches(service: Service) -> None:
    body = {**ENRICH, "return": ["text", "embedding"], "stream": True}
    body["nodes"] = [{"id": f"n{i}", "text": "" if i == 9 else f"text {i}"} for i in range(10)]
    response = service.client.post("/v1/enrich", json=body, headers={"Accept": MEDIA_TYPE})
    assert response.headers["content-type"] == MEDIA_TYPE
    batches, metadata = [], []
    with pa.ipc.open_stream(response.content) as reader:
        assert b"lathe.usage" not in reader.schema.metadata
        assert reader.schema.metadata[b"lathe.model"] == b"writer"
        while True:
            try:
                batch, custom = reader.read_next_batch_with_custom_metadata()
            except StopIteration:
                break
            batches.append(batch)
            metadata.append(custom)
    assert len(batches) > 2  # four requests at a time
    assert batches[-1].num_rows == 0
    assert metadata[:-1] == [None] * (len(batches) - 1)
    usage = json.loads(metadata[-1][b"lathe.usage"])
    assert usage["num_by_status"] == {
        "ok": 9, "cached": 0, "skipped_budget": 0, "invalid_output": 0, "failed": 1,
    }  # fmt: skip
    table = pa.Table.from_batches(batches)
    table.validate(full=True)
    rows = {row["node_id"]: row for row in table.to_pylist()}
    assert [rows[f"n{i}"]["text"] for i in range(9)] == [f"TEXT {i}" for i in range(9)]
    assert rows["n9"]["error_code"] == "empty_text"


def test_arrow_of_a_prompt_that_asks_for_json(service: Service) -> None:
    service.writer._answer = lambda prompt: (
        '{"label": "x", "confidence": 0.5}' if own_text(prompt) == "one" else "no JSON"
    )
    body = {**ENRICH, "prompt": "pseudo_label", "classes": ["x", "y"], "return": ["text"]}
    response = service.client.post("/v1/enrich", json=body, headers={"Accept": MEDIA_TYPE})
    assert response.status_code == 200, response.text
    table = pa.ipc.open_stream(response.content).read_all()
    table.validate(full=True)
    plain = service.client.post("/v1/enrich", json=body).json()["data"]
    for row, again in zip(table.to_pylist(), plain, strict=True):
        fields = None if row["fields"] is None else json.loads(row["fields"])
        assert fields == again["fields"]
        assert (row["label"], row["repaired"]) == (again["label"], again["repaired"])
    assert table.column("label").to_pylist() == ["x", None]
    assert table.column("status").to_pylist() == ["ok", "invalid_output"]


def test_a_graph_streams_as_well(service: Service) -> None:
    path = f"/v1/graphs/{service.graph_id()}/enrich"
    body = {"node_ids": ["a", "d"], "prompt": "summary@1", "model": "writer", "stream": True}
    *rows, last = lines_of(service.client.post(path, json=body))
    assert {row["node_id"]: row["status"] for row in rows} == {"a": "ok", "d": "failed"}
    assert last["usage"]["num_nodes"] == 2


def test_a_stream_that_cannot_begin_is_an_error(service: Service) -> None:
    for fields, status in [({"model": "encoder"}, 400), ({"model": "other"}, 404)]:
        body = {**ENRICH, **fields, "stream": True}
        assert error_of(service.client.post("/v1/enrich", json=body), status)[1] == "model"
    headers = {"Accept": "application/json"}
    response = service.client.post("/v1/enrich", json={**ENRICH, "stream": True}, headers=headers)
    assert error_of(response, 406) == ("not_acceptable", "Accept")


def test_estimate(service: Service) -> None:
    nodes = [{"id": i, "text": text} for i, text in enumerate(["one", "two", "two", " ", "three"])]
    body = {"prompt": "summary@1", "model": "writer", "nodes": nodes}
    service.client.post("/v1/enrich", json={**body, "nodes": nodes[:1]})
    service.writer.prompts.clear()
    service.state.settings.cost_per_million_tokens = 10.0
    estimate = service.client.post("/v1/enrich/estimate", json=body).json()
    assert service.writer.prompts == []
    counts = ("num_nodes", "num_distinct", "num_empty", "num_cached", "num_calls", "num_failing")
    assert [estimate[name] for name in counts] == [5, 4, 1, 1, 2, 0]
    assert estimate["dedupe_ratio"] == pytest.approx(0.2)
    assert estimate["completion_tokens"] == 2 * 3  # as long as the cached answer, "ONE"
    assert estimate["cost"] == pytest.approx(estimate["total_tokens"] / 1e5)
    assert estimate["seconds"] > 0
    real = service.client.post("/v1/enrich", json=body).json()["usage"]
    assert real["prompt_tokens"] == estimate["prompt_tokens"]
    after = service.client.post("/v1/enrich/estimate", json=body).json()
    assert [after[name] for name in counts] == [5, 4, 1, 3, 0, 0]
    assert (after["total_tokens"], after["seconds"], after["cost"]) == (0, 0, 0)


def test_estimate_of_a_graph(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    graph_id = service.graph_id()
    body = {"prompt": "digest@1", "model": "writer", "graph": graph_id}

    def estimate(**fields: Any) -> Any:
        return service.client.post("/v1/enrich/estimate", json={**body, **fields})

    whole = estimate().json()
    assert (whole["num_nodes"], whole["num_empty"], whole["num_calls"]) == (4, 1, 3)
    assert (whole["seconds"], whole["cost"]) == (None, None)  # no speed was seen, no price is set
    assert estimate(node_ids=["a"]).json()["num_nodes"] == 1
    assert estimate(budget={"max_nodes": 2}).json()["num_nodes"] == 2
    answer = service.client.post(
        f"/v1/graphs/{graph_id}/enrich",
        json={"prompt": "digest@1", "model": "writer", "node_ids": ["a", "b", "c"]},
    ).json()
    assert answer["usage"]["prompt_tokens"] == whole["prompt_tokens"]
    assert error_of(estimate(node_ids=["zz"])) == ("invalid_value", "node_ids[0]")
    assert error_of(estimate(graph="graph-0"), 404) == ("graph_not_found", "graph")
    assert error_of(estimate(nodes=NODES)) == ("invalid_value", "nodes")
    assert error_of(estimate(stream=True)) == ("unsupported_parameter", "stream")
    monkeypatch.setattr(enrich, "MAX_ESTIMATED_NODES", 3)
    assert error_of(estimate()) == ("invalid_value", "node_ids")
    assert estimate(budget={"max_nodes": 3}).status_code == 200
    only_nodes = {"prompt": "digest@1", "model": "writer", "nodes": NODES, "node_ids": ["a"]}
    response = service.client.post("/v1/enrich/estimate", json=only_nodes)
    assert error_of(response) == ("invalid_value", "node_ids")


def test_memory_is_given_back_after_an_upload(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    released: list[str] = []
    monkeypatch.setattr(graphs, "release_memory", lambda: released.append("now"))
    service.create()
    assert released == ["now"]
    assert service.client.post("/v1/graphs", json={**GRAPH, "nodes": []}).status_code == 400
    assert released == ["now"] * 2


def test_whose_variables_are_wrong(service: Service) -> None:
    body = {"prompt": "edge@1", "model": "writer"}
    right, wrong = {"other": "x"}, {"others": "x"}
    nodes = [{"id": i, "text": "t", "variables": v} for i, v in enumerate([right, wrong])]
    for path in ("/v1/enrich", "/v1/enrich/estimate"):
        response = service.client.post(path, json={**body, "nodes": nodes})
        assert error_of(response) == ("invalid_value", "nodes[1].variables")
        response = service.client.post(path, json={**body, "nodes": nodes[:1], "variables": wrong})
        assert error_of(response) == ("invalid_value", "variables")
    response = service.client.post(
        f"/v1/graphs/{service.graph_id()}/enrich",
        json={**body, "node_ids": ["a", "b"], "node_variables": [right, wrong]},
    )
    assert error_of(response) == ("invalid_value", "node_variables[1]")


def test_an_estimate_has_a_time_limit(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(request: EnrichRequest) -> EnrichEstimate:
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr(service.state.enricher, "estimate", never)
    service.state.settings.request_timeout_seconds = 0.05
    response = service.client.post("/v1/enrich/estimate", json=ENRICH)
    assert error_of(response, 408) == ("request_timeout", None)


def test_limits_of_what_is_read_of_a_graph(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph_id = service.graph_id()
    body = {"prompt": "summary@1", "model": "writer", "node_ids": ["a", "b"]}
    monkeypatch.setattr(nodes, "MAX_TEXT_BYTES_AT_ONCE", 1)
    for path, fields in (
        (f"/v1/graphs/{graph_id}/enrich", {}),
        ("/v1/enrich/estimate", {"graph": graph_id}),
    ):
        response = service.client.post(path, json={**body, **fields})
        assert error_of(response) == ("invalid_value", "node_ids")
    monkeypatch.undo()
    monkeypatch.setattr(nodes, "MAX_CLASSES", 0)
    body["prompt"] = "pseudo_label@1"
    for path, fields in (
        (f"/v1/graphs/{graph_id}/enrich", {}),
        ("/v1/enrich/estimate", {"graph": graph_id}),
    ):
        response = service.client.post(path, json={**body, **fields})
        assert error_of(response) == ("invalid_value", "classes")


@pytest.mark.parametrize(
    ("given", "number"),
    [({}, 1), ({"priority": "interactive"}, 0), ({"priority": "bulk"}, 2)],
)
def test_priorities(service: Service, given: dict[str, str], number: int) -> None:
    service.client.post("/v1/enrich", json={**ENRICH, **given})
    assert {request.priority for request in service.writer.requests} == {number}


def test_long_texts_by_request(service: Service) -> None:
    limit = default_catalog().get("summary@1").max_text_tokens
    nodes = [{"id": "a", "text": "b" * limit + "e" * limit}]
    for policy, shown in [("head", {"b"}), ("head_tail", {"b", "e", *GAP})]:
        service.client.post("/v1/enrich", json={**ENRICH, "nodes": nodes, "long_text": policy})
        assert set(own_text(service.writer.prompts[-1])) == shown


NODES = ENRICH["nodes"]


@pytest.mark.parametrize(
    ("fields", "status", "code", "param"),
    [
        ({"prompt": "nothing"}, 404, "prompt_not_found", "prompt"),
        ({"prompt": "summary@9"}, 404, "prompt_not_found", "prompt"),
        ({"model": "other"}, 404, "model_not_found", "model"),
        ({"embedding_model": "other", "return": ["embedding"]}, 404, "model_not_found", "embedding_model"),
        ({"model": "encoder"}, 400, "invalid_value", "model"),
        ({"return": []}, 400, "invalid_value", "return"),
        ({"return": ["text", "text"]}, 400, "invalid_value", "return"),
        ({"return": ["image"]}, 400, "invalid_value", "return[0]"),
        ({"temperature": 1}, 400, "unsupported_parameter", "temperature"),
        ({"seed": 1}, 400, "unsupported_parameter", "seed"),
        ({"long_text": "chunk"}, 400, "invalid_value", "long_text"),
        ({"priority": "urgent"}, 400, "invalid_value", "priority"),
        ({"priority": 1}, 400, "invalid_value", "priority"),
        ({"stream": "true"}, 400, "invalid_value", "stream"),
        ({"max_tokens": "5"}, 400, "invalid_value", "max_tokens"),
        ({"budget": {"max_nodes": True}}, 400, "invalid_value", "budget.max_nodes"),
        ({"budget": None}, 400, "invalid_value", "budget"),
        ({"max_tokens": 0}, 400, "invalid_value", "max_tokens"),
        ({"max_tokens": 4096}, 400, "invalid_value", "max_tokens"),
        ({"budget": {"max_nodes": 0}}, 400, "invalid_value", "budget.max_nodes"),
        ({"budget": {"max_cost": 1}}, 400, "unsupported_parameter", "budget.max_cost"),
        ({"nodes": []}, 400, "invalid_value", "nodes"),
        ({"nodes": [*NODES, {"id": "n1", "text": "x"}]}, 400, "invalid_value", "nodes[2].id"),
        ({"nodes": [*NODES, {"id": 1, "text": "x"}]}, 400, "invalid_value", "nodes[2].id"),
        ({"nodes": [{"id": "", "text": "x"}]}, 400, "invalid_value", "nodes[0].id"),
        ({"nodes": [{"id": "a", "text": "x" * (2**20 + 1)}]}, 400, "invalid_value", "nodes[0].text"),
        ({"nodes": [{"id": "a", "text": "x", "neighbors": [1]}]}, 400, "invalid_value", "nodes[0].neighbors[0]"),
        ({"nodes": [{"id": "a", "text": "x", "label": 1}]}, 400, "unsupported_parameter", "nodes[0].label"),
        ({"nodes": [{"id": str(i), "text": "x"} for i in range(1025)]}, 400, "invalid_value", "nodes"),
    ],
)  # fmt: skip
def test_bad_enrichments(
    service: Service, fields: dict[str, Any], status: int, code: str, param: str
) -> None:
    response = service.client.post("/v1/enrich", json={**ENRICH, **fields})
    assert error_of(response, status) == (code, param)


def test_lone_surrogates_are_refused(service: Service) -> None:
    for node in (r'{"id": "\ud800", "text": "x"}', r'{"id": "a", "text": "\ud800"}'):
        body = '{"prompt": "summary@1", "model": "writer", "nodes": [' + node + "]}"
        response = service.client.post(
            "/v1/enrich", content=body, headers={"content-type": "application/json"}
        )
        assert error_of(response)[0] in ("invalid_value", "invalid_json")


def test_enrich_budget(service: Service) -> None:
    body = {**ENRICH, "budget": {"max_nodes": 1}}
    answer = service.client.post("/v1/enrich", json=body).json()
    assert [row["status"] for row in answer["data"]] == ["ok", "skipped_budget"]
    assert answer["usage"]["stopped_by"] == "max_nodes"
    assert answer["data"][1]["error"]["code"] == "budget_exhausted"


def test_the_servers_time_out_is_a_budget(service: Service) -> None:
    service.state.settings.request_timeout_seconds = 0.05
    service.writer.hold()
    answer = service.client.post("/v1/enrich", json=ENRICH).json()
    assert [row["status"] for row in answer["data"]] == ["skipped_budget"] * 2
    assert answer["usage"]["stopped_by"] == "max_seconds"


def test_tenants_share_no_texts(service: Service) -> None:
    secrets = [service.state.keys.create(name, ("inference",))[1] for name in ("a", "b")]
    for secret, expected in zip([*secrets, secrets[0]], ["ok", "ok", "cached"], strict=True):
        headers = {"Authorization": f"Bearer {secret}"}
        answer = service.client.post("/v1/enrich", json=ENRICH, headers=headers).json()
        assert answer["data"][0]["status"] == expected


def test_enrich_graph(service: Service) -> None:
    graph_id = service.graph_id()
    body = {
        "node_ids": ["c", "a", "d"],
        "prompt": "summary@1",
        "model": "writer",
        "embedding_model": "encoder",
        "return": ["embedding"],
    }
    answer = service.client.post(f"/v1/graphs/{graph_id}/enrich", json=body).json()
    assert [row["node_id"] for row in answer["data"]] == ["c", "a", "d"]
    assert [row["status"] for row in answer["data"]] == ["ok", "ok", "failed"]
    assert answer["data"][0]["text"] is None
    assert len(answer["data"][0]["embedding"]) == 4


def test_enrich_graph_reads_neighbours(service: Service) -> None:
    graph_id = service.graph_id()
    body = {"node_ids": ["a", "b"], "prompt": "digest@1", "model": "writer"}
    answer = service.client.post(f"/v1/graphs/{graph_id}/enrich", json=body).json()
    assert [row["neighbors_used"] for row in answer["data"]] == [2, 1]
    assert "1. second\n2. third" in service.writer.prompts[0]
    assert "1. first\n</neighbors>" in service.writer.prompts[1]


def test_enrich_graph_unknown_and_repeated_nodes(service: Service) -> None:
    path = f"/v1/graphs/{service.graph_id()}/enrich"
    for node_ids, param in [
        (["a", "zz"], "node_ids[1]"),
        (["a", "b", "a"], "node_ids[2]"),
        ([1], "node_ids[0]"),
        ([], "node_ids"),
        ([None], "node_ids[0]"),
    ]:
        body = {"node_ids": node_ids, "prompt": "summary@1", "model": "writer"}
        assert error_of(service.client.post(path, json=body)) == ("invalid_value", param)


# Prompts


def test_prompts(service: Service) -> None:
    listed = service.client.get("/v1/prompts").json()
    assert listed["object"] == "list"
    assert {"digest", "repair", "summary", "terms"} <= {p["id"] for p in listed["data"]}
    one = service.client.get("/v1/prompts/summary").json()
    assert one in listed["data"]
    assert service.client.get("/v1/prompts/summary@2").json() == one
    assert one["versions"] == [1, 2]
    for unknown in ("nothing", "summary@3", "..%2Fsummary"):
        assert service.client.get(f"/v1/prompts/{unknown}").status_code == 404
    assert error_of(service.client.get("/v1/prompts/nothing"), 404)[0] == "prompt_not_found"


# Disconnects


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("fields", "accept"),
    [({}, "*/*"), ({"stream": True}, NDJSON), ({"stream": True}, MEDIA_TYPE)],
    ids=["json", "lines", "arrow"],
)
async def test_a_client_that_leaves_aborts_the_engine(
    tmp_path: Path, fields: dict[str, bool], accept: str
) -> None:
    service = Service(tmp_path)
    service.writer.hold()
    caller = Caller(service, service.client.build_request(
        "POST", "/v1/enrich", json={**ENRICH, **fields}, headers={"accept": accept}
    ))  # fmt: skip
    async with asyncio.timeout(10):
        await service.writer.arrived.wait()
        caller.left.set()
        await caller.task
        while service.writer.num_running:  # noqa: ASYNC110 - polls what has no event
            await asyncio.sleep(0.001)
    assert len(service.writer.aborted) >= 1
