"""Redis is killed under the service, with and without its append-only file."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.faults.conftest import (
    QUICK,
    check_batch,
    check_later,
    complete,
    open_socket,
    submit_batch,
    tell,
    until_status,
)
from tests.jobs.conftest import RedisServer
from tests.processes.conftest import TINY, Service, eventually

pytestmark = [pytest.mark.processes, pytest.mark.redis]
NUM_LINES = 100
Start = Callable[[bool], tuple[Service, RedisServer]]


@pytest.fixture
def redis_service(own_home: Path, tmp_path: Path) -> Iterator[Start]:
    """Starts a service over a redis-server that keeps a file of its own, or nothing."""
    running: list[tuple[Service, RedisServer]] = []

    def start(keeps: bool) -> tuple[Service, RedisServer]:
        folder = tmp_path / "redis"
        folder.mkdir()
        server = RedisServer(folder, keeps=keeps)
        server.start()
        service = Service(own_home, (TINY,), QUICK | {"REDIS_URL": server.url})
        running.append((service, server))
        service.start()
        return service, server

    yield start
    for service, server in running:
        assert service.stop() == 0
        server.stop()


def test_with_its_file_nothing_accepted_is_lost(
    redis_service: Start,
    capsys: pytest.CaptureFixture[str],
) -> None:
    service, server = redis_service(True)
    running = submit_batch(service, NUM_LINES, max_tokens=60)
    until_status(service, running, "running")
    queued = [submit_batch(service, 3) for _ in range(2)]
    follower = open_socket(
        service, f"GET /v1/jobs/{queued[-1]}/events?stream=true HTTP/1.1\nHost: 127.0.0.1\n\n"
    )
    assert b"queued" in follower.recv(65536) + follower.recv(65536)
    server.kill()
    check_outage(service)
    rest = b""
    while not rest.endswith(b"0\r\n\r\n"):
        more = follower.recv(65536)
        assert more, "an event stream was cut"
        rest += more
    follower.close()
    assert b"event: error" in rest
    assert b"store_unavailable" in rest
    server.start()
    began = time.monotonic()
    eventually(service.is_ready, "/ready")
    tell(capsys, f"Redis, kill -9, after its return: ready in {time.monotonic() - began:.1f} s")
    for job_id in queued:
        check_batch(service, job_id, 3)
    check_batch(service, running, NUM_LINES)


def check_outage(service: Service) -> None:
    """What needs no store goes on; what does says that it is away."""
    assert httpx.get(f"{service.url}/health").status_code == 200
    ready = httpx.get(f"{service.url}/ready", timeout=60)
    assert check_later(ready) == "store_unavailable"
    assert complete(service).status_code == 200
    created = httpx.post(
        f"{service.url}/v1/jobs", json={"type": "export", "model": TINY}, timeout=60
    )
    assert check_later(created) == "store_unavailable"
    metrics = httpx.get(f"{service.url}/metrics", timeout=60)
    assert metrics.status_code == 200
    assert "vllm:num_requests_running" in metrics.text


def test_without_it_the_loss_is_told_and_the_service_recovers(
    redis_service: Start,
) -> None:
    service, server = redis_service(False)
    lost = [submit_batch(service, 10 * NUM_LINES, max_tokens=200), submit_batch(service, 3)]
    until_status(service, lost[0], "running")
    server.kill()
    check_outage(service)
    server.start()
    eventually(service.is_ready, "/ready")
    for job_id in lost:
        response = httpx.get(f"{service.url}/v1/jobs/{job_id}")
        assert (response.status_code, response.json()["error"]["code"]) == (404, "job_not_found")
    assert httpx.get(f"{service.url}/v1/batches").json()["data"] == []
    eventually(lambda: "job" not in service.children(), "the end of the lost job's process")
    check_batch(service, submit_batch(service, 3), 3)
    log = (service.home / "logs" / "worker.log").read_text()
    assert f"job {lost[0]}: the store has lost it" in log
