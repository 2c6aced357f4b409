"""What a key has used and what the cache has saved it."""

import asyncio
from dataclasses import asdict
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import Field

from jobs.usage import Counters, UsageOperation, seconds_per_token, total
from service.deps import IdentityDep, ResponseModel, StateDep
from service.errors import ApiError, error_responses
from service.quotas import Quotas

router = APIRouter(prefix="/v1/usage", tags=["usage"], responses=error_responses())


class UsageCounters(ResponseModel):
    """`requests` are those to engines, of which a request over HTTP may make several; of `enrich`, enrichments."""

    requests: int
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prefix_hit_tokens: int = Field(description="Of the prompts, computed before by the engine.")
    device_seconds: float = Field(description="Share of the time that engines were busy.")
    items: int = Field(description="Nodes of enrichments.")
    cached_items: int = Field(description="Nodes that no engine worked for.")
    cached_tokens: int = Field(description="What enrichments would have cost without the cache.")


class UsageEntry(UsageCounters):
    key_id: str
    model: str
    operation: UsageOperation


class UsageTotal(UsageCounters):
    """Money by the server's `cost_per_million_tokens`; null where it names none."""

    cost: float | None
    saved_device_seconds: float = Field(
        description="Of the cached tokens, at the speed that their models had so far."
    )
    saved_cost: float | None


class Quota(ResponseModel):
    used: float
    limit: int | None


class UsageQuotas(ResponseModel):
    job_seconds: Quota = Field(description="That jobs held a worker in the last 24 hours.")
    disk_bytes: Quota = Field(
        description="Of files, graphs and jobs, and of the models and projectors that jobs made."
    )


class UsageObject(ResponseModel):
    object: Literal["usage"] = "usage"
    key_id: str | None = Field(description="Null: of all keys.")
    since: str | None
    quotas: UsageQuotas | None = Field(description="Null where all keys were asked for.")
    total: UsageTotal
    data: list[UsageEntry]


@router.get("")
async def get_usage(
    state: StateDep,
    identity: IdentityDep,
    all_keys: Annotated[bool, Query(description="Of every key; for admins.")] = False,
    since: Annotated[
        str | None, Query(pattern=r"^\d{4}-\d{2}-\d{2}$", description="A day, UTC.")
    ] = None,
) -> UsageObject:
    """Tokens, device time, enriched nodes and what the cache saved: yours, by model and operation.

    Whatever an engine did is counted, for chats and completions as well as for enrichments and their jobs.
    """
    if all_keys and not identity.is_admin:
        raise ApiError("insufficient_scope", "only admins see the usage of all keys", "all_keys")
    store = state.usage
    assert store is not None, "build_state made it"
    everything = await asyncio.to_thread(store.read, None, since)
    rows = everything if all_keys else [r for r in everything if r.key_id == identity.key_id]
    counters = total(rows)
    saved = sum(
        row.counters.cached_tokens * (seconds_per_token(everything, row.model) or 0.0)
        for row in rows
    )
    price = state.settings.cost_per_million_tokens

    def cost(num_tokens: int) -> float | None:
        return None if price is None else num_tokens * price / 1e6

    return UsageObject(
        key_id=None if all_keys else identity.key_id,
        since=since,
        quotas=None
        if all_keys
        else await asyncio.to_thread(_quotas, state.quotas, identity.tenant),
        total=UsageTotal(
            **_json(counters),
            cost=cost(counters.prompt_tokens + counters.completion_tokens),
            saved_device_seconds=saved,
            saved_cost=cost(counters.cached_tokens),
        ),
        data=[
            UsageEntry(
                key_id=row.key_id, model=row.model, operation=row.operation, **_json(row.counters)
            )
            for row in rows
        ],
    )


def _quotas(quotas: Quotas | None, owner: str) -> UsageQuotas:
    assert quotas is not None, "build_state made it"
    return UsageQuotas(
        job_seconds=Quota(
            used=quotas.job_seconds(owner), limit=quotas.seconds_limit(owner) or None
        ),
        disk_bytes=Quota(used=quotas.disk_bytes(owner), limit=quotas.disk_limit(owner) or None),
    )


def _json(counters: Counters) -> dict[str, Any]:
    num_tokens = counters.prompt_tokens + counters.completion_tokens
    return {**asdict(counters), "total_tokens": num_tokens}
