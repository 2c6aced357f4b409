"""The engine over transformers' modules: any causal language model that it knows, and the oracle of faster ones.

A step decodes one token for every running request, then gives up to `max_num_batched_tokens` prompt tokens to those
still in prefill, in turn, so that a long prompt delays nobody for long. `decoder_caches.py` runs the model,
`sampling.py` chooses tokens; here is who runs when, and what is refused. The greedy tokens of a request are
`generate`'s. In bfloat16 its company can still move a choice between near ties, because a batched GEMM rounds
differently; in float32 it was not seen to.

Shapes: S positions, V vocabulary, H hidden, B rows.
"""

import heapq
import itertools
import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from engines.decoder_caches import Decoder, Forward, build_decoder, repeated
from engines.memory import default_kv_cache_bytes, is_out_of_memory, release_memory
from engines.protocol import (
    ROW_PLACEHOLDER,
    ContinuationScore,
    EmbedRequest,
    EmbedResult,
    EngineError,
    EngineInfo,
    EngineStats,
    GenerateRequest,
    ScoreRequest,
    ScoreResult,
    TokenLogprob,
    TokenOutput,
    num_placeholders,
)
from engines.requests import (
    MAX_LOGITS_ROWS,
    EngineLimits,
    Generation,
    check_generate,
    check_score,
    continuation_score,
    mixed_embeddings,
    prompt_logprobs,
    sample,
    score_tokens,
)
from engines.vectors import check_texts, embed_result, length_batches, rss_bytes

MAX_CONTINUATION_ROWS = 16
"""Continuations scored in one pass; each holds a copy of the context's cache."""
UNSUPPORTED = ("skip", "response_format", "regex")

logger = logging.getLogger("lathe.engine")


@dataclass(slots=True, eq=False, kw_only=True)
class _Running(Generation):
    """Attributes: num_computed_tokens: of the prompt."""

    num_computed_tokens: int = 0


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
        self._waiting: list[tuple[int, int, _Running]] = []
        self._arrivals = itertools.count()
        self._prefilling: deque[_Running] = deque()
        self._decoding: list[_Running] = []
        self._ended: list[TokenOutput] = []
        self._prompt_tokens = 0
        self._generation_tokens = 0
        self._last_output_at: float | None = None
        self._model: Any = load()
        self._kv_cache_bytes = self._limits.kv_cache_bytes or default_kv_cache_bytes(
            self._model.device
        )
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
        check_generate(self._info, request)
        if len(self._waiting) >= self._limits.max_num_waiting:
            raise EngineError(
                "queue_full", f"{len(self._waiting)} requests wait already, no more are taken"
            )
        running = _Running.start(self._info, request)
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
            self._last_output_at = time.monotonic()
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
            running.begin()
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
        return sample(batch, logits_BV)

    def _failed_pass(self, batch: Sequence[_Running], error: Exception) -> list[TokenOutput]:
        """Short of memory, the youngest request gives way and the others go on; else all of the pass fail."""
        if is_out_of_memory(error):
            logger.warning("out of memory with %d requests in a pass", len(batch))
            return [batch[-1].error_output("out_of_memory", "not enough memory for this request")]
        logger.error("a forward pass failed", exc_info=error)
        message = "the engine failed while it ran this request"
        return [running.error_output("internal_error", message) for running in batch]

    def _prefill(self) -> list[TokenOutput]:
        """Share out one chunk's worth of prompt tokens, the first in turn first."""
        outputs: list[TokenOutput] = []
        budget = self._limits.max_num_batched_tokens
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
                outputs.append(running.prompt_only_output())
                continue
            self._decoding.append(running)
            outputs += sample([running], last_1V)
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
            running.prompt_logprobs += prompt_logprobs(logits_SV, next_ids, num_top)
        return logits_SV[-1:]

    def _inputs(self, token_ids: Sequence[int], rows: bytes | None, start: int, end: int) -> Tensor:
        """Ids (S,) of a slice of a prompt; embeddings (S, H) where the slice has rows."""
        ids = list(token_ids[start:end])
        if not rows or ROW_PLACEHOLDER not in ids:
            return torch.tensor(ids)
        first = num_placeholders(token_ids[:start]) * self._info.hidden_size * 4
        size = num_placeholders(ids) * self._info.hidden_size * 4
        embed = self._model.get_input_embeddings()
        return mixed_embeddings(ids, rows[first : first + size], embed, self._model.device)

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
        self._last_output_at = time.monotonic()
        return embed_result(vectors_BH, num_tokens, normalize=request.normalize)

    @torch.inference_mode()
    def score(self, request: ScoreRequest) -> ScoreResult:
        """Log-probabilities of continuations. The context is computed once and shared."""
        self._check_awake()
        check_score(self._info, request)
        last_V, cache = self._context(request)
        num_context = len(request.context_ids)
        fitting = self._kv_cache_bytes // (num_context * self._decoder.bytes_per_token)
        scores: list[ContinuationScore] = []
        for group in _groups(request.continuation_ids, min(max(fitting, 1), MAX_CONTINUATION_ROWS)):
            scores += self._score_group(last_V, cache, num_context, group)
        num_tokens = num_context + sum(len(ids) for ids in request.continuation_ids)
        self._prompt_tokens += num_tokens
        self._last_output_at = time.monotonic()
        return ScoreResult(scores=tuple(scores), num_tokens=num_tokens)

    def _context(self, request: ScoreRequest) -> tuple[Tensor, Any]:
        """Logits (V,) behind the context, and its cache."""
        from transformers import DynamicCache

        cache = DynamicCache(config=self._model.config)
        num_tokens = len(request.context_ids)
        step = self._limits.max_num_batched_tokens
        for start in range(0, num_tokens, step):
            end = min(start + step, num_tokens)
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
            scores.append(continuation_score(score_tokens(logits_SV, ids)))
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
        self._ended += [running.error_output("sleeping", message) for running in lost]
        self._model = None
        del self._decoder, self._forward
        release_memory()

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
