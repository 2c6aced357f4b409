"""INT8 weights, one scale for each output channel: the mildest weight quantization, without calibration.

Symmetric round-to-nearest as in `int4.py`, with codes in [-128, 127] and a single group: W ~ code * scale. Its
`dequantize` undoes this one too. On disk four codes share an int32, as compressed-tensors packs 8 bits.

Shapes: O output channels, I input channels.
"""

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from compression.quantization.int4 import QuantizedWeight

CODE_MIN, CODE_MAX = -128, 127
CODES_PER_WORD = 4


def round_to_nearest_int8(weight_OI: Tensor, *, scale_dtype: torch.dtype) -> QuantizedWeight:
    """Quantize one linear weight; codes are chosen with the scale as stored.

    Args:
        weight_OI: floating (out_features, in_features), finite.
        scale_dtype: dtype that the scales are stored in.

    Raises:
        ValueError: a weight is not finite.
    """
    weight_OI = weight_OI.float()
    if not torch.isfinite(weight_OI).all():
        raise ValueError("weight has values that are not finite")
    scale_O1 = weight_OI.abs().amax(dim=1, keepdim=True) / ((CODE_MAX - CODE_MIN) / 2)
    scale_O1 = scale_O1.to(scale_dtype)
    scale_O1[scale_O1 == 0] = 1  # a row of zeros, or too small for the dtype: codes become zero
    codes_OI = (weight_OI / scale_O1.float()).round().clamp(CODE_MIN, CODE_MAX)
    return QuantizedWeight(
        codes_OI=codes_OI.to(torch.int8), scale_OG=scale_O1, zero_point_OG=None, bits=8
    )


def pack_int8(codes_OI: Tensor) -> Tensor:
    """Pack int8 codes, each plus 128, four to an int32 along the inputs, lowest bits first: int32 (O, ceil(I / 4))."""
    unsigned_OI = codes_OI.contiguous().view(torch.uint8) ^ 128
    return F.pad(unsigned_OI, (0, -codes_OI.shape[1] % CODES_PER_WORD)).view(torch.int32)


def unpack_int8(words_OW: Tensor, num_columns: int) -> Tensor:
    """Undo `pack_int8`: int8 (O, num_columns)."""
    codes_OI = words_OW.contiguous().view(torch.uint8)[:, :num_columns] ^ 128
    return codes_OI.contiguous().view(torch.int8)


def to_tensors(quantized: QuantizedWeight) -> dict[str, Tensor]:
    """Tensors of an `Int8Linear`, by suffix, as compressed-tensors' `pack-quantized` names them."""
    return {
        "weight_packed": pack_int8(quantized.codes_OI),
        "weight_scale": quantized.scale_OG,
        "weight_shape": torch.tensor(quantized.codes_OI.shape, dtype=torch.int64),
    }


def from_tensors(tensors: dict[str, Tensor]) -> QuantizedWeight:
    """Undo `to_tensors`."""
    num_columns = int(tensors["weight_shape"][1])
    return QuantizedWeight(
        codes_OI=unpack_int8(tensors["weight_packed"], num_columns),
        scale_OG=tensors["weight_scale"],
        zero_point_OG=None,
        bits=8,
    )
