"""Which weights survive, given a score for each: counts, patterns and ties. The methods only supply scores.

Exactly `round(sparsity * n)` weights go. Ties are common (bfloat16 holds 128 magnitudes per octave): of equal scores
the one that comes first goes first, so that a mask depends on nothing but the scores.

Shapes: O output channels, I input channels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class NM:
    """N:M sparsity: of every M consecutive inputs of a row, N survive. NVIDIA's sparse tensor cores take 2:4."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 0 < self.n <= self.m:
            raise ValueError(f"N:M needs 0 < N <= M, got {self}")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


Sparsity = float | NM
"""Fraction of weights that go, in [0, 1), or a pattern."""


def num_dropped(count: int, sparsity: float) -> int:
    """How many of `count` weights go.

    Raises:
        ValueError: sparsity is out of range.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be in [0, 1), got {sparsity}")
    return round(sparsity * count)


def keep_mask_per_row(score_OI: Tensor, sparsity: float) -> Tensor:
    """Drop the same number of weights from every row. Bool (O, I), True survives."""
    count = num_dropped(score_OI.shape[1], sparsity)
    drop_OP = score_OI.argsort(dim=1, stable=True)[:, :count]
    return torch.ones_like(score_OI, dtype=torch.bool).scatter_(1, drop_OP, False)


def keep_mask_per_matrix(score_OI: Tensor, sparsity: float) -> Tensor:
    """Drop the lowest scores of the whole matrix, so that rows may differ."""
    return keep_mask_per_row(score_OI.reshape(1, -1), sparsity).reshape(score_OI.shape)


def keep_mask_n_m(score_OI: Tensor, n_m: NM) -> Tensor:
    """Drop the M - N lowest scores of every M consecutive inputs.

    Raises:
        ValueError: the inputs are no multiple of M.
    """
    if score_OI.shape[1] % n_m.m:
        raise ValueError(f"in_features {score_OI.shape[1]} is no multiple of {n_m.m} ({n_m})")
    score_GM = score_OI.reshape(-1, n_m.m)
    return keep_mask_per_row(score_GM, (n_m.m - n_m.n) / n_m.m).reshape(score_OI.shape)


def check_weight(weight_OI: Tensor) -> None:
    """Raises: ValueError: no matrix, or values that are not finite."""
    if weight_OI.dim() != 2 or not weight_OI.numel():
        raise ValueError(f"a weight is a matrix (out, in), got shape {tuple(weight_OI.shape)}")
    if not torch.isfinite(weight_OI).all():
        raise ValueError("weight has values that are not finite")
