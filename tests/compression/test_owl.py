"""OWL against numbers worked by hand, and its target kept whatever the blocks are like."""

import itertools

import pytest
import torch

from compression.pruning.owl import SPREAD, block_patterns, block_sparsities, outlier_share


def test_outliers_are_counted_over_all_matrices_of_a_block() -> None:
    # scores 1 x 6, then 2 * 15 and 1: mean 37 / 8 = 4.625, and 30 alone is above 5 times that
    weights = [torch.ones(2, 3), torch.tensor([[-2.0, 1.0]])]
    norms = [torch.ones(3), torch.tensor([15.0, 1.0])]
    assert outlier_share(weights, norms) == 1 / 8
    with pytest.raises(ValueError, match="finite"):
        outlier_share([torch.full((1, 1), torch.nan)], [torch.ones(1)])


def test_sparsities_worked_by_hand() -> None:
    # densities raised by 0, 0.08 and 0.16, less their mean of 0.08
    found = block_sparsities([0.01, 0.02, 0.03], [5, 5, 5], 0.5)
    assert found == pytest.approx([0.58, 0.5, 0.42])
    assert block_sparsities([0.02, 0.02], [1, 9], 0.3) == [0.3, 0.3]


@pytest.mark.parametrize("sparsity", [0.01, 0.05, 0.5, 0.95, 0.99])
def test_the_weighed_mean_is_the_target_and_nothing_leaves_its_range(sparsity: float) -> None:
    generator = torch.Generator().manual_seed(1)
    shares = torch.rand(12, generator=generator).square().tolist()
    sizes = torch.randint(1, 100, (12,), generator=generator).tolist()
    found = block_sparsities(shares, sizes, sparsity)
    mean = sum(value * size for value, size in zip(found, sizes, strict=True)) / sum(sizes)
    assert mean == pytest.approx(sparsity)
    assert all(-1e-9 <= value < 1 for value in found)
    assert max(found) - min(found) <= 2 * SPREAD + 1e-9
    order = sorted(range(12), key=lambda block: shares[block])
    assert all(found[a] >= found[b] for a, b in itertools.pairwise(order))
    with pytest.raises(ValueError, match="sparsity"):
        block_sparsities(shares, sizes, 1.0)


def test_patterns_keep_the_mean() -> None:
    # of 8 inputs 3.36, 4 and 4.64 would stay; the largest remainder gets the one that is left
    assert block_patterns([0.58, 0.5, 0.42], 4, 8) == [3, 4, 5]
    assert block_patterns([0.5, 0.5], 4, 8) == [4, 4]
    assert block_patterns([0.99, 0.01], 1, 2) == [1, 1]
