"""An engine over transformers' modules: any causal language model that transformers knows, and the oracle of
faster engines.

Requests whose parameters transformers' continuous batching honours go there. All others run through a step
loop of ours over
`model.forward`, each with its own KV cache: one prefill chunk or one token per request and step, so that they
interleave, stop
at once when aborted, and give the same tokens alone and in company.

Shapes: S positions, V vocabulary, H hidden.
"""

import copy
import logging
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engines.continuous_batching import ContinuousBatching, honours
from engines.encoder_engine import check_text, embed_result, rss_bytes
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
from engines.sampling import SamplerState, sample, token_logprob

PREFILL_CHUNK = 512
MAX_NUM_WAITING = 1024
UNSUPPORTED = ("skip", "response_format", "regex")

logger = logging.getLogger("lathe.engine")


@dataclass(slots=True)
class _Request:
    """A request of our own step loop."""

    request: GenerateRequest
    sampler: SamplerState
    stop_ids: frozenset[int]
    cache: Any = None
    num_computed_tokens: int = 0
    next_ids: list[int] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.token_ids)

    @property
    def in_prefill(self) -> bool:
        return self.num_computed_tokens < self.num_prompt_tokens


@dataclass(slots=True)
class _Batched:
    """A request that continuous batching runs."""

    request: GenerateRequest
    stop_ids: frozenset[int]
    num_generated: int = 0


