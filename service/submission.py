"""How a job comes to be: its specification, model and files checked in full, its memory predicted, then one insertion.

Both `/v1/jobs` and `/v1/fine_tuning/jobs` submit here.
"""

import json

import anyio
import psutil

from compression.registry import ModelEntry, ModelNotFoundError
from graph.llaga.projector import ProjectorRegistry
from graph.store import GraphNotFoundError
from jobs.file_check import FileContentError, read_texts
from jobs.files import FileInfo, Purpose, UploadNotFoundError
from jobs.memory import has_nvidia_gpu, too_large
from jobs.spec import (
    CalibrateSkipSpec,
    CompressSpec,
    EnrichSpec,
    ExportSpec,
    FinetuneSpec,
    Spec,
    SpecError,
    TrainProjectorSpec,
    check_graph,
    check_source,
    parse_spec,
    spec_json,
)
from jobs.store import (
    Job,
    JobNotFoundError,
    JsonObject,
    NewJob,
    RequestConflictError,
    TooManyJobsError,
)
from service.auth import Identity
from service.deps import AppState
from service.enrich_jobs import complete_enrich
from service.errors import ApiError
from service.idempotency import request_hash
from service.training_files import check_examples
from training.ledger import predict_memory
from training.spec import parse_settings


async def submit(
    body: JsonObject, request: JsonObject, job_id: str, state: AppState, identity: Identity
) -> tuple[Job, bool]:
    """Check and create a job; one that exists already, made from the same request, is returned with False.

    Args:
        body: the job as `/v1/jobs` takes it.
        request: the request's own body, which an idempotency key stands for.

    Raises:
        ApiError
    """
    digest = request_hash(request)
    existing = await existing_job(job_id, digest, state)
    if existing is not None:
        return existing, False
    try:
        spec = parse_spec(body)
        if isinstance(spec, EnrichSpec):
            spec = await complete_enrich(spec, state, identity)
        assert spec.model is not None
        entry = state.engines.entry(spec.model)
        config = read_config(entry)
        check_source(spec, entry.manifest, config)
    except SpecError as error:
        raise ApiError(error.code, error.message, error.param) from None
    _check_output(spec, state)
    if isinstance(spec, TrainProjectorSpec):
        await anyio.to_thread.run_sync(_check_projector, spec, state, identity)
    files = await _check_files(spec, entry, state, identity)
    memory = await anyio.to_thread.run_sync(_memory, spec, entry, config)
    new = NewJob(
        id=job_id,
        type=spec.type,
        owner=identity.tenant,
        spec=spec_json(spec),
        request_hash=digest,
        memory=memory,
        deadline_seconds=state.settings.max_job_seconds,
    )
    return await anyio.to_thread.run_sync(create_job, new, files, state, identity)


def read_config(entry: ModelEntry) -> JsonObject:
    config: JsonObject = json.loads((entry.path / "config.json").read_text())
    return config


async def existing_job(job_id: str, digest: str, state: AppState) -> Job | None:
    try:
        job = await anyio.to_thread.run_sync(state.jobs.get, job_id)
    except JobNotFoundError:
        return None
    if job.request_hash != digest:
        raise _conflict()
    return job


def _conflict() -> ApiError:
    return ApiError(
        "idempotency_conflict",
        "this Idempotency-Key was used with another body",
        "Idempotency-Key",
    )


def _check_output(spec: Spec, state: AppState) -> None:
    if isinstance(spec, EnrichSpec | ExportSpec):
        return
    if isinstance(spec, TrainProjectorSpec):
        if ProjectorRegistry(state.settings.projectors_dir).is_taken(spec.output):
            raise ApiError(
                "projector_exists", f"projector {spec.output!r} exists already", "output"
            )
        return
    try:
        state.registry.get(spec.output)
    except ModelNotFoundError:
        return
    raise ApiError("model_exists", f"model {spec.output!r} exists already", "output")


def _check_projector(spec: TrainProjectorSpec, state: AppState, identity: Identity) -> None:
    """The graph is the caller's and has what is asked about; the encoder is one."""
    try:
        check_graph(spec, state.graphs.info(spec.graph, identity.tenant))
    except GraphNotFoundError:
        message = f"the graph {spec.graph!r} does not exist"
        raise ApiError("graph_not_found", message, "graph") from None
    except SpecError as error:
        raise ApiError(error.code, error.message, error.param) from None
    if spec.embedding_model is None:
        return
    try:
        encoder = state.engines.entry(spec.embedding_model)
    except ApiError as error:
        raise ApiError(error.code, error.message, "embedding_model") from None
    if encoder.manifest.kind != "encoder":
        raise ApiError(
            "invalid_value", f"{spec.embedding_model!r} is no encoder", "embedding_model"
        )


