"""POST /v1/completions: continue a prompt. OpenAI's legacy route, with echo and prompt log-probabilities for evaluation."""

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
from service.deps import IdentityDep, ResponseModel, StateDep, require
from service.errors import ApiError, error_responses
from service.generation import (
    Delta,
    Generation,
    GenerationFields,
    Token,
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
MAX_PROMPTS = 256
MAX_TOKENS = 2**31
OPENAI_DEFAULT_MAX_TOKENS = 16
TokenIds = Annotated[list[Token], Field(min_length=1)]


class CompletionRequest(GenerationFields):
    prompt: (
        str
        | TokenIds
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    max_tokens: int | None = Field(default=None, ge=0, lt=MAX_TOKENS)
    echo: bool = False
    logprobs: int | None = Field(default=None, ge=0, le=20)
    best_of: int | None = Field(default=None, ge=1, le=16)


class CompletionLogprobs(ResponseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(ResponseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None


class Completion(ResponseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


@router.post("/completions", response_model=Completion)
async def create_completion(
    body: CompletionRequest, request: Request, state: StateDep, identity: IdentityDep
) -> Response:
    """Complete one or several prompts; with `stream` the answer is server-sent events."""
    if body.best_of is not None and body.best_of != body.n:
        raise ApiError("unsupported_parameter", "best_of must equal n, or be left out", "best_of")
    engine = await state.engines.get(body.model)
    check_supported(body, engine)
    text = await state.tokenizers.get(state.engines.entry(body.model))
    prompts = await _prompts(body, text, engine.info.max_model_len)
    if len(prompts) * body.n > MAX_PROMPTS:
        raise ApiError("invalid_value", f"prompts times n must be at most {MAX_PROMPTS}", "n")
    max_tokens = OPENAI_DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    if max_tokens == 0 and not body.echo:
        raise ApiError("invalid_value", "max_tokens may be 0 only with echo", "max_tokens")
    for prompt in prompts:
        check_context(len(prompt), max_tokens, engine.info.max_model_len, "prompt")
    wants_prompt = body.echo and body.logprobs is not None
    choices = [(prompt, index) for prompt in prompts for index in range(body.n)]
    params = [
        sampling_params(
            body,
            max_tokens=max_tokens,
            index=index,
            logprobs=body.logprobs,
            prompt_logprobs=body.logprobs if wants_prompt or max_tokens == 0 else None,
        )
        for _, index in choices
    ]
    generation = await submit(
        engine,
        text.tokenizer,
        [prompt for prompt, _ in choices],
        params,
        body=body,
        operation="text_completion",
        identity=identity,
        metrics=state.metrics,
        deadline_seconds=state.settings.request_timeout_seconds,
    )
    answer = _Answer(body, text.tokenizer, [p for p, _ in choices], engine.info.checkpoint_hash)
    if body.stream:
        events = stream_events(answer.stream(generation))
        return StreamingResponse(events, media_type=MEDIA_TYPE, headers=HEADERS)
    collected = await cancel_on_disconnect(request, collect(generation))
    completion = answer.whole(collected, generation.totals.usage())
    return Response(completion.model_dump_json(), media_type="application/json")


async def _prompts(body: CompletionRequest, text: ModelText, limit: int) -> list[list[int]]:
    given = body.prompt
    if isinstance(given, str):
        given = [given]
    if given and isinstance(given[0], int):
        given = [given]  # type: ignore[list-item]
    prompts: list[list[int]] = []
    for index, one in enumerate(given):
        if isinstance(one, str):
            ids = await text.encode(one, limit, "prompt")
            if not ids:
                raise ApiError("invalid_value", "a prompt must not be empty", f"prompt[{index}]")
            prompts.append(ids)
        else:
            assert isinstance(one, list)
            prompts.append(one)
    return prompts


class _Answer:
    """How deltas become OpenAI's completion objects."""

    def __init__(
        self,
        body: CompletionRequest,
        tokenizer: TextTokenizer,
        prompts: list[list[int]],
        checkpoint_hash: str,
    ) -> None:
        self._body = body
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._id = f"cmpl-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._fingerprint = f"lathe-{checkpoint_hash[:12]}"

    def _object(self, choices: list[CompletionChoice], usage: Usage | None) -> Completion:
        return Completion(
            id=self._id,
            created=self._created,
            model=self._body.model,
            system_fingerprint=self._fingerprint,
            choices=choices,
            usage=usage,
        )

    def whole(self, collected: list[list[Delta]], usage: Usage) -> Completion:
        choices = []
        for index, deltas in enumerate(collected):
            logprobs = _Logprobs(self._tokenizer) if self._body.logprobs is not None else None
            text = ""
            if self._body.echo:
                text = self._echo(index)
                if logprobs is not None and deltas and deltas[0].prompt_logprobs:
                    logprobs.add(deltas[0].prompt_logprobs)
            for delta in deltas:
                text += delta.text
                if logprobs is not None and delta.logprobs:
                    logprobs.add(delta.logprobs)
            choices.append(
                CompletionChoice(
                    index=index,
                    text=text,
                    logprobs=logprobs.build() if logprobs else None,
                    finish_reason=deltas[-1].finish_reason,
                )
            )
        return self._object(choices, usage)

    def _echo(self, index: int) -> str:
        return self._tokenizer.decode(self._prompts[index])

    async def stream(self, generation: Generation) -> AsyncIterator[dict[str, Any]]:
        options = self._body.stream_options
        with_usage = options is not None and options.include_usage
        writers = [_Logprobs(self._tokenizer) for _ in self._prompts]
        echoed: set[int] = set()
        async with aclosing(generation.deltas()) as deltas:
            async for delta in deltas:
                text, writer = delta.text, writers[delta.index]
                if self._body.echo and delta.index not in echoed:
                    echoed.add(delta.index)
                    text = self._echo(delta.index) + text
                    writer.add(delta.prompt_logprobs or ())
                writer.add(delta.logprobs or ())
                logprobs = writer.take() if self._body.logprobs is not None else None
                if not text and delta.finish_reason is None and not delta.logprobs:
                    continue
                choice = CompletionChoice(
                    index=delta.index,
                    text=text,
                    logprobs=logprobs,
                    finish_reason=delta.finish_reason,
                )
                yield self._object([choice], None).model_dump(
                    exclude=set() if with_usage else {"usage"}
                )
        if with_usage:
            yield self._object([], generation.totals.usage()).model_dump()


class _Logprobs:
    """OpenAI's legacy log-probability lists, growing."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._rows: list[tuple[str, float | None, dict[str, float] | None, int]] = []
        self._offset = 0

    def add(self, logprobs: tuple[TokenLogprob, ...]) -> None:
        for one in logprobs:
            token = self._tokenizer.token_text(one.token_id)
            top: dict[str, float] | None = None
            if one.logprob is not None:
                top = {}
                for token_id, logprob in one.top or ((one.token_id, one.logprob),):
                    top.setdefault(self._tokenizer.token_text(token_id), logprob)
                top.setdefault(token, one.logprob)
            self._rows.append((token, one.logprob, top, self._offset))
            self._offset += len(token)

    def build(self) -> CompletionLogprobs:
        return CompletionLogprobs(
            tokens=[row[0] for row in self._rows],
            token_logprobs=[row[1] for row in self._rows],
            top_logprobs=[row[2] for row in self._rows],
            text_offset=[row[3] for row in self._rows],
        )

    def take(self) -> CompletionLogprobs:
        built = self.build()
        self._rows = []
        return built
