"""OWL: blocks with more outliers keep more (Outlier Weighed Layerwise sparsity, Yin et al. 2023, arXiv:2310.05175).

An outlier is a weight whose Wanda score, |weight| times input norm, exceeds `OUTLIER` times the mean score of its
block. Shares of outliers, min-max normalised, spread the blocks' densities over 2 * `SPREAD` around the target.

Departures: the mean over blocks is weighed by their weights, so that the target holds for blocks of unequal shape too;
where the range would leave [0, 1] it is narrowed.

Shapes: O output channels, I input channels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

OUTLIER = 5.0
SPREAD = 0.08
MIN_DENSITY = 0.01


def outlier_share(weights: Sequence[Tensor], input_norms: Sequence[Tensor]) -> float:
    """Share of outliers among all weights (O, I) of a block.

    Args:
        input_norms: L2 norm of every input channel, one (I,) for each weight.

    Raises:
        ValueError: a value is not finite.
    """
    score = torch.cat(
        [
            (weight_OI.float().abs() * norm_I.float()).flatten()
            for weight_OI, norm_I in zip(weights, input_norms, strict=True)
        ]
    )
    mean = score.mean(dtype=torch.float64)
    if not torch.isfinite(mean):
        raise ValueError("weight or input norm has values that are not finite")
    return float((score > OUTLIER * mean).double().mean())


def block_sparsities(
    outlier_shares: Sequence[float], num_weights: Sequence[int], sparsity: float
) -> list[float]:
    """The sparsity of each block; their mean, weighed by `num_weights`, is the target.

    Raises:
        ValueError: sparsity is out of (0, 1).
    """
    if not 0 < sparsity < 1:
        raise ValueError(f"sparsity must be in (0, 1), got {sparsity}")
    low, high = min(outlier_shares), max(outlier_shares)
    if high == low:
        return [sparsity] * len(outlier_shares)
    raised = [(share - low) / (high - low) * 2 * SPREAD for share in outlier_shares]
    weighed = zip(raised, num_weights, strict=True)
    mean = sum(value * count for value, count in weighed) / sum(num_weights)
    offsets = [value - mean for value in raised]
    room = min(
        sparsity / max(offsets),
        max(1 - sparsity - MIN_DENSITY, 0) / -min(offsets),
        1,
    )
    return [sparsity - offset * room for offset in offsets]


def block_patterns(sparsities: Sequence[float], n: int, m: int) -> list[int]:
    """How many of every m inputs stay in each block: N:M as near to `sparsities` as a mean of n allows, at least 1.

    Largest remainders first (Hamilton's method of apportionment).
    """
    exact = [m * (1 - sparsity) for sparsity in sparsities]
    found = [max(int(value), 1) for value in exact]
    order = sorted(range(len(exact)), key=lambda block: (found[block] - exact[block], block))
    for block in order[: max(n * len(exact) - sum(found), 0)]:
        found[block] += 1
    return found
