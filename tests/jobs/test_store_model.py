"""Random walks through a job's life, compared step by step with a model in plain Python."""

import itertools
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from jobs.sqlite import SqliteJobStore
from jobs.states import TERMINAL_STATUSES, TRANSITIONS, InvalidTransitionError, JobStatus
from jobs.store import JobStore, NewEvent, StaleLeaseError
from tests.jobs.conftest import Location, new_job

NUM_JOBS = 3
MAX_ATTEMPTS = 2
S = JobStatus
HELD = ("running", "pausing", "cancelling")
ENDS: dict[str, set[str]] = {
    "running": {"succeeded", "failed", "queued"},
    "pausing": {"succeeded", "failed", "queued", "paused"},
    "cancelling": {"succeeded", "failed", "cancelled"},
}
"""From a status in which a worker holds the job, how the worker may end."""


@dataclass
class ModelJob:
    status: str = "queued"
    tokens: int = 0
    losses: int = 0
    expired: bool = False
    num_events: int = 1

    def become(self, status: str) -> None:
        self.status = status
        self.num_events += 1


class StoreMachine(RuleBasedStateMachine):
    """Every answer of the store, and every refusal, is what the model says."""

    def __init__(self, open_store: Callable[[], JobStore]) -> None:
        super().__init__()
        self.store = open_store()
        self.model = [ModelJob() for _ in range(NUM_JOBS)]

    @initialize()
    def create(self) -> None:
        for number in range(NUM_JOBS):
            self.store.create(new_job(number, max_attempts=MAX_ATTEMPTS))

    def teardown(self) -> None:
        self.store.close()

    def _reap_model(self) -> list[int]:
        lost = [n for n, job in enumerate(self.model) if job.status in HELD and job.expired]
        for job in (self.model[n] for n in lost):
            job.losses += 1
            after = {"cancelling": "cancelled", "pausing": "paused"}.get(job.status)
            job.become(after or ("failed" if job.losses >= MAX_ATTEMPTS else "queued"))
        return lost

    @rule(expired=st.booleans())
    def claim(self, expired: bool) -> None:
        self._reap_model()
        queued = [n for n, job in enumerate(self.model) if job.status == "queued"]
        claimed = self.store.claim("w", ("test",), 0.0 if expired else 600.0)
        if not queued:
            assert claimed is None
            return
        job = self.model[queued[0]]
        job.become("running")
        job.tokens += 1
        job.expired = expired
        assert claimed is not None
        assert (claimed.id, claimed.fencing) == (f"job-{queued[0]}", job.tokens)

    @rule()
    def reap(self) -> None:
        lost = {f"job-{n}" for n in self._reap_model()}
        assert {job.id for job in self.store.reap()} == lost

    @rule(number=st.integers(0, NUM_JOBS - 1), behind=st.integers(0, 1), expired=st.booleans())
    def heartbeat(self, number: int, behind: int, expired: bool) -> None:
        job = self.model[number]
        lease = 0.0 if expired else 600.0
        token = job.tokens - behind
        if job.status not in HELD or behind:
            with pytest.raises(StaleLeaseError):
                self.store.heartbeat(f"job-{number}", token, lease)
            return
        assert self.store.heartbeat(f"job-{number}", token, lease).status == job.status
        job.expired = expired

    @rule(number=st.integers(0, NUM_JOBS - 1), behind=st.integers(0, 1), count=st.integers(0, 3))
    def report(self, number: int, behind: int, count: int) -> None:
        job = self.model[number]
        events = [NewEvent(kind="message", message="m")] * count
        if job.status not in HELD or behind:
            with pytest.raises(StaleLeaseError):
                self.store.report(f"job-{number}", job.tokens - behind, events, (1, 2))
            return
        self.store.report(f"job-{number}", job.tokens, events, (1, 2))
        job.num_events += count

    @rule(
        number=st.integers(0, NUM_JOBS - 1),
        behind=st.integers(0, 1),
        status=st.sampled_from(list(JobStatus)),
    )
    def finish(self, number: int, behind: int, status: JobStatus) -> None:
        job = self.model[number]
        token = job.tokens - behind
        if job.status not in HELD or behind:
            with pytest.raises(StaleLeaseError):
                self.store.finish(f"job-{number}", token, status)
        elif str(status) not in ENDS[job.status]:
            with pytest.raises(InvalidTransitionError):
                self.store.finish(f"job-{number}", token, status)
        else:
            self.store.finish(f"job-{number}", token, status)
            job.become(status)

    @rule(number=st.integers(0, NUM_JOBS - 1), verb=st.sampled_from(["cancel", "pause", "resume"]))
    def ask(self, number: int, verb: str) -> None:
        job = self.model[number]
        table = {
            "cancel": {
                **dict.fromkeys(("queued", "paused"), "cancelled"),
                **dict.fromkeys(HELD, "cancelling"),
            },
            "pause": {"queued": "paused", "running": "pausing", "pausing": "pausing"},
            "resume": {"paused": "queued"},
        }
        call = getattr(self.store, f"request_{verb}")
        target = table[verb].get(job.status)
        if target is None:
            with pytest.raises(InvalidTransitionError):
                call(f"job-{number}")
            return
        assert call(f"job-{number}").status == target
        if target != job.status:
            job.become(target)

    @invariant()
    def same(self) -> None:
        for number, job in enumerate(self.model):
            stored = self.store.get(f"job-{number}")
            assert (stored.status, stored.fencing) == (job.status, job.tokens)
            assert (stored.attempt, stored.attempts_lost) == (job.tokens, job.losses)
            assert (stored.lease_until is not None) == (job.status in HELD)
            assert (stored.finished_at is not None) == (stored.status in TERMINAL_STATUSES)
            seqs = [event.seq for event in self.store.events(stored.id, limit=1000)]
            assert seqs == list(range(1, job.num_events + 1))
        counts = self.store.counts()
        assert sum(counts.by_type_and_status.values()) == NUM_JOBS
        assert counts.lease_lost_total == sum(job.losses for job in self.model)


def test_random_walks_agree_with_the_model(location: Location, tmp_path: Path) -> None:
    def open_store() -> JobStore:
        name = uuid.uuid4().hex
        if location[1] is None:
            return SqliteJobStore(tmp_path / f"{name}.db")
        from jobs.redis import RedisJobStore

        return RedisJobStore(location[1], prefix=name)

    class Machine(StoreMachine):
        def __init__(self) -> None:
            super().__init__(open_store)

    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=25,
            stateful_step_count=30,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_every_transition_of_the_table_is_one_that_an_operation_makes() -> None:
    """So that the table has no row that nothing can take, and no operation a row of its own."""
    asked = {(S.QUEUED, S.CANCELLED), (S.QUEUED, S.PAUSED), (S.PAUSED, S.CANCELLED)}
    asked |= {(S.RUNNING, S.CANCELLING), (S.PAUSING, S.CANCELLING), (S.RUNNING, S.PAUSING)}
    asked |= {(S.PAUSED, S.QUEUED), (S.QUEUED, S.RUNNING)}
    ended = {(S(a), S(b)) for a in ENDS for b in ENDS[a]}
    table = {(a, b) for a, b in itertools.product(S, S) if b in TRANSITIONS[a]}
    assert table == asked | ended
    assert all(not TRANSITIONS[status] for status in TERMINAL_STATUSES)
