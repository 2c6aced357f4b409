"""Finetuning as OpenAI's clients ask for it: `/v1/fine_tuning/jobs`, another view of the jobs of type finetune.

`method.type` is OpenAI's "supervised", which is Q-GaLore with its defaults here, or one of Lathe's own methods;
`method.<type>` holds its options and, under `hyperparameters`, OpenAI's three and every other setting of a run.
"""

import json
from typing import Annotated, Any, Literal

import anyio
from fastapi import APIRouter, Depends, Header, Query, Response
from pydantic import ConfigDict, Field

from jobs.states import JobStatus
from jobs.store import Event, Job
from service.auth import Identity
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
from service.idempotency import resource_id
from service.job_requests import ask_job, find_job, follow_job, list_page, wants_events
from service.sse import EVENT_STREAM
from service.submission import read_config, submit
from training.spec import METHODS

router = APIRouter(
    prefix="/v1/fine_tuning/jobs",
    tags=["fine-tuning"],
    dependencies=[Depends(require("jobs"))],
    responses=error_responses(409, 507),
)
SUPERVISED = "supervised"
DEFAULT_METHOD = "qgalore"
MAX_LENGTH = 512
"""Tokens of an example, unless the hyperparameters or the model say otherwise."""
MAX_MODEL_CHARS = 48
"""Of the source's id in the id of what is made of it."""
_PAGE = 200
_STATUSES: dict[JobStatus, str] = {
    JobStatus.PAUSING: "running",
    JobStatus.CANCELLING: "running",
}
"""Where OpenAI has another word."""
_BAD_INPUT_CODES = ("bad_data", "file_not_found")


class FineTuningBody(RequestModel):
    """A finetuning job; without a `validation_file`, a share of the training examples is kept back to evaluate on."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "smollm2-135m",
                    "training_file": "file-0123456789abcdef01234567",
                    "suffix": "mine",
                    "method": {
                        "type": "qgalore",
                        "qgalore": {"rank": 64, "hyperparameters": {"n_epochs": 2}},
                    },
                }
            ]
        }
    )

    model: str = Field(max_length=96)
    training_file: str = Field(max_length=100)
    validation_file: str | None = Field(default=None, max_length=100)
    suffix: str | None = Field(default=None, pattern=r"^[a-z0-9][a-z0-9._-]{0,31}$")
    seed: int | None = Field(default=None, ge=0, lt=2**31)
    method: dict[str, Any] | None = Field(
        default=None,
        description='{"type": T, T: {options of T, "hyperparameters": {...}}}; T is "supervised" or one of: '
        + ", ".join(METHODS),
    )
    hyperparameters: dict[str, Any] | None = Field(
        default=None, description="OpenAI's older place for those of `method`."
    )
    integrations: list[Any] | None = Field(default=None, max_length=0)
    metadata: dict[str, str] | None = None


class FineTuningError(ResponseModel):
    code: str
    message: str
    param: str | None


class FineTuningJob(ResponseModel):
    """OpenAI's object, with the job's status here, what it will hold in memory, and its result's report."""

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    finished_at: int | None
    estimated_finish: int | None
    status: str
    model: str
    fine_tuned_model: str | None
    organization_id: Literal["lathe"] = "lathe"
    training_file: str
    validation_file: str | None
    result_files: list[str]
    trained_tokens: int | None
    seed: int
    hyperparameters: dict[str, Any]
    method: dict[str, Any]
    integrations: list[Any] = Field(default_factory=list)
    metadata: dict[str, str] | None
    error: FineTuningError | None
    memory: dict[str, int] | None = Field(
        description="Peak bytes by part, as predicted before it started."
    )
    report: dict[str, Any] | None


class FineTuningJobList(ResponseModel):
    object: Literal["list"] = "list"
    data: list[FineTuningJob]
    has_more: bool


class FineTuningEvent(ResponseModel):
    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: str
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any]


class FineTuningEventList(ResponseModel):
    object: Literal["list"] = "list"
    data: list[FineTuningEvent]
    has_more: bool


