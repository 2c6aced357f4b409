"""GaLore's step for one matrix, as its paper writes it (Zhao et al. 2024, arXiv:2403.03507, algorithm 2), with an SVD
and in float64."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class NaiveGaLore:
    """Attributes: weight: float64, changed by `step`."""

    weight: Tensor
    rank: int
    scale: float
    interval: int
    learning_rate: float
    count: int = 0
    basis: Tensor | None = None
    first: Tensor | None = None
    second: Tensor | None = None

    def step(self, gradient: Tensor, basis: Tensor | None = None) -> None:
        """`basis` in place of the SVD's, which is unique but for signs."""
        gradient = gradient.double()
        tall = gradient.shape[0] >= gradient.shape[1]
        if basis is not None:
            self.basis = basis.double()
        elif self.count % self.interval == 0:
            u, _, vh = torch.linalg.svd(gradient, full_matrices=False)
            self.basis = vh[: self.rank].T if tall else u[:, : self.rank]
        assert self.basis is not None
        seen = gradient @ self.basis if tall else self.basis.T @ gradient
        if self.first is None or self.second is None:
            self.first, self.second = torch.zeros_like(seen), torch.zeros_like(seen)
        self.count += 1
        self.first = 0.9 * self.first + 0.1 * seen
        self.second = 0.999 * self.second + 0.001 * seen**2
        m = self.first / (1 - 0.9**self.count)
        v = self.second / (1 - 0.999**self.count)
        step = m / (v.sqrt() + 1e-8)
        back = step @ self.basis.T if tall else self.basis @ step
        self.weight = self.weight - self.learning_rate * self.scale * back
