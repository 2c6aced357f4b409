"""Causal grouped-query attention over the paged cache, prefill and decode; see `engines/kernels/paged_attention.py`.

A program attends for a tile of one request's rows and one key/value head: the query heads of a group share its keys, so
rows times heads of the group stand in the tile's first dimension (arXiv:2305.13245). It walks the context in tiles of
positions, found through the block table (arXiv:2309.06180), with an online softmax (Milakov and Gimelshein 2018,
arXiv:1805.02867).

In a pure decode step the context is split among programs, since few requests would leave most of the GPU idle
(Flash-Decoding, Dao et al. 2023), and merged by a second launch. Parts are of one length for a model, not as many as
suit the batch, so that a row's result does not depend on it. A mixed pass has rows enough and is not split.

Nothing here waits for the device: what a program works on is computed there.

Shapes: T rows, S requests, B blocks, P programs, N query heads, K key/value heads, G = N / K, D head dim, M rows of a
tile, C positions of a tile, L parts of a context.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from engines.kernels.attention import LayerHeads, PassFacts
from engines.kernels.metadata import BLOCK_SIZE, BatchMetadata
from engines.kernels.paged_attention import LayerCache
from engines.kernels.triton.launch import dot_dtype, tile
from engines.kernels.triton.turn_heads import turn_heads

MIN_SPLIT_LEN = 256
MAX_PARTS = 128
"""Of a context; with room for all of them, since a recorded pass has the longest context's programs."""
MIN_DOT = 16
"""Least side of a matrix product on the GPU's matrix units."""
TILE_BYTES = 16384
"""Of a tile of keys: several tiles of keys and values must fit into a multiprocessor's shared memory."""
MERGED_PARTS = 16


