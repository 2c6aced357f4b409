"""The engine over transformers' modules: any causal language model that it knows, and the oracle of faster ones.

A step decodes one token for every running request, then gives up to `PREFILL_CHUNK` prompt tokens to requests that
are still in prefill, in turn, so that a long prompt delays nobody for long. `decoder_caches.py` runs the model,
`sampling.py` chooses tokens; here is who runs when, and what is refused. The greedy tokens of a request are
`generate`'s. In bfloat16 its company can still move a choice between near ties, because a batched GEMM rounds
differently; in float32 it was not seen to.

Shapes: S positions, V vocabulary, H hidden, B rows.
"""

import ctypes
import gc
import heapq
import itertools
import logging
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from engines.decoder_caches import Decoder, Forward, build_decoder, repeated
from engines.protocol import (
    ROW_PLACEHOLDER,
    ContinuationScore,
    EmbedRequest,
    EmbedResult,
    EngineError,
    EngineInfo,
    EngineStats,
    ErrorCode,
    FinishReason,
    GenerateRequest,
    SamplingParams,
    ScoreRequest,
    ScoreResult,
    TokenLogprob,
    TokenOutput,
    num_placeholders,
)
from engines.sampling import build_generator, choose_token, token_logprobs
from engines.vectors import check_texts, embed_result, length_batches, rss_bytes

PREFILL_CHUNK = 512
MAX_LOGITS_ROWS = 256
"""Positions whose logits are held at once for log-probabilities: a float32 row of 50,000 words is 200 KB."""
MAX_CONTINUATION_ROWS = 16
"""Continuations scored in one pass; each holds a copy of the context's cache."""
DEFAULT_KV_CACHE_BYTES = 2 * 2**30
UNSUPPORTED = ("skip", "response_format", "regex")

logger = logging.getLogger("lathe.engine")


@dataclass(slots=True, eq=False)
class _Running:
    """One accepted request.

    Attributes:
        num_computed_tokens: of the prompt.
        end_ids: EOS and stop tokens that end it.
    """

    request: GenerateRequest
    prompt_ids: tuple[int, ...]
    end_ids: frozenset[int]
    generator: torch.Generator
    num_computed_tokens: int = 0
    output_ids: list[int] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)

    @property
    def key(self) -> str:
        return self.request.request_id

    @property
    def max_length(self) -> int:
        return len(self.request.token_ids) + self.request.params.max_tokens

    @property
    def is_plain_greedy(self) -> bool:
        """The token is the argmax of the raw logits, and nothing is reported about it."""
        params = self.request.params
        neutral = SamplingParams(
            max_tokens=params.max_tokens,
            temperature=0,
            top_p=params.top_p,
            top_k=params.top_k,
            min_p=params.min_p,
            seed=params.seed,
            stop_token_ids=params.stop_token_ids,
            ignore_eos=params.ignore_eos,
            prompt_logprobs=params.prompt_logprobs,
        )
        return params == neutral


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """Attributes: kv_cache_bytes: None leaves it at 2 GiB, or less where a quarter of the memory is less."""

    max_num_seqs: int = 16
    max_num_waiting: int = 256
    kv_cache_bytes: int | None = None