class FineTuningCheckpoint(ResponseModel):
    """A state that the run can go on from; it is no model that is served."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuning_job_id: str
    fine_tuned_model_checkpoint: str
    step_number: int
    metrics: dict[str, float | None]


class FineTuningCheckpointList(ResponseModel):
    object: Literal["list"] = "list"
    data: list[FineTuningCheckpoint]
    first_id: str | None
    last_id: str | None
    has_more: bool


@router.post("", status_code=201)
async def create_fine_tuning_job(
    body: FineTuningBody,
    response: Response,
    state: StateDep,
    identity: IdentityDep,
    idempotency_key: IdempotencyKey = None,
) -> FineTuningJob:
    """Submit a finetuning job. Settings, files and memory are checked before the 201; a worker then runs it."""
    job_id = resource_id("ftjob", identity, idempotency_key)
    settings, place = _settings(body)
    config = read_config(state.engines.entry(body.model))
    # OpenAI's clients cannot say how long an example may be, so a small model says it.
    context = config.get("max_position_embeddings", MAX_LENGTH)
    settings.setdefault("max_length", min(MAX_LENGTH, context))
    job_body: dict[str, Any] = {
        "type": "finetune",
        "model": body.model,
        "output": f"{body.model[:MAX_MODEL_CHARS]}-{body.suffix or 'ft'}-{job_id[-8:]}",
        "training_file": body.training_file,
        "validation_file": body.validation_file,
        "settings": settings,
        "metadata": body.metadata,
    }
    try:
        job, created = await submit(job_body, body.model_dump(), job_id, state, identity)
    except ApiError as error:
        raise _for_this_body(error, place) from None
    if not created:
        response.headers["Idempotent-Replayed"] = "true"
    return _object(job)


def _settings(body: FineTuningBody) -> tuple[dict[str, Any], str]:
    """What `parse_settings` takes, and where in the body the hyperparameters are.

    Raises:
        ApiError: the method has not OpenAI's shape.
    """
    method = body.method or {"type": SUPERVISED}
    kind = method.get("type")
    if kind not in (SUPERVISED, *METHODS):
        raise ApiError(
            "invalid_value",
            f"type must be one of: {', '.join((SUPERVISED, *METHODS))}",
            "method.type",
        )
    for key in method:
        if key not in ("type", kind):
            raise ApiError("unsupported_parameter", f"not of method {kind!r}", f"method.{key}")
    options = method.get(kind) or {}
    if not isinstance(options, dict):
        raise ApiError("invalid_value", "must be an object", f"method.{kind}")
    options = dict(options)
    param = f"method.{kind}.hyperparameters"
    hyperparameters = options.pop("hyperparameters", None)
    if kind == SUPERVISED and options:
        unknown = next(iter(options))
        raise ApiError("unsupported_parameter", "unknown option", f"method.{kind}.{unknown}")
    if body.hyperparameters is not None:
        if hyperparameters is not None:
            raise ApiError("invalid_value", f"they are in {param} already", "hyperparameters")
        hyperparameters, param = body.hyperparameters, "hyperparameters"
    if hyperparameters is not None and not isinstance(hyperparameters, dict):
        raise ApiError("invalid_value", "must be an object", param)
    name = DEFAULT_METHOD if kind == SUPERVISED else kind
    settings = _from_hyperparameters(hyperparameters or {}, METHODS[name], param)
    if body.seed is not None:
        settings["seed"] = body.seed
    return {"method": {name: options}, **settings}, param


def _from_hyperparameters(given: dict[str, Any], method: Any, param: str) -> dict[str, Any]:
    """OpenAI's three by our names; "auto" is our default."""
    settings = {key: value for key, value in given.items() if value != "auto"}
    for key in ("method", "seed"):
        if key in settings:
            raise ApiError("unsupported_parameter", f"{key} has its own place", f"{param}.{key}")
    if "n_epochs" in settings:
        settings["epochs"] = settings.pop("n_epochs")
    multiplier = settings.pop("learning_rate_multiplier", None)
    if multiplier is not None:
        if type(multiplier) not in (int, float) or not 0 < multiplier <= 1000:
            raise ApiError(
                "invalid_value",
                "must be a number above 0 and at most 1000",
                f"{param}.learning_rate_multiplier",
            )
        if "learning_rate" in settings:
            raise ApiError(
                "invalid_value",
                "learning_rate is given as well",
                f"{param}.learning_rate_multiplier",
            )
        settings["learning_rate"] = multiplier * method.default_learning_rate
    return settings


