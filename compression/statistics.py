"""What the rows that enter a linear layer are like, accumulated batch by batch; no model and no token is known here.

One object serves every method: the input norm of Wanda, the Gram matrix of SparseGPT, GPTQ and AWQ, the variance and
mean of FLAP, the mean magnitude of AWQ and the activation of Minitron. Sums run in float32 inside a batch and in
float64 across batches; means and variances are merged as Chan, Golub and LeVeque (1979) do, which does not cancel.

Shapes: B sequences, N rows (tokens) of each, I input channels.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(slots=True, kw_only=True)
class InputStatistics:
    """Streaming statistics of one input. Layers that read the same tensor (q, k, v; gate, up) share one object.

    Attributes:
        name: whose input it is, for errors.
        gram: whether to accumulate `gram_II` as well; I * I float32 and most of the work.
        num_rows: rows seen.
        mean_I: float64.
        mean_abs_I: mean magnitude, float64 (AWQ, Lin et al. 2023, arXiv:2306.00978).
        gram_II: sum of x^T x over all rows, float32; None unless asked for. The Hessian of the squared error of one
            output channel is twice this.
    """

    name: str
    num_channels: int
    gram: bool = False
    device: torch.device | str = "cpu"
    num_rows: int = field(default=0, init=False)
    mean_I: Tensor = field(init=False)
    mean_abs_I: Tensor = field(init=False)
    gram_II: Tensor | None = field(default=None, init=False)
    _squared_deviations_I: Tensor = field(init=False)
    _squared_sequence_means_I: Tensor = field(init=False)

    def __post_init__(self) -> None:
        zeros_4I = torch.zeros(4, self.num_channels, dtype=torch.float64, device=self.device)
        self.mean_I, self.mean_abs_I = zeros_4I[0], zeros_4I[1]
        self._squared_deviations_I, self._squared_sequence_means_I = zeros_4I[2], zeros_4I[3]
        if self.gram:
            self.gram_II = torch.zeros(self.num_channels, self.num_channels, device=self.device)

    def add(self, x_BNI: Tensor) -> None:
        """Take in a batch: (B, N, I), or (N, I) for one sequence, any floating dtype; no padding rows.

        Raises:
            ValueError: another number of channels, no row, or values that are not finite. Nothing is changed then.
        """
        if x_BNI.dim() == 2:
            x_BNI = x_BNI[None]
        if x_BNI.dim() != 3 or x_BNI.shape[2] != self.num_channels or not x_BNI.numel():
            raise ValueError(
                f"{self.name}: rows of {self.num_channels} channels expected, got {tuple(x_BNI.shape)}"
            )
        x_BNI = x_BNI.detach().float()
        x_RI = x_BNI.flatten(0, 1)
        mean_I = x_RI.mean(dim=0)
        squared_deviations_I = (x_RI - mean_I).square_().sum(dim=0)
        if not torch.isfinite(squared_deviations_I).all():  # NaN and infinity reach every sum
            channel = int((~torch.isfinite(squared_deviations_I)).nonzero()[0])
            raise ValueError(f"{self.name}: activations of channel {channel} are not finite")
        sequence_means_BI = x_BNI.abs().mean(dim=1).double()

        num_rows = x_RI.shape[0]
        share = num_rows / (self.num_rows + num_rows)
        shift_I = mean_I.double() - self.mean_I
        self._squared_deviations_I += squared_deviations_I
        self._squared_deviations_I += shift_I.square() * (self.num_rows * share)
        self.mean_I += shift_I * share
        self.mean_abs_I += (sequence_means_BI.mean(dim=0) - self.mean_abs_I) * share
        self._squared_sequence_means_I += sequence_means_BI.square().sum(dim=0)
        if self.gram_II is not None:
            self.gram_II.addmm_(x_RI.T, x_RI)
        self.num_rows += num_rows

    @property
    def norm(self) -> Tensor:
        """L2 norm of each channel over all rows, float32 (I,) (Wanda, Sun et al. 2023, arXiv:2306.11695)."""
        squares_I = self._squared_deviations_I + self.mean_I.square() * self.num_rows
        return squares_I.sqrt().float()

    @property
    def variance(self) -> Tensor:
        """Sample variance of each channel, float32 (I,): FLAP's fluctuation (An et al. 2023, arXiv:2312.11983)."""
        if self.num_rows < 2:
            raise ValueError(f"{self.name}: a variance needs 2 rows, got {self.num_rows}")
        return (self._squared_deviations_I / (self.num_rows - 1)).float()

    @property
    def activation(self) -> Tensor:
        """L2 norm over sequences of the mean magnitude within each, float32 (I,) (Minitron, arXiv:2407.14679)."""
        return self._squared_sequence_means_I.sqrt().float()
