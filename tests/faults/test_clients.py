"""Clients that do not do their part: they send slowly, read slowly or not at all, or just stay."""

import resource
import socket
import time
from collections.abc import Iterator

import httpx
import psutil
import pytest

from tests.faults.conftest import LONG, complete, open_socket, submit_batch, tell, until_status
from tests.processes.conftest import Service, eventually

pytestmark = pytest.mark.processes
NUM_STREAMS = 2000


@pytest.fixture
def many_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = NUM_STREAMS + 500
    if hard != resource.RLIM_INFINITY and hard < needed:
        pytest.skip(f"the system allows a process {hard} files; {needed} are needed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, needed), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_two_thousand_idle_event_streams(
    service: Service, many_files: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """They follow a paused job; then it is cancelled, and each of them is told so and ends."""
    job_id = submit_batch(service, 500, max_tokens=200)
    httpx.post(f"{service.url}/v1/jobs/{job_id}/pause")
    until_status(service, job_id, "paused")
    api = service.children()["api"]
    before = api.memory_info().rss
    head = f"GET /v1/jobs/{job_id}/events?stream=true HTTP/1.1\nHost: 127.0.0.1\n\n"
    streams = [open_socket(service, head) for _ in range(NUM_STREAMS)]
    for stream in streams:
        assert b"200 OK" in stream.recv(4096)
    began = time.monotonic()
    assert httpx.get(f"{service.url}/health", timeout=60).status_code == 200
    seconds = time.monotonic() - began
    assert complete(service).status_code == 200
    used = (api.memory_info().rss - before) / NUM_STREAMS / 1024
    tell(
        capsys,
        f"{NUM_STREAMS} idle streams: {used:.1f} KiB each, /health in {seconds * 1000:.0f} ms",
    )
    assert httpx.post(f"{service.url}/v1/jobs/{job_id}/cancel", timeout=60).status_code == 200
    for stream in streams:
        rest = b""
        while not rest.endswith(b"0\r\n\r\n"):
            more = stream.recv(65536)
            assert more, "cut"
            rest += more
        assert b"cancelled" in rest
        stream.close()
    eventually(lambda: num_connections(api) < 50, "the end of their connections")


def num_connections(process: psutil.Process) -> int:
    return len(process.net_connections("tcp"))


def test_a_client_that_stops_reading_holds_nobody_up(service: Service) -> None:
    body = str(LONG).replace("'", '"').replace("True", "true")
    head = (
        "POST /v1/completions HTTP/1.1\nHost: 127.0.0.1\nContent-Type: application/json\n"
        f"Content-Length: {len(body)}\n\n"
    )
    slow = [open_socket(service, head) for _ in range(8)]
    for connection in slow:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(body.encode())
        assert b"200 OK" in connection.recv(64)
    for _ in range(5):
        assert complete(service).status_code == 200
    for connection in slow:
        connection.close()


def test_clients_that_never_finish_their_heads_keep_nobody_from_being_served(
    service: Service,
) -> None:
    heads = ["", "GET /health HTTP/1.1\n", "POST /v1/completions HTTP/1.1\nHost: 127.0.0.1\nX-A: b"]
    slow = [open_socket(service, heads[n % 3]) for n in range(300)]
    assert httpx.get(f"{service.url}/health", timeout=60).status_code == 200
    assert complete(service).status_code == 200
    for connection in slow:
        connection.close()
