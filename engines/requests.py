"""What every decoding engine does with a request alike: refuse what cannot be, and turn choices into outputs.

Shapes: S positions, V vocabulary, H hidden.
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from engines.memory import is_out_of_memory
from engines.protocol import (
    ROW_PLACEHOLDER,
    ContinuationScore,
    EngineError,
    EngineInfo,
    ErrorCode,
    FinishReason,
    GenerateRequest,
    ScoreRequest,
    TokenLogprob,
    TokenOutput,
    num_placeholders,
)
from engines.sampling import SamplingState, build_generator, choose_tokens, token_logprobs
from engines.structured import UnkeptConstraintError

MAX_LOGITS_ROWS = 256
"""Positions whose logits are held at once for log-probabilities: a float32 row of 50,000 words is 200 KB."""

logger = logging.getLogger("lathe.engine")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """Attributes:
    max_num_batched_tokens: prompt tokens and decoding requests of one step.
    kv_cache_bytes: None leaves it at `memory.default_kv_cache_bytes`.
    """

    max_num_seqs: int = 16
    max_num_waiting: int = 256
    max_num_batched_tokens: int = 512
    kv_cache_bytes: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.max_num_seqs <= self.max_num_batched_tokens:
            raise ValueError(
                f"max_num_seqs is {self.max_num_seqs}, allowed are 1 to max_num_batched_tokens"
                f" {self.max_num_batched_tokens}"
            )


@dataclass(slots=True, eq=False, kw_only=True)
class Generation(SamplingState):
    """One accepted request, and what came out of it so far.

    Attributes:
        tau: similarity from which its rows skip feed-forwards; None where none does.
        ffn_rows_skipped, ffn_rows_total: (row, layer) pairs of generated tokens; those that are computed anew after a
            preemption count once, which is what `num_counted_tokens`, positions so far, is for.
        submitted_at, started_at: when it was accepted, and when its first step began; on the monotonic clock.
    """

    request: GenerateRequest
    tau: float | None = None
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    num_cached_tokens: int = 0
    ffn_rows_skipped: int = 0
    ffn_rows_total: int = 0
    num_counted_tokens: int = 0
    submitted_at: float = field(default_factory=time.monotonic)
    started_at: float | None = None

    @classmethod
    def start(cls, info: EngineInfo, request: GenerateRequest) -> Self:
        params = request.params
        eos_token_ids = () if params.ignore_eos else info.eos_token_ids
        return cls(
            request=request,
            params=params,
            prompt_ids=tuple(t for t in request.token_ids if t != ROW_PLACEHOLDER),
            end_ids=frozenset(eos_token_ids) | frozenset(params.stop_token_ids),
            generator=build_generator(params.seed),
        )

    @property
    def key(self) -> str:
        return self.request.request_id

    @property
    def max_length(self) -> int:
        return len(self.request.token_ids) + self.request.params.max_tokens

    def begin(self) -> None:
        """A step computes some of it: the first such ends its wait."""
        if self.started_at is None:
            self.started_at = time.monotonic()

    def take(self, token_id: int, logits_V: Tensor) -> TokenOutput:
        """Add the chosen token; the output says so, and whether it was the last.

        Args:
            logits_V: that it was chosen from, for its log-probability.
        """
        params = self.params
        logprobs: tuple[TokenLogprob, ...] | None = None
        if params.logprobs is not None:
            logprobs = tuple(token_logprobs(logits_V[None], [token_id], params.logprobs))
        is_first = not self.output_ids
        self.output_ids.append(token_id)
        is_end = token_id in self.end_ids
        finish_reason: FinishReason | None = "stop" if is_end else None
        if self.matcher is not None:
            self.matcher.take(token_id)
            if self.matcher.is_finished:
                finish_reason = "stop"
        if finish_reason is None and len(self.output_ids) >= params.max_tokens:
            finish_reason = "length"
        has_prompt_logprobs = is_first and params.prompt_logprobs is not None
        queue_seconds: float | None = None
        prefill_seconds: float | None = None
        if is_first and self.started_at is not None:
            queue_seconds = self.started_at - self.submitted_at
            prefill_seconds = time.monotonic() - self.started_at
        return TokenOutput(
            request_id=self.key,
            token_ids=(token_id,),
            logprobs=logprobs,
            prompt_logprobs=tuple(self.prompt_logprobs) if has_prompt_logprobs else None,
            finish_reason=finish_reason,
            stop_token_id=token_id if is_end else None,
            num_cached_tokens=self.num_cached_tokens,
            ffn_rows_skipped=self.ffn_rows_skipped,
            ffn_rows_total=self.ffn_rows_total,
            queue_seconds=queue_seconds,
            prefill_seconds=prefill_seconds,
        )

    def prompt_only_output(self) -> TokenOutput:
        """The one output of a request for no tokens but its prompt's log-probabilities."""
        return TokenOutput(
            request_id=self.key,
            prompt_logprobs=tuple(self.prompt_logprobs),
            finish_reason="length",
            num_cached_tokens=self.num_cached_tokens,
        )

    def error_output(self, code: ErrorCode, message: str) -> TokenOutput:
        return TokenOutput(
            request_id=self.key, finish_reason="error", error=message, error_code=code
        )


