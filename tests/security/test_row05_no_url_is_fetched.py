"""Row 5: a request cannot make the server ask another one: URLs in any field are text, or refused."""

import ast
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from tests.conftest import REPOSITORY
from tests.security.conftest import MODEL, Guarded, check_error

NETWORK = {"requests", "httpx", "httpx2", "aiohttp", "urllib3", "http", "ftplib", "smtplib", "socket",
           "boto3", "fsspec", "huggingface_hub", "datasets"}  # fmt: skip
MAY_ASK = {
    "service/api_client.py",  # the command-line client
    "service/batch_runner.py",  # its own routes, in its own process
    "service/cli.py",  # a socket that it was handed
    "service/server.py",  # the sockets that it serves
    "service/supervisor.py",  # binds the API's address
    "engines/host.py",  # a Unix socket
}


def test_only_clients_of_ours_import_what_could_fetch() -> None:
    found = set()
    for room in ("service", "jobs", "engines", "compression", "graph", "training", "evaluation"):
        for path in sorted((REPOSITORY / room).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                names = (
                    [alias.name for alias in node.names]
                    if isinstance(node, ast.Import)
                    else [node.module or ""]
                    if isinstance(node, ast.ImportFrom)
                    else []
                )
                if any(n.split(".")[0] in NETWORK or n.startswith("urllib.request") for n in names):
                    found.add(str(path.relative_to(REPOSITORY)))
    assert found == MAY_ASK


class Listener:
    """A server that remembers who came."""

    def __init__(self) -> None:
        hits = self.hits = list[str]()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hits.append(self.path)
                self.send_response(302)
                self.send_header("Location", "http://169.254.169.254/latest/meta-data/")
                self.end_headers()

            do_POST = do_HEAD = do_PUT = do_GET

            def log_message(self, *_: Any) -> None:
                return

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()


@pytest.fixture(scope="module")
def listener() -> Iterator[Listener]:
    made = Listener()
    yield made
    made.server.shutdown()
    made.server.server_close()


def urls(port: int) -> list[str]:
    return [
        f"http://127.0.0.1:{port}/x", f"http://localhost:{port}/x.safetensors", f"//127.0.0.1:{port}/x",
        f"http://evil@127.0.0.1:{port}/x", "file:///etc/passwd", f"ftp://127.0.0.1:{port}/x",
        f"gopher://127.0.0.1:{port}/x", f"jar:http://127.0.0.1:{port}/!x", f"hf://127.0.0.1:{port}/x",
    ]  # fmt: skip


def replaced(value: Any, url: str) -> Iterator[Any]:
    """The example with one text after the other become the URL."""
    if isinstance(value, str):
        yield url
    elif isinstance(value, list):
        for index, item in enumerate(value):
            for new in replaced(item, url):
                yield [*value[:index], new, *value[index + 1 :]]
    elif isinstance(value, dict):
        for key, item in value.items():
            for new in replaced(item, url):
                yield value | {key: new}


def examples(app: FastAPI) -> Iterator[tuple[str, Any]]:
    document = app.openapi()
    for path, item in document["paths"].items():
        content = item.get("post", {}).get("requestBody", {}).get("content", {})
        if "application/json" not in content:
            continue
        schema = content["application/json"]["schema"]
        for part in schema.get("oneOf", [schema]):
            if "$ref" in part:
                part = document["components"]["schemas"][part["$ref"].rsplit("/", 1)[1]]
            for example in part.get("examples", ()):
                yield path, example


def test_no_field_of_any_example_is_fetched(
    app: FastAPI, client: TestClient, guarded: Guarded, listener: Listener
) -> None:
    bearer = guarded.headers("admin")
    asked = 0
    for path, example in examples(app):
        path = path.replace("{", "").replace("}", "")
        for url in urls(listener.port):
            for body in replaced(example, url):
                response = client.post(path, json=body, headers=bearer)
                assert response.status_code < 500, (path, body, response.text)
                asked += 1
    assert asked > 100
    assert listener.hits == []


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "http://127.0.0.1:{port}/x.png"}},
        {"type": "input_audio", "input_audio": {"url": "http://127.0.0.1:{port}/x.wav"}},
        {"type": "file", "file": {"url": "http://127.0.0.1:{port}/x"}},
        {"type": "text", "text": "a", "url": "http://127.0.0.1:{port}/x"},
    ],
)
def test_parts_with_urls_are_refused_by_name(
    client: TestClient, guarded: Guarded, listener: Listener, part: dict[str, Any]
) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": [part]}]}
    response = client.post("/v1/chat/completions", json=body, headers=guarded.headers("inference"))
    assert check_error(response, 400) == "unsupported_parameter"
    assert response.json()["error"]["param"].startswith("messages[0].content[0]")


@pytest.mark.parametrize(
    "field", ["webhook", "webhook_url", "callback_url", "hf_token", "repo", "url", "source"]
)
def test_a_job_has_no_field_for_one(
    client: TestClient, guarded: Guarded, listener: Listener, field: str
) -> None:
    body = {
        "type": "compress",
        "model": MODEL,
        "output": "x",
        "recipe": [{"int4": {"group_size": 32}}],
        field: f"http://127.0.0.1:{listener.port}/x",
    }
    response = client.post("/v1/jobs", json=body, headers=guarded.headers("jobs"))
    assert check_error(response, 400) == "unsupported_parameter"
    assert response.json()["error"]["param"] == field
    assert listener.hits == []
