"""Stores under many processes and threads: workers killed and stalled as they go, and writers that wait their turn."""

import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from jobs.open import open_job_store
from jobs.sqlite import SqliteJobStore
from jobs.states import JobStatus
from jobs.store import JobStore, NewEvent
from tests.jobs.conftest import Location, child_environment, new_job, wait_until

NUM_JOBS = 1000
NUM_WORKERS = 8
NUM_KILLS = 16
LEASE_SECONDS = 1.0
# Holds each job for a moment, so that most kills meet a worker that has one. What the store accepted is logged
# only after the store said so.
WORKER = """
import os, random, sys, time
from pathlib import Path
from jobs.open import open_job_store
from jobs.states import JobStatus
from jobs.store import StaleLeaseError
database, url, name, log, lease = sys.argv[1:]
store = open_job_store(Path(database), url or None)
out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
while True:
    job = store.claim(name, ("test",), float(lease))
    if job is None:
        time.sleep(0.05)
        continue
    os.write(out, f"claimed {job.id} {job.fencing}\\n".encode())
    time.sleep(random.uniform(0.0, 0.03))
    try:
        store.finish(job.id, job.fencing, JobStatus.SUCCEEDED, result={"token": job.fencing})
        os.write(out, f"accepted {job.id} {job.fencing}\\n".encode())
    except StaleLeaseError:
        os.write(out, f"stale {job.id} {job.fencing}\\n".encode())
"""


class Crew:
    """Worker processes, some of which are killed or stalled."""

    def __init__(self, location: Location, folder: Path) -> None:
        self._location = location
        self._folder = folder
        self._count = 0
        self.workers = [self._start() for _ in range(NUM_WORKERS)]

    def _start(self) -> "subprocess.Popen[bytes]":
        self._count += 1
        database, url = self._location
        log = self._folder / f"log-{self._count}"
        arguments = [str(database), url or "", f"w{self._count}", str(log), str(LEASE_SECONDS)]
        return subprocess.Popen([sys.executable, "-c", WORKER, *arguments], env=child_environment())

    def kill(self, place: int) -> None:
        self.workers[place].kill()
        self.workers[place].wait()
        self.workers[place] = self._start()

    def stall(self, place: int) -> None:
        """Stop a worker for a while, between two transactions: one that is stopped inside of a SQLite transaction
        holds the file's lock, and everybody waits for it.
        """
        while True:
            self.workers[place].send_signal(signal.SIGSTOP)
            accepted = len(self.lines("accepted"))
            deadline = time.monotonic() + 5
            while time.monotonic() < deadline:
                if len(self.lines("accepted")) > accepted + NUM_WORKERS:
                    return
                time.sleep(0.02)
            self.workers[place].send_signal(signal.SIGCONT)
            time.sleep(random.uniform(0.0, 0.3))  # others get on, and it is met somewhere else

    def stop(self) -> None:
        for worker in self.workers:
            worker.kill()
            worker.wait()

    def lines(self, verb: str) -> list[tuple[str, int]]:
        """(job id, token) of every complete line of one verb."""
        found = []
        for log in self._folder.glob("log-*"):
            for line in log.read_text().splitlines():
                word, job_id, token = line.split()  # each was written whole
                if word == verb:
                    found.append((job_id, int(token)))
        return found


