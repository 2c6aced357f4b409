"""POST /v1/score: log-probabilities of given continuations; what classification and likelihood evaluations need.

Context and continuation are tokenized as lm-eval does (`TemplateLM._encode_pair`, 0.4.13): white space at the end of
the context moves to the continuation, both are encoded together, and the continuation is what follows the number of
tokens that the context has alone.
"""

import math
import secrets
import time
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response
from pydantic import ConfigDict, Field, PlainValidator, WithJsonSchema, model_validator

from engines.protocol import AsyncEngine, EngineError, EngineInfo, ScoreRequest, ScoreResult
from service.auth import Identity
from service.deps import AppState, IdentityDep, RequestModel, ResponseModel, StateDep, require
from service.errors import ApiError, error_responses, from_engine_error
from service.generation import finite, json_response
from service.generation_body import (
    MAX_PROMPT_TOKENS,
    MAX_TOKEN_ID,
    ModelField,
    absent,
    check_text,
    check_token_id,
    invalid,
    is_token_id,
    present,
)
from service.middleware import answer_in_time
from service.settings import DEFAULT_MODEL
from service.tokenizers import ModelText

router = APIRouter(
    prefix="/v1",
    tags=["text"],
    dependencies=[Depends(require("inference"))],
    responses=error_responses(408, 409),
)
MAX_ITEMS = 256
MAX_CONTINUATIONS = 256
TextOrIds = str | tuple[int, ...]


def _text_or_ids(value: object) -> TextOrIds:
    if isinstance(value, str) and value:
        return check_text(value)
    if isinstance(value, list) and len(value) > MAX_PROMPT_TOKENS:
        raise invalid(f"at most {MAX_PROMPT_TOKENS} token ids, got {len(value)}")
    if isinstance(value, list) and value and all(map(is_token_id, value)):
        return tuple(value)
    raise invalid("must be a string or a list of token ids, and not empty")


TextOrIdsField = Annotated[
    TextOrIds,
    PlainValidator(_text_or_ids),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1},
                {
                    "type": "array",
                    "items": {"type": "integer", "minimum": 0, "maximum": MAX_TOKEN_ID},
                    "minItems": 1,
                },
            ]
        }
    ),
]
Continuations = Annotated[list[TextOrIdsField], Field(min_length=1, max_length=MAX_CONTINUATIONS)]


class ScoreItem(RequestModel):
    context: TextOrIdsField
    continuations: Continuations


class ScoreBody(RequestModel):
    """One context with its continuations, or several as `items`. Context and continuations are of one kind."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": DEFAULT_MODEL,
                    "context": "Question: Is the sky blue?\nAnswer:",
                    "continuations": [" yes", " no"],
                }
            ],
            "oneOf": [
                {"allOf": [present("context"), present("continuations"), absent("items")]},
                {"allOf": [present("items"), absent("context"), absent("continuations")]},
            ],
        }
    )

    model: ModelField
    context: TextOrIdsField | None = None
    continuations: Continuations | None = None
    items: Annotated[list[ScoreItem], Field(min_length=1, max_length=MAX_ITEMS)] | None = None
    add_special_tokens: bool = Field(
        default=True, description="Begin a text context as the model expects (a Llama's BOS)."
    )
    return_token_logprobs: bool = False

    @model_validator(mode="after")
    def _check(self) -> "ScoreBody":
        if self.items is not None:
            if self.context is not None or self.continuations is not None:
                raise ApiError("invalid_value", "give items, or context and continuations", "items")
        else:
            for name in ("context", "continuations"):
                if getattr(self, name) is None:
                    raise ApiError("invalid_value", f"{name} is needed without items", name)
        return self

    def pairs(self) -> list[tuple[str, ScoreItem]]:
        """Items, and what their fields are called in this request."""
        if self.items is not None:
            return [(f"items[{index}].", item) for index, item in enumerate(self.items)]
        assert self.context is not None
        assert self.continuations is not None
        item = ScoreItem.model_construct(context=self.context, continuations=self.continuations)
        return [("", item)]


class Score(ResponseModel):
    index: int
    logprob: float = Field(description="Sum over the tokens, natural logarithm.")
    is_greedy: bool = Field(description="Every token was the likeliest at its place.")
    num_tokens: int
    token_logprobs: list[float] | None = Field(description="null unless asked for.")


class ScoredItem(ResponseModel):
    index: int
    object: Literal["score"] = "score"
    scores: list[Score]
    probabilities: list[float] = Field(
        description="exp(logprob), scaled so that the item's continuations sum to 1."
    )


class ScoreUsage(ResponseModel):
    prompt_tokens: int
    total_tokens: int


class ScoreResponse(ResponseModel):
    object: Literal["list"] = "list"
    model: str
    data: list[ScoredItem]
    usage: ScoreUsage


@router.post("/score", response_model=ScoreResponse)
async def create_scores(
    body: ScoreBody, request: Request, state: StateDep, identity: IdentityDep
) -> Response:
    """How likely each continuation is after its context. Nothing is generated."""
    work = _score(body, state, identity)
    seconds = state.settings.request_timeout_seconds
    return await answer_in_time(request, work, seconds, "scoring")


async def _score(body: ScoreBody, state: AppState, identity: Identity) -> Response:
    started_at = time.monotonic()
    engine = await state.engines.get(body.model)
    if engine.info.kind != "decoder":
        raise ApiError("invalid_value", f"{body.model!r} is an encoder: it cannot score", "model")
    text = await state.tokenizers.get(state.engines.entry(body.model))
    requests = [
        await _engine_request(body, where, item, text, engine.info, identity)
        for where, item in body.pairs()
    ]
    results = await _ask(engine, requests)
    num_tokens = sum(result.num_tokens for result in results)
    state.metrics.request_finished(
        body.model,
        "score",
        finish_reason="stop",
        prompt_tokens=num_tokens,
        generation_tokens=0,
        e2e_seconds=time.monotonic() - started_at,
    )
    return json_response(
        ScoreResponse(
            model=body.model,
            data=[_item(index, result, body) for index, result in enumerate(results)],
            usage=ScoreUsage(prompt_tokens=num_tokens, total_tokens=num_tokens),
        )
    )


async def _ask(engine: AsyncEngine, requests: list[ScoreRequest]) -> list[ScoreResult]:
    """One after the other, so that one client's many items leave room for others."""
    try:
        return [await engine.score(request) for request in requests]
    except EngineError as error:
        raise from_engine_error(error) from error


