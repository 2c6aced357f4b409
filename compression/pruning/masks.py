"""Which weights survive, given a score for each: counts, patterns and ties. The methods only supply scores.

Exactly `round(sparsity * n)` weights go. Ties are common (bfloat16 holds 128 magnitudes per octave): of equal scores
the one that comes first goes first, so that a mask depends on nothing but the scores.

Shapes: O output channels, I input channels.
"""

from dataclasses import dataclass
from typing import Literal

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

Scope = Literal["row", "matrix"]
"""Within what a fraction is counted; a pattern has its own scope."""


def check_sparsity(sparsity: Sparsity, num_channels: int) -> None:
    """Raises: ValueError: a fraction out of range, or input channels that the pattern does not divide."""
    if isinstance(sparsity, NM):
        if num_channels % sparsity.m:
            raise ValueError(
                f"in_features {num_channels} is no multiple of {sparsity.m} ({sparsity})"
            )
    elif not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be in [0, 1), got {sparsity}")


def keep_mask(score_OI: Tensor, sparsity: Sparsity, *, scope: Scope) -> Tensor:
    """Drop the lowest scores of every row, of the matrix, or of every M consecutive inputs.

    Returns:
        bool (O, I), True survives.

    Raises:
        ValueError: as `check_sparsity`.
    """
    check_sparsity(sparsity, score_OI.shape[1])
    if isinstance(sparsity, NM):
        compared = score_OI.reshape(-1, sparsity.m)
        count = sparsity.m - sparsity.n
    else:
        compared = score_OI if scope == "row" else score_OI.reshape(1, -1)
        count = round(sparsity * compared.shape[1])
    drop = compared.argsort(dim=1, stable=True)[:, :count]
    keep = torch.ones_like(compared, dtype=torch.bool).scatter_(1, drop, False)
    return keep.reshape(score_OI.shape)


def check_weight(weight_OI: Tensor) -> None:
    """Raises: ValueError: no matrix, or values that are not finite."""
    if weight_OI.dim() != 2 or not weight_OI.numel():
        raise ValueError(f"a weight is a matrix (out, in), got shape {tuple(weight_OI.shape)}")
    if not torch.isfinite(weight_OI).all():
        raise ValueError("weight has values that are not finite")
