"""2:4 sparsity on disk: a row worked by hand, compressed-tensors' masks, and what a broken mask does."""

from pathlib import Path

import pytest
import torch
from compressed_tensors.utils.helpers import pack_bitmasks

from compression.checkpoint import Matrix, TwoFourLinear, open_checkpoint, verify_checkpoint
from compression.encoding import decode, encode_two_four
from compression.hf import load_model, read_config
from compression.pipeline import compress
from compression.pruning.masks import NM, keep_mask
from compression.pruning.two_four import from_tensors, to_tensors
from compression.recipe import parse_recipe
from compression.safetensors_header import CheckpointError
from tests.compression.models import save_and_import, tiny_decoder


def test_a_row_worked_by_hand() -> None:
    # 5 and 6 at 1 and 2; then one value, 7 at 3, and a zero that fills up at 0
    row = torch.tensor([[0.0, 5.0, 6.0, 0.0, 0.0, 0.0, 0.0, 7.0]])
    tensors = to_tensors(row)
    assert tensors["compressed"].tolist() == [[5, 6, 0, 7]]
    assert tensors["bitmask"].tolist() == [[0b1001_0110]]
    assert tensors["shape"].tolist() == [1, 8]
    assert torch.equal(from_tensors(tensors), row)


@pytest.mark.parametrize("shape", [(1, 4), (3, 12), (17, 32), (5, 100)])
def test_masks_are_those_of_compressed_tensors(shape: tuple[int, int]) -> None:
    weight_OI = torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    weight_OI *= keep_mask(weight_OI.float().abs(), NM(2, 4), scope="row")
    tensors = to_tensors(weight_OI)
    assert torch.equal(tensors["bitmask"], pack_bitmasks(weight_OI != 0))
    assert torch.equal(tensors["compressed"].flatten(), weight_OI[weight_OI != 0])
    assert torch.equal(from_tensors(tensors), weight_OI)


def test_what_is_not_two_four_is_refused() -> None:
    with pytest.raises(ValueError, match="not 2:4"):
        to_tensors(torch.ones(1, 4))
    with pytest.raises(CheckpointError, match="multiple of 4"):
        TwoFourLinear(out_features=2, in_features=6, dtype="F32")
    kind, tensors = encode_two_four(torch.eye(4), "F32")
    tensors["bitmask"] |= 255
    with pytest.raises(CheckpointError, match="bitmask"):
        decode(kind, tensors)
    row = Matrix(name="x", linear=kind).to_json()
    factors = {"kind": "low_rank", "bias": False, "weight_u": row, "weight_v": row}
    with pytest.raises(CheckpointError, match="a factor must be"):
        Matrix.from_json(row | factors)


def test_a_two_four_checkpoint_is_smaller_and_gives_the_logits_of_its_zeros(tmp_path: Path) -> None:
    source = save_and_import(tiny_decoder(), tmp_path / "hf", tmp_path / "models")
    recipe = parse_recipe([{"magnitude": {"sparsity": "2:4"}}])
    manifest = compress(source, tmp_path / "small", recipe, source_id="tiny")
    assert verify_checkpoint(tmp_path / "small").problems == ()
    assert {row.linear.kind for row in manifest.matrices} == {"two_four"}
    assert all(row.sparsity >= 0.5 for row in manifest.matrices)
    before = open_checkpoint(source).manifest
    for row, old in zip(manifest.matrices, before.matrices, strict=True):
        values = row.linear.out_features * row.linear.in_features
        assert (
            row.num_bytes == old.num_bytes - 2 * values + values // 8 + 16
        )  # float32, and the shape
    model = load_model(source, dtype=torch.float32)
    for row in manifest.matrices:
        weight_OI = model.get_submodule(row.name).weight
        weight_OI *= keep_mask(weight_OI.abs(), NM(2, 4), scope="row")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        torch.testing.assert_close(
            load_model(tmp_path / "small", dtype=torch.float32)(ids).logits, model(ids).logits
        )


def test_quantized_afterwards_it_is_stored_by_its_codes(tmp_path: Path) -> None:
    """in_features 192 of down_proj is no multiple of 128: its zeros are stored again."""
    source = save_and_import(tiny_decoder(), tmp_path / "hf", tmp_path / "models")
    recipe = parse_recipe([{"magnitude": {"sparsity": "2:4"}}, {"int4": {"group_size": 64}}])
    manifest = compress(source, tmp_path / "small", recipe, source_id="tiny")
    assert {row.linear.kind for row in manifest.matrices} == {"int4"}
    config = read_config(tmp_path / "small")
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert "transformers_weights" not in config
    recipe = parse_recipe([{"magnitude": {"sparsity": "2:4"}}, {"int4": {"group_size": 128}}])
    manifest = compress(source, tmp_path / "mixed", recipe, source_id="tiny")
    kinds = {row.name.rpartition(".")[2]: row.linear.kind for row in manifest.matrices}
    assert set(kinds.values()) == {"dense"}
    assert all("no multiple of 128" in (row.dense_reason or "") for row in manifest.matrices)
