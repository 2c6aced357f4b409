"""An engine whose every answer can be computed by hand: it repeats the prompt, one token a step.

The generated ids are the prompt's ids (placeholders left out) and then EOS; `min_tokens` and `ignore_eos`
make it start over. `echo_logprob` gives every log-probability, `echo_vector` every embedding.
"""

import math
import struct
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from engines.protocol import (
    ROW_PLACEHOLDER,
    ContinuationScore,
    EmbedRequest,
    EmbedResult,
    EngineError,
    EngineInfo,
    EngineStats,
    FinishReason,
    GenerateRequest,
    SamplingParams,
    ScoreRequest,
    ScoreResult,
    TokenLogprob,
    TokenOutput,
)

EOS = 2
VOCAB_SIZE = 1000
ECHO_DIM = 4

ECHO_INFO = EngineInfo(
    model="echo",
    kind="decoder",
    engine="echo",
    checkpoint_hash="0" * 64,
    vocab_size=VOCAB_SIZE,
    hidden_size=ECHO_DIM,
    max_model_len=512,
    eos_token_ids=(EOS,),
    max_num_seqs=4,
    device="cpu",
    dtype="float32",
    resident_bytes=1024,
    load_seconds=0.0,
    unsupported=("skip", "response_format", "regex"),
)


def echo_token(prompt_ids: Sequence[int], params: SamplingParams, index: int, eos: int) -> int:
    """The generated token at `index`."""
    echoed = [token_id for token_id in prompt_ids if token_id != ROW_PLACEHOLDER] or [0]
    if params.ignore_eos or index < max(len(echoed), params.min_tokens):
        return echoed[index % len(echoed)]
    return eos


def echo_logprob(token_id: int) -> float:
    """The log-probability of a token, wherever it stands: -0.1 to -1.0."""
    return -(token_id % 10 + 1) / 10


def echo_token_logprob(token_id: int, num_top: int, vocab_size: int = VOCAB_SIZE) -> TokenLogprob:
    """The chosen token first, then the ids above it, each one nat less likely."""
    top = tuple(
        ((token_id + rank) % vocab_size, echo_logprob(token_id) - rank) for rank in range(num_top)
    )
    return TokenLogprob(token_id=token_id, logprob=echo_logprob(token_id), top=top)


def echo_vector(token_ids: Sequence[int], normalize: bool, dim: int = ECHO_DIM) -> list[float]:
    """(number of tokens, their sum, the first, the last, 0, 0 ...)."""
    vector = [float(len(token_ids)), float(sum(token_ids)), float(token_ids[0])]
    vector = [*vector, float(token_ids[-1]), *([0.0] * dim)][:dim]
    norm = math.sqrt(sum(value * value for value in vector))
    return [value / norm for value in vector] if normalize else vector


def echo_embed(request: EmbedRequest, dim: int = ECHO_DIM) -> EmbedResult:
    values = [v for ids in request.token_ids for v in echo_vector(ids, request.normalize, dim)]
    return EmbedResult(
        dim=dim,
        vectors=struct.pack(f"<{len(values)}f", *values),
        num_tokens=sum(len(ids) for ids in request.token_ids),
    )


def echo_score(request: ScoreRequest) -> ScoreResult:
    scores = tuple(
        ContinuationScore(
            logprob=sum(echo_logprob(token_id) for token_id in ids),
            is_greedy=False,
            token_logprobs=tuple(echo_logprob(token_id) for token_id in ids),
        )
        for ids in request.continuation_ids
    )
    num_tokens = len(request.context_ids) + sum(len(ids) for ids in request.continuation_ids)
    return ScoreResult(scores=scores, num_tokens=num_tokens)


def echo_outputs(
    request: GenerateRequest, reply_ids: Iterable[int], eos_token_ids: Sequence[int]
) -> Iterable[TokenOutput]:
    """One output per reply token, cut at EOS, stop token and max_tokens as an engine would."""
    params = request.params
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    if params.prompt_logprobs is not None:
        prompt_logprobs = tuple(
            echo_token_logprob(token_id, params.prompt_logprobs)
            if position
            else TokenLogprob(token_id=token_id, logprob=None)
            for position, token_id in enumerate(request.token_ids)
        )
    if params.max_tokens == 0:
        yield TokenOutput(
            request_id=request.request_id, prompt_logprobs=prompt_logprobs, finish_reason="length"
        )
        return
    for index, token_id in enumerate(reply_ids):
        stops = (
            (token_id in eos_token_ids and not params.ignore_eos)
            or token_id in params.stop_token_ids
        ) and index >= params.min_tokens
        last = index + 1 >= params.max_tokens
        finish_reason: FinishReason | None = "stop" if stops else "length" if last else None
        yield TokenOutput(
            request_id=request.request_id,
            token_ids=(token_id,),
            logprobs=None
            if params.logprobs is None
            else (echo_token_logprob(token_id, params.logprobs),),
            prompt_logprobs=prompt_logprobs if index == 0 else None,
            finish_reason=finish_reason,
            stop_token_id=token_id if stops else None,
        )
        if finish_reason is not None:
            return
    yield TokenOutput(request_id=request.request_id, finish_reason="length")