class TransformersEngine:
    """An `Engine` over one transformers model in eval mode.

    Args:
        load: makes the model; called now, and again by `wake`.
    """

    def __init__(
        self,
        load: Callable[[], Any],
        *,
        model_id: str,
        checkpoint_hash: str = "",
        limits: EngineLimits | None = None,
    ) -> None:
        start = time.monotonic()
        self._load = load
        self._limits = limits or EngineLimits()
        self._kv_cache_bytes = self._limits.kv_cache_bytes or default_kv_cache_bytes()
        self._waiting: list[tuple[int, int, _Running]] = []
        self._arrivals = itertools.count()
        self._prefilling: deque[_Running] = deque()
        self._decoding: list[_Running] = []
        self._ended: list[TokenOutput] = []
        self._prompt_tokens = 0
        self._generation_tokens = 0
        self._last_output_at: float | None = None
        self._model: Any = load()
        self._decoder: Decoder = build_decoder(self._model)
        self._forward = Forward(self._model)
        info = _model_info(self._model, self._decoder)
        fitting = self._kv_cache_bytes // self._decoder.bytes_per_token
        self._info = replace(
            info,
            model=model_id,
            checkpoint_hash=checkpoint_hash,
            max_model_len=min(info.max_model_len, fitting),
            max_num_seqs=self._limits.max_num_seqs,
            load_seconds=time.monotonic() - start,
        )

    @classmethod
    def load(
        cls,
        model_id: str,
        folder: Path,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: Literal["auto", "cpu", "cuda"] = "auto",
        limits: EngineLimits | None = None,
    ) -> "TransformersEngine":
        """Load a Lathe checkpoint.

        Raises:
            CheckpointError
        """
        from compression.checkpoint import checkpoint_hash, read_manifest
        from compression.hf import load_model

        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(
            lambda: load_model(folder, dtype=dtype, device=device),
            model_id=model_id,
            checkpoint_hash=checkpoint_hash(read_manifest(folder)),
            limits=limits,
        )

    @property
    def info(self) -> EngineInfo:
        return self._info

    # Accepting and ending requests

    def submit(self, request: GenerateRequest) -> None:
        self._check_awake()
        self._check_supported(request)
        _check_prompt(self._info, request.token_ids, request.embedding_rows, "prompt")
        _check_params(self._info, request.params, len(request.token_ids))
        if len(self._waiting) >= self._limits.max_num_waiting:
            raise EngineError(
                "queue_full", f"{len(self._waiting)} requests wait already, no more are taken"
            )
        params = request.params
        eos_token_ids = () if params.ignore_eos else self._info.eos_token_ids
        running = _Running(
            request=request,
            prompt_ids=tuple(t for t in request.token_ids if t != ROW_PLACEHOLDER),
            end_ids=frozenset(eos_token_ids) | frozenset(params.stop_token_ids),
            generator=build_generator(params.seed),
        )
        heapq.heappush(self._waiting, (request.priority, next(self._arrivals), running))
        self._prompt_tokens += len(request.token_ids)

    def _check_awake(self) -> None:
        if self._model is None:
            raise EngineError("sleeping", f"{self._info.model} is asleep")

    def _check_supported(self, request: GenerateRequest) -> None:
        if request.skip.mode != "off":
            raise EngineError(
                "unsupported_parameter",
                f"skip is {request.skip.mode!r}; {self._info.model} runs on an engine that only has 'off'",
                "skip",
            )
        if request.constraint is not None:
            param = "regex" if request.constraint.kind == "regex" else "response_format"
            raise EngineError(
                "unsupported_parameter",
                f"{self._info.model} runs on an engine without structured output",
                param,
            )

    def abort(self, request_id: str) -> None:
        self._forget([request_id])
        waiting = [entry for entry in self._waiting if entry[2].key != request_id]
        if len(waiting) < len(self._waiting):
            heapq.heapify(waiting)
            self._waiting = waiting

    @torch.inference_mode()
    def _forget(self, request_ids: Iterable[str]) -> None:
        """Drop running requests and free their caches."""
        gone = set(request_ids)
        self._prefilling = deque(r for r in self._prefilling if r.key not in gone)
        self._decoding = [r for r in self._decoding if r.key not in gone]
        for request_id in gone:
            self._decoder.close(request_id)

    # Steps

    def has_work(self) -> bool:
        return bool(self._decoding or self._prefilling or self._waiting or self._ended)

    @torch.inference_mode()
    def step(self) -> list[TokenOutput]:
        outputs, self._ended = self._ended, []
        if self._model is None:
            return outputs
        outputs += self._decode()
        self._admit()
        outputs += self._prefill()
        self._forget(output.request_id for output in outputs if output.finish_reason is not None)
        self._generation_tokens += sum(len(output.token_ids) for output in outputs)
        if outputs:
            self._last_output_at = time.time()
        return outputs

    def _admit(self) -> None:
        """Waiting requests start in order of priority and arrival while the cache's worst case fits."""
        while self._waiting:
            num_running = len(self._prefilling) + len(self._decoding)
            running = self._waiting[0][2]
            needed = self._decoder.bytes_with(running.max_length)
            if num_running >= self._limits.max_num_seqs:
                return
            if num_running and needed > self._kv_cache_bytes:
                return
            heapq.heappop(self._waiting)
            self._decoder.open(running.key, running.max_length)
            self._prefilling.append(running)

    def _decode(self) -> list[TokenOutput]:
        if not self._decoding:
            return []
        batch = self._decoding
        try:
            logits_BV = self._decoder.decode(
                [running.key for running in batch], [running.output_ids[-1] for running in batch]
            )
        except Exception as error:
            return self._failed_pass(batch, error)
        return self._sample(batch, logits_BV)

    def _failed_pass(self, batch: Sequence[_Running], error: Exception) -> list[TokenOutput]:
        """Short of memory, the youngest request gives way and the others go on; else all of the pass fail."""
        if _is_out_of_memory(error):
            logger.warning("out of memory with %d requests in a pass", len(batch))
            return [_error_output(batch[-1], "out_of_memory", "not enough memory for this request")]
        logger.error("a forward pass failed", exc_info=error)
        message = "the engine failed while it ran this request"
        return [_error_output(running, "internal_error", message) for running in batch]

    def _prefill(self) -> list[TokenOutput]:
        """Share out one chunk's worth of prompt tokens, the first in turn first."""
        outputs: list[TokenOutput] = []
        budget = PREFILL_CHUNK
        for _ in range(len(self._prefilling)):
            if budget == 0:
                break
            running = self._prefilling.popleft()
            num_left = len(running.request.token_ids) - running.num_computed_tokens
            num_tokens = min(num_left, budget)
            budget -= num_tokens
            try:
                last_1V = self._prefill_chunk(running, num_tokens)
            except Exception as error:
                outputs += self._failed_pass([running], error)
                continue
            if num_tokens < num_left:
                self._prefilling.append(running)
                continue
            if running.request.params.max_tokens == 0:
                outputs.append(self._prompt_only_output(running))
                continue
            self._decoding.append(running)
            outputs += self._sample([running], last_1V)
        return outputs

    def _prefill_chunk(self, running: _Running, num_tokens: int) -> Tensor:
        """Logits (1, V) of the last position of the chunk."""
        request = running.request
        start = running.num_computed_tokens
        inputs = self._inputs(request.token_ids, request.embedding_rows, start, start + num_tokens)
        num_top = request.params.prompt_logprobs
        if num_top is None:
            logits_SV = self._decoder.prefill(running.key, inputs, 1)
            running.num_computed_tokens += num_tokens
            return logits_SV
        if start == 0:
            first = TokenLogprob(token_id=request.token_ids[0], logprob=None)
            running.prompt_logprobs.append(first)
        for part in torch.split(inputs, MAX_LOGITS_ROWS):
            logits_SV = self._decoder.prefill(running.key, part, len(part))
            running.num_computed_tokens += len(part)
            end = running.num_computed_tokens
            next_ids = request.token_ids[end - len(part) + 1 : end + 1]
            running.prompt_logprobs += _prompt_logprobs(logits_SV, next_ids, num_top)
        return logits_SV[-1:]

    def _prompt_only_output(self, running: _Running) -> TokenOutput:
        return TokenOutput(
            request_id=running.key,
            prompt_logprobs=tuple(running.prompt_logprobs),
            finish_reason="length",
        )

    def _sample(self, batch: Sequence[_Running], logits_BV: Tensor) -> list[TokenOutput]:
        greedy_ids = logits_BV.argmax(dim=1).tolist()
        outputs = []
        for index, running in enumerate(batch):
            try:
                outputs.append(self._take_token(running, logits_BV[index], greedy_ids[index]))
            except Exception as error:
                code: ErrorCode = "internal_error"
                message = "the engine failed while it chose a token"
                if isinstance(error, ValueError):  # `choose_token` says what is wrong
                    message = str(error)
                elif _is_out_of_memory(error):
                    code, message = "out_of_memory", "not enough memory for this request"
                logger.error("sampling failed", exc_info=error)
                outputs.append(_error_output(running, code, message))
        return outputs

    def _take_token(self, running: _Running, logits_V: Tensor, greedy_id: int) -> TokenOutput:
        params = running.request.params
        if running.is_plain_greedy and math.isfinite(float(logits_V[greedy_id])):
            token_id = greedy_id
        else:
            token_id = choose_token(
                logits_V,
                params,
                prompt_ids=running.prompt_ids,
                output_ids=running.output_ids,
                end_ids=running.end_ids,
                generator=running.generator,
            )
        logprobs: tuple[TokenLogprob, ...] | None = None
        if params.logprobs is not None:
            logprobs = tuple(token_logprobs(logits_V[None], [token_id], params.logprobs))
        is_first = not running.output_ids
        running.output_ids.append(token_id)
        is_end = token_id in running.end_ids
        finish_reason: FinishReason | None = "stop" if is_end else None
        if finish_reason is None and len(running.output_ids) >= params.max_tokens:
            finish_reason = "length"
        has_prompt_logprobs = is_first and params.prompt_logprobs is not None
        return TokenOutput(
            request_id=running.key,
            token_ids=(token_id,),
            logprobs=logprobs,
            prompt_logprobs=tuple(running.prompt_logprobs) if has_prompt_logprobs else None,
            finish_reason=finish_reason,
            stop_token_id=token_id if is_end else None,
        )

    def _inputs(self, token_ids: Sequence[int], rows: bytes | None, start: int, end: int) -> Tensor:
        """Ids (S,) of a slice of a prompt; embeddings (S, H) where the slice has rows."""
        ids = list(token_ids[start:end])
        if not rows or ROW_PLACEHOLDER not in ids:
            return torch.tensor(ids)
        rows_RH = torch.frombuffer(bytearray(rows), dtype=torch.float32)
        rows_RH = rows_RH.view(-1, self._info.hidden_size)
        first = num_placeholders(token_ids[:start])
        ids_S = torch.tensor(ids, device=self._model.device)
        is_row_S = ids_S == ROW_PLACEHOLDER
        embeddings_SH: Tensor = self._model.get_input_embeddings()(ids_S.clamp(min=0)).clone()
        wanted_RH = rows_RH[first : first + int(is_row_S.sum())]
        embeddings_SH[is_row_S] = wanted_RH.to(embeddings_SH)
        return embeddings_SH

    # Embedding and scoring

    @torch.inference_mode()
    def embed(self, request: EmbedRequest) -> EmbedResult:
        """Pooled last hidden states; "default" is "mean".

        Padding stands behind a text, where causal attention hides it.
        """
        self._check_awake()
        check_texts(self._info, request.token_ids)
        vectors_BH = torch.zeros(len(request.token_ids), self._info.hidden_size)
        for indices in length_batches([len(ids) for ids in request.token_ids]):
            lengths_B = torch.tensor([len(request.token_ids[index]) for index in indices])
            ids_BS = torch.nn.utils.rnn.pad_sequence(
                [torch.tensor(request.token_ids[index]) for index in indices], batch_first=True
            )
            output = self._model.base_model(ids_BS.to(self._model.device), use_cache=False)
            hidden_BSH = output.last_hidden_state.float().cpu()
            if request.pooling == "last":
                pooled_BH = hidden_BSH[torch.arange(len(indices)), lengths_B - 1]
            else:
                is_text_BS = torch.arange(ids_BS.shape[1])[None] < lengths_B[:, None]
                pooled_BH = (hidden_BSH * is_text_BS[..., None]).sum(1) / lengths_B[:, None]
            vectors_BH[indices] = pooled_BH
        num_tokens = sum(len(ids) for ids in request.token_ids)
        self._prompt_tokens += num_tokens
        self._last_output_at = time.time()
        return embed_result(vectors_BH, num_tokens, normalize=request.normalize)

    @torch.inference_mode()
    def score(self, request: ScoreRequest) -> ScoreResult:
        """Log-probabilities of continuations. The context is computed once and shared."""
        self._check_awake()
        self._check_score(request)
        last_V, cache = self._context(request)
        num_context = len(request.context_ids)
        fitting = self._kv_cache_bytes // (num_context * self._decoder.bytes_per_token)
        scores: list[ContinuationScore] = []
        for group in _groups(request.continuation_ids, min(max(fitting, 1), MAX_CONTINUATION_ROWS)):
            scores += self._score_group(last_V, cache, num_context, group)
        num_tokens = num_context + sum(len(ids) for ids in request.continuation_ids)
        self._prompt_tokens += num_tokens
        self._last_output_at = time.time()
        return ScoreResult(scores=tuple(scores), num_tokens=num_tokens)

    def _check_score(self, request: ScoreRequest) -> None:
        _check_prompt(self._info, request.context_ids, request.embedding_rows, "context")
        for index, ids in enumerate(request.continuation_ids):
            param = f"continuations[{index}]"
            _check_prompt(self._info, ids, None, param)
            _check_length(self._info, len(request.context_ids), len(ids), "continuation", param)

    def _context(self, request: ScoreRequest) -> tuple[Tensor, Any]:
        """Logits (V,) behind the context, and its cache."""
        from transformers import DynamicCache

        cache = DynamicCache(config=self._model.config)
        num_tokens = len(request.context_ids)
        for start in range(0, num_tokens, PREFILL_CHUNK):
            end = min(start + PREFILL_CHUNK, num_tokens)
            inputs = self._inputs(request.context_ids, request.embedding_rows, start, end)
            logits_11V = self._forward(inputs[None], torch.arange(start, end)[None], cache, 1)
        return logits_11V[0, -1], cache

    def _score_group(
        self, last_V: Tensor, cache: Any, num_context: int, group: Sequence[tuple[int, ...]]
    ) -> list[ContinuationScore]:
        """Continuations of one pass, padded behind; the pass is left out where each is one token."""
        longest = max(len(ids) for ids in group)
        logits_BSV: Tensor | None = None
        if longest > 1:
            ids_BS = torch.nn.utils.rnn.pad_sequence(
                [torch.tensor(ids[:-1], dtype=torch.long) for ids in group], batch_first=True
            )
            positions_S = torch.arange(num_context, num_context + longest - 1)
            copies = repeated(cache, len(group))
            logits_BSV = self._forward(ids_BS, positions_S.expand_as(ids_BS), copies, longest - 1)
        scores = []
        for index, ids in enumerate(group):
            logits_SV = last_V[None]
            if logits_BSV is not None:
                logits_SV = torch.cat([logits_SV, logits_BSV[index, : len(ids) - 1]])
            scores.append(_continuation_score(logits_SV, ids))
        return scores

    # Memory

    def sleep(self) -> None:
        """Requests that run or wait end with a "sleeping" error at the next step."""
        if self._model is None:
            return
        lost = [*self._decoding, *self._prefilling, *(entry[2] for entry in self._waiting)]
        self._forget(running.key for running in lost)
        self._waiting = []
        message = f"{self._info.model} was put to sleep"
        self._ended += [_error_output(running, "sleeping", message) for running in lost]
        self._model = None
        del self._decoder, self._forward
        _release_memory()

    def wake(self) -> None:
        if self._model is None:
            model = self._load()
            self._decoder = build_decoder(model)
            self._forward = Forward(model)
            self._model = model

    def stats(self) -> EngineStats:
        used_bytes = 0
        if self._model is not None:
            used_bytes = self._decoder.num_tokens() * self._decoder.bytes_per_token
        return EngineStats(
            num_requests_running=len(self._decoding) + len(self._prefilling),
            num_requests_waiting=len(self._waiting),
            kv_cache_usage_ratio=min(used_bytes / self._kv_cache_bytes, 1.0),
            prompt_tokens_total=self._prompt_tokens,
            generation_tokens_total=self._generation_tokens,
            preemptions_total=0,
            prefix_cache_queries_total=0,
            prefix_cache_hits_total=0,
            ffn_rows_skipped_total=0,
            ffn_rows_total=0,
            last_output_at=self._last_output_at,
            sleeping=self._model is None,
            rss_bytes=rss_bytes(),
        )

    def close(self) -> None:
        """Nothing runs in the background."""


