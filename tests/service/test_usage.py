"""GET /v1/usage: whatever a key asked of engines, and what the cache saved it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from compression.import_model import import_folder
from compression.registry import ModelRegistry
from service.app import build_app
from service.auth import Role
from service.deps import AppState
from service.settings import Settings
from tests.jobs.test_enrich import Host
from tests.service.openai_app import error_of


@pytest.fixture(scope="module")
def models(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    import_folder(ModelRegistry(folder), "tiny", tiny_llama, report=lambda _: None)
    return folder


@pytest.fixture
def http(models: Path, tmp_path: Path) -> Iterator[TestClient]:
    (tmp_path / "models").symlink_to(models)
    host = Host(tmp_path)
    settings = Settings(home=tmp_path, cost_per_million_tokens=2.0)
    with TestClient(build_app(settings), raise_server_exceptions=False) as client:
        yield client
    host.kill()


@pytest.fixture
def state(http: TestClient) -> AppState:
    found: AppState = http.app.state.lathe  # type: ignore[attr-defined]
    return found


def usage(http: TestClient, **query: Any) -> Any:
    answer = http.get("/v1/usage", params=query)
    assert answer.status_code == 200, answer.text
    return answer.json()


def by_operation(body: Any) -> dict[str, Any]:
    return {row["operation"]: row for row in body["data"]}


def test_every_route_that_asks_an_engine_is_counted(http: TestClient) -> None:
    assert usage(http)["data"] == []
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "ab"}], "max_tokens": 3}
    text = {"model": "tiny", "prompt": "abc", "max_tokens": 4, "n": 2}
    answers = [
        http.post("/v1/chat/completions", json=chat).json()["usage"],
        http.post("/v1/completions", json=text).json()["usage"],
    ]
    vectors = http.post("/v1/embeddings", json={"model": "tiny", "input": ["ab", "c"]}).json()
    body = usage(http)
    generated, embedded = by_operation(body)["generate"], by_operation(body)["embed"]
    assert generated["model"] == "tiny"
    assert generated["requests"] == 3  # a chat and two choices
    assert generated["completion_tokens"] == sum(a["completion_tokens"] for a in answers)
    # An engine reads a prompt once for each choice; an answer counts it once.
    assert generated["prompt_tokens"] == sum(a["prompt_tokens"] for a in answers) + 3
    assert embedded["prompt_tokens"] == vectors["usage"]["prompt_tokens"] == 3
    assert generated["device_seconds"] > 0
    assert body["key_id"] == "local"
    assert body["total"]["total_tokens"] == generated["total_tokens"] + 3
    assert body["total"]["cost"] == pytest.approx(body["total"]["total_tokens"] * 2e-6)


def test_enrichments_and_what_the_cache_saved(http: TestClient) -> None:
    body = {
        "prompt": "summary@1", "model": "tiny", "embedding_model": "tiny", "max_tokens": 8,
        "return": ["text", "embedding"],
        "nodes": [{"id": i, "text": text} for i, text in enumerate(["ab", "cd", "ab", ""])],
    }  # fmt: skip
    first = http.post("/v1/enrich", json=body).json()["usage"]
    streamed = http.post("/v1/enrich", json={**body, "stream": True})
    assert streamed.status_code == 200
    counted = usage(http)
    enriched, generated = by_operation(counted)["enrich"], by_operation(counted)["generate"]
    assert (enriched["requests"], enriched["items"], enriched["cached_items"]) == (2, 8, 4)
    assert generated["requests"] == 2
    assert generated["total_tokens"] == first["total_tokens"]
    assert by_operation(counted)["embed"]["prompt_tokens"] == first["embedding_tokens"]
    per_node = first["total_tokens"] / 2
    assert enriched["cached_tokens"] == 4 * per_node
    assert counted["total"]["saved_cost"] == pytest.approx(4 * per_node * 2e-6)
    assert counted["total"]["saved_device_seconds"] > 0


def test_estimates_know_the_speed_that_was_counted(http: TestClient) -> None:
    body = {"prompt": "summary@1", "model": "tiny", "nodes": [{"id": 1, "text": "ab"}]}
    assert http.post("/v1/enrich/estimate", json=body).json()["seconds"] is None
    text = {"model": "tiny", "prompt": "abc", "max_tokens": 4}
    http.post("/v1/completions", json=text)
    counted = by_operation(usage(http))["generate"]
    estimate = http.post("/v1/enrich/estimate", json=body).json()
    per_token = counted["device_seconds"] / counted["total_tokens"]
    assert estimate["seconds"] == pytest.approx(estimate["total_tokens"] * per_token)


def test_a_key_sees_its_own_and_an_admin_all(http: TestClient, state: AppState) -> None:
    roles: dict[str, tuple[Role, ...]] = {
        "one": ("inference",),
        "two": ("inference",),
        "admin": ("admin",),
    }
    keys = {name: state.keys.create(name, given) for name, given in roles.items()}

    def headers(name: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {keys[name][1]}"}

    def of(name: str, **query: Any) -> Any:
        return http.get("/v1/usage", params=query, headers=headers(name))

    text = {"model": "tiny", "prompt": "abc", "max_tokens": 4}
    for name in ("one", "one", "two"):
        assert http.post("/v1/completions", json=text, headers=headers(name)).status_code == 200
    assert of("one").json()["total"]["requests"] == 2
    assert of("two").json()["total"]["requests"] == 1
    assert of("admin").json()["total"]["requests"] == 0
    everything = of("admin", all_keys=True).json()
    assert everything["key_id"] is None
    assert {row["key_id"]: row["requests"] for row in everything["data"]} == {
        keys["one"][0].id: 2,
        keys["two"][0].id: 1,
    }
    assert error_of(of("one", all_keys=True), 403) == ("insufficient_scope", "all_keys")
    assert of("one", since="2999-01-01").json()["total"]["requests"] == 0
    assert error_of(of("one", since="yesterday")) == ("invalid_value", "since")
    assert http.get("/v1/usage").status_code == 401
