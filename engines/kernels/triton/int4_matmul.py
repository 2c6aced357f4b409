"""INT4 products of few rows: codes are read packed and widened in registers (W4A16); see `linear.py`.

A program multiplies a tile of rows with a tile of outputs, group by group: codes less their zero point are small
integers, exact in bfloat16, and the group's scale meets the float32 product. So a weight is rounded nowhere. Where few
outputs would leave most of the GPU idle, the groups are shared out among programs, whose sums a second launch adds;
how many is decided by the weight's shape alone, so that a row's result does not depend on the batch.

Many rows are another matter, bound by arithmetic: then the weight is dequantized, once per call, for torch's product.

Shapes: T rows, O output channels, I input channels, G groups, J = I / 2, P parts of the groups.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from compression.quantization.int4 import CODE_MIN, QuantizedWeight
from engines.kernels.triton.launch import dot_dtype, tile
from engines.kernels.triton.support import INT4_GROUP_SIZES

MAX_ROWS = 64
"""Most rows that the packed product is used for; the crossover is not measured yet."""
TILE_O = 64
MIN_DOT = 16
NUM_PROGRAMS = 256
"""What the groups are shared out for: about two programs to each multiprocessor of a large GPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedInt4:
    """Codes plus 8, two to a byte, outputs side by side.

    Attributes:
        packed_JO: uint8; of a group of g inputs, byte j holds input j (low half) and j + g / 2.
        scale_GO: as stored.
        zero_point_GO: int8, or None when symmetric.
    """

    group_size: int
    packed_JO: Tensor
    scale_GO: Tensor
    zero_point_GO: Tensor | None

    def tensors(self) -> list[Tensor]:
        held = (self.packed_JO, self.scale_GO, self.zero_point_GO)
        return [tensor for tensor in held if tensor is not None]


