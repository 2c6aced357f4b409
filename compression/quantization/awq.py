"""AWQ: enlarge the input channels that matter before rounding, and let what comes before shrink them
(Lin et al. 2023, arXiv:2306.00978).

x W^T = (x / s) (W diag(s))^T, so a scale s for every input channel changes nothing but the rounding of W diag(s). The
layer or norm that produces x takes the 1 / s in, which costs nothing at run time. s = mean|x|^alpha, divided by
sqrt(max s * min s), with the alpha of a grid that loses least; alpha 0 is round-to-nearest, so AWQ never loses more.

Departures: the loss is the squared error of the outputs of all layers that read x, exactly over every calibration row
by way of the Gram matrix (the authors run a whole sub-block over a sample); clipping is searched afterwards by groups
(`ranges.py`). Channels of x that
come from one output of the layer before (a value head that several query heads read) share a scale; the authors leave
such layers out.

Shapes: O output channels, I input channels, S outputs of what produces the input (I, or fewer under grouped heads).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compression.inverse_hessian import squared_error
from compression.quantization.int4 import dequantize, round_to_nearest

ALPHAS = tuple(step / 20 for step in range(21))


@dataclass(frozen=True, slots=True, kw_only=True)
class AwqScale:
    """Attributes:
    scale_S: float32; what produces the input is divided by it, see `divide_outputs`.
    scale_I: the same for each input channel; the weights are multiplied by it before they are rounded.
    alpha: the exponent found.
    error: squared error of the outputs over the calibration rows.
    nearest_error: the same of round-to-nearest without scales.
    """

    scale_S: Tensor
    scale_I: Tensor
    alpha: float
    error: float
    nearest_error: float


def search_scale(
    weights: Sequence[Tensor],
    gram_II: Tensor,
    mean_abs_I: Tensor,
    group_size: int,
    *,
    symmetric: bool,
    scale_dtype: torch.dtype,
    source_I: Tensor | None = None,
) -> AwqScale:
    """Find the scale for one input.

    Args:
        weights: of all linear layers that read it, each floating (out_features, in_features).
        gram_II: `InputStatistics.gram_II` of the input.
        mean_abs_I: `InputStatistics.mean_abs_I` of the input.
        source_I: which output of what comes before each channel is; None where it is the same, see `value_sources`.

    Raises:
        ValueError: in_features is no multiple of group_size, or a value is not finite.
    """
    weight_OI = torch.cat([weight_OI.float() for weight_OI in weights])
    if gram_II.shape[0] != weight_OI.shape[1] or mean_abs_I.shape[0] != weight_OI.shape[1]:
        raise ValueError(
            f"weights of {weight_OI.shape[1]} inputs, statistics of {gram_II.shape[0]} and {mean_abs_I.shape[0]}"
        )
    if source_I is None:
        source_I = torch.arange(len(mean_abs_I))
    source_I = source_I.to(mean_abs_I.device)
    magnitude_S = _mean_by_source(mean_abs_I.double(), source_I)
    best = None
    for alpha in ALPHAS:
        scale_S = _scale(magnitude_S, alpha)
        scale_I = scale_S[source_I]
        quantized = round_to_nearest(
            weight_OI * scale_I, group_size, symmetric=symmetric, scale_dtype=scale_dtype
        )
        error = squared_error(dequantize(quantized) / scale_I - weight_OI, gram_II)
        nearest_error = error if best is None else best.nearest_error
        if best is None or error < best.error:
            best = AwqScale(
                scale_S=scale_S,
                scale_I=scale_I,
                alpha=alpha,
                error=error,
                nearest_error=nearest_error,
            )
    assert best is not None
    return best


def divide_outputs(tensor: Tensor, scale_S: Tensor) -> Tensor:
    """Fold 1 / s into what produces the input: an RMSNorm's weight (S,), or a linear's weight (S, I) or bias (S,)."""
    scale = scale_S.reshape(-1, *[1] * (tensor.dim() - 1))
    return (tensor.float() / scale).to(tensor.dtype)


def value_sources(num_heads: int, num_key_value_heads: int, head_dim: int) -> Tensor:
    """Which output of v_proj each input channel of o_proj is: (num_heads * head_dim,)."""
    outputs_KD = torch.arange(num_key_value_heads * head_dim).reshape(num_key_value_heads, head_dim)
    return outputs_KD.repeat_interleave(num_heads // num_key_value_heads, dim=0).flatten()


def _scale(magnitude_S: Tensor, alpha: float) -> Tensor:
    """Magnitudes below 1e-4 of the mean (dead channels) count as that."""
    floored_S = magnitude_S.clamp(min=float(magnitude_S.mean()) * 1e-4).clamp(min=1e-30)
    scale_S = floored_S**alpha
    return (scale_S / (scale_S.max() * scale_S.min()).sqrt()).float()


def _mean_by_source(values_I: Tensor, source_I: Tensor) -> Tensor:
    counts_S = torch.bincount(source_I)
    sums_S = values_I.new_zeros(len(counts_S)).index_add_(0, source_I, values_I)
    return sums_S / counts_S
