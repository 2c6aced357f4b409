"""POST /v1/tokenize and /v1/detokenize, in vLLM's shape. They need the model's files, not its engine."""

from typing import Annotated

from fastapi import APIRouter, Depends
from pydantic import Field, model_validator

from service.deps import RequestModel, ResponseModel, StateDep, require
from service.errors import ApiError, error_responses
from service.generation import Token
from service.routes.chat import MAX_MESSAGES, Message, encode_chat

router = APIRouter(
    prefix="/v1",
    tags=["text"],
    dependencies=[Depends(require("inference"))],
    responses=error_responses(),
)
MAX_TOKENS = 2**20


class TokenizeRequest(RequestModel):
    """Either `prompt` or `messages`; messages go through the model's chat template."""

    model: str = Field(max_length=200)
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool = False
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_of(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class Tokens(ResponseModel):
    count: int
    max_model_len: int | None
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(RequestModel):
    model: str = Field(max_length=200)
    tokens: list[Token] = Field(max_length=MAX_TOKENS)


class Detokenized(ResponseModel):
    prompt: str


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, state: StateDep) -> Tokens:
    """Text, or a conversation, to token ids."""
    entry = state.engines.entry(body.model)
    text = await state.tokenizers.get(entry)
    if body.messages is not None:
        ids = await encode_chat(text, body.messages, body.model, MAX_TOKENS)
    else:
        ids = await text.encode(
            body.prompt or "", MAX_TOKENS, "prompt", add_special_tokens=body.add_special_tokens
        )
    status = (await state.engines.status()).get(body.model)
    return Tokens(
        count=len(ids),
        max_model_len=status.info.max_model_len if status and status.info else None,
        tokens=ids,
        token_strs=text.tokenizer.token_strings(ids) if body.return_token_strs else None,
    )


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, state: StateDep) -> Detokenized:
    """Token ids to text, control tokens included."""
    text = await state.tokenizers.get(state.engines.entry(body.model))
    for index, token_id in enumerate(body.tokens):
        if token_id >= text.tokenizer.vocab_size:
            raise ApiError(
                "invalid_value",
                f"token ids must be below {text.tokenizer.vocab_size}",
                f"tokens[{index}]",
            )
    return Detokenized(prompt=text.tokenizer.decode(body.tokens))
