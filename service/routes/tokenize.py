"""POST /v1/tokenize and /v1/detokenize, in vLLM's shape."""

from typing import Annotated

from fastapi import APIRouter, Depends
from pydantic import AfterValidator, ConfigDict, Field, model_validator

from service.deps import RequestModel, ResponseModel, StateDep, require
from service.errors import ApiError, error_responses
from service.generation_body import (
    ModelField,
    TokenId,
    check_text,
    check_token_id,
    present,
)
from service.routes.chat import MAX_MESSAGES, Message, plain_messages
from service.settings import DEFAULT_MODEL

router = APIRouter(
    prefix="/v1",
    tags=["text"],
    dependencies=[Depends(require("inference"))],
    responses=error_responses(409),
)
MAX_TOKENS = 2**20
MAX_CHARS = 2**20


class TokenizeBody(RequestModel):
    """A text or messages. A control token spelled in either stays text; only the chat template makes some."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"model": DEFAULT_MODEL, "prompt": "Hello, world!"}],
            "oneOf": [present("prompt"), present("messages")],
        }
    )

    model: ModelField
    prompt: Annotated[str, Field(max_length=MAX_CHARS), AfterValidator(check_text)] | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool = Field(
        default=True, description="Put around a prompt what the model expects there."
    )
    add_generation_prompt: bool = Field(
        default=True, description="Have the chat template begin the assistant's turn."
    )
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _check(self) -> "TokenizeBody":
        if (self.prompt is None) == (self.messages is None):
            raise ApiError("invalid_value", "give either prompt or messages", "prompt")
        return self


class TokenizeResponse(ResponseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = Field(description="The vocabulary's spellings, if asked for.")


class DetokenizeBody(RequestModel):
    model_config = ConfigDict(
        json_schema_extra={"examples": [{"model": DEFAULT_MODEL, "tokens": [19556, 28]}]}
    )

    model: ModelField
    tokens: Annotated[list[TokenId], Field(max_length=MAX_TOKENS)]
    skip_special_tokens: bool = False


class DetokenizeResponse(ResponseModel):
    prompt: str


@router.post("/tokenize")
async def tokenize(body: TokenizeBody, state: StateDep) -> TokenizeResponse:
    """Token ids of a text, or of a conversation in the model's chat template."""
    engine = await state.engines.get(body.model)
    text = await state.tokenizers.get(state.engines.entry(body.model))
    if body.messages is not None:
        messages = plain_messages(body.messages)
        num_chars = sum(len(message["content"]) for message in messages)
        if num_chars > MAX_CHARS:
            raise ApiError(
                "invalid_value", f"at most {MAX_CHARS} characters, got {num_chars}", "messages"
            )
        ids = await text.encode_chat(
            messages, None, add_generation_prompt=body.add_generation_prompt
        )
    else:
        ids = await text.encode(
            body.prompt or "", None, "prompt", add_special_tokens=body.add_special_tokens
        )
    strings = [text.tokenizer.token_string(i) for i in ids] if body.return_token_strs else None
    return TokenizeResponse(
        count=len(ids),
        max_model_len=engine.info.max_model_len,
        tokens=ids,
        token_strs=strings,
    )


@router.post("/detokenize")
async def detokenize(body: DetokenizeBody, state: StateDep) -> DetokenizeResponse:
    """Text of token ids."""
    engine = await state.engines.get(body.model)
    text = await state.tokenizers.get(state.engines.entry(body.model))
    for index, token_id in enumerate(body.tokens):
        check_token_id(token_id, engine.info, f"tokens[{index}]")
    prompt = await text.decode(body.tokens, skip_special_tokens=body.skip_special_tokens)
    return DetokenizeResponse(prompt=prompt)
