"""One service for the faults that leave it well, and what the tests look at it with."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from compression.import_model import import_folder
from compression.registry import ModelRegistry
from tests.processes.conftest import TINY, Service, eventually
from tests.processes.conftest import native_folder as native_folder  # fixtures
from tests.processes.conftest import tiny_home as tiny_home
from tests.processes.conftest import tiny_service as tiny_service

CLOCK = Path(__file__).parent / "clock"
DISK_MIB = 64
QUICK = {
    "JOB_LEASE_SECONDS": "2",
    "JOB_HEARTBEAT_SECONDS": "0.5",
    "DRAIN_SECONDS": "2",
    "REQUEST_TIMEOUT_SECONDS": "60",
}
LONG = {"model": TINY, "prompt": "abc", "max_tokens": 8000, "ignore_eos": True, "stream": True}
"""Thousands of tokens: still under way whenever a test looks."""
SHORT = {"model": TINY, "prompt": "abc", "max_tokens": 4, "temperature": 0}


@pytest.fixture(scope="session")
def faults_home(
    tiny_llama: Path, native_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """With the tiny model, whose context is long enough for requests that last."""
    folder = tmp_path_factory.mktemp("long") / "model"
    shutil.copytree(tiny_llama, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8192}))
    home = tmp_path_factory.mktemp("faults")
    shutil.copytree(native_folder, home / "native")
    import_folder(ModelRegistry(home / "models"), TINY, folder, report=lambda _: None)
    return home


@contextlib.contextmanager
def small_disk(path: Path) -> Iterator[bool]:
    """Mount a file system of `DISK_MIB` where that is allowed; whether it was."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "lathe-test", str(path)]
    mounted = subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(path)], check=True)


@dataclass
class Faulty:
    """The shared service.

    Attributes:
        disk: the home's own small file system; None where none could be mounted.
    """

    service: Service
    clock: Path
    disk: Path | None

    def set_clock(self, seconds: float) -> None:
        new = self.clock.with_suffix(".new")
        new.write_text(str(seconds))
        new.rename(self.clock)


@pytest.fixture(scope="session")
def faulty(faults_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faulty]:
    folder = tmp_path_factory.mktemp("shared")
    clock = folder / "clock"
    clock.write_text("0")
    paths = [str(CLOCK), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {"PYTHONPATH": os.pathsep.join(paths), "LATHE_TEST_CLOCK": str(clock)}
    home = folder / "home"
    with small_disk(home) as mounted:
        shutil.copytree(faults_home, home, dirs_exist_ok=True)
        service = Service(home, (TINY,), QUICK, variables)
        service.start()
        try:
            yield Faulty(service, clock, home if mounted else None)
            assert service.stop() == 0, service.log
        finally:
            if service.process is not None and service.process.poll() is None:
                service.process.kill()
                service.process.wait()


@pytest.fixture
def service(faulty: Faulty) -> Service:
    """The shared one, which must be well before a test and afterwards."""
    eventually(faulty.service.is_ready, "/ready before the test")
    return faulty.service


@pytest.fixture
def own_home(faults_home: Path, tmp_path: Path) -> Path:
    home = tmp_path / "home"
    shutil.copytree(faults_home, home)
    return home


def complete(service: Service) -> httpx.Response:
    return httpx.post(f"{service.url}/v1/completions", json=SHORT, timeout=60)


def check_later(response: httpx.Response) -> str:
    """The code of an answer that says "later" as it should be said."""
    assert response.status_code == 503, response.text
    assert int(response.headers["retry-after"]) >= 1
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return str(error["code"])


def events(response: httpx.Response) -> list[str]:
    """The data of every event of a stream that ends by itself."""
    return [
        line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")
    ]


def last_error(found: list[str]) -> str:
    """The code of the error event that a stream ended with."""
    return str(json.loads(found[-1])["error"]["code"])


def recovery_seconds(service: Service, began: float) -> float:
    """From `began` (monotonic) until it is ready and answers; also checks that it lives all the while."""

    def is_well() -> bool:
        assert httpx.get(f"{service.url}/health", timeout=30).status_code == 200
        return service.is_ready() and complete(service).status_code == 200

    eventually(is_well, "recovery")
    return time.monotonic() - began


def tell(capsys: pytest.CaptureFixture[str], text: str) -> None:
    """Print past pytest's capture: a time that nothing asserts is for the reader."""
    with capsys.disabled():
        print(f"\n  {text}")


def running_requests(service: Service) -> int:
    """`vllm:num_requests_running` of the tiny model."""
    name = f'vllm:num_requests_running{{engine="0",model_name="{TINY}"}} '
    lines = httpx.get(f"{service.url}/metrics", timeout=30).text.splitlines()
    return int(float(next(line for line in lines if line.startswith(name)).rpartition(" ")[2]))


def submit_batch(service: Service, num_lines: int, max_tokens: int = 16) -> str:
    """Have a batch accepted; its id."""
    body = {"model": TINY, "prompt": "abc", "max_tokens": max_tokens, "ignore_eos": True}
    lines = [
        {"custom_id": str(n), "method": "POST", "url": "/v1/completions", "body": body}
        for n in range(num_lines)
    ]
    content = "".join(json.dumps(line) + "\n" for line in lines)
    upload = httpx.post(
        f"{service.url}/v1/files", data={"purpose": "batch"}, files={"file": ("a.jsonl", content)}
    )
    assert upload.status_code == 201, upload.text
    asked = {"input_file_id": upload.json()["id"], "endpoint": "/v1/completions"}
    made = httpx.post(f"{service.url}/v1/batches", json=asked | {"completion_window": "24h"})
    assert made.status_code == 201, made.text
    return str(made.json()["id"])


def job(service: Service, job_id: str) -> dict[str, Any]:
    response = httpx.get(f"{service.url}/v1/jobs/{job_id}", timeout=60)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def until_status(service: Service, job_id: str, *statuses: str) -> dict[str, Any]:
    def look() -> dict[str, Any] | None:
        with contextlib.suppress(httpx.TransportError):
            found = job(service, job_id)
            return found if found["status"] in statuses else None
        return None

    found: dict[str, Any] = eventually(look, f"{job_id} {statuses}")
    return found


def check_batch(service: Service, job_id: str, num_lines: int) -> dict[str, Any]:
    """Wait for its end: every line was answered, once."""
    found = until_status(service, job_id, "succeeded", "failed", "cancelled")
    assert found["status"] == "succeeded", (found, service.log)
    batch = httpx.get(f"{service.url}/v1/batches/{job_id}").json()
    content = httpx.get(f"{service.url}/v1/files/{batch['output_file_id']}/content").text
    numbers = [int(json.loads(line)["custom_id"]) for line in content.splitlines()]
    assert sorted(numbers) == list(range(num_lines))
    return found


def open_socket(service: Service, head: str) -> socket.socket:
    """A raw connection on which `head` was sent, line ends made CRLF."""
    connection = socket.create_connection(("127.0.0.1", service.port), timeout=60)
    connection.sendall(head.replace("\n", "\r\n").encode())
    return connection
