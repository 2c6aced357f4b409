"""Magnitude pruning: the smallest weights go (Han et al. 2015, arXiv:1506.02626). The baseline that needs no data.

Weights compete within a row, a matrix (what papers on language models call "magnitude"), or several matrices.

Shapes: O output channels, I input channels.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from compression.pruning.masks import Scope, Sparsity, check_sparsity, check_weight, keep_mask

_DIGIT = 1 << 16


def magnitude_keep_mask(
    weight_OI: Tensor, sparsity: Sparsity, *, scope: Scope = "matrix"
) -> Tensor:
    """Choose which weights of one linear layer survive.

    Args:
        weight_OI: any floating dtype.

    Returns:
        bool (O, I), True survives.

    Raises:
        ValueError: sparsity is out of range, the pattern does not fit, or a weight is not finite.
    """
    check_weight(weight_OI)
    return keep_mask(weight_OI.float().abs(), sparsity, scope=scope)


def global_keep_masks(weights: Sequence[Tensor], sparsity: float) -> Iterator[Tensor]:
    """Compare the weights of several matrices with one threshold. Yields their masks, in order.

    Reads every matrix three times and holds one at a time, so a sequence may load them when indexed. The threshold is
    exact: floats that are not negative sort as their bits do, so counting the upper, then the lower 16 bits finds it.

    Raises:
        ValueError: sparsity is out of range, or a weight is not finite.
    """
    check_sparsity(sparsity, 1)
    upper_counts = torch.zeros(_DIGIT, dtype=torch.int64)
    for weight_OI in weights:
        check_weight(weight_OI)
        upper_counts += torch.bincount(_magnitude_bits(weight_OI) >> 16, minlength=_DIGIT).cpu()
    remaining = round(sparsity * int(upper_counts.sum()))
    if not remaining:
        yield from (torch.ones_like(weight_OI, dtype=torch.bool) for weight_OI in weights)
        return
    upper, remaining = _find_digit(upper_counts, remaining)
    lower_counts = torch.zeros(_DIGIT, dtype=torch.int64)
    for weight_OI in weights:
        bits = _magnitude_bits(weight_OI)
        digits = bits[bits >> 16 == upper] & (_DIGIT - 1)
        lower_counts += torch.bincount(digits, minlength=_DIGIT).cpu()
    lower, remaining = _find_digit(lower_counts, remaining)
    threshold = upper * _DIGIT + lower
    for (
        weight_OI
    ) in weights:  # `remaining` weights at the threshold itself still go, the first ones
        bits = _magnitude_bits(weight_OI)
        ties = (bits == threshold).nonzero()[:remaining, 0]
        remaining -= ties.numel()
        keep = bits >= threshold
        keep[ties] = False
        yield keep.reshape(weight_OI.shape)


def _magnitude_bits(weight_OI: Tensor) -> Tensor:
    return weight_OI.float().abs().view(torch.int32).flatten()


def _find_digit(counts: Tensor, rank: int) -> tuple[int, int]:
    """The digit of the rank-th smallest (from 1), and its rank among those that share the digit."""
    cumulative = counts.cumsum(0)
    digit = int(torch.searchsorted(cumulative, rank))
    return digit, rank - int(cumulative[digit] - counts[digit])
