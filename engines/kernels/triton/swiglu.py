"""SwiGLU's gate, rounded once; see `engines/kernels/swiglu.py`.

Shapes: T rows, F feed-forward width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_F = 1024


@triton.jit
def _swiglu(gate_up_TF, out_TF, width, TILE_F: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE_F + tl.arange(0, TILE_F)
    is_inside = columns < width
    gate = tl.load(gate_up_TF + row * 2 * width + columns, mask=is_inside, other=0.0)
    up = tl.load(gate_up_TF + row * 2 * width + width + columns, mask=is_inside, other=0.0)
    gate = gate.to(tl.float32)
    # tl.sigmoid would overflow in exp(-gate), harmlessly but not silently; this form cannot.
    decay = tl.exp(-tl.abs(gate))
    sigmoid = tl.where(gate >= 0, 1.0, decay) / (1.0 + decay)
    product = gate * sigmoid * up.to(tl.float32)
    tl.store(out_TF + row * width + columns, product.to(out_TF.dtype.element_ty), mask=is_inside)


def swiglu(gate_up_TF: Tensor) -> Tensor:
    num_rows, width = len(gate_up_TF), gate_up_TF.shape[1] // 2
    gate_up_TF = gate_up_TF.contiguous()
    out_TF = torch.empty(num_rows, width, dtype=gate_up_TF.dtype, device=gate_up_TF.device)
    _swiglu[(num_rows, triton.cdiv(width, TILE_F))](gate_up_TF, out_TF, width, TILE_F=TILE_F)
    return out_TF
