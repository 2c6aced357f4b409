"""The whole application over a scripted engine, with one key of each role, in process and behind a real socket."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient

from compression.import_model import import_folder
from compression.registry import ModelRegistry
from service.app import build_app
from service.auth import ROLES, KeyStore, Role
from service.deps import AppState
from service.settings import Settings
from tests.fakes.echo_engine import ECHO_INFO
from tests.fakes.fake_async_engine import FakeAsyncEngine

MODEL = "tiny"
MAX_ERROR_BYTES = 8 * 1024


@dataclass
class Guarded:
    """A service with keys.

    Attributes:
        engine: serves `MODEL`; remembers what reached it.
        secrets, ids: the key of each role.
    """

    settings: Settings
    engine: FakeAsyncEngine
    keys: KeyStore
    secrets: dict[Role, str] = field(default_factory=dict)
    ids: dict[Role, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for role in ROLES:
            key, self.secrets[role] = self.keys.create(f"the {role} key", (role,))
            self.ids[role] = key.id

    def build(self) -> FastAPI:
        app = build_app(self.settings)
        state: AppState = app.state.lathe
        state.engines.add(MODEL, self.engine)
        return app

    def headers(self, role: Role) -> dict[str, str]:
        return {"authorization": f"Bearer {self.secrets[role]}"}


def make_home(tiny_llama: Path, home: Path) -> Path:
    import_folder(ModelRegistry(home / "models"), MODEL, tiny_llama, report=lambda _: None)
    return home


def scripted_engine() -> FakeAsyncEngine:
    return FakeAsyncEngine(
        info=replace(ECHO_INFO, model=MODEL, vocab_size=31, unsupported=("skip",))
    )


@pytest.fixture(scope="module")
def home(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tiny_llama, tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def guarded(home: Path) -> Guarded:
    settings = Settings(home=home, models=(MODEL,))
    return Guarded(settings, scripted_engine(), KeyStore(settings.keys_file))


@pytest.fixture(scope="module")
def app(guarded: Guarded) -> FastAPI:
    return guarded.build()


@pytest.fixture(scope="module")
def client(app: FastAPI) -> Iterator[TestClient]:
    with TestClient(app, raise_server_exceptions=False) as test_client:
        yield test_client


class Wire:
    """A server on a loopback port, spoken to byte by byte."""

    def __init__(self, app: FastAPI) -> None:
        self._listener = socket.socket()
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(128)
        self.port: int = self._listener.getsockname()[1]
        config = uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=5)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._listener]}, daemon=True
        )

    def start(self) -> None:
        self._thread.start()
        deadline = time.monotonic() + 30
        while not self._server.started:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(15)
        self._listener.close()

    def ask(
        self, *lines: str | bytes, body: bytes = b"", version: str = "1.1"
    ) -> tuple[int, bytes]:
        """Send a request line and headers as they are; the status and the body of the answer."""
        first, *rest = (line.encode("latin-1") if isinstance(line, str) else line for line in lines)
        head = b"\r\n".join([first + f" HTTP/{version}".encode(), *rest, b"Connection: close"])
        with socket.create_connection(("127.0.0.1", self.port), timeout=30) as connection:
            connection.sendall(head + b"\r\n\r\n" + body)
            answer = b""
            while chunk := connection.recv(65536):
                answer += chunk
        head, _, content = answer.partition(b"\r\n\r\n")
        return int(head.split(b" ", 2)[1]), content


@pytest.fixture(scope="module")
def wire(guarded: Guarded) -> Iterator[Wire]:
    server = Wire(guarded.build())
    server.start()
    yield server
    server.stop()


def check_error(response: Any, *statuses: int) -> str:
    """Of one shape, small, and without our insides; its code."""
    assert response.status_code in statuses, (response.status_code, response.text[:500])
    assert len(response.content) <= MAX_ERROR_BYTES
    error = json.loads(response.content)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    code: str = error["code"]
    return code