@pytest.mark.processes
def test_killed_and_stalled_workers_lose_no_job_and_double_none(
    store: JobStore, location: Location, tmp_path: Path
) -> None:
    """8 workers, 1000 jobs, workers killed -9 and one stalled past its lease: one accepted result for each job."""
    for number in range(NUM_JOBS):
        store.create(new_job(number, max_attempts=100))
    choose = random.Random(1)
    crew = Crew(location, tmp_path)

    def num_done() -> int:
        return store.counts().by_type_and_status.get(("test", JobStatus.SUCCEEDED), 0)

    try:
        wait_until(lambda: len({*tmp_path.glob("log-*")}) == NUM_WORKERS and num_done() > 0)
        crew.stall(0)
        stalled_at = time.monotonic()
        for kill in range(NUM_KILLS):
            target = min(NUM_JOBS - 1, (kill + 1) * NUM_JOBS // (NUM_KILLS + 1))
            wait_until(lambda target=target: num_done() >= target)  # type: ignore[misc]
            crew.kill(choose.randrange(1, NUM_WORKERS))
        wait_until(lambda: time.monotonic() - stalled_at > 2 * LEASE_SECONDS)
        crew.workers[0].send_signal(signal.SIGCONT)
        wait_until(lambda: num_done() == NUM_JOBS)
    finally:
        crew.stop()
    assert store.counts().by_type_and_status == {("test", JobStatus.SUCCEEDED): NUM_JOBS}
    accepted = Counter(job_id for job_id, _ in crew.lines("accepted"))
    assert max(accepted.values()) == 1
    assert NUM_JOBS - NUM_KILLS - NUM_WORKERS <= len(accepted) <= NUM_JOBS
    tokens = dict(crew.lines("accepted"))
    for number in range(NUM_JOBS):
        job = store.get(f"job-{number}")
        assert job.result == {"token": job.fencing}
        assert tokens.get(job.id, job.fencing) == job.fencing
        statuses = [event.data["status"] for event in store.events(job.id)]
        assert statuses == ["queued", "running"] * job.attempt + ["succeeded"]
        assert job.attempt == job.attempts_lost + 1
    assert store.counts().lease_lost_total >= NUM_KILLS // 4, "the kills met no worker with a job"


def test_a_claim_raced_for_is_won_once(store: JobStore, location: Location) -> None:
    for number in range(40):
        store.create(new_job(number))
    others = [open_job_store(*location) for _ in range(4)]
    won: list[str] = []

    def drain(own: JobStore) -> None:
        while (job := own.claim("w", ("test",), 60)) is not None:
            won.append(job.id)

    run_threads([lambda own=own: drain(own) for own in others])
    for other in others:
        other.close()
    assert sorted(won) == sorted(f"job-{number}" for number in range(40))


def test_a_lost_lease_is_counted_once_by_many_reapers(store: JobStore, location: Location) -> None:
    for number in range(50):
        store.create(new_job(number))
    claimed = [store.claim("w", ("test",), 60) for _ in range(50)]
    for job in claimed:
        assert job is not None
        store.heartbeat(job.id, job.fencing, 0.0)
    others = [open_job_store(*location) for _ in range(4)]
    lost: list[str] = []
    run_threads([lambda own=own: lost.extend(j.id for j in own.reap()) for own in others])
    for other in others:
        other.close()
    assert sorted(lost) == sorted(f"job-{number}" for number in range(50))
    assert store.counts().lease_lost_total == 50


def test_an_id_raced_for_is_created_once(store: JobStore, location: Location) -> None:
    others = [open_job_store(*location) for _ in range(6)]
    made: list[bool] = []
    run_threads([lambda own=own: made.append(own.create(new_job())[1]) for own in others])
    for other in others:
        other.close()
    assert sorted(made) == [False] * 5 + [True]
    assert len(store.list_jobs()) == 1
    assert [event.seq for event in store.events("job-0")] == [1]


def test_sixteen_writers_of_one_sqlite_file_wait_their_turn(tmp_path: Path) -> None:
    """No "database is locked", and no number is given twice."""
    database = tmp_path / "jobs.db"
    stores = [SqliteJobStore(database) for _ in range(16)]
    stores[0].create(new_job())
    job = stores[0].claim("w", ("test",), 600)
    assert job is not None
    event = NewEvent(kind="message", message="m")

    def write(own: SqliteJobStore, number: int) -> None:
        for step in range(25):
            own.report(job.id, job.fencing, [event], (step, 25))
            own.create(new_job(1000 + number * 100 + step))

    run_threads([lambda o=own, n=n: write(o, n) for n, own in enumerate(stores)])
    assert [e.seq for e in stores[0].events(job.id, limit=1000)] == list(range(1, 16 * 25 + 3))
    assert len(stores[0].list_jobs(limit=1000)) == 16 * 25 + 1
    for own in stores:
        own.close()


def run_threads(calls: list[object]) -> None:
    """Run all at once; raises what any of them raised."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(len(calls))

    def run(call: object) -> None:
        barrier.wait()
        try:
            call()  # type: ignore[operator]
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
