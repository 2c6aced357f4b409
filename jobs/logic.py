"""What each operation does to a job, as pure functions; the backends only keep documents and make changes atomic.

Each returns the job as it is afterwards and the events to append, or raises what the JobStore protocol says.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import replace

from jobs.states import (
    LEASED_STATUSES,
    TERMINAL_STATUSES,
    InvalidTransitionError,
    JobStatus,
    check_transition,
)
from jobs.store import Event, EventLevel, Job, JsonObject, NewEvent, NewJob, StaleLeaseError

Change = tuple[Job, list[NewEvent]]
Operation = Callable[[Job, float], Change | None]
"""From a job and the time to what it becomes; None leaves it as it is."""
MAX_EVENTS = 10_000
"""Events kept of one job; the oldest go first."""
MAX_LEASE_SECONDS = 600.0
"""No lease is longer: one that ends later was given before the clock was set back or began anew, and has run out."""
WORKER_SECONDS = 3600.0
"""How long a worker that is no longer seen is remembered."""


def created(new: NewJob, now: float) -> Change:
    job = Job(
        id=new.id,
        type=new.type,
        owner=new.owner,
        spec=new.spec,
        request_hash=new.request_hash,
        priority=new.priority,
        max_attempts=new.max_attempts,
        deadline_seconds=new.deadline_seconds,
        status=JobStatus.QUEUED,
        status_reason=None,
        attempt=0,
        fencing=0,
        lease_owner=None,
        lease_until=None,
        progress_step=0,
        progress_total=0,
        result=None,
        error=None,
        created_at=now,
        started_at=None,
        finished_at=None,
        updated_at=now,
        memory=new.memory,
        request_id=new.origin.request_id,
        traceparent=new.origin.traceparent,
    )
    return job, [_status_event(job)]


def _status_event(job: Job) -> NewEvent:
    message = f"{job.status}" + (f": {job.status_reason}" if job.status_reason else "")
    data: JsonObject = {"status": job.status, "reason": job.status_reason, "attempt": job.attempt}
    level: EventLevel = "error" if job.status == JobStatus.FAILED else "info"
    return NewEvent(kind="status", level=level, message=message, data=data)


def _moved(job: Job, target: JobStatus, now: float, reason: str | None, **fields: object) -> Change:
    check_transition(job.id, job.status, target)
    changes: dict[str, object] = {"status": target, "status_reason": reason, "updated_at": now}
    if target not in LEASED_STATUSES:
        changes |= {"lease_owner": None, "lease_until": None}
        changes |= _attempt_ended(job, now)
    if target in TERMINAL_STATUSES:
        changes["finished_at"] = now
    moved = replace(job, **(changes | fields))  # type: ignore[arg-type]
    return moved, [_status_event(moved)]


def _attempt_ended(job: Job, ended_at: float) -> dict[str, object]:
    if job.status not in LEASED_STATUSES or job.attempt_started_at is None:
        return {}
    seconds = max(0.0, ended_at - job.attempt_started_at)
    return {"attempt_ended_at": ended_at, "device_seconds": job.device_seconds + seconds}


def claimed(worker: str, lease_until: float) -> Operation:
    """Args: lease_until: by the clock of the leases, which need not be the one that tells `now`."""

    def operation(job: Job, now: float) -> Change | None:
        if job.status != JobStatus.QUEUED:
            return None  # another worker was faster
        return _moved(
            job,
            JobStatus.RUNNING,
            now,
            None,
            attempt=job.attempt + 1,
            fencing=job.fencing + 1,
            lease_owner=worker,
            lease_until=lease_until,
            started_at=job.started_at or now,
            attempt_started_at=now,
        )

    return operation


def _check_lease(job: Job, fencing: int) -> None:
    if job.status not in LEASED_STATUSES or job.fencing != fencing:
        raise StaleLeaseError(
            f"job {job.id}: token {fencing} is stale (now {job.fencing}, {job.status})"
        )


def renewed(fencing: int, lease_until: float) -> Operation:
    def operation(job: Job, now: float) -> Change:
        _check_lease(job, fencing)
        return replace(job, lease_until=lease_until), []

    return operation


def reported(fencing: int, events: list[NewEvent], progress: tuple[int, int] | None) -> Operation:
    def operation(job: Job, now: float) -> Change:
        _check_lease(job, fencing)
        step, total = progress or (job.progress_step, job.progress_total)
        return replace(job, progress_step=step, progress_total=total, updated_at=now), events

    return operation


def finished(
    fencing: int,
    status: JobStatus,
    reason: str | None,
    result: JsonObject | None,
    error: JsonObject | None,
) -> Operation:
    def operation(job: Job, now: float) -> Change:
        _check_lease(job, fencing)
        if status in LEASED_STATUSES:
            raise InvalidTransitionError(job.id, job.status, status)
        if status == JobStatus.QUEUED and reason == "runner_crashed":
            job = _one_more_lost(job)
        return _moved(job, status, now, reason, result=result, error=error)

    return operation


def cancel_requested(job: Job, now: float) -> Change:
    if job.status == JobStatus.CANCELLING:
        return job, []
    waiting = job.status in (JobStatus.QUEUED, JobStatus.PAUSED)
    return _moved(job, JobStatus.CANCELLED if waiting else JobStatus.CANCELLING, now, "user")


def pause_requested(job: Job, now: float) -> Change:
    if job.status == JobStatus.PAUSING:
        return job, []
    waiting = job.status == JobStatus.QUEUED
    return _moved(job, JobStatus.PAUSED if waiting else JobStatus.PAUSING, now, "user")


def resume_requested(job: Job, now: float) -> Change:
    if job.status == JobStatus.PAUSED:
        return _moved(job, JobStatus.QUEUED, now, "user")
    raise InvalidTransitionError(job.id, job.status, JobStatus.QUEUED)


def has_run_out(lease_until: float, lease_now: float) -> bool:
    return not lease_now < lease_until <= lease_now + MAX_LEASE_SECONDS


def lease_expired(lease_now: float) -> Operation:
    """What becomes of a job whose lease ran out; None if it has not.

    Args:
        lease_now: the time by the clock of the leases.
    """

    def operation(job: Job, now: float) -> Change | None:
        if job.status not in LEASED_STATUSES or job.lease_until is None:
            return None
        if not has_run_out(job.lease_until, lease_now):
            return None
        overdue = lease_now - job.lease_until
        # Of a lease by a clock that has begun anew, only the last report is known.
        return _lost(job, now, ended_at=now - overdue if overdue >= 0 else job.updated_at)

    return operation


def num_lost(job: Job, step: int) -> int:
    """Attempts lost in a row, with one that came to `step`: getting further than all before begins a new count."""
    return 1 if step > job.lost_at_step else job.attempts_lost + 1


def _one_more_lost(job: Job) -> Job:
    step = job.progress_step
    furthest = max(step, job.lost_at_step)
    return replace(job, attempts_lost=num_lost(job, step), lost_at_step=furthest)


def _lost(job: Job, now: float, ended_at: float) -> Change:
    job = _one_more_lost(job)
    ended = _attempt_ended(job, ended_at)
    if job.status == JobStatus.CANCELLING:
        return _moved(job, JobStatus.CANCELLED, now, "user", **ended)
    if job.status == JobStatus.PAUSING:
        return _moved(job, JobStatus.PAUSED, now, "user", **ended)
    if job.attempts_lost >= job.max_attempts:
        message = f"{job.attempts_lost} attempts were lost; in the last, the worker vanished"
        error = {"code": "lease_lost", "message": message}
        return _moved(job, JobStatus.FAILED, now, "lease_lost", error=error, **ended)
    return _moved(job, JobStatus.QUEUED, now, "lease_lost", **ended)


def job_to_json(job: Job) -> JsonObject:
    return dataclasses.asdict(job)


def job_from_json(data: JsonObject) -> Job:
    return Job(**{**data, "status": JobStatus(data["status"])})


def event_to_json(event: NewEvent, seq: int, now: float) -> JsonObject:
    return {"seq": seq, "created_at": now, **dataclasses.asdict(event)}


def event_from_json(data: JsonObject) -> Event:
    return Event(**data)
