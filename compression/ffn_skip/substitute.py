"""Cheap stand-ins for a skipped feed-forward, fitted on calibration text. Not in the FFN-SkipLLM paper.

The mean output costs nothing to read. The low-rank map is the reduced-rank ridge regression of the feed-forward's
output on its normed input (Mukherjee and Zhu 2011, doi:10.1002/sam.10138): ridge coefficients, projected on the leading
directions of what they predict. Both are closed forms of the moments that `Moments` accumulates.

Shapes: T rows, H hidden channels, R rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compression.ffn_skip.profile import MAX_RANK, Substitute, substitute_prefix

RIDGE = 1e-2
"""Times the mean input power: how strongly coefficients are pulled to zero."""


class Moments:
    """First and second moments of a feed-forward's normed inputs x and outputs y, float64."""

    def __init__(self, hidden_size: int) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64)

        self.num_rows = 0
        self.x_H = zeros(hidden_size)
        self.y_H = zeros(hidden_size)
        self.xx_HH = zeros(hidden_size, hidden_size)
        self.xy_HH = zeros(hidden_size, hidden_size)
        self.yy = 0.0

    def add(self, x_TH: Tensor, y_TH: Tensor) -> None:
        x_TH, y_TH = x_TH.float(), y_TH.float()
        self.num_rows += len(x_TH)
        self.x_H += x_TH.double().sum(dim=0)
        self.y_H += y_TH.double().sum(dim=0)
        self.xx_HH += x_TH.T @ x_TH
        self.xy_HH += x_TH.T @ y_TH
        self.yy += float(y_TH.double().square().sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """A substitute with its numbers: output = (x @ weight_v.T) @ weight_u.T + bias.

    Attributes:
        bias_H: None exactly for the kind "none".
        weight_u_HR, weight_v_RH: None but for the kind "linear".
    """

    substitute: Substitute
    bias_H: Tensor | None = None
    weight_u_HR: Tensor | None = None
    weight_v_RH: Tensor | None = None

    def __call__(self, x_TH: Tensor) -> Tensor:
        """Outputs (T, H) for normed rows; "none" gives zeros."""
        if self.bias_H is None:
            return torch.zeros_like(x_TH)
        if self.weight_u_HR is None or self.weight_v_RH is None:
            return self.bias_H.to(x_TH).expand_as(x_TH)
        low_TR = x_TH @ self.weight_v_RH.to(x_TH).T
        return low_TR @ self.weight_u_HR.to(x_TH).T + self.bias_H.to(x_TH)

    def tensors(self, layer: int) -> dict[str, Tensor]:
        """By their names in a checkpoint."""
        named = {"bias": self.bias_H, "weight_u": self.weight_u_HR, "weight_v": self.weight_v_RH}
        prefix = substitute_prefix(layer)
        return {f"{prefix}.{suffix}": t for suffix, t in named.items() if t is not None}

    @classmethod
    def from_tensors(
        cls, substitute: Substitute, layer: int, tensors: Mapping[str, Tensor]
    ) -> "Fitted":
        prefix = substitute_prefix(layer)
        return cls(
            substitute=substitute,
            bias_H=tensors.get(f"{prefix}.bias"),
            weight_u_HR=tensors.get(f"{prefix}.weight_u"),
            weight_v_RH=tensors.get(f"{prefix}.weight_v"),
        )


def fit_mean(moments: Moments) -> Fitted:
    return Fitted(
        substitute=Substitute(kind="mean"), bias_H=(moments.y_H / moments.num_rows).float()
    )


def fit_linear(moments: Moments, rank: int, *, ridge: float = RIDGE) -> Fitted:
    """The map of at most this rank, with a free bias, that minimises squared error plus the ridge penalty.

    Args:
        ridge: relative to the mean power of an input channel.
    """
    n = moments.num_rows
    x_mean_H, y_mean_H = moments.x_H / n, moments.y_H / n
    xx_HH = moments.xx_HH / n - torch.outer(x_mean_H, x_mean_H)
    xy_HH = moments.xy_HH / n - torch.outer(x_mean_H, y_mean_H)
    size = len(x_mean_H)
    penalised_HH = xx_HH + ridge * xx_HH.diagonal().mean() * torch.eye(size, dtype=xx_HH.dtype)
    full_HH = torch.linalg.solve(penalised_HH, xy_HH)  # y ~ x @ full
    predicted_HH = full_HH.T @ penalised_HH @ full_HH
    leading_HR = torch.linalg.eigh(predicted_HH).eigenvectors[:, -rank:]
    weight_v_RH = (full_HH @ leading_HR).T
    bias_H = y_mean_H - leading_HR @ (weight_v_RH @ x_mean_H)
    return Fitted(
        substitute=Substitute(kind="linear", rank=rank),
        bias_H=bias_H.float(),
        weight_u_HR=leading_HR.float().contiguous(),
        weight_v_RH=weight_v_RH.float().contiguous(),
    )


def squared_error(fitted: Fitted, moments: Moments) -> float:
    """Mean over rows of |y - substitute(x)|^2, from the moments of those rows alone."""
    n = moments.num_rows
    if fitted.bias_H is None:
        return moments.yy / n
    bias_H = fitted.bias_H.double()
    size = len(bias_H)
    if fitted.weight_u_HR is None or fitted.weight_v_RH is None:
        map_HH = torch.zeros((size, size), dtype=torch.float64)
    else:
        map_HH = (fitted.weight_u_HR.double() @ fitted.weight_v_RH.double()).T  # y ~ x @ map + bias
    cross = float((map_HH * moments.xy_HH).sum() + bias_H @ moments.y_H)
    mapped = float((map_HH * (moments.xx_HH @ map_HH)).sum())
    shifted = float(2 * bias_H @ (map_HH.T @ moments.x_H) + n * bias_H @ bias_H)
    return (moments.yy - 2 * cross + mapped + shifted) / n


def choose_substitute(
    fit: Moments, held_out: Moments, *, rank: int = MAX_RANK
) -> tuple[Fitted, float]:
    """The kind of least squared error on rows that no kind was fitted on.

    Args:
        rank: of the low-rank map; 0 leaves it out.

    Returns:
        The substitute, and the share of the outputs' power on held-out rows that it misses.
    """
    candidates = [Fitted(substitute=Substitute()), fit_mean(fit)]
    if rank:
        candidates.append(fit_linear(fit, rank))
    errors = [squared_error(fitted, held_out) for fitted in candidates]
    best = errors.index(min(errors))
    return candidates[best], errors[best] / errors[0] if errors[0] else 1.0
