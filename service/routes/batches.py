"""OpenAI's batches: a file of requests, answered within a day, over the jobs of type batch.

A batch is a job in other words; its answers are files of purpose `batch_output`. What a single request gets wrong is in
its error file; what the input file gets wrong fails the batch and is named by line.
"""

import math
import time
from typing import Annotated, Any, Literal

import anyio
from fastapi import APIRouter, Depends, Query, Response
from pydantic import ConfigDict, Field

from jobs.states import JobStatus
from jobs.store import Job, JsonObject, NewJob
from service.auth import Identity
from service.batches import JOB_TYPE, BatchState, Endpoint
from service.deps import (
    AppState,
    IdempotencyKey,
    IdentityDep,
    RequestModel,
    ResponseModel,
    StateDep,
    require,
)
from service.errors import ApiError, error_responses
from service.idempotency import request_hash, resource_id
from service.job_requests import ask_job, find_job, list_page
from service.routes.files import MAX_LIFETIME_SECONDS, MIN_LIFETIME_SECONDS
from service.submission import create_job, existing_job, find_file

router = APIRouter(
    prefix="/v1/batches",
    tags=["batches"],
    dependencies=[Depends(require("jobs"))],
    responses=error_responses(409),
)
WINDOW_SECONDS = 24 * 3600
MAX_METADATA = 16
_PAGE = 100
BatchStatus = Literal[
    "validating",
    "failed",
    "in_progress",
    "finalizing",
    "completed",
    "expired",
    "cancelling",
    "cancelled",
]


class OutputExpiry(RequestModel):
    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=MIN_LIFETIME_SECONDS, le=MAX_LIFETIME_SECONDS)]


class BatchBody(RequestModel):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "input_file_id": "file-0123456789abcdef01234567",
                    "endpoint": "/v1/chat/completions",
                    "completion_window": "24h",
                }
            ]
        }
    )

    input_file_id: Annotated[str, Field(max_length=100)]
    endpoint: Endpoint
    completion_window: Literal["24h"]
    metadata: (
        dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] | None
    ) = Field(default=None, max_length=MAX_METADATA)
    output_expires_after: OutputExpiry | None = Field(
        default=None, description="When the output and error files are deleted."
    )


class BatchError(ResponseModel):
    code: str
    line: int | None
    message: str
    param: str | None


class BatchErrors(ResponseModel):
    object: Literal["list"] = "list"
    data: list[BatchError]


class RequestCounts(ResponseModel):
    total: int
    completed: int
    failed: int


