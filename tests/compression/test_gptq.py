"""GPTQ against round-to-nearest, a hand-worked example and a sweep that inverts afresh for every weight."""

from typing import Any

import pytest
import torch
from torch import Tensor

from compression.inverse_hessian import squared_error
from compression.quantization.gptq import gptq
from compression.quantization.int4 import QuantizedWeight, dequantize, round_to_nearest
from compression.quantization.ranges import round_in_best_range
from tests.compression.test_inverse_hessian import random_gram
from tests.reference import optimal_brain


def random_weight(num_rows: int, num_channels: int, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, num_channels, generator=generator).bfloat16()


def assert_equal(actual: QuantizedWeight, expected: QuantizedWeight) -> None:
    assert torch.equal(actual.codes_OI, expected.codes_OI)
    assert torch.equal(actual.scale_OG, expected.scale_OG)
    assert actual.scale_OG.dtype == expected.scale_OG.dtype
    if expected.zero_point_OG is None:
        assert actual.zero_point_OG is None
    else:
        assert actual.zero_point_OG is not None
        assert torch.equal(actual.zero_point_OG, expected.zero_point_OG)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("num_rows", "num_channels"), [(1, 32), (5, 96), (17, 320)])
def test_uncorrelated_inputs_give_rounding_in_the_best_range_exactly(
    num_rows: int, num_channels: int, symmetric: bool
) -> None:
    weight_OI = random_weight(num_rows, num_channels)
    settings: dict[str, Any] = {"symmetric": symmetric, "scale_dtype": torch.bfloat16}
    for importance_I in (torch.ones(num_channels), torch.arange(num_channels).float()):
        actual = gptq(weight_OI, torch.diag(importance_I), 32, **settings)
        assert_equal(actual, round_in_best_range(weight_OI, importance_I, 32, **settings))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("num_rows", [20, 400])
@pytest.mark.parametrize("seed", range(5))
def test_it_never_loses_more_than_round_to_nearest(
    seed: int, num_rows: int, symmetric: bool
) -> None:
    weight_OI, gram_II = random_weight(24, 128, seed), random_gram(128, num_rows, seed)
    nearest = round_to_nearest(weight_OI, 32, symmetric=symmetric, scale_dtype=torch.float32)
    chosen = gptq(weight_OI, gram_II, 32, symmetric=symmetric, scale_dtype=torch.float32)
    assert chosen.codes_OI.min() >= -8
    assert chosen.codes_OI.max() <= 7
    error = squared_error(dequantize(chosen) - weight_OI, gram_II)
    assert error < squared_error(dequantize(nearest) - weight_OI, gram_II)


def test_two_rows_worked_by_hand() -> None:
    # 15/16 of the range has scale 15/16 * 8 / 7.5 = 1, which loses least of all shares: 0.64 in row 0, where the whole
    # range loses 0.69, and 0.64 in row 1, where 14/16 loses 0.75.
    # Inputs 0 and 1 correlate: an error d of the first moves the second by d H_01 / H_11 = d / 2.
    # Row 0: 1.4 -> 1, so 2.4 becomes 2.6 -> 3. Row 1: 0.6 -> 1, so 0.6 becomes 0.4 -> 0.
    weight_OI = torch.tensor([[1.4, 2.4, -3.0, -8.0], [0.6, 0.6, 2.0, -8.0]])
    gram_II = torch.tensor(
        [[2.0, 1.0, 0.0, 0.0], [1.0, 2.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]]
    )
    quantized = gptq(
        weight_OI, gram_II, 4, symmetric=True, scale_dtype=torch.float32, dampening=0.0
    )
    assert quantized.scale_OG.tolist() == [[1.0], [1.0]]
    assert quantized.codes_OI.tolist() == [[1, 3, -3, -8], [1, 0, 2, -8]]


@pytest.mark.parametrize("symmetric", [True, False])
def test_it_equals_a_sweep_that_inverts_for_every_weight(symmetric: bool) -> None:
    weight_OI, gram_II = random_weight(3, 48), random_gram(48, 100)
    settings: dict[str, Any] = {"symmetric": symmetric, "scale_dtype": torch.float32}
    order_I = gram_II.diagonal().argsort(descending=True, stable=True)
    hessian_II = optimal_brain.dampen(gram_II, 0.1)[order_I][:, order_I]
    ranges = round_in_best_range(weight_OI, gram_II.diagonal(), 16, **settings)

    def choose(j: int, current_OI: Tensor) -> Tensor:
        group = int(order_I[j]) // 16
        scale_O = ranges.scale_OG[:, group].double()
        zero_O = 0 if ranges.zero_point_OG is None else ranges.zero_point_OG[:, group]
        codes_O = (current_OI[:, j] / scale_O + zero_O).round().clamp(-8, 7)
        return (codes_O - zero_O) * scale_O

    expected = optimal_brain.fix_columns(weight_OI[:, order_I], hessian_II, choose)
    quantized = gptq(weight_OI, gram_II, 16, **settings)
    torch.testing.assert_close(
        dequantize(quantized)[:, order_I].double(), expected, rtol=1e-4, atol=1e-4
    )


def test_dead_inputs_keep_their_weights_and_zero_rows_stay_zero() -> None:
    weight_OI, gram_II = random_weight(4, 64), random_gram(64, 30)
    weight_OI[2] = 0
    gram_II[7] = gram_II[:, 7] = 0
    quantized = gptq(weight_OI, gram_II, 32, symmetric=True, scale_dtype=torch.bfloat16)
    ranges = round_in_best_range(
        weight_OI, gram_II.diagonal(), 32, symmetric=True, scale_dtype=torch.bfloat16
    )
    assert torch.equal(quantized.codes_OI[:, 7], ranges.codes_OI[:, 7])
    assert dequantize(quantized)[2].count_nonzero() == 0


def test_what_cannot_be_quantized_is_refused() -> None:
    gram_II = random_gram(32, 40)
    with pytest.raises(ValueError, match="no multiple"):
        gptq(torch.ones(2, 32), gram_II, 24, symmetric=True, scale_dtype=torch.float32)
    with pytest.raises(ValueError, match="gram is of 32"):
        gptq(torch.ones(2, 64), gram_II, 32, symmetric=True, scale_dtype=torch.float32)
    with pytest.raises(ValueError, match="finite"):
        gptq(torch.full((2, 32), torch.inf), gram_II, 32, symmetric=True, scale_dtype=torch.float32)
