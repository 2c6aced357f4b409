"""Who caused the work at hand: the HTTP request or the job, and the trace that it belongs to.

The API process sets it for each request, a worker for each attempt, a job's process for its whole life; the engine's
client sends it along with every call. So a line that the engine host logs names the request that it was for.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}(-.*)?\Z")
_MAX_TRACEPARENT_CHARS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Attributes: traceparent: W3C Trace Context's header of the span that is under way, or of the caller's."""

    request_id: str | None = None
    job_id: str | None = None
    traceparent: str | None = None

    @property
    def trace_id(self) -> str | None:
        return None if self.traceparent is None else self.traceparent[3:35]


_NOBODY = Origin()
_origin: ContextVar[Origin] = ContextVar("origin", default=_NOBODY)


def current_origin() -> Origin:
    return _origin.get()


@contextmanager
def caused_by(origin: Origin) -> Iterator[None]:
    """What is done inside, on this thread or in this task, is for `origin`."""
    token = _origin.set(origin)
    try:
        yield
    finally:
        _origin.reset(token)


def parse_traceparent(header: str) -> str | None:
    """The header, if it is one that W3C Trace Context allows: known fields in place, ids that are not all zeros."""
    match = _TRACEPARENT.match(header) if len(header) <= _MAX_TRACEPARENT_CHARS else None
    if match is None or not int(match[1], 16) or not int(match[2], 16):
        return None
    if (
        header.startswith("00") and match[3] is not None
    ):  # a later version may add fields, this one may not
        return None
    return header[:55]
