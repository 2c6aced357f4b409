"""INT8 and INT4 group codes: exact where they must be, unbiased, and as small as promised."""

import math
from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import Tensor

from training.q_galore.group_codes import (
    add_,
    add_to_bfloat16_,
    dequantize,
    quantize,
)
from training.q_galore.sizes import CodeBits, code_bytes


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=generator(1)) * 0.02


def test_a_group_by_hand() -> None:
    """Range [-1, 1.54]: INT8 steps of 0.01 from a zero point of 100; INT4 steps of 2.54 / 15 from 6."""
    tensor = torch.tensor([-1.0, 0.0, 0.333, 1.54])
    eight = quantize(tensor, 8)
    torch.testing.assert_close(eight.scale_G, torch.tensor([0.01]))
    assert eight.zero_point_G.tolist() == [100]
    assert eight.codes[0, :4].tolist() == [0, 100, 133, 254]
    four = quantize(tensor, 4)
    assert four.zero_point_G.tolist() == [6]
    # codes 0, 6, 8, 15, two to a byte, the earlier in the lower half
    assert four.codes[0, :2].tolist() == [0 + 16 * 6, 8 + 16 * 15]
    torch.testing.assert_close(dequantize(four)[3], torch.tensor(9 * 2.54 / 15))


@pytest.mark.parametrize("shape", [(1,), (255,), (256,), (257,), (3, 100), (16, 48), (1, 1024)])
@pytest.mark.parametrize("bits", [4, 8])
def test_every_value_is_within_a_step(shape: tuple[int, ...], bits: CodeBits) -> None:
    tensor = normal(*shape)
    quantized = quantize(tensor, bits)
    restored = dequantize(quantized)
    assert restored.shape == tensor.shape
    assert quantized.num_bytes == code_bytes(tensor.numel(), bits)
    flat = torch.nn.functional.pad(tensor.flatten(), (0, -tensor.numel() % 256)).view(-1, 256)
    widths = flat.amax(1).clamp(min=0) - flat.amin(1).clamp(max=0)
    # half a step, and at the ends as much again where the zero point was rounded
    bound = (widths / (254 if bits == 8 else 15)).repeat_interleave(256)[: tensor.numel()]
    assert ((restored - tensor).abs().flatten() <= bound * 1.001).all()


@pytest.mark.parametrize("center", [0.5, -0.5, 1.0])
def test_groups_of_one_sign_survive(center: float) -> None:
    """The published quantizer loses 78 to 94 % of such a group."""
    tensor = center + normal(4, 256)
    restored = dequantize(quantize(tensor, 8))
    assert float((restored - tensor).norm() / tensor.norm()) < 0.004


def test_zero_stays_zero() -> None:
    tensor = normal(8, 64) + 0.01
    tensor[:, ::3] = 0
    for four_or_eight in (quantize(tensor, 4), quantize(tensor, 8)):
        assert (dequantize(four_or_eight)[:, ::3] == 0).all()
    quantized = quantize(tensor, 8)
    update = torch.where(tensor == 0, 0, normal(8, 64).flip(0) * 5)
    for seed in range(5):
        add_(quantized, update, generator(seed))
    assert (dequantize(quantized)[:, ::3] == 0).all()
    assert (dequantize(quantize(torch.zeros(300), 8)) == 0).all()


def test_four_bits_take_half_a_byte() -> None:
    quantized = quantize(normal(576, 128), 4)
    scales = 576 * 128 // 256 * 5
    assert quantized.codes.numel() == 576 * 128 // 2
    assert quantized.num_bytes == 576 * 128 // 2 + scales


def assert_unbiased(draw: Callable[[int], Tensor], expected: Tensor, num_draws: int) -> None:
    """The mean of the draws differs from the expectation by less than 4 standard errors, over all elements."""
    draws = torch.stack([draw(seed) for seed in range(num_draws)]).double()
    errors = (draws - expected.double()).flatten(1)
    # One statistic per element; its largest over N elements exceeds 4 by chance about N times in 16,000.
    standard_errors = errors.std(dim=0) / math.sqrt(num_draws)
    z = errors.mean(dim=0)[standard_errors > 0] / standard_errors[standard_errors > 0]
    assert float(z.mean().abs()) * math.sqrt(z.numel()) < 4
    assert float(z.abs().max()) < 5


def test_stochastic_rounding_is_unbiased() -> None:
    """10,000 draws of each element, the ends of the range included."""
    tensor = normal(256)
    wide = tensor.expand(100, 256).contiguous()

    def draw(seed: int) -> Tensor:
        return dequantize(quantize(wide, 8, generator=generator(seed))).double().mean(dim=0)

    assert_unbiased(draw, tensor, 100)


def test_an_update_far_below_a_step_survives_in_expectation() -> None:
    """1e-6 on weights of 0.02, whose step is about 4e-4: nothing of it is left when rounded to nearest."""
    start = quantize(normal(40, 256), 8)
    before = dequantize(start).double()

    def draw(seed: int) -> Tensor:
        copy = deepcopy(start)
        add_(copy, torch.full((40, 256), 1e-6), generator(seed))
        return (dequantize(copy).double() - before).mean().view(1)

    assert_unbiased(draw, torch.tensor([1e-6], dtype=torch.float64), 200)
    assert ((1e-6 / start.scale_G).round() == 0).all()  # what rounding to nearest leaves of it


def test_no_update_changes_nothing_and_a_large_one_makes_a_new_grid() -> None:
    quantized = quantize(normal(3, 256), 8)
    codes, scale_G = quantized.codes.clone(), quantized.scale_G.clone()
    add_(quantized, torch.zeros(3, 256), generator())
    assert torch.equal(quantized.codes, codes)
    before = dequantize(quantized)
    update = torch.zeros(3, 256)
    update[1] = 1.0
    add_(quantized, update, generator())
    assert torch.equal(quantized.scale_G[[0, 2]], scale_G[[0, 2]])
    assert float(quantized.scale_G[1]) > 1 / 300
    error = (dequantize(quantized) - before - update).abs()
    assert float(error[1].max()) <= float(quantized.scale_G[1]) * 1.001
    assert float(error[[0, 2]].max()) == 0


def test_repeated_updates_sum_up() -> None:
    """A thousand updates of a hundredth of a step: with a new grid at every step the noise would be 15 times as
    large."""
    quantized = quantize(normal(64, 256), 8)
    before, scale = dequantize(quantized), quantized.scale_G.clone()[:, None]
    for seed in range(200):
        add_(quantized, scale * 0.01 * torch.ones(64, 256), generator(seed))
    moved = (dequantize(quantized) - before) / scale
    assert float(moved.mean()) == pytest.approx(2, abs=0.03)
    assert float(moved.std()) == pytest.approx(math.sqrt(200 * 0.01 * 0.99), rel=0.05)


def test_bfloat16_sums_are_unbiased() -> None:
    weight = normal(512).bfloat16()
    update = torch.full((512,), 1e-6)

    def draw(seed: int) -> Tensor:
        copy = weight.clone()
        add_to_bfloat16_(copy, update, generator(seed))
        return (copy.double() - weight.double()).mean().view(1)

    assert_unbiased(draw, torch.tensor([1e-6]), 2000)
    # rounded to nearest, nothing is left but in the few weights that are close to zero
    assert ((weight.float() + 1e-6).bfloat16() == weight).float().mean() > 0.98
