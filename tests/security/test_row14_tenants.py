"""Row 14: what one key made or had computed, another neither sees nor feels in its cached tokens.

Enrichment's cache: tests/graph/test_enrich.py and tests/service/test_graph_routes.py.
"""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from engines.host import EngineHost
from service.app import build_app
from service.auth import KeyStore
from service.settings import Settings
from tests.security.conftest import MODEL, check_error

PROMPT = "the quick brown fox jumps over the lazy dog and the wood turns round"


@pytest.fixture(scope="module")
def secrets(home: Path) -> list[str]:
    """Two keys that may do the same."""
    keys = KeyStore(home / "keys.json")
    return [keys.create(name, ("inference", "jobs"))[1] for name in ("one", "two")]


@pytest.fixture(scope="module")
def client(home: Path, secrets: list[str]) -> Iterator[TestClient]:
    """Over a real engine with its prefix cache."""
    import torch

    from engines.engine import NativeEngine

    settings = Settings(home=home, models=(MODEL,))
    engine = NativeEngine.load(MODEL, settings.models_dir / MODEL, dtype=torch.float32)
    host = EngineHost(engine)
    ready = threading.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        await host.serve(settings.engine_socket(MODEL), on_ready=ready.set)

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert ready.wait(60)
    with TestClient(build_app(settings), raise_server_exceptions=False) as test_client:
        yield test_client
    loops[0].call_soon_threadsafe(host.stop)
    thread.join(30)


def bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


def complete(client: TestClient, secret: str) -> dict[str, Any]:
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 2, "temperature": 0}
    response = client.post("/v1/completions", json=body, headers=bearer(secret))
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_a_cached_prefix_is_its_own_tenants(client: TestClient, secrets: list[str]) -> None:
    first, again, other, other_again = (
        complete(client, secret) for secret in (secrets[0], secrets[0], secrets[1], secrets[1])
    )
    cached = [
        answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        for answer in (first, again, other, other_again)
    ]
    assert cached[0] == cached[2] == 0
    assert cached[1] == cached[3] > 0
    texts = {answer["choices"][0]["text"] for answer in (first, again, other, other_again)}
    assert len(texts) == 1


def test_what_one_key_makes_another_does_not_find(client: TestClient, secrets: list[str]) -> None:
    """The same answer as for what is not there at all; and an idempotency key is one's own."""
    one, two = map(bearer, secrets)
    line = b'{"text": "a text that only one may read"}\n'
    form: dict[str, Any] = {"data": {"purpose": "calibration"}, "files": {"file": ("a", line)}}
    compress = {
        "type": "compress",
        "model": MODEL,
        "output": "out",
        "recipe": [{"int4": {"group_size": 32}}],
    }
    graph = {"name": "g", "nodes": [{"id": "a", "text": "secret"}], "edges": []}
    idempotent = {"Idempotency-Key": "the-same"}
    made = {
        "files": client.post("/v1/files", headers=one | idempotent, **form).json()["id"],
        "jobs": client.post("/v1/jobs", headers=one | idempotent, json=compress).json()["id"],
        "graphs": client.post("/v1/graphs", headers=one | idempotent, json=graph).json()["id"],
    }
    for kind, identifier in made.items():
        assert client.get(f"/v1/{kind}/{identifier}", headers=one).status_code == 200
        assert client.get(f"/v1/{kind}", headers=two).json()["data"] == []
        foreign = client.get(f"/v1/{kind}/{identifier}", headers=two)
        nothing = client.get(f"/v1/{kind}/{identifier[:-4]}0000", headers=two)
        assert check_error(foreign, 404) == check_error(nothing, 404)
        assert client.delete(f"/v1/{kind}/{identifier}", headers=two).status_code in (404, 405)
    for path in ("events", "logs", "artifacts"):
        assert client.get(f"/v1/jobs/{made['jobs']}/{path}", headers=two).status_code == 404
    assert client.delete(f"/v1/jobs/{made['jobs']}/artifacts", headers=two).status_code == 404
    for verb in ("cancel", "pause", "resume"):
        assert client.post(f"/v1/jobs/{made['jobs']}/{verb}", headers=two).status_code == 404
    assert client.get(f"/v1/files/{made['files']}/content", headers=two).status_code == 404
    stolen = compress | {"output": "out2", "calibration": {"file": made["files"]}}
    stolen["recipe"] = [{"wanda": {"sparsity": 0.5}}]
    assert check_error(client.post("/v1/jobs", headers=two, json=stolen), 404) == "file_not_found"
    own = client.post("/v1/jobs", headers=two | idempotent, json=compress | {"output": "out3"})
    assert own.status_code == 201
    assert own.json()["id"] != made["jobs"]
