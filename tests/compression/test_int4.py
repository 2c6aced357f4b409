"""INT4 against a hand-worked row, compressed-tensors' packer, and plain transformers."""

from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

from compression.checkpoint import verify_checkpoint
from compression.hf import load_model
from compression.import_model import import_folder
from compression.linear import CpuInt4Linear, QuantizedLinear, cpu_int4_applies
from compression.pipeline import compress
from compression.quantization.int4 import (
    dequantize,
    from_tensors,
    pack_int4,
    round_to_nearest,
    to_tensors,
    unpack_int4,
)
from compression.recipe import parse_recipe
from compression.registry import ModelRegistry
from compression.safetensors_header import CheckpointError


def test_a_row_worked_by_hand() -> None:
    # range [-1, 2], so scale 3 / 15 = 0.2 and zero point -8 + 1 / 0.2 = -3
    row = torch.tensor([[-1.0, 0.0, 0.6, 2.0]])
    quantized = round_to_nearest(row, 4, symmetric=False, scale_dtype=torch.float32)
    assert quantized.zero_point_OG is not None
    assert quantized.zero_point_OG.tolist() == [[-3]]
    assert quantized.codes_OI.tolist() == [[-8, -3, 0, 7]]
    torch.testing.assert_close(dequantize(quantized)[0, 0], torch.tensor(-1.0))


@pytest.mark.parametrize("symmetric", [False, True])
def test_error_is_at_most_half_a_step(symmetric: bool) -> None:
    weight_OI = torch.randn(17, 96, generator=torch.Generator().manual_seed(1))
    quantized = round_to_nearest(weight_OI, 32, symmetric=symmetric, scale_dtype=torch.float32)
    step_OI = quantized.scale_OG.repeat_interleave(32, dim=1)
    assert ((dequantize(quantized) - weight_OI).abs() <= step_OI * 1.001).all()


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (8, 8), (17, 33), (830, 545)])
def test_packing_is_bit_equal_to_compressed_tensors(shape: tuple[int, int]) -> None:
    codes = torch.randint(-8, 8, shape, dtype=torch.int8)
    assert torch.equal(pack_int4(codes), pack_to_int32(codes, 4))
    assert torch.equal(unpack_int4(pack_int4(codes), shape[1]), codes)
    packed_rows = pack_int4(codes.T).T.contiguous()
    assert torch.equal(packed_rows, pack_to_int32(codes, 4, packed_dim=0))


def test_a_group_of_zeros_stays_zero() -> None:
    quantized = round_to_nearest(
        torch.zeros(2, 32), 32, symmetric=False, scale_dtype=torch.bfloat16
    )
    assert dequantize(quantized).abs().max() == 0


def test_what_cannot_be_quantized_is_refused() -> None:
    with pytest.raises(ValueError, match="no multiple"):
        round_to_nearest(torch.ones(2, 33), 32, symmetric=False, scale_dtype=torch.float32)
    with pytest.raises(ValueError, match="finite"):
        round_to_nearest(
            torch.full((2, 32), torch.nan), 32, symmetric=False, scale_dtype=torch.float32
        )


@pytest.mark.parametrize(("rows", "out_features", "groups"), [(1, 16, 1), (3, 48, 3), (129, 80, 2)])
def test_the_cpu_kernel_agrees_with_the_reference(
    rows: int, out_features: int, groups: int
) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight_OI = torch.randn(out_features, 32 * groups, generator=generator).bfloat16()
    x_NI = torch.randn(rows, 32 * groups, generator=generator).bfloat16()
    quantized = round_to_nearest(weight_OI, 32, symmetric=False, scale_dtype=torch.bfloat16)
    assert cpu_int4_applies(out_features, 32)
    exact = x_NI.float() @ dequantize(quantized).T
    reference = (QuantizedLinear(quantized, None)(x_NI).float() - exact).norm() / exact.norm()
    actual = (CpuInt4Linear(quantized, None)(x_NI).float() - exact).norm() / exact.norm()
    assert actual < max(2 * reference, 0.01)


def test_the_checkpoint_verifies_and_loads_in_plain_transformers(
    tiny_llama: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    registry = ModelRegistry(tmp_path / "models")
    import_folder(registry, "tiny", tiny_llama, report=lambda _: None)
    folder = tmp_path / "int4"
    recipe = parse_recipe([{"int4": {"group_size": 32}}])
    manifest = compress(registry.get("tiny").path, folder, recipe, source_id="tiny")
    assert verify_checkpoint(folder).problems == ()
    kinds = {matrix.name: matrix.linear.kind for matrix in manifest.matrices}
    assert kinds["model.layers.0.mlp.up_proj"] == "int4"
    assert kinds["lm_head"] == "dense"
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        ours = load_model(folder, dtype=torch.float32)(ids).logits
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        theirs = plain(ids).logits
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_tensors_survive_the_round_trip() -> None:
    quantized = round_to_nearest(
        torch.randn(19, 64), 32, symmetric=False, scale_dtype=torch.bfloat16
    )
    again = from_tensors(to_tensors(quantized))
    assert torch.equal(dequantize(again), dequantize(quantized))


def test_a_changed_byte_and_a_missing_tensor_are_named(tiny_llama: Path, tmp_path: Path) -> None:
    registry = ModelRegistry(tmp_path / "models")
    import_folder(registry, "tiny", tiny_llama, report=lambda _: None)
    path = registry.get("tiny").path
    weights = path / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    assert any("sha256" in problem for problem in verify_checkpoint(path).problems)
    weights.write_bytes(raw[:-4])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_model(path)


def test_pickled_weights_and_unknown_code_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    registry = ModelRegistry(tmp_path / "models")
    folder = tmp_path / "hostile"
    folder.mkdir()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match="pickle"):
        import_folder(registry, "hostile", folder)
    assert registry.list_models() == []
