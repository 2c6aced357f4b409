"""POST /v1/score: log-probabilities of given continuations: classification, multiple choice, lm-eval."""

import math
import secrets
import time
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Request
from pydantic import Field

from engines.protocol import EngineError, ScoreRequest
from service.deps import IdentityDep, RequestModel, ResponseModel, StateDep, require
from service.errors import ApiError, error_responses, from_engine_error
from service.generation import Token
from service.middleware import cancel_on_disconnect
from service.tokenizers import ModelText

router = APIRouter(
    prefix="/v1",
    tags=["text"],
    dependencies=[Depends(require("inference"))],
    responses=error_responses(408, 409),
)
MAX_CONTINUATIONS = 256
TokenIds = Annotated[list[Token], Field(min_length=1)]
Text = Annotated[str, Field(min_length=1)] | TokenIds


class ScoreBody(RequestModel):
    """Texts are tokenized together and split where the context ends, so a continuation keeps its leading space."""

    model: str = Field(max_length=200)
    context: Text
    continuations: list[Text] = Field(min_length=1, max_length=MAX_CONTINUATIONS)


class Score(ResponseModel):
    """`probability` is the softmax of the sums over the continuations of the request."""

    index: int
    logprob: float
    probability: float
    is_greedy: bool
    num_tokens: int
    token_logprobs: list[float]


class ScoreUsage(ResponseModel):
    prompt_tokens: int
    total_tokens: int


class ScoreList(ResponseModel):
    object: Literal["list"] = "list"
    model: str
    data: list[Score]
    usage: ScoreUsage


@router.post("/score")
async def create_score(
    body: ScoreBody, request: Request, state: StateDep, identity: IdentityDep
) -> ScoreList:
    """Score continuations of one context."""
    engine = await state.engines.get(body.model)
    if engine.info.kind != "decoder":
        raise ApiError("invalid_value", f"model {body.model!r} cannot score", "model")
    started = time.monotonic()
    text = await state.tokenizers.get(state.engines.entry(body.model))
    context, continuations = await _encode(body, text, engine.info.max_model_len)
    score_request = ScoreRequest(
        request_id=f"score-{secrets.token_hex(8)}",
        context_ids=context,
        continuation_ids=continuations,
        tenant=identity.tenant,
    )
    try:
        result = await cancel_on_disconnect(request, engine.score(score_request))
    except EngineError as error:
        raise from_engine_error(error) from error
    state.metrics.request_finished(
        body.model,
        "score",
        finish_reason="stop",
        prompt_tokens=result.num_tokens,
        generation_tokens=0,
        e2e_seconds=time.monotonic() - started,
    )
    highest = max(score.logprob for score in result.scores)
    weights = [math.exp(score.logprob - highest) for score in result.scores]
    data = [
        Score(
            index=index,
            logprob=score.logprob,
            probability=weight / sum(weights),
            is_greedy=score.is_greedy,
            num_tokens=len(score.token_logprobs),
            token_logprobs=list(score.token_logprobs),
        )
        for index, (score, weight) in enumerate(zip(result.scores, weights, strict=True))
    ]
    usage = ScoreUsage(prompt_tokens=result.num_tokens, total_tokens=result.num_tokens)
    return ScoreList(model=body.model, data=data, usage=usage)


async def _encode(
    body: ScoreBody, text: ModelText, limit: int
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    if isinstance(body.context, list):
        context = body.context
    else:
        context = await text.encode(body.context, limit, "context")
    if not context:
        raise ApiError("invalid_value", "the context must have at least one token", "context")
    continuations = []
    for index, one in enumerate(body.continuations):
        param = f"continuations[{index}]"
        if isinstance(one, list):
            ids = one
        elif isinstance(body.context, str):
            ids = (await text.encode(body.context + one, limit, param))[len(context) :]
        else:
            ids = await text.encode(one, limit, param)
        if not ids:
            raise ApiError("invalid_value", "a continuation must add at least one token", param)
        continuations.append(tuple(ids))
    return tuple(context), tuple(continuations)
