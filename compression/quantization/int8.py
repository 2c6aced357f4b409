"""INT8 weights, one scale for each output channel: the mildest weight quantization, without calibration.

Symmetric round-to-nearest as in `int4.py`, with codes in [-128, 127] and a single group: W ~ code * scale. Its
`dequantize` undoes this one too.

Shapes: O output channels, I input channels.
"""

import torch
from torch import Tensor

from compression.quantization.int4 import QuantizedWeight

CODE_MIN, CODE_MAX = -128, 127


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
    return QuantizedWeight(codes_OI=codes_OI.to(torch.int8), scale_OG=scale_O1, zero_point_OG=None)
