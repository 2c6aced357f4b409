"""SparseGPT against Optimal Brain Surgeon row by row, the optimum for its mask, and magnitude pruning."""

import pytest
import torch
from torch import Tensor

from compression.inverse_hessian import squared_error
from compression.pruning.magnitude import magnitude_keep_mask
from compression.pruning.masks import NM, Sparsity
from compression.pruning.sparsegpt import sparsegpt
from tests.compression.test_inverse_hessian import random_gram
from tests.reference import optimal_brain
from tests.reference import pruning as reference


def random_weight(num_rows: int, num_channels: int) -> Tensor:
    return torch.randn(num_rows, num_channels, generator=torch.Generator().manual_seed(7))


def naive(weight_OI: Tensor, gram_II: Tensor, sparsity: Sparsity, block_size: int) -> Tensor:
    hessian_II = optimal_brain.dampen(gram_II, 0.01)
    costs_I = optimal_brain.drop_costs(hessian_II)
    span = sparsity.m if isinstance(sparsity, NM) else block_size
    keep_OI = torch.ones_like(weight_OI, dtype=torch.bool)

    def choose(j: int, current_OI: Tensor) -> Tensor:
        if j % span == 0:
            columns = slice(j, j + span)
            score_OB = current_OI[:, columns].square() / costs_I[columns]
            if isinstance(sparsity, NM):
                keep_OI[:, columns] = reference.keep_mask_n_m(score_OB, sparsity.n, sparsity.m)
            else:
                flat = reference.keep_mask(score_OB.reshape(1, -1), sparsity)
                keep_OI[:, columns] = flat.reshape(score_OB.shape)
        return current_OI[:, j] * keep_OI[:, j]

    return optimal_brain.fix_columns(weight_OI, hessian_II, choose)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.97, NM(2, 4), NM(4, 8)])
@pytest.mark.parametrize(("num_rows", "num_channels"), [(1, 16), (5, 48), (2, 136)])
def test_it_equals_optimal_brain_surgeon(
    num_rows: int, num_channels: int, sparsity: Sparsity
) -> None:
    weight_OI, gram_II = random_weight(num_rows, num_channels), random_gram(num_channels, 300)
    actual = sparsegpt(weight_OI, gram_II, sparsity)
    expected = naive(weight_OI, gram_II, sparsity, block_size=128)
    assert torch.equal(actual == 0, expected == 0)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("sparsity", [0.5, 0.8, NM(2, 4)])
@pytest.mark.parametrize("seed", range(4))
def test_it_loses_less_than_magnitude_and_no_less_than_the_optimum(
    seed: int, sparsity: Sparsity
) -> None:
    weight_OI, gram_II = random_weight(24, 64), random_gram(64, 200, seed)
    pruned_OI = sparsegpt(weight_OI, gram_II, sparsity)
    error = squared_error(pruned_OI - weight_OI, gram_II)
    magnitude_OI = weight_OI * magnitude_keep_mask(weight_OI, sparsity)
    assert error < squared_error(magnitude_OI - weight_OI, gram_II)
    hessian_II = gram_II.double()
    optimum_OI = optimal_brain.least_squares(weight_OI, pruned_OI != 0, hessian_II)
    assert error >= squared_error(optimum_OI - weight_OI, gram_II) * 0.999
    masked_OI = weight_OI * (pruned_OI != 0)
    assert error < squared_error(masked_OI - weight_OI, gram_II)


def test_two_weights_worked_by_hand() -> None:
    # H = [[2, 1], [1, 2]] without dampening; dropping costs w^2 / [H^-1]: the first 3/2 * 1, the second 2 * 4.
    # The second takes over d = H_01 / H_11 * w_0 = 1/2.
    gram_II = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    pruned_OI = sparsegpt(torch.tensor([[1.0, 2.0]]), gram_II, 0.5, dampening=0.0)
    torch.testing.assert_close(pruned_OI, torch.tensor([[0.0, 2.5]]))


@pytest.mark.parametrize("sparsity", [0.5, 0.7, NM(2, 4)])
def test_uncorrelated_inputs_and_ties_give_the_magnitude_mask_exactly(sparsity: Sparsity) -> None:
    weight_OI = torch.randint(-2, 3, (9, 64), generator=torch.Generator().manual_seed(0)).float()
    expected = weight_OI * magnitude_keep_mask(weight_OI, sparsity)
    assert torch.equal(sparsegpt(weight_OI, torch.eye(64), sparsity), expected)


def test_sparsity_zero_and_zero_weights_change_nothing() -> None:
    weight_OI = random_weight(4, 32).bfloat16()
    weight_OI[1] = 0
    gram_II = random_gram(32, 50)
    assert torch.equal(sparsegpt(weight_OI, gram_II, 0.0), weight_OI)
    pruned_OI = sparsegpt(weight_OI, gram_II, 0.5)
    assert pruned_OI.dtype == torch.bfloat16
    assert pruned_OI[1].count_nonzero() == 0
    assert (pruned_OI == 0).sum() == 64


def test_dead_inputs_go_first_but_no_more_than_asked_for() -> None:
    weight_OI, gram_II = random_weight(4, 32) + 10, random_gram(32, 50)
    gram_II[5] = gram_II[:, 5] = 0
    pruned_OI = sparsegpt(weight_OI, gram_II, 4 / 128)
    assert ((pruned_OI == 0).nonzero()[:, 1] == 5).all()
    assert torch.equal(pruned_OI != 0, torch.arange(32).expand(4, 32) != 5)
    all_dead_OI = sparsegpt(weight_OI, torch.zeros(32, 32), 0.5)
    assert (all_dead_OI == 0).sum() == 64
    assert torch.equal(all_dead_OI[all_dead_OI != 0], weight_OI[all_dead_OI != 0])


def test_fewer_rows_than_channels_are_enough() -> None:
    weight_OI, gram_II = random_weight(8, 64), random_gram(64, 3)
    pruned_OI = sparsegpt(weight_OI, gram_II, 0.5)
    assert torch.isfinite(pruned_OI).all()
    magnitude_OI = weight_OI * magnitude_keep_mask(weight_OI, 0.5)
    assert squared_error(pruned_OI - weight_OI, gram_II) < 0.1 * squared_error(
        magnitude_OI - weight_OI, gram_II
    )


def test_what_cannot_be_pruned_is_refused() -> None:
    gram_II = random_gram(6, 10)
    with pytest.raises(ValueError, match="no multiple of 4"):
        sparsegpt(torch.ones(2, 6), gram_II, NM(2, 4))
    with pytest.raises(ValueError, match="sparsity"):
        sparsegpt(torch.ones(2, 6), gram_II, 1.0)
    with pytest.raises(ValueError, match="gram is of 6"):
        sparsegpt(torch.ones(2, 4), gram_II, 0.5)
    with pytest.raises(ValueError, match="finite"):
        sparsegpt(torch.full((2, 6), torch.nan), gram_II, 0.5)