async def _check_files(
    spec: Spec, entry: ModelEntry, state: AppState, identity: Identity
) -> dict[str, str]:
    """File id to the field that names it, all of them fit for their purpose."""
    named: dict[str, tuple[str, Purpose]] = {}
    if isinstance(spec, FinetuneSpec):
        named[spec.training_file] = ("training_file", "fine-tune")
        if spec.validation_file is not None:
            if spec.validation_file == spec.training_file:
                raise ApiError("invalid_value", "it is the training file", "validation_file")
            named[spec.validation_file] = ("validation_file", "fine-tune")
    elif isinstance(spec, EnrichSpec):
        if spec.file is not None:
            named[spec.file] = ("file", "enrich")
    elif (
        isinstance(spec, CompressSpec | CalibrateSkipSpec)
        and spec.calibration
        and spec.calibration.file
    ):
        named[spec.calibration.file] = ("calibration.file", "calibration")
    for file_id, (param, purpose) in named.items():
        info = await find_file(file_id, param, state, identity)
        if info.purpose != purpose:
            raise ApiError(
                "invalid_value",
                f"file {file_id} is of purpose {info.purpose!r}, this needs {purpose!r}",
                param,
            )
        if isinstance(spec, FinetuneSpec):
            max_length = parse_settings(spec.settings).max_length
            path = state.files.path(info)
            await anyio.to_thread.run_sync(check_examples, entry, path, max_length, param)
        elif isinstance(spec, CompressSpec | CalibrateSkipSpec) and spec.calibration is not None:
            await _check_length(info, spec.calibration.length, entry, state)
    return {file_id: param for file_id, (param, _) in named.items()}


async def find_file(file_id: str, param: str, state: AppState, identity: Identity) -> FileInfo:
    try:
        return await anyio.to_thread.run_sync(state.files.get, file_id, identity.sees)
    except UploadNotFoundError as error:
        raise ApiError("file_not_found", str(error), param) from None


async def _check_length(info: FileInfo, length: int, entry: ModelEntry, state: AppState) -> None:
    """Whether the text has the tokens of one sample; only as much is tokenized as can matter."""
    tokenizer = (await state.tokenizers.get(entry)).tokenizer

    def count() -> int:
        text = "\n\n".join(read_texts(state.files.path(info)))
        if len(text) >= length * tokenizer.max_token_chars:
            return length
        return len(tokenizer.encode(text))

    try:
        num_tokens = await anyio.to_thread.run_sync(count)
    except FileContentError as error:
        raise ApiError("invalid_file", str(error), "calibration.file") from None
    if num_tokens < length:
        raise ApiError(
            "invalid_value",
            f"file {info.id} has {num_tokens} tokens, one sample needs {length}",
            "calibration.file",
        )


def _memory(spec: Spec, entry: ModelEntry, config: JsonObject) -> JsonObject | None:
    """What the job will hold at its peak, by part.

    Raises:
        ApiError: this machine, where it has no GPU that may hold it, is too small.
    """
    if not isinstance(spec, FinetuneSpec):
        return None
    ledger = predict_memory(entry.manifest, config, parse_settings(spec.settings))
    reason = too_large(ledger, psutil.virtual_memory().total, "this machine has")
    if reason is not None and not has_nvidia_gpu():  # its memory is the worker's to look at
        raise ApiError("job_too_large", reason, "settings")
    return ledger.to_json()


def create_job(
    new: NewJob, files: dict[str, str], state: AppState, identity: Identity
) -> tuple[Job, bool]:
    try:
        if state.quotas is not None:
            state.quotas.check_job(identity.tenant)
        with state.files.held(files, identity.sees):
            return state.jobs.create(new, max_active=state.settings.max_active_jobs)
    except UploadNotFoundError as error:  # deleted in this moment
        raise ApiError("file_not_found", str(error), files[error.file_id]) from None
    except RequestConflictError:
        raise _conflict() from None
    except TooManyJobsError:
        raise ApiError(
            "job_quota_exceeded",
            f"a key may have {state.settings.max_active_jobs} jobs that have not ended; let one end or cancel one",
        ) from None