async def _engine_request(
    body: ScoreBody,
    where: str,
    item: ScoreItem,
    text: ModelText,
    info: EngineInfo,
    identity: Identity,
) -> ScoreRequest:
    """Raises: ApiError: mixed kinds, an empty continuation, a pair that does not fit."""
    context_ids: list[int] | None = None
    continuations: list[tuple[int, ...]] = []
    for index, continuation in enumerate(item.continuations):
        param = f"{where}continuations[{index}]"
        if isinstance(item.context, str) and isinstance(continuation, str):
            context_ids, ids = await _split(
                text, item.context, continuation, info.max_model_len, param
            )
            if body.add_special_tokens:
                context_ids = [*text.tokenizer.special_prefix, *context_ids]
        elif isinstance(item.context, tuple) and isinstance(continuation, tuple):
            context_ids, ids = list(item.context), list(continuation)
        else:
            raise ApiError(
                "invalid_value",
                "context and continuation must both be text or both token ids",
                param,
            )
        _check(context_ids, ids, info, f"{where}context", param)
        continuations.append(tuple(ids))
    assert context_ids is not None, "there is at least one continuation"
    return ScoreRequest(
        request_id=f"score-{secrets.token_hex(12)}",
        context_ids=tuple(context_ids),
        continuation_ids=tuple(continuations),
        tenant=identity.tenant,
    )


async def _split(
    text: ModelText, context: str, continuation: str, max_tokens: int, param: str
) -> tuple[list[int], list[int]]:
    """Token ids of a context and of what follows it."""
    stripped = context.rstrip()
    context_ids = await text.encode(stripped, max_tokens, param)
    whole_ids = await text.encode(context + continuation, max_tokens, param)
    return context_ids, whole_ids[len(context_ids) :]


def _check(
    context_ids: list[int], ids: list[int], info: EngineInfo, context_param: str, param: str
) -> None:
    if not context_ids:
        raise ApiError(
            "invalid_value",
            "the context must have at least one token that is not white space",
            context_param,
        )
    if not ids:
        raise ApiError("invalid_value", "the continuation adds no token to the context", param)
    if len(context_ids) + len(ids) > info.max_model_len:
        raise ApiError(
            "context_length_exceeded",
            f"This model's maximum context length is {info.max_model_len} tokens. However, the context and this "
            f"continuation have {len(context_ids) + len(ids)} tokens. Please reduce their length.",
            param,
        )
    check_token_id(max(context_ids), info, context_param)
    check_token_id(max(ids), info, param)


def _item(index: int, result: ScoreResult, body: ScoreBody) -> ScoredItem:
    logprobs = [finite(score.logprob) for score in result.scores]
    highest = max(logprobs)
    weights = [math.exp(logprob - highest) for logprob in logprobs]
    return ScoredItem(
        index=index,
        scores=[
            Score(
                index=position,
                logprob=logprobs[position],
                is_greedy=score.is_greedy,
                num_tokens=len(score.token_logprobs),
                token_logprobs=[finite(value) for value in score.token_logprobs]
                if body.return_token_logprobs
                else None,
            )
            for position, score in enumerate(result.scores)
        ],
        probabilities=[weight / sum(weights) for weight in weights],
    )
