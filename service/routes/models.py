"""Models: what is registered, what it lost, and what is loaded."""

import json
from typing import Annotated, Any, Literal

import anyio
from fastapi import APIRouter, Depends, Query
from pydantic import Field

from compression.checkpoint import checkpoint_hash, head_dim
from compression.registry import ModelEntry
from engines.protocol import EngineError
from service.deps import AppState, ResponseModel, StateDep, require
from service.engine_pool import EngineStatus
from service.errors import ApiError, error_responses, from_engine_error

router = APIRouter(prefix="/v1/models", tags=["models"], responses=error_responses(409))
MAX_WAIT_SECONDS = 300.0


class Model(ResponseModel):
    """OpenAI's model object, and what Lathe knows of the checkpoint.

    `bytes_ratio` is against the model that it was made from. `matrices` and `head_dim` are in the answer for one
    model only.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["lathe"] = "lathe"
    root: str
    parent: str | None
    max_model_len: int | None
    state: str
    kind: str
    parameters: int
    bytes: int
    bytes_ratio: float | None
    recipe: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    source: dict[str, Any]
    checkpoint_hash: str
    matrices: list[dict[str, Any]] | None = None
    head_dim: int | None = None


class ModelList(ResponseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class ModelStatus(ResponseModel):
    id: str
    object: Literal["model.status"] = "model.status"
    state: str
    ready: bool
    engine: str | None = None
    kernels: dict[str, str] = Field(default_factory=dict)
    resident_bytes: int | None = None


class ModelDeleted(ResponseModel):
    id: str
    object: Literal["model"] = "model"
    deleted: Literal[True] = True


def _model(entry: ModelEntry, status: EngineStatus | None) -> Model:
    manifest = entry.manifest
    parent = manifest.source.get("model")
    return Model(
        id=entry.id,
        created=int(entry.created_at),
        root=parent or entry.id,
        parent=parent,
        max_model_len=status.info.max_model_len if status and status.info else None,
        state=status.state if status else "unloaded",
        kind=manifest.kind,
        parameters=manifest.parameters,
        bytes=manifest.tensor_bytes,
        bytes_ratio=manifest.ratios.get("bytes"),
        recipe=manifest.recipe,
        evaluations=manifest.evaluations,
        source=manifest.source,
        checkpoint_hash=checkpoint_hash(manifest),
    )


def _status(status: EngineStatus) -> ModelStatus:
    info = status.info
    return ModelStatus(
        id=status.model,
        state=status.state,
        ready=status.ready,
        engine=info.engine if info else None,
        kernels=info.kernels if info else {},
        resident_bytes=info.resident_bytes if info else None,
    )


@router.get("", dependencies=[Depends(require("inference"))])
async def list_models(state: StateDep) -> ModelList:
    """Registered models, loaded or not."""
    statuses = await state.engines.status()
    entries = await anyio.to_thread.run_sync(state.registry.list_models)
    return ModelList(data=[_model(entry, statuses.get(entry.id)) for entry in entries])


@router.get("/{model_id}", dependencies=[Depends(require("inference"))])
async def get_model(model_id: str, state: StateDep) -> Model:
    """One model with its recipe, sizes, evaluations and one row per matrix."""
    entry = state.engines.entry(model_id)
    model = _model(entry, (await state.engines.status()).get(model_id))
    model.matrices = [matrix.to_json() for matrix in entry.manifest.matrices]
    if entry.manifest.kind == "decoder":
        config = await anyio.to_thread.run_sync((entry.path / "config.json").read_bytes)
        model.head_dim = head_dim(json.loads(config))
    return model


@router.post("/{model_id}/load", dependencies=[Depends(require("admin"))])
async def load_model(
    model_id: str,
    state: StateDep,
    wait: Annotated[bool, Query(description="Answer only when it serves.")] = False,
) -> ModelStatus:
    """Start an engine host for a model. Loading a loaded model changes nothing."""
    status = await state.engines.load(model_id)
    if wait:
        status = await state.engines.wait_loaded(model_id, MAX_WAIT_SECONDS)
    return _status(status)


@router.post("/{model_id}/unload", dependencies=[Depends(require("admin"))])
async def unload_model(model_id: str, state: StateDep) -> ModelStatus:
    """End a model's engine host; its memory is free when this answers."""
    await state.engines.unload(model_id)
    return ModelStatus(id=model_id, state="unloaded", ready=False)


@router.post("/{model_id}/restart", dependencies=[Depends(require("admin"))])
async def restart_model(
    model_id: str,
    state: StateDep,
    wait: Annotated[bool, Query(description="Answer only when it serves again.")] = False,
) -> ModelStatus:
    """Put a new engine host in a model's place: running requests end first, new ones get 503 until it serves."""
    status = await state.engines.restart(model_id)
    if wait:
        status = await state.engines.wait_loaded(model_id, MAX_WAIT_SECONDS)
    return _status(status)


@router.post("/{model_id}/sleep", dependencies=[Depends(require("admin"))])
async def sleep_model(model_id: str, state: StateDep) -> ModelStatus:
    """Free a model's weights and caches; requests get 503 until it is woken."""
    return await _sleep_or_wake(model_id, state, wake=False)


@router.post("/{model_id}/wake", dependencies=[Depends(require("admin"))])
async def wake_model(model_id: str, state: StateDep) -> ModelStatus:
    """Load a sleeping model's weights again."""
    return await _sleep_or_wake(model_id, state, wake=True)


async def _sleep_or_wake(model_id: str, state: AppState, *, wake: bool) -> ModelStatus:
    engine = await state.engines.get(model_id, load=False)
    try:
        await (engine.wake() if wake else engine.sleep())
    except EngineError as error:
        raise from_engine_error(error) from error
    await state.engines.poll()
    return _status((await state.engines.status())[model_id])


@router.delete("/{model_id}", dependencies=[Depends(require("admin"))])
async def delete_model(model_id: str, state: StateDep) -> ModelDeleted:
    """Delete a checkpoint. Refused while an engine serves it."""
    state.engines.entry(model_id)
    status = (await state.engines.status())[model_id]
    if status.state != "unloaded":
        raise ApiError("model_in_use", f"model {model_id!r} is {status.state}: unload it first")
    await anyio.to_thread.run_sync(state.registry.delete, model_id)
    return ModelDeleted(id=model_id)
