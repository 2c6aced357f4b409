"""Builds the HTTP application: state, routes, error handlers, OpenAPI. Imports no torch."""

import asyncio
import contextlib
import errno
import importlib.metadata
import itertools
import logging
import re
import sqlite3
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route

from compression.registry import ModelNotFoundError, ModelRegistry
from compression.safetensors_header import CheckpointError
from engines.logs import set_up_logging
from engines.metering import EngineUse
from engines.protocol import EngineError
from engines.tracing import set_up_tracing, shut_down_tracing
from graph.cache import EnrichmentCache
from graph.store import GraphStore
from jobs.files import FileStore
from jobs.open import open_job_store
from jobs.usage import FLUSH_SECONDS, UsageStore
from service.auth import KeyStore, check_bind
from service.deps import AppState
from service.engine_pool import EnginePool
from service.enrichment import build_enricher, build_text_vectors
from service.errors import ApiError, from_engine_error, store_unavailable
from service.limits import RateLimits, open_buckets
from service.metrics import DiskCollector, EngineCollector, JobCollector, Metrics
from service.middleware import RequestMiddleware
from service.quotas import Quotas
from service.routes import (
    batches,
    chat,
    completions,
    embeddings,
    enrich,
    files,
    fine_tuning,
    graph_query,
    graph_sampling,
    graphs,
    health,
    jobs,
    models,
    prompts,
    score,
    tokenize,
    usage,
)
from service.settings import Settings
from service.supervisor_client import SupervisorClient
from service.tokenizers import TokenizerCache

logger = logging.getLogger("lathe")
ROUTERS = (
    health.router,
    models.router,
    completions.router,
    chat.router,
    embeddings.router,
    score.router,
    tokenize.router,
    jobs.router,
    files.router,
    fine_tuning.router,
    batches.router,
    graphs.router,
    graph_query.router,
    graph_sampling.router,
    enrich.router,
    prompts.router,
    usage.router,
)
_ERROR_SCHEMA = {"$ref": "#/components/schemas/ErrorResponse"}
OPEN_ROUTES = frozenset({"/health", "/ready", "/metrics", "/version"})


def build_state(settings: Settings) -> AppState:
    """Open everything that the application works with."""
    registry = ModelRegistry(settings.models_dir)
    redis_url = settings.redis_url.get_secret_value() if settings.redis_url else None
    keys = KeyStore(settings.keys_file)
    limits = RateLimits(keys, settings, open_buckets(settings.limits_database, redis_url))
    supervisor = SupervisorClient(settings.supervisor_socket)
    used = UsageStore(settings.usage_database)

    def meter(use: EngineUse) -> None:
        limits.charge(use.tenant, use.prompt_tokens + use.completion_tokens)
        used.used(use)

    tokenizers = TokenizerCache()
    # A tokenizer is read in most of a second in which little else gets on, so not when the first request comes.
    engines = EnginePool(settings, registry, supervisor, meter, prepare=tokenizers.get)
    metrics = Metrics()
    cache = EnrichmentCache(settings.cache_database)
    job_store = open_job_store(settings.database, redis_url)
    file_store = FileStore(settings.files_dir)
    graph_store = GraphStore(settings.graphs_dir)
    state = AppState(
        settings=settings,
        registry=registry,
        engines=engines,
        jobs=job_store,
        files=file_store,
        keys=keys,
        metrics=metrics,
        tokenizers=tokenizers,
        graphs=graph_store,
        cache=cache,
        enricher=build_enricher(engines, tokenizers, cache, metrics, used),
        text_vectors=build_text_vectors(engines, tokenizers, cache),
        limits=limits,
        usage=used,
        quotas=Quotas(
            settings, limits, jobs=job_store, files=file_store, graphs=graph_store, models=registry
        ),
        started_at=time.time(),
    )

    def sizes() -> dict[str, tuple[int, int, float | None]]:
        return {
            entry.id: (
                entry.manifest.parameters,
                entry.manifest.tensor_bytes,
                entry.manifest.ratios.get("bytes"),
            )
            for entry in registry.list_models()
        }

    metrics.registry.register(
        EngineCollector(engines.snapshot, sizes, engines.restarts, engines.readiness)
    )
    metrics.registry.register(DiskCollector(settings.home))
    metrics.registry.register(JobCollector(state.jobs.counts, state.jobs.worker_ages))
    return state


