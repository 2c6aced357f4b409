"""From one HTTP request to its engine requests and back: submit all at once, decode as tokens come, end all together.

Every choice of every prompt is one `GenerateRequest`. `Generation.start` returns when the engine has accepted them all,
so a refusal is raised before any header is sent. Leaving early, by `aclose`, an error or a cancelled task, aborts what
still runs.
"""

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Literal

from fastapi.responses import Response
from pydantic import Field

from engines.protocol import (
    AsyncEngine,
    Constraint,
    EngineError,
    GenerateRequest,
    SamplingParams,
    Skip,
    TokenLogprob,
    TokenOutput,
    TokenStream,
)
from engines.text import TextStream, TextTokenizer
from engines.tracing import is_tracing, record_span
from service.deps import ResponseModel
from service.errors import ApiError, from_engine_error
from service.metrics import Metrics

Operation = Literal["chat", "text_completion"]
FinishReason = Literal["stop", "length"]
MIN_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot write."""
INT64 = 2**63
CONSTRAINT_SECONDS = 5.0
"""A schema or an expression is checked for so long; llguidance's own limits stop it long before."""


class PromptTokensDetails(ResponseModel):
    cached_tokens: int = Field(description="Prompt tokens whose keys and values were cached.")


class Usage(ResponseModel):
    """Tokens of all prompts, each counted once, and of all choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    ffn_rows_skipped: int = Field(description="(row, layer) pairs whose feed-forward was skipped.")
    ffn_rows_total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationSpec:
    """What to generate.

    Attributes:
        request_id: the answer's id; engine requests are named after it.
        n: choices per prompt; the choice at index p * n + i continues prompt p, with seed + i.
        continues_prompt: the text goes on where the prompt ended, so a leading space is kept.
        counts_stop_token: report the EOS or stop token that ended a choice among its tokens.
        deadline_seconds: from now on.
    """

    request_id: str
    operation: Operation
    model: str
    prompts: Sequence[Sequence[int]]
    n: int
    params: SamplingParams
    skip: Skip
    stop: tuple[str, ...] = ()
    constraint: Constraint | None = None
    tenant: str = ""
    skip_special_tokens: bool = True
    continues_prompt: bool = True
    counts_stop_token: bool = True
    deadline_seconds: float = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceDelta:
    """What is new of one choice.

    Attributes:
        logprobs: of the tokens whose text begins in `text`; empty where not asked for.
        offsets: for each of them, characters of the choice's text before it.
        prompt_logprobs: once, in the first delta, where asked for.
    """

    index: int
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    offsets: tuple[int, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: FinishReason | None = None


@dataclass(slots=True)
class ChoiceResult:
    """One whole choice."""

    index: int
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: FinishReason = "stop"

    def add(self, delta: ChoiceDelta) -> None:
        self.text += delta.text
        self.logprobs += delta.logprobs
        self.offsets += delta.offsets
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = delta.prompt_logprobs
        if delta.finish_reason is not None:
            self.finish_reason = delta.finish_reason


class _Choice:
    """One engine request: its tokens so far, its text, its times."""

    def __init__(
        self, index: int, request: GenerateRequest, spec: GenerationSpec, tokenizer: TextTokenizer
    ) -> None:
        self.index = index
        self.request = request
        self.stream: TokenStream | None = None
        self.finished = False
        self.recorded = False
        self.num_cached_tokens = 0
        self.ffn_rows_skipped = 0
        self.ffn_rows_total = 0
        self.first_token_at: float | None = None
        self.last_token_at: float | None = None
        self.queue_seconds: float | None = None
        self.prefill_seconds: float | None = None
        self._counts_stop_token = spec.counts_stop_token
        self._logprobs: list[TokenLogprob] = []
        self._num_reported = 0
        self._text = TextStream(
            tokenizer,
            spec.stop,
            request.params.min_tokens,
            skip_special_tokens=spec.skip_special_tokens,
            context=request.token_ids if spec.continues_prompt else (),
        )

    @property
    def num_tokens(self) -> int:
        """Generated tokens, up to the one that completed a stop string."""
        return self._text.num_tokens

    def take(self, output: TokenOutput) -> ChoiceDelta:
        """Raises: EngineError: the engine failed or aborted the request."""
        if output.finish_reason in ("error", "abort"):
            raise EngineError(
                output.error_code or "engine_dead", output.error or "the engine ended this request"
            )
        self.num_cached_tokens = max(self.num_cached_tokens, output.num_cached_tokens)
        self.ffn_rows_skipped = output.ffn_rows_skipped or self.ffn_rows_skipped
        self.ffn_rows_total = output.ffn_rows_total or self.ffn_rows_total
        if output.queue_seconds is not None:
            self.queue_seconds = output.queue_seconds
            self.prefill_seconds = output.prefill_seconds
        self._logprobs += output.logprobs or ()
        stops = output.stop_token_id is not None
        text = self._text.add(output.token_ids, ends_with_stop_token=stops)
        finish_reason: FinishReason | None = None
        if output.finish_reason is not None or self._text.stopped:
            text += self._text.finish()
            stopped = self._text.stopped or output.finish_reason == "stop"
            finish_reason = "stop" if stopped else "length"
            self.finished = True
        start, end = self._num_reported, self._text.num_released
        self._num_reported = end
        if stops and not self._counts_stop_token and not self._text.stopped:
            end = max(start, end - 1)
        wants_logprobs = self.request.params.logprobs is not None
        return ChoiceDelta(
            index=self.index,
            text=text,
            logprobs=tuple(self._logprobs[start:end]) if wants_logprobs else (),
            offsets=tuple(self._text.offsets[start:end]) if wants_logprobs else (),
            prompt_logprobs=output.prompt_logprobs,
            finish_reason=finish_reason,
        )


async def _check_constraint(constraint: Constraint) -> None:
    """Find out beside the event loop whether the engine could enforce it.

    Raises:
        ApiError: invalid_value, it could not, or the answer takes too long.
    """
    from engines.structured import PARAMS, check_constraint

    try:
        async with asyncio.timeout(CONSTRAINT_SECONDS):
            await asyncio.to_thread(check_constraint, constraint)
    except EngineError as error:
        raise from_engine_error(error) from None
    except TimeoutError:
        param = PARAMS[constraint.kind]
        raise ApiError("invalid_value", f"{param} takes too long to compile", param) from None


class Generation:
    """All choices of one HTTP request. Belongs to one event loop."""

    def __init__(
        self, engine: AsyncEngine, tokenizer: TextTokenizer, metrics: Metrics, spec: GenerationSpec
    ) -> None:
        self.spec = spec
        self._engine = engine
        self._metrics = metrics
        self._started_at = time.monotonic()
        self._deadline = asyncio.get_running_loop().time() + spec.deadline_seconds
        self._failed = False
        self._choices = [
            _Choice(index, request, spec, tokenizer)
            for index, request in enumerate(_engine_requests(spec))
        ]

    @classmethod
    async def start(
        cls, engine: AsyncEngine, tokenizer: TextTokenizer, metrics: Metrics, spec: GenerationSpec
    ) -> "Generation":
        """Submit everything.

        Raises:
            ApiError: the engine refused a request; none of them runs any more.
        """
        generation = cls(engine, tokenizer, metrics, spec)
        try:
            async with asyncio.timeout_at(generation._deadline):
                await generation._submit()
        except TimeoutError:
            await generation.aclose()
            raise _timed_out(spec) from None
        except BaseException:
            await generation.aclose()
            raise
        metrics.request_started(spec.model, max_tokens=spec.params.max_tokens, n=spec.n)
        return generation

    async def _submit(self) -> None:
        if self.spec.constraint is not None:
            await _check_constraint(self.spec.constraint)
        tasks = [asyncio.ensure_future(self._submit_one(choice)) for choice in self._choices]
        try:
            results = await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        errors = [result for result in results if isinstance(result, BaseException)]
        if errors:
            self._failed = True
            error = errors[0]
            raise from_engine_error(error) if isinstance(error, EngineError) else error

    async def _submit_one(self, choice: _Choice) -> None:
        choice.stream = await self._engine.generate(choice.request)

    async def deltas(self) -> AsyncGenerator[ChoiceDelta, None]:
        """What is new, of whichever choice has it. The last delta of each choice has a finish_reason.

        Raises:
            EngineError: the engine failed one choice; the others are aborted.
            ApiError: request_timeout.
        """
        try:
            async with aclosing(self._merged()) as merged:
                async for delta in merged:
                    yield delta
        except (EngineError, ApiError):
            self._failed = True
            raise
        finally:
            await self.aclose()

    async def collect(self) -> list[ChoiceResult]:
        """All choices, by index.

        Raises:
            ApiError
        """
        results = [ChoiceResult(choice.index) for choice in self._choices]
        try:
            async with aclosing(self.deltas()) as deltas:
                async for delta in deltas:
                    results[delta.index].add(delta)
        except EngineError as error:
            raise from_engine_error(error) from error
        return results

    def usage(self) -> Usage:
        first_choices = self._choices[:: self.spec.n]
        prompt_tokens = sum(len(prompt) for prompt in self.spec.prompts)
        completion_tokens = sum(choice.num_tokens for choice in self._choices)
        return Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
            prompt_tokens_details=PromptTokensDetails(
                cached_tokens=sum(choice.num_cached_tokens for choice in first_choices)
            ),
            ffn_rows_skipped=sum(choice.ffn_rows_skipped for choice in self._choices),
            ffn_rows_total=sum(choice.ffn_rows_total for choice in self._choices),
        )

    async def aclose(self) -> None:
        """Abort what still runs. May be called again."""
        streams = [choice.stream for choice in self._choices if choice.stream is not None]
        await asyncio.gather(*(stream.aclose() for stream in streams))
        left = False
        for choice in self._choices:
            if choice.stream is not None and not choice.recorded:
                left = not self._failed
                self._record(choice, "error" if self._failed else "abort")
        if left:
            self._metrics.request_cancelled(self.spec.model)

    async def _merged(self) -> AsyncGenerator[ChoiceDelta, None]:
        if len(self._choices) == 1:
            async with aclosing(self._run(self._choices[0])) as deltas:
                async for delta in deltas:
                    yield delta
            return
        queue: asyncio.Queue[ChoiceDelta | BaseException] = asyncio.Queue()
        tasks = [asyncio.ensure_future(self._pump(choice, queue)) for choice in self._choices]
        num_running = len(tasks)
        try:
            while num_running:
                item = await queue.get()
                if isinstance(item, BaseException):
                    raise item
                num_running -= item.finish_reason is not None
                yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _pump(
        self, choice: _Choice, queue: "asyncio.Queue[ChoiceDelta | BaseException]"
    ) -> None:
        try:
            async with aclosing(self._run(choice)) as deltas:
                async for delta in deltas:
                    queue.put_nowait(delta)
        except Exception as error:  # raised again by `_merged`
            queue.put_nowait(error)

    async def _run(self, choice: _Choice) -> AsyncGenerator[ChoiceDelta, None]:
        """One choice to its end; a stop string aborts the rest of its engine request."""
        stream = choice.stream
        assert stream is not None, "start() submitted it"
        async with aclosing(stream):
            while not choice.finished:
                delta = choice.take(await self._next(stream))
                self._observe(choice)
                if choice.finished:
                    self._record(choice, delta.finish_reason or "stop")
                if delta.text or delta.logprobs or delta.prompt_logprobs or delta.finish_reason:
                    yield delta

    async def _next(self, stream: TokenStream) -> TokenOutput:
        try:
            async with asyncio.timeout_at(self._deadline):
                return await anext(stream)
        except TimeoutError:
            raise _timed_out(self.spec) from None
        except StopAsyncIteration:
            raise EngineError(
                "internal_error", "the engine ended a request without a reason"
            ) from None

    def _observe(self, choice: _Choice) -> None:
        if not choice.num_tokens:
            return
        now = time.monotonic()
        if choice.first_token_at is None:
            choice.first_token_at = now
            waited = now - self._started_at
            self._metrics.observe_ttft(self.spec.model, self.spec.operation, waited)
        elif choice.last_token_at is not None:
            self._metrics.observe_inter_token(self.spec.model, now - choice.last_token_at)
        choice.last_token_at = now

    def _record(self, choice: _Choice, finish_reason: str) -> None:
        choice.recorded = True
        first, last = choice.first_token_at, choice.last_token_at
        self._metrics.request_finished(
            self.spec.model,
            self.spec.operation,
            finish_reason=finish_reason,
            prompt_tokens=len(choice.request.token_ids),
            generation_tokens=choice.num_tokens,
            e2e_seconds=time.monotonic() - self._started_at,
            decode_seconds=last - first if first is not None and last is not None else 0.0,
            ffn_rows_skipped=choice.ffn_rows_skipped,
            ffn_rows_total=choice.ffn_rows_total,
            queue_seconds=choice.queue_seconds,
            prefill_seconds=choice.prefill_seconds,
        )
        if is_tracing():
            self._trace(choice, finish_reason)

    def _trace(self, choice: _Choice, finish_reason: str) -> None:
        """Where the time of a choice went: from its first token backwards by what the engine measured, and on."""
        first, last = choice.first_token_at, choice.last_token_at
        queued, prefilled = choice.queue_seconds, choice.prefill_seconds
        if first is None or last is None or queued is None or prefilled is None:
            return
        common: dict[str, str | int] = {
            "gen_ai.request.model": self.spec.model,
            "lathe.choice": choice.index,
        }
        began = first - prefilled
        record_span("queue", began - queued, began, common)
        num_prompt_tokens = len(choice.request.token_ids)
        prompt: dict[str, str | int] = {
            "gen_ai.usage.input_tokens": num_prompt_tokens,
            "lathe.cached_tokens": choice.num_cached_tokens,
        }
        record_span("prefill", began, first, common | prompt)
        output: dict[str, str | int] = {
            "gen_ai.usage.output_tokens": choice.num_tokens,
            "gen_ai.response.finish_reason": finish_reason,
        }
        record_span("decode", first, last, common | output)


def _engine_requests(spec: GenerationSpec) -> list[GenerateRequest]:
    requests: list[GenerateRequest] = []
    for prompt in spec.prompts:
        token_ids = tuple(prompt)
        for choice in range(spec.n):
            params = spec.params
            if params.seed is not None and choice:
                seed = (params.seed + choice + INT64) % (2 * INT64) - INT64
                params = replace(params, seed=seed)
            requests.append(
                GenerateRequest(
                    request_id=f"{spec.request_id}-{len(requests)}",
                    token_ids=token_ids,
                    params=params,
                    tenant=spec.tenant,
                    skip=spec.skip,
                    constraint=spec.constraint,
                )
            )
    return requests


def _timed_out(spec: GenerationSpec) -> ApiError:
    return ApiError(
        "request_timeout", f"the request took longer than {spec.deadline_seconds:g} seconds"
    )


def finite(logprob: float) -> float:
    return max(logprob, MIN_LOGPROB) if not math.isnan(logprob) else MIN_LOGPROB


def token_name(tokenizer: TextTokenizer, token_id: int) -> str:
    """A token as OpenAI shows it: its text, or `bytes:\\xf0\\x9f` for a part of a character."""
    data = tokenizer.token_bytes(token_id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def json_response(model: ResponseModel) -> Response:
    """A response model as sent, without FastAPI validating and copying it once more."""
    return Response(model.model_dump_json(), media_type="application/json")


def fingerprint(engine: AsyncEngine) -> str:
    """OpenAI's system_fingerprint: which weights answered."""
    return f"fp_{engine.info.checkpoint_hash[:10]}"
