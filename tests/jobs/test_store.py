"""One behavioural suite over every JobStore: SQLite, and a real redis-server."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.open import open_job_store
from jobs.states import TERMINAL_STATUSES, TRANSITIONS, InvalidTransitionError, JobStatus
from jobs.store import (
    JobNotFoundError,
    JobStore,
    NewEvent,
    NewJob,
    RequestConflictError,
    StaleLeaseError,
)

NUM_JOBS = 1000
NUM_WORKERS = 8
DRAIN = """
import sys, time
from pathlib import Path
from jobs.open import open_job_store
from jobs.states import JobStatus
from jobs.store import StaleLeaseError
store = open_job_store(Path(sys.argv[1]), sys.argv[2] or None)
idle = 0
while idle < 20:
    job = store.claim(sys.argv[3], ("test",), 2.0)
    if job is None:
        idle += 1
        time.sleep(0.2)
        continue
    idle = 0
    try:
        store.heartbeat(job.id, job.fencing, 2.0)
        store.finish(job.id, job.fencing, JobStatus.SUCCEEDED, result={"fencing": job.fencing})
    except StaleLeaseError:
        pass
"""


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    binary = shutil.which("redis-server")
    if binary is None:
        pytest.skip("redis-server is not installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path_factory.mktemp("redis")
    process = subprocess.Popen(
        [binary, "--port", str(port), "--dir", str(folder), "--save", "", "--bind", "127.0.0.1"],
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
    yield f"redis://127.0.0.1:{port}/0"
    process.terminate()
    process.wait()


@pytest.fixture(params=["sqlite", pytest.param("redis", marks=pytest.mark.redis)])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str | None]:
    if request.param == "sqlite":
        return tmp_path / "jobs.db", None
    url: str = request.getfixturevalue("redis_url")
    import redis

    client = redis.Redis.from_url(url)
    client.flushall()
    client.close()
    return tmp_path / "unused.db", url


@pytest.fixture
def store(location: tuple[Path, str | None]) -> Iterator[JobStore]:
    opened = open_job_store(*location)
    yield opened
    opened.close()


def new_job(number: int = 0, **fields: object) -> NewJob:
    values = {"type": "test", "owner": "me", "spec": {"n": number}, "request_hash": f"h{number}"}
    return NewJob(id=f"job-{number}", **(values | fields))  # type: ignore[arg-type]


def test_create_is_idempotent_by_id(store: JobStore) -> None:
    first, created = store.create(new_job())
    again, created_again = store.create(new_job())
    assert (created, created_again) == (True, False)
    assert first == again
    with pytest.raises(RequestConflictError):
        store.create(new_job(request_hash="other"))


def test_a_job_lives_through_its_states(store: JobStore) -> None:
    store.create(new_job())
    job = store.claim("w", ("test",), 60)
    assert job is not None
    assert (job.status, job.attempt, job.fencing) == (JobStatus.RUNNING, 1, 1)
    assert store.claim("w", ("test",), 60) is None
    events = [NewEvent(kind="message", message="hello")]
    store.report(job.id, job.fencing, events, (3, 10))
    done = store.finish(job.id, job.fencing, JobStatus.SUCCEEDED, result={"x": 1})
    assert (done.progress_step, done.progress_total, done.result) == (3, 10, {"x": 1})
    assert done.finished_at is not None
    seen = store.events(job.id)
    assert [event.seq for event in seen] == [1, 2, 3, 4]
    assert [event.message for event in seen] == ["queued", "running", "hello", "succeeded"]
    assert [event.seq for event in store.events(job.id, after=2, limit=1)] == [3]


def test_a_stale_token_is_refused(store: JobStore) -> None:
    store.create(new_job())
    old = store.claim("a", ("test",), 0.0)
    assert old is not None
    new = store.claim("b", ("test",), 60)
    assert new is not None
    assert (new.fencing, new.attempt) == (2, 2)
    for write in (
        lambda: store.heartbeat(old.id, old.fencing, 60),
        lambda: store.report(old.id, old.fencing, []),
        lambda: store.finish(old.id, old.fencing, JobStatus.SUCCEEDED),
    ):
        with pytest.raises(StaleLeaseError):
            write()
    assert store.finish(new.id, new.fencing, JobStatus.SUCCEEDED).status == JobStatus.SUCCEEDED
    assert store.counts().lease_lost_total == 1


def test_the_last_lost_lease_fails_the_job(store: JobStore) -> None:
    store.create(new_job(max_attempts=1))
    assert store.claim("a", ("test",), 0.0) is not None
    store.reap()
    job = store.get("job-0")
    assert (job.status, job.status_reason) == (JobStatus.FAILED, "lease_lost")


def test_cancel_in_every_state(store: JobStore) -> None:
    store.create(new_job(1))
    assert store.request_cancel("job-1").status == JobStatus.CANCELLED
    store.create(new_job(2))
    running = store.claim("w", ("test",), 60)
    assert running is not None
    assert store.request_cancel("job-2").status == JobStatus.CANCELLING
    assert store.request_cancel("job-2").status == JobStatus.CANCELLING
    assert store.heartbeat("job-2", running.fencing, 60).status == JobStatus.CANCELLING
    assert store.finish("job-2", running.fencing, JobStatus.CANCELLED).status == "cancelled"
    with pytest.raises(InvalidTransitionError):
        store.request_cancel("job-2")
    with pytest.raises(JobNotFoundError):
        store.request_cancel("job-none")


def test_pause_and_resume(store: JobStore) -> None:
    store.create(new_job())
    assert store.request_pause("job-0").status == JobStatus.PAUSED
    assert store.claim("w", ("test",), 60) is None
    assert store.request_resume("job-0").status == JobStatus.QUEUED
    with pytest.raises(InvalidTransitionError):
        store.request_resume("job-0")


def test_pages_priorities_and_owners(store: JobStore) -> None:
    for number in range(5):
        store.create(new_job(number, owner="a" if number % 2 else "b", priority=-number))
    page = store.list_jobs(limit=2)
    assert [job.id for job in page] == ["job-4", "job-3"]
    assert [job.id for job in store.list_jobs(after="job-3", limit=9)] == [
        "job-2",
        "job-1",
        "job-0",
    ]
    assert [job.id for job in store.list_jobs(owner="a")] == ["job-3", "job-1"]
    claimed = store.claim("w", ("test",), 60)
    assert claimed is not None
    assert claimed.id == "job-4"
    assert store.counts().by_type_and_status["test", JobStatus.QUEUED] == 4


def test_terminal_states_are_final() -> None:
    assert all(not TRANSITIONS[status] for status in TERMINAL_STATUSES)


@pytest.mark.processes
def test_killed_workers_lose_no_job_and_double_none(
    store: JobStore, location: tuple[Path, str | None]
) -> None:
    """8 workers, 1000 jobs, workers killed -9 as they go: each job ends with exactly one accepted result."""
    for number in range(NUM_JOBS):
        store.create(new_job(number, max_attempts=50))

    def start(name: int) -> "subprocess.Popen[bytes]":
        arguments = [sys.executable, "-c", DRAIN, str(location[0]), location[1] or "", f"w{name}"]
        root = str(Path(__file__).parents[2])
        return subprocess.Popen(arguments, env={**os.environ, "PYTHONPATH": root})

    workers = [start(number) for number in range(NUM_WORKERS)]
    kills = 0
    deadline = time.monotonic() + 240
    try:
        while time.monotonic() < deadline:
            by_status = store.counts().by_type_and_status
            if by_status.get(("test", JobStatus.SUCCEEDED), 0) == NUM_JOBS:
                break
            if kills < 20:
                victim = workers[kills % NUM_WORKERS]
                victim.send_signal(signal.SIGKILL)
                victim.wait()
                workers[kills % NUM_WORKERS] = start(100 + kills)
                kills += 1
            time.sleep(0.25)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert store.counts().by_type_and_status == {("test", JobStatus.SUCCEEDED): NUM_JOBS}
    for number in range(0, NUM_JOBS, 37):
        job = store.get(f"job-{number}")
        finishes = [e for e in store.events(job.id) if e.data.get("status") == "succeeded"]
        assert len(finishes) == 1
        assert job.result == {"fencing": job.fencing}
