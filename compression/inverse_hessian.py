"""How the other weights of a row best absorb the error of one: the algebra that SparseGPT and GPTQ share.

Over calibration rows X the squared error of an output channel is d^T H d, with d the change of its weights, H = X^T X.
Fixing weight j at q costs (w_j - q)^2 / [H^-1]_jj, if the weights still free move by -(w_j - q) / [H^-1]_jj times
row j of H^-1 (Optimal Brain Surgeon, Hassibi and Stork 1993). When every row fixes its weights from left to right, all
rows share one inverse per step, and row j of one triangular factor U, with U^T U = H^-1, holds what step j needs
(GPTQ, Frantar et al. 2022, arXiv:2210.17323).

Departure: H is never inverted. Cholesky from the last column backwards gives H = R R^T with R upper, and U = R^-1; in
float64. The factor of two in the Hessian and the number of rows cancel everywhere and are left out.

Shapes: O output channels, I input channels, B the input channels of one block.
"""

from collections.abc import Callable

import torch
from torch import Tensor

DAMPENING = 0.01
BLOCK_SIZE = 128


def dead_inputs(gram_II: Tensor) -> Tensor:
    """Channels that were zero in every calibration row: bool (I,)."""
    return gram_II.diagonal() == 0


def inverse_factor(gram_II: Tensor, *, dampening: float = DAMPENING) -> Tensor:
    """Upper triangular U with U^T U = (H + d I)^-1, float32.

    A dead channel gets the mean diagonal: its row of U is then its own, so it neither gives nor takes.

    Args:
        gram_II: sum of x^T x, `InputStatistics.gram_II`.
        dampening: d as a fraction of the mean diagonal over the channels that are not dead.

    Raises:
        ValueError: not finite, not square, or not positive definite even so.
    """
    num_channels = gram_II.shape[0]
    if gram_II.shape != (num_channels, num_channels) or not torch.isfinite(gram_II).all():
        raise ValueError(f"gram must be square and finite, got shape {tuple(gram_II.shape)}")
    hessian_II = gram_II.double()
    dead_I = dead_inputs(gram_II)
    mean = hessian_II.trace() / (~dead_I).sum().clamp(min=1)
    mean = torch.where(mean > 0, mean, 1.0)
    hessian_II.diagonal().add_(dead_I * mean + dampening * mean)
    reversed_II, failed_at = torch.linalg.cholesky_ex(hessian_II.flip(0, 1))
    if failed_at:
        raise ValueError(
            f"gram is not positive definite with dampening {dampening}: raise the dampening"
        )
    root_II = reversed_II.flip(0, 1)
    identity_II = torch.eye(num_channels, dtype=torch.float64, device=gram_II.device)
    factor_II: Tensor = torch.linalg.solve_triangular(root_II, identity_II, upper=True)
    return factor_II.float()


def fix_columns(
    weight_OI: Tensor,
    factor_II: Tensor,
    choose: Callable[[int, Tensor], Tensor],
    *,
    block_size: int = BLOCK_SIZE,
) -> Tensor:
    """Fix the input channels one after another; those still free absorb the error.

    Args:
        factor_II: of `inverse_factor`.
        choose: from a channel j and the current weights of channels j.. to the end of its block, (B, O), to the
            values (O,) that channel j gets.
        block_size: channels after which the errors of a block reach what lies behind it, in one product.

    Returns:
        float32 (O, I).
    """
    weight_IO = weight_OI.float().T.contiguous()  # a channel's weights lie side by side
    num_channels = weight_IO.shape[0]
    for start in range(0, num_channels, block_size):
        end = min(start + block_size, num_channels)
        factor_BB = factor_II[start:end, start:end]
        block_BO = weight_IO[start:end]
        error_BO = torch.empty_like(block_BO)
        for j in range(end - start):
            value_O = choose(start + j, block_BO[j:])
            error_BO[j] = (block_BO[j] - value_O) / factor_BB[j, j]
            block_BO[j] = value_O
            block_BO[j + 1 :].addr_(factor_BB[j, j + 1 :], error_BO[j], alpha=-1)
        weight_IO[end:].addmm_(factor_II[start:end, end:].T, error_BO, alpha=-1)
    return weight_IO.T.contiguous()


def squared_error(delta_OI: Tensor, gram_II: Tensor) -> float:
    """Squared change of a layer's output over the calibration rows: the sum of d^T H d over its output channels."""
    delta_OI = delta_OI.float()
    return float(((delta_OI @ gram_II.float()) * delta_OI).sum(dtype=torch.float64))
