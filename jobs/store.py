"""The JobStore protocol: what keeps jobs, whichever database is behind it.

A worker holds a job by a lease that it must renew, and every write of a worker carries the fencing token it got
with the lease; a token that is no longer the newest is refused, so a worker that stalled and came back cannot
overwrite its successor (Kleppmann 2016, "How to do distributed locking"). The clock is the store's own.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from engines.origin import Origin, current_origin
from jobs.states import JobStatus

JsonObject = dict[str, Any]
MAX_PRIORITY = 1000
EventLevel = Literal["info", "warn", "error"]
EventKind = Literal["status", "message", "progress", "metrics"]


class JobNotFoundError(Exception):
    """No job has this id, or none that the asker may see."""


class StaleLeaseError(Exception):
    """The fencing token is not the job's newest: another worker has the job, or it has ended."""


class RequestConflictError(Exception):
    """A job with this id was created from another request body."""


class TooManyJobsError(Exception):
    """The owner has as many jobs that have not ended as it may have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewJob:
    """A job to create.

    Attributes:
        id: chosen by the caller; derived from the idempotency key where one was given.
        owner: id of the API key that asked.
        request_hash: sha256 of the canonical request body; guards the id against another body.
        priority: -1000 to 1000; lower runs first.
        max_attempts: how many attempts in a row may be lost before the job fails; progress begins a new count.
        deadline_seconds: most seconds of running per attempt; None is no limit.
        memory: peak bytes by part, as predicted; None where nothing was.
        origin: the request that asks for it; its ids go along with the job.
    """

    id: str
    type: str
    owner: str
    spec: JsonObject
    request_hash: str
    priority: int = 0
    max_attempts: int = 3
    deadline_seconds: float | None = None
    memory: JsonObject | None = None
    origin: Origin = field(default_factory=current_origin)

    def __post_init__(self) -> None:
        if not -MAX_PRIORITY <= self.priority <= MAX_PRIORITY:
            raise ValueError(f"priority must be within ±{MAX_PRIORITY}, got {self.priority}")
        if self.max_attempts < 1:
            raise ValueError(f"max_attempts must be at least 1, got {self.max_attempts}")
        if self.deadline_seconds is not None and not self.deadline_seconds > 0:
            raise ValueError(f"deadline_seconds must be above 0, got {self.deadline_seconds}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A job as stored. Times are Unix seconds of the store's clock.

    Attributes:
        attempt: 0 until first claimed, then 1, 2, ...
        fencing: grows with every claim; 0 until first claimed.
        attempts_lost: attempts in a row whose worker vanished or whose process was killed, without getting further
            than those before; one that was given back or paused does not count.
        lost_at_step: the furthest `progress_step` of those that were lost.
        error: {"code", "message"} of a failed job.
        request_id, traceparent: of the request that created it.
        attempt_started_at, attempt_ended_at: of the last attempt that did.
        device_seconds: how long the attempts that have ended held a worker, and so its device.
    """

    id: str
    type: str
    owner: str
    spec: JsonObject
    request_hash: str
    priority: int
    max_attempts: int
    deadline_seconds: float | None
    status: JobStatus
    status_reason: str | None
    attempt: int
    fencing: int
    lease_owner: str | None
    lease_until: float | None
    progress_step: int
    progress_total: int
    result: JsonObject | None
    error: JsonObject | None
    created_at: float
    started_at: float | None
    finished_at: float | None
    updated_at: float
    attempts_lost: int = 0
    lost_at_step: int = 0
    memory: JsonObject | None = None
    request_id: str | None = None
    traceparent: str | None = None
    attempt_started_at: float | None = None
    attempt_ended_at: float | None = None
    device_seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NewEvent:
    kind: EventKind
    message: str
    level: EventLevel = "info"
    data: JsonObject = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Attributes: seq: 1, 2, ... within the job, without gaps."""

    seq: int
    created_at: float
    kind: EventKind
    level: EventLevel
    message: str
    data: JsonObject


@dataclass(frozen=True, slots=True, kw_only=True)
class JobCounts:
    """Attributes: by_type_and_status: every pair with at least one job."""

    by_type_and_status: dict[tuple[str, JobStatus], int]
    oldest_queued_seconds: float
    lease_lost_total: int


class JobStore(Protocol):
    """Keeps jobs and their events. Thread-safe; every method is one transaction.

    Every status change appends a "status" event in the same transaction.
    """

    def create(self, job: NewJob, *, max_active: int = 0) -> tuple[Job, bool]:
        """Insert; an id that exists with the same `request_hash` returns (existing, False).

        Args:
            max_active: most jobs of one owner that have not ended, this one included; 0 is no limit.

        Raises:
            RequestConflictError: the id exists with another `request_hash`.
            TooManyJobsError
        """

    def get(self, job_id: str) -> Job:
        """Raises: JobNotFoundError."""

    def list_jobs(
        self,
        *,
        owner: str | None = None,
        type: str | None = None,
        status: JobStatus | None = None,
        after: str | None = None,
        limit: int = 20,
    ) -> list[Job]:
        """Newest first; `after` is the id of the last job of the previous page.

        Raises:
            JobNotFoundError: `after` is unknown, or not the `owner`'s.
        """

    def claim(self, worker: str, types: Collection[str], lease_seconds: float) -> Job | None:
        """Take the most urgent queued job: lowest `priority`, then oldest. Reaps expired leases first."""

    def heartbeat(self, job_id: str, fencing: int, lease_seconds: float) -> Job:
        """Extend the lease; the returned status says whether to pause or cancel.

        Raises:
            StaleLeaseError
        """

    def report(
        self,
        job_id: str,
        fencing: int,
        events: Sequence[NewEvent],
        progress: tuple[int, int] | None = None,
    ) -> None:
        """Append events and set (step, total).

        Raises:
            StaleLeaseError
        """

    def finish(
        self,
        job_id: str,
        fencing: int,
        status: JobStatus,
        *,
        reason: str | None = None,
        result: JsonObject | None = None,
        error: JsonObject | None = None,
    ) -> Job:
        """End the lease: succeeded, failed, cancelled, paused, or queued again.

        Queued again for the reason "runner_crashed", the attempt is lost; for another, it is not.

        Raises:
            StaleLeaseError
            InvalidTransitionError: also where `status` is one that keeps the lease.
        """

    def request_cancel(self, job_id: str) -> Job:
        """queued or paused: cancelled at once; running or pausing: cancelling; cancelling: unchanged.

        Raises:
            JobNotFoundError
            InvalidTransitionError: the job has ended.
        """

    def request_pause(self, job_id: str) -> Job:
        """queued: paused; running: pausing. Raises: JobNotFoundError, InvalidTransitionError."""

    def request_resume(self, job_id: str) -> Job:
        """paused: queued. Raises: JobNotFoundError, InvalidTransitionError."""

    def events(self, job_id: str, *, after: int = 0, limit: int = 100) -> list[Event]:
        """Events with seq > after, oldest first. Raises: JobNotFoundError."""

    def newest_events(
        self, job_id: str, *, before: int | None = None, limit: int = 100
    ) -> list[Event]:
        """Events with seq < before, newest first. Raises: JobNotFoundError."""

    def reap(self) -> list[Job]:
        """End expired leases: queued again, failed after `max_attempts`, cancelled or paused if asked to be.

        Returns:
            The jobs that lost their lease in this call; no other call returns the same loss.
        """

    def counts(self) -> JobCounts: ...

    def worker_seen(self, worker: str) -> None:
        """Record that a worker lives."""

    def worker_ages(self) -> dict[str, float]:
        """Seconds since each worker was last seen, those of the last hour only."""

    def close(self) -> None: ...
