"""Streaming statistics against the same formulas over all rows at once, in float64."""

import pytest
import torch
from torch import Tensor

from compression.statistics import InputStatistics


def sequences(seed: int, *, offset: float = 0.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 5, generator=generator) * 3 + offset for n in (1, 7, 64, 2)]


def collect(batches: list[Tensor], *, gram: bool = False) -> InputStatistics:
    statistics = InputStatistics(name="x", num_channels=batches[0].shape[-1], gram=gram)
    for x in batches:
        statistics.add(x)
    return statistics


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_every_statistic_equals_the_formula_over_all_rows(offset: float) -> None:
    batches = sequences(0, offset=offset)
    rows = torch.cat(batches).double()
    statistics = collect(batches, gram=True)
    assert statistics.num_rows == 74
    torch.testing.assert_close(statistics.mean_I, rows.mean(dim=0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(statistics.mean_abs_I, rows.abs().mean(dim=0), rtol=1e-6, atol=0)
    torch.testing.assert_close(statistics.norm.double(), rows.norm(dim=0), rtol=1e-6, atol=0)
    torch.testing.assert_close(statistics.variance.double(), rows.var(dim=0), rtol=1e-5, atol=0)
    assert statistics.gram_II is not None
    torch.testing.assert_close(statistics.gram_II.double(), rows.T @ rows, rtol=1e-5, atol=1e-3)
    per_sequence = torch.stack([x.double().abs().mean(dim=0) for x in batches])
    torch.testing.assert_close(
        statistics.activation.double(), per_sequence.norm(dim=0), rtol=1e-6, atol=0
    )


def test_how_sequences_are_batched_makes_no_difference() -> None:
    x_BNI = torch.randn(6, 9, 5, generator=torch.Generator().manual_seed(1))
    whole, single = collect([x_BNI]), collect(list(x_BNI))
    for name in ("mean_I", "mean_abs_I", "norm", "variance", "activation"):
        torch.testing.assert_close(getattr(whole, name), getattr(single, name))


def test_bfloat16_rows_are_summed_in_higher_precision() -> None:
    x_NI = torch.full((4096, 2), 1.0078125, dtype=torch.bfloat16)
    statistics = collect([x_NI, x_NI], gram=True)
    assert statistics.gram_II is not None
    # float32 sums round too, in an order that is the CPU's; bfloat16 would stop at 256
    assert float(statistics.gram_II[0, 1]) == pytest.approx(8192 * 1.0078125**2, rel=1e-4)
    assert statistics.variance.tolist() == [0, 0]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_value_that_is_not_finite_is_refused_by_name_and_changes_nothing(bad: float) -> None:
    statistics = InputStatistics(name="model.layers.3.mlp.down_proj", num_channels=4)
    statistics.add(torch.ones(2, 4))
    x_NI = torch.ones(3, 4)
    x_NI[1, 2] = bad
    with pytest.raises(ValueError, match=r"model\.layers\.3\.mlp\.down_proj.* channel 2 "):
        statistics.add(x_NI)
    assert statistics.num_rows == 2
    assert statistics.mean_I.tolist() == [1, 1, 1, 1]


def test_rows_of_another_width_and_too_few_rows_are_refused() -> None:
    statistics = InputStatistics(name="x", num_channels=4)
    for shape in ((2, 5), (4,), (0, 4), (1, 1, 1, 4)):
        with pytest.raises(ValueError, match="rows of 4 channels"):
            statistics.add(torch.ones(shape))
    statistics.add(torch.ones(1, 4))
    with pytest.raises(ValueError, match="2 rows"):
        _ = statistics.variance
