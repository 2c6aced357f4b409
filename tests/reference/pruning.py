"""Pruning as one would write it on a blackboard: Python loops over single weights, float32 or float64."""

import itertools

import torch
from torch import Tensor


def drop_lowest(scores: list[float], count: int) -> set[int]:
    """Indices of the `count` lowest scores; of equal ones the first."""
    return set(sorted(range(len(scores)), key=lambda i: (scores[i], i))[:count])


def keep_mask(score_OI: Tensor, sparsity: float) -> Tensor:
    """Row by row."""
    keep = torch.ones(score_OI.shape, dtype=torch.bool)
    for row, scores in enumerate(score_OI.tolist()):
        for column in drop_lowest(scores, round(sparsity * len(scores))):
            keep[row, column] = False
    return keep


def keep_mask_n_m(score_OI: Tensor, n: int, m: int) -> Tensor:
    keep = torch.ones(score_OI.shape, dtype=torch.bool)
    for row, start in itertools.product(range(score_OI.shape[0]), range(0, score_OI.shape[1], m)):
        for offset in drop_lowest(score_OI[row, start : start + m].tolist(), m - n):
            keep[row, start + offset] = False
    return keep
