"""POST /v1/embeddings: vectors of texts, from an encoder or from a decoder's pooled states."""

import asyncio
import base64
import secrets
import time
from typing import Annotated, Literal

import msgspec
import numpy as np
from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response
from pydantic import ConfigDict, Field, PlainValidator

from engines.protocol import AsyncEngine, EmbedRequest, EmbedResult, EngineError, EngineInfo
from service.auth import Identity
from service.deps import AppState, IdentityDep, RequestModel, ResponseModel, StateDep, require
from service.errors import ApiError, error_responses, from_engine_error
from service.generation_body import ModelField, check_token_id
from service.middleware import answer_in_time
from service.routes.completions import Prompts, parse_prompts, prompts_schema
from service.settings import DEFAULT_EMBEDDING_MODEL
from service.tokenizers import ModelText

router = APIRouter(
    prefix="/v1",
    tags=["openai"],
    dependencies=[Depends(require("inference"))],
    responses=error_responses(408, 409),
)
MAX_INPUTS = 2048


def _inputs(value: object) -> Prompts:
    return parse_prompts(value, name="input", most=MAX_INPUTS)


class EmbeddingsBody(RequestModel):
    """OpenAI's body, and how to pool and cut.

    A text gets the special tokens that the model expects around one; token ids are taken as they are. An input that is
    too long is refused, unless `truncate` says to keep its beginning.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"model": DEFAULT_EMBEDDING_MODEL, "input": ["a lathe", "a mill"]}]
        }
    )

    model: ModelField
    input: Annotated[Prompts, PlainValidator(_inputs), prompts_schema(MAX_INPUTS)]
    encoding_format: Literal["float", "base64"] | None = Field(
        default="float", description="base64 is of little-endian float32."
    )
    dimensions: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = Field(
        default=None, description="Only the model's own number is accepted."
    )
    user: Annotated[str, Field(max_length=512)] | None = Field(
        default=None, description="Accepted and not used."
    )
    pooling: Literal["default", "mean", "last"] | None = Field(
        default="default", description="Of a decoder's last hidden states; an encoder has its own."
    )
    normalize: bool | None = Field(default=True, description="Scale vectors to length 1.")
    truncate: bool | None = Field(default=False, description="Cut inputs that are too long.")


class Embedding(ResponseModel):
    index: int
    object: Literal["embedding"] = "embedding"
    embedding: list[float] | str


class EmbeddingsUsage(ResponseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingsResponse(ResponseModel):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingsUsage


@router.post("/embeddings", response_model=EmbeddingsResponse)
async def create_embeddings(
    body: EmbeddingsBody, request: Request, state: StateDep, identity: IdentityDep
) -> Response:
    """Turn texts into vectors, in their order."""
    work = _embed(body, state, identity)
    seconds = state.settings.request_timeout_seconds
    return await answer_in_time(request, work, seconds, "the embeddings")


async def _embed(body: EmbeddingsBody, state: AppState, identity: Identity) -> Response:
    started_at = time.monotonic()
    engine = await state.engines.get(body.model)
    info = engine.info
    _check_dimensions(body, info)
    text = await state.tokenizers.get(state.engines.entry(body.model))
    token_ids = [await _ids(body, index, text, info) for index in range(len(body.input))]
    result = await _ask(engine, body, identity, token_ids)
    num_tokens = sum(len(ids) for ids in token_ids)
    state.metrics.request_finished(
        body.model,
        "embeddings",
        finish_reason="stop",
        prompt_tokens=num_tokens,
        generation_tokens=0,
        e2e_seconds=time.monotonic() - started_at,
    )
    content = await asyncio.to_thread(_encode, body, result, num_tokens)
    return Response(content, media_type="application/json")


async def _ask(
    engine: AsyncEngine,
    body: EmbeddingsBody,
    identity: Identity,
    token_ids: list[tuple[int, ...]],
) -> EmbedResult:
    request = EmbedRequest(
        request_id=f"embd-{secrets.token_hex(12)}",
        token_ids=tuple(token_ids),
        pooling=body.pooling or "default",
        normalize=body.normalize is not False,
        tenant=identity.tenant,
    )
    try:
        return await engine.embed(request)
    except EngineError as error:
        raise from_engine_error(error) from error


def _check_dimensions(body: EmbeddingsBody, info: EngineInfo) -> None:
    if body.dimensions is not None and body.dimensions != info.hidden_size:
        raise ApiError(
            "unsupported_parameter",
            f"dimensions of {info.model!r} must be {info.hidden_size}, got {body.dimensions}",
            "dimensions",
        )
    for name in info.unsupported:
        if name in ("pooling", "normalize") and getattr(body, name) not in (None, "default", True):
            raise ApiError(
                "unsupported_parameter", f"{name} is not supported by {info.model!r}", name
            )


async def _ids(
    body: EmbeddingsBody, index: int, text: ModelText, info: EngineInfo
) -> tuple[int, ...]:
    """One input's token ids, whole or cut to the model's length.

    Raises:
        ApiError: context_length_exceeded, invalid_value.
    """
    given = body.input[index]
    param = "input" if len(body.input) == 1 else f"input[{index}]"
    limit = info.max_model_len
    if isinstance(given, str):
        before, after = text.tokenizer.special_prefix, text.tokenizer.special_suffix
        cut = given[: limit * text.tokenizer.max_token_chars] if body.truncate else given
        ids = tuple(await text.encode(cut, limit, param))
        if body.truncate:
            ids = ids[: limit - len(before) - len(after)]
        ids = (*before, *ids, *after)
    else:
        ids = given[:limit] if body.truncate else given
    if not ids:
        raise ApiError("invalid_value", "an input must have at least one token", param)
    if len(ids) > limit:
        raise ApiError(
            "context_length_exceeded",
            f"This model's maximum context length is {limit} tokens, however you requested {len(ids)} tokens. Please "
            "reduce the length of the input, or set truncate to true.",
            param,
        )
    check_token_id(max(ids), info, param)
    return ids


def _encode(body: EmbeddingsBody, result: EmbedResult, num_tokens: int) -> bytes:
    vectors = np.frombuffer(result.vectors, dtype="<f4").reshape(-1, result.dim)
    as_text = body.encoding_format == "base64"
    data = [
        {
            "index": index,
            "object": "embedding",
            "embedding": base64.b64encode(vector.tobytes()).decode()
            if as_text
            else vector.tolist(),
        }
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    return msgspec.json.encode(
        {"object": "list", "data": data, "model": body.model, "usage": usage}
    )
