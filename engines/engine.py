"""The native engine: a step loop over our own decoder, with a paged cache that requests share.

`scheduler.py` says which tokens a step computes, `model.py` computes them, `sampling.py` chooses what follows; here
they meet, and here is what happens when one fails. Scoring shares the cache and its prefixes with generation; embedding
needs no cache at all.

A request's greedy tokens do not depend on its company, on how its prompt was cut, on a prefix that was found or on
preemption, up to the rounding of differently shaped products: in float32 that was not seen to change a choice, in
bfloat16 it can where two tokens nearly tie. The same holds of a request that skips feed-forwards (`ffn_skip.py`): what
it generated is computed anew as it was, and its blocks are found by nobody who skips otherwise.

Shapes: T rows of a step, S requests, R selected rows, V vocabulary, H hidden, B texts.
"""

import itertools
import logging
import struct
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from compression.ffn_skip.rule import NEVER
from engines.ffn_skip import SkipPass, row_taus
from engines.kernels.cpu_step import CpuStep, build_cpu_step
from engines.kernels.cuda_graphs import DecodeGraphs, build_decode_graphs
from engines.kernels.metadata import BLOCK_SIZE, BatchMetadata, RequestRows, build_metadata
from engines.kv_cache import BlockManager
from engines.memory import default_kv_cache_bytes, is_out_of_memory, release_memory
from engines.model import DecoderModel, build_kv_cache, bytes_per_block, load_decoder
from engines.protocol import (
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
from engines.scheduler import Chunk, ScheduledRequest, Scheduler, rank
from engines.structured import ConstraintCompiler, TokenMatcher
from engines.vectors import check_texts, embed_result, length_batches, rss_bytes

COMPILE_SECONDS = 10.0
"""A constraint that is not compiled by then costs its request."""
COMPILE_POLL_SECONDS = 0.01

logger = logging.getLogger("lathe.engine")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Compiling:
    """A request whose constraint is being compiled. Attributes: deadline: on the monotonic clock."""

    scheduled: ScheduledRequest
    matcher: Future[TokenMatcher]
    deadline: float


class NativeEngine:
    """An `Engine` over one `DecoderModel`.

    Args:
        load: makes the model; called now, and again by `wake`.
        tokenizer: the model's tokenizer.json; without it structured output is refused.
    """

    def __init__(
        self,
        load: Callable[[], DecoderModel],
        *,
        model_id: str,
        checkpoint_hash: str = "",
        tokenizer: Path | None = None,
        limits: EngineLimits | None = None,
    ) -> None:
        start = time.monotonic()
        self._load = load
        self._limits = limits or EngineLimits()
        self._numbers = itertools.count()
        self._generations: dict[str, Generation] = {}
        self._compiling: dict[str, _Compiling] = {}
        self._ended: list[TokenOutput] = []
        self._prompt_tokens = 0
        self._generation_tokens = 0
        self._ffn_rows_skipped = 0
        self._ffn_rows = 0
        self._last_output_at: float | None = None
        model = load()
        self._num_blocks = self._count_blocks(model)
        self._scheduler = self._build_scheduler()
        self._take_model(model)
        self._compiler = _build_compiler(tokenizer, model)
        self._info = EngineInfo(
            model=model_id,
            kind="decoder",
            engine="native",
            checkpoint_hash=checkpoint_hash,
            vocab_size=model.config.vocab_size,
            hidden_size=model.config.hidden_size,
            max_model_len=min(
                model.config.max_position_embeddings,
                self._scheduler.blocks.num_usable * BLOCK_SIZE,
            ),
            eos_token_ids=model.config.eos_token_ids,
            max_num_seqs=self._limits.max_num_seqs,
            device=str(model.device),
            dtype=str(model.dtype).removeprefix("torch."),
            resident_bytes=_resident_bytes(model),
            load_seconds=time.monotonic() - start,
            unsupported=("response_format", "regex") if isinstance(self._compiler, str) else (),
            kernels=_kernels(model)
            | {
                "pass": _kernel(self._cpu_step),
                "decode step": _kernel(self._decode_graphs),
            },
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
    ) -> "NativeEngine":
        """Load a Lathe checkpoint.

        Raises:
            CheckpointError, UnsupportedModelError: see `load_decoder`.
        """
        from compression.checkpoint import checkpoint_hash, read_manifest

        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(
            lambda: load_decoder(folder, dtype=dtype, device=device),
            model_id=model_id,
            checkpoint_hash=checkpoint_hash(read_manifest(folder)),
            tokenizer=folder / "tokenizer.json",
            limits=limits,
        )

    @property
    def info(self) -> EngineInfo:
        return self._info

    def _count_blocks(self, model: DecoderModel) -> int:
        """Blocks of the cache: what its bytes hold, and no more than every seat could fill. Block 0 comes on top.

        Raises:
            ValueError: not even one.
        """
        kv_cache_bytes = self._limits.kv_cache_bytes or default_kv_cache_bytes(model.device)
        fitting = kv_cache_bytes // bytes_per_block(model)
        if fitting < 1:
            raise ValueError(
                f"kv_cache_bytes is {kv_cache_bytes}, less than one block of {bytes_per_block(model)}"
            )
        return min(fitting, self._limits.max_num_seqs * _blocks_per_request(model)) + 1

    def _take_model(self, model: DecoderModel) -> None:
        release_memory()  # what loading worked with
        self._kv_cache = build_kv_cache(model, self._num_blocks)
        self._cpu_step = build_cpu_step(model, self._kv_cache)
        self._decode_graphs = build_decode_graphs(
            model,
            self._kv_cache,
            max_num_seqs=self._limits.max_num_seqs,
            max_blocks=min(_blocks_per_request(model), self._num_blocks - 1),
        )
        self._model: DecoderModel | None = model

    def _build_scheduler(self) -> Scheduler:
        return Scheduler(
            BlockManager(self._num_blocks),
            block_size=BLOCK_SIZE,
            max_num_seqs=self._limits.max_num_seqs,
            max_num_batched_tokens=self._limits.max_num_batched_tokens,
            max_num_waiting=self._limits.max_num_waiting,
        )

    # Accepting and ending requests

    def submit(self, request: GenerateRequest) -> None:
        model = self._awake_model()
        self._check_supported(request)
        check_generate(self._info, request)
        tau = self._tau(model, request)
        self._scheduler.check_queue(len(self._compiling))
        generation = Generation.start(self._info, request)
        generation.tau = tau
        scheduled = ScheduledRequest(
            request_id=generation.key,
            token_ids=list(request.token_ids),
            rank=rank(request.priority, time.monotonic(), next(self._numbers)),
            tenant=request.tenant,
            embedding_rows=request.embedding_rows or b"",
            row_bytes=self._info.hidden_size * 4,
            num_dense_tokens=None if tau is None else len(request.token_ids),
            skip_key=b"" if tau is None else _skip_key(tau, len(request.token_ids)),
            finds_prefix=request.params.prompt_logprobs is None,
        )
        if request.constraint is None:
            self._scheduler.add(scheduled)
        else:
            assert not isinstance(self._compiler, str)
            self._compiling[generation.key] = _Compiling(
                scheduled=scheduled,
                matcher=self._compiler.submit(request.constraint),
                deadline=time.monotonic() + COMPILE_SECONDS,
            )
        self._generations[generation.key] = generation
        self._prompt_tokens += len(request.token_ids)

    def _awake_model(self) -> DecoderModel:
        if self._model is None:
            raise EngineError("sleeping", f"{self._info.model} is asleep")
        return self._model

    def _check_supported(self, request: GenerateRequest) -> None:
        if request.constraint is not None and isinstance(self._compiler, str):
            param = "regex" if request.constraint.kind == "regex" else "response_format"
            raise EngineError(
                "unsupported_parameter",
                f"{self._info.model} has no structured output: {self._compiler}",
                param,
            )

    def _tau(self, model: DecoderModel, request: GenerateRequest) -> float | None:
        """The threshold of a request that may skip feed-forwards; None where it asks for none of that."""
        if request.skip.mode == "off":
            return None
        if model.ffn_skip is None:
            raise EngineError(
                "unsupported_parameter",
                f"{self._info.model} has no skip profile, so it can only be 'off'; a calibrate_skip job makes a model"
                " that has one",
                "skip",
            )
        return model.ffn_skip.tau(request.skip)

    def abort(self, request_id: str) -> None:
        if self._generations.pop(request_id, None) is None:
            return
        compiling = self._compiling.pop(request_id, None)
        if compiling is None:
            self._scheduler.remove(request_id)
        else:
            compiling.matcher.cancel()

    def _admit_compiled(self) -> list[TokenOutput]:
        """Let requests wait for their turn whose constraint is compiled; end those that have none to wait for."""
        outputs: list[TokenOutput] = []
        for key, compiling in list(self._compiling.items()):
            generation = self._generations[key]
            try:
                generation.matcher = compiling.matcher.result(timeout=0)
            except TimeoutError:
                if time.monotonic() > compiling.deadline:
                    message = f"the constraint is not compiled after {COMPILE_SECONDS:g} s"
                    outputs.append(generation.error_output("invalid_value", message))
            except EngineError as error:
                outputs.append(generation.error_output(error.code, error.message))
            except Exception as error:
                logger.error("a constraint was not compiled", exc_info=error)
                message = "the engine failed to compile the constraint"
                outputs.append(generation.error_output("internal_error", message))
            else:
                del self._compiling[key]
                self._scheduler.add(compiling.scheduled)
        return outputs

    def _wait_for_compiler(self) -> None:
        """Nothing else can be done: sleep rather than spin, though not for long, since requests may come."""
        wait(
            [compiling.matcher for compiling in self._compiling.values()],
            timeout=COMPILE_POLL_SECONDS,
            return_when=FIRST_COMPLETED,
        )

    # Steps

    def has_work(self) -> bool:
        return bool(self._generations or self._ended)

    @torch.inference_mode()
    def step(self) -> list[TokenOutput]:
        outputs, self._ended = self._ended, []
        if self._model is None:
            return outputs
        outputs += self._admit_compiled()
        chunks = self._scheduler.schedule()
        if not chunks and self._compiling and not outputs:
            self._wait_for_compiler()
        if chunks:
            for chunk in chunks:
                self._generations[chunk.request.request_id].begin()
            try:
                hidden_TH = self._forward(self._model, chunks)
                logits_SV = self._logits(self._model, chunks, hidden_TH)
            except Exception as error:
                outputs += self._failed_pass(chunks, error)
            else:
                outputs += self._take_step(self._model, chunks, hidden_TH, logits_SV)
                self._last_output_at = time.monotonic()
        for output in outputs:
            if output.finish_reason is not None:
                self.abort(output.request_id)
        self._generation_tokens += sum(len(output.token_ids) for output in outputs)
        return outputs

    def _forward(self, model: DecoderModel, chunks: Sequence[Chunk]) -> Tensor:
        """Hidden states (T, H) of the chunks' rows, valid until the next pass."""
        rows = [_rows(chunk) for chunk in chunks]
        token_ids: list[int] = []
        embedding_rows = b""
        for chunk in chunks:
            request = chunk.request
            start = request.num_computed_tokens
            token_ids += request.token_ids[start : start + chunk.num_tokens]
            embedding_rows += request.rows_between(start, start + chunk.num_tokens)
        skip = self._skip_pass(model, chunks)
        graphs = self._decode_graphs
        if isinstance(graphs, DecodeGraphs) and skip is None and graphs.takes(token_ids, rows):
            hidden_TH = graphs.forward(token_ids, rows)
        else:
            hidden_TH = self._forward_rows(
                model,
                mixed_embeddings(token_ids, embedding_rows, model.embed, model.device),
                build_metadata(rows, model.device),
                skip,
            )
        if model.ffn_skip is not None:
            self._count_ffn_rows(model, chunks, skip)
        return hidden_TH

    def _forward_rows(
        self, model: DecoderModel, hidden_TH: Tensor, metadata: BatchMetadata, skip: SkipPass | None
    ) -> Tensor:
        if isinstance(self._cpu_step, CpuStep) and len(hidden_TH) <= self._cpu_step.max_rows:
            return self._cpu_step.forward(hidden_TH, metadata, skip)
        return model.forward(hidden_TH, metadata, self._kv_cache, skip)

    def _skip_pass(self, model: DecoderModel, chunks: Sequence[Chunk]) -> SkipPass | None:
        """The pass's skipping; None where no row may skip."""
        if model.ffn_skip is None:
            return None
        taus: list[float] = []
        for chunk in chunks:
            generation = self._generations.get(chunk.request.request_id)  # scoring has none
            tau = None if generation is None else generation.tau
            num_full = (chunk.request.num_dense_tokens or 0) + model.ffn_skip.rule.warm_up
            taus += row_taus(tau, chunk.request.num_computed_tokens, chunk.num_tokens, num_full)
        if min(taus) >= NEVER:
            return None
        return SkipPass(model.ffn_skip, taus, model.device)

    def _count_ffn_rows(
        self, model: DecoderModel, chunks: Sequence[Chunk], skip: SkipPass | None
    ) -> None:
        """Count the pass's rows of generated tokens of requests that may skip, each position once."""
        num_skipped = None if skip is None else skip.num_skipped_T.tolist()
        offset = 0
        for chunk in chunks:
            first, end = offset, offset + chunk.num_tokens
            offset = end
            request = chunk.request
            generation = self._generations.get(request.request_id)
            if generation is None or generation.tau is None:
                continue
            start = request.num_computed_tokens
            num_known = max(len(generation.request.token_ids), generation.num_counted_tokens)
            num_old = min(max(num_known - start, 0), chunk.num_tokens)
            num_rows = (chunk.num_tokens - num_old) * model.config.num_layers
            skipped = 0 if num_skipped is None else sum(num_skipped[first + num_old : end])
            generation.ffn_rows_total += num_rows
            generation.ffn_rows_skipped += skipped
            generation.num_counted_tokens = max(num_known, start + chunk.num_tokens)
            self._ffn_rows += num_rows
            self._ffn_rows_skipped += skipped

    def _failed_pass(self, chunks: Sequence[Chunk], error: Exception) -> list[TokenOutput]:
        """Short of memory, the request of worst rank gives way and the step is tried again; else all of it fail."""
        if is_out_of_memory(error):
            logger.warning("out of memory with %d requests in a step", len(chunks))
            worst = max((chunk.request for chunk in chunks), key=lambda request: request.rank)
            generation = self._generations[worst.request_id]
            return [generation.error_output("out_of_memory", "not enough memory for this request")]
        logger.error("a forward pass failed", exc_info=error)
        message = "the engine failed while it ran this request"
        return [
            self._generations[chunk.request.request_id].error_output("internal_error", message)
            for chunk in chunks
        ]

    def _samples(self, chunk: Chunk) -> bool:
        """Whether a request gets a token from this step."""
        return chunk.is_last and self._generations[chunk.request.request_id].params.max_tokens > 0

    def _logits(self, model: DecoderModel, chunks: Sequence[Chunk], hidden_TH: Tensor) -> Tensor:
        """Of the last rows (S, V) of those that get a token."""
        ends = itertools.accumulate(chunk.num_tokens for chunk in chunks)
        rows = [end - 1 for chunk, end in zip(chunks, ends, strict=True) if self._samples(chunk)]
        return model.logits(hidden_TH if len(rows) == len(hidden_TH) else hidden_TH[rows])

    def _take_step(
        self,
        model: DecoderModel,
        chunks: Sequence[Chunk],
        hidden_TH: Tensor,
        logits_SV: Tensor,
    ) -> list[TokenOutput]:
        """Note what is computed, and give a token to every request whose known tokens all are."""
        outputs: list[TokenOutput] = []
        sampled: list[tuple[ScheduledRequest, Generation]] = []
        end = 0
        for chunk in chunks:
            start, end = end, end + chunk.num_tokens
            request = chunk.request
            generation = self._generations[request.request_id]
            generation.num_cached_tokens = request.num_cached_tokens or 0
            if generation.params.prompt_logprobs is not None:
                self._add_prompt_logprobs(model, generation, request, hidden_TH[start:end])
            if self._samples(chunk):
                sampled.append((request, generation))
            elif chunk.is_last:
                outputs.append(generation.prompt_only_output())
            self._scheduler.advance(chunk)
        taken = sample([generation for _, generation in sampled], logits_SV)
        for (request, _), output in zip(sampled, taken, strict=True):
            if output.finish_reason == "error":
                self._spoil(request)
            for token_id in output.token_ids:
                self._scheduler.append(request, token_id)
        return outputs + taken

    def _spoil(self, request: ScheduledRequest) -> None:
        """Clear the blocks of a request without usable logits: what is no number would infect their next holder."""
        held_alone = self._scheduler.blocks.discard(request.block_table)
        for part in itertools.chain.from_iterable(self._kv_cache):
            part[held_alone] = 0

    def _add_prompt_logprobs(
        self,
        model: DecoderModel,
        generation: Generation,
        request: ScheduledRequest,
        hidden_QH: Tensor,
    ) -> None:
        """Of the prompt tokens that stand behind a chunk's rows; those that a preempted request has, it keeps."""
        num_top = generation.params.prompt_logprobs
        assert num_top is not None
        entries = generation.prompt_logprobs
        token_ids = generation.request.token_ids
        if not entries:
            entries.append(TokenLogprob(token_id=token_ids[0], logprob=None))
        first = request.num_computed_tokens
        new_QH = hidden_QH[len(entries) - 1 - first :] if len(entries) > first else hidden_QH
        for part_RH in torch.split(new_QH, MAX_LOGITS_ROWS):
            next_ids = token_ids[len(entries) : len(entries) + len(part_RH)]
            if next_ids:
                entries += prompt_logprobs(model.logits(part_RH), next_ids, num_top)

    # Embedding and scoring

    @torch.inference_mode()
    def embed(self, request: EmbedRequest) -> EmbedResult:
        """Pooled last hidden states; "default" is "mean"."""
        model = self._awake_model()
        check_texts(self._info, request.token_ids)
        vectors_BH = torch.zeros(len(request.token_ids), self._info.hidden_size)
        for indices in length_batches([len(ids) for ids in request.token_ids]):
            texts = [request.token_ids[index] for index in indices]
            metadata = build_metadata(
                [RequestRows(start=0, num_tokens=len(ids)) for ids in texts], model.device
            )
            ids_T = torch.tensor([t for ids in texts for t in ids], device=model.device)
            hidden_TH = model.forward(model.embed(ids_T), metadata, None).float()
            lengths = [len(ids) for ids in texts]
            for index, text_SH in zip(indices, torch.split(hidden_TH, lengths), strict=True):
                pooled_H = text_SH[-1] if request.pooling == "last" else text_SH.mean(0)
                vectors_BH[index] = pooled_H.cpu()
        num_tokens = sum(len(ids) for ids in request.token_ids)
        self._prompt_tokens += num_tokens
        self._last_output_at = time.monotonic()
        return embed_result(vectors_BH, num_tokens, normalize=request.normalize)

    @torch.inference_mode()
    def score(self, request: ScoreRequest) -> ScoreResult:
        """Log-probabilities of continuations.

        The context's full blocks are computed once, or found; what is left of it is computed with each
        continuation, the way that prompts are, so that a score is what an echoed prompt's tokens have. Running
        requests are preempted where the cache has no room beside them.
        """
        model = self._awake_model()
        check_score(self._info, request)
        context = ScheduledRequest(
            request_id=request.request_id,
            token_ids=list(request.context_ids),
            rank=rank(0, 0.0, 0),
            tenant=request.tenant,
            embedding_rows=request.embedding_rows or b"",
            row_bytes=self._info.hidden_size * 4,
        )
        # Continuations that differ in their last token only need no more than one pass.
        members: dict[tuple[int, ...], list[int]] = {}
        for index, ids in enumerate(request.continuation_ids):
            members.setdefault(ids[:-1], []).append(index)
        longest = max(map(len, members), default=0)
        num_shared = (len(request.context_ids) - 1) // BLOCK_SIZE
        self._scheduler.make_room(-(-(len(request.context_ids) + longest) // BLOCK_SIZE))
        self._scheduler.extend_keys(context)
        self._scheduler.open(context, num_shared * BLOCK_SIZE)
        scores: dict[int, ContinuationScore] = {}
        try:
            self._compute_context(model, context, num_shared * BLOCK_SIZE)
            beginnings = list(members)
            while beginnings:
                group = self._score_group(context, beginnings)
                del beginnings[: len(group)]
                continuations = {
                    index: request.continuation_ids[index]
                    for beginning in group
                    for index in members[beginning]
                }
                scores |= self._score_continuations(model, context, group, continuations)
        finally:
            self._scheduler.close(context)
        num_tokens = len(request.context_ids) + sum(len(ids) for ids in request.continuation_ids)
        self._prompt_tokens += num_tokens
        self._last_output_at = time.monotonic()
        ordered = tuple(scores[index] for index in range(len(request.continuation_ids)))
        return ScoreResult(scores=ordered, num_tokens=num_tokens)

    def _compute_context(
        self, model: DecoderModel, context: ScheduledRequest, num_tokens: int
    ) -> None:
        while context.num_computed_tokens < num_tokens:
            num_left = num_tokens - context.num_computed_tokens
            chunk = Chunk(context, min(num_left, self._limits.max_num_batched_tokens))
            self._forward(model, [chunk])
            self._scheduler.advance(chunk)

    def _score_group(
        self, context: ScheduledRequest, beginnings: Sequence[tuple[int, ...]]
    ) -> list[tuple[int, ...]]:
        """The first of `beginnings`, and those after it that a step and the free blocks have room for."""
        num_rows, num_blocks = 0, 0
        for index, beginning in enumerate(beginnings):
            num_own = len(context.token_ids) - context.num_computed_tokens + len(beginning)
            num_rows += num_own
            num_blocks += -(-num_own // BLOCK_SIZE)
            is_full = (
                num_rows > self._limits.max_num_batched_tokens
                or num_blocks > self._scheduler.blocks.num_free
            )
            if index and is_full:
                return list(beginnings[:index])
        return list(beginnings)

    def _score_continuations(
        self,
        model: DecoderModel,
        context: ScheduledRequest,
        beginnings: Sequence[tuple[int, ...]],
        continuations: Mapping[int, tuple[int, ...]],
    ) -> dict[int, ContinuationScore]:
        """Score continuations by index; `beginnings` are what they are without their last tokens.

        What is longer than a step may be is alone, and takes several passes.
        """
        start = context.num_computed_tokens
        rest = context.token_ids[start:]
        rest_rows = context.rows_between(start, len(context.token_ids))
        token_ids = [token_id for ids in beginnings for token_id in (*rest, *ids)]
        embedding_TH = mixed_embeddings(
            token_ids, rest_rows * len(beginnings), model.embed, model.device
        )
        limit = self._limits.max_num_batched_tokens
        rows: list[RequestRows] = []
        own_blocks: list[int] = []
        first_row: dict[tuple[int, ...], int] = {}
        num_rows = 0
        for ids in beginnings:
            num_own = len(rest) + len(ids)
            blocks = self._scheduler.blocks.allocate(-(-num_own // BLOCK_SIZE))
            own_blocks += blocks
            table = [*context.block_table, *blocks]
            for first in range(0, num_own, limit):
                num_tokens = min(limit, num_own - first)
                num_blocks = -(-(start + first + num_tokens) // BLOCK_SIZE)
                rows.append(
                    RequestRows(
                        start=start + first,
                        num_tokens=num_tokens,
                        block_table=table[:num_blocks],
                    )
                )
            first_row[ids] = num_rows + len(rest) - 1
            num_rows += num_own
        passes = [rows] if num_rows <= limit else [[part] for part in rows]
        sizes = [sum(part.num_tokens for part in parts) for parts in passes]
        try:
            hidden_TH = torch.cat(
                [
                    self._forward_rows(model, part_TH, build_metadata(parts, model.device), None)
                    for parts, part_TH in zip(passes, torch.split(embedding_TH, sizes), strict=True)
                ]
            )
        finally:
            self._scheduler.blocks.release(own_blocks)
        wanted_rows: list[int] = []
        wanted_ids: list[int] = []
        for ids in continuations.values():
            wanted_rows += range(first_row[ids[:-1]], first_row[ids[:-1]] + len(ids))
            wanted_ids += ids
        tokens: list[tuple[float, bool]] = []
        for first in range(0, len(wanted_rows), MAX_LOGITS_ROWS):
            span = slice(first, first + MAX_LOGITS_ROWS)
            tokens += score_tokens(model.logits(hidden_TH[wanted_rows[span]]), wanted_ids[span])
        scores: dict[int, ContinuationScore] = {}
        for index, ids in continuations.items():
            scores[index] = continuation_score(tokens[: len(ids)])
            del tokens[: len(ids)]
        return scores

    # Memory

    def sleep(self) -> None:
        """Requests that run or wait end with a "sleeping" error at the next step."""
        if self._model is None:
            return
        message = f"{self._info.model} was put to sleep"
        self._ended += [
            generation.error_output("sleeping", message)
            for generation in self._generations.values()
        ]
        self._generations = {}
        self._compiling = {}
        self._scheduler.reset(BlockManager(self._num_blocks))
        self._kv_cache = []
        self._cpu_step = "asleep"
        self._decode_graphs = "asleep"
        self._model = None
        release_memory()

    def wake(self) -> None:
        if self._model is None:
            self._take_model(self._load())

    def stats(self) -> EngineStats:
        blocks = self._scheduler.blocks
        return EngineStats(
            num_requests_running=self._scheduler.num_running,
            num_requests_waiting=self._scheduler.num_waiting + len(self._compiling),
            kv_cache_usage_ratio=1 - blocks.num_free / blocks.num_usable,
            prompt_tokens_total=self._prompt_tokens,
            generation_tokens_total=self._generation_tokens,
            preemptions_total=self._scheduler.num_preemptions,
            prefix_cache_queries_total=self._scheduler.num_queried_tokens,
            prefix_cache_hits_total=self._scheduler.num_hit_tokens,
            ffn_rows_skipped_total=self._ffn_rows_skipped,
            ffn_rows_total=self._ffn_rows,
            last_output_at=self._last_output_at,
            sleeping=self._model is None,
            rss_bytes=rss_bytes(),
        )

    def close(self) -> None:
        if isinstance(self._compiler, ConstraintCompiler):
            self._compiler.close()


def _build_compiler(tokenizer: Path | None, model: DecoderModel) -> ConstraintCompiler | str:
    if tokenizer is None:
        return "no tokenizer"
    config = model.config
    compiler = ConstraintCompiler.load(tokenizer, config.vocab_size, config.eos_token_ids)
    if isinstance(compiler, str):
        logger.warning("structured output is off: %s", compiler)
    return compiler


def _rows(chunk: Chunk) -> RequestRows:
    request = chunk.request
    start, end = request.num_computed_tokens, request.num_computed_tokens + chunk.num_tokens
    return RequestRows(
        start=start,
        num_tokens=chunk.num_tokens,
        block_table=request.block_table[: -(-end // BLOCK_SIZE)],
    )


def _blocks_per_request(model: DecoderModel) -> int:
    return -(-model.config.max_position_embeddings // BLOCK_SIZE)


def _skip_key(tau: float, num_prompt_tokens: int) -> bytes:
    """What else the keys and values of a skipping request's generated tokens rest on, besides the tokens."""
    return struct.pack("<dq", tau, num_prompt_tokens)


def _kernel(whole_pass: CpuStep | DecodeGraphs | str) -> str:
    """Of a pass in one piece; a string says why there is none."""
    return f"op by op: {whole_pass}" if isinstance(whole_pass, str) else whole_pass.kernel


def _resident_bytes(model: DecoderModel) -> int:
    """Bytes of all tensors as held; one that two hold counts once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in model.tensors()}.values())


def _kernels(model: DecoderModel) -> dict[str, str]:
    """The implementation of each op; of linear layers, how many have it."""
    counts = Counter(linear.kernel for linear in model.linears())
    return {
        **model.ops.kernels,
        **{f"linear: {kernel}": f"{count} products" for kernel, count in counts.items()},
    }
