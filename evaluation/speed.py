"""Speed of two models side by side: interleaved runs, medians, and the ratio that survives a noisy machine."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from compression.hf import cache_argument
from compression.memory import trim_heap


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Medians over the rounds, batch size 1.

    Attributes:
        decode_tokens_per_second: greedy tokens after the prompt, through transformers' modules and KV cache.
        prefill_tokens_per_second: prompt tokens of one forward pass.
    """

    decode_tokens_per_second: float
    prefill_tokens_per_second: float
    prompt_tokens: int
    new_tokens: int
    rounds: int
    num_threads: int


@torch.inference_mode()
def compare_speed(
    models: Mapping[str, Any],
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 24,
    rounds: int = 3,
    on_round: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Speed]:
    """Time several models in turn, one round after another; the first round warms up and is not counted."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for round_index in range(rounds + 1):
        on_round(round_index, rounds + 1)
        for name, model in models.items():
            measured = _time_once(model, prompt_tokens, new_tokens)
            trim_heap()
            if round_index:
                times[name].append(measured)
    return {
        name: Speed(
            prefill_tokens_per_second=prompt_tokens / statistics.median(p for p, _ in pairs),
            decode_tokens_per_second=new_tokens / statistics.median(d for _, d in pairs),
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            rounds=rounds,
            num_threads=torch.get_num_threads(),
        )
        for name, pairs in times.items()
    }


def _time_once(model: Any, prompt_tokens: int, new_tokens: int) -> tuple[float, float]:
    """Seconds of (prefill, decode)."""
    vocab_size = int(model.get_input_embeddings().weight.shape[0])
    generator = torch.Generator().manual_seed(0)
    ids_1S = torch.randint(0, vocab_size, (1, prompt_tokens), generator=generator)
    ids_1S = ids_1S.to(model.device)
    cache = {cache_argument(model): DynamicCache(config=model.config)}
    start = time.perf_counter()
    output = model(ids_1S, use_cache=True, logits_to_keep=1, **cache)
    _synchronize(model)
    prefilled = time.perf_counter()
    for _ in range(new_tokens):
        next_11 = output.logits[:, -1:].argmax(dim=-1)
        output = model(next_11, use_cache=True, **cache)
    _synchronize(model)
    return prefilled - start, time.perf_counter() - prefilled


def _synchronize(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()
