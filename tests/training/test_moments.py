"""Adam's moments in 32 and in 8 bits."""

import pytest
import torch

from training.q_galore.moments import (
    BlockCodes,
    Moments,
    decode,
    encode_signed,
    encode_unsigned,
    zero_moments,
)
from training.q_galore.sizes import moment_bytes

CPU = torch.device("cpu")


def test_codes_by_hand() -> None:
    values = torch.tensor([1.0, -0.25, 0.0, 1e-9])
    signed = encode_signed(values)
    assert signed.codes[0, :4].tolist() == [127, -64, 0, 0]  # round(127 / 2) to even
    assert float(decode(signed)[0, 1]) == pytest.approx(-((64 / 127) ** 2))
    unsigned = encode_unsigned(torch.tensor([16.0, 1.0, 0.0, 1e-20]))
    # fourth roots of 1, 1/16, 0, and of something that must not become zero
    assert unsigned.codes[0, :4].tolist() == [255, 128, 0, 1]
    assert unsigned.largest_B.tolist() == [16.0]


@pytest.mark.parametrize("shape", [(4096,), (64, 65), (17, 300)])
def test_what_is_kept_of_a_moment(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=generator) * torch.rand(shape, generator=generator) ** 4
    restored = decode(encode_signed(values)).flatten()[: values.numel()].view(shape)
    # relative error 1 / code: exact to a percent near the largest, to a quarter of a step of 1/127^2 near zero
    error = (restored - values).abs()
    assert (
        float((error / (values.abs().sqrt() * values.abs().max().sqrt() / 127 + 1e-4)).max()) < 1.1
    )
    squares = values.square()
    restored = decode(encode_unsigned(squares)).flatten()[: values.numel()].view(shape)
    assert ((restored > 0) == (squares > 0)).all()
    large = squares > squares.max() / 1000
    assert float((restored / squares - 1).abs()[large].max()) < 0.06


def test_bytes() -> None:
    assert moment_bytes(4095, 8) == moment_bytes(4095, 32) == 8 * 4095
    assert moment_bytes(4096, 8) == 2 * (4096 + 16 * 4)
    for shape in ((64, 65), (100,)):
        moments = zero_moments(torch.Size(shape), 8, CPU)
        held = 0
        for moment in (moments.first, moments.second):
            tensors = (
                (moment.codes, moment.largest_B) if isinstance(moment, BlockCodes) else (moment,)
            )
            held += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        assert held == moment_bytes(torch.Size(shape).numel(), 8)


def test_eight_bits_follow_thirty_two() -> None:
    """Noisy gradients of very unequal size: the path of 200 steps stays within a few percent."""
    generator = torch.Generator().manual_seed(0)
    size = torch.logspace(-6, 0, 64)[:, None] * torch.ones(64, 80)
    ends = []
    shape = torch.Size((64, 80))
    for moments in (zero_moments(shape, 32, CPU), zero_moments(shape, 8, CPU)):
        generator.manual_seed(1)
        weight = torch.zeros(64, 80)
        for _ in range(200):
            gradient = size * (1 + torch.randn(64, 80, generator=generator))
            weight += moments.update(gradient, 1e-3)
        ends.append(weight)
    assert isinstance(moments.first, BlockCodes)
    exact, coarse = ends
    assert float((coarse - exact).norm() / exact.norm()) < 0.05


def test_it_is_torchs_adamw_to_the_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(33, 7, generator=generator))
    ours = weight.detach().clone()
    oracle = torch.optim.AdamW([weight], lr=1e-3, weight_decay=0.1, foreach=False)
    moments = Moments(torch.zeros(33, 7), torch.zeros(33, 7))
    for _ in range(50):
        weight.grad = torch.randn(33, 7, generator=generator)
        gradient = weight.grad.clone()
        oracle.step()
        ours.mul_(1 - 1e-3 * 0.1).add_(moments.update(gradient, 1e-3))
        assert torch.equal(ours, weight)
