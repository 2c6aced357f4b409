"""NF4 through bitsandbytes against the definition, and the refusal without it."""

import importlib.util

import pytest
import torch

from compression.quantization.int4 import dequantize, round_to_nearest
from evaluation.nf4 import BLOCK_SIZE, Nf4UnavailableError, apply_nf4
from tests.compression.models import tiny_decoder

# Quantiles of the normal distribution, as QLoRA's appendix E lists them.
CODES = torch.tensor(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
        0.7229568362236023, 1.0,
    ]
)  # fmt: skip


def test_weights_are_the_nearest_codes_times_the_largest_of_their_block() -> None:
    pytest.importorskip("bitsandbytes")
    model = tiny_decoder()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    num_bytes = apply_nf4(model)
    num_weights = 0
    for name, parameter in model.named_parameters():
        if ".layers." not in name or not name.endswith("proj.weight"):
            assert torch.equal(parameter, before[name])
            continue
        blocks = before[name].reshape(-1, BLOCK_SIZE)
        scale = blocks.abs().amax(dim=1, keepdim=True)
        nearest = CODES[((blocks / scale)[..., None] - CODES).abs().argmin(dim=-1)] * scale
        torch.testing.assert_close(parameter.reshape(blocks.shape), nearest, atol=1e-5, rtol=1e-4)
        int4 = round_to_nearest(before[name], 64, symmetric=True, scale_dtype=torch.float32)
        error = (parameter - before[name]).norm()
        assert error < (dequantize(int4) - before[name]).norm()  # normal weights are what it is for
        num_weights += parameter.numel()
    assert num_bytes == num_weights // 2 + 4 * num_weights // BLOCK_SIZE


def test_without_bitsandbytes_it_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(Nf4UnavailableError, match="bitsandbytes"):
        apply_nf4(tiny_decoder())
