"""Ranges of INT4 groups against every share of the range tried by itself, and a group worked by hand."""

import pytest
import torch
from torch import Tensor

from compression.quantization.int4 import QuantizedWeight, dequantize, round_to_nearest
from compression.quantization.ranges import SHARES, round_in_best_range


def loss(quantized: QuantizedWeight, weight_OI: Tensor, importance_I: Tensor) -> float:
    return float(((dequantize(quantized) - weight_OI).square() * importance_I).sum())


def in_share(weight_OG: Tensor, share: float, *, symmetric: bool) -> QuantizedWeight:
    """One group in a share of its range, by the formula."""
    low, high = weight_OG.min().clamp(max=0), weight_OG.max().clamp(min=0)
    if symmetric:
        low, high = -torch.maximum(-low, high), torch.maximum(-low, high)
    inside_OG = weight_OG.clamp(low * share, high * share)
    size = weight_OG.shape[1]
    return round_to_nearest(inside_OG, size, symmetric=symmetric, scale_dtype=torch.bfloat16)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("num_rows", "num_groups", "size"), [(1, 1, 3), (5, 3, 32), (3, 2, 7)])
def test_each_group_takes_the_share_that_loses_least(
    num_rows: int, num_groups: int, size: int, symmetric: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(num_rows, num_groups * size, generator=generator) ** 3
    importance_I = torch.rand(num_groups * size, generator=generator)
    found = round_in_best_range(
        weight_OI, importance_I, size, symmetric=symmetric, scale_dtype=torch.bfloat16
    )
    shares = set()
    for row in range(num_rows):
        for group in range(num_groups):
            channels = slice(group * size, (group + 1) * size)
            weight_OG, importance_G = weight_OI[row : row + 1, channels], importance_I[channels]
            tried = [in_share(weight_OG, share, symmetric=symmetric) for share in SHARES]
            losses = [loss(one, weight_OG, importance_G) for one in tried]
            best = tried[losses.index(min(losses))]
            shares.add(SHARES[losses.index(min(losses))])
            assert torch.equal(found.codes_OI[row : row + 1, channels], best.codes_OI)
            assert torch.equal(found.scale_OG[row, group], best.scale_OG[0, 0])
            if symmetric:
                assert found.zero_point_OG is None
            else:
                assert found.zero_point_OG is not None
                assert best.zero_point_OG is not None
                assert torch.equal(found.zero_point_OG[row, group], best.zero_point_OG[0, 0])
    assert num_groups < 3 or len(shares) > 1


def test_a_weight_that_costs_nothing_is_cut_off() -> None:
    # -8 is what 15/16 of the range ends at exactly; the share 12/16 has scale 0.8 and -6.4 for it
    weight_OI = torch.tensor([[1.6, -2.4, 4.0, -8.0]])
    found = {
        cost: round_in_best_range(
            weight_OI,
            torch.tensor([1.0, 1.0, 1.0, cost]),
            4,
            symmetric=True,
            scale_dtype=torch.float32,
        )
        for cost in (0.0, 1.0)
    }
    assert found[0.0].scale_OG.item() == pytest.approx(0.8)
    assert found[0.0].codes_OI.tolist() == [[2, -3, 5, -8]]
    assert found[1.0].scale_OG.item() == pytest.approx(1.0)


def test_zeros_stay_zero_and_what_cannot_be_rounded_is_refused() -> None:
    zeros = round_in_best_range(
        torch.zeros(2, 8), torch.ones(8), 4, symmetric=False, scale_dtype=torch.bfloat16
    )
    assert dequantize(zeros).count_nonzero() == 0
    for weight_OI, size, match in (
        (torch.ones(2, 8), 3, "no multiple"),
        (torch.ones(2, 6), 3, "importance"),
        (torch.full((2, 8), torch.nan), 4, "finite"),
    ):
        with pytest.raises(ValueError, match=match):
            round_in_best_range(
                weight_OI, torch.ones(8), size, symmetric=True, scale_dtype=torch.float32
            )