def _for_this_body(error: ApiError, place: str) -> ApiError:
    """The same error, with the path of the field as this body has it."""
    param = error.param or ""
    if param == "output":
        param = "suffix"
    elif param.startswith("settings.method"):
        param = param.removeprefix("settings.")
    elif param.startswith("settings"):
        name = param.removeprefix("settings").lstrip(".")
        name = {"epochs": "n_epochs"}.get(name, name)
        param = name if name == "seed" else f"{place}.{name}".rstrip(".")
    return ApiError(error.code, error.message, param or None)


def _object(job: Job, eta: float | None = None) -> FineTuningJob:
    settings = job.spec["settings"]
    report = (job.result or {}).get("report")
    succeeded = job.status == JobStatus.SUCCEEDED
    error = None
    if job.error is not None:
        param = "training_file" if job.error["code"] in _BAD_INPUT_CODES else None
        error = FineTuningError(**job.error, param=param)
    return FineTuningJob(
        id=job.id,
        created_at=int(job.created_at),
        finished_at=None if job.finished_at is None else int(job.finished_at),
        estimated_finish=None if eta is None else int(eta),
        status=_STATUSES.get(job.status, job.status.value),
        model=job.spec["model"],
        fine_tuned_model=job.spec["output"] if succeeded else None,
        training_file=job.spec["training_file"],
        validation_file=job.spec.get("validation_file"),
        result_files=[report["result_file"]] if succeeded and report else [],
        trained_tokens=report["num_tokens"] if succeeded and report else None,
        seed=settings["seed"],
        hyperparameters=_hyperparameters(settings),
        method=_method(settings),
        metadata=job.spec.get("metadata"),
        error=error,
        memory=job.memory,
        report=report,
    )


def _hyperparameters(settings: dict[str, Any]) -> dict[str, Any]:
    """As stored, and perhaps by an earlier version: nothing is parsed again."""
    (name,) = settings["method"]
    rate, method = settings["learning_rate"], METHODS.get(name)
    multiplier = 1.0 if rate is None or method is None else rate / method.default_learning_rate
    return {
        "n_epochs": settings["epochs"],
        "batch_size": settings["batch_size"],
        "learning_rate_multiplier": multiplier,
    }


def _method(settings: dict[str, Any]) -> dict[str, Any]:
    ((name, options),) = settings["method"].items()
    shared = {key: value for key, value in settings.items() if key not in ("method", "seed")}
    return {"type": name, name: {**options, "hyperparameters": shared}}


