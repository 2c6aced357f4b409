"""RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467), alone and fused with the residual add before it.

Shapes: T rows (and heads, for query and key norms), H normalised width.
"""

from torch import Tensor
from torch.nn import functional as F  # noqa: N812


def rms_norm(x_TH: Tensor, weight_H: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last dimension, computed in float32, of the weight's dtype."""
    if x_TH.dtype == weight_H.dtype:
        return F.rms_norm(x_TH, weight_H.shape, weight_H, epsilon)
    return F.rms_norm(x_TH, weight_H.shape, weight_H.to(x_TH.dtype), epsilon).to(weight_H.dtype)


def add_rms_norm(
    x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """What layers add up stays float32, whatever they add.

    Returns: rms_norm(x + residual) of the weight's dtype, and x + residual in float32.
    """
    residual_TH = residual_TH.float() + x_TH
    return rms_norm(residual_TH, weight_H, epsilon), residual_TH
