"""The rule of FFN-SkipLLM (Jaiswal et al. 2024, arXiv:2404.03865), as functions over rows.

With h the residual stream after attention and y = h + ffn(norm(h)), a row whose cos(h, y) reaches tau in some middle
layer skips the feed-forward of the k middle layers that follow. The cosine is of the *residual-inclusive* pair: that of
h and the raw output of the feed-forward is near zero everywhere and tells nothing.

Calibration over whole texts and the engine's decode steps share these functions: a row's decisions depend on its own
states alone, so a text run at once makes those of a text run token by token.

Shapes: ... any rows, H hidden channels, R selected rows.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

FeedForward = Callable[[Tensor], Tensor]
"""Normed rows (R, H) to outputs (R, H), without the residual."""

NEVER = 2.0
"""A tau above every cosine: rows that have it are computed as the dense model does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SkipRule:
    """Attributes:
    cold_start, cold_end: first and last layers whose feed-forward always runs.
    k: feed-forwards to skip after a hit.
    warm_up: generated tokens that run at full strength.
    """

    num_layers: int
    cold_start: int
    cold_end: int
    k: int = 1
    warm_up: int = 25

    def is_middle(self, layer: int) -> bool:
        return self.cold_start <= layer < self.num_layers - self.cold_end

    @property
    def middle(self) -> range:
        return range(self.cold_start, self.num_layers - self.cold_end)


def similarity(hidden: Tensor, output: Tensor) -> Tensor:
    """cos(h, h + output) of each row, float32 (...).

    Args:
        hidden: residual stream after attention (..., H).
        output: what the feed-forward made of its norm (..., H).
    """
    hidden = hidden.float()
    return F.cosine_similarity(hidden, hidden + output.float(), dim=-1)


def next_remaining(remaining: Tensor, is_skipped: Tensor, is_hit: Tensor, k: int) -> Tensor:
    """How many of the coming middle feed-forwards each row skips, after one middle layer.

    Args:
        remaining: the same before that layer, int (...).
        is_skipped: rows that skipped that layer.
        is_hit: of the others, those whose similarity reached tau; ignored for skipped rows.
    """
    computed = torch.where(is_hit, k, 0).to(remaining.dtype)
    return torch.where(is_skipped, remaining - 1, computed)


def apply_skipped(
    is_skipped: Tensor, normed: Tensor, feed_forward: FeedForward, substitute: FeedForward | None
) -> Tensor:
    """Outputs (..., H): rows that skip are gathered for the substitute, the others for the feed-forward.

    Args:
        is_skipped: bool (...).
        normed: what the feed-forward takes (..., H).
        substitute: None adds nothing.
    """
    output = torch.zeros_like(normed)
    is_run = ~is_skipped
    if is_run.any():
        output[is_run] = feed_forward(normed[is_run]).to(output.dtype)
    if substitute is not None and is_skipped.any():
        output[is_skipped] = substitute(normed[is_skipped]).to(output.dtype)
    return output