def check_generate(info: EngineInfo, request: GenerateRequest) -> None:
    """Raises: EngineError: the prompt or a parameter is out of range, or the context too short for both."""
    check_prompt(info, request.token_ids, request.embedding_rows, "prompt")
    params = request.params
    if params.max_tokens < 0 or (params.max_tokens == 0 and params.prompt_logprobs is None):
        raise EngineError(
            "invalid_value",
            f"max_tokens is {params.max_tokens}; at least 1, or 0 with prompt log-probabilities",
            "max_tokens",
        )
    _check_length(info, len(request.token_ids), params.max_tokens, "max_tokens", "max_tokens")
    for token_id in params.logit_bias:
        if not 0 <= token_id < info.vocab_size:
            raise EngineError(
                "invalid_value",
                f"logit_bias names token {token_id}, allowed are 0 to {info.vocab_size - 1}",
                "logit_bias",
            )

    if request.constraint is not None and (params.ignore_eos or params.min_tokens):
        raise EngineError(
            "invalid_value",
            "a constrained output ends where its language does: ignore_eos and min_tokens cannot go with it",
            "ignore_eos" if params.ignore_eos else "min_tokens",
        )


def check_score(info: EngineInfo, request: ScoreRequest) -> None:
    """Raises: EngineError: as for `check_generate`."""
    check_prompt(info, request.context_ids, request.embedding_rows, "context")
    for index, ids in enumerate(request.continuation_ids):
        param = f"continuations[{index}]"
        check_prompt(info, ids, None, param)
        _check_length(info, len(request.context_ids), len(ids), "continuation", param)


def check_prompt(
    info: EngineInfo, token_ids: Sequence[int], rows: bytes | None, param: str
) -> None:
    """Raises: EngineError: empty, ids out of range, or embedding rows that do not match the placeholders."""
    if not token_ids:
        raise EngineError("invalid_value", f"{param} must have at least one token", param)
    lowest = 0 if rows is None else ROW_PLACEHOLDER
    for token_id in token_ids:
        if not lowest <= token_id < info.vocab_size:
            raise EngineError(
                "invalid_value",
                f"token id {token_id} in {param}, allowed are 0 to {info.vocab_size - 1}",
                param,
            )
    if rows is None:
        return
    num_rows = num_placeholders(token_ids)
    expected = num_rows * info.hidden_size * 4
    if len(rows) != expected:
        raise EngineError(
            "invalid_value",
            f"embedding rows have {len(rows)} bytes, {num_rows} placeholders of"
            f" {info.hidden_size} float32 values need {expected}",
            param,
        )
    if rows and not _are_finite(rows, getattr(torch, info.dtype)):
        raise EngineError("invalid_value", f"embedding rows must be finite in {info.dtype}", param)


