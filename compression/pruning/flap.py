"""FLAP: remove the channels whose input fluctuates least and let a bias stand in for their mean
(An et al. 2023, arXiv:2312.11983).

Removing input channel j of a layer and adding W_:j * mean(x_j) to its bias leaves an error of Var(x_j) * ||W_:j||^2 in
expectation: the fluctuation metric. Here for down_proj (FFN neurons) and o_proj (attention heads).
Scores of different layers compare once each layer's have mean zero and standard deviation one.

Departures: a head's price in neurons comes from the shapes (the authors fix 512 / 3, LLaMA-7B's); a head's score is
the mean of its channels' scores, standardised as they are, while the authors square them first; grouped-query
attention is pruned in whole groups (`structured.py`).

Shapes: O output channels, I input channels, L layers, U units (neurons or heads) of a layer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def fluctuation_score(weight_OI: Tensor, variance_I: Tensor) -> Tensor:
    """Expected squared error of removing each input channel with compensation, float32 (I,).

    Args:
        variance_I: `InputStatistics.variance` of the layer's input.

    Raises:
        ValueError: another number of channels, or values that are not finite.
    """
    if variance_I.shape != weight_OI.shape[1:]:
        raise ValueError(f"variance of {variance_I.numel()}, weight {tuple(weight_OI.shape)}")
    score_I = variance_I.float() * weight_OI.float().square().sum(dim=0)
    if not torch.isfinite(score_I).all():
        raise ValueError("weight or variance has values that are not finite")
    return score_I


def bias_compensation(weight_OI: Tensor, mean_I: Tensor, keep_K: Tensor) -> Tensor:
    """What the removed input channels gave on average, float32 (O,): add it to the layer's bias.

    Args:
        weight_OI: of the layer before slicing.
        mean_I: `InputStatistics.mean_I` of its input.
        keep_K: indices of the channels that stay.
    """
    removed_I = mean_I.float().clone()
    removed_I[keep_K] = 0
    return weight_OI.float() @ removed_I


def standardise(score_U: Tensor) -> Tensor:
    """Mean zero, standard deviation one within a layer; zeros where all scores are equal."""
    centred_U = score_U.float() - score_U.float().mean()
    deviation = centred_U.square().mean().sqrt()
    return centred_U / deviation if deviation > 0 else centred_U


def select_units(
    scores: Sequence[Tensor], unit_parameters: Sequence[int], sparsity: float
) -> list[Tensor]:
    """Choose the units that stay, over all layers and kinds of unit at once, by standardised score.

    Args:
        scores: of one layer's neurons or head groups each, (U,).
        unit_parameters: weights that one unit of each entry of `scores` holds.
        sparsity: fraction of all these weights to remove, in [0, 1); approached from below.

    Returns:
        For each entry sorted indices, at least one: a layer without any unit could not be stored.

    Raises:
        ValueError: sparsity is out of range, or a score is not finite.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be in [0, 1), got {sparsity}")
    flat = torch.cat([standardise(score_U) for score_U in scores])
    if not torch.isfinite(flat).all():
        raise ValueError("scores are not finite")
    owner = [index for index, score_U in enumerate(scores) for _ in range(len(score_U))]
    unit = [index for score_U in scores for index in range(len(score_U))]
    remaining = [len(score_U) for score_U in scores]
    budget = sparsity * sum(
        len(score_U) * parameters
        for score_U, parameters in zip(scores, unit_parameters, strict=True)
    )
    keep = [torch.ones(len(score_U), dtype=torch.bool) for score_U in scores]
    for index in flat.argsort(stable=True).tolist():
        entry = owner[index]
        if unit_parameters[entry] > budget:
            break
        if remaining[entry] == 1:
            continue
        keep[entry][unit[index]] = False
        remaining[entry] -= 1
        budget -= unit_parameters[entry]
    return [keep_U.nonzero()[:, 0] for keep_U in keep]
