"""What only the SQLite store does: its schema version, its connections, a file that it cannot write."""

import os
import sqlite3
import threading
from pathlib import Path

import pytest

from jobs.sqlite import SqliteJobStore
from jobs.states import JobStatus
from tests.jobs.conftest import new_job


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_time_is_the_clock_s(tmp_path: Path) -> None:
    clock = Clock()
    store = SqliteJobStore(tmp_path / "jobs.db", clock=clock, uptime=lambda: clock.now - 300)
    store.create(new_job())
    clock.now += 7
    assert store.counts().oldest_queued_seconds == 7
    job = store.claim("w", ("test",), 60)
    assert job is not None
    assert (job.created_at, job.started_at, job.lease_until) == (1000, 1007, 767)
    clock.now += 59.9
    assert store.reap() == []
    clock.now += 0.1
    (lost,) = store.reap()
    assert (lost.status, lost.attempt_ended_at, lost.device_seconds) == (JobStatus.QUEUED, 1067, 60)
    store.worker_seen("w")
    clock.now += 3601
    assert store.worker_ages() == {}
    store.close()


@pytest.mark.parametrize("jump", [-5 * 3600.0, 5 * 3600.0])
def test_leases_do_not_heed_the_clock(tmp_path: Path, jump: float) -> None:
    clock, uptime = Clock(), Clock()
    path = tmp_path / "jobs.db"
    store = SqliteJobStore(path, clock=clock, uptime=uptime)
    store.create(new_job())
    assert store.claim("w", ("test",), 60) is not None
    clock.now += jump
    other = SqliteJobStore(path, clock=clock, uptime=uptime)  # opened after the jump
    assert store.reap() == other.reap() == []
    uptime.now += 60
    assert [lost.status for lost in other.reap()] == [JobStatus.QUEUED]
    store.close()
    other.close()


def test_a_lease_does_not_outlive_the_machine_s_restart(tmp_path: Path) -> None:
    clock, uptime = Clock(), Clock()
    path = tmp_path / "jobs.db"
    store = SqliteJobStore(path, clock=clock, uptime=uptime)
    store.create(new_job())
    assert store.claim("w", ("test",), 60) is not None
    store.close()
    uptime.now = 3.0
    store = SqliteJobStore(path, clock=clock, uptime=uptime)
    assert [lost.status for lost in store.reap()] == [JobStatus.QUEUED]
    assert store.claim("w", ("test",), 60) is not None
    uptime.now += 59
    assert store.reap() == []
    store.close()


def test_opening_waits_for_nobody_who_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.sqlite.BUSY_SECONDS", 0.1)
    path = tmp_path / "jobs.db"
    SqliteJobStore(path).close()
    writer = sqlite3.connect(path, isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    store = SqliteJobStore(path)
    assert store.list_jobs() == []
    store.close()
    writer.close()


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "jobs.db"
    SqliteJobStore(path).close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 2")
    db.close()
    with pytest.raises(RuntimeError, match=r"jobs\.db has schema 2, this version reads 1"):
        SqliteJobStore(path)


def test_threads_that_come_and_go_leave_no_file_open(tmp_path: Path) -> None:
    store = SqliteJobStore(tmp_path / "jobs.db")
    store.create(new_job())
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        thread = threading.Thread(target=store.get, args=("job-0",))
        thread.start()
        thread.join()
    assert len(os.listdir("/proc/self/fd")) <= before  # other tests' files may close meanwhile
    store.close()


def test_a_write_that_failed_is_undone_and_the_store_goes_on(tmp_path: Path) -> None:
    store = SqliteJobStore(tmp_path / "jobs.db")
    with pytest.raises(TypeError):
        store.create(new_job(spec={"not": {"json"}}))
    assert store.list_jobs() == []
    assert store.create(new_job())[1]
    store.close()


def test_what_was_written_outlives_the_process(tmp_path: Path) -> None:
    store = SqliteJobStore(tmp_path / "jobs.db")
    store.create(new_job())
    store.close()
    again = SqliteJobStore(tmp_path / "jobs.db")
    assert again.get("job-0").spec == {"n": 0}
    again.close()
