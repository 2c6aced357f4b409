"""The graph routes over scripted models, behind a real server on a free port."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest
import uvicorn
from fastapi import FastAPI
from lathe_client import EnrichmentClient

from tests.service.test_graph_routes import Service

DEADLINE_SECONDS = 20.0


@pytest.fixture
def service(tmp_path: Path) -> Service:
    return Service(tmp_path / "home")


@pytest.fixture
def url(service: Service) -> Iterator[str]:
    with serve(service.app, lifespan="off") as url:
        yield url


@pytest.fixture
def client(url: str) -> Iterator[EnrichmentClient]:
    with EnrichmentClient(url) as client:
        yield client


@contextmanager
def serve(app: FastAPI, *, lifespan: Literal["on", "off"] = "on") -> Iterator[str]:
    """An application on a free port; yields its address."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan=lifespan))
        started = threading.Event()
        startup = server.startup

        async def announce(sockets: Any = None) -> None:
            await startup(sockets)
            started.set()

        server.startup = announce  # type: ignore[method-assign]
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        assert started.wait(DEADLINE_SECONDS)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(DEADLINE_SECONDS)
            assert not thread.is_alive()
