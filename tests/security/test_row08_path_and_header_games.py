"""Row 8: odd paths, Hosts and headers get nobody past the key, and never an internal error."""

import json

import pytest
from fastapi.testclient import TestClient

from tests.security.conftest import Guarded, Wire, check_error

HOST = "Host: 127.0.0.1"
PATHS = [
    "//v1/models", "/v1//models", "/v1/models/", "/v1/../v1/models", "/health/../v1/models",
    "/health/..;/v1/models", "/v1/models/..", "/%2e%2e/v1/models", "/v1%2fmodels", "/v1/models%00",
    "/v1/models%0d%0aX: y", "/v1/models;health", "/v1/models?/health", "/v1/models#/health",
    "/V1/models", "/v1\\models", "/health/v1/models", "/v1/models/%2e%2e%2f%2e%2e%2fhealth",
    "http://127.0.0.1/v1/models", "http://evil.example/v1/models", "http://evil.example/health/../v1/models",
    "*", "/v1/models/" + "a" * 60_000,
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path[:40])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_no_spelling_of_a_path_goes_around_the_key(wire: Wire, method: str, path: str) -> None:
    status, content = wire.ask(f"{method} {path}", HOST, "Content-Length: 0")
    assert 400 <= status < 500, content
    assert b'"data"' not in content


@pytest.mark.parametrize(
    "host",
    [
        "evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example",
        "127.0.0.1@evil.example", "evil.example@127.0.0.1", "localhost.", "", "127.0.0.1 ",
        "[::1", "[::1]x", "[::1].evil.example", "127.0.0.1?", "127.0.0.1/health", "127.0.0.1#",
        "0.0.0.0", "0", "2130706433", "127.1", "\u00e9.example", "localhost:8000:evil",
    ],
)  # fmt: skip
def test_only_known_hosts_are_served(
    client: TestClient, wire: Wire, guarded: Guarded, host: str
) -> None:
    bearer = f"Authorization: {guarded.headers('admin')['authorization']}"
    status, content = wire.ask("GET /v1/models", f"Host: {host}", bearer)
    assert status in (400, 403), content
    assert status == 400 or json.loads(content)["error"]["code"] == "host_not_allowed"


@pytest.mark.parametrize("host", ["127.0.0.1", "LOCALHOST:8000", "[::1]:8000", "127.0.0.1:"])
def test_known_hosts_are(wire: Wire, guarded: Guarded, host: str) -> None:
    bearer = f"Authorization: {guarded.headers('inference')['authorization']}"
    assert wire.ask("GET /v1/models", f"Host: {host}", bearer)[0] == 200
    assert wire.ask("GET /v1/models", f"Host: {host}")[0] == 401


def test_a_request_has_one_host_and_http_1_0_none(wire: Wire, guarded: Guarded) -> None:
    bearer = f"Authorization: {guarded.headers('inference')['authorization']}"
    for hosts in ((HOST, "Host: evil.example"), ("Host: evil.example", HOST), (HOST, HOST)):
        assert wire.ask("GET /v1/models", *hosts, bearer)[0] in (400, 403)
    assert wire.ask("GET /v1/models", bearer, version="1.0")[0] == 200
    assert wire.ask("GET /v1/models", version="1.0")[0] == 401


@pytest.mark.parametrize(
    "header",
    [
        "X-Forwarded-For: 127.0.0.1", "X-Forwarded-Host: localhost", "X-Original-URL: /health",
        "X-Rewrite-URL: /health", "Forwarded: for=127.0.0.1", "X-Real-IP: 127.0.0.1",
        "X-HTTP-Method-Override: GET", "X-Forwarded-Prefix: /health", "Upgrade: websocket",
    ],
)  # fmt: skip
def test_no_header_stands_in_for_a_key(wire: Wire, header: str) -> None:
    assert wire.ask("GET /v1/models", HOST, header)[0] == 401
    assert wire.ask("POST /v1/models/tiny/unload", HOST, header, "Content-Length: 0")[0] == 401


@pytest.mark.parametrize(
    "length", ["-1", "+5", "1e3", "0x5", "5, 5", " ", "99999999999999999999", "\u0665"]
)
def test_a_length_that_is_none_is_refused(
    client: TestClient, guarded: Guarded, length: str
) -> None:
    headers = guarded.headers("inference") | {"content-type": "application/json"}
    raw = [(k.encode(), v.encode()) for k, v in headers.items()]
    raw.append((b"content-length", length.encode()))
    response = client.post("/v1/completions", content=b"{}", headers=raw)
    assert check_error(response, 400, 413) in ("request_too_large", "invalid_value")


def test_two_lengths_and_a_chunked_body_smuggle_nothing(wire: Wire, guarded: Guarded) -> None:
    inner = b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    bearer = f"Authorization: {guarded.headers('inference')['authorization']}"
    for framing in (
        ("Content-Length: 2", f"Content-Length: {len(inner) + 2}"),
        ("Content-Length: 2", "Transfer-Encoding: chunked"),
        ("Transfer-Encoding: chunked, identity",),
    ):
        status, content = wire.ask(
            "POST /v1/completions", HOST, bearer, "Content-Type: application/json", *framing,
            body=b"{}" + inner,
        )  # fmt: skip
        assert 400 <= status < 500
        assert b"HTTP/1.1 200" not in content


def test_huge_headers_are_refused(wire: Wire) -> None:
    for line in (
        "X: " + "a" * 200_000,
        "A" * 100_000 + ": x",
        "Authorization: Bearer " + "a" * 200_000,
    ):
        try:
            status, _ = wire.ask("GET /v1/models", HOST, line)
        except (ConnectionError, IndexError):
            continue  # closed without an answer
        assert 400 <= status < 500
    assert wire.ask("GET /health", HOST)[0] == 200