def _are_finite(rows: bytes, dtype: torch.dtype) -> bool:
    values = torch.frombuffer(bytearray(rows), dtype=torch.float32)
    return bool(values.to(dtype).isfinite().all())


def _check_length(
    info: EngineInfo, num_prompt_tokens: int, num_more: int, more: str, param: str
) -> None:
    total = num_prompt_tokens + num_more
    if total > info.max_model_len:
        raise EngineError(
            "context_length_exceeded",
            f"a prompt of {num_prompt_tokens} tokens and {more} of {num_more} make {total}; the context of"
            f" {info.model} holds {info.max_model_len}",
            param,
        )


def mixed_embeddings(
    token_ids: Sequence[int], rows: bytes, embed: Callable[[Tensor], Tensor], device: torch.device
) -> Tensor:
    """Embeddings (S, H) of ids, with an embedding row at each placeholder."""
    ids_S = torch.tensor(token_ids, device=device)
    if not rows:
        return embed(ids_S)
    embeddings_SH = embed(ids_S.clamp(min=0)).clone()
    rows_RH = torch.frombuffer(bytearray(rows), dtype=torch.float32)
    rows_RH = rows_RH.view(-1, embeddings_SH.shape[1]).to(embeddings_SH)
    embeddings_SH[ids_S == ROW_PLACEHOLDER] = rows_RH
    return embeddings_SH


def sample(generations: Sequence[Generation], logits_SV: Tensor) -> list[TokenOutput]:
    """Choose and take the next token of each; one that cannot be chosen for ends with an error output."""
    chosen: Sequence[int | Exception]
    try:
        chosen = choose_tokens(logits_SV, generations)
    except Exception as error:
        chosen = [error] * len(generations)
    outputs = []
    for generation, token_id, logits_V in zip(generations, chosen, logits_SV, strict=True):
        try:
            if isinstance(token_id, Exception):
                raise token_id
            outputs.append(generation.take(token_id, logits_V))
        except Exception as error:
            logger.error("no token was chosen", exc_info=error)
            outputs.append(_sampling_failure(generation, error))
    return outputs


def _sampling_failure(generation: Generation, error: Exception) -> TokenOutput:
    if isinstance(error, UnkeptConstraintError):
        return generation.error_output("invalid_value", str(error))
    if isinstance(error, ValueError):  # it says what is wrong with the request
        return generation.error_output("internal_error", str(error))
    if is_out_of_memory(error):
        return generation.error_output("out_of_memory", "not enough memory for this request")
    message = "the engine failed while it chose a token"
    return generation.error_output("internal_error", message)


def prompt_logprobs(logits_SV: Tensor, next_ids: Sequence[int], num_top: int) -> list[TokenLogprob]:
    """Of the prompt tokens behind S positions; a placeholder has none. The last position may have no next one."""
    entries = token_logprobs(logits_SV[: len(next_ids)], [max(i, 0) for i in next_ids], num_top)
    return [
        entry
        if token_id != ROW_PLACEHOLDER
        else TokenLogprob(token_id=ROW_PLACEHOLDER, logprob=None)
        for entry, token_id in zip(entries, next_ids, strict=True)
    ]


def score_tokens(logits_SV: Tensor, ids: Sequence[int]) -> list[tuple[float, bool]]:
    """Log-probability of the token behind each position, and whether it is the likeliest."""
    likeliest = logits_SV.argmax(dim=1).tolist()
    entries = token_logprobs(logits_SV, ids, 0)
    return [
        (entry.logprob, entry.token_id == best)
        for entry, best in zip(entries, likeliest, strict=True)
        if entry.logprob is not None
    ]


def continuation_score(tokens: Sequence[tuple[float, bool]]) -> ContinuationScore:
    """Args: tokens: of the continuation, as `score_tokens` gives them."""
    return ContinuationScore(
        logprob=math.fsum(logprob for logprob, _ in tokens),
        is_greedy=all(is_likeliest for _, is_likeliest in tokens),
        token_logprobs=tuple(logprob for logprob, _ in tokens),
    )
