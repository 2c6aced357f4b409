"""What every launch of a Triton kernel needs: tile sizes, and the dtype of matrix products.

The one module beside the kernels that imports Triton.
"""

from typing import Any

import torch
import triton
import triton.language as tl

INTERPRETED: bool = triton.knobs.runtime.interpret


def tile(size: int, at_least: int = 1) -> int:
    """The power of two that holds `size`: a tile's sides are powers of two, what lies past the edge is masked."""
    return max(at_least, 1 << (size - 1).bit_length())


def dot_dtype(dtype: torch.dtype) -> Any:
    """What operands of `tl.dot` are cast to. The interpreter's NumPy has no bfloat16 and multiplies in float32."""
    if dtype == torch.bfloat16 and not INTERPRETED:
        return tl.bfloat16
    return tl.float32


def num_warps(tile_size: int) -> int:
    """For kernels of one row to a program: eight elements to a thread."""
    return min(max(tile_size // 256, 1), 8)