@dataclass
class _Running:
    request: GenerateRequest
    outputs: Iterator[TokenOutput]


@dataclass
class EchoEngine:
    """Engine protocol without a model.

    Attributes:
        info: replace fields with `dataclasses.replace` to shrink limits.
        max_num_waiting: requests beyond the running ones before "queue_full".
        fail_on_token: a prompt with this id ends its request with an error output at its first step.
        raise_on_token: a prompt with this id makes `step` raise RuntimeError.
        step_seconds: what a step takes; a model is never as fast as nothing.
        hold_at: once so many tokens are generated, a step waits for as long as `hold_file` is there.
        submitted, aborted: request ids in order of arrival.
    """

    info: EngineInfo = ECHO_INFO
    max_num_waiting: int = 256
    fail_on_token: int | None = None
    raise_on_token: int | None = None
    step_seconds: float = 0.0
    hold_at: int | None = None
    hold_file: Path | None = None
    submitted: list[str] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    closed: bool = False
    num_steps: int = 0
    _requests: dict[str, _Running] = field(default_factory=dict)
    _sleeping: bool = False
    _prompt_tokens: int = 0
    _generation_tokens: int = 0

    def submit(self, request: GenerateRequest) -> None:
        self._check(request)
        self.submitted.append(request.request_id)
        self._prompt_tokens += len(request.token_ids)
        reply = (
            echo_token(request.token_ids, request.params, index, self.info.eos_token_ids[0])
            for index in range(request.params.max_tokens)
        )
        outputs = iter(echo_outputs(request, reply, self.info.eos_token_ids))
        self._requests[request.request_id] = _Running(request, outputs)

    def _check(self, request: GenerateRequest) -> None:
        if self._sleeping:
            raise EngineError("sleeping", "the model sleeps")
        if request.skip.mode != "off":
            raise EngineError("unsupported_parameter", "skip is not supported", "skip")
        if request.constraint is not None:
            raise EngineError("unsupported_parameter", "no constraints", "response_format")
        if not request.token_ids:
            raise EngineError("invalid_value", "the prompt is empty", "prompt")
        length = len(request.token_ids) + request.params.max_tokens
        if length > self.info.max_model_len:
            raise EngineError(
                "context_length_exceeded",
                f"prompt ({len(request.token_ids)}) plus max_tokens ({request.params.max_tokens}) "
                f"is {length}, at most {self.info.max_model_len} fit",
            )
        if len(self._requests) >= self.info.max_num_seqs + self.max_num_waiting:
            raise EngineError("queue_full", "too many requests wait")

    def abort(self, request_id: str) -> None:
        if self._requests.pop(request_id, None) is not None:
            self.aborted.append(request_id)

    def has_work(self) -> bool:
        return bool(self._requests) and not self._sleeping

    def step(self) -> list[TokenOutput]:
        self.num_steps += 1
        time.sleep(self.step_seconds)
        if self.hold_file is not None and self._generation_tokens >= (self.hold_at or 0):
            while self.hold_file.exists():
                time.sleep(0.01)
        outputs: list[TokenOutput] = []
        for request_id, running in list(self._requests.items())[: self.info.max_num_seqs]:
            if self.raise_on_token in running.request.token_ids:
                raise RuntimeError("told to raise")
            if self.fail_on_token in running.request.token_ids:
                output = TokenOutput(
                    request_id=request_id,
                    finish_reason="error",
                    error="told to fail",
                    error_code="internal_error",
                )
            else:
                output = next(running.outputs)
            self._generation_tokens += len(output.token_ids)
            outputs.append(output)
            if output.finish_reason is not None:
                del self._requests[request_id]
        return outputs

    def embed(self, request: EmbedRequest) -> EmbedResult:
        return echo_embed(request, self.info.hidden_size)

    def score(self, request: ScoreRequest) -> ScoreResult:
        return echo_score(request)

    def sleep(self) -> None:
        self._sleeping = True

    def wake(self) -> None:
        self._sleeping = False

    def stats(self) -> EngineStats:
        num_running = min(len(self._requests), self.info.max_num_seqs)
        return replace(
            EMPTY_STATS,
            num_requests_running=num_running,
            num_requests_waiting=len(self._requests) - num_running,
            prompt_tokens_total=self._prompt_tokens,
            generation_tokens_total=self._generation_tokens,
            sleeping=self._sleeping,
        )

    def close(self) -> None:
        self.closed = True


EMPTY_STATS = EngineStats(
    num_requests_running=0,
    num_requests_waiting=0,
    kv_cache_usage_ratio=0.0,
    prompt_tokens_total=0,
    generation_tokens_total=0,
    preemptions_total=0,
    prefix_cache_queries_total=0,
    prefix_cache_hits_total=0,
    ffn_rows_skipped_total=0,
    ffn_rows_total=0,
    last_output_at=None,
    sleeping=False,
    rss_bytes=0,
)
