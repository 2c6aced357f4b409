"""The range that the codes of a group span: the whole of its weights', or less where that loses less.

A scale that reaches the largest weight spaces the codes widely for all the others. Of a few shares of its range each
group takes the one that loses least; weights beyond it get the outermost code. The loss is what the errors of
channels do to the output, each on its own: the diagonal of GPTQ's Hessian (Frantar et al. 2022, arXiv:2210.17323). AWQ
(Lin et al. 2023, arXiv:2306.00978) searches its clipping by the whole product instead.

Shapes: O output channels, I input channels, G groups.
"""

import torch
from torch import Tensor

from compression.quantization.int4 import QuantizedWeight, dequantize, round_to_nearest

# 15/16 puts the largest negative weight of a symmetric group exactly on code -8.
SHARES = (1.0, 15 / 16, 14 / 16, 13 / 16, 12 / 16)


def round_in_best_range(
    weight_OI: Tensor,
    importance_I: Tensor,
    group_size: int,
    *,
    symmetric: bool,
    scale_dtype: torch.dtype,
) -> QuantizedWeight:
    """`round_to_nearest` with a range of its own for each group.

    Args:
        weight_OI: floating (out_features, in_features), finite.
        importance_I: what an error of each channel costs, not negative: the diagonal of `InputStatistics.gram_II`.

    Raises:
        ValueError: in_features is no multiple of group_size, a value is not finite, or another number of importances.
    """
    num_rows, num_channels = weight_OI.shape
    weight_OI = weight_OI.float()
    best = round_to_nearest(weight_OI, group_size, symmetric=symmetric, scale_dtype=scale_dtype)
    if importance_I.shape != (num_channels,):
        raise ValueError(f"importance of {tuple(importance_I.shape)}, weights of {num_channels}")
    groups_OGI = weight_OI.reshape(num_rows, -1, group_size)
    low_OG1 = groups_OGI.amin(dim=2, keepdim=True).clamp(max=0)
    high_OG1 = groups_OGI.amax(dim=2, keepdim=True).clamp(min=0)
    if symmetric:
        high_OG1 = torch.maximum(-low_OG1, high_OG1)
        low_OG1 = -high_OG1

    def losses(quantized: QuantizedWeight) -> Tensor:
        errors_OI = (dequantize(quantized) - weight_OI).square_() * importance_I
        return errors_OI.reshape(num_rows, -1, group_size).sum(dim=2)

    loss_OG = losses(best)
    for share in SHARES[1:]:
        inside_OGI = groups_OGI.clamp(low_OG1 * share, high_OG1 * share)
        tried = round_to_nearest(
            inside_OGI.flatten(1), group_size, symmetric=symmetric, scale_dtype=scale_dtype
        )
        tried_OG = losses(tried)
        better_OG = tried_OG < loss_OG
        loss_OG = torch.where(better_OG, tried_OG, loss_OG)
        best = _merge(best, tried, better_OG)
    return best


def _merge(best: QuantizedWeight, tried: QuantizedWeight, better_OG: Tensor) -> QuantizedWeight:
    better_OI = better_OG.repeat_interleave(best.group_size, dim=1)
    zero_point_OG = best.zero_point_OG
    if zero_point_OG is not None:
        assert tried.zero_point_OG is not None
        zero_point_OG = torch.where(better_OG, tried.zero_point_OG, zero_point_OG)
    return QuantizedWeight(
        codes_OI=torch.where(better_OI, tried.codes_OI, best.codes_OI),
        scale_OG=torch.where(better_OG, tried.scale_OG, best.scale_OG),
        zero_point_OG=zero_point_OG,
    )
