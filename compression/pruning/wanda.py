"""Wanda: prune by |weight| times the norm of its input channel (Sun et al. 2023, arXiv:2306.11695).

Weights compete within their output row and are not updated. Departure: of equal scores the first goes, see `masks.py`.

Shapes: O output channels, I input channels.
"""

import torch
from torch import Tensor

from compression.pruning.masks import Sparsity, check_weight, keep_mask


def wanda_keep_mask(weight_OI: Tensor, input_norm_I: Tensor, sparsity: Sparsity) -> Tensor:
    """Choose which weights of one linear layer survive.

    Args:
        weight_OI: any floating dtype.
        input_norm_I: L2 norm of each input channel over the calibration rows, `InputStatistics.norm`.

    Returns:
        bool (O, I), True survives.

    Raises:
        ValueError: sparsity is out of range, the pattern does not fit, or a value is not finite.
    """
    check_weight(weight_OI)
    if input_norm_I.shape != weight_OI.shape[1:] or not torch.isfinite(input_norm_I).all():
        raise ValueError(f"input_norm must hold {weight_OI.shape[1]} finite values")
    return keep_mask(weight_OI.float().abs() * input_norm_I.float(), sparsity, scope="row")
