"""POST /v1/chat/completions: answer a conversation, through the model's own chat template."""

import secrets
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response, StreamingResponse
from pydantic import Field

from engines.protocol import TokenLogprob
from engines.text import TextTokenizer
from service.chat_template import ChatTemplateError
from service.deps import IdentityDep, RequestModel, ResponseModel, StateDep, require
from service.errors import ApiError, error_responses
from service.generation import (
    Delta,
    Generation,
    GenerationFields,
    Usage,
    check_context,
    check_supported,
    collect,
    sampling_params,
    submit,
)
from service.middleware import cancel_on_disconnect
from service.sse import HEADERS, MEDIA_TYPE, stream_events
from service.tokenizers import ModelText

router = APIRouter(
    prefix="/v1",
    tags=["openai"],
    dependencies=[Depends(require("inference"))],
    responses=error_responses(408, 409),
)
MAX_MESSAGES = 1000


class TextPart(RequestModel):
    type: Literal["text"]
    text: str


class Message(RequestModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(max_length=MAX_MESSAGES)]
    name: str | None = Field(default=None, max_length=64)

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ResponseFormat(RequestModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: dict[str, Any] | None = None


class ChatRequest(GenerationFields):
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    max_completion_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    response_format: ResponseFormat | None = None


class TopLogprob(ResponseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class ChatTokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(ResponseModel):
    content: list[ChatTokenLogprob]


class AssistantMessage(ResponseModel):
    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(ResponseModel):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(ResponseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


@router.post("/chat/completions", response_model=ChatCompletion)
async def create_chat_completion(
    body: ChatRequest, request: Request, state: StateDep, identity: IdentityDep
) -> Response:
    """Answer a conversation; with `stream` the answer is server-sent events."""
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError("invalid_value", "top_logprobs needs logprobs: true", "top_logprobs")
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise ApiError(
            "invalid_value", "give max_completion_tokens or max_tokens, not both", "max_tokens"
        )
    engine = await state.engines.get(body.model)
    check_supported(body, engine)
    if body.response_format is not None and body.response_format.type != "text":
        raise ApiError(
            "unsupported_parameter",
            "the engine of this model cannot constrain its output",
            "response_format",
        )
    text = await state.tokenizers.get(state.engines.entry(body.model))
    limit = engine.info.max_model_len
    prompt = await encode_chat(text, body.messages, body.model, limit)
    asked = body.max_completion_tokens or body.max_tokens
    room = limit - len(prompt)
    max_tokens = asked or max(min(state.settings.default_max_tokens, room), 1)
    check_context(len(prompt), max_tokens, limit, "messages")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    params = [
        sampling_params(body, max_tokens=max_tokens, index=index, logprobs=logprobs)
        for index in range(body.n)
    ]
    generation = await submit(
        engine,
        text.tokenizer,
        [prompt] * body.n,
        params,
        body=body,
        operation="chat",
        identity=identity,
        metrics=state.metrics,
        deadline_seconds=state.settings.request_timeout_seconds,
    )
    answer = _Answer(body, text.tokenizer, engine.info.checkpoint_hash)
    if body.stream:
        events = stream_events(answer.stream(generation))
        return StreamingResponse(events, media_type=MEDIA_TYPE, headers=HEADERS)
    collected = await cancel_on_disconnect(request, collect(generation))
    completion = answer.whole(collected, generation.totals.usage())
    return Response(completion.model_dump_json(), media_type="application/json")


async def encode_chat(
    text: ModelText, messages: list[Message], model: str, limit: int
) -> list[int]:
    """Token ids of a conversation.

    Raises:
        ApiError: the model has no chat template, or it refuses these messages.
    """
    if text.chat_template is None:
        raise ApiError("invalid_value", f"model {model!r} has no chat template", "model")
    rendered = [
        {"role": "system" if m.role == "developer" else m.role, "content": m.text} for m in messages
    ]
    try:
        segments = text.chat_template.render(rendered)
    except ChatTemplateError as error:
        raise ApiError("invalid_value", str(error), "messages") from error
    return await text.encode_segments(segments, limit, "messages")


class _Answer:
    """How deltas become OpenAI's chat objects."""

    def __init__(self, body: ChatRequest, tokenizer: TextTokenizer, checkpoint_hash: str) -> None:
        self._body = body
        self._tokenizer = tokenizer
        self._id = f"chatcmpl-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._fingerprint = f"lathe-{checkpoint_hash[:12]}"

    def whole(self, collected: list[list[Delta]], usage: Usage) -> ChatCompletion:
        choices = []
        for index, deltas in enumerate(collected):
            rows = [row for delta in deltas for row in delta.logprobs or ()]
            reason = deltas[-1].finish_reason
            assert reason is not None
            choices.append(
                ChatChoice(
                    index=index,
                    message=AssistantMessage(content="".join(delta.text for delta in deltas)),
                    logprobs=self._logprobs(rows) if self._body.logprobs else None,
                    finish_reason=reason,
                )
            )
        return ChatCompletion(
            id=self._id,
            created=self._created,
            model=self._body.model,
            system_fingerprint=self._fingerprint,
            choices=choices,
            usage=usage,
        )

    async def stream(self, generation: Generation) -> AsyncIterator[dict[str, Any]]:
        options = self._body.stream_options
        with_usage = options is not None and options.include_usage
        extra: dict[str, Any] = {"usage": None} if with_usage else {}
        for index in range(self._body.n):
            yield self._chunk(index, {"role": "assistant", "content": ""}, None, None) | extra
        async with aclosing(generation.deltas()) as deltas:
            async for delta in deltas:
                logprobs = None
                if self._body.logprobs and delta.logprobs:
                    logprobs = self._logprobs(list(delta.logprobs)).model_dump()
                if delta.text or logprobs:
                    yield self._chunk(delta.index, {"content": delta.text}, logprobs, None) | extra
                if delta.finish_reason is not None:
                    yield self._chunk(delta.index, {}, None, delta.finish_reason) | extra
        if with_usage:
            usage = generation.totals.usage().model_dump()
            yield self._chunk(0, {}, None, None) | {"choices": [], "usage": usage}

    def _chunk(
        self, index: int, delta: dict[str, Any], logprobs: Any, finish_reason: str | None
    ) -> dict[str, Any]:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }
        return {
            "id": self._id,
            "object": "chat.completion.chunk",
            "created": self._created,
            "model": self._body.model,
            "system_fingerprint": self._fingerprint,
            "choices": [choice],
        }

    def _logprobs(self, rows: list[TokenLogprob]) -> ChatLogprobs:
        content = []
        for row in rows:
            top = [self._top(token_id, logprob) for token_id, logprob in row.top]
            chosen = self._top(row.token_id, row.logprob or 0.0)
            content.append(ChatTokenLogprob(**chosen.model_dump(), top_logprobs=top))
        return ChatLogprobs(content=content)

    def _top(self, token_id: int, logprob: float) -> TopLogprob:
        token = self._tokenizer.token_text(token_id)
        return TopLogprob(token=token, logprob=logprob, bytes=list(token.encode()))
