"""Linear layers of any kind for the native library: how weights lie in memory, and which rows go where.

Where there is AMX, every product but float32's is the native library's, however many rows it has. Elsewhere few rows
are, which read each weight once, and more than `NATIVE_ROWS` go through torch's matrix product, INT4 weights
dequantized for it one matrix at a time. Native INT4 products meet rows that are quantized to INT8 as they come,
symmetric, a scale to 32 inputs. A weight is held once: a dense one as torch has it, or as AMX wants it; an INT4 one in
the layout that `cpu/vector_product.cpp` describes.

Shapes: T rows, O output channels, I input channels, G groups, B = ceil(O / 16) blocks of outputs, J
reads of 64 bytes.
"""

import ctypes
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from compression.quantization.int4 import QuantizedWeight
from engines.kernels import native
from engines.kernels.huge_pages import in_huge_pages
from engines.kernels.native import NativeLibrary
from engines.kernels.weights import (
    LinearWeight,
    LowRankWeight,
    MatrixWeight,
    is_joinable,
    join,
    join_biases,
)

LANES = 16
GROUP_MULTIPLE = 32
TILE_INPUTS = 32
HEAD_GROUP_SIZE = 64
QUANTIZED_ROWS = 4096  # of a head, at once in float32
DTYPES = {torch.float32: native.FP32, torch.bfloat16: native.BF16}

NAMES = {
    native.FP32: "fp32",
    native.BF16: "bf16",
    native.INT4: "int4 x int8 rows",
    native.INT8: "int8 x int8 rows",
    native.BF16_TILES: "bf16 AMX",
}

