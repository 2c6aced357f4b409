"""Optimal Brain Surgeon as its derivation says: one row at a time, a fresh inverse for every weight, float64."""

from collections.abc import Callable

import torch
from torch import Tensor


def dampen(gram_II: Tensor, dampening: float) -> Tensor:
    hessian_II = gram_II.double()
    return hessian_II + dampening * hessian_II.diagonal().mean() * torch.eye(len(hessian_II))


def fix_columns(
    weight_OI: Tensor, hessian_II: Tensor, choose: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """Fix the columns from left to right; `choose` sees j and all current weights and gives column j's values."""
    weight_OI = weight_OI.double().clone()
    for j in range(weight_OI.shape[1]):
        value_O = choose(j, weight_OI)
        inverse_FF = torch.linalg.inv(hessian_II[j:, j:])  # of the weights still free
        for row in range(weight_OI.shape[0]):
            error = (weight_OI[row, j] - value_O[row]) / inverse_FF[0, 0]
            weight_OI[row, j:] -= error * inverse_FF[0]
            weight_OI[row, j] = value_O[row]
    return weight_OI


def drop_costs(hessian_II: Tensor) -> Tensor:
    """[H_F^-1]_jj of every column j, F the columns from j on: dropping w_j then costs w_j^2 over it."""
    return torch.stack([torch.linalg.inv(hessian_II[j:, j:])[0, 0] for j in range(len(hessian_II))])


def least_squares(weight_OI: Tensor, keep_OI: Tensor, hessian_II: Tensor) -> Tensor:
    """The best weights with these zeros: each row solves its own normal equations."""
    best_OI = torch.zeros_like(weight_OI, dtype=torch.float64)
    for row, keep_I in enumerate(keep_OI):
        target_I = hessian_II[keep_I] @ weight_OI[row].double()
        best_OI[row, keep_I] = torch.linalg.solve(hessian_II[keep_I][:, keep_I], target_I)
    return best_OI