class TransformersEngine:
    """An `Engine` over one transformers model in eval mode."""

    def __init__(
        self,
        model: Any,
        *,
        model_id: str,
        eos_token_ids: tuple[int, ...],
        checkpoint_hash: str = "",
        max_num_seqs: int = 16,
        load_seconds: float = 0.0,
        continuous_batching: bool = True,
        reload: Any = None,
    ) -> None:
        from compression.hf import kernels, resident_bytes

        config = model.config.get_text_config()
        self._model: Any = model
        self._reload = reload
        self._waiting: deque[_Request] = deque()
        self._running: dict[str, _Request] = {}
        self._batched: dict[str, _Batched] = {}
        self._prompt_tokens = 0
        self._generation_tokens = 0
        self._use_batching = continuous_batching
        batching = self._start_batching(max_num_seqs)
        self._info = EngineInfo(
            model=model_id,
            kind="decoder",
            engine="transformers",
            checkpoint_hash=checkpoint_hash,
            vocab_size=int(config.vocab_size),
            hidden_size=int(config.hidden_size),
            max_model_len=int(config.max_position_embeddings),
            eos_token_ids=eos_token_ids,
            max_num_seqs=max_num_seqs,
            device=str(model.device),
            dtype=str(model.dtype).removeprefix("torch."),
            resident_bytes=resident_bytes(model),
            load_seconds=load_seconds,
            unsupported=UNSUPPORTED,
            kernels=kernels(model) | {"batching": batching},
        )

    @classmethod
    def load(cls, model_id: str, folder: Path, *, max_num_seqs: int = 16) -> "TransformersEngine":
        """Load a checkpoint: bfloat16, on the GPU where there is one.

        Raises:
            CheckpointError
        """
        from compression.checkpoint import checkpoint_hash, read_manifest
        from compression.hf import load_model

        start = time.monotonic()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        manifest = read_manifest(folder)

        def reload() -> Any:
            return load_model(folder, dtype=torch.bfloat16, device=device)

        model = reload()
        return cls(
            model,
            model_id=model_id,
            eos_token_ids=eos_token_ids(model),
            checkpoint_hash=checkpoint_hash(manifest),
            max_num_seqs=max_num_seqs,
            load_seconds=time.monotonic() - start,
            reload=reload,
        )

    def _start_batching(self, max_num_seqs: int) -> str:
        """Start continuous batching if this model can; returns what was chosen, for `EngineInfo.kernels`."""
        self._batching: ContinuousBatching | None = None
        if not self._use_batching:
            return "one request at a time"
        try:
            self._batching = ContinuousBatching(self._model, max_num_seqs=max_num_seqs)
        except Exception as error:
            logger.warning("no continuous batching for this model: %s", error)
            return f"one request at a time: {type(error).__name__}"
        return "transformers continuous batching; one at a time for parameters that it lacks"

    @property
    def info(self) -> EngineInfo:
        return self._info

    def submit(self, request: GenerateRequest) -> None:
        self._check(request)
        stop_ids = frozenset(request.params.stop_token_ids)
        if not request.params.ignore_eos:
            stop_ids |= frozenset(self._info.eos_token_ids)
        self._prompt_tokens += len(request.token_ids)
        if self._goes_to_batching(request):
            assert self._batching is not None
            self._batched[request.request_id] = _Batched(request, stop_ids)
            self._batching.add(request, sorted(stop_ids))
            return
        sampler = SamplerState.create(request.params, request.token_ids, self._info.eos_token_ids)
        self._waiting.append(_Request(request=request, sampler=sampler, stop_ids=stop_ids))

    def _goes_to_batching(self, request: GenerateRequest) -> bool:
        if self._batching is not None and not self._batching.alive:
            logger.error("continuous batching has ended; requests run one at a time from now on")
            self._batching = None
        if self._batching is None or not honours(request):
            return False
        total = len(request.token_ids) + request.params.max_tokens
        return total <= self._batching.capacity_tokens

    def _check(self, request: GenerateRequest) -> None:
        """Raises: EngineError: what this engine cannot do exactly as asked."""
        if self._model is None:
            raise EngineError("sleeping", f"{self._info.model} is asleep")
        if request.skip.mode != "off":
            raise EngineError("unsupported_parameter", "this engine skips no FFN blocks", "skip")
        if request.constraint is not None:
            raise EngineError(
                "unsupported_parameter", "this engine cannot constrain output", "response_format"
            )
        if len(self._waiting) >= MAX_NUM_WAITING:
            raise EngineError("queue_full", f"{MAX_NUM_WAITING} requests are waiting")
        self._check_prompt(request.token_ids, request.embedding_rows, "prompt")
        params = request.params
        total = len(request.token_ids) + params.max_tokens
        if total > self._info.max_model_len:
            raise EngineError(
                "context_length_exceeded",
                f"prompt of {len(request.token_ids)} tokens plus max_tokens {params.max_tokens} exceeds the"
                f" context of {self._info.max_model_len}",
                "max_tokens",
            )
        for name, ids in (
            ("logit_bias", params.logit_bias),
            ("stop_token_ids", params.stop_token_ids),
        ):
            if not all(0 <= token_id < self._info.vocab_size for token_id in ids):
                raise EngineError(
                    "invalid_value", f"token ids must be in [0, {self._info.vocab_size})", name
                )

    def _check_prompt(self, token_ids: tuple[int, ...], rows: bytes | None, param: str) -> None:
        if not token_ids:
            raise EngineError("invalid_value", "a prompt must have at least one token", param)
        if not all(t == ROW_PLACEHOLDER or 0 <= t < self._info.vocab_size for t in token_ids):
            raise EngineError(
                "invalid_value", f"token ids must be in [0, {self._info.vocab_size})", param
            )
        expected = num_placeholders(token_ids) * self._info.hidden_size * 4
        if len(rows or b"") != expected:
            raise EngineError(
                "invalid_value",
                f"embedding rows have {len(rows or b'')} bytes, need {expected}",
                param,
            )

    def abort(self, request_id: str) -> None:
        self._running.pop(request_id, None)
        self._waiting = deque(r for r in self._waiting if r.request.request_id != request_id)
        if self._batched.pop(request_id, None) is not None and self._batching is not None:
            self._batching.cancel(request_id)

    def has_work(self) -> bool:
        return bool(self._running or self._waiting or self._batched)

    @torch.inference_mode()
    def step(self) -> list[TokenOutput]:
        while self._waiting and len(self._running) < self._info.max_num_seqs:
            request = self._waiting.popleft()
            self._running[request.request.request_id] = request
        outputs = []
        for request in list(self._running.values()):
            output = self._advance(request)
            if output is not None:
                outputs.append(output)
                if output.finish_reason is not None:
                    del self._running[output.request_id]
        if self._batched:
            outputs += self._collect(0.0 if self._running else 0.05)
        self._generation_tokens += sum(len(output.token_ids) for output in outputs)
        return outputs

    def _collect(self, timeout_seconds: float) -> list[TokenOutput]:
        """Outputs of continuous batching since the last step."""
        assert self._batching is not None
        outputs = []
        for result in self._batching.results(timeout_seconds):
            batched = self._batched.get(result.request_id)
            if batched is None:
                continue  # aborted meanwhile
            new_ids = tuple(result.generated_tokens[batched.num_generated :])
            batched.num_generated += len(new_ids)
            finished = result.is_finished()
            if finished:
                del self._batched[result.request_id]
            if result.error:
                logger.error("continuous batching failed a request: %s", result.error)
                outputs.append(
                    TokenOutput(
                        request_id=result.request_id,
                        finish_reason="error",
                        error="the engine failed while it ran this request",
                        error_code="internal_error",
                    )
                )
                continue
            stopped = finished and bool(new_ids) and new_ids[-1] in batched.stop_ids
            if new_ids or finished:
                outputs.append(
                    TokenOutput(
                        request_id=result.request_id,
                        token_ids=new_ids,
                        finish_reason=("stop" if stopped else "length") if finished else None,
                        stop_token_id=new_ids[-1] if stopped else None,
                    )
                )
        return outputs

    def _advance(self, running: _Request) -> TokenOutput | None:
        """One prefill chunk or one token. None while the prompt is not through."""
        if running.in_prefill:
            logits_V = self._prefill_chunk(running)
            if logits_V is None:
                return None
        else:
            logits_V = self._forward(running, torch.tensor([running.next_ids]), last_only=True)[-1]
        first = running.sampler.num_generated == 0
        prompt_logprobs = None
        if first and running.request.params.prompt_logprobs is not None:
            prompt_logprobs = tuple(running.prompt_logprobs)
        params, request_id = running.request.params, running.request.request_id
        if params.max_tokens == 0:
            return TokenOutput(
                request_id=request_id, prompt_logprobs=prompt_logprobs, finish_reason="length"
            )
        token_id, logprob = sample(logits_V, running.sampler)
        running.next_ids = [token_id]
        stopped = token_id in running.stop_ids
        ended = stopped or running.sampler.num_generated >= params.max_tokens
        return TokenOutput(
            request_id=request_id,
            token_ids=(token_id,),
            logprobs=None if logprob is None else (logprob,),
            prompt_logprobs=prompt_logprobs,
            finish_reason=("stop" if stopped else "length") if ended else None,
            stop_token_id=token_id if stopped else None,
        )

    def _prefill_chunk(self, running: _Request) -> Tensor | None:
        """Compute the next chunk of the prompt; the last position's logits once it is through."""
        request = running.request
        start = running.num_computed_tokens
        end = min(start + PREFILL_CHUNK, running.num_prompt_tokens)
        wants_logprobs = request.params.prompt_logprobs is not None
        inputs = self._inputs(request.token_ids, request.embedding_rows, start, end)
        logits_SV = self._forward(running, inputs, last_only=not wants_logprobs)
        if wants_logprobs:
            self._add_prompt_logprobs(running, logits_SV, start, end)
        return None if running.in_prefill else logits_SV[-1]

    def _add_prompt_logprobs(
        self, running: _Request, logits_SV: Tensor, start: int, end: int
    ) -> None:
        """Position i's logits tell about token i + 1."""
        ids = running.request.token_ids
        num_top = running.request.params.prompt_logprobs or 0
        if start == 0:
            running.prompt_logprobs.append(TokenLogprob(token_id=ids[0], logprob=None))
        for position in range(start, min(end, len(ids) - 1)):
            next_id = ids[position + 1]
            if next_id == ROW_PLACEHOLDER:
                running.prompt_logprobs.append(TokenLogprob(token_id=next_id, logprob=None))
                continue
            logprobs_V = torch.log_softmax(logits_SV[position - start].float(), dim=-1)
            running.prompt_logprobs.append(token_logprob(logprobs_V, next_id, num_top))

    def _inputs(
        self, token_ids: tuple[int, ...], rows: bytes | None, start: int, end: int
    ) -> Tensor:
        """Ids (1, S) of a slice of a prompt; embeddings (1, S, H) where the slice has rows."""
        ids = token_ids[start:end]
        if rows is None or ROW_PLACEHOLDER not in ids:
            return torch.tensor([ids])
        rows_RH = torch.frombuffer(bytearray(rows), dtype=torch.float32)
        rows_RH = rows_RH.view(-1, self._info.hidden_size)
        ids_S = torch.tensor(ids)
        embedding = self._model.get_input_embeddings()
        embedded_SH: Tensor = embedding(ids_S.clamp(min=0).to(self._model.device)).clone()
        first = num_placeholders(token_ids[:start])
        is_row_S = ids_S == ROW_PLACEHOLDER
        wanted_RH = rows_RH[first : first + int(is_row_S.sum())]
        embedded_SH[is_row_S] = wanted_RH.to(embedded_SH)
        return embedded_SH[None]

    def _forward(self, running: _Request, inputs: Tensor, *, last_only: bool) -> Tensor:
        """Extend a request's cache; logits (S, V), or (1, V) of the last position only."""
        logits_SV, running.cache = self._run(inputs, running.cache, last_only=last_only)
        running.num_computed_tokens += inputs.shape[1]
        return logits_SV

    def _run(self, inputs: Tensor, cache: Any, *, last_only: bool) -> tuple[Tensor, Any]:
        name = "inputs_embeds" if inputs.is_floating_point() else "input_ids"
        keep = {"logits_to_keep": 1} if last_only else {}
        output = self._model(
            **{name: inputs.to(self._model.device)}, past_key_values=cache, use_cache=True, **keep
        )
        return output.logits[0], output.past_key_values

    @torch.inference_mode()
    def embed(self, request: EmbedRequest) -> EmbedResult:
        """Pooled last hidden states of a decoder, one text per forward pass."""
        if self._model is None:
            raise EngineError("sleeping", f"{self._info.model} is asleep")
        vectors = []
        for index, ids in enumerate(request.token_ids):
            check_text(ids, self._info, f"input[{index}]")
            ids_1S = torch.tensor([ids], device=self._model.device)
            hidden_SH = self._model.base_model(ids_1S).last_hidden_state[0].float()
            vectors.append(hidden_SH[-1] if request.pooling == "last" else hidden_SH.mean(dim=0))
        num_tokens = sum(len(ids) for ids in request.token_ids)
        self._prompt_tokens += num_tokens
        return embed_result(torch.stack(vectors).cpu(), num_tokens, normalize=request.normalize)

    @torch.inference_mode()
    def score(self, request: ScoreRequest) -> ScoreResult:
        """Log-probabilities of continuations; the context is computed once."""
        if self._model is None:
            raise EngineError("sleeping", f"{self._info.model} is asleep")
        context = request.context_ids
        self._check_prompt(context, request.embedding_rows, "context")
        for index, ids in enumerate(request.continuation_ids):
            param = f"continuations[{index}]"
            self._check_prompt(ids, None, param)
            if len(context) + len(ids) > self._info.max_model_len:
                raise EngineError(
                    "context_length_exceeded",
                    f"context and continuation have {len(context) + len(ids)} tokens, at most"
                    f" {self._info.max_model_len}",
                    param,
                )
        inputs = self._inputs(context, request.embedding_rows, 0, len(context))
        last_1V, cache = self._run(inputs, None, last_only=True)
        scores = tuple(self._score_one(last_1V, cache, ids) for ids in request.continuation_ids)
        num_tokens = len(context) + sum(len(ids) for ids in request.continuation_ids)
        self._prompt_tokens += num_tokens
        return ScoreResult(scores=scores, num_tokens=num_tokens)

    def _score_one(self, last_1V: Tensor, cache: Any, ids: tuple[int, ...]) -> ContinuationScore:
        logits_SV = last_1V
        if len(ids) > 1:
            rest_SV, _ = self._run(torch.tensor([ids[:-1]]), copy.deepcopy(cache), last_only=False)
            logits_SV = torch.cat([last_1V, rest_SV])
        logprobs_SV = torch.log_softmax(logits_SV.float(), dim=-1)
        ids_S = torch.tensor(ids, device=logprobs_SV.device)
        chosen_S = logprobs_SV.gather(1, ids_S[:, None])[:, 0]
        return ContinuationScore(
            logprob=float(chosen_S.double().sum()),
            is_greedy=bool((logprobs_SV.argmax(dim=1) == ids_S).all()),
            token_logprobs=tuple(chosen_S.tolist()),
        )

    def sleep(self) -> None:
        if self._reload is None:
            raise EngineError("invalid_value", "this engine was not loaded from a checkpoint")
        if self.has_work():
            raise EngineError("queue_full", "requests are running; try again when they have ended")
        if self._batching is not None:
            self._batching.close()
            self._batching = None
        self._model = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def wake(self) -> None:
        if self._model is None:
            self._model = self._reload()
            self._start_batching(self._info.max_num_seqs)

    def stats(self) -> EngineStats:
        held = sum(request.num_computed_tokens for request in self._running.values())
        held += sum(len(b.request.token_ids) + b.num_generated for b in self._batched.values())
        return EngineStats(
            num_requests_running=len(self._running) + len(self._batched),
            num_requests_waiting=len(self._waiting),
            kv_cache_usage_ratio=held / (self._info.max_num_seqs * self._info.max_model_len),
            prompt_tokens_total=self._prompt_tokens,
            generation_tokens_total=self._generation_tokens,
            preemptions_total=0,
            prefix_cache_queries_total=0,
            prefix_cache_hits_total=0,
            ffn_rows_skipped_total=0,
            ffn_rows_total=0,
            last_output_at=None,
            sleeping=self._model is None,
            rss_bytes=rss_bytes(),
        )

    def close(self) -> None:
        """Stop the continuous batching thread."""
        if self._batching is not None:
            self._batching.close()
            self._batching = None


def eos_token_ids(model: Any) -> tuple[int, ...]:
    """The ids that end a generation, from generation_config.json, else config.json."""
    eos = model.generation_config.eos_token_id
    if eos is None:
        eos = model.config.get_text_config().eos_token_id
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list | tuple) else (int(eos),)
