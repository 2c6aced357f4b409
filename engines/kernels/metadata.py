"""What one forward pass must know about its rows beyond their hidden states.

A pass computes T rows that belong to S requests: one row each in decode, a chunk of the prompt in prefill, any mixture.
Keys and values live in a paged cache (PagedAttention, Kwon et al. 2023, arXiv:2309.06180): blocks of `BLOCK_SIZE`
tokens, named by a request's block table.

Shapes: T rows, S requests, B blocks of the longest request.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchMetadata:
    """All tensors are on the model's device; rows of a request are neighbours, in order of position.

    Attributes:
        positions_T: int64, position of each row in its request.
        slot_mapping_T: int64, block * BLOCK_SIZE + offset where the row's key and value are written.
        block_tables_SB: int32, block ids of each request, padded with 0.
        query_start_S1: int32 (S + 1), rows of request s are [query_start[s], query_start[s + 1]).
        context_lens_S: int32, tokens of the request in the cache, this pass's included.
        max_query_len: 1 for a pure decode step.
    """

    positions_T: Tensor
    slot_mapping_T: Tensor
    block_tables_SB: Tensor
    query_start_S1: Tensor
    context_lens_S: Tensor
    max_query_len: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRows:
    """The rows of one request in a pass: its tokens [start, start + num_tokens).

    Attributes:
        block_table: blocks of its tokens up to the last of these; empty where the pass has no cache.
    """

    start: int
    num_tokens: int
    block_table: Sequence[int] = ()


def build_metadata(requests: Sequence[RequestRows], device: torch.device) -> BatchMetadata:
    """Metadata of a pass over the rows of `requests`, one after another."""
    positions: list[int] = []
    slots: list[int] = []
    query_start = [0]
    width = max(len(rows.block_table) for rows in requests)
    for rows in requests:
        span = range(rows.start, rows.start + rows.num_tokens)
        positions += span
        query_start.append(len(positions))
        if rows.block_table:
            table = rows.block_table
            slots += [table[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in span]
    tables = [[*rows.block_table, *[0] * (width - len(rows.block_table))] for rows in requests]
    context_lens = [rows.start + rows.num_tokens for rows in requests]
    return BatchMetadata(
        positions_T=torch.tensor(positions, device=device),
        slot_mapping_T=torch.tensor(slots, dtype=torch.int64, device=device),
        block_tables_SB=torch.tensor(tables, dtype=torch.int32, device=device),
        query_start_S1=torch.tensor(query_start, dtype=torch.int32, device=device),
        context_lens_S=torch.tensor(context_lens, dtype=torch.int32, device=device),
        max_query_len=max(rows.num_tokens for rows in requests),
    )
