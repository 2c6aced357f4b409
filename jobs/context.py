"""What a runner gets from the process that runs it, and how it ends in an orderly failure."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs.store import EventKind, EventLevel, JsonObject


class JobCancelledError(Exception):
    """The job was asked to stop."""


class JobFailedError(Exception):
    """The job cannot succeed, for a reason that its owner should read.

    Attributes:
        code: machine-readable, such as "gate_refused".
        result: what was found out before, kept with the failed job.
    """

    def __init__(self, code: str, message: str, result: JsonObject | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.result = result


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerContext:
    """One attempt of one job.

    Attributes:
        owner: id of the API key that asked for the job; what it may see, the job may see.
        folder: the job's own; it survives attempts. `artifacts` in it is what the API hands out.
        home: LATHE_HOME.
        send: hands one message to the worker.
        cancelled: whether the job was asked to stop.
    """

    job_id: str
    owner: str
    attempt: int
    spec: JsonObject
    folder: Path
    home: Path
    send: Callable[[JsonObject], None]
    cancelled: Callable[[], bool] = field(default=lambda: False)

    def progress(self, step: int, total: int) -> None:
        """Raises: JobCancelledError."""
        self.check_cancelled()
        self.send({"progress": [step, total]})

    def event(
        self,
        message: str,
        *,
        level: EventLevel = "info",
        kind: EventKind = "message",
        data: JsonObject | None = None,
    ) -> None:
        self.send({"kind": kind, "level": level, "message": message, "data": data or {}})

    def check_cancelled(self) -> None:
        """Raises: JobCancelledError."""
        if self.cancelled():
            raise JobCancelledError(self.job_id)

    @property
    def artifacts(self) -> Path:
        path = self.folder / "artifacts"
        path.mkdir(parents=True, exist_ok=True)
        return path


def finite(value: Any) -> Any:
    """The same with null for every number that JSON has not: NaN and infinities."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
