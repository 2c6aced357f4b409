"""SIGTERM under load: every accepted request ends or is told so, and jobs go on after the next start."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import httpx
import psutil
import pytest

from benchmarks.faults import Load
from tests.faults.conftest import (
    LONG,
    QUICK,
    SHORT,
    check_batch,
    check_later,
    events,
    last_error,
    submit_batch,
    tell,
    until_status,
)
from tests.processes.conftest import TINY, Service, eventually

pytestmark = pytest.mark.processes
NUM_LINES = 100


@pytest.fixture
def draining(own_home: Path) -> Iterator[Service]:
    service = Service(own_home, (TINY,), QUICK)
    service.start()
    yield service
    assert service.process is not None
    if service.process.poll() is None:
        assert service.stop() == 0


def test_sigterm_cuts_nobody_off(draining: Service, capsys: pytest.CaptureFixture[str]) -> None:
    service = draining
    job_id = submit_batch(service, NUM_LINES, max_tokens=60)
    until_status(service, job_id, "running")
    threads = ThreadPoolExecutor(8)
    begun = threading.Semaphore(0)

    def follow(method: str, path: str, body: object = None) -> list[str]:
        with httpx.stream(method, service.url + path, json=body, timeout=120) as response:
            assert response.status_code == 200
            begun.release()
            return events(response)

    streams = [threads.submit(follow, "POST", "/v1/completions", LONG) for _ in range(3)]
    whole = threads.submit(
        httpx.post, f"{service.url}/v1/completions", json=LONG | {"stream": False}, timeout=120
    )
    job_events = threads.submit(follow, "GET", f"/v1/jobs/{job_id}/events?stream=true")
    for _ in range(4):
        assert begun.acquire(timeout=60)
    with httpx.Client(base_url=service.url, timeout=60) as client:
        assert client.get("/health").status_code == 200
        assert service.process is not None
        began = time.monotonic()
        service.process.terminate()
        late = eventually(lambda: refusal(client), "a refusal")
        assert check_later(late) == "draining"
        assert late.headers["connection"] == "close"
        assert check_later(client.get("/ready")) == "draining"
        assert client.get("/health").status_code == 200
    assert last_error(job_events.result()) == "draining"
    for stream in streams:
        assert last_error(stream.result()) == "draining"
    assert check_later(whole.result()) == "draining"
    assert service.process.wait(120) == 0, service.log
    tell(
        capsys,
        f"SIGTERM with requests that do not end: over after {time.monotonic() - began:.1f} s",
    )
    service.start()
    found = check_batch(service, job_id, NUM_LINES)
    assert found["attempt"] <= 2  # 1 if its last line was done before the worker was told


def refusal(client: httpx.Client) -> httpx.Response | None:
    response = client.post("/v1/completions", json=SHORT)
    return None if response.status_code == 200 else response


def test_an_api_process_that_is_ended_under_load_loses_nothing(
    draining: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its successor takes the connections that waited: a client sees whole answers, and errors that say "later"."""
    service = draining
    load = Load(service.url, TINY, max_tokens=100)

    async def work() -> list[str]:
        async with load.running():
            for _ in range(2):
                api = service.children()["api"]
                api.terminate()
                await asyncio.to_thread(eventually, partial(is_replaced, service, api), "a new API")
                await asyncio.sleep(1.0)
        lost = await load.lost_jobs()
        await load.aclose()
        return lost

    assert asyncio.run(work()) == []
    assert load.wrong == []
    assert load.broken == 0
    assert load.answered["stream"]
    tell(capsys, f"API ended twice: {dict(load.answered)}, told {dict(load.told)}")


def is_replaced(service: Service, before: psutil.Process) -> bool:
    with contextlib.suppress(httpx.TransportError):
        api = service.children().get("api")
        return api is not None and api.pid != before.pid and service.is_ready()
    return False
