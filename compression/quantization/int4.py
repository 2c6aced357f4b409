"""INT4 round-to-nearest in groups, and its bits on disk.

The simplest weight quantizer (the "RTN" baseline of GPTQ, Frantar et al. 2022, arXiv:2210.17323): every group of
`group_size` input channels of a row has a scale s and, asymmetric, a zero point z; W ~ (code - z) * s.
The range of a group always includes zero, so that a zero weight stays zero. Codes are chosen with the scale as stored
(rounded to the checkpoint's dtype), not with the exact one.

Shapes: O output channels, I input channels, G = I / group_size groups.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

CODE_MIN, CODE_MAX = -8, 7
CODES_PER_WORD = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedWeight:
    """Attributes:
    codes_OI: int8 in [-8, 7], or in [-128, 127] where `bits` is 8.
    scale_OG: in the dtype that is stored.
    zero_point_OG: int8 in [-8, 7]; None when symmetric.
    """

    codes_OI: Tensor
    scale_OG: Tensor
    zero_point_OG: Tensor | None
    bits: Literal[4, 8] = 4

    @property
    def group_size(self) -> int:
        return self.codes_OI.shape[1] // self.scale_OG.shape[1]


def round_to_nearest(
    weight_OI: Tensor, group_size: int, *, symmetric: bool, scale_dtype: torch.dtype
) -> QuantizedWeight:
    """Quantize one linear weight.

    Args:
        weight_OI: floating (out_features, in_features), finite.
        scale_dtype: dtype that the scales are stored in.

    Raises:
        ValueError: in_features is no multiple of group_size, or a weight is not finite.
    """
    num_rows, num_columns = weight_OI.shape
    if num_columns % group_size:
        raise ValueError(f"in_features {num_columns} is no multiple of group_size {group_size}")
    groups_OGI = weight_OI.float().reshape(num_rows, -1, group_size)
    if not torch.isfinite(groups_OGI).all():
        raise ValueError("weight has values that are not finite")
    low_OG = groups_OGI.amin(dim=2).clamp(max=0)
    high_OG = groups_OGI.amax(dim=2).clamp(min=0)
    if symmetric:
        scale_OG = torch.maximum(-low_OG, high_OG) / ((CODE_MAX - CODE_MIN) / 2)
    else:
        scale_OG = (high_OG - low_OG) / (CODE_MAX - CODE_MIN)
    scale_OG = scale_OG.to(scale_dtype)
    scale_OG[scale_OG == 0] = 1  # a group of zeros, or too small for the dtype: codes become zero
    inverse_OG = 1 / scale_OG.float()
    zero_point_OG = None
    shifted_OGI = groups_OGI * inverse_OG[..., None]
    if not symmetric:
        zero_OG = (CODE_MIN - low_OG * inverse_OG).round().clamp(CODE_MIN, CODE_MAX)
        shifted_OGI = shifted_OGI + zero_OG[..., None]
        zero_point_OG = zero_OG.to(torch.int8)
    codes_OGI = shifted_OGI.round().clamp(CODE_MIN, CODE_MAX).to(torch.int8)
    return QuantizedWeight(
        codes_OI=codes_OGI.reshape(num_rows, num_columns),
        scale_OG=scale_OG,
        zero_point_OG=zero_point_OG,
    )


def dequantize(quantized: QuantizedWeight) -> Tensor:
    """The weight that the codes stand for, float32 (O, I)."""
    num_rows, num_groups = quantized.scale_OG.shape
    codes_OGI = quantized.codes_OI.float().reshape(num_rows, num_groups, -1)
    if quantized.zero_point_OG is not None:
        codes_OGI = codes_OGI - quantized.zero_point_OG.float()[..., None]
    return (codes_OGI * quantized.scale_OG.float()[..., None]).reshape(num_rows, -1)


def pack_int4(codes_RC: Tensor) -> Tensor:
    """Pack int8 codes in [-8, 7], eight to an int32 along the last dimension, lowest bits first.

    Returns:
        int32 (R, ceil(C / 8)); bits past C are zero, as compressed-tensors leaves them.
    """
    num_rows, num_columns = codes_RC.shape
    padding = -num_columns % CODES_PER_WORD
    unsigned_RC = F.pad(codes_RC.to(torch.int64) - CODE_MIN, (0, padding))
    shifts = torch.arange(CODES_PER_WORD) * 4
    words_RW = (unsigned_RC.reshape(num_rows, -1, CODES_PER_WORD) << shifts).sum(dim=2)
    return torch.where(words_RW >= 2**31, words_RW - 2**32, words_RW).to(torch.int32)


def unpack_int4(words_RW: Tensor, num_columns: int) -> Tensor:
    """Undo `pack_int4`: int8 (R, num_columns)."""
    shifts = torch.arange(CODES_PER_WORD, dtype=torch.int32, device=words_RW.device) * 4
    unsigned = (words_RW[..., None] >> shifts) & 15
    return (unsigned.flatten(1)[:, :num_columns] + CODE_MIN).to(torch.int8)


def to_tensors(quantized: QuantizedWeight) -> dict[str, Tensor]:
    """Tensors of an `Int4Linear`, by suffix, as compressed-tensors' `pack-quantized` names them."""
    tensors = {
        "weight_packed": pack_int4(quantized.codes_OI),
        "weight_scale": quantized.scale_OG,
        "weight_shape": torch.tensor(quantized.codes_OI.shape, dtype=torch.int64),
    }
    if quantized.zero_point_OG is not None:
        packed_GO = pack_int4(quantized.zero_point_OG.T)
        tensors["weight_zero_point"] = packed_GO.T.contiguous()
    return tensors


def from_tensors(tensors: dict[str, Tensor]) -> QuantizedWeight:
    """Undo `to_tensors`."""
    num_rows, num_columns = tensors["weight_shape"].tolist()
    packed_zero_point = tensors.get("weight_zero_point")
    zero_point_OG = None
    if packed_zero_point is not None:
        zero_point_OG = unpack_int4(packed_zero_point.T.contiguous(), num_rows).T.contiguous()
    return QuantizedWeight(
        codes_OI=unpack_int4(tensors["weight_packed"], num_columns),
        scale_OG=tensors["weight_scale"],
        zero_point_OG=zero_point_OG,
    )


def quantization_config(
    *, bits: Literal[4, 8], group_size: int | None, symmetric: bool, ignore: list[str]
) -> dict[str, object]:
    """`quantization_config` of config.json, as compressed-tensors and vLLM read it.

    Args:
        group_size: None for one scale per output channel.
        ignore: names of the linear layers that stayed dense.
    """
    weights: dict[str, object] = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if group_size is None else "group",
        "group_size": group_size,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
        "observer_kwargs": {},
        "block_structure": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": None,
                "output_activations": None,
            }
        },
        "ignore": ignore,
        "kv_cache_scheme": None,
    }