def build_app(settings: Settings) -> FastAPI:
    """The application. Its state is at `app.state.lathe`; nothing runs before the lifespan starts."""
    state = build_state(settings)
    limits, used = state.limits, state.usage
    assert limits is not None, "build_state made them"
    assert used is not None, "build_state made it"

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        set_up_logging(settings.log_level)
        set_up_tracing("api", settings.otlp_endpoint)
        notice = check_bind(settings.host, state.keys)
        if notice is not None:
            logger.warning(notice)
        await asyncio.to_thread(check_default_skips, settings, state.registry)
        await state.engines.start()
        flushing = asyncio.create_task(_flush_for_ever(used), name="usage")
        try:
            yield
        finally:
            flushing.cancel()
            await state.engines.aclose()
            await asyncio.to_thread(state.cache.close)
            state.jobs.close()
            await asyncio.to_thread(limits.close)
            await asyncio.to_thread(used.close)
            await asyncio.to_thread(shut_down_tracing)

    app = FastAPIOffline(  # /docs comes with its scripts
        title="Lathe",
        redoc_url=None,  # shows a picture from its makers' host
        version=importlib.metadata.version("lathe"),
        description="Compresses, serves and finetunes language models, and lends them to graph jobs.",
        lifespan=lifespan,
        generate_unique_id_function=_operation_id,
        redirect_slashes=False,  # where to would be built from the Host header
        # Traces are `engines/tracing.py`'s; FastAPI's own would send what a client wrote.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    app.state.lathe = state
    for router in ROUTERS:
        app.include_router(router)
    handle_errors(app)
    app.add_middleware(
        RequestMiddleware,
        settings=settings,
        keys=state.keys,
        metrics=state.metrics,
        drain=state.drain,
    )
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


async def _flush_for_ever(used: UsageStore) -> None:
    while True:
        await asyncio.sleep(FLUSH_SECONDS)
        await asyncio.to_thread(used.flush)


def check_default_skips(settings: Settings, registry: ModelRegistry) -> None:
    """A default that a model cannot honour would refuse every request that does not mention it.

    Raises:
        ValueError: a registered model has no such skip profile.
    """
    for model, skip in settings.skip.items():
        try:
            profile = registry.get(model).manifest.skip_profile
        except ModelNotFoundError:
            continue  # it may be made later
        if skip.mode == "off":
            continue
        if profile is None:
            raise ValueError(f"skip: {model} has no skip profile; a calibrate_skip job makes one")
        try:
            profile.tau(skip.target_ratio)
        except ValueError as error:
            raise ValueError(f"skip: {model}: {error}") from None


def _operation_id(route: APIRoute) -> str:
    return route.name


def _respond(error: ApiError, extra: dict[str, str] | None = None) -> JSONResponse:
    headers = error.headers() | (extra or {})
    return JSONResponse(error.body(), status_code=error.status, headers=headers)


def handle_errors(app: FastAPI) -> None:
    """Turn every exception that can leave a route into the one error shape."""

    def api_error(_: Request, error: Any) -> JSONResponse:
        return _respond(error)

    def engine_error(_: Request, error: Any) -> JSONResponse:
        return _respond(from_engine_error(error))

    def validation_error(_: Request, error: Any) -> JSONResponse:
        return _respond(from_validation_error(error))

    def http_error(request: Request, error: Any) -> JSONResponse:
        headers = dict(error.headers or {})
        if error.status_code == 405:
            allowed = _allowed(app, request) or {"GET", "HEAD"}  # no route: a file of the API page
            headers["Allow"] = ", ".join(sorted(allowed))
        return _respond(_from_http(request, error), headers)

    def disk_error(_: Request, error: Any) -> JSONResponse:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise error
        logger.error("the disk is full", exc_info=error)
        return _respond(ApiError("disk_full", "the disk is full; nothing was kept"))

    def store_error(_: Request, error: Any) -> JSONResponse:
        if getattr(error, "sqlite_errorname", None) == "SQLITE_FULL":
            return disk_error(_, OSError(errno.ENOSPC, str(error)))
        logger.error("a store does not answer", exc_info=error)
        return _respond(store_unavailable())

    def checkpoint_error(_: Request, error: Any) -> JSONResponse:
        logger.error("unsound checkpoint", exc_info=error)
        return _respond(ApiError("model_load_failed", "the model's checkpoint is unsound"))

    def recursion_error(_: Request, error: Any) -> JSONResponse:
        logger.warning("a body nested too deep", exc_info=error)
        return _respond(ApiError("invalid_json", "the body is nested too deep"))

    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(RecursionError, recursion_error)
    app.add_exception_handler(EngineError, engine_error)
    app.add_exception_handler(RequestValidationError, validation_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(CheckpointError, checkpoint_error)
    app.add_exception_handler(OSError, disk_error)
    app.add_exception_handler(sqlite3.OperationalError, store_error)
    with contextlib.suppress(ImportError):
        from redis.exceptions import RedisError

        app.add_exception_handler(RedisError, store_error)


def from_validation_error(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong, with the path of the field, without echoing the input."""
    first = error.errors()[0]
    location = [part for part in first["loc"] if part not in ("body", "query", "path", "header")]
    if first["type"] == "json_invalid":
        return ApiError("invalid_json", "the body is not valid JSON")
    # pydantic names the branches of a union in the path; a client only knows its own field names
    names = [p for p in location if isinstance(p, int) or re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", p)]
    param = ""
    for part in names:
        param += f"[{part}]" if isinstance(part, int) else (f".{part}" if param else part)
    if first["type"] == "extra_forbidden":
        return ApiError("unsupported_parameter", "this parameter is not supported here", param)
    return ApiError("invalid_value", str(first["msg"])[:300], param or None)


def _from_http(request: Request, error: HTTPException) -> ApiError:
    if error.status_code == 404:
        return ApiError("not_found", "there is no such route")
    if error.status_code == 405:
        return ApiError("method_not_allowed", f"{request.method} is not allowed here")
    if error.status_code == 400:
        return ApiError("invalid_json", "the body could not be read")
    if error.status_code == 413:
        return ApiError("request_too_large", "the upload is too large")
    return ApiError("internal_error", "internal error")


def _allowed(app: FastAPI, request: Request) -> set[str]:
    """Methods of this path; Starlette names only those of the first route that has the path."""
    # The application's own list has a router in one piece.
    included = (route for router in ROUTERS for route in router.routes)
    routes = (route for route in itertools.chain(app.routes, included) if isinstance(route, Route))
    matching = (route for route in routes if route.matches(request.scope)[0] != Match.NONE)
    return {method for route in matching for method in route.methods or ()}


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's schema, without the 422 that we never send, with the bearer key that most routes need."""
    if app.openapi_schema is None:
        schema = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes
        )
        schema["components"].setdefault("securitySchemes", {})["bearer"] = {
            "type": "http",
            "scheme": "bearer",
        }
        for path, item in schema["paths"].items():
            for operation in item.values():
                responses = operation["responses"]
                responses.pop("422", None)
                for status, response in responses.items():
                    if status >= "400":  # FastAPI gives them the media type of the route's answer
                        response["content"] = {"application/json": {"schema": _ERROR_SCHEMA}}
                if path not in OPEN_ROUTES:
                    operation["security"] = [{"bearer": []}, {}]
        for name in ("HTTPValidationError", "ValidationError"):
            schema["components"]["schemas"].pop(name, None)
        app.openapi_schema = schema
    return app.openapi_schema
