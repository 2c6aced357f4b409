"""POST /v1/chat/completions: the model's own chat template around messages, OpenAI's answer."""

import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response
from pydantic import ConfigDict, Field, PlainValidator, WithJsonSchema, model_validator

from engines.protocol import EngineInfo, TokenLogprob
from engines.text import TextTokenizer
from service.auth import Identity
from service.deps import AppState, IdentityDep, RequestModel, ResponseModel, StateDep, require
from service.errors import ApiError, error_responses
from service.generation import (
    ChoiceDelta,
    FinishReason,
    Generation,
    GenerationSpec,
    Usage,
    fingerprint,
    finite,
    json_response,
    token_name,
)
from service.generation_body import (
    MAX_COUNT,
    MAX_LOGPROBS,
    GenerationBody,
    check_fits,
    check_text,
    invalid,
)
from service.middleware import cancel_on_disconnect
from service.settings import DEFAULT_MODEL, Settings
from service.sse import EVENT_STREAM, EventStreamResponse, openai_events

router = APIRouter(
    prefix="/v1",
    tags=["openai"],
    dependencies=[Depends(require("inference"))],
    responses=error_responses(408, 409),
)
MAX_MESSAGES = 1000
MAX_PARTS = 1000
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


def _content(value: object) -> Any:
    if isinstance(value, str):
        return check_text(value, "content")
    if (
        isinstance(value, list)
        and 1 <= len(value) <= MAX_PARTS
        and all(isinstance(p, dict) and isinstance(p.get("type"), str) for p in value)
    ):
        return value
    raise invalid(f"content must be a string or a list of 1 to {MAX_PARTS} parts with a type")


_PART_SCHEMA = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
    "additionalProperties": False,
}
_CONTENT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": _PART_SCHEMA, "minItems": 1, "maxItems": MAX_PARTS},
    ]
}


class Message(RequestModel):
    """Parts of a content are joined by newlines. `developer` is `system`."""

    role: Annotated[str, Field(json_schema_extra={"enum": list(ROLES)})]
    content: Annotated[Any, PlainValidator(_content), WithJsonSchema(_CONTENT_SCHEMA)]


class ChatBody(GenerationBody):
    """OpenAI's body for text: no tools, no audio, no images. The chat template is the model's own."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": DEFAULT_MODEL,
                    "messages": [{"role": "user", "content": "What is a lathe?"}],
                    "max_tokens": 64,
                }
            ]
        }
    )

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_COUNT)] | None = Field(
        default=None, description="By default the server's limit, or what the context leaves."
    )
    max_tokens: Annotated[int, Field(ge=1, le=MAX_COUNT)] | None = Field(
        default=None, description="Older name of max_completion_tokens."
    )
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = Field(
        default=None, description="Alternatives to report per token; needs logprobs."
    )

    @model_validator(mode="after")
    def _check(self) -> "ChatBody":
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError("invalid_value", "top_logprobs needs logprobs: true", "top_logprobs")
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise ApiError(
                "invalid_value", "max_tokens and max_completion_tokens differ", "max_tokens"
            )
        return self


class TopLogprob(ResponseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class ChatTokenLogprob(ResponseModel):
    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]


class ChatLogprobs(ResponseModel):
    content: list[ChatTokenLogprob]
    refusal: None = None


class ChatMessage(ResponseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(ResponseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatResponse(ResponseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str


@router.post(
    "/chat/completions",
    response_model=ChatResponse,
    responses=EVENT_STREAM,
)
async def create_chat_completion(
    body: ChatBody, request: Request, state: StateDep, identity: IdentityDep
) -> Response:
    """Answer a conversation. With `stream` the answer is server-sent events, ended by `[DONE]`.

    The model's own chat template is used; a control token spelled in a message stays text.
    """
    return await cancel_on_disconnect(request, _chat(body, state, identity))


async def _chat(body: ChatBody, state: AppState, identity: Identity) -> Response:
    messages = plain_messages(body.messages)
    engine = await state.engines.get(body.model)
    body.check_supported(engine.info)
    text = await state.tokenizers.get(state.engines.entry(body.model))
    ids = await text.encode_chat(messages, engine.info.max_model_len)
    max_tokens = _max_tokens(body, engine.info, len(ids), state.settings)
    spec = GenerationSpec(
        request_id=f"chatcmpl-{secrets.token_hex(12)}",
        operation="chat",
        model=body.model,
        prompts=[ids],
        n=body.num_choices,
        params=body.sampling_params(
            max_tokens=max_tokens, logprobs=(body.top_logprobs or 0) if body.logprobs else None
        ),
        stop=body.stop,
        skip=body.skip or state.settings.default_skip(body.model),
        constraint=body.constraint(),
        tenant=identity.tenant,
        skip_special_tokens=body.skip_special_tokens is not False,
        continues_prompt=False,
        counts_stop_token=False,
        deadline_seconds=state.settings.request_timeout_seconds,
    )
    generation = await Generation.start(engine, text.tokenizer, state.metrics, spec)
    created = int(time.time())
    if body.stream:
        head = {
            "id": spec.request_id,
            "object": "chat.completion.chunk",
            "created": created,
            "model": body.model,
            "system_fingerprint": fingerprint(engine),
        }
        chunks = _chunks(generation, body, text.tokenizer, head)
        return EventStreamResponse(openai_events(chunks), generation.aclose)
    choices = [
        ChatChoice(
            index=result.index,
            message=ChatMessage(content=result.text),
            logprobs=_logprobs(text.tokenizer, result.logprobs) if body.logprobs else None,
            finish_reason=result.finish_reason,
        )
        for result in await generation.collect()
    ]
    return json_response(
        ChatResponse(
            id=spec.request_id,
            created=created,
            model=body.model,
            choices=choices,
            usage=generation.usage(),
            system_fingerprint=fingerprint(engine),
        )
    )


def plain_messages(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Messages of a role that templates know and one text each.

    Raises:
        ApiError: unsupported_parameter, a role or part that this service has not; both name it.
    """
    plain = []
    for index, message in enumerate(messages):
        role = ROLES.get(message.role)
        if role is None:
            code = (
                "unsupported_parameter" if message.role in ("tool", "function") else "invalid_value"
            )
            raise ApiError(
                code,
                f"role must be one of {', '.join(ROLES)}, got {message.role[:40]!r}",
                f"messages[{index}].role",
            )
        plain.append({"role": role, "content": _text_of(message.content, index)})
    return plain


