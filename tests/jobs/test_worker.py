"""The worker with real child processes."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobs.sqlite import SqliteJobStore
from jobs.states import JobStatus
from jobs.store import Job, NewJob
from jobs.worker import Worker, WorkerConfig
from tests.jobs.conftest import REPOSITORY

pytestmark = pytest.mark.processes
NAMES = ("crash_once", "stubborn", "broken", "slow_to_stop")
RUNNERS = {name: f"tests.jobs.runners:{name}" for name in NAMES}
RUNNERS["finetune"] = RUNNERS["slow_to_stop"]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SqliteJobStore]:
    # A child imports nothing from the folder that it is started in, and the runners are among the tests.
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    opened = SqliteJobStore(tmp_path / "lathe.db")
    config = WorkerConfig(
        home=tmp_path, heartbeat_seconds=0.2, cancel_grace_seconds=0.5, runners=RUNNERS
    )
    stop = threading.Event()
    thread = threading.Thread(target=Worker(opened, config).run, args=(stop,))
    thread.start()
    yield opened
    stop.set()
    thread.join(20)
    opened.close()


def wait(store: SqliteJobStore, job_id: str, until: Callable[[Job], bool]) -> Job:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        job = store.get(job_id)
        if until(job):
            return job
        time.sleep(0.05)
    raise AssertionError(f"the job stayed {store.get(job_id)}")


def submit(store: SqliteJobStore, job_type: str) -> None:
    store.create(NewJob(id="job-1", type=job_type, owner="me", spec={}, request_hash="h"))


def test_a_killed_child_is_tried_again(store: SqliteJobStore) -> None:
    submit(store, "crash_once")
    job = wait(store, "job-1", lambda job: job.finished_at is not None)
    assert (job.status, job.attempt) == (JobStatus.SUCCEEDED, 2)
    assert job.result == {"attempt": 2, "owner": "me"}
    reasons = [e.data.get("reason") for e in store.events("job-1") if e.kind == "status"]
    assert "runner_crashed" in reasons


def test_cancel_ends_a_runner_that_does_not_listen(store: SqliteJobStore) -> None:
    submit(store, "stubborn")
    wait(store, "job-1", lambda _: any(e.message == "started" for e in store.events("job-1")))
    started = time.monotonic()
    store.request_cancel("job-1")
    job = wait(store, "job-1", lambda job: job.finished_at is not None)
    assert job.status == JobStatus.CANCELLED
    assert time.monotonic() - started < 10


def test_an_exception_fails_the_job_by_name(store: SqliteJobStore) -> None:
    submit(store, "broken")
    job = wait(store, "job-1", lambda job: job.finished_at is not None)
    assert job.status == JobStatus.FAILED
    assert job.error == {"code": "runner_crashed", "message": "ZeroDivisionError: on purpose"}


@pytest.mark.parametrize(("job_type", "has_time"), [("finetune", True), ("slow_to_stop", False)])
def test_a_paused_training_job_has_time_to_write_its_checkpoint(
    store: SqliteJobStore, job_type: str, has_time: bool
) -> None:
    submit(store, job_type)
    wait(store, "job-1", lambda job: any(e.message == "started" for e in store.events(job.id)))
    assert store.request_pause("job-1").status == JobStatus.PAUSING
    wait(store, "job-1", lambda job: job.status == JobStatus.PAUSED)
    store.request_resume("job-1")
    if has_time:
        job = wait(store, "job-1", lambda job: job.status == JobStatus.SUCCEEDED)
        assert job.result == {"attempt": 2}
        return
    wait(store, "job-1", lambda job: job.attempt == 2)  # it had to begin again
    wait(store, "job-1", lambda job: sum(e.message == "started" for e in store.events(job.id)) == 2)
    store.request_cancel("job-1")
    job = wait(store, "job-1", lambda job: job.status == JobStatus.CANCELLED)
    assert job.attempts_lost == 0
