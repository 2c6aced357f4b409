"""One behavioural suite over every JobStore: SQLite, and a real redis-server."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from jobs import logic
from jobs.states import LEASED_STATUSES, TERMINAL_STATUSES, InvalidTransitionError, JobStatus
from jobs.store import (
    MAX_PRIORITY,
    Job,
    JobNotFoundError,
    JobStore,
    JsonObject,
    NewEvent,
    RequestConflictError,
    StaleLeaseError,
    TooManyJobsError,
)
from tests.jobs.conftest import new_job

TYPES = ("test",)


def claim(store: JobStore, lease_seconds: float = 60.0) -> Job:
    job = store.claim("w", TYPES, lease_seconds)
    assert job is not None
    return job


def bring_to(store: JobStore, status: JobStatus) -> Job:
    """A new job, taken to a status."""
    store.create(new_job())
    if status == JobStatus.QUEUED:
        return store.get("job-0")
    if status == JobStatus.PAUSED:
        return store.request_pause("job-0")
    job = claim(store)
    if status == JobStatus.PAUSING:
        return store.request_pause("job-0")
    if status in (JobStatus.CANCELLING, JobStatus.CANCELLED):
        job = store.request_cancel("job-0")
    if status in TERMINAL_STATUSES:
        job = store.finish("job-0", job.fencing, status)
    return job


def status_events(store: JobStore, job_id: str = "job-0") -> list[str]:
    return [e.data["status"] for e in store.events(job_id) if e.kind == "status"]


def test_an_owner_has_so_many_jobs_that_have_not_ended(store: JobStore) -> None:
    for number in range(3):
        store.create(new_job(number), max_active=3)
    with pytest.raises(TooManyJobsError):
        store.create(new_job(3), max_active=3)
    assert store.create(new_job(2), max_active=3)[1] is False  # it is there already
    store.create(new_job(4, owner="you"), max_active=3)
    store.create(new_job(5))  # no limit
    store.request_pause("job-1")
    job = claim(store)
    store.request_cancel("job-5")  # three are left: running, paused, queued
    with pytest.raises(TooManyJobsError):
        store.create(new_job(3), max_active=3)
    store.finish(job.id, job.fencing, JobStatus.SUCCEEDED)
    store.create(new_job(3), max_active=3)


def test_a_quota_holds_against_many_at_once(store: JobStore) -> None:
    def create(number: int) -> bool:
        try:
            return store.create(new_job(number), max_active=4)[1]
        except TooManyJobsError:
            return False

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(create, range(32))) == 4


def test_newest_events_go_backwards(store: JobStore) -> None:
    store.create(new_job(memory={"peak": 3}))
    assert store.get("job-0").memory == {"peak": 3}
    job = claim(store)
    store.report("job-0", job.fencing, [NewEvent(kind="message", message=f"{n}") for n in range(5)])
    everything = store.events("job-0")
    assert store.newest_events("job-0") == everything[::-1]
    page = store.newest_events("job-0", limit=3)
    assert [event.seq for event in page] == [7, 6, 5]
    rest = store.newest_events("job-0", before=page[-1].seq, limit=10)
    assert [event.seq for event in rest] == [4, 3, 2, 1]
    with pytest.raises(JobNotFoundError):
        store.newest_events("no")


def test_create_is_idempotent_by_id(store: JobStore) -> None:
    first, created = store.create(new_job(deadline_seconds=2.5, priority=-3))
    again, created_again = store.create(new_job(deadline_seconds=2.5, priority=-3))
    assert (created, created_again) == (True, False)
    assert first == again == store.get("job-0")
    assert (first.status, first.attempt, first.fencing) == (JobStatus.QUEUED, 0, 0)
    with pytest.raises(RequestConflictError):
        store.create(new_job(request_hash="other"))
    assert status_events(store) == ["queued"]


@pytest.mark.parametrize(
    "fields", [{"priority": MAX_PRIORITY + 1}, {"max_attempts": 0}, {"deadline_seconds": 0.0}]
)
def test_a_job_out_of_range_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        new_job(**fields)


def test_any_json_is_kept_as_it_is(store: JobStore) -> None:
    spec: JsonObject = {
        "empty": [],
        "none": None,
        "deep": {"a": [1, 2.5, "é\ud800 \x00"]},
        "big": 2**60,
    }
    store.create(new_job(spec=spec, owner="ключ"))
    job = claim(store)
    done = store.finish(job.id, job.fencing, JobStatus.SUCCEEDED, result=spec)
    assert (store.get("job-0").spec, done.result) == (spec, spec)
    assert [found.id for found in store.list_jobs(owner="ключ")] == ["job-0"]


def test_a_job_lives_through_its_states(store: JobStore) -> None:
    store.create(new_job())
    job = claim(store)
    assert (job.status, job.attempt, job.fencing, job.lease_owner) == ("running", 1, 1, "w")
    assert store.claim("w", TYPES, 60) is None
    events = [NewEvent(kind="message", message="hello", level="warn", data={"a": 1})]
    store.report(job.id, job.fencing, events, (3, 10))
    done = store.finish(job.id, job.fencing, JobStatus.SUCCEEDED, result={"x": 1})
    assert (done.progress_step, done.progress_total, done.result) == (3, 10, {"x": 1})
    assert done.started_at is not None
    assert done.finished_at is not None
    assert done.created_at <= done.started_at <= done.finished_at
    assert (done.attempt_started_at, done.attempt_ended_at) == (done.started_at, done.finished_at)
    assert done.device_seconds == done.finished_at - done.started_at
    assert (done.lease_owner, done.lease_until) == (None, None)
    seen = store.events(job.id)
    assert [event.seq for event in seen] == [1, 2, 3, 4]
    assert [event.message for event in seen] == ["queued", "running", "hello", "succeeded"]
    assert (seen[2].level, seen[2].data) == ("warn", {"a": 1})
    assert [event.seq for event in store.events(job.id, after=2, limit=1)] == [3]
    assert store.events(job.id, after=4) == []


def test_unknown_ids_are_not_found(store: JobStore) -> None:
    calls: list[Callable[[], object]] = [
        lambda: store.get("no"),
        lambda: store.events("no"),
        lambda: store.request_cancel("no"),
        lambda: store.request_pause("no"),
        lambda: store.request_resume("no"),
        lambda: store.heartbeat("no", 1, 60),
        lambda: store.list_jobs(after="no"),
    ]
    for call in calls:
        with pytest.raises(JobNotFoundError):
            call()


def test_a_stale_token_is_refused(store: JobStore) -> None:
    store.create(new_job())
    old = claim(store, 0.0)
    new = claim(store)
    assert (new.fencing, new.attempt) == (2, 2)
    writes: list[Callable[[], object]] = [
        lambda: store.heartbeat(old.id, old.fencing, 60),
        lambda: store.report(old.id, old.fencing, [NewEvent(kind="message", message="x")]),
        lambda: store.finish(old.id, old.fencing, JobStatus.SUCCEEDED, result={"by": "old"}),
    ]
    for write in writes:
        with pytest.raises(StaleLeaseError):
            write()
    done = store.finish(new.id, new.fencing, JobStatus.SUCCEEDED, result={"by": "new"})
    assert done.result == {"by": "new"}
    with pytest.raises(StaleLeaseError):
        store.finish(new.id, new.fencing, JobStatus.SUCCEEDED)
    assert store.counts().lease_lost_total == 1
    assert status_events(store) == ["queued", "running", "queued", "running", "succeeded"]


def test_an_expired_lease_is_lost_once_and_the_last_one_fails_the_job(store: JobStore) -> None:
    store.create(new_job(max_attempts=3))
    for attempt in (1, 2, 3):
        assert claim(store, 0.0).attempt == attempt
        lost = store.reap()
        assert [(job.id, job.attempts_lost) for job in lost] == [("job-0", attempt)]
        assert store.reap() == []
    job = store.get("job-0")
    assert (job.status, job.status_reason) == (JobStatus.FAILED, "lease_lost")
    assert job.error is not None
    assert job.error["code"] == "lease_lost"
    assert store.counts().lease_lost_total == 3


def test_an_attempt_that_gets_further_begins_a_new_count(store: JobStore) -> None:
    store.create(new_job(max_attempts=2))
    for step in (3, 8):
        job = claim(store, 0.0)
        store.report(job.id, job.fencing, [], progress=(step, 9))
        (lost,) = store.reap()
        assert (lost.status, lost.attempts_lost, lost.lost_at_step) == (JobStatus.QUEUED, 1, step)
    job = claim(store, 60.0)
    store.report(job.id, job.fencing, [], progress=(7, 9))
    again = store.finish(job.id, job.fencing, JobStatus.QUEUED, reason="runner_crashed")
    assert (again.attempts_lost, again.lost_at_step) == (2, 8)
    claim(store, 0.0)
    assert [lost.status for lost in store.reap()] == [JobStatus.FAILED]


def test_a_heartbeat_keeps_the_lease(store: JobStore) -> None:
    store.create(new_job())
    job = claim(store, 0.0)
    renewed = store.heartbeat(job.id, job.fencing, 60)
    assert renewed.lease_until is not None
    assert job.lease_until is not None
    assert renewed.lease_until - job.lease_until > 59
    assert store.reap() == []


def test_giving_back_and_pausing_use_up_no_attempt(store: JobStore) -> None:
    store.create(new_job(max_attempts=2))
    for _ in range(3):
        job = claim(store)
        store.finish(job.id, job.fencing, JobStatus.QUEUED, reason="worker_shutdown")
        job = claim(store)
        store.request_pause(job.id)
        store.finish(job.id, job.fencing, JobStatus.PAUSED, reason="user")
        store.request_resume(job.id)
    assert claim(store, 0.0).attempt == 7
    store.reap()
    assert store.get("job-0").status == JobStatus.QUEUED
    claim(store, 0.0)
    store.reap()
    assert store.get("job-0").status == JobStatus.FAILED


def test_a_crash_uses_up_an_attempt_but_is_no_lost_lease(store: JobStore) -> None:
    store.create(new_job(max_attempts=2))
    job = claim(store, 0.0)
    store.finish(job.id, job.fencing, JobStatus.QUEUED, reason="runner_crashed")
    assert store.get(job.id).attempts_lost == 1
    assert store.counts().lease_lost_total == 0
    claim(store, 0.0)
    assert [lost.status for lost in store.reap()] == [JobStatus.FAILED]
    assert store.counts().lease_lost_total == 1


@pytest.mark.parametrize("status", list(JobStatus))
def test_cancel_in_every_state(store: JobStore, status: JobStatus) -> None:
    job = bring_to(store, status)
    if status in TERMINAL_STATUSES:
        with pytest.raises(InvalidTransitionError, match=f"is {status}"):
            store.request_cancel(job.id)
        assert store.get(job.id) == job
        return
    waiting = status in (JobStatus.QUEUED, JobStatus.PAUSED)
    after = store.request_cancel(job.id)
    assert after.status == (JobStatus.CANCELLED if waiting else JobStatus.CANCELLING)
    assert after.status_reason == "user"
    if waiting:
        assert after.finished_at is not None
        assert store.claim("w", TYPES, 60) is None
    else:
        assert store.request_cancel(job.id) == after
        assert store.heartbeat(job.id, job.fencing, 60).status == JobStatus.CANCELLING
        done = store.finish(job.id, job.fencing, JobStatus.CANCELLED, reason="user")
        assert done.status == JobStatus.CANCELLED
    assert status_events(store)[-1] == "cancelled"


@pytest.mark.parametrize("status", list(JobStatus))
def test_pause_and_resume_in_every_state(store: JobStore, status: JobStatus) -> None:
    job = bring_to(store, status)
    expected = {"queued": "paused", "running": "pausing", "pausing": "pausing"}.get(status)
    if status != JobStatus.PAUSED:
        with pytest.raises(InvalidTransitionError):
            store.request_resume(job.id)
    else:
        assert store.request_resume(job.id).status == JobStatus.QUEUED
        assert claim(store).id == job.id
        return
    if expected is None:
        with pytest.raises(InvalidTransitionError):
            store.request_pause(job.id)
    else:
        assert store.request_pause(job.id).status == expected


@pytest.mark.parametrize(
    ("asked", "becomes"), [("cancel", JobStatus.CANCELLED), ("pause", JobStatus.PAUSED)]
)
def test_what_was_asked_is_done_when_the_worker_vanishes(
    store: JobStore, asked: str, becomes: JobStatus
) -> None:
    store.create(new_job())
    claim(store, 0.0)
    (store.request_cancel if asked == "cancel" else store.request_pause)("job-0")
    assert [job.status for job in store.reap()] == [becomes]
    assert store.claim("w", TYPES, 60) is None


@pytest.mark.parametrize("target", sorted(LEASED_STATUSES))
def test_finish_ends_the_lease(store: JobStore, target: JobStatus) -> None:
    store.create(new_job())
    job = claim(store)
    with pytest.raises(InvalidTransitionError):
        store.finish(job.id, job.fencing, target)
    assert store.get(job.id) == job


def test_only_known_types_are_claimed(store: JobStore) -> None:
    store.create(new_job(0, type="other"))
    store.create(new_job(1, type="test"))
    assert claim(store).id == "job-1"
    assert store.claim("w", TYPES, 60) is None
    assert store.claim("w", (), 60) is None
    both = store.claim("w", ("test", "other"), 60)
    assert both is not None
    assert both.id == "job-0"


def test_the_most_urgent_is_claimed_first_then_the_oldest(store: JobStore) -> None:
    for number, priority in enumerate((0, MAX_PRIORITY, -MAX_PRIORITY, 0, -1)):
        store.create(new_job(number, priority=priority))
    order = [claim(store).id for _ in range(5)]
    assert order == ["job-2", "job-4", "job-0", "job-3", "job-1"]


def test_a_job_given_back_keeps_its_place(store: JobStore) -> None:
    store.create(new_job(0))
    store.create(new_job(1))
    job = claim(store)
    store.finish(job.id, job.fencing, JobStatus.QUEUED, reason="worker_shutdown")
    assert claim(store).id == "job-0"


def test_pages(store: JobStore) -> None:
    for number in range(450):
        owner = "a" if number % 90 == 0 else "b"
        store.create(new_job(number, owner=owner, type="even" if number % 2 == 0 else "odd"))
    store.request_cancel("job-0")
    seen: list[str] = []
    after: str | None = None
    while page := store.list_jobs(after=after, limit=64):
        seen += [job.id for job in page]
        after = page[-1].id
    assert seen == [f"job-{number}" for number in reversed(range(450))]
    assert [j.id for j in store.list_jobs(owner="a", limit=2)] == ["job-360", "job-270"]
    assert [j.id for j in store.list_jobs(owner="a", after="job-90")] == ["job-0"]
    assert [j.id for j in store.list_jobs(owner="a", status=JobStatus.CANCELLED)] == ["job-0"]
    assert [j.id for j in store.list_jobs(type="odd", after="job-4")] == ["job-3", "job-1"]
    assert store.list_jobs(owner="nobody") == []
    with pytest.raises(JobNotFoundError):
        store.list_jobs(owner="a", after="job-1")


def test_old_events_make_room_and_numbers_go_on(
    store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logic, "MAX_EVENTS", 10)
    store.create(new_job())
    job = claim(store)
    for batch in range(5):
        events = [NewEvent(kind="message", message=f"{batch}.{i}") for i in range(4)]
        store.report(job.id, job.fencing, events)
    seen = store.events(job.id)
    assert [event.seq for event in seen] == list(range(13, 23))
    assert seen[-1].message == "4.3"
    assert [event.seq for event in store.events(job.id, after=20)] == [21, 22]


def test_counts(store: JobStore) -> None:
    empty = store.counts()
    assert (empty.by_type_and_status, empty.oldest_queued_seconds) == ({}, 0.0)
    store.create(new_job(0, type="a|b"))
    store.create(new_job(1, priority=-5))
    store.create(new_job(2, priority=-9))
    claim(store)
    counts = store.counts()
    assert counts.by_type_and_status == {
        ("a|b", JobStatus.QUEUED): 1,
        ("test", JobStatus.QUEUED): 1,
        ("test", JobStatus.RUNNING): 1,
    }
    assert 0 < counts.oldest_queued_seconds < 60
    assert counts.lease_lost_total == 0


def test_workers_are_seen(store: JobStore) -> None:
    assert store.worker_ages() == {}
    store.worker_seen("one")
    store.worker_seen("two")
    ages = store.worker_ages()
    assert set(ages) == {"one", "two"}
    assert all(0 <= age < 30 for age in ages.values())


def test_workers_long_gone_are_forgotten(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.worker_seen("one")
    monkeypatch.setattr(logic, "WORKER_SECONDS", -60.0)  # an hour ago, seen from now
    store.worker_seen("two")
    assert store.worker_ages() == {}
    monkeypatch.undo()
    assert store.worker_ages() == {}
