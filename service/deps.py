"""What routes ask FastAPI for: the application's state, and who is asking."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Depends, Header, Request
from pydantic import BaseModel, ConfigDict

from compression.registry import ModelRegistry
from jobs.files import FileStore
from jobs.store import JobStore
from jobs.usage import UsageStore
from service.auth import Identity, KeyStore, Role, authenticate
from service.drain import Drain
from service.engine_pool import EnginePool
from service.errors import ApiError
from service.job_feeds import JobFeeds
from service.limits import RateLimits
from service.metrics import Metrics
from service.settings import Settings
from service.tokenizers import TokenizerCache

if TYPE_CHECKING:
    from graph.cache import EnrichmentCache
    from graph.enrich import Enricher
    from graph.store import GraphStore
    from graph.text_vectors import TextVectors
    from service.quotas import Quotas


UPLOADS_AT_ONCE = 2
"""Graphs that are decoded at one time: each fills memory with up to twice its decoded size."""


@dataclass(slots=True, kw_only=True)
class AppState:
    """Everything that lives as long as the application."""

    settings: Settings
    registry: ModelRegistry
    engines: EnginePool
    jobs: JobStore
    files: FileStore
    keys: KeyStore
    metrics: Metrics
    tokenizers: TokenizerCache
    graphs: "GraphStore"
    cache: "EnrichmentCache"
    enricher: "Enricher"
    text_vectors: "TextVectors"
    limits: RateLimits | None = None
    usage: UsageStore | None = None
    quotas: "Quotas | None" = None
    started_at: float = field(default=0.0)
    drain: Drain = field(default_factory=Drain)
    uploads: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(UPLOADS_AT_ONCE))
    feeds: JobFeeds = field(init=False)

    def __post_init__(self) -> None:
        self.feeds = JobFeeds(self.jobs)


class RequestModel(BaseModel):
    """Base of every request body: no unknown field, no coercion ("5" and true are no numbers), no NaN."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=()
    )


class ResponseModel(BaseModel):
    model_config = ConfigDict(protected_namespaces=())


async def get_state(request: Request) -> AppState:
    # as of all dependencies here: those that are no coroutines would each be a trip to a thread
    state: AppState = request.app.state.lathe
    return state


StateDep = Annotated[AppState, Depends(get_state)]


async def identify(request: Request, state: StateDep) -> AsyncGenerator[Identity, None]:
    """Who asks; until the whole answer is sent, the request is one of those that the key has under way.

    Raises:
        ApiError: invalid_api_key, rate_limit_exceeded.
    """
    identity = authenticate(state.keys, request.scope["headers"])
    request.state.identity = identity
    if state.limits is None:
        yield identity
        return
    with state.limits.one_more(identity.key_id):
        yield identity


IdentityDep = Annotated[Identity, Depends(identify)]


def require(role: Role) -> Callable[[Request, AppState, Identity], Awaitable[Identity]]:
    """A dependency that lets only keys with `role` pass, and counts what they ask for; looking costs nothing."""

    async def check(request: Request, state: StateDep, identity: IdentityDep) -> Identity:
        if not identity.may(role):
            raise ApiError("insufficient_scope", f"this needs a key with role {role!r}")
        if state.limits is not None and request.method not in ("GET", "HEAD"):
            headers: dict[str, str] = {}
            request.state.headers = headers
            await state.limits.admit(identity, headers, costs_tokens=role == "inference")
        return identity

    return check


IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        description="Creating twice with one key and body creates once.",
        pattern=r"^[ -~]{1,255}$",
    ),
]


def standalone_schema(model: type[BaseModel]) -> dict[str, Any]:
    """A model's JSON Schema with its definitions in place, for `openapi_extra`."""
    schema: dict[str, Any] = model.model_json_schema()
    definitions = schema.pop("$defs", {})

    def resolve(part: Any) -> Any:
        if isinstance(part, dict):
            if "$ref" in part:
                return resolve(definitions[part["$ref"].rsplit("/", 1)[1]])
            return {key: resolve(value) for key, value in part.items()}
        return [resolve(item) for item in part] if isinstance(part, list) else part

    resolved: dict[str, Any] = resolve(schema)
    return resolved
