"""POST /v1/embeddings: texts to vectors, by a sentence encoder or by a language model's pooled states."""

import base64
import secrets
import time
from typing import Annotated, Literal

import numpy as np
from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response
from pydantic import Field

from engines.protocol import EmbedRequest, EngineError
from service.deps import IdentityDep, RequestModel, ResponseModel, StateDep, require
from service.errors import ApiError, error_responses, from_engine_error
from service.generation import Token
from service.middleware import cancel_on_disconnect

router = APIRouter(
    prefix="/v1",
    tags=["openai"],
    dependencies=[Depends(require("inference"))],
    responses=error_responses(408, 409),
)
MAX_INPUTS = 2048
TokenIds = Annotated[list[Token], Field(min_length=1)]


class EmbeddingRequest(RequestModel):
    """`truncate` cuts long inputs to what the model holds; without it they are refused. `pooling` is for decoders."""

    model: str = Field(max_length=200)
    input: (
        Annotated[str, Field(min_length=1)]
        | TokenIds
        | Annotated[
            list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=MAX_INPUTS)
        ]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_INPUTS)]
    )
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(default=None, ge=1)
    user: str | None = Field(default=None, max_length=512)
    truncate: bool = False
    pooling: Literal["default", "mean", "last"] = "default"


class Embedding(ResponseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(ResponseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(ResponseModel):
    object: Literal["list"] = "list"
    model: str
    data: list[Embedding]
    usage: EmbeddingUsage


@router.post("/embeddings", response_model=EmbeddingList)
async def create_embeddings(
    body: EmbeddingRequest, request: Request, state: StateDep, identity: IdentityDep
) -> Response:
    """Embed texts; vectors have unit L2 norm."""
    engine = await state.engines.get(body.model)
    if body.dimensions not in (None, engine.info.hidden_size):
        raise ApiError(
            "unsupported_parameter",
            f"model {body.model!r} gives {engine.info.hidden_size} dimensions and no other number",
            "dimensions",
        )
    started = time.monotonic()
    text = await state.tokenizers.get(state.engines.entry(body.model))
    limit = engine.info.max_model_len
    special = engine.info.kind == "encoder"
    given = [body.input] if isinstance(body.input, str) else body.input
    if given and isinstance(given[0], int):
        given = [given]  # type: ignore[list-item]
    token_ids = []
    for one in given:
        if isinstance(one, str):
            ids = await text.encode(one, 2**20, "input", add_special_tokens=special)
            if body.truncate and len(ids) > limit:
                ids = [*ids[: limit - 1], ids[-1]] if special else ids[:limit]
        else:
            assert isinstance(one, list)
            ids = one[:limit] if body.truncate else one
        token_ids.append(tuple(ids))
    embed_request = EmbedRequest(
        request_id=f"embd-{secrets.token_hex(8)}",
        token_ids=tuple(token_ids),
        pooling=body.pooling,
        tenant=identity.tenant,
    )
    try:
        result = await cancel_on_disconnect(request, engine.embed(embed_request))
    except EngineError as error:
        raise from_engine_error(error) from error
    state.metrics.request_finished(
        body.model,
        "embeddings",
        finish_reason="stop",
        prompt_tokens=result.num_tokens,
        generation_tokens=0,
        e2e_seconds=time.monotonic() - started,
    )
    vectors = np.frombuffer(result.vectors, dtype="<f4").reshape(-1, result.dim)
    data = []
    for index, vector in enumerate(vectors):
        value: list[float] | str = vector.tolist()
        if body.encoding_format == "base64":
            value = base64.b64encode(vector.tobytes()).decode()
        data.append(Embedding(index=index, embedding=value))
    usage = EmbeddingUsage(prompt_tokens=result.num_tokens, total_tokens=result.num_tokens)
    answer = EmbeddingList(model=body.model, data=data, usage=usage)
    return Response(answer.model_dump_json(), media_type="application/json")
