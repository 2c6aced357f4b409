"""Is the process alive, is the service ready, what does it measure, which version is it. Open without a key."""

import importlib.metadata
from typing import Annotated, Literal

import anyio
from fastapi import APIRouter, Depends, Response
from fastapi.responses import JSONResponse, PlainTextResponse

from service.deps import AppState, ResponseModel, StateDep, get_state
from service.errors import ApiError, error_responses
from service.metrics import CONTENT_TYPE

router = APIRouter(tags=["health"], responses=error_responses())


class Health(ResponseModel):
    status: Literal["ok"] = "ok"


class ModelReadiness(ResponseModel):
    state: str
    ready: bool
    restarts: int
    error: str | None


class Ready(ResponseModel):
    status: Literal["ready"]
    models: dict[str, ModelReadiness]


class Version(ResponseModel):
    name: Literal["lathe"] = "lathe"
    version: str


@router.get("/health")
async def health() -> Health:
    """The process lives. Asks nobody: it answers while models load."""
    return Health()


@router.get("/ready", response_model=Ready)
async def ready(state: StateDep) -> Response:
    """200 when every wanted model gave a token or a vector lately and the job store answers, else 503."""
    statuses = await state.engines.status()
    wanted = await state.engines.wanted()
    models = {
        name: ModelReadiness(
            state=s.state, ready=s.ready, restarts=s.restarts, error=s.error and s.error[:300]
        )
        for name, s in statuses.items()
        if name in wanted
    }
    missing = sorted(wanted - models.keys())
    not_ready = missing + [name for name, model in models.items() if not model.ready]
    if not wanted:
        not_ready = ["no model is loaded"]
    await anyio.to_thread.run_sync(state.jobs.counts)
    if not_ready:
        error = ApiError("model_loading", f"not ready: {', '.join(not_ready)}")
        content = error.body() | {"models": {n: m.model_dump() for n, m in models.items()}}
        return JSONResponse(content, status_code=error.status, headers=error.headers())
    return JSONResponse(Ready(status="ready", models=models).model_dump())


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(state: Annotated[AppState, Depends(get_state)]) -> Response:
    """Prometheus' text format. Open, as scrapers expect; it holds no ids but those of registered models."""
    body = await anyio.to_thread.run_sync(state.metrics.render)
    return Response(body, media_type=CONTENT_TYPE)


@router.get("/version")
async def version() -> Version:
    return Version(version=importlib.metadata.version("lathe"))
