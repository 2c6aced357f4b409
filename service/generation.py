"""What completions and chat share: sampling parameters, choices that run together, and their text and log-probabilities."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from engines.protocol import (
    AsyncEngine,
    EngineError,
    GenerateRequest,
    SamplingParams,
    Skip,
    TokenLogprob,
    TokenOutput,
)
from engines.text import TextStream, TextTokenizer
from service.auth import Identity
from service.deps import RequestModel, ResponseModel
from service.errors import ApiError, from_engine_error
from service.metrics import Metrics

MAX_N = 16
MAX_STOPS = 4
MAX_STOP_CHARS = 256
MAX_BIASES = 300
Token = Annotated[int, Field(ge=0, lt=2**31)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]


class SkipTarget(RequestModel):
    target_ratio: float = Field(gt=0, lt=1)


class StreamOptions(RequestModel):
    include_usage: bool = False


class GenerationFields(RequestModel):
    """Fields that both routes take. `user`, `metadata` and `store: false` are accepted and change nothing."""

    model: str = Field(max_length=200)
    n: int = Field(default=1, ge=1, le=MAX_N)
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        default=None, max_length=MAX_BIASES
    )
    user: str | None = Field(default=None, max_length=512)
    metadata: dict[str, str] | None = Field(default=None, max_length=16)
    store: Literal[False] | None = None
    top_k: int = Field(default=0, ge=-1, lt=2**31)
    min_p: float = Field(default=0, ge=0, le=1)
    repetition_penalty: float = Field(default=1, gt=0, le=10)
    min_tokens: int = Field(default=0, ge=0, lt=2**31)
    ignore_eos: bool = False
    stop_token_ids: list[Token] = Field(default_factory=list, max_length=64)
    skip: Literal["off", "profile"] | SkipTarget = "off"

    @field_validator("logit_bias")
    @classmethod
    def _token_ids(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        for key in value or {}:
            if not (key.isascii() and key.isdigit() and len(key) < 10):
                raise ValueError("keys must be token ids")
        return value

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class PromptTokensDetails(ResponseModel):
    cached_tokens: int = 0


class Usage(ResponseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails = PromptTokensDetails()
    ffn_rows_skipped: int = 0
    ffn_rows_total: int = 0


def check_supported(body: GenerationFields, engine: AsyncEngine) -> None:
    """Raises: ApiError: unsupported_parameter, the engine cannot honour a field that was set."""
    if engine.info.kind != "decoder":
        raise ApiError(
            "invalid_value", f"model {body.model!r} is an encoder: it only embeds", "model"
        )
    if body.skip != "off" and "skip" in engine.info.unsupported:
        raise ApiError(
            "unsupported_parameter", "the engine of this model skips no FFN blocks", "skip"
        )


def sampling_params(
    body: GenerationFields,
    *,
    max_tokens: int,
    index: int,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
) -> SamplingParams:
    """Parameters of choice `index`: choices of one seeded request use seed, seed + 1, ..."""
    seed = None if body.seed is None else (body.seed + index) % 2**63
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=body.min_tokens,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(body.top_k, 0),
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias={int(key): bias for key, bias in (body.logit_bias or {}).items()},
        seed=seed,
        stop_token_ids=tuple(body.stop_token_ids),
        ignore_eos=body.ignore_eos,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def check_context(num_prompt_tokens: int, max_tokens: int, limit: int, param: str) -> None:
    """Raises: ApiError: context_length_exceeded, in OpenAI's words."""
    if num_prompt_tokens + max_tokens > limit:
        raise ApiError(
            "context_length_exceeded",
            f"This model's maximum context length is {limit} tokens. However, you requested"
            f" {num_prompt_tokens + max_tokens} tokens ({num_prompt_tokens} in the messages, {max_tokens} in"
            " the completion).",
            param,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What one step gave one choice.

    Attributes:
        tokens: ids and log-probabilities of this step; ids that a stop string cut off are left out at the end only.
        finish_reason: in the choice's last delta.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None
    prompt_logprobs: tuple[TokenLogprob, ...] | None
    finish_reason: Literal["stop", "length"] | None


@dataclass(slots=True)
class Totals:
    """Usage of a whole request, complete once every choice has ended."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    ffn_rows_skipped: int = 0
    ffn_rows_total: int = 0

    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            total_tokens=self.prompt_tokens + self.completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=self.cached_tokens),
            ffn_rows_skipped=self.ffn_rows_skipped,
            ffn_rows_total=self.ffn_rows_total,
        )


@dataclass(slots=True, kw_only=True)
class _Choice:
    index: int
    stream: Any
    text: TextStream
    num_tokens: int = 0
    first_at: float | None = None
    last_at: float | None = None


@dataclass(slots=True, kw_only=True)
class Generation:
    """All choices of one HTTP request, submitted. Iterate `deltas`; leaving early aborts what still runs."""

    model: str
    operation: str
    metrics: Metrics
    totals: Totals
    prompt_lengths: list[int]
    _choices: list[_Choice] = field(default_factory=list)
    _started: float = field(default_factory=time.monotonic)
    deadline_seconds: float = 600.0

    async def deltas(self) -> AsyncIterator[Delta]:
        """Deltas of all choices as they come.

        Raises:
            EngineError
            ApiError: request_timeout.
        """
        merged: asyncio.Queue[tuple[_Choice, TokenOutput | None] | BaseException] = asyncio.Queue()
        tasks = [asyncio.create_task(self._pump(choice, merged)) for choice in self._choices]
        remaining = len(tasks)
        try:
            while remaining:
                left = self.deadline_seconds - (time.monotonic() - self._started)
                try:
                    item = await asyncio.wait_for(merged.get(), max(left, 0.001))
                except TimeoutError:
                    raise ApiError("request_timeout", "the request took too long") from None
                if isinstance(item, BaseException):
                    raise item
                choice, output = item
                if output is None:
                    remaining -= 1
                    continue
                delta = self._delta(choice, output)
                if delta is not None:
                    yield delta
        finally:
            if remaining:
                self.metrics.request_cancelled(self.model)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self.aclose()

    async def aclose(self) -> None:
        for choice in self._choices:
            await choice.stream.aclose()

    async def _pump(self, choice: _Choice, merged: Any) -> None:
        try:
            async for output in choice.stream:
                merged.put_nowait((choice, output))
                if choice.text.stopped:
                    break
            merged.put_nowait((choice, None))
        except EngineError as error:
            merged.put_nowait(error)

    def _delta(self, choice: _Choice, output: TokenOutput) -> Delta | None:
        if choice.text.stopped:
            return None  # outputs that were under way when the stop string was found
        now = time.monotonic()
        self._time(choice, output, now)
        token_ids = output.token_ids
        if output.stop_token_id is not None:
            token_ids = token_ids[:-1]
        text = choice.text.add(token_ids)
        choice.num_tokens += len(output.token_ids)
        finish_reason: Literal["stop", "length"] | None = None
        if choice.text.stopped:
            finish_reason = "stop"
        elif output.finish_reason is not None:
            finish_reason = "stop" if output.finish_reason == "stop" else "length"
            text += choice.text.finish()
            if choice.text.stopped:
                finish_reason = "stop"
        if finish_reason is not None:
            self._finish(choice, output, finish_reason, now)
        logprobs = output.logprobs
        if logprobs is not None:
            logprobs = logprobs[: len(token_ids)]
        return Delta(
            index=choice.index,
            text=text,
            token_ids=token_ids,
            logprobs=logprobs,
            prompt_logprobs=output.prompt_logprobs,
            finish_reason=finish_reason,
        )

    def _time(self, choice: _Choice, output: TokenOutput, now: float) -> None:
        if not output.token_ids:
            return
        if choice.first_at is None:
            choice.first_at = now
            self.metrics.observe_ttft(self.model, self.operation, now - self._started)
        elif choice.last_at is not None:
            self.metrics.observe_inter_token(self.model, now - choice.last_at)
        choice.last_at = now

    def _finish(self, choice: _Choice, output: TokenOutput, reason: str, now: float) -> None:
        self.totals.completion_tokens += choice.num_tokens
        self.totals.cached_tokens += output.num_cached_tokens
        self.totals.ffn_rows_skipped += output.ffn_rows_skipped
        self.totals.ffn_rows_total += output.ffn_rows_total
        self.metrics.request_finished(
            self.model,
            self.operation,
            finish_reason=reason,
            prompt_tokens=self.prompt_lengths[choice.index],
            generation_tokens=choice.num_tokens,
            e2e_seconds=now - self._started,
            decode_seconds=now - (choice.first_at or now),
            ffn_rows_skipped=output.ffn_rows_skipped,
            ffn_rows_total=output.ffn_rows_total,
        )


async def submit(
    engine: AsyncEngine,
    tokenizer: TextTokenizer,
    prompts: Sequence[Sequence[int]],
    params: Sequence[SamplingParams],
    *,
    body: GenerationFields,
    operation: str,
    identity: Identity,
    metrics: Metrics,
    deadline_seconds: float,
) -> Generation:
    """Submit one request per (prompt, parameters); all are accepted or none stays.

    Raises:
        ApiError: what the engine refuses, before any byte is sent.
    """
    generation = Generation(
        model=body.model,
        operation=operation,
        metrics=metrics,
        totals=Totals(prompt_tokens=sum(len(p) for p in prompts[:: max(body.n, 1)])),
        prompt_lengths=[len(prompt) for prompt in prompts],
        deadline_seconds=deadline_seconds,
    )
    batch = secrets.token_hex(8)
    skip = _skip(body)
    try:
        for index, (prompt, one) in enumerate(zip(prompts, params, strict=True)):
            request = GenerateRequest(
                request_id=f"{batch}-{index}",
                token_ids=tuple(prompt),
                params=one,
                tenant=identity.tenant,
                skip=skip,
            )
            stream = await engine.generate(request)
            text = TextStream(tokenizer, body.stop_strings, body.min_tokens)
            generation._choices.append(_Choice(index=index, stream=stream, text=text))
            metrics.request_started(body.model, max_tokens=one.max_tokens, n=body.n)
    except EngineError as error:
        await generation.aclose()
        raise from_engine_error(error) from error
    return generation


def _skip(body: GenerationFields) -> Skip:
    if isinstance(body.skip, SkipTarget):
        return Skip(mode="target", target_ratio=body.skip.target_ratio)
    return Skip(mode=body.skip)


async def collect(generation: Generation) -> list[list[Delta]]:
    """All deltas of every choice. Raises: ApiError."""
    collected: list[list[Delta]] = [[] for _ in generation.prompt_lengths]
    try:
        async with aclosing(generation.deltas()) as deltas:
            async for delta in deltas:
                collected[delta.index].append(delta)
    except EngineError as error:
        raise from_engine_error(error) from error
    return collected
