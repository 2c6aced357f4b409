"""GPTQ: quantize column by column while the rest of the row absorbs the error (Frantar et al. 2022, arXiv:2210.17323).

The codes and scales are those of `int4.py`; only the choice of codes differs from round-to-nearest.
A group's scale is taken from its weights as they are when the group is reached. With `act_order` the columns of largest
second moment come first, as the authors' code does it; scales are then taken from the original weights
("static groups"), so that the groups stay contiguous and the stored layout knows nothing of the order.

Departure: a dead input keeps its weights, rounded to nearest; the authors zero them.

Shapes: O output channels, I input channels, G groups, B the input channels of one block.
"""

import torch
from torch import Tensor

from compression.inverse_hessian import BLOCK_SIZE, DAMPENING, fix_columns, inverse_factor
from compression.quantization.int4 import (
    CODE_MAX,
    CODE_MIN,
    QuantizedWeight,
    round_to_nearest,
)


def gptq(
    weight_OI: Tensor,
    gram_II: Tensor,
    group_size: int,
    *,
    symmetric: bool,
    scale_dtype: torch.dtype,
    act_order: bool = True,
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
    nearest = round_to_nearest(weight_OI, group_size, symmetric=symmetric, scale_dtype=scale_dtype)
    num_rows, num_channels = weight_OI.shape
    if gram_II.shape[0] != num_channels:
        raise ValueError(f"gram is of {gram_II.shape[0]} channels, the weight has {num_channels}")
    scale_GO = nearest.scale_OG.T.contiguous()
    zero_GO = torch.zeros_like(scale_GO, dtype=torch.int8)
    if nearest.zero_point_OG is not None:
        zero_GO = nearest.zero_point_OG.T.contiguous()
    codes_IO = torch.empty(num_channels, num_rows, dtype=torch.int8, device=weight_OI.device)
    order_I = torch.arange(num_channels, device=weight_OI.device)
    if act_order:
        order_I = gram_II.diagonal().argsort(descending=True, stable=True)
    order = order_I.tolist()

    def choose(j: int, current_BO: Tensor) -> Tensor:
        channel = order[j]
        group = channel // group_size
        if not act_order and j % group_size == 0:
            first = round_to_nearest(
                current_BO[:group_size].T, group_size, symmetric=symmetric, scale_dtype=scale_dtype
            )
            scale_GO[group] = first.scale_OG[:, 0]
            if first.zero_point_OG is not None:
                zero_GO[group] = first.zero_point_OG[:, 0]
        scale_O, zero_O = scale_GO[group].float(), zero_GO[group].float()
        code_O = (current_BO[0] * (1 / scale_O) + zero_O).round_().clamp_(CODE_MIN, CODE_MAX)
        codes_IO[channel] = code_O.to(torch.int8)
        return (code_O - zero_O) * scale_O

    factor_II = inverse_factor(gram_II[order_I][:, order_I], dampening=dampening)
    block_size = max(BLOCK_SIZE // group_size, 1) * group_size
    fix_columns(weight_OI[:, order_I], factor_II, choose, block_size=block_size)
    return QuantizedWeight(
        codes_OI=codes_IO.T.contiguous(),
        scale_OG=scale_GO.T.contiguous(),
        zero_point_OG=None if symmetric else zero_GO.T.contiguous(),
    )
