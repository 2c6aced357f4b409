"""SparseGPT: prune column by column while the rest absorbs the error (Frantar and Alistarh 2023, arXiv:2301.00774).

Which weights of a block go is settled when the block is reached, by the cost w_j^2 / U_jj^2 of dropping each as the
weights then are; for N:M when its M columns are reached.

Departures: exactly `round(sparsity * n)` weights of each block go (the authors' threshold drops ties as well); weights
of dead inputs cost nothing and so go first, but no more of them than the sparsity asks for.

Shapes: O output channels, I input channels, B the input channels of one block.
"""

import torch
from torch import Tensor

from compression.inverse_hessian import (
    BLOCK_SIZE,
    DAMPENING,
    dead_inputs,
    fix_columns,
    inverse_factor,
)
from compression.pruning.masks import NM, Sparsity, check_sparsity, check_weight, keep_mask


def sparsegpt(
    weight_OI: Tensor, gram_II: Tensor, sparsity: Sparsity, *, dampening: float = DAMPENING
) -> Tensor:
    """Prune one linear layer.

    Args:
        weight_OI: any floating dtype; the work is done in float32.
        gram_II: sum of x^T x over the calibration rows, `InputStatistics.gram_II`.
        dampening: added to the Hessian's diagonal, as a fraction of its mean.

    Returns:
        The new weight in the dtype of the old; what was dropped is exactly zero.

    Raises:
        ValueError: sparsity is out of range, the pattern does not fit, or a value is not finite.
    """
    check_weight(weight_OI)
    num_rows, num_channels = weight_OI.shape
    check_sparsity(sparsity, num_channels)
    span = sparsity.m if isinstance(sparsity, NM) else BLOCK_SIZE
    if gram_II.shape[0] != num_channels:
        raise ValueError(f"gram is of {gram_II.shape[0]} channels, the weight has {num_channels}")
    factor_II = inverse_factor(gram_II, dampening=dampening)
    price_I = factor_II.diagonal().square().reciprocal()
    price_I[dead_inputs(gram_II)] = 0
    keep_IO = torch.empty(num_channels, num_rows, dtype=torch.bool, device=weight_OI.device)

    def choose(j: int, current_BO: Tensor) -> Tensor:
        if j % span == 0:
            score_OB = (current_BO[:span].square() * price_I[j : j + span, None]).T
            keep_IO[j : j + span] = keep_mask(score_OB, sparsity, scope="matrix").T
        return current_BO[0] * keep_IO[j]

    block_size = max(BLOCK_SIZE // span, 1) * span
    return fix_columns(weight_OI, factor_II, choose, block_size=block_size).to(weight_OI.dtype)
