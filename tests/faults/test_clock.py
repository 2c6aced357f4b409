"""The wall clock is set by hours, forth and back: leases, readiness and jobs go by another one."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial

import httpx
import pytest

from tests.faults.conftest import (
    Faulty,
    check_batch,
    complete,
    job,
    submit_batch,
    tell,
    until_status,
)
from tests.processes.conftest import Service, eventually

pytestmark = pytest.mark.processes
HOURS = 5 * 3600.0
NUM_LINES = 300


@contextlib.contextmanager
def second_worker(service: Service) -> Iterator[None]:
    """One that has nothing to do but to look for leases that ran out."""
    settings = {f"LATHE_{name}": value for name, value in service.settings.items()}
    process = subprocess.Popen(
        [sys.executable, "-m", "service.cli", "worker", "--home", str(service.home)],
        env={**os.environ, **settings, **service.variables},
        stderr=subprocess.DEVNULL,
    )
    eventually(lambda: f'-{process.pid}"' in metrics(service), "the second worker")
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def metrics(service: Service) -> str:
    return httpx.get(f"{service.url}/metrics", timeout=30).text


def leases_lost(service: Service) -> str:
    lines = metrics(service).splitlines()
    return next(line for line in lines if line.startswith("lathe_job_lease_lost_total"))


def progress(service: Service, job_id: str) -> int:
    return int(job(service, job_id)["progress"]["step"])


def test_a_jump_costs_no_attempt_and_a_dead_worker_is_noticed_in_time(
    service: Service, faulty: Faulty, capsys: pytest.CaptureFixture[str]
) -> None:
    job_id = submit_batch(service, NUM_LINES, max_tokens=200)
    until_status(service, job_id, "running")
    lost = leases_lost(service)
    with second_worker(service):
        for jump in (HOURS, -HOURS):
            faulty.set_clock(jump)
            created = complete(service).json()["created"]
            assert abs(created - time.time() - jump) < 600, "the clock was not set"
            eventually(partial(has_gone_on, service, job_id, progress(service, job_id)), "progress")
            assert service.is_ready()
        assert leases_lost(service) == lost
        found = job(service, job_id)
        assert (found["status"], found["attempt"]) == ("running", 1)
        began = time.monotonic()
        service.children()["worker"].kill()
        eventually(lambda: job(service, job_id)["attempt"] == 2, "the next attempt")
        seconds = time.monotonic() - began
        faulty.set_clock(0)
        check_batch(service, job_id, NUM_LINES)
    tell(capsys, f"worker, kill -9 with the clock set back: taken up after {seconds:.1f} s")


def has_gone_on(service: Service, job_id: str, before: int) -> bool:
    return progress(service, job_id) > before
