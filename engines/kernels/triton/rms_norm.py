"""RMSNorm, alone and fused with the residual add before it, one row to a program; see `engines/kernels/rms_norm.py`.

Shapes: T rows, H normalised width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engines.kernels.triton.launch import num_warps, tile


@triton.jit
def _rms_norm(
    x_TH,
    residual_TH,
    weight_H,
    normed_TH,
    sum_TH,
    width,
    epsilon,
    ADDS: tl.constexpr,
    TILE_H: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * width
    columns = tl.arange(0, TILE_H)
    is_inside = columns < width
    x = tl.load(x_TH + row + columns, mask=is_inside, other=0.0).to(tl.float32)
    if ADDS:
        x += tl.load(residual_TH + row + columns, mask=is_inside, other=0.0).to(tl.float32)
        # The sum is normed as it is stored.
        rounded = x.to(sum_TH.dtype.element_ty)
        tl.store(sum_TH + row + columns, rounded, mask=is_inside)
        x = rounded.to(tl.float32)
    weight = tl.load(weight_H + columns, mask=is_inside, other=0.0).to(tl.float32)
    normed = x * tl.rsqrt(tl.sum(x * x, axis=0) / width + epsilon) * weight
    tl.store(normed_TH + row + columns, normed.to(normed_TH.dtype.element_ty), mask=is_inside)


def _launch(
    x_TH: Tensor, residual_TH: Tensor | None, weight_H: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    num_rows, width = x_TH.shape
    x_TH = x_TH.contiguous()
    adds = residual_TH is not None
    residual_TH = x_TH if residual_TH is None else residual_TH.contiguous()
    normed_TH = torch.empty_like(x_TH)
    sum_TH = torch.empty_like(x_TH) if adds else x_TH
    tile_h = tile(width)
    _rms_norm[(num_rows,)](
        *(x_TH, residual_TH, weight_H, normed_TH, sum_TH, width, epsilon),
        ADDS=adds,
        TILE_H=tile_h,
        num_warps=num_warps(tile_h),
    )
    return normed_TH, sum_TH


def rms_norm(x_TH: Tensor, weight_H: Tensor, epsilon: float) -> Tensor:
    return _launch(x_TH, None, weight_H, epsilon)[0]


def add_rms_norm(
    x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    return _launch(x_TH, residual_TH, weight_H, epsilon)
