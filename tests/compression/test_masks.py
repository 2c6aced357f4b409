"""Magnitude and Wanda masks against loops over single weights; ties, edges and refusals."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from compression.pruning.magnitude import global_keep_masks, magnitude_keep_mask
from compression.pruning.masks import NM, Sparsity
from compression.pruning.wanda import wanda_keep_mask
from tests.reference import pruning as reference

SHAPES = [(1, 1), (1, 8), (7, 1), (5, 33), (16, 64)]
SPARSITIES = [0.0, 0.1, 0.5, 0.61, 0.999]


def random_weight(shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[1])).to(dtype)


def on_a_grid(shape: tuple[int, int]) -> Tensor:
    """Nearly all magnitudes tie."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(0)).float()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("make", [random_weight, on_a_grid])
def test_masks_equal_the_naive_ones_exactly(
    shape: tuple[int, int], sparsity: float, make: Callable[[tuple[int, int]], Tensor]
) -> None:
    weight_OI = make(shape)
    norm_I = torch.rand(shape[1], generator=torch.Generator().manual_seed(1))
    score_OI = weight_OI.float().abs()
    assert torch.equal(
        magnitude_keep_mask(weight_OI, sparsity, scope="row"),
        reference.keep_mask(score_OI, sparsity),
    )
    assert torch.equal(
        magnitude_keep_mask(weight_OI, sparsity),
        reference.keep_mask(score_OI.reshape(1, -1), sparsity).reshape(shape),
    )
    assert torch.equal(
        wanda_keep_mask(weight_OI, norm_I, sparsity),
        reference.keep_mask(score_OI * norm_I, sparsity),
    )


@pytest.mark.parametrize("n_m", [NM(2, 4), NM(4, 8), NM(1, 2), NM(4, 4)])
@pytest.mark.parametrize("make", [random_weight, on_a_grid])
def test_n_m_masks_equal_the_naive_ones_exactly(
    n_m: NM, make: Callable[[tuple[int, int]], Tensor]
) -> None:
    weight_OI = make((9, 48))
    norm_I = torch.rand(48, generator=torch.Generator().manual_seed(1))
    score_OI = weight_OI.float().abs()
    keep_OI = magnitude_keep_mask(weight_OI, n_m)
    assert torch.equal(keep_OI, reference.keep_mask_n_m(score_OI, n_m.n, n_m.m))
    assert (keep_OI.reshape(9, -1, n_m.m).sum(dim=2) == n_m.n).all()
    assert torch.equal(
        wanda_keep_mask(weight_OI, norm_I, n_m),
        reference.keep_mask_n_m(score_OI * norm_I, n_m.n, n_m.m),
    )


def test_a_row_worked_by_hand() -> None:
    # scores 4, 3, 2, 5: with the norms the small first weight outlives the large last ones
    weight_OI = torch.tensor([[1.0, -1.5, 2.0, -2.5]])
    norm_I = torch.tensor([4.0, 2.0, 1.0, 2.0])
    assert wanda_keep_mask(weight_OI, norm_I, 0.5).tolist() == [[True, False, False, True]]
    assert magnitude_keep_mask(weight_OI, 0.5).tolist() == [[False, False, True, True]]


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("make", [random_weight, on_a_grid])
def test_one_threshold_for_all_equals_one_matrix_of_them_all(
    sparsity: float, make: Callable[[tuple[int, int]], Tensor]
) -> None:
    weights = [make(shape) * scale for shape, scale in zip(SHAPES, (1, 2, 3, 1, 0.5), strict=True)]
    together = torch.cat([weight.float().flatten() for weight in weights])[None]
    expected = magnitude_keep_mask(together, sparsity)[0]
    masks = list(global_keep_masks(weights, sparsity))
    assert [mask.shape for mask in masks] == [weight.shape for weight in weights]
    assert torch.equal(torch.cat([mask.flatten() for mask in masks]), expected)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, float("nan")])
def test_a_sparsity_out_of_range_is_refused(sparsity: float) -> None:
    with pytest.raises(ValueError, match="sparsity"):
        magnitude_keep_mask(torch.ones(2, 2), sparsity)
    with pytest.raises(ValueError, match="sparsity"):
        list(global_keep_masks([torch.ones(2, 2)], sparsity))


@pytest.mark.parametrize("sparsity", [0.5, NM(1, 2)])
def test_weights_and_norms_that_are_not_finite_are_refused(sparsity: Sparsity) -> None:
    bad = torch.tensor([[1.0, torch.nan]])
    with pytest.raises(ValueError, match="finite"):
        magnitude_keep_mask(bad, sparsity)
    with pytest.raises(ValueError, match="finite"):
        wanda_keep_mask(torch.ones(1, 2), bad[0], sparsity)
    with pytest.raises(ValueError, match="finite"):
        list(global_keep_masks([bad], 0.5))
    with pytest.raises(ValueError, match="2 finite values"):
        wanda_keep_mask(torch.ones(1, 2), torch.ones(3), sparsity)


def test_patterns_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="no multiple of 4"):
        magnitude_keep_mask(torch.ones(2, 6), NM(2, 4))
    with pytest.raises(ValueError, match="0 < N <= M"):
        NM(3, 2)
    with pytest.raises(ValueError, match="matrix"):
        magnitude_keep_mask(torch.ones(6), 0.5)