def _model_info(model: Any, decoder: Decoder) -> EngineInfo:
    """What the model itself says; the engine fills in the rest."""
    from compression.hf import kernels, resident_bytes

    config = model.config.get_text_config(decoder=True)
    return EngineInfo(
        model="",
        kind="decoder",
        engine="transformers",
        checkpoint_hash="",
        vocab_size=int(config.vocab_size),
        hidden_size=int(config.hidden_size),
        max_model_len=int(getattr(config, "max_position_embeddings", None) or sys.maxsize),
        eos_token_ids=eos_token_ids(model),
        max_num_seqs=0,
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        resident_bytes=resident_bytes(model),
        load_seconds=0.0,
        unsupported=UNSUPPORTED,
        kernels=kernels(model) | {"decode": decoder.name},
    )


def eos_token_ids(model: Any) -> tuple[int, ...]:
    """The ids that end a generation: generation_config.json's, else config.json's."""
    eos = getattr(model.generation_config, "eos_token_id", None)
    if eos is None:
        eos = model.config.get_text_config(decoder=True).eos_token_id
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list | tuple) else (int(eos),)


def _check_prompt(
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
    if rows and not bool(torch.frombuffer(bytearray(rows), dtype=torch.float32).isfinite().all()):
        raise EngineError("invalid_value", "embedding rows must be finite numbers", param)


def _check_params(info: EngineInfo, params: SamplingParams, num_prompt_tokens: int) -> None:
    """Raises: EngineError."""
    if params.max_tokens < 0 or (params.max_tokens == 0 and params.prompt_logprobs is None):
        raise EngineError(
            "invalid_value",
            f"max_tokens is {params.max_tokens}; at least 1, or 0 with prompt log-probabilities",
            "max_tokens",
        )
    _check_length(info, num_prompt_tokens, params.max_tokens, "max_tokens", "max_tokens")
    for token_id in params.logit_bias:
        if not 0 <= token_id < info.vocab_size:
            raise EngineError(
                "invalid_value",
                f"logit_bias names token {token_id}, allowed are 0 to {info.vocab_size - 1}",
                "logit_bias",
            )


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


def _prompt_logprobs(
    logits_SV: Tensor, next_ids: Sequence[int], num_top: int
) -> list[TokenLogprob]:
    """Of the prompt tokens behind S positions; a placeholder has none. The last position may have no next one."""
    entries = token_logprobs(logits_SV[: len(next_ids)], [max(i, 0) for i in next_ids], num_top)
    return [
        entry
        if token_id != ROW_PLACEHOLDER
        else TokenLogprob(token_id=ROW_PLACEHOLDER, logprob=None)
        for entry, token_id in zip(entries, next_ids, strict=True)
    ]


def _continuation_score(logits_SV: Tensor, ids: tuple[int, ...]) -> ContinuationScore:
    """Args: logits_SV: row i is the model's opinion about `ids[i]`."""
    entries = token_logprobs(logits_SV, ids, 0)
    logprobs = tuple(entry.logprob for entry in entries if entry.logprob is not None)
    return ContinuationScore(
        logprob=math.fsum(logprobs),
        is_greedy=logits_SV.argmax(dim=1).tolist() == list(ids),
        token_logprobs=logprobs,
    )


def _groups(continuations: Sequence[tuple[int, ...]], max_rows: int) -> list[list[tuple[int, ...]]]:
    """Cut where a pass would hold too many rows, or too many positions' logits."""
    groups: list[list[tuple[int, ...]]] = []
    longest = 0
    for ids in continuations:
        longest = max(longest, len(ids))
        full = groups and (
            len(groups[-1]) >= max_rows or (len(groups[-1]) + 1) * longest > MAX_LOGITS_ROWS
        )
        if not groups or full:
            groups.append([])
            longest = len(ids)
        groups[-1].append(ids)
    return groups


def _error_output(running: _Running, code: ErrorCode, message: str) -> TokenOutput:
    return TokenOutput(
        request_id=running.key, finish_reason="error", error=message, error_code=code
    )


def _is_out_of_memory(error: Exception) -> bool:
    return (
        isinstance(error, torch.OutOfMemoryError | MemoryError)
        or "can't allocate memory" in str(error)  # torch's CPU allocator
    )


def default_kv_cache_bytes() -> int:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(DEFAULT_KV_CACHE_BYTES, total // 4)


def _release_memory() -> None:
    """Give freed pages back to the system, not only to the allocator."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        logger.info("this C library has no malloc_trim")
