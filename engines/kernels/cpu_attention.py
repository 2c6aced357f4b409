"""The attention of long passes on the native library: for CPUs with AVX-512 whose long passes run torch's products.

Rotation and the cache's writing are plain torch's; what attends is `cpu/long_attention.cpp`, in float32, over blocks as
they lie.

Shapes: T rows, N query heads, A = N + 2 K, D head dim.
"""

import ctypes

import torch
from torch import Tensor

from engines.kernels import native
from engines.kernels.attention import LayerHeads, PassFacts, turn_heads
from engines.kernels.cpu_linear import DTYPES
from engines.kernels.metadata import BLOCK_SIZE, BatchMetadata
from engines.kernels.native import NativeLibrary, cpu_features, native_library
from engines.kernels.paged_attention import LayerCache, write_cache

LANES = 16


def long_attention_library(dtype: torch.dtype, head_dim: int) -> NativeLibrary | str:
    """The library, or why these heads cannot have it."""
    library = native_library()
    if isinstance(library, str):
        return library
    if "avx512f" not in cpu_features():
        return "the CPU has no avx512f"  # with half the registers, sums would not stay in them
    if dtype not in DTYPES:
        return f"no native attention in {dtype}"
    if head_dim % LANES:
        return f"head_dim {head_dim}, a multiple of {LANES} is needed"
    return library


class LongAttention:
    """The attention of one pass over a cache."""

    def __init__(self, facts: PassFacts, library: NativeLibrary) -> None:
        self._facts = facts
        self._library = library
        self._batch = native_batch(facts.metadata)

    def __call__(self, heads_TAD: Tensor, layer: LayerHeads, cache: LayerCache | None) -> Tensor:
        assert cache is not None
        queries_TND, keys_TKD, values_TKD = turn_heads(heads_TAD, layer, self._facts)
        write_cache(cache, keys_TKD, values_TKD, self._facts.metadata.slot_mapping_T)
        queries_TND = queries_TND.contiguous()
        output_TND = torch.empty_like(queries_TND)
        one = native.Layer(
            key_cache=cache[0].data_ptr(),
            value_cache=cache[1].data_ptr(),
            num_heads=layer.num_heads,
            num_kv_heads=layer.num_kv_heads,
            window=layer.window or 0,
        )
        model = native.Model(
            layers=ctypes.pointer(one),
            num_layers=1,
            head_dim=queries_TND.shape[-1],
            block_size=BLOCK_SIZE,
            is_bf16=queries_TND.dtype == torch.bfloat16,
        )
        self._library.functions.lathe_long_attention(
            *(self._library.context, ctypes.byref(model), 0, ctypes.byref(self._batch)),
            *(queries_TND.data_ptr(), output_TND.data_ptr()),
        )
        return output_TND


def native_batch(metadata: BatchMetadata) -> native.Batch:
    """Valid as long as the metadata is."""
    tables_SB = metadata.block_tables_SB
    assert tables_SB.dtype == metadata.query_start_S1.dtype == torch.int32
    assert metadata.positions_T.dtype == metadata.slot_mapping_T.dtype == torch.int64
    assert tables_SB.is_contiguous()
    return native.Batch(
        positions_T=metadata.positions_T.data_ptr(),
        slot_mapping_T=metadata.slot_mapping_T.data_ptr(),
        block_tables_SB=tables_SB.data_ptr(),
        query_start_S1=metadata.query_start_S1.data_ptr(),
        num_rows=len(metadata.positions_T),
        num_requests=len(tables_SB),
        max_blocks=tables_SB.shape[1],
    )
