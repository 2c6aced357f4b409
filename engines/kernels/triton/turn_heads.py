"""Qwen3's norms, rotation and the write to the paged cache in one launch, one head of a row to a program.

The same as `turn_heads` and `write_cache` of the plain version, whose rounding it keeps: normed heads are rounded to
the model's dtype before they are rotated.

Shapes: T rows, N query heads, K key/value heads, A = N + 2 K, D head dim, R = D / 2.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engines.kernels.attention import LayerHeads, PassFacts
from engines.kernels.paged_attention import LayerCache
from engines.kernels.triton.launch import tile


@triton.jit
def _turn_heads(
    heads_TAD,
    cos_TR,
    sin_TR,
    query_norm_D,
    key_norm_D,
    slot_mapping_T,
    queries_TND,
    key_cache,
    value_cache,
    epsilon,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    TILE_R: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    half = tl.arange(0, TILE_R)
    is_inside = half < HALF
    source = heads_TAD + (row * (NUM_HEADS + 2 * NUM_KV_HEADS) + head) * 2 * HALF + half
    stored_first = tl.load(source, mask=is_inside, other=0.0)
    stored_second = tl.load(source + HALF, mask=is_inside, other=0.0)
    slot = tl.load(slot_mapping_T + row)
    dtype = heads_TAD.dtype.element_ty
    if head < NUM_HEADS + NUM_KV_HEADS:
        first = stored_first.to(tl.float32)
        second = stored_second.to(tl.float32)
        if HAS_NORMS:
            norm_D = query_norm_D
            if head >= NUM_HEADS:
                norm_D = key_norm_D
            mean = (tl.sum(first * first, axis=0) + tl.sum(second * second, axis=0)) / (2 * HALF)
            inverse = tl.rsqrt(mean + epsilon)
            first *= inverse * tl.load(norm_D + half, mask=is_inside, other=0.0).to(tl.float32)
            second *= inverse * tl.load(norm_D + HALF + half, mask=is_inside, other=0.0).to(
                tl.float32
            )
            first = first.to(dtype).to(tl.float32)
            second = second.to(dtype).to(tl.float32)
        cos = tl.load(cos_TR + row * HALF + half, mask=is_inside, other=0.0)
        sin = tl.load(sin_TR + row * HALF + half, mask=is_inside, other=0.0)
        turned_first = (first * cos - second * sin).to(dtype)
        turned_second = (second * cos + first * sin).to(dtype)
        if head < NUM_HEADS:
            target = queries_TND + (row * NUM_HEADS + head) * 2 * HALF + half
        else:
            target = key_cache + (slot * NUM_KV_HEADS + head - NUM_HEADS) * 2 * HALF + half
        tl.store(target, turned_first, mask=is_inside)
        tl.store(target + HALF, turned_second, mask=is_inside)
    else:
        kv_head = head - NUM_HEADS - NUM_KV_HEADS
        target = value_cache + (slot * NUM_KV_HEADS + kv_head) * 2 * HALF + half
        tl.store(target, stored_first, mask=is_inside)
        tl.store(target + HALF, stored_second, mask=is_inside)


def turn_heads(heads_TAD: Tensor, layer: LayerHeads, facts: PassFacts, cache: LayerCache) -> Tensor:
    """Write the rows' keys and values to the cache. Returns: their queries (T, N, D), normed and rotated."""
    num_rows, num_all_heads, head_dim = heads_TAD.shape
    heads_TAD = heads_TAD.contiguous()
    queries_TND = torch.empty(
        num_rows, layer.num_heads, head_dim, dtype=heads_TAD.dtype, device=heads_TAD.device
    )
    query_norm_D, key_norm_D = layer.query_norm_D, layer.key_norm_D
    _turn_heads[(num_rows, num_all_heads)](
        *(heads_TAD, facts.cos_TR, facts.sin_TR),
        *(heads_TAD if norm is None else norm for norm in (query_norm_D, key_norm_D)),
        *(facts.metadata.slot_mapping_T, queries_TND, *cache, facts.epsilon),
        NUM_HEADS=layer.num_heads,
        NUM_KV_HEADS=layer.num_kv_heads,
        HALF=head_dim // 2,
        HAS_NORMS=query_norm_D is not None,
        TILE_R=tile(head_dim // 2),
        num_warps=1,
    )
    return queries_TND
