"""Causal grouped-query attention over a paged cache (arXiv:2309.06180, arXiv:2305.13245), in plain torch.

The reference of every faster version. Requests with one row are computed together, padded to the longest context; a
request with more rows is computed alone. What depends on the step only, not on the layer, is an `AttentionPlan`.
Without a cache (embedding), a request attends to the rows of its own pass, which must be all of it.

Shapes: T rows, S requests, B blocks, N query heads, K key/value heads, G = N / K, D head dim, Q rows of one request,
C context positions.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from engines.kernels.metadata import BLOCK_SIZE, BatchMetadata

LayerCache = tuple[Tensor, Tensor]
"""key_cache and value_cache of one layer, each (num_blocks, BLOCK_SIZE, K, D)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chunk:
    """Rows [start, end) of one request whose context ends with them."""

    request: int
    start: int
    end: int
    context_len: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionPlan:
    """Attributes:
    single_rows: rows of the requests that have one.
    single_blocks_SB: their blocks.
    masks: window (None: unlimited) to the mask over the single rows' contexts; broadcasts over heads.
    chunks: the requests that have more.
    """

    metadata: BatchMetadata
    single_rows: Tensor | slice
    single_blocks_SB: Tensor
    masks: dict[int | None, Tensor]
    chunks: tuple[_Chunk, ...]


def plan_attention(metadata: BatchMetadata, windows: Collection[int | None]) -> AttentionPlan:
    """Args: windows: every sliding window that a layer of the model has; None for full attention."""
    single_rows: Tensor | slice = slice(None)
    single_blocks_SB, context_lens_S = metadata.block_tables_SB, metadata.context_lens_S
    chunks: list[_Chunk] = []
    if metadata.max_query_len > 1:
        starts, context_lens = metadata.query_start_S1.tolist(), context_lens_S.tolist()
        singles: list[int] = []
        for request, context_len in enumerate(context_lens):
            start, end = starts[request], starts[request + 1]
            if end - start == 1:
                singles.append(request)
            else:
                chunks.append(
                    _Chunk(request=request, start=start, end=end, context_len=context_len)
                )
        singles_S = torch.tensor(singles, dtype=torch.long, device=context_lens_S.device)
        single_rows = metadata.query_start_S1[singles_S]
        single_blocks_SB, context_lens_S = single_blocks_SB[singles_S], context_lens_S[singles_S]
    masks: dict[int | None, Tensor] = {}
    if len(context_lens_S):
        single_blocks_SB = single_blocks_SB[:, : -(-int(context_lens_S.max()) // BLOCK_SIZE)]
        num_positions = single_blocks_SB.shape[1] * BLOCK_SIZE
        positions_C = torch.arange(num_positions, device=context_lens_S.device)
        masks = {
            window: _visible(positions_C, context_lens_S[:, None] - 1, window)[:, None, None]
            for window in windows
        }
    return AttentionPlan(
        metadata=metadata,
        single_rows=single_rows,
        single_blocks_SB=single_blocks_SB,
        masks=masks,
        chunks=tuple(chunks),
    )


def _visible(key_positions: Tensor, query_positions: Tensor, window: int | None) -> Tensor:
    """Whether a query sees a key: not after it, and among the last `window` positions."""
    visible = key_positions <= query_positions
    if window is not None:
        visible &= key_positions > query_positions - window
    return visible


def write_cache(
    cache: LayerCache, keys_TKD: Tensor, values_TKD: Tensor, slot_mapping_T: Tensor
) -> None:
    """Put the rows' keys and values at their slots."""
    for blocks, rows_TKD in zip(cache, (keys_TKD, values_TKD), strict=True):
        blocks.flatten(0, 1).index_copy_(0, slot_mapping_T, rows_TKD)


def paged_attention(
    queries_TND: Tensor,
    keys_TKD: Tensor,
    values_TKD: Tensor,
    cache: LayerCache | None,
    plan: AttentionPlan,
    window: int | None,
) -> Tensor:
    """Attention of a pass's rows (T, N, D); the rows' keys and values are in the cache already."""
    out_TND = torch.empty_like(queries_TND)
    if plan.masks:
        rows = plan.single_rows
        out_TND[rows] = _single_rows(
            queries_TND[rows], keys_TKD[rows], values_TKD[rows], cache, plan, window
        )
    for chunk in plan.chunks:
        rows = slice(chunk.start, chunk.end)
        keys_CKD, values_CKD = keys_TKD[rows], values_TKD[rows]
        if chunk.end - chunk.start < chunk.context_len:
            assert cache is not None
            num_blocks = -(-chunk.context_len // BLOCK_SIZE)
            blocks_B = plan.metadata.block_tables_SB[chunk.request, :num_blocks]
            keys_CKD, values_CKD = (
                part[blocks_B].flatten(0, 1)[: chunk.context_len] for part in cache
            )
        out_TND[rows] = _chunk(queries_TND[rows], keys_CKD, values_CKD, window)
    return out_TND


def _single_rows(
    queries_SND: Tensor,
    keys_SKD: Tensor,
    values_SKD: Tensor,
    cache: LayerCache | None,
    plan: AttentionPlan,
    window: int | None,
) -> Tensor:
    num_rows, num_heads, head_dim = queries_SND.shape
    num_kv_heads = keys_SKD.shape[1]
    if cache is None:  # a text of one token sees nothing but itself
        return values_SKD.repeat_interleave(num_heads // num_kv_heads, dim=1)
    keys_SKCD, values_SKCD = (
        part[plan.single_blocks_SB].flatten(1, 2).transpose(1, 2) for part in cache
    )
    # The queries of a group share keys and mask, so they can stand where SDPA expects query positions.
    queries_SKGD = queries_SND.view(num_rows, num_kv_heads, -1, head_dim)
    out_SKGD = F.scaled_dot_product_attention(
        queries_SKGD, keys_SKCD, values_SKCD, attn_mask=plan.masks[window]
    )
    return out_SKGD.reshape(num_rows, num_heads, head_dim)


def _chunk(queries_QND: Tensor, keys_CKD: Tensor, values_CKD: Tensor, window: int | None) -> Tensor:
    num_rows, context_len = len(queries_QND), len(keys_CKD)
    mask_QC: Tensor | None = None
    if num_rows < context_len or (window is not None and window < context_len):
        positions_C = torch.arange(context_len, device=queries_QND.device)
        mask_QC = _visible(positions_C, positions_C[-num_rows:, None], window)
    out_NQD = F.scaled_dot_product_attention(
        queries_QND.transpose(0, 1)[None],
        keys_CKD.transpose(0, 1)[None],
        values_CKD.transpose(0, 1)[None],
        attn_mask=mask_QC,
        is_causal=mask_QC is None,
        enable_gqa=True,
    )[0]
    return out_NQD.transpose(0, 1)