@router.get("")
async def list_fine_tuning_jobs(
    state: StateDep,
    identity: IdentityDep,
    after: Annotated[
        str | None, Query(max_length=64, description="Last id of the page before.")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> FineTuningJobList:
    """Finetuning jobs, newest first, those of `/v1/jobs` among them."""
    jobs, has_more = await list_page(state, identity, after=after, limit=limit, type="finetune")
    return FineTuningJobList(data=[_object(job) for job in jobs], has_more=has_more)


async def _find(job_id: str, state: AppState, identity: Identity) -> Job:
    job = await find_job(job_id, state, identity)
    if job.type != "finetune":
        raise ApiError("job_not_found", f"job {job_id} is of type {job.type}", "job_id")
    return job


@router.get("/{job_id}")
async def get_fine_tuning_job(job_id: str, state: StateDep, identity: IdentityDep) -> FineTuningJob:
    """One job; a running one says when it will have ended, going by its newest step."""
    job = await _find(job_id, state, identity)
    eta = None
    if job.status == JobStatus.RUNNING:
        newest = await anyio.to_thread.run_sync(lambda: state.jobs.newest_events(job_id, limit=20))
        etas = (e.created_at + e.data["eta_seconds"] for e in newest if e.data.get("eta_seconds"))
        eta = next(etas, None)
    return _object(job, eta)


@router.post("/{job_id}/cancel")
async def cancel_fine_tuning_job(
    job_id: str, state: StateDep, identity: IdentityDep
) -> FineTuningJob:
    """Cancel a job. Its last checkpoint is kept; no model is registered."""
    await _find(job_id, state, identity)
    return _object(await ask_job("cancel", job_id, state, identity))


@router.post("/{job_id}/pause")
async def pause_fine_tuning_job(
    job_id: str, state: StateDep, identity: IdentityDep
) -> FineTuningJob:
    """Pause a job: it writes a checkpoint after the step under way and frees the device."""
    await _find(job_id, state, identity)
    return _object(await ask_job("pause", job_id, state, identity))


@router.post("/{job_id}/resume")
async def resume_fine_tuning_job(
    job_id: str, state: StateDep, identity: IdentityDep
) -> FineTuningJob:
    """Queue a paused job again; it goes on from its checkpoint."""
    await _find(job_id, state, identity)
    return _object(await ask_job("resume", job_id, state, identity))


@router.get("/{job_id}/events", response_model=FineTuningEventList, responses=EVENT_STREAM)
async def fine_tuning_events(
    job_id: str,
    state: StateDep,
    identity: IdentityDep,
    after: Annotated[
        str | None, Query(max_length=100, description="Last id of the page before.")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    stream: bool = False,
    accept: Annotated[str | None, Header(max_length=1000)] = None,
    last_event_id: Annotated[
        str | None, Header(alias="Last-Event-ID", pattern="^[0-9]{1,15}$")
    ] = None,
) -> Any:
    """Events, newest first. With `stream` or `Accept: text/event-stream`: oldest first, as they happen."""
    await _find(job_id, state, identity)
    if stream or wants_events(accept):
        return follow_job(
            job_id, state, int(last_event_id or 0), lambda event: _event(job_id, event)
        )
    before = None if after is None else _sequence(after, job_id)

    def query() -> list[FineTuningEvent]:
        found: list[FineTuningEvent] = []
        place = before
        while len(found) <= limit:
            page = state.jobs.newest_events(job_id, before=place, limit=_PAGE)
            shown = (_event(job_id, event) for event in page)
            found += [event for event in shown if event is not None]
            if len(page) < _PAGE:
                break
            place = page[-1].seq
        return found

    events = await anyio.to_thread.run_sync(query)
    return FineTuningEventList(data=events[:limit], has_more=len(events) > limit)


def _sequence(event_id: str, job_id: str) -> int:
    """Raises: ApiError."""
    number = event_id.removeprefix(f"{job_id}-")
    if number == event_id or not (number.isascii() and number.isdigit()) or len(number) > 15:
        raise ApiError("invalid_value", "no event of this job has this id", "after")
    return int(number)


def _event(job_id: str, event: Event) -> FineTuningEvent | None:
    """None for mere progress: what a step says is in its metrics."""
    if event.kind == "progress":
        return None
    data = event.data
    if event.kind == "metrics":
        data = {
            **data,
            "total_steps": data.get("total"),
            "train_loss": data.get("loss"),
            "valid_loss": data.get("evaluation_loss"),
        }
    return FineTuningEvent(
        id=f"{job_id}-{event.seq}",
        created_at=int(event.created_at),
        level=event.level,
        message=event.message,
        type="metrics" if event.kind == "metrics" else "message",
        data=data,
    )


@router.get("/{job_id}/checkpoints")
async def fine_tuning_checkpoints(
    job_id: str,
    state: StateDep,
    identity: IdentityDep,
    after: Annotated[
        str | None, Query(max_length=100, description="Last id of the page before.")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 10,
) -> FineTuningCheckpointList:
    """Checkpoints that were written, newest first."""
    job = await _find(job_id, state, identity)
    path = state.settings.jobs_dir / job.id / "checkpoints.json"

    def read() -> list[dict[str, Any]]:
        try:
            rows: list[dict[str, Any]] = json.loads(path.read_text())
        except FileNotFoundError:
            return []
        return sorted(rows, key=lambda row: -row["step"])

    found = [_checkpoint(job, row) for row in await anyio.to_thread.run_sync(read)]
    if after is not None:
        ids = [checkpoint.id for checkpoint in found]
        if after not in ids:
            raise ApiError("invalid_value", "no checkpoint of this job has this id", "after")
        found = found[ids.index(after) + 1 :]
    data = found[:limit]
    return FineTuningCheckpointList(
        data=data,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
        has_more=len(found) > limit,
    )


def _checkpoint(job: Job, row: dict[str, Any]) -> FineTuningCheckpoint:
    return FineTuningCheckpoint(
        id=f"ftckpt-{job.id.rpartition('-')[2]}-{row['step']}",
        created_at=int(row["created_at"]),
        fine_tuning_job_id=job.id,
        fine_tuned_model_checkpoint=f"{job.spec['output']}:step-{row['step']}",
        step_number=row["step"],
        metrics={
            "step": row["step"],
            "train_loss": row["loss"],
            "valid_loss": row["evaluation_loss"],
        },
    )
