"""Jobs: submit, follow, cancel, and fetch what they made. A job belongs to the key that created it; admins see all."""

import contextlib
import hashlib
import shutil
from pathlib import Path
from typing import Annotated, Any, Literal

import anyio
from fastapi import APIRouter, Depends, Header, Query, Response
from fastapi.responses import FileResponse, PlainTextResponse
from pydantic import BaseModel, ConfigDict, Field

from jobs.spec import SPECS
from jobs.states import TERMINAL_STATUSES, JobStatus
from jobs.store import Event, Job
from service.deps import (
    AppState,
    IdempotencyKey,
    IdentityDep,
    ResponseModel,
    StateDep,
    require,
    standalone_schema,
)
from service.errors import ApiError, error_responses
from service.idempotency import resource_id
from service.job_requests import ask_job, find_job, follow_job, list_page, wants_events
from service.sse import EVENT_STREAM
from service.submission import submit

router = APIRouter(
    prefix="/v1/jobs",
    tags=["jobs"],
    dependencies=[Depends(require("jobs"))],
    responses=error_responses(409),
)
MAX_LOG_BYTES = 2**20


class JobRequest(BaseModel):
    """A job; which other fields it has depends on `type`. `parse_spec` checks them."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    type: str = Field(max_length=64)


_CREATE_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {"oneOf": [standalone_schema(s) for s in SPECS.values()]}
            }
        },
    }
}


class JobProgress(ResponseModel):
    step: int
    total: int


class JobError(ResponseModel):
    code: str
    message: str


class JobObject(ResponseModel):
    id: str
    object: Literal["job"] = "job"
    type: str
    status: JobStatus
    status_reason: str | None
    attempt: int
    max_attempts: int
    spec: dict[str, Any]
    progress: JobProgress
    result: dict[str, Any] | None
    error: JobError | None
    memory: dict[str, int] | None = Field(
        description="Peak bytes by part, as predicted before it started."
    )
    created_at: float
    started_at: float | None
    finished_at: float | None


class JobList(ResponseModel):
    object: Literal["list"] = "list"
    data: list[JobObject]
    has_more: bool
    first_id: str | None
    last_id: str | None


class JobEvent(ResponseModel):
    id: str
    object: Literal["job.event"] = "job.event"
    seq: int
    created_at: float
    type: str
    level: str
    message: str
    data: dict[str, Any]


class JobEventList(ResponseModel):
    object: Literal["list"] = "list"
    data: list[JobEvent]
    has_more: bool


class Artifact(ResponseModel):
    name: str
    bytes: int
    sha256: str


class ArtifactList(ResponseModel):
    object: Literal["list"] = "list"
    data: list[Artifact]


class ArtifactsDeleted(ResponseModel):
    id: str
    object: Literal["job.artifacts"] = "job.artifacts"
    deleted: Literal[True] = True


def _job(job: Job) -> JobObject:
    return JobObject(
        id=job.id,
        type=job.type,
        status=job.status,
        status_reason=job.status_reason,
        attempt=job.attempt,
        max_attempts=job.max_attempts,
        spec=job.spec,
        progress=JobProgress(step=job.progress_step, total=job.progress_total),
        result=job.result,
        error=JobError(**job.error) if job.error else None,
        memory=job.memory,
        created_at=job.created_at,
        started_at=job.started_at,
        finished_at=job.finished_at,
    )


def _event(job_id: str, event: Event) -> JobEvent:
    return JobEvent(
        id=f"{job_id}-{event.seq}",
        seq=event.seq,
        created_at=event.created_at,
        type=event.kind,
        level=event.level,
        message=event.message,
        data=event.data,
    )


@router.post("", status_code=201, openapi_extra=_CREATE_BODY)
async def create_job(
    body: JobRequest,
    response: Response,
    state: StateDep,
    identity: IdentityDep,
    idempotency_key: IdempotencyKey = None,
) -> JobObject:
    """Submit a job. It is checked in full before the 201; a worker then runs it."""
    request = body.model_dump()
    job_id = resource_id("job", identity, idempotency_key)
    job, created = await submit(request, request, job_id, state, identity)
    if not created:
        response.headers["Idempotent-Replayed"] = "true"
    return _job(job)


@router.get("")
async def list_jobs(
    state: StateDep,
    identity: IdentityDep,
    after: Annotated[
        str | None, Query(max_length=64, description="Last id of the page before.")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    type: Annotated[str | None, Query(max_length=64)] = None,
    status: JobStatus | None = None,
) -> JobList:
    """Jobs, newest first."""
    jobs, has_more = await list_page(
        state, identity, after=after, limit=limit, type=type, status=status
    )
    page = [_job(job) for job in jobs]
    return JobList(
        data=page,
        has_more=has_more,
        first_id=page[0].id if page else None,
        last_id=page[-1].id if page else None,
    )


@router.get("/{job_id}")
async def get_job(job_id: str, state: StateDep, identity: IdentityDep) -> JobObject:
    return _job(await find_job(job_id, state, identity))


@router.post("/{job_id}/cancel")
async def cancel_job(job_id: str, state: StateDep, identity: IdentityDep) -> JobObject:
    """Cancel a job. A running one ends within seconds; cancelling twice changes nothing."""
    return _job(await ask_job("cancel", job_id, state, identity))


@router.post("/{job_id}/pause")
async def pause_job(job_id: str, state: StateDep, identity: IdentityDep) -> JobObject:
    """Pause a job: a running one keeps what it finished and ends its process; it is `pausing` until then."""
    return _job(await ask_job("pause", job_id, state, identity))


@router.post("/{job_id}/resume")
async def resume_job(job_id: str, state: StateDep, identity: IdentityDep) -> JobObject:
    """Queue a paused job again."""
    return _job(await ask_job("resume", job_id, state, identity))


@router.get(
    "/{job_id}/events",
    response_model=JobEventList,
    responses=EVENT_STREAM,
)
async def job_events(
    job_id: str,
    state: StateDep,
    identity: IdentityDep,
    after: Annotated[int, Query(ge=0, lt=2**53, description="Sequence number.")] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    stream: bool = False,
    accept: Annotated[str | None, Header(max_length=1000)] = None,
    last_event_id: Annotated[
        str | None, Header(alias="Last-Event-ID", pattern="^[0-9]{1,15}$")
    ] = None,
) -> Any:
    """Events in order. With `stream` or `Accept: text/event-stream`: as they happen, until the job has ended."""
    await find_job(job_id, state, identity)
    if stream or wants_events(accept):
        after = max(after, int(last_event_id or 0))
        return follow_job(job_id, state, after, lambda event: _event(job_id, event))
    found = await anyio.to_thread.run_sync(
        lambda: state.jobs.events(job_id, after=after, limit=limit + 1)
    )
    page = [_event(job_id, event) for event in found[:limit]]
    return JobEventList(data=page, has_more=len(found) > limit)


@router.get("/{job_id}/logs", response_class=PlainTextResponse)
async def job_logs(
    job_id: str,
    state: StateDep,
    identity: IdentityDep,
    tail_bytes: Annotated[int, Query(ge=1, le=MAX_LOG_BYTES)] = 65536,
) -> PlainTextResponse:
    """The end of what the newest attempt wrote to its standard output and error."""
    job = await find_job(job_id, state, identity)
    path = state.settings.jobs_dir / job.id / f"attempt-{job.attempt}.log"

    def read() -> str:
        if not path.is_file():
            return ""
        with path.open("rb") as file:
            file.seek(max(path.stat().st_size - tail_bytes, 0))
            return file.read().decode("utf-8", "replace")

    return PlainTextResponse(await anyio.to_thread.run_sync(read))


def _artifacts(state: AppState, job: Job) -> dict[str, Path]:
    """Finished artefacts by name."""
    folder = state.settings.jobs_dir / job.id / "artifacts"
    if not folder.is_dir():
        return {}
    files = (path for path in folder.iterdir() if path.is_file() and not path.is_symlink())
    return {path.name: path for path in sorted(files) if not path.name.startswith(".")}


@router.get("/{job_id}/artifacts")
async def list_artifacts(job_id: str, state: StateDep, identity: IdentityDep) -> ArtifactList:
    """What the job made, besides a model."""
    job = await find_job(job_id, state, identity)

    def describe() -> list[Artifact]:
        found = []
        for name, path in _artifacts(state, job).items():
            with path.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            found.append(Artifact(name=name, bytes=path.stat().st_size, sha256=sha256))
        return found

    return ArtifactList(data=await anyio.to_thread.run_sync(describe))


@router.delete("/{job_id}/artifacts")
async def delete_artifacts(job_id: str, state: StateDep, identity: IdentityDep) -> ArtifactsDeleted:
    """Delete what a job that has ended keeps on the disk: artefacts, logs, checkpoints.

    The job itself stays, so that its idempotency key starts no second one and its seconds count against the quota; so
    do its events and what it registered or uploaded: models, projectors, files.
    """
    job = await find_job(job_id, state, identity)
    if job.status not in TERMINAL_STATUSES:
        raise ApiError("job_not_ended", f"the job is {job.status}", "job_id")
    folder = state.settings.jobs_dir / job.id

    def delete() -> None:
        while folder.exists():
            with contextlib.suppress(FileNotFoundError):  # another request deletes it, too
                shutil.rmtree(folder)

    await anyio.to_thread.run_sync(delete)
    return ArtifactsDeleted(id=job.id)


@router.get("/{job_id}/artifacts/{name}", response_class=FileResponse)
async def get_artifact(
    job_id: str, name: str, state: StateDep, identity: IdentityDep
) -> FileResponse:
    """Download one artefact, by a name that the list gave."""
    job = await find_job(job_id, state, identity)
    path = _artifacts(state, job).get(name)
    if path is None:
        raise ApiError("artifact_not_found", f"the job has no artefact {name[:100]!r}", "name")
    return FileResponse(path, filename=name)
