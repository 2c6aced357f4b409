"""POST /v1/completions: OpenAI's text completion, with echo and prompt log-probabilities as lm-eval reads them."""

import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response
from pydantic import ConfigDict, Field, PlainValidator, WithJsonSchema, model_validator

from engines.protocol import EngineInfo, TokenLogprob
from engines.text import TextTokenizer, build_detokenizer
from service.auth import Identity
from service.deps import AppState, IdentityDep, ResponseModel, StateDep, require
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
    MAX_PROMPT_TOKENS,
    MAX_TOKEN_ID,
    GenerationBody,
    check_fits,
    check_text,
    check_token_id,
    invalid,
    is_token_id,
)
from service.middleware import cancel_on_disconnect
from service.settings import DEFAULT_MODEL
from service.sse import EVENT_STREAM, EventStreamResponse, openai_events
from service.tokenizers import ModelText

router = APIRouter(
    prefix="/v1",
    tags=["openai"],
    dependencies=[Depends(require("inference"))],
    responses=error_responses(408, 409),
)
MAX_PROMPTS = 256
MAX_CHOICES = 256
DEFAULT_MAX_TOKENS = 16
Prompts = tuple[str | tuple[int, ...], ...]


def parse_prompts(value: object, *, name: str, most: int) -> Prompts:
    """A string, a list of strings, a list of token ids or a list of such lists, as a tuple of prompts."""
    if isinstance(value, str):
        prompts: list[Any] = [value]
    elif isinstance(value, list) and len(value) > MAX_PROMPT_TOKENS:
        raise invalid(f"{name} has at most {MAX_PROMPT_TOKENS} token ids, got {len(value)}")
    elif isinstance(value, list) and value and all(is_token_id(item) for item in value):
        prompts = [value]
    elif isinstance(value, list):
        prompts = value
    else:
        prompts = []
    if not 1 <= len(prompts) <= most:
        raise invalid(f"{name} must be a string, token ids, or a list of 1 to {most} of either")
    kinds = {type(prompt) for prompt in prompts}
    if kinds == {str} and all(prompts):
        return tuple(check_text(prompt, name) for prompt in prompts)
    if kinds == {list} and sum(map(len, prompts)) > MAX_PROMPT_TOKENS:
        raise invalid(f"{name} has at most {MAX_PROMPT_TOKENS} token ids")
    if kinds == {list} and all(p and all(map(is_token_id, p)) for p in prompts):
        return tuple(tuple(prompt) for prompt in prompts)
    raise invalid(
        f"{name} must be a string, a list of strings, a list of token ids (0 to {MAX_TOKEN_ID}) or a list of such"
        " lists; none of them empty"
    )


def prompts_schema(most: int) -> WithJsonSchema:
    token_ids = {
        "type": "array",
        "items": {"type": "integer", "minimum": 0, "maximum": MAX_TOKEN_ID},
        "minItems": 1,
    }
    text = {"type": "string", "minLength": 1}
    many = {"type": "array", "minItems": 1, "maxItems": most}
    return WithJsonSchema(
        {"anyOf": [text, many | {"items": text}, token_ids, many | {"items": token_ids}]}
    )


def _prompts(value: object) -> Prompts:
    return parse_prompts(value, name="prompt", most=MAX_PROMPTS)