def pack_int4(quantized: QuantizedWeight, device: torch.device) -> PackedInt4:
    """Raises: ValueError: a group size that the kernel does not take."""
    group_size = quantized.group_size
    if group_size not in INT4_GROUP_SIZES:
        raise ValueError(f"group_size {group_size}, taken are {INT4_GROUP_SIZES}")
    num_outputs = len(quantized.codes_OI)
    unsigned_OI = (quantized.codes_OI.to(device) - CODE_MIN).to(torch.uint8)
    halves_OG2J = unsigned_OI.view(num_outputs, -1, 2, group_size // 2)
    packed_OJ = (halves_OG2J[:, :, 0] | halves_OG2J[:, :, 1] << 4).flatten(1)
    zero_point_OG = quantized.zero_point_OG
    return PackedInt4(
        group_size=group_size,
        packed_JO=packed_OJ.T.contiguous(),
        scale_GO=quantized.scale_OG.to(device).T.contiguous(),
        zero_point_GO=None if zero_point_OG is None else zero_point_OG.to(device).T.contiguous(),
    )


@triton.jit
def _codes(packed_JO, shift_O, rows, outputs, is_output, out_features):
    """Both halves of a group's codes less their zero points, float32, exact."""
    packed = tl.load(
        packed_JO + rows.to(tl.int64)[:, None] * out_features + outputs[None, :],
        mask=is_output[None, :],
        other=0,
    )
    low = (packed & 15).to(tl.float32) - shift_O[None, :]
    high = (packed >> 4).to(tl.float32) - shift_O[None, :]
    return low, high


@triton.jit(do_not_specialize=["num_rows"])
def _multiply(
    x_TI,
    packed_JO,
    scale_GO,
    zero_point_GO,
    bias_O,
    out_PTO,
    num_rows,
    in_features,
    out_features,
    groups_per_part,
    HALF: tl.constexpr,
    HAS_ZERO_POINT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TILE_T: tl.constexpr,
    TILE_O: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):
    outputs = tl.program_id(0) * TILE_O + tl.arange(0, TILE_O)
    part = tl.program_id(1)
    rows = tl.program_id(2) * TILE_T + tl.arange(0, TILE_T)
    is_output = outputs < out_features
    is_row = rows < num_rows
    halves = tl.arange(0, HALF)
    inputs = x_TI + rows.to(tl.int64)[:, None] * in_features + halves[None, :]
    num_groups = in_features // (2 * HALF)
    total = tl.zeros([TILE_T, TILE_O], tl.float32)
    begin = part * groups_per_part
    for group in range(begin, tl.minimum(begin + groups_per_part, num_groups)):
        offsets = group * out_features + outputs
        shift = tl.full([TILE_O], 8.0, tl.float32)
        if HAS_ZERO_POINT:
            shift += tl.load(zero_point_GO + offsets, mask=is_output, other=0).to(tl.float32)
        low, high = _codes(
            packed_JO, shift, group * HALF + halves, outputs, is_output, out_features
        )
        x_low = tl.load(inputs + group * 2 * HALF, mask=is_row[:, None], other=0.0)
        x_high = tl.load(inputs + group * 2 * HALF + HALF, mask=is_row[:, None], other=0.0)
        product = tl.dot(x_low.to(DOT_DTYPE), low.to(DOT_DTYPE), input_precision="ieee")
        product = tl.dot(
            x_high.to(DOT_DTYPE), high.to(DOT_DTYPE), acc=product, input_precision="ieee"
        )
        scale = tl.load(scale_GO + offsets, mask=is_output, other=0.0).to(tl.float32)
        total += product * scale[None, :]
    if HAS_BIAS:
        total += tl.load(bias_O + outputs, mask=is_output, other=0.0).to(tl.float32)[None, :]
    place = (part * num_rows + rows).to(tl.int64)[:, None] * out_features + outputs[None, :]
    tl.store(
        out_PTO + place,
        total.to(out_PTO.dtype.element_ty),
        mask=is_row[:, None] & is_output[None, :],
    )


@triton.jit(do_not_specialize=["num_rows"])
def _add_parts(
    parts_PTO,
    bias_O,
    out_TO,
    num_rows,
    out_features,
    num_parts,
    HAS_BIAS: tl.constexpr,
    TILE_O: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    outputs = tl.program_id(1) * TILE_O + tl.arange(0, TILE_O)
    is_output = outputs < out_features
    total = tl.zeros([TILE_O], tl.float32)
    for part in range(0, num_parts):
        place = (part * num_rows + row) * out_features + outputs
        total += tl.load(parts_PTO + place, mask=is_output, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_O + outputs, mask=is_output, other=0.0).to(tl.float32)
    tl.store(
        out_TO + row * out_features + outputs, total.to(out_TO.dtype.element_ty), mask=is_output
    )


@triton.jit
def _dequantize(
    packed_JO,
    scale_GO,
    zero_point_GO,
    weight_IO,
    out_features,
    HALF: tl.constexpr,
    HAS_ZERO_POINT: tl.constexpr,
    TILE_O: tl.constexpr,
):
    outputs = tl.program_id(0) * TILE_O + tl.arange(0, TILE_O)
    group = tl.program_id(1)
    is_output = outputs < out_features
    halves = tl.arange(0, HALF)
    offsets = group * out_features + outputs
    shift = tl.full([TILE_O], 8.0, tl.float32)
    if HAS_ZERO_POINT:
        shift += tl.load(zero_point_GO + offsets, mask=is_output, other=0).to(tl.float32)
    low, high = _codes(packed_JO, shift, group * HALF + halves, outputs, is_output, out_features)
    scale = tl.load(scale_GO + offsets, mask=is_output, other=0.0).to(tl.float32)
    place = (group * 2 * HALF + halves).to(tl.int64)[:, None] * out_features + outputs[None, :]
    dtype = weight_IO.dtype.element_ty
    tl.store(weight_IO + place, (low * scale[None, :]).to(dtype), mask=is_output[None, :])
    place += HALF * out_features
    tl.store(weight_IO + place, (high * scale[None, :]).to(dtype), mask=is_output[None, :])


def int4_matmul(
    x_TI: Tensor, weight: PackedInt4, bias_O: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """x W^T + b, of the given dtype, for any number of rows; meant for few."""
    x_TI = x_TI.contiguous()
    num_rows, in_features = x_TI.shape
    num_groups, out_features = weight.scale_GO.shape
    out_TO = torch.empty(num_rows, out_features, dtype=dtype, device=x_TI.device)
    num_tiles = triton.cdiv(out_features, TILE_O)
    groups_per_part = triton.cdiv(num_groups, max(NUM_PROGRAMS // num_tiles, 1))
    num_parts = triton.cdiv(num_groups, groups_per_part)
    parts_PTO = out_TO
    if num_parts > 1:
        shape = (num_parts, num_rows, out_features)
        parts_PTO = torch.empty(shape, dtype=torch.float32, device=x_TI.device)
    # Widened codes pass through shared memory; in float32 there is no room for more rows beside them.
    tile_t = min(tile(num_rows, MIN_DOT), 64 if x_TI.dtype == torch.bfloat16 else MIN_DOT)
    zero_point_GO = weight.zero_point_GO
    _multiply[(num_tiles, num_parts, triton.cdiv(num_rows, tile_t))](
        *(x_TI, weight.packed_JO, weight.scale_GO),
        weight.packed_JO if zero_point_GO is None else zero_point_GO,
        out_TO if bias_O is None else bias_O,
        *(parts_PTO, num_rows, in_features, out_features, groups_per_part),
        HALF=weight.group_size // 2,
        HAS_ZERO_POINT=zero_point_GO is not None,
        HAS_BIAS=bias_O is not None and num_parts == 1,
        TILE_T=tile_t,
        TILE_O=TILE_O,
        DOT_DTYPE=dot_dtype(x_TI.dtype),
        num_warps=4,
        num_stages=3,
    )
    if num_parts > 1:
        _add_parts[(num_rows, triton.cdiv(out_features, 256))](
            *(parts_PTO, out_TO if bias_O is None else bias_O, out_TO),
            *(num_rows, out_features, num_parts),
            HAS_BIAS=bias_O is not None,
            TILE_O=256,
            num_warps=2,
        )
    return out_TO


def dequantize(weight: PackedInt4, dtype: torch.dtype) -> Tensor:
    """The weight (I, O), as `x @ weight` takes it."""
    num_groups, out_features = weight.scale_GO.shape
    weight_IO = torch.empty(
        num_groups * weight.group_size, out_features, dtype=dtype, device=weight.packed_JO.device
    )
    zero_point_GO = weight.zero_point_GO
    _dequantize[(triton.cdiv(out_features, TILE_O), num_groups)](
        *(weight.packed_JO, weight.scale_GO),
        weight.packed_JO if zero_point_GO is None else zero_point_GO,
        *(weight_IO, out_features),
        HALF=weight.group_size // 2,
        HAS_ZERO_POINT=zero_point_GO is not None,
        TILE_O=TILE_O,
        num_warps=4,
    )
    return weight_IO


class TritonInt4Linear:
    """See `linear.Linear`."""

    kernel = f"triton int4 up to {MAX_ROWS} rows, then dequantize and torch"

    def __init__(
        self, quantized: QuantizedWeight, bias_O: Tensor | None, *, device: torch.device
    ) -> None:
        self._weight = pack_int4(quantized, device)
        self._bias_O = bias_O

    def __call__(self, x_TI: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or x_TI.dtype
        if len(x_TI) <= MAX_ROWS:
            return int4_matmul(x_TI, self._weight, self._bias_O, dtype)
        weight_IO = dequantize(self._weight, x_TI.dtype)
        if self._bias_O is None:
            return (x_TI @ weight_IO).to(dtype)
        return torch.addmm(self._bias_O.to(x_TI.dtype), x_TI, weight_IO).to(dtype)

    def tensors(self) -> list[Tensor]:
        bias = [] if self._bias_O is None else [self._bias_O]
        return [*self._weight.tensors(), *bias]