ANY_NUMBER = sys.maxsize
NATIVE_ROWS = {native.FP32: 32, native.BF16: 32, native.INT4: 64, native.INT8: 64}
"""Most rows that the native product is used for without AMX, by kind; with it, of a float32 weight.

Measured on Sapphire Rapids, whose AMX units torch's product used (benchmarks/results/native_cpu_2026-11-24.md): passes
of SmolLM2-135M took equally long at 24 (one request's rows) to 48 rows (one row each) in bfloat16, and at about 100 in
INT4.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedWeight:
    """Codes plus 8 (INT4) or 128 (INT8) in blocks of 16 outputs; outputs past O are zeros.

    Attributes:
        packed_BJ64: uint8. INT4, J = I / 8: byte 4 * lane + i holds the codes of inputs 8j + i (low half) and
            8j + 4 + i. INT8, J = I / 4: that of input 4j + i.
        scale_BGL: bfloat16 or float32 (B, G, 16).
        zero_point_BGL: int8, or None when symmetric.
    """

    kind: int
    out_features: int
    in_features: int
    group_size: int
    packed_BJ64: Tensor
    scale_BGL: Tensor
    zero_point_BGL: Tensor | None


def pack_weight(quantized: QuantizedWeight) -> PackedWeight:
    """Lay codes out as they are."""
    if quantized.bits == 8:
        return _pack_int8_codes(quantized)
    codes_OI = quantized.codes_OI
    unsigned_OI = _pad((codes_OI + 8).to(torch.uint8))
    halves_BLJ24 = unsigned_OI.view(-1, LANES, codes_OI.shape[1] // 8, 2, 4)
    bytes_BLJ4 = halves_BLJ24[:, :, :, 0] | halves_BLJ24[:, :, :, 1] << 4
    return _packed(native.INT4, bytes_BLJ4, quantized)


def quantize_int8(weight_OI: Tensor, group_size: int) -> PackedWeight:
    """Round to nearest, symmetric: codes in [-127, 127], a bfloat16 scale to each group."""
    codes, scales = [], []
    for part_OI in torch.split(weight_OI, QUANTIZED_ROWS):
        groups_OGI = part_OI.float().reshape(len(part_OI), -1, group_size)
        scale_OG = (groups_OGI.abs().amax(dim=2) / 127).bfloat16()
        scale_OG[scale_OG == 0] = 1
        codes_OGI = (groups_OGI / scale_OG.float()[..., None]).round().clamp(-127, 127)
        codes.append(codes_OGI.to(torch.int8).flatten(1))
        scales.append(scale_OG)
    return _pack_int8_codes(
        QuantizedWeight(
            codes_OI=torch.cat(codes), scale_OG=torch.cat(scales), zero_point_OG=None, bits=8
        )
    )


def _pack_int8_codes(quantized: QuantizedWeight) -> PackedWeight:
    unsigned_OI = _pad(quantized.codes_OI.contiguous().view(torch.uint8) ^ 128)
    bytes_BLJ4 = unsigned_OI.view(-1, LANES, unsigned_OI.shape[1] // 4, 4)
    return _packed(native.INT8, bytes_BLJ4, quantized)


@dataclass(frozen=True, slots=True, kw_only=True)
class TileWeight:
    """A bfloat16 matrix as AMX reads it.

    Attributes:
        tiles_BPL2: pairs of inputs of 16 outputs, P = ceil(I / 32) * 16; zeros past O and I.
    """

    out_features: int
    in_features: int
    tiles_BPL2: Tensor

    def rows(self, indices_T: Tensor) -> Tensor:
        """Of the matrix, (T, I)."""
        pairs_TP2 = self.tiles_BPL2[indices_T // LANES, :, indices_T % LANES]
        return pairs_TP2.flatten(1)[:, : self.in_features]


def pack_tiles(weight_OI: Tensor) -> TileWeight:
    out_features, in_features = weight_OI.shape
    padded_OI = _pad(weight_OI, TILE_INPUTS)
    pairs_BLP2 = padded_OI.view(-1, LANES, padded_OI.shape[1] // 2, 2)
    return TileWeight(
        out_features=out_features,
        in_features=in_features,
        tiles_BPL2=in_huge_pages(pairs_BLP2.transpose(1, 2)),
    )


def _pad(values_OX: Tensor, input_multiple: int = 1) -> Tensor:
    """To whole blocks of outputs, by zeros; the tensor itself where it has them."""
    rows, columns = -len(values_OX) % LANES, -values_OX.shape[1] % input_multiple
    return F.pad(values_OX, (0, columns, 0, rows)) if rows or columns else values_OX


def _packed(kind: int, bytes_BLJ4: Tensor, quantized: QuantizedWeight) -> PackedWeight:
    scale_OG = quantized.scale_OG

    def blocks(values_OG: Tensor) -> Tensor:
        padded_OG = _pad(values_OG)
        return in_huge_pages(padded_OG.view(-1, LANES, values_OG.shape[1]).transpose(1, 2))

    if scale_OG.dtype != torch.bfloat16:
        scale_OG = scale_OG.float()
    zero_point_OG = quantized.zero_point_OG
    return PackedWeight(
        kind=kind,
        out_features=len(scale_OG),
        in_features=quantized.codes_OI.shape[1],
        group_size=quantized.group_size,
        packed_BJ64=in_huge_pages(bytes_BLJ4.transpose(1, 2)).flatten(2),
        scale_BGL=blocks(scale_OG),
        zero_point_BGL=None if zero_point_OG is None else blocks(zero_point_OG),
    )


HeldMatrix = Tensor | TileWeight | PackedWeight


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """One matrix and where it stands; see `LatheSegment`."""

    matrix: HeldMatrix
    stage: int = 0
    into_middle: bool = False
    in_offset: int = 0
    out_offset: int = 0
    bias_O: Tensor | None = None

    @property
    def out_features(self) -> int:
        matrix = self.matrix
        return len(matrix) if isinstance(matrix, Tensor) else matrix.out_features

    @property
    def in_features(self) -> int:
        matrix = self.matrix
        return matrix.shape[1] if isinstance(matrix, Tensor) else matrix.in_features

    @property
    def kind(self) -> int:
        matrix = self.matrix
        if isinstance(matrix, TileWeight):
            return native.BF16_TILES
        return DTYPES[matrix.dtype] if isinstance(matrix, Tensor) else matrix.kind

    def tensors(self) -> list[Tensor]:
        matrix = self.matrix
        held = [matrix, self.bias_O]
        if isinstance(matrix, TileWeight):
            held = [matrix.tiles_BPL2, self.bias_O]
        elif isinstance(matrix, PackedWeight):
            held = [matrix.packed_BJ64, matrix.scale_BGL, matrix.zero_point_BGL, self.bias_O]
        return [tensor for tensor in held if isinstance(tensor, Tensor)]

    def segment(self) -> native.Segment:
        matrix = self.matrix
        segment = native.Segment(
            bias=None if self.bias_O is None else self.bias_O.data_ptr(),
            kind=self.kind,
            out_features=self.out_features,
            in_features=self.in_features,
            stage=self.stage,
            into_middle=self.into_middle,
            in_offset=self.in_offset,
            out_offset=self.out_offset,
        )
        if isinstance(matrix, Tensor):
            segment.weight = matrix.data_ptr()
            return segment
        if isinstance(matrix, TileWeight):
            segment.weight = matrix.tiles_BPL2.data_ptr()
            return segment
        segment.weight = matrix.packed_BJ64.data_ptr()
        segment.scale = matrix.scale_BGL.data_ptr()
        segment.scale_is_fp32 = matrix.scale_BGL.dtype == torch.float32
        segment.group_size = matrix.group_size
        if matrix.zero_point_BGL is not None:
            segment.zero_point = matrix.zero_point_BGL.data_ptr()
        return segment


def applies(weights: Sequence[LinearWeight], dtype: torch.dtype) -> bool:
    """Whether the native library takes such a layer. In float32 nothing is approximated, so no codes there."""

    def takes(matrix: MatrixWeight) -> bool:
        if isinstance(matrix, Tensor):
            return dtype in DTYPES
        return dtype == torch.bfloat16 and matrix.group_size % GROUP_MULTIPLE == 0

    return all(takes(matrix) for weight in weights for matrix in weight.matrices)


def build_cpu_linear(
    weights: Sequence[LinearWeight], *, dtype: torch.dtype, library: NativeLibrary
) -> "CpuLinear":
    """See `linear.build_linear`. Neighbours that can be one matrix are one; so are first factors of low-rank pairs."""
    parts: list[_Part] = []
    out_offset = middle_offset = 0
    matrices = [w.weight for w in weights if not isinstance(w.weight, LowRankWeight)]
    if len(matrices) == len(weights) and is_joinable(matrices):
        joined = LinearWeight(weight=join(matrices), bias_O=join_biases(weights, torch.float32))
        weights = [joined]
    for weight in weights:
        bias_O = None if weight.bias_O is None else weight.bias_O.float()
        if isinstance(weight.weight, LowRankWeight):
            part = _Part(
                matrix=_lay_out(weight.weight.weight_u, dtype, library),
                stage=1,
                in_offset=middle_offset,
                out_offset=out_offset,
                bias_O=bias_O,
            )
            parts.append(part)
            middle_offset += part.in_features
        else:
            matrix = _lay_out(weight.weight, dtype, library)
            parts.append(_Part(matrix=matrix, out_offset=out_offset, bias_O=bias_O))
        out_offset += weight.out_features
    factors = [w.weight.weight_v for w in weights if isinstance(w.weight, LowRankWeight)]
    if factors and is_joinable(factors):
        factors = [join(factors)]
    middle_offset = 0
    for factor in factors:
        part = _Part(
            matrix=_lay_out(factor, dtype, library), into_middle=True, out_offset=middle_offset
        )
        middle_offset += part.out_features
        parts.append(part)
    return CpuLinear(parts, dtype=dtype, library=library)


def share_on_cpu(matrix: Tensor | TileWeight, library: NativeLibrary) -> "CpuLinear":
    """See `linear.share_weight`; of a `TileWeight` in bfloat16."""
    assert isinstance(matrix, TileWeight) or matrix.is_contiguous()
    dtype = matrix.dtype if isinstance(matrix, Tensor) else torch.bfloat16
    return CpuLinear([_Part(matrix=matrix)], dtype=dtype, library=library)


def quantize_on_cpu(weight_OI: Tensor, library: NativeLibrary) -> "CpuLinear":
    """In INT8; see `linear.build_tied_head`."""
    packed = quantize_int8(weight_OI, HEAD_GROUP_SIZE)
    return CpuLinear([_Part(matrix=packed)], dtype=weight_OI.dtype, library=library)


def _lay_out(matrix: MatrixWeight, dtype: torch.dtype, library: NativeLibrary) -> HeldMatrix:
    if isinstance(matrix, QuantizedWeight):
        return pack_weight(matrix)
    if library.has_amx and dtype == torch.bfloat16:
        return pack_tiles(matrix.to(dtype))
    return in_huge_pages(matrix.to(dtype))


class CpuLinear:
    """Weights that share their input, side by side in the output; see `linear.Linear`.

    Attributes:
        native_linear: the same for the native library; valid as long as this object.
        native_rows: most rows that go through it.
    """

    def __init__(
        self, parts: Sequence[_Part], *, dtype: torch.dtype, library: NativeLibrary
    ) -> None:
        self._parts = sorted(parts, key=lambda part: part.stage)
        self._dtype = dtype
        self._library = library
        self._segments = (native.Segment * len(self._parts))(
            *(part.segment() for part in self._parts)
        )
        self.native_linear = native.Linear(
            segments=self._segments,
            num_segments=len(self._parts),
            in_features=next(part.in_features for part in self._parts if part.stage == 0),
            middle_features=sum(p.out_features for p in self._parts if p.into_middle),
            out_features=sum(p.out_features for p in self._parts if not p.into_middle),
        )
        kinds = list(dict.fromkeys(part.kind for part in self._parts))
        low_rank = "low rank " if self.native_linear.middle_features else ""
        self.kernel = f"native {low_rank}{' + '.join(NAMES[kind] for kind in kinds)}"
        self.native_rows = ANY_NUMBER
        if native.FP32 in kinds or not library.has_amx:
            self.native_rows = min(NATIVE_ROWS[kind] for kind in kinds)
            self.kernel += f" up to {self.native_rows} rows, then torch {dtype}".replace(
                "torch.", ""
            )

    def __call__(self, x_TI: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or x_TI.dtype
        if len(x_TI) <= self.native_rows:
            return self.few_rows(x_TI, dtype)
        return self.many_rows(x_TI.to(self._dtype)).to(dtype)

    def tensors(self) -> list[Tensor]:
        return [tensor for part in self._parts for tensor in part.tensors()]

    def few_rows(self, x_TI: Tensor, dtype: torch.dtype) -> Tensor:
        """By the native products, in `dtype`, however many rows there are."""
        x_TI = x_TI.contiguous()
        y_TO = torch.empty(len(x_TI), self.native_linear.out_features, dtype=dtype)
        self._library.functions.lathe_linear(
            self._library.context,
            ctypes.byref(self.native_linear),
            *(x_TI.data_ptr(), x_TI.dtype == torch.bfloat16, len(x_TI)),
            *(y_TO.data_ptr(), dtype == torch.bfloat16),
        )
        return y_TO

    def many_rows(self, x_TI: Tensor) -> Tensor:
        """By torch's products, in the model's dtype."""
        middle_TR = torch.empty(len(x_TI), self.native_linear.middle_features, dtype=self._dtype)
        y_TO = torch.empty(len(x_TI), self.native_linear.out_features, dtype=self._dtype)
        for index, part in enumerate(self._parts):
            rows = x_TI
            if part.stage == 1:
                rows = middle_TR[:, part.in_offset : part.in_offset + part.in_features]
            bias_O = None if part.bias_O is None else part.bias_O.to(self._dtype)
            product = F.linear(rows, self._dense(index), bias_O)
            if len(self._parts) == 1:
                return product
            out = slice(part.out_offset, part.out_offset + part.out_features)
            (middle_TR if part.into_middle else y_TO)[:, out] = product
        return y_TO

    def _dense(self, index: int) -> Tensor:
        """The matrix as torch multiplies it; an INT4 one is computed into memory that the next may reuse."""
        matrix = self._parts[index].matrix
        if isinstance(matrix, Tensor):
            return matrix
        assert isinstance(matrix, PackedWeight)
        weight_OI = torch.empty(matrix.out_features, matrix.in_features, dtype=torch.bfloat16)
        self._library.functions.lathe_dequantize(
            self._library.context,
            ctypes.byref(self._segments[index]),
            weight_OI.data_ptr(),
        )
        return weight_OI
