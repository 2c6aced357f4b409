"""INT8 against a hand-worked row, compressed-tensors' packer, and plain transformers."""

from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

from compression.checkpoint import open_checkpoint, verify_checkpoint
from compression.hf import load_model
from compression.linear import CpuInt8Linear, QuantizedLinear, build_quantized_linear
from compression.pipeline import compress
from compression.quantization.int4 import dequantize
from compression.quantization.int8 import (
    from_tensors,
    pack_int8,
    round_to_nearest_int8,
    to_tensors,
    unpack_int8,
)
from compression.recipe import parse_recipe
from tests.compression.models import save_and_import, tiny_decoder


def test_a_row_worked_by_hand() -> None:
    # scale 255 / 127.5 = 2
    quantized = round_to_nearest_int8(
        torch.tensor([[-255.0, 3.1, 0.0, 254.0]]), scale_dtype=torch.float32
    )
    assert quantized.scale_OG.tolist() == [[2.0]]
    assert quantized.codes_OI.tolist() == [[-128, 2, 0, 127]]
    assert dequantize(quantized).tolist() == [[-256.0, 4.0, 0.0, 254.0]]


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (17, 96)])
def test_error_is_at_most_half_a_step_but_at_the_largest_weight(shape: tuple[int, int]) -> None:
    weight_OI = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    quantized = round_to_nearest_int8(weight_OI, scale_dtype=torch.float32)
    error_OI = (dequantize(quantized) - weight_OI).abs() / quantized.scale_OG
    assert (error_OI <= 0.5001).all()


def test_rows_of_zeros_stay_zero_and_bad_weights_are_refused() -> None:
    weight_OI = torch.zeros(2, 5).bfloat16()
    weight_OI[1, 2] = 1
    quantized = round_to_nearest_int8(weight_OI, scale_dtype=torch.bfloat16)
    assert dequantize(quantized)[0].count_nonzero() == 0
    with pytest.raises(ValueError, match="finite"):
        round_to_nearest_int8(torch.tensor([[torch.inf]]), scale_dtype=torch.float32)


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (8, 8), (17, 33), (831, 545)])
def test_packing_is_bit_equal_to_compressed_tensors(shape: tuple[int, int]) -> None:
    codes = torch.randint(-128, 128, shape, dtype=torch.int8)
    assert torch.equal(pack_int8(codes), pack_to_int32(codes, 8))
    assert torch.equal(unpack_int8(pack_int8(codes), shape[1]), codes)
    columns = codes.T  # not contiguous
    assert torch.equal(unpack_int8(pack_int8(columns), shape[0]), columns)
    quantized = round_to_nearest_int8(torch.randn(shape), scale_dtype=torch.bfloat16)
    assert torch.equal(dequantize(from_tensors(to_tensors(quantized))), dequantize(quantized))


@pytest.mark.parametrize(
    ("rows", "shape"), [(1, (16, 32)), (3, (7, 64)), (129, (80, 96)), (2, (1, 160))]
)
def test_the_cpu_kernel_agrees_with_the_reference(rows: int, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight_OI = torch.randn(shape, generator=generator).bfloat16()
    x_NI = torch.randn(rows, shape[1], generator=generator).bfloat16()
    quantized = round_to_nearest_int8(weight_OI, scale_dtype=torch.bfloat16)
    bias_O = torch.randn(shape[0], generator=generator).bfloat16()
    exact = x_NI.float() @ dequantize(quantized).T + bias_O.float()
    kernel = build_quantized_linear(
        quantized, bias_O, dtype=torch.bfloat16, device=torch.device("cpu")
    )
    assert isinstance(kernel, CpuInt8Linear)
    reference = (QuantizedLinear(quantized, bias_O)(x_NI).float() - exact).norm() / exact.norm()
    actual = (kernel(x_NI).float() - exact).norm() / exact.norm()
    assert actual < 2 * reference + 1e-3
    odd = round_to_nearest_int8(weight_OI[:, :-1], scale_dtype=torch.bfloat16)
    fallback = build_quantized_linear(odd, None, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert isinstance(fallback, QuantizedLinear)


def test_the_checkpoint_verifies_and_loads_in_plain_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = save_and_import(tiny_decoder(), tmp_path / "hf", tmp_path / "models")
    folder = tmp_path / "int8"
    manifest = compress(source, folder, parse_recipe([{"int8": {}}]), source_id="tiny")
    assert verify_checkpoint(folder).problems == ()
    assert {row.linear.kind for row in manifest.matrices} == {"int8"}
    before, after = open_checkpoint(source), open_checkpoint(folder)
    for row in manifest.matrices:
        stored = dequantize(from_tensors(after.linear_tensors(row)))
        exact = before.tensor(f"{row.name}.weight")
        step_O1 = exact.abs().amax(dim=1, keepdim=True) / 127.5
        assert ((stored - exact).abs() <= step_O1 * 0.5001).all()
    ids = torch.tensor([[5, 6, 7, 8]])
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        ours = load_model(folder, dtype=torch.float32)(ids).logits
        torch.testing.assert_close(ours, plain(ids).logits, atol=1e-4, rtol=1e-4)
