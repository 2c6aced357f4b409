"""What the HTTP server does with connections that do not move, with a drain, and with many who follow one job."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from jobs.sqlite import SqliteJobStore
from jobs.store import Event, JobNotFoundError
from service.drain import Drain, draining
from service.errors import ApiError
from service.job_feeds import JobFeeds
from service.server import Config, Protocol
from tests.jobs.conftest import new_job

pytestmark = pytest.mark.anyio
DEADLINE_SECONDS = 60.0
SILENCE_SECONDS = 0.2
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]


class Endless:
    """An ASGI application that answers until its client is gone."""

    def __init__(self) -> None:
        self.gone = asyncio.Event()

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        watcher = asyncio.ensure_future(self._watch(receive))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while not self.gone.is_set():
            await send({"type": "http.response.body", "body": bytes(65536), "more_body": True})
            await asyncio.sleep(0)  # to a client that is gone, nothing is sent at once
        await watcher

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.gone.set()


@asynccontextmanager
async def served(app: Any) -> AsyncIterator[int]:
    """The port of an application whose silent clients are given up soon."""
    config = Config(app, http=Protocol, lifespan="off", log_config=None)
    config.silence_seconds = SILENCE_SECONDS
    server = uvicorn.Server(config)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    running = asyncio.create_task(server.serve([listener]))
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        await running


async def test_a_client_that_takes_nothing_is_given_up() -> None:
    app = Endless()
    async with served(app) as port, asyncio.timeout(DEADLINE_SECONDS):
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            await app.gone.wait()


@pytest.mark.parametrize("head", [b"", b"GET / HTTP/1.1\r\n", b"POST / HTTP/1.1\r\nHost: a\r\nX: "])
async def test_a_client_that_sends_no_whole_head_is_given_up(head: bytes) -> None:
    async with served(Endless()) as port, asyncio.timeout(DEADLINE_SECONDS):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head)
        with suppress(ConnectionResetError):
            assert await reader.read() == b""
        writer.close()


async def test_a_drain_lets_run_what_runs_and_then_ends_it() -> None:
    drain = Drain()
    outcomes: list[str] = []

    async def request(seconds: float) -> None:
        try:
            async with drain.admitted():
                await asyncio.sleep(seconds)
            outcomes.append("ended")
        except ApiError as error:
            outcomes.append(error.code)

    running = [asyncio.create_task(request(seconds)) for seconds in (0.05, 3600.0)]
    await asyncio.sleep(0)
    drain.begin()
    await request(0)
    assert outcomes == ["draining"]
    await running[0]
    await drain.wait(0)
    drain.end()
    await asyncio.gather(*running)
    assert outcomes == ["draining", "ended", "draining"]
    await drain.wait(DEADLINE_SECONDS)


async def test_the_store_is_asked_once_for_all_who_follow(tmp_path: Path) -> None:
    store = SqliteJobStore(tmp_path / "jobs.db")
    store.create(new_job())
    num_questions = 0

    class Counting:
        def newest_events(self, job_id: str, *, limit: int) -> list[Event]:
            nonlocal num_questions
            num_questions += 1
            return store.newest_events(job_id, limit=limit)

    feeds = JobFeeds(Counting())  # type: ignore[arg-type]
    async with asyncio.timeout(DEADLINE_SECONDS):
        await feeds.news("job-0", 0)
        assert num_questions == 1
        followers = [asyncio.create_task(feeds.news("job-0", 1)) for _ in range(50)]
        await asyncio.sleep(0)
        assert not any(follower.done() for follower in followers)
        store.request_cancel("job-0")
        await asyncio.gather(*followers)
        assert num_questions < 50
        waiting = asyncio.create_task(feeds.news("job-0", 2))
        await asyncio.sleep(0)
        feeds.close(draining())
        for follower in (waiting, feeds.news("job-0", 2)):
            with pytest.raises(ApiError, match="stopping"):
                await follower
        with pytest.raises(JobNotFoundError):
            await JobFeeds(store).news("job-1", 0)
    store.close()
