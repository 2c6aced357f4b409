"""ShortGPT: remove whole layers that hardly turn the hidden state (Men et al. 2024, arXiv:2403.03853).

Block influence of a layer is 1 - E[cos(x, y)], x the hidden state that enters it and y the one that leaves.

Shapes: N rows (tokens), H channels of the hidden state, L layers.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812


@dataclass(slots=True, kw_only=True)
class BlockInfluence:
    """Streaming mean over rows, float64.

    Attributes:
        num_rows: rows seen of each layer.
    """

    num_layers: int
    num_rows: list[int] = field(init=False)
    _sums: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self.num_rows = [0] * self.num_layers
        self._sums = [0.0] * self.num_layers

    def add(self, layer: int, before_NH: Tensor, after_NH: Tensor) -> None:
        """Take in rows that entered and left a layer; a row of zeros counts as turned by a right angle.

        Raises:
            ValueError: shapes differ, there is no row, or a value is not finite.
        """
        if before_NH.shape != after_NH.shape or not before_NH.numel():
            raise ValueError(
                f"layer {layer}: rows {tuple(before_NH.shape)} before, {tuple(after_NH.shape)} after"
            )
        cosine_N = F.cosine_similarity(before_NH.float(), after_NH.float(), dim=-1)
        total = float(cosine_N.sum(dtype=torch.float64))
        if not math.isfinite(total):
            raise ValueError(f"layer {layer}: hidden states are not finite")
        self._sums[layer] += total
        self.num_rows[layer] += cosine_N.numel()

    def influence(self) -> list[float]:
        """Of each layer, in [0, 2].

        Raises:
            ValueError: a layer has seen no row.
        """
        if not all(self.num_rows):
            raise ValueError(f"layer {self.num_rows.index(0)} has seen no row")
        return [1 - total / rows for total, rows in zip(self._sums, self.num_rows, strict=True)]


def select_layers(influence: list[float], num_remove: int) -> list[int]:
    """Layers that go, of least influence first; of equal ones the later.

    Raises:
        ValueError: no layer would stay, or an influence is not finite.
    """
    if not 0 <= num_remove < len(influence):
        raise ValueError(f"cannot remove {num_remove} of {len(influence)} layers")
    if not all(math.isfinite(value) for value in influence):
        raise ValueError("block influence is not finite")
    return sorted(range(len(influence)), key=lambda layer: (influence[layer], -layer))[:num_remove]
