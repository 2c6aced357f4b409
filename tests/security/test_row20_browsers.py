"""Row 20: a page in a browser on the same machine reaches nothing: no CORS, known Hosts only, no foreign Origin, and
bodies that a browser cannot send without asking first."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from service.app import build_app
from service.auth import KeyStore
from service.settings import Settings
from tests.security.conftest import MODEL, Guarded, check_error, make_home, scripted_engine

MULTIPART = {"content-type": "multipart/form-data; boundary=x"}
FORM = b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n--x--\r\n'


@pytest.fixture(scope="module")
def keyless(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """On a laptop without keys: what a browser sends would be obeyed."""
    home = make_home(tiny_llama, tmp_path_factory.mktemp("home"))
    app = build_app(Settings(home=home, models=(MODEL,)))
    app.state.lathe.engines.add(MODEL, scripted_engine())
    with TestClient(app, "http://127.0.0.1:8000", raise_server_exceptions=False) as client:
        yield client


ORIGINS = [
    "https://evil.example", "http://127.0.0.1:3000", "http://127.0.0.1", "http://localhost:8000",
    "null", "", "file://", "http://127.0.0.1:8000.evil.example", "http://127.0.0.1:8000@evil.example",
]  # fmt: skip


@pytest.mark.parametrize("origin", ORIGINS)
def test_another_origin_is_refused_before_anything_happens(
    keyless: TestClient, origin: str
) -> None:
    """Each of these a browser sends by itself: no body, or one of a form's types."""
    headers = {"origin": origin}
    for response in (
        keyless.post(f"/v1/models/{MODEL}/sleep", headers=headers),
        keyless.post("/v1/jobs/job-1/cancel", headers=headers),
        keyless.post("/v1/files", content=FORM, headers=headers | MULTIPART),
        keyless.post("/v1/graphs", content=FORM, headers=headers | MULTIPART),
        keyless.get("/v1/models", headers=headers),
    ):
        assert check_error(response, 403) == "origin_not_allowed"
    assert keyless.get(f"/v1/models/{MODEL}").json()["state"] == "ready"


@pytest.mark.parametrize("origin", ["http://127.0.0.1:8000", "HTTP://127.0.0.1:8000"])
def test_its_own_pages_are_served(keyless: TestClient, origin: str) -> None:
    assert keyless.get("/v1/models", headers={"origin": origin}).status_code == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "http://127.0.0.1:8000"])
def test_no_answer_allows_another_origin(keyless: TestClient, origin: str) -> None:
    preflight = {
        "origin": origin,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization, content-type",
    }
    for response in (
        keyless.options("/v1/chat/completions", headers=preflight),
        keyless.get("/v1/models", headers=preflight),
    ):
        named = [name for name in response.headers if name.startswith("access-control-")]
        assert named == []


@pytest.mark.parametrize(
    "content_type",
    ["text/plain", "application/x-www-form-urlencoded", "", "text/json", "application/jsonx",
     "application/json, text/plain", "text/plain; application/json", "application/csp-report"],
)  # fmt: skip
def test_a_body_must_say_that_it_is_json(keyless: TestClient, content_type: str) -> None:
    body = b'{"model": "tiny", "prompt": "abc", "max_tokens": 1}'
    response = keyless.post("/v1/completions", content=body, headers={"content-type": content_type})
    assert check_error(response, 415) == "unsupported_media_type"


def test_json_may_name_its_charset(keyless: TestClient) -> None:
    response = keyless.post(
        "/v1/completions",
        content=b'{"model": "tiny", "prompt": "abc", "max_tokens": 1}',
        headers={"content-type": "Application/JSON; charset=utf-8"},
    )
    assert response.status_code == 200


def test_a_rebound_name_is_refused(keyless: TestClient) -> None:
    for host in ("evil.example", "evil.example:8000"):
        response = keyless.get("/v1/models", headers={"host": host})
        assert check_error(response, 403) == "host_not_allowed"


def test_an_operator_may_allow_names(home: Path, guarded: Guarded) -> None:
    settings = Settings(home=home, models=(MODEL,), allowed_hosts=("Lathe.Example",))
    app = build_app(settings)
    bearer = guarded.headers("inference")
    with TestClient(app, "https://lathe.example", raise_server_exceptions=False) as client:
        for origin in ("https://lathe.example", "https://LATHE.example:8443"):
            response = client.get("/v1/models", headers=bearer | {"origin": origin})
            assert response.status_code == 200
        evil = bearer | {"origin": "https://evil.example"}
        assert client.get("/v1/models", headers=evil).status_code == 403
        assert client.get("/v1/models", headers=bearer | {"host": "x.example"}).status_code == 403


def test_on_a_public_address_the_key_is_what_counts(home: Path) -> None:
    """Its names are not known, and a browser adds no key by itself."""
    settings = Settings(home=home, models=(MODEL,), host="0.0.0.0")
    key, secret = KeyStore(settings.keys_file).create("public", ("inference",))
    with TestClient(build_app(settings), raise_server_exceptions=False) as client:
        foreign = {"host": "any.example", "origin": "https://page.example"}
        assert check_error(client.get("/v1/models", headers=foreign), 401) == "invalid_api_key"
        bearer = {"authorization": f"Bearer {secret}"}
        assert client.get("/v1/models", headers=foreign | bearer).status_code == 200
    KeyStore(settings.keys_file).revoke(key.id)


def test_the_api_page_loads_nothing_from_elsewhere(keyless: TestClient) -> None:
    page = keyless.get("/docs").text
    loaded = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(loaded) == 3, "a style sheet, an icon and a script"
    for path in loaded:
        assert path.startswith("/static-offline-docs/"), path
        response = keyless.get(path)
        assert response.status_code == 200
        assert len(response.content) > 1000
        refused = keyless.post(path)
        assert check_error(refused, 405) == "method_not_allowed"
        assert refused.headers["allow"] == "GET, HEAD"
    assert "//" not in re.sub(r"<!--.*?-->", "", page), "another host"
    assert check_error(keyless.get("/static-offline-docs/../app.py"), 404) == "not_found"
    assert check_error(keyless.get("/static-offline-docs/%2e%2e/core.py"), 404) == "not_found"
