"""AWQ against round-to-nearest, the outputs of every calibration row, and the function that folding must not change."""

import pytest
import torch
from torch import Tensor

from compression.quantization.awq import ALPHAS, divide_outputs, search_scale, value_sources
from compression.quantization.int4 import dequantize, round_to_nearest
from compression.statistics import InputStatistics


def statistics_of(x_NI: Tensor) -> InputStatistics:
    statistics = InputStatistics(name="x", num_channels=x_NI.shape[1], gram=True)
    statistics.add(x_NI)
    return statistics


def rows_with_large_channels(num_channels: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x_NI = torch.randn(200, num_channels, generator=generator)
    x_NI[:, ::11] *= 30
    return x_NI


def output_error(x_NI: Tensor, weight_OI: Tensor, scale_I: Tensor, *, symmetric: bool) -> float:
    """By running every row."""
    quantized = round_to_nearest(
        weight_OI.float() * scale_I, 32, symmetric=symmetric, scale_dtype=torch.bfloat16
    )
    outputs = (x_NI / scale_I) @ dequantize(quantized).T
    return float((outputs - x_NI @ weight_OI.float().T).double().square().sum())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("num_rows", [1, 24])
def test_the_errors_are_those_of_the_outputs_and_smaller_than_of_round_to_nearest(
    num_rows: int, symmetric: bool
) -> None:
    x_NI = rows_with_large_channels(64)
    weights = [
        torch.randn(num_rows, 64, generator=torch.Generator().manual_seed(seed)).bfloat16()
        for seed in (1, 2)
    ]
    statistics = statistics_of(x_NI)
    assert statistics.gram_II is not None
    found = search_scale(
        weights,
        statistics.gram_II,
        statistics.mean_abs_I,
        32,
        symmetric=symmetric,
        scale_dtype=torch.bfloat16,
    )

    def total(scale_I: Tensor) -> float:
        return sum(output_error(x_NI, weight, scale_I, symmetric=symmetric) for weight in weights)

    assert found.error == pytest.approx(total(found.scale_I), rel=1e-3)
    assert found.nearest_error == pytest.approx(total(torch.ones(64)), rel=1e-3)
    assert found.error < 0.8 * found.nearest_error
    # every other exponent of the grid loses at least as much
    magnitude_I = x_NI.abs().mean(dim=0)
    for alpha in ALPHAS:
        scale_I = magnitude_I**alpha
        scale_I = scale_I / (scale_I.max() * scale_I.min()).sqrt()
        assert total(scale_I) >= found.error * 0.999
    assert found.scale_I.max() * found.scale_I.min() == pytest.approx(1, rel=1e-5)


def test_channels_of_equal_magnitude_get_scale_one_and_round_to_nearest() -> None:
    x_NI = torch.tensor([[1.0], [-1.0]]).expand(2, 32).contiguous()
    statistics = statistics_of(x_NI)
    assert statistics.gram_II is not None
    found = search_scale(
        [torch.randn(4, 32)],
        statistics.gram_II,
        statistics.mean_abs_I,
        32,
        symmetric=True,
        scale_dtype=torch.float32,
    )
    assert torch.equal(found.scale_I, torch.ones(32))
    assert found.alpha == 0
    assert found.error == found.nearest_error


def test_folding_into_a_norm_and_into_a_linear_changes_no_output() -> None:
    generator = torch.Generator().manual_seed(4)
    norm_I, weight_OI = torch.randn(8, generator=generator), torch.randn(5, 8, generator=generator)
    before_IJ, bias_I = torch.randn(8, 3, generator=generator), torch.randn(8, generator=generator)
    scale_I = torch.rand(8, generator=generator) + 0.5
    x_NI, y_NJ = torch.randn(6, 8, generator=generator), torch.randn(6, 3, generator=generator)
    torch.testing.assert_close(
        x_NI * divide_outputs(norm_I, scale_I) @ (weight_OI * scale_I).T,
        x_NI * norm_I @ weight_OI.T,
    )
    folded = y_NJ @ divide_outputs(before_IJ, scale_I).T + divide_outputs(bias_I, scale_I)
    torch.testing.assert_close(
        folded @ (weight_OI * scale_I).T, (y_NJ @ before_IJ.T + bias_I) @ weight_OI.T
    )
    assert divide_outputs(norm_I.bfloat16(), scale_I).dtype == torch.bfloat16


def test_query_heads_that_read_one_value_head_share_its_scale() -> None:
    source_I = value_sources(num_heads=6, num_key_value_heads=2, head_dim=2)
    assert source_I.tolist() == [0, 1] * 3 + [2, 3] * 3
    generator = torch.Generator().manual_seed(5)
    value_NS = torch.randn(50, 4, generator=generator) * torch.tensor([1.0, 20.0, 3.0, 0.1])
    # attention with every weight on the row itself: each query head passes its value head on
    x_NI = value_NS.reshape(50, 2, 2).repeat_interleave(3, dim=1).flatten(1)
    weight_OI = torch.randn(16, 12, generator=generator)
    statistics = statistics_of(x_NI)
    assert statistics.gram_II is not None
    found = search_scale(
        [weight_OI],
        statistics.gram_II,
        statistics.mean_abs_I,
        12,
        symmetric=True,
        scale_dtype=torch.float32,
        source_I=source_I,
    )
    assert found.scale_S.shape == (4,)
    assert torch.equal(found.scale_I, found.scale_S[source_I])
    assert found.error < found.nearest_error
    folded_NS = value_NS / found.scale_S
    folded_NI = folded_NS.reshape(50, 2, 2).repeat_interleave(3, dim=1).flatten(1)
    torch.testing.assert_close(folded_NI @ (weight_OI * found.scale_I).T, x_NI @ weight_OI.T)


def test_dead_channels_and_dead_inputs_get_finite_scales() -> None:
    x_NI = rows_with_large_channels(32)
    x_NI[:, 3] = 0
    for rows in (x_NI, torch.zeros(4, 32)):
        statistics = statistics_of(rows)
        assert statistics.gram_II is not None
        found = search_scale(
            [torch.randn(4, 32)],
            statistics.gram_II,
            statistics.mean_abs_I,
            32,
            symmetric=True,
            scale_dtype=torch.float32,
        )
        assert torch.isfinite(found.scale_I).all()
        assert (found.scale_I > 0).all()


def test_statistics_of_another_width_and_bad_weights_are_refused() -> None:
    options = (torch.eye(32), torch.ones(32), 32)
    for weight_OI, message in (
        (torch.ones(2, 64), "64 inputs"),
        (torch.full((2, 32), torch.nan), "finite"),
    ):
        with pytest.raises(ValueError, match=message):
            search_scale([weight_OI], *options, symmetric=True, scale_dtype=torch.float32)
