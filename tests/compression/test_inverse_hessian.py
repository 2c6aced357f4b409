"""The factor against a plain inverse, and the sweep against one that inverts afresh for every weight."""

import pytest
import torch
from torch import Tensor

from compression.inverse_hessian import dead_inputs, fix_columns, inverse_factor, squared_error
from tests.reference import optimal_brain as reference


def random_gram(num_channels: int, num_rows: int, seed: int = 0) -> Tensor:
    """Of correlated channels of very different size."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(num_channels, num_channels, generator=generator)
    scales = torch.logspace(-1, 1, num_channels)[torch.randperm(num_channels, generator=generator)]
    rows = torch.randn(num_rows, num_channels, generator=generator) @ mixing * scales
    return rows.T @ rows


@pytest.mark.parametrize(("num_channels", "num_rows"), [(1, 3), (7, 20), (64, 100), (33, 5)])
def test_the_factor_gives_the_inverse(num_channels: int, num_rows: int) -> None:
    gram_II = random_gram(
        num_channels, num_rows
    )  # singular where there are fewer rows than channels
    factor_II = inverse_factor(gram_II)
    assert torch.equal(factor_II, factor_II.triu())
    inverse_II = torch.linalg.inv(reference.dampen(gram_II, 0.01))
    torch.testing.assert_close(
        factor_II.double().T @ factor_II.double(),
        inverse_II,
        rtol=1e-5,
        atol=1e-6 * float(inverse_II.abs().max()),
    )


@pytest.mark.parametrize("block_size", [1, 5, 16, 100])
def test_the_sweep_equals_one_that_inverts_for_every_weight(block_size: int) -> None:
    gram_II = random_gram(16, 40)
    weight_OI = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    hessian_II = reference.dampen(gram_II, 0.01)
    expected = reference.fix_columns(weight_OI, hessian_II, lambda j, w: w[:, j].round())
    actual = fix_columns(
        weight_OI, inverse_factor(gram_II), lambda j, w: w[0].round(), block_size=block_size
    )
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)


def test_dead_channels_neither_give_nor_take() -> None:
    gram_II = random_gram(6, 20)
    gram_II[2] = gram_II[:, 2] = 0
    assert dead_inputs(gram_II).tolist() == [False, False, True, False, False, False]
    factor_II = inverse_factor(gram_II)
    others = [0, 1, 3, 4, 5]
    torch.testing.assert_close(
        factor_II[others][:, others], inverse_factor(gram_II[others][:, others])
    )
    assert factor_II[2].count_nonzero() == factor_II[:, 2].count_nonzero() == 1
    torch.testing.assert_close(inverse_factor(torch.zeros(3, 3)), torch.eye(3) / 1.01**0.5)


def test_what_is_no_gram_matrix_is_refused() -> None:
    with pytest.raises(ValueError, match="not positive definite"):
        inverse_factor(torch.tensor([[1.0, 2.0], [2.0, 1.0]]))
    with pytest.raises(ValueError, match="finite"):
        inverse_factor(torch.tensor([[torch.nan]]))
    with pytest.raises(ValueError, match="square"):
        inverse_factor(torch.ones(2, 3))


def test_the_squared_error_is_that_of_the_outputs() -> None:
    generator = torch.Generator().manual_seed(2)
    x_NI, delta_OI = torch.randn(9, 4, generator=generator), torch.randn(3, 4, generator=generator)
    expected = float((x_NI @ delta_OI.T).square().sum())
    assert squared_error(delta_OI, x_NI.T @ x_NI) == pytest.approx(expected, rel=1e-5)
