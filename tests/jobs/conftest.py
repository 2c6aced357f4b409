"""Job stores to test: SQLite, and a real redis-server started for the session."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobs.open import open_job_store
from jobs.store import JobStore, NewJob

DEADLINE_SECONDS = 60.0
REPOSITORY = Path(__file__).parents[2]
Location = tuple[Path, str | None]
"""What `open_job_store` takes."""


def new_job(number: int = 0, **fields: object) -> NewJob:
    values = {"type": "test", "owner": "me", "spec": {"n": number}, "request_hash": f"h{number}"}
    return NewJob(id=f"job-{number}", **(values | fields))  # type: ignore[arg-type]


def wait_until(condition: Callable[[], bool], seconds: float = DEADLINE_SECONDS) -> None:
    """Poll a condition; fail the test if it does not come true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s in vain"
        time.sleep(0.02)


def child_environment() -> dict[str, str]:
    """For processes that import both the service and its tests."""
    return {**os.environ, "PYTHONPATH": str(REPOSITORY)}


class RedisServer:
    """A redis-server on a Unix socket.

    Args:
        keeps: what it was told, in its append-only file, before it says so.
    """

    def __init__(self, folder: Path, *, keeps: bool = True) -> None:
        self._folder = folder
        self._keeps = keeps
        self._socket = folder / "redis.sock"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"unix://{self._socket}"

    def start(self) -> None:
        binary = shutil.which("redis-server")
        if binary is None:
            pytest.skip("redis-server is not installed")
        options = {
            "--port": "0",
            "--unixsocket": str(self._socket),
            "--dir": str(self._folder),
            "--save": "",
            "--appendonly": "yes" if self._keeps else "no",
            "--appendfsync": "always",
        }
        self._process = subprocess.Popen(
            [binary, *(part for option in options.items() for part in option)],
            stdout=subprocess.DEVNULL,
        )
        wait_until(self._answers, 20)

    def _answers(self) -> bool:
        import redis

        try:
            with redis.Redis.from_url(self.url) as client:
                return bool(client.ping())
        except redis.RedisError:
            return False

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._process = None


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server.url
    server.stop()


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    """One of the test's own, to stop and start."""
    server = RedisServer(tmp_path)
    server.start()
    yield server
    server.stop()


@pytest.fixture(params=["sqlite", pytest.param("redis", marks=pytest.mark.redis)])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    if request.param == "sqlite":
        return tmp_path / "jobs.db", None
    url: str = request.getfixturevalue("redis_url")
    import redis

    with redis.Redis.from_url(url) as client:
        client.flushall()
    return tmp_path / "unused.db", url


@pytest.fixture
def store(location: Location) -> Iterator[JobStore]:
    opened = open_job_store(*location)
    yield opened
    opened.close()