class BatchObject(ResponseModel):
    """Times are Unix seconds, null for what has not happened."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    errors: BatchErrors | None
    input_file_id: str
    completion_window: str
    status: BatchStatus
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    metadata: dict[str, str] | None


class BatchList(ResponseModel):
    object: Literal["list"] = "list"
    data: list[BatchObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


@router.post("", status_code=201)
async def create_batch(
    body: BatchBody,
    response: Response,
    state: StateDep,
    identity: IdentityDep,
    key: IdempotencyKey = None,
) -> BatchObject:
    """Have the requests of a file of purpose `batch` answered. It is `validating` until a worker has read it."""
    batch_id = resource_id("batch", identity, key)
    digest = request_hash(body.model_dump())
    existing = await existing_job(batch_id, digest, state)
    if existing is not None:
        response.headers["Idempotent-Replayed"] = "true"
        return await _batch(existing, state)
    info = await find_file(body.input_file_id, "input_file_id", state, identity)
    if info.purpose != "batch":
        raise ApiError(
            "invalid_value",
            f"file {info.id} is of purpose {info.purpose!r}, this needs 'batch'",
            "input_file_id",
        )
    new = NewJob(
        id=batch_id,
        type=JOB_TYPE,
        owner=identity.tenant,
        spec=_spec(body),
        request_hash=digest,
    )
    files = {body.input_file_id: "input_file_id"}
    job, created = await anyio.to_thread.run_sync(create_job, new, files, state, identity)
    if not created:
        response.headers["Idempotent-Replayed"] = "true"
    return await _batch(job, state)


def _spec(body: BatchBody) -> JsonObject:
    expiry = body.output_expires_after
    return {
        "type": JOB_TYPE,
        "input_file_id": body.input_file_id,
        "endpoint": body.endpoint,
        "completion_window": body.completion_window,
        "expires_at": time.time() + WINDOW_SECONDS,
        "metadata": body.metadata,
        "output_seconds": None if expiry is None else expiry.seconds,
    }


@router.get("")
async def list_batches(
    state: StateDep,
    identity: IdentityDep,
    after: Annotated[
        str | None, Query(max_length=64, description="Last id of the page before.")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> BatchList:
    """Batches, newest first."""
    jobs, has_more = await list_page(state, identity, after=after, limit=limit, type=JOB_TYPE)
    data = [await _batch(job, state) for job in jobs]
    return BatchList(
        data=data,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
        has_more=has_more,
    )


@router.get("/{batch_id}")
async def get_batch(batch_id: str, state: StateDep, identity: IdentityDep) -> BatchObject:
    return await _batch(await _find(batch_id, state, identity), state)


@router.post("/{batch_id}/cancel")
async def cancel_batch(batch_id: str, state: StateDep, identity: IdentityDep) -> BatchObject:
    """Cancel a batch. The answers that it has by then are in its files."""
    await _find(batch_id, state, identity)
    return await _batch(await ask_job("cancel", batch_id, state, identity), state)


async def _find(batch_id: str, state: AppState, identity: Identity) -> Job:
    """Raises: ApiError: batch_not_found."""
    try:
        job = await find_job(batch_id, state, identity)
    except ApiError:
        job = None
    if job is None or job.type != JOB_TYPE:
        raise ApiError("batch_not_found", f"no batch {batch_id[:100]!r}", "batch_id")
    return job


async def _batch(job: Job, state: AppState) -> BatchObject:
    def read() -> tuple[BatchState, float | None]:
        known = BatchState.load(state.settings.jobs_dir / job.id)
        asked = job.status in (JobStatus.CANCELLING, JobStatus.CANCELLED)
        return known, _cancelling_at(job, state) if asked else None

    known, cancelling_at = await anyio.to_thread.run_sync(read)
    status = _status(job, known)

    def ended(as_what: BatchStatus) -> int | None:
        return _seconds(job.finished_at) if status == as_what else None

    return BatchObject(
        id=job.id,
        endpoint=job.spec["endpoint"],
        errors=_errors(job, known),
        input_file_id=job.spec["input_file_id"],
        completion_window=job.spec["completion_window"],
        status=status,
        output_file_id=known.output_file_id,
        error_file_id=known.error_file_id,
        created_at=int(job.created_at),
        in_progress_at=_seconds(known.in_progress_at),
        expires_at=int(job.spec["expires_at"]),
        finalizing_at=_seconds(known.finalizing_at),
        completed_at=ended("completed"),
        failed_at=ended("failed"),
        expired_at=ended("expired"),
        cancelling_at=_seconds(cancelling_at),
        cancelled_at=ended("cancelled"),
        request_counts=RequestCounts(
            total=known.total, completed=known.completed, failed=known.failed
        ),
        metadata=job.spec.get("metadata"),
    )


def _status(job: Job, known: BatchState) -> BatchStatus:
    if job.status == JobStatus.SUCCEEDED:
        assert job.result is not None
        return "expired" if job.result["expired"] else "completed"
    if job.status == JobStatus.FAILED:
        return "failed"
    if job.status == JobStatus.CANCELLING:
        return "cancelling"
    if job.status == JobStatus.CANCELLED:
        return "cancelled"
    if known.in_progress_at is None:
        return "validating"
    return "in_progress" if known.finalizing_at is None else "finalizing"


def _errors(job: Job, known: BatchState) -> BatchErrors | None:
    found: list[dict[str, Any]] = list(known.errors)
    if not found and job.error is not None:
        found = [{**job.error, "line": None, "param": None}]
    return BatchErrors(data=[BatchError(**error) for error in found]) if found else None


def _cancelling_at(job: Job, state: AppState) -> float | None:
    """When it was asked to end: what the newest such event says; a batch that nobody ran ended at once."""
    for event in state.jobs.newest_events(job.id, limit=_PAGE):
        if event.data.get("status") == JobStatus.CANCELLING:
            return event.created_at
    return job.finished_at


def _seconds(moment: float | None) -> int | None:
    return None if moment is None else math.floor(moment)