def _text_of(content: str | list[dict[str, Any]], message: int) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for index, part in enumerate(content):
        param = f"messages[{message}].content[{index}]"
        if part["type"] != "text":
            raise ApiError(
                "unsupported_parameter",
                f"only parts of type 'text' are supported, got {part['type'][:40]!r}",
                param,
            )
        unknown = sorted(str(key) for key in part.keys() - {"type", "text"})
        if unknown:
            raise ApiError(
                "unsupported_parameter", "a text part has no such field", f"{param}.{unknown[0]}"
            )
        if not isinstance(part.get("text"), str):
            raise ApiError("invalid_value", "text must be a string", f"{param}.text")
        texts.append(part["text"])
    return "\n".join(texts)


def _max_tokens(
    body: ChatBody, info: EngineInfo, num_prompt_tokens: int, settings: Settings
) -> int:
    """What the request says; else the server's default, as far as the context goes.

    Raises:
        ApiError: context_length_exceeded.
    """
    asked = body.max_completion_tokens or body.max_tokens
    check_fits(info, num_prompt_tokens, asked or 1, "messages", "the messages")
    return asked or min(settings.default_max_tokens, info.max_model_len - num_prompt_tokens)


def _logprobs(tokenizer: TextTokenizer, entries: Sequence[TokenLogprob]) -> ChatLogprobs:
    return ChatLogprobs(
        content=[
            ChatTokenLogprob(
                token=token_name(tokenizer, entry.token_id),
                logprob=finite(entry.logprob or 0.0),
                bytes=list(tokenizer.token_bytes(entry.token_id)),
                top_logprobs=[
                    TopLogprob(
                        token=token_name(tokenizer, token_id),
                        logprob=finite(logprob),
                        bytes=list(tokenizer.token_bytes(token_id)),
                    )
                    for token_id, logprob in entry.top
                ],
            )
            for entry in entries
        ]
    )


async def _chunks(
    generation: Generation, body: ChatBody, tokenizer: TextTokenizer, head: dict[str, Any]
) -> AsyncGenerator[dict[str, Any], None]:
    """Per choice: its role, its text, its finish_reason; then the usage, if asked for."""
    extra = {"usage": None} if body.includes_usage else {}

    def chunk(
        index: int, delta: dict[str, str], logprobs: Any, reason: str | None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return head | {"choices": [choice]} | extra

    for index in range(body.num_choices):
        yield chunk(index, {"role": "assistant", "content": ""}, None, None)
    async for delta in generation.deltas():
        if delta.text or delta.logprobs:
            yield chunk(delta.index, {"content": delta.text}, _shown(body, tokenizer, delta), None)
        if delta.finish_reason is not None:
            yield chunk(delta.index, {}, None, delta.finish_reason)
    if body.includes_usage:
        yield head | {"choices": [], "usage": generation.usage().model_dump()}


def _shown(body: ChatBody, tokenizer: TextTokenizer, delta: ChoiceDelta) -> dict[str, Any] | None:
    return _logprobs(tokenizer, delta.logprobs).model_dump() if body.logprobs else None
