"""Drives transformers' own continuous batching for the requests whose parameters it honours.

It batches the decode of all its requests into one forward pass over a paged cache, in a thread of its own. It
knows temperature,
top-k and top-p per request, and nothing else of ours; `honours` says which requests those are. In float32 its
greedy tokens
equal `generate`'s; in bfloat16 the batch's composition moves the last digits, and with them a greedy choice
between near ties.
"""

import logging
from typing import Any

import torch

from engines.protocol import GenerateRequest, SamplingParams

PAGE_TOKENS = 256
CACHE_BYTES = 512 * 2**20
MAX_BATCH_TOKENS = 512

# Of each of these there must be a processor to override per request, so the defaults are not neutral.
_DEFAULTS = {"temperature": 0.9, "top_k": 50, "top_p": 0.9}

logger = logging.getLogger("lathe.engine")


def honours(request: GenerateRequest) -> bool:
    """Whether continuous batching gives exactly what the request asks for."""
    params = request.params
    neutral = SamplingParams(
        max_tokens=params.max_tokens,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        stop_token_ids=params.stop_token_ids,
        ignore_eos=params.ignore_eos,
    )
    return params == neutral and params.max_tokens > 0 and request.embedding_rows is None


class ContinuousBatching:
    """One manager with its thread. Not thread-safe on our side."""

    def __init__(self, model: Any, *, max_num_seqs: int) -> None:
        """Start the manager and run one token through it.

        Raises:
            Exception: whatever transformers says to a model that it cannot batch.
        """
        from transformers import GenerationConfig
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        self._vocab_size = int(model.config.get_text_config().vocab_size)
        num_pages = max(CACHE_BYTES // (PAGE_TOKENS * _cache_bytes_per_token(model)), 8)
        self.capacity_tokens = num_pages * PAGE_TOKENS // 2
        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
        self._manager = model.init_continuous_batching(
            generation_config=GenerationConfig(do_sample=True, max_new_tokens=1, **_DEFAULTS),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=PAGE_TOKENS,
                num_blocks=num_pages,
                max_batch_tokens=MAX_BATCH_TOKENS,
                max_requests_per_batch=max_num_seqs,
                allow_block_sharing=False,  # a shared prefix would tell one tenant about another
                per_request_processors=True,
                use_cuda_graph=False,
            ),
        )
        self._manager.start()
        self._add("warm-up", [1], SamplingParams(max_tokens=1, temperature=0), [])
        result = self._manager.get_result(timeout=60)
        if result is None or result.error:
            self.close()
            raise RuntimeError(f"warm-up failed: {result.error if result else 'no answer'}")

    @property
    def alive(self) -> bool:
        return bool(self._manager.is_running())

    def add(self, request: GenerateRequest, eos_token_ids: list[int]) -> None:
        self._add(request.request_id, list(request.token_ids), request.params, eos_token_ids)

    def _add(
        self, request_id: str, token_ids: list[int], params: SamplingParams, eos: list[int]
    ) -> None:
        greedy = params.temperature == 0
        self._manager.add_request(
            token_ids,
            request_id=request_id,
            max_new_tokens=params.max_tokens,
            streaming=True,
            eos_token_id=eos or -1,
            temperature=1.0 if greedy else float(params.temperature),
            top_k=1 if greedy else (params.top_k or self._vocab_size),
            top_p=1.0 if greedy else float(params.top_p),
        )

    def cancel(self, request_id: str) -> None:
        self._manager.cancel_request(request_id)

    def results(self, timeout_seconds: float) -> list[Any]:
        """transformers' outputs since the last call; waits for the first one at most so long.

        Raises:
            RuntimeError: the manager's thread has died.
        """
        results = []
        result = self._manager.get_result(timeout=timeout_seconds)
        while result is not None:
            results.append(result)
            result = self._manager.get_result(timeout=0) if self._pending() else None
        if not results and not self.alive:
            raise RuntimeError("the continuous batching thread has ended")
        return results

    def _pending(self) -> bool:
        return not self._manager.output_router.output_queue.empty()

    def close(self) -> None:
        self._manager.stop(block=True, timeout=10, hard_stop=True)


def _cache_bytes_per_token(model: Any) -> int:
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size = torch.finfo(model.dtype).bits // 8
    return int(2 * config.num_hidden_layers * heads * head_dim * size)
