"""Row 7: every route needs a key with its role, but for those that tell of nobody; without one, no public address."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from service.app import OPEN_ROUTES, ROUTERS
from service.auth import KeyStore, PublicBindError, Role, check_bind
from tests.security.conftest import Guarded, check_error

DOCUMENTS = {"/openapi.json", "/docs", "/docs/oauth2-redirect", "/static-offline-docs"}
"""FastAPI's own, which describe the program and not what it holds, and the scripts of the page."""
ROLE_OF: dict[str, set[Role]] = {
    "/v1/jobs": {"jobs"},
    "/v1/batches": {"jobs"},
    "/v1/files": {"jobs"},
    "/v1/fine_tuning": {"jobs"},
    "/v1/models": {"inference", "admin"},
    "/v1/usage": {"inference", "jobs"},
}
"""By prefix; everything else is for `inference`. Admins may do everything."""


def operations(app: FastAPI) -> list[tuple[str, str]]:
    found = [
        (method.upper(), path) for path, item in app.openapi()["paths"].items() for method in item
    ]
    assert len(found) > 40
    return found


def ask(client: TestClient, method: str, path: str, headers: dict[str, str]) -> Any:
    path = path.replace("{", "").replace("}", "")
    body = b"{}" if method in ("POST", "PUT", "PATCH") else b""
    headers = headers | {"content-type": "application/json"}
    return client.request(method, path, headers=headers, content=body)


def test_the_document_hides_no_route(app: FastAPI) -> None:
    """What is enumerated below is everything that the routers and FastAPI itself serve."""
    documented = set(app.openapi()["paths"])
    mounted = {getattr(route, "path", "") for router in ROUTERS for route in router.routes}
    others = {getattr(route, "path", None) for route in app.routes} - documented - {None}
    assert mounted == documented
    assert others <= DOCUMENTS


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer lathe-none"},
        {"authorization": "Basic bGF0aGU6"},
        {"x-api-key": "lathe-none"},
        {"cookie": "authorization=Bearer"},
    ],
)
def test_no_key_no_answer(app: FastAPI, client: TestClient, headers: dict[str, str]) -> None:
    for method, path in operations(app):
        response = ask(client, method, path, headers)
        if path in OPEN_ROUTES:
            assert response.status_code in (200, 503), path
        else:
            assert check_error(response, 401) == "invalid_api_key", (method, path)
            assert response.headers["www-authenticate"] == "Bearer"


def test_a_role_opens_its_own_routes_only(
    app: FastAPI, client: TestClient, guarded: Guarded
) -> None:
    for method, path in operations(app):
        if path in OPEN_ROUTES:
            continue
        allowed = next((r for p, r in ROLE_OF.items() if path.startswith(p)), {"inference"})
        roles: tuple[Role, ...] = ("inference", "jobs")
        refused = [
            role
            for role in roles
            if ask(client, method, path, guarded.headers(role)).status_code == 403
        ]
        assert refused or len(allowed) == 2, f"every key may {method} {path}"
        assert not (set(refused) & allowed) or "admin" in allowed, (method, path, refused)
        assert ask(client, method, path, guarded.headers("admin")).status_code != 403


def test_management_is_for_admins(app: FastAPI, client: TestClient, guarded: Guarded) -> None:
    managing = [
        (method, path)
        for method, path in operations(app)
        if path.startswith("/v1/models/") and method != "GET"
    ]
    assert {path.rpartition("/")[2] for _, path in managing} >= {"load", "unload", "sleep", "wake"}
    roles: tuple[Role, ...] = ("inference", "jobs")
    for method, path in managing:
        for role in roles:
            response = ask(client, method, path, guarded.headers(role))
            assert check_error(response, 403) == "insufficient_scope"


def test_a_strangers_body_is_not_even_read(client: TestClient) -> None:
    """Nor told what is wrong with it."""
    json = {"content-type": "application/json"}
    for path in ("/v1/chat/completions", "/v1/graphs", "/v1/files", "/nowhere"):
        for body in (b"{", b"[" * 10**5, b"x" * 10**6):
            response = client.post(path, content=body, headers=json)
            assert check_error(response, 401) == "invalid_api_key"


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "192.0.2.1", "example.org", "", "127.0.0.1.nip.io"]
)
def test_a_public_address_needs_a_key(tmp_path: Path, host: str) -> None:
    with pytest.raises(PublicBindError):
        check_bind(host, KeyStore(tmp_path / "keys.json"))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_a_loopback_address_does_not(tmp_path: Path, host: str) -> None:
    assert "no API keys" in (check_bind(host, KeyStore(tmp_path / "keys.json")) or "")


def test_the_command_ends_without_serving(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "service.cli", "serve", "--home", str(tmp_path)),
            *("--host", "0.0.0.0", "--port", "0"),
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "refusing to serve 0.0.0.0 without an API key" in done.stderr
