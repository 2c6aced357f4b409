"""GPTQ: quantize column by column while the rest of the row absorbs the error (Frantar et al. 2022, arXiv:2210.17323).

Columns of the largest second moment come first ("act-order" in the authors' code), so that their errors meet the most
columns that can absorb them. The scales of all groups are taken from the original weights before the first column
("static groups"): groups stay contiguous, and the stored layout knows nothing of the order.

Departures: ranges are searched (`ranges.py`). A dead input keeps its weights, rounded to nearest; the authors zero
them. The dampening is 0.1 where the authors have 0.01: on 4,096 and 8,192 calibration tokens the smaller one fits
those and loses more on others; in perplexity the two are a draw (`docs/log.md`).

Shapes: O output channels, I input channels, G groups, B the input channels of one block.
"""

from dataclasses import replace

import torch
from torch import Tensor

from compression.inverse_hessian import fix_columns, inverse_factor
from compression.quantization.int4 import CODE_MAX, CODE_MIN, QuantizedWeight
from compression.quantization.ranges import round_in_best_range

DAMPENING = 0.1


def gptq(
    weight_OI: Tensor,
    gram_II: Tensor,
    group_size: int,
    *,
    symmetric: bool,
    scale_dtype: torch.dtype,
    dampening: float = DAMPENING,
) -> QuantizedWeight:
    """Quantize one linear weight.

    Args:
        weight_OI: floating (out_features, in_features), finite.
        gram_II: sum of x^T x over the calibration rows, `InputStatistics.gram_II`.
        scale_dtype: dtype that the scales are stored in.
        dampening: added to the Hessian's diagonal, as a fraction of its mean.

    Raises:
        ValueError: in_features is no multiple of group_size, or a value is not finite.
    """
    num_rows, num_channels = weight_OI.shape
    if gram_II.shape[0] != num_channels:
        raise ValueError(f"gram is of {gram_II.shape[0]} channels, the weight has {num_channels}")
    static = round_in_best_range(
        weight_OI, gram_II.diagonal(), group_size, symmetric=symmetric, scale_dtype=scale_dtype
    )
    scale_GO = static.scale_OG.T.float().contiguous()
    zero_GO = torch.zeros_like(scale_GO)
    if static.zero_point_OG is not None:
        zero_GO = static.zero_point_OG.T.float().contiguous()
    inverse_GO = 1 / scale_GO
    codes_IO = torch.empty(num_channels, num_rows, dtype=torch.int8, device=weight_OI.device)
    order_I = gram_II.diagonal().argsort(descending=True, stable=True)
    order = order_I.tolist()

    def choose(j: int, current_BO: Tensor) -> Tensor:
        channel = order[j]
        group = channel // group_size
        code_O = current_BO[0] * inverse_GO[group] + zero_GO[group]
        code_O = code_O.round_().clamp_(CODE_MIN, CODE_MAX)
        codes_IO[channel] = code_O.to(torch.int8)
        return (code_O - zero_GO[group]) * scale_GO[group]

    factor_II = inverse_factor(gram_II[order_I][:, order_I], dampening=dampening)
    fix_columns(weight_OI[:, order_I], factor_II, choose)
    return replace(static, codes_OI=codes_IO.T.contiguous())
