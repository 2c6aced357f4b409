"""What every resource that shows jobs asks of one: to be found by who may see it, to stop or go on, to be followed."""

import json
import logging
from collections.abc import AsyncIterator, Callable
from typing import Literal

import anyio
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from jobs.open import STORE_ERRORS
from jobs.states import TERMINAL_STATUSES, InvalidTransitionError, JobStatus
from jobs.store import Event, Job, JobNotFoundError
from service.auth import Identity
from service.deps import AppState
from service.errors import ApiError, store_unavailable
from service.sse import HEADERS, MEDIA_TYPE, with_keep_alive

logger = logging.getLogger("lathe.jobs")
Request = Literal["cancel", "pause", "resume"]


async def find_job(job_id: str, state: AppState, identity: Identity) -> Job:
    """Raises: ApiError: job_not_found, also for another owner's."""
    try:
        job = await anyio.to_thread.run_sync(state.jobs.get, job_id)
    except (JobNotFoundError, ValueError):
        job = None
    if job is None or identity.sees not in (None, job.owner):
        raise ApiError("job_not_found", f"no job {job_id[:100]!r}", "job_id")
    return job


async def list_page(
    state: AppState,
    identity: Identity,
    *,
    after: str | None,
    limit: int,
    type: str | None = None,
    status: JobStatus | None = None,
) -> tuple[list[Job], bool]:
    """At most `limit` jobs behind `after`, newest first, and whether there are more.

    Raises:
        ApiError: job_not_found, there is no job `after`.
    """

    def query() -> list[Job]:
        return state.jobs.list_jobs(
            owner=identity.sees, type=type, status=status, after=after, limit=limit + 1
        )

    try:
        jobs = await anyio.to_thread.run_sync(query)
    except JobNotFoundError:
        raise ApiError("job_not_found", "no such job", "after") from None
    return jobs[:limit], len(jobs) > limit


async def ask_job(request: Request, job_id: str, state: AppState, identity: Identity) -> Job:
    """Raises: ApiError: job_not_found; job_not_cancellable and job_not_pausable, it has ended or never began."""
    await find_job(job_id, state, identity)
    asks = {
        "cancel": state.jobs.request_cancel,
        "pause": state.jobs.request_pause,
        "resume": state.jobs.request_resume,
    }
    try:
        return await anyio.to_thread.run_sync(asks[request], job_id)
    except InvalidTransitionError as error:
        code = "job_not_cancellable" if request == "cancel" else "job_not_pausable"
        raise ApiError(code, f"the job is {error.current}", "job_id") from None


def wants_events(accept: str | None) -> bool:
    return accept is not None and MEDIA_TYPE in accept


def follow_job(
    job_id: str, state: AppState, after: int, render: Callable[[Event], BaseModel | None]
) -> StreamingResponse:
    """The events behind `after` as they happen, until the job has ended. An error is the last event, "error"; a client
    may go on from the last id that it has.

    Args:
        render: None leaves an event out.
    """
    events = _keep(_follow(job_id, state, after, render))
    return StreamingResponse(events, media_type=MEDIA_TYPE, headers=HEADERS)


async def _keep(chunks: AsyncIterator[str]) -> AsyncIterator[str]:
    try:
        async for chunk in with_keep_alive(chunks):
            yield chunk
    except ApiError as error:
        yield _error_event(error)
    except JobNotFoundError:
        yield _error_event(ApiError("job_not_found", "the store has lost this job", "job_id"))
    except STORE_ERRORS as error:
        logger.warning("an event stream ends: the store does not answer (%s)", error)
        yield _error_event(store_unavailable())
    except Exception:
        logger.exception("an event stream failed")
        yield _error_event(ApiError("internal_error", "internal error"))


def _error_event(error: ApiError) -> str:
    return f"event: error\ndata: {json.dumps(error.body())}\n\n"


async def _follow(
    job_id: str, state: AppState, after: int, render: Callable[[Event], BaseModel | None]
) -> AsyncIterator[str]:
    def newer() -> list[Event]:
        return state.jobs.events(job_id, after=after, limit=1000)

    while True:
        job = await anyio.to_thread.run_sync(state.jobs.get, job_id)
        events = await anyio.to_thread.run_sync(newer)
        for event in events:
            after = event.seq
            shown = render(event)
            if shown is not None:
                data = json.dumps(shown.model_dump(mode="json"))
                yield f"id: {event.seq}\nevent: {event.kind}\ndata: {data}\n\n"
        if job.status in TERMINAL_STATUSES and not events:
            return
        if not events:
            await state.feeds.news(job_id, after)
