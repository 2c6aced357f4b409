"""The wall clock is set by hours, forth and back: leases, readiness and jobs go by another one."""

import time

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


def test_a_jump_costs_no_attempt_and_a_dead_worker_is_noticed_in_time(
    service: Service, faulty: Faulty, capsys: pytest.CaptureFixture[str]
) -> None:
    job_id = submit_batch(service, NUM_LINES, max_tokens=300)
    until_status(service, job_id, "running")
    for jump in (HOURS, -HOURS):
        faulty.set_clock(jump)
        created = complete(service).json()["created"]
        assert abs(created - time.time() - jump) < 600, "the clock was not set"
        # Longer than a lease, so that somebody would have taken the job.
        again = submit_batch(service, 1)
        seen = httpx.get(f"{service.url}/metrics").text
        assert service.is_ready()
        eventually(lambda: progress(service, job_id) > 0, "progress")
        assert "lathe_job_lease_lost_total 0.0" in seen
        assert again
    found = job(service, job_id)
    assert (found["status"], found["attempt"]) == ("running", 1)
    began = time.monotonic()
    service.children()["worker"].kill()
    eventually(lambda: job(service, job_id)["attempt"] == 2, "the next attempt")
    tell(
        capsys,
        f"worker, kill -9 with a clock set back: taken up after {time.monotonic() - began:.1f} s",
    )
    faulty.set_clock(0)
    check_batch(service, job_id, NUM_LINES)


def progress(service: Service, job_id: str) -> int:
    return int(job(service, job_id)["progress"]["step"])
