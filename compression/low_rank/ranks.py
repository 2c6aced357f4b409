"""WeLore's choice of ranks: one threshold on normalised singular values (Jaiswal et al. 2024, arXiv:2407.11239).

The singular values of each matrix are min-max normalised to [0, 1]; those below a global threshold go. The effective
rank reduction (ERR) is the share of all ranks that goes. A matrix that loses more than half of its rank is a low-rank
component (LRC). Two counting modes, as the authors' scripts have them:

- "all": every matrix is cut to its rank and counts;
- "lrc_only": only LRCs are cut and count; the others keep their weight.

Departures: the threshold is solved for instead of read from a table per model, and is the largest value that goes, not
a bound above it. Ranks are rounded up to a multiple first, so the ERR that is hit is the one that is stored. In
"lrc_only" a matrix that becomes an LRC brings half of its rank at once, so the LRCs are chosen by one threshold and
then all cut by a second one a little below it, never back to half of their rank or more. A matrix whose singular values
are all equal is not low rank and keeps them all.
"""

from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compression.recipe import RankCount

LRC_SHARE = 0.5
MAX_MISS = 0.05  # of effective rank reduction; only few or equal matrices miss by more


@dataclass(frozen=True, slots=True, kw_only=True)
class RankChoice:
    """Attributes:
    threshold: normalised singular values up to it go; None where no threshold chose.
    err: the effective rank reduction that the ranks give.
    ranks: of every matrix, in full where it keeps its weight.
    lrc: matrices that lose more than half of their rank.
    """

    threshold: float | None
    err: float
    ranks: dict[str, int]
    lrc: frozenset[str]


def normalise(singular_values_R: Tensor) -> Tensor:
    """Min-max normalise, float64 (R,); all ones where they are all equal."""
    values_R = singular_values_R.double()
    low, high = values_R.min(), values_R.max()
    return (values_R - low) / (high - low) if high > low else torch.ones_like(values_R)


def choose_ranks(
    spectra: Mapping[str, Tensor], err: float, *, count: RankCount, multiple: int
) -> RankChoice:
    """Solve for the threshold whose ranks come closest to the effective rank reduction.

    Args:
        spectra: singular values (R,) of every matrix, in any order.
        multiple: ranks are rounded up to it, at most to R.

    Raises:
        ValueError: a spectrum is empty or not finite, or the target is missed by more than `MAX_MISS`.
    """
    for name, values in spectra.items():
        if not values.numel() or not torch.isfinite(values).all():
            raise ValueError(f"{name}: singular values are empty or not finite")
    ascending = {name: normalise(values).sort().values for name, values in spectra.items()}
    sizes = {name: values.numel() for name, values in ascending.items()}
    target = err * sum(sizes.values())
    # Every outcome there is; -1 for nothing at all.
    pooled = torch.unique(torch.cat(list(ascending.values())))
    candidates = [-1.0, *pooled[pooled < 1].tolist()]

    def kept(name: str, threshold: float) -> int:
        rank = sizes[name] - int(torch.searchsorted(ascending[name], threshold, right=True))
        return min(max(-(-rank // multiple), 1) * multiple, sizes[name])

    def cut_at(threshold: float) -> dict[str, int]:
        ranks = {name: kept(name, threshold) for name in sizes}
        return ranks if count == "all" else {n: r for n, r in ranks.items() if _is_lrc(r, sizes[n])}

    def removed(ranks: Mapping[str, int]) -> int:
        return sum(sizes[name] - rank for name, rank in ranks.items())

    def closest(cut: Callable[[float], dict[str, int]]) -> tuple[float, dict[str, int]]:
        index = bisect_left(candidates, target, key=lambda value: removed(cut(value)))
        nearest = candidates[max(index - 1, 0) : index + 1]
        outcomes = [(value, cut(value)) for value in nearest]
        return min(outcomes, key=lambda outcome: abs(removed(outcome[1]) - target))

    threshold, ranks = closest(cut_at)
    if count == "lrc_only":
        index = bisect_left(candidates, target, key=lambda value: removed(cut_at(value)))
        members = cut_at(candidates[min(index, len(candidates) - 1)])
        most = {name: (-(-sizes[name] // 2) - 1) // multiple * multiple for name in members}
        finer = closest(lambda value: {name: min(kept(name, value), most[name]) for name in most})
        threshold, ranks = min(
            (threshold, ranks), finer, key=lambda outcome: abs(removed(outcome[1]) - target)
        )
    achieved = removed(ranks) / sum(sizes.values())
    if abs(achieved - err) > MAX_MISS:
        raise ValueError(
            f"an effective rank reduction of {err} cannot be reached with ranks in multiples of {multiple}:"
            f" the nearest is {achieved:.4f}"
        )
    return RankChoice(
        threshold=threshold,
        err=achieved,
        ranks=sizes | ranks,
        lrc=frozenset(name for name, rank in ranks.items() if _is_lrc(rank, sizes[name])),
    )


def uniform_ranks(sizes: Mapping[str, int], err: float, *, multiple: int) -> RankChoice:
    """The baseline: every matrix keeps the same share of its rank, to the nearest multiple."""
    return allotted_ranks(sizes, dict.fromkeys(sizes, err), multiple=multiple)


def allotted_ranks(
    sizes: Mapping[str, int], errs: Mapping[str, float], *, multiple: int
) -> RankChoice:
    """The same with a share of its own for every matrix."""
    ranks = {
        name: min(max(round((1 - errs[name]) * size / multiple), 1) * multiple, size)
        for name, size in sizes.items()
    }
    return RankChoice(
        threshold=None,
        err=1 - sum(ranks.values()) / sum(sizes.values()),
        ranks=ranks,
        lrc=frozenset(name for name, rank in ranks.items() if _is_lrc(rank, sizes[name])),
    )


def _is_lrc(rank: int, size: int) -> bool:
    return size - rank > LRC_SHARE * size
