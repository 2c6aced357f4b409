"""The states of a job and every transition allowed between them. A table; nothing else decides."""

from enum import StrEnum


class JobStatus(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    PAUSING = "pausing"
    PAUSED = "paused"
    CANCELLING = "cancelling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


TERMINAL_STATUSES = frozenset({JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED})
LEASED_STATUSES = frozenset({JobStatus.RUNNING, JobStatus.PAUSING, JobStatus.CANCELLING})
"""A worker holds a lease on the job; only a write with its fencing token is accepted."""

TRANSITIONS: dict[JobStatus, frozenset[JobStatus]] = {
    JobStatus.QUEUED: frozenset({JobStatus.RUNNING, JobStatus.CANCELLED, JobStatus.PAUSED}),
    JobStatus.RUNNING: frozenset(
        {
            JobStatus.SUCCEEDED,
            JobStatus.FAILED,
            JobStatus.PAUSING,
            JobStatus.CANCELLING,
            JobStatus.QUEUED,  # the lease was lost, or the worker gave the job back
        }
    ),
    # A job may end before it notices that it was asked to pause or cancel.
    JobStatus.PAUSING: frozenset(
        {
            JobStatus.PAUSED,
            JobStatus.SUCCEEDED,
            JobStatus.FAILED,
            JobStatus.CANCELLING,
            JobStatus.QUEUED,
        }
    ),
    JobStatus.PAUSED: frozenset({JobStatus.QUEUED, JobStatus.CANCELLED}),
    JobStatus.CANCELLING: frozenset({JobStatus.CANCELLED, JobStatus.SUCCEEDED, JobStatus.FAILED}),
    JobStatus.SUCCEEDED: frozenset(),
    JobStatus.FAILED: frozenset(),
    JobStatus.CANCELLED: frozenset(),
}


class InvalidTransitionError(Exception):
    """A job cannot go from its status to the one asked for."""

    def __init__(self, job_id: str, current: JobStatus, target: JobStatus) -> None:
        allowed = ", ".join(sorted(TRANSITIONS[current])) or "none: it has ended"
        super().__init__(f"job {job_id} is {current}; cannot become {target} (allowed: {allowed})")
        self.current = current
        self.target = target


def check_transition(job_id: str, current: JobStatus, target: JobStatus) -> None:
    """Raises: InvalidTransitionError."""
    if target not in TRANSITIONS[current]:
        raise InvalidTransitionError(job_id, current, target)
