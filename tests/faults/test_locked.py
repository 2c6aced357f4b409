"""Sixteen processes write into the service's SQLite file all the while."""

import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator

import httpx
import pytest

from tests.faults.conftest import check_batch, complete, submit_batch, tell
from tests.jobs.conftest import child_environment
from tests.processes.conftest import TINY, Service

pytestmark = pytest.mark.processes
NUM_JOBS = 4
WRITER = """
import sqlite3, sys, time
db = sqlite3.connect(sys.argv[1], timeout=60, isolation_level=None)
print("begun", flush=True)
while True:
    db.execute("BEGIN IMMEDIATE")
    db.execute("INSERT INTO counters VALUES ('test', 1) ON CONFLICT (name) DO UPDATE SET value = value + 1")
    time.sleep(0.002)
    db.execute("COMMIT")
    time.sleep(0.03)
"""


@pytest.fixture
def writers(service: Service) -> Iterator[None]:
    database = service.home / "lathe.db"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(database)],
            stdout=subprocess.PIPE,
            env=child_environment(),
        )
        for _ in range(16)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == b"begun\n"
    yield
    for process in processes:
        process.kill()
        process.communicate()


def test_what_is_accepted_beside_sixteen_writers_is_kept(
    service: Service, writers: None, capsys: pytest.CaptureFixture[str]
) -> None:
    accepted: list[str] = []
    refused: Counter[str] = Counter()
    began = time.monotonic()
    body = {"type": "export", "model": TINY, "format": "dense"}
    for _ in range(NUM_JOBS):
        response = httpx.post(f"{service.url}/v1/jobs", json=body, timeout=120)
        if response.status_code == 201:
            accepted.append(response.json()["id"])
        else:
            assert response.status_code == 503, response.text
            refused[response.json()["error"]["code"]] += 1
        assert httpx.get(f"{service.url}/health", timeout=60).status_code == 200
        assert complete(service).status_code == 200
    assert set(refused) <= {"store_unavailable"}
    seconds = time.monotonic() - began
    tell(capsys, f"16 writers: {len(accepted)} of {NUM_JOBS} jobs accepted in {seconds:.1f} s")
    for job_id in accepted:
        assert httpx.get(f"{service.url}/v1/jobs/{job_id}", timeout=60).status_code == 200


def test_and_ended_once_they_leave(service: Service) -> None:
    job_id = submit_batch(service, 3)
    check_batch(service, job_id, 3)
    jobs = httpx.get(f"{service.url}/v1/jobs?limit=100").json()["data"]
    assert not [job for job in jobs if job["type"] == "export" and job["status"] == "failed"]