class CompletionBody(GenerationBody):
    """OpenAI's body without `suffix` and `best_of`, and vLLM's sampling extensions.

    A text prompt gets the special tokens that the model expects around one (a Llama's BOS), token ids are taken as
    they are. A control token spelled in a text stays text.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"model": DEFAULT_MODEL, "prompt": "The capital of France is"}]
        }
    )

    prompt: Annotated[Prompts, PlainValidator(_prompts), prompts_schema(MAX_PROMPTS)]
    max_tokens: Annotated[int, Field(ge=0, le=MAX_COUNT)] | None = Field(
        default=DEFAULT_MAX_TOKENS, description="0 only together with echo."
    )
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = Field(
        default=None, description="Alternatives to report per token."
    )
    echo: bool | None = Field(
        default=False, description="Put the prompt, and its log-probabilities, before the text."
    )
    add_special_tokens: bool | None = True

    @model_validator(mode="after")
    def _check(self) -> "CompletionBody":
        if self.max_tokens == 0 and not self.echo:
            raise ApiError(
                "invalid_value", "max_tokens must be at least 1 without echo", "max_tokens"
            )
        if len(self.prompt) * self.num_choices > MAX_CHOICES:
            raise ApiError(
                "invalid_value",
                f"n times the number of prompts is at most {MAX_CHOICES}, got {self.num_choices} times"
                f" {len(self.prompt)}",
                "n",
            )
        return self

    @property
    def new_tokens(self) -> int:
        return DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens


class CompletionLogprobs(ResponseModel):
    """One entry per token. A first prompt token has no log-probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int] = Field(description="Where in the choice's text each token begins.")