# What changes from step to step is not compiled in, or serving would stop to compile again.
@triton.jit(do_not_specialize=["max_blocks", "num_parts"])
def _attend(
    queries_TND,
    key_cache,
    value_cache,
    block_tables_SB,
    query_start_S1,
    context_lens_S,
    tile_requests_P,
    tile_rows_P,
    out_TND,
    log_sum_TNL,
    log2_scale,
    max_blocks,
    num_parts,
    window,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    SPLIT_LEN: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_C: tl.constexpr,
    TILE_D: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    ROWS: tl.constexpr = TILE_M // GROUP
    program = tl.program_id(0)
    kv_head = tl.program_id(1)
    part = tl.program_id(2)
    request = tl.load(tile_requests_P + program)
    if request < 0:
        return
    first_row = tl.load(tile_rows_P + program)
    end_row = tl.load(query_start_S1 + request + 1)
    context_len = tl.load(context_lens_S + request)
    last_row = tl.minimum(first_row + ROWS, end_row) - 1

    members = tl.arange(0, TILE_M)
    rows = first_row + members // GROUP
    is_query = (members < ROWS * GROUP) & (rows <= last_row)
    heads = kv_head * GROUP + members % GROUP
    positions = context_len - end_row + rows
    head_offsets = rows.to(tl.int64) * NUM_HEADS + heads

    key_begin = 0
    if HAS_WINDOW:
        key_begin = tl.maximum(context_len - end_row + first_row - window + 1, 0)
        key_begin = key_begin // TILE_C * TILE_C
    key_end = context_len - end_row + last_row + 1
    if IS_SPLIT:
        key_begin = tl.maximum(key_begin, part * SPLIT_LEN)
        key_end = tl.minimum(key_end, (part + 1) * SPLIT_LEN)
        if key_begin >= key_end:
            tl.store(log_sum_TNL + head_offsets * num_parts + part, -float("inf"), mask=is_query)
            return

    dims = tl.arange(0, TILE_D)
    is_dim = dims < HEAD_DIM
    queries = tl.load(
        queries_TND + head_offsets[:, None] * HEAD_DIM + dims[None, :],
        mask=is_query[:, None] & is_dim[None, :],
        other=0.0,
    ).to(DOT_DTYPE)
    highest = tl.full([TILE_M], -float("inf"), tl.float32)
    total = tl.zeros([TILE_M], tl.float32)
    attended = tl.zeros([TILE_M, TILE_D], tl.float32)
    for begin in range(key_begin, key_end, TILE_C):
        keys_at = begin + tl.arange(0, TILE_C)
        is_key = keys_at < key_end
        blocks = tl.load(
            block_tables_SB + request * max_blocks + keys_at // BLOCK_SIZE, mask=is_key, other=0
        )
        slots = blocks.to(tl.int64) * BLOCK_SIZE + keys_at % BLOCK_SIZE
        offsets = (slots * NUM_KV_HEADS + kv_head) * HEAD_DIM
        keys_DC = tl.load(
            key_cache + offsets[None, :] + dims[:, None],
            mask=is_key[None, :] & is_dim[:, None],
            other=0.0,
        ).to(DOT_DTYPE)
        scores = tl.dot(queries, keys_DC, input_precision="ieee") * log2_scale
        is_seen = is_key[None, :] & (keys_at[None, :] <= positions[:, None])
        if HAS_WINDOW:
            is_seen = is_seen & (keys_at[None, :] > positions[:, None] - window)
        scores = tl.where(is_seen, scores, -float("inf"))
        new_highest = tl.maximum(highest, tl.max(scores, axis=1))
        # A row that has seen nothing yet has -inf, and -inf - -inf is no number.
        shift = tl.where(new_highest == -float("inf"), 0.0, new_highest)
        weights = tl.exp2(scores - shift[:, None])
        decay = tl.exp2(highest - shift)
        total = total * decay + tl.sum(weights, axis=1)
        values_CD = tl.load(
            value_cache + offsets[:, None] + dims[None, :],
            mask=is_key[:, None] & is_dim[None, :],
            other=0.0,
        ).to(DOT_DTYPE)
        attended = attended * decay[:, None] + tl.dot(
            weights.to(DOT_DTYPE), values_CD, input_precision="ieee"
        )
        highest = new_highest

    seen_total = tl.where(total > 0, total, 1.0)
    attended = attended / seen_total[:, None]
    if IS_SPLIT:
        log_sum = tl.where(total > 0, highest + tl.log2(seen_total), -float("inf"))
        head_offsets = head_offsets * num_parts + part
        tl.store(log_sum_TNL + head_offsets, log_sum, mask=is_query)
    tl.store(
        out_TND + head_offsets[:, None] * HEAD_DIM + dims[None, :],
        attended.to(out_TND.dtype.element_ty),
        mask=is_query[:, None] & is_dim[None, :],
    )


@triton.jit(do_not_specialize=["num_parts"])
def _merge_parts(
    parts_TNLD,
    log_sum_TNL,
    context_lens_S,
    out_TND,
    num_parts,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SPLIT_LEN: tl.constexpr,
    TILE_L: tl.constexpr,
    TILE_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = row * NUM_HEADS + tl.program_id(1)
    num_used = tl.cdiv(tl.load(context_lens_S + row), SPLIT_LEN)
    dims = tl.arange(0, TILE_D)
    is_dim = dims < HEAD_DIM
    highest = -float("inf")
    total = 0.0
    merged = tl.zeros([TILE_D], tl.float32)
    for begin in range(0, num_used, TILE_L):
        parts = begin + tl.arange(0, TILE_L)
        log_sums = tl.load(
            log_sum_TNL + head * num_parts + parts, mask=parts < num_used, other=-float("inf")
        )
        new_highest = tl.maximum(highest, tl.max(log_sums, axis=0))
        shift = tl.where(new_highest == -float("inf"), 0.0, new_highest)
        weights = tl.exp2(log_sums - shift)
        decay = tl.exp2(highest - shift)
        # A part before the window has written nothing but its -inf.
        values = tl.load(
            parts_TNLD + (head * num_parts + parts[:, None]) * HEAD_DIM + dims[None, :],
            mask=(log_sums > -float("inf"))[:, None] & is_dim[None, :],
            other=0.0,
        )
        merged = merged * decay + tl.sum(weights[:, None] * values, axis=0)
        total = total * decay + tl.sum(weights, axis=0)
        highest = new_highest
    merged = merged / total
    tl.store(out_TND + head * HEAD_DIM + dims, merged.to(out_TND.dtype.element_ty), mask=is_dim)


class TritonAttention:
    """The attention of one pass; see `engines.kernels.attention.Attention`. It needs a cache."""

    def __init__(self, facts: PassFacts) -> None:
        self._facts = facts
        self._tiles: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, heads_TAD: Tensor, layer: LayerHeads, cache: LayerCache | None) -> Tensor:
        assert cache is not None
        queries_TND = turn_heads(heads_TAD, layer, self._facts, cache)
        metadata = self._facts.metadata
        is_decode = metadata.max_query_len == 1
        group = layer.num_heads // layer.num_kv_heads
        tile_m = tile(group, MIN_DOT if is_decode else _prefill_rows(queries_TND))
        rows_per_tile = tile_m // group
        if rows_per_tile not in self._tiles:
            self._tiles[rows_per_tile] = request_tiles(metadata, rows_per_tile)
        return paged_attention(
            queries_TND,
            cache,
            metadata,
            window=layer.window,
            split_len=max(tile(self._facts.max_context_len) // MAX_PARTS, MIN_SPLIT_LEN),
            tiles=self._tiles[rows_per_tile],
            tile_m=tile_m,
        )


def _prefill_rows(queries_TND: Tensor) -> int:
    """Fewer where a row is long, for the same reason as `TILE_BYTES`."""
    row_bytes = tile(queries_TND.shape[2]) * queries_TND.dtype.itemsize
    return 64 if row_bytes <= 512 else 32


def request_tiles(metadata: BatchMetadata, rows_per_tile: int) -> tuple[Tensor, Tensor]:
    """Which request's rows each program works on, and the first of them: int32 (P), -1 for programs without work."""
    query_start_S1 = metadata.query_start_S1
    num_requests = len(query_start_S1) - 1
    if metadata.max_query_len == 1:  # one row each, so one tile each
        requests_P = torch.arange(num_requests, dtype=torch.int32, device=query_start_S1.device)
        return requests_P, query_start_S1[:-1]
    # How many tiles there are is known on the device only; this many there can be.
    num_tiles = len(metadata.positions_T) // rows_per_tile + num_requests
    tiles_S = (query_start_S1.diff() + rows_per_tile - 1) // rows_per_tile
    ends_S = tiles_S.cumsum(0)
    programs_P = torch.arange(num_tiles, device=query_start_S1.device)
    requests_P = torch.searchsorted(ends_S, programs_P, right=True)
    is_used_P = requests_P < num_requests
    requests_P = requests_P.clamp(max=num_requests - 1)
    within_P = programs_P - (ends_S - tiles_S)[requests_P]
    rows_P = query_start_S1[requests_P] + within_P * rows_per_tile
    return torch.where(is_used_P, requests_P, -1).int(), rows_P.int()


def paged_attention(
    queries_TND: Tensor,
    cache: LayerCache,
    metadata: BatchMetadata,
    *,
    window: int | None,
    split_len: int,
    tiles: tuple[Tensor, Tensor],
    tile_m: int,
) -> Tensor:
    """Attention of a pass's rows (T, N, D), whose keys and values are in the cache already.

    Args:
        split_len: of a part of the context in decode; a multiple of every tile of positions.
        tiles: of `request_tiles`, for tiles of `tile_m` // G rows.
    """
    num_rows, num_heads, head_dim = queries_TND.shape
    num_kv_heads = cache[0].shape[2]
    max_blocks = metadata.block_tables_SB.shape[1]
    num_parts = triton.cdiv(max_blocks * BLOCK_SIZE, split_len)
    is_split = metadata.max_query_len == 1 and num_parts > 1
    tile_d = tile(head_dim, MIN_DOT)
    fitting = TILE_BYTES // (tile_d * queries_TND.dtype.itemsize)
    out_TND = torch.empty_like(queries_TND)
    parts_TNLD, log_sum_TNL = out_TND, out_TND
    if is_split:
        shape = (num_rows, num_heads, num_parts)
        log_sum_TNL = torch.empty(shape, dtype=torch.float32, device=out_TND.device)
        parts_TNLD = torch.empty((*shape, head_dim), dtype=torch.float32, device=out_TND.device)
    tile_requests_P, tile_rows_P = tiles
    _attend[(len(tile_requests_P), num_kv_heads, num_parts if is_split else 1)](
        *(queries_TND, *cache, metadata.block_tables_SB, metadata.query_start_S1),
        *(metadata.context_lens_S, tile_requests_P, tile_rows_P, parts_TNLD, log_sum_TNL),
        *(math.log2(math.e) / math.sqrt(head_dim), max_blocks, num_parts, window or 0),
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=BLOCK_SIZE,
        HAS_WINDOW=window is not None,
        IS_SPLIT=is_split,
        SPLIT_LEN=split_len,
        TILE_M=tile_m,
        TILE_C=min(max(fitting, MIN_DOT), 64),
        TILE_D=tile_d,
        DOT_DTYPE=dot_dtype(queries_TND.dtype),
        num_warps=4,
        num_stages=2,
    )
    if is_split:
        _merge_parts[(num_rows, num_heads)](
            *(parts_TNLD, log_sum_TNL, metadata.context_lens_S, out_TND, num_parts),
            NUM_HEADS=num_heads,
            HEAD_DIM=head_dim,
            SPLIT_LEN=split_len,
            TILE_L=MERGED_PARTS,
            TILE_D=tile_d,
            num_warps=4,
        )
    return out_TND
