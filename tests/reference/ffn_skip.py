"""FFN-SkipLLM the slow way: one text, one token at a time, transformers' modules and KV cache, plain `if`s."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from compression.hf import cache_argument


@dataclass
class Trace:
    """Attributes: skipped: (token index, layer) in the order in which they were skipped."""

    skipped: list[tuple[int, int]] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    cache_lengths: list[int] = field(default_factory=list)


def cosine(a: Tensor, b: Tensor) -> float:
    dot = math.fsum(float(x) * float(y) for x, y in zip(a, b, strict=True))
    norms = [math.sqrt(math.fsum(float(x) ** 2 for x in v)) for v in (a, b)]
    return dot / (norms[0] * norms[1])


@torch.no_grad()
def decode_token(
    model: Any,
    token_id: int,
    cache: Any,
    position: int,
    token_index: int,
    *,
    tau: float,
    k: int,
    warm_up: int,
    cold: tuple[int, int],
    substitutes: dict[int, Callable[[Tensor], Tensor]],
    trace: Trace,
) -> Tensor:
    """Logits (V,) after one more token."""
    decoder = model.model
    position_ids = torch.tensor([[position]])
    x = decoder.embed_tokens(torch.tensor([[token_id]]))
    embeddings = decoder.rotary_emb(x, position_ids=position_ids)
    num_layers = len(decoder.layers)
    rem = 0
    for index, layer in enumerate(decoder.layers):
        attended, _ = layer.self_attn(
            hidden_states=layer.input_layernorm(x),
            attention_mask=None,
            position_ids=position_ids,
            position_embeddings=embeddings,
            **{cache_argument(model): cache},
        )
        h = x + attended
        normed = layer.post_attention_layernorm(h)
        is_middle = cold[0] <= index < num_layers - cold[1]
        if is_middle and token_index >= warm_up and rem > 0:
            x = h
            if index in substitutes:
                x = h + substitutes[index](normed[0])[None]
            rem -= 1
            trace.skipped.append((token_index, index))
        else:
            y = h + layer.mlp(normed)
            if is_middle and cosine(h[0, 0], y[0, 0]) >= tau:
                rem = k
            x = y
    trace.cache_lengths.append(min(cache.get_seq_length(i) for i in range(num_layers)))
    logits_V: Tensor = model.lm_head(decoder.norm(x))[0, 0]
    trace.logits.append(logits_V)
    return logits_V


def run_text(model: Any, ids: list[int], **rule: Any) -> Trace:
    """Every token of a text as a decode step, from an empty cache."""
    trace = Trace()
    cache = DynamicCache(config=model.config)
    for index, token_id in enumerate(ids):
        decode_token(model, token_id, cache, index, index, trace=trace, **rule)
    return trace


@torch.no_grad()
def generate(model: Any, prompt: list[int], max_tokens: int, **rule: Any) -> Trace:
    """Greedy: the prompt in full, then steps by the rule; `token_index` counts generated tokens."""
    trace = Trace()
    cache = DynamicCache(config=model.config)
    output = model(torch.tensor([prompt]), use_cache=True, **{cache_argument(model): cache})
    logits_V = output.logits[0, -1]
    for index in range(max_tokens):
        token_id = int(logits_V.argmax())
        trace.token_ids.append(token_id)
        if index + 1 == max_tokens:
            break
        logits_V = decode_token(
            model, token_id, cache, len(prompt) + index, index, trace=trace, **rule
        )
    return trace