class CompletionChoice(ResponseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason


class CompletionResponse(ResponseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    system_fingerprint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prompt:
    """Attributes: text: as echoed; offsets: where in it each token begins."""

    ids: tuple[int, ...]
    text: str = ""
    offsets: tuple[int, ...] = ()


@router.post(
    "/completions",
    response_model=CompletionResponse,
    responses=EVENT_STREAM,
)
async def create_completion(
    body: CompletionBody, request: Request, state: StateDep, identity: IdentityDep
) -> Response:
    """Continue prompts. With `stream` the answer is server-sent events, ended by `[DONE]`."""
    return await cancel_on_disconnect(request, _complete(body, state, identity))


async def _complete(body: CompletionBody, state: AppState, identity: Identity) -> Response:
    engine = await state.engines.get(body.model)
    body.check_supported(engine.info)
    text = await state.tokenizers.get(state.engines.entry(body.model))
    prompts = [await _prepare(body, index, text, engine.info) for index in range(len(body.prompt))]
    reads_prompt = body.echo and (body.logprobs is not None or body.new_tokens == 0)
    spec = GenerationSpec(
        request_id=f"cmpl-{secrets.token_hex(12)}",
        operation="text_completion",
        model=body.model,
        prompts=[prompt.ids for prompt in prompts],
        n=body.num_choices,
        params=body.sampling_params(
            max_tokens=body.new_tokens,
            logprobs=body.logprobs,
            prompt_logprobs=(body.logprobs or 0) if reads_prompt else None,
        ),
        stop=body.stop,
        constraint=body.constraint(),
        skip=body.skip or state.settings.default_skip(body.model),
        tenant=identity.tenant,
        skip_special_tokens=body.skip_special_tokens is not False,
        deadline_seconds=state.settings.request_timeout_seconds,
    )
    generation = await Generation.start(engine, text.tokenizer, state.metrics, spec)
    writer = _Writer(body, text.tokenizer, prompts)
    head = {
        "id": spec.request_id,
        "object": "text_completion",
        "created": int(time.time()),
        "model": body.model,
    }
    if body.stream:
        chunks = _chunks(generation, writer, head | {"system_fingerprint": fingerprint(engine)})
        return EventStreamResponse(openai_events(chunks), generation.aclose)
    choices = []
    for result in await generation.collect():
        delta = ChoiceDelta(
            index=result.index,
            text=result.text,
            logprobs=tuple(result.logprobs),
            offsets=tuple(result.offsets),
            prompt_logprobs=result.prompt_logprobs,
        )
        shown, logprobs = writer.show(delta)
        choices.append(
            CompletionChoice(
                index=result.index,
                text=shown,
                logprobs=logprobs,
                finish_reason=result.finish_reason,
            )
        )
    return json_response(
        CompletionResponse(
            id=spec.request_id,
            created=head["created"],
            model=body.model,
            choices=choices,
            usage=generation.usage(),
            system_fingerprint=fingerprint(engine),
        )
    )


async def _prepare(body: CompletionBody, index: int, text: ModelText, info: EngineInfo) -> _Prompt:
    """One prompt's token ids, checked; with echo its text and where its tokens are.

    Raises:
        ApiError: context_length_exceeded, invalid_value.
    """
    given = body.prompt[index]
    param = "prompt" if len(body.prompt) == 1 else f"prompt[{index}]"
    if isinstance(given, str):
        ids = await text.encode(
            given,
            info.max_model_len,
            param,
            add_special_tokens=body.add_special_tokens is not False,
        )
    else:
        ids = list(given)
    if not ids:
        raise ApiError("invalid_value", "a prompt must have at least one token", param)
    check_fits(info, len(ids), body.new_tokens, param, "the prompt")
    check_token_id(max(ids), info, param)
    if not body.echo:
        return _Prompt(ids=tuple(ids))
    detokenizer = build_detokenizer(text.tokenizer, skip_special_tokens=isinstance(given, str))
    shown, offsets = "", []
    for token_id in ids:
        offsets.append(len(shown))
        shown += detokenizer.add(token_id)
    shown += detokenizer.finish()
    return _Prompt(
        ids=tuple(ids), text=given if isinstance(given, str) else shown, offsets=tuple(offsets)
    )


class _Writer:
    """Turns what is new of a choice into OpenAI's text and logprobs, the echoed prompt first."""

    def __init__(
        self, body: CompletionBody, tokenizer: TextTokenizer, prompts: Sequence[_Prompt]
    ) -> None:
        self._body = body
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._echoed: set[int] = set()

    @property
    def includes_usage(self) -> bool:
        return self._body.includes_usage

    def show(self, delta: ChoiceDelta) -> tuple[str, CompletionLogprobs | None]:
        prompt = self._prompts[delta.index // self._body.num_choices]
        echoes = bool(self._body.echo) and delta.index not in self._echoed
        self._echoed.add(delta.index)
        text = prompt.text + delta.text if echoes else delta.text
        if self._body.logprobs is None:
            return text, None
        base = len(prompt.text) if self._body.echo else 0
        entries = list(delta.logprobs)
        offsets = [base + offset for offset in delta.offsets]
        if echoes:
            entries = [*(delta.prompt_logprobs or ()), *entries]
            offsets = [*prompt.offsets, *offsets]
        return text, self._logprobs(entries, offsets)

    def _logprobs(
        self, entries: Sequence[TokenLogprob], offsets: Sequence[int]
    ) -> CompletionLogprobs:
        return CompletionLogprobs(
            tokens=[token_name(self._tokenizer, entry.token_id) for entry in entries],
            token_logprobs=[
                None if entry.logprob is None else finite(entry.logprob) for entry in entries
            ],
            top_logprobs=[self._top(entry) for entry in entries] if self._body.logprobs else None,
            text_offset=list(offsets),
        )

    def _top(self, entry: TokenLogprob) -> dict[str, float] | None:
        """The likeliest tokens and the one that stands there; of two with one spelling, the likelier."""
        if entry.logprob is None:
            return None
        top: dict[str, float] = {}
        for token_id, logprob in (*entry.top, (entry.token_id, entry.logprob)):
            name = token_name(self._tokenizer, token_id)
            top[name] = max(finite(logprob), top.get(name, finite(logprob)))
        return top


async def _chunks(
    generation: Generation, writer: _Writer, head: dict[str, Any]
) -> AsyncGenerator[dict[str, Any], None]:
    include_usage = writer.includes_usage
    extra = {"usage": None} if include_usage else {}
    async for delta in generation.deltas():
        text, logprobs = writer.show(delta)
        choice = {
            "index": delta.index,
            "text": text,
            "logprobs": logprobs and logprobs.model_dump(),
            "finish_reason": delta.finish_reason,
        }
        yield head | {"choices": [choice]} | extra
    if include_usage:
        yield head | {"choices": [], "usage": generation.usage().model_dump()}
