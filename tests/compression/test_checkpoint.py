"""The format: versions, low-rank layers of every kind, blocks of unequal shape."""

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from compression.checkpoint import (
    LAYER_SHAPES,
    CheckpointWriter,
    DenseLinear,
    FactorKind,
    Int4Linear,
    LinearKind,
    LowRankLinear,
    Manifest,
    Matrix,
    factor_suffix,
    open_checkpoint,
    read_manifest,
    verify_checkpoint,
)
from compression.hf import load_model, read_config
from compression.import_model import import_folder
from compression.quantization.int4 import dequantize, round_to_nearest, to_tensors
from compression.registry import ModelRegistry
from compression.safetensors_header import CheckpointError

GOLDEN = Path(__file__).parent / "golden"


def test_a_version_of_the_future_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "future"
    shutil.copytree(GOLDEN / "int4", folder)
    data = json.loads((folder / "lathe.json").read_text())
    (folder / "lathe.json").write_text(json.dumps(data | {"format_version": 99}))
    with pytest.raises(CheckpointError, match="format_version 99"):
        read_manifest(folder)


def factor(
    weight: Tensor, kind: str, *, symmetric: bool = True
) -> tuple[FactorKind, dict[str, Tensor], Tensor]:
    """A factor stored as `kind`: its declaration, its tensors, and the float32 matrix that they stand for."""
    rows, columns = weight.shape
    if kind == "dense":
        return (
            DenseLinear(out_features=rows, in_features=columns, dtype="F32"),
            {"weight": weight},
            weight,
        )
    quantized = round_to_nearest(weight, 32, symmetric=symmetric, scale_dtype=torch.float32)
    linear = Int4Linear(
        out_features=rows, in_features=columns, dtype="F32", group_size=32, symmetric=symmetric
    )
    return linear, to_tensors(quantized), dequantize(quantized)


def rewrite(
    source: Path, destination: Path, changes: dict[str, tuple[LinearKind, dict[str, Tensor]]]
) -> Manifest:
    """Copy a checkpoint with some of its linear layers replaced."""
    checkpoint = open_checkpoint(source)
    writer = CheckpointWriter(destination)
    for row in checkpoint.manifest.matrices:
        stored = {s: checkpoint.tensor(f"{row.name}.{s}") for s in row.linear.tensors()}
        linear, tensors = changes.get(row.name, (row.linear, stored))
        writer.add_linear(replace(row, linear=linear), tensors)
    for name in checkpoint.manifest.other_tensors:
        writer.add_other(name, checkpoint.tensor(name))
    writer.copy_files(source)
    return writer.finish(kind="decoder", source={"model": "tiny"})


@pytest.fixture
def tiny(tiny_llama: Path, tmp_path: Path) -> Path:
    registry = ModelRegistry(tmp_path / "models")
    import_folder(registry, "tiny", tiny_llama, report=lambda _: None)
    return registry.get("tiny").path


@pytest.mark.parametrize(("kind_u", "kind_v"), list(itertools.product(["dense", "int4"], repeat=2)))
def test_a_low_rank_layer_is_its_product(
    tiny: Path, tmp_path: Path, kind_u: str, kind_v: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    name = "model.layers.1.mlp.up_proj"
    u, u_tensors, u_OR = factor(torch.randn(96, 32, generator=generator), kind_u, symmetric=False)
    v, v_tensors, v_RI = factor(torch.randn(32, 64, generator=generator), kind_v)
    bias_O = torch.randn(96, generator=generator)
    linear = LowRankLinear(weight_u=u, weight_v=v, bias=True)
    tensors = {factor_suffix("u", suffix): tensor for suffix, tensor in u_tensors.items()}
    tensors |= {factor_suffix("v", suffix): tensor for suffix, tensor in v_tensors.items()}
    manifest = rewrite(tiny, tmp_path / "low", {name: (linear, tensors | {"bias": bias_O})})

    assert read_manifest(tmp_path / "low") == manifest
    assert verify_checkpoint(tmp_path / "low").problems == ()
    row = next(row for row in manifest.to_json()["matrices"] if row["name"] == name)
    assert (row["kind"], row["rank"], row["parameters"]) == ("low_rank", 32, 32 * 160 + 96)
    assert f"{name}.weight_u" + ("_packed" if kind_u == "int4" else "") in (
        manifest.promised_tensors()
    )
    layer = load_model(tmp_path / "low", dtype=torch.float32).get_submodule(name)
    x = torch.randn(3, 64, generator=generator)
    torch.testing.assert_close(layer(x), x @ (u_OR @ v_RI).T + bias_O, atol=1e-4, rtol=1e-4)


def test_factors_that_do_not_fit_are_refused() -> None:
    u = DenseLinear(out_features=4, in_features=3, dtype="F32")
    with pytest.raises(CheckpointError, match="fit"):
        LowRankLinear(weight_u=u, weight_v=DenseLinear(out_features=2, in_features=5, dtype="F32"))
    row = Matrix(name="x", linear=u).to_json()
    nested = {"kind": "low_rank", "bias": False}
    with pytest.raises(CheckpointError, match="a factor must be"):
        Matrix.from_json(
            {
                "name": "x", **nested,
                "weight_u": {**nested, "weight_u": row, "weight_v": row | {"out_features": 3}},
                "weight_v": row,
            }
        )  # fmt: skip


def test_blocks_of_unequal_shape_load_by_their_own(tiny: Path, tmp_path: Path) -> None:
    """Heads and neurons whose outgoing weights are zero may be cut: the logits stay."""
    source = open_checkpoint(tiny)
    zeroed: dict[str, tuple[LinearKind, dict[str, Tensor]]] = {}
    sliced: dict[str, tuple[LinearKind, dict[str, Tensor]]] = {}
    # block 0 keeps 40 of 96 neurons; block 1 keeps its first group: 2 query heads of size 16 to 1 key-value head
    cuts = {
        "model.layers.0.mlp.gate_proj": (40, None),
        "model.layers.0.mlp.up_proj": (40, None),
        "model.layers.0.mlp.down_proj": (None, 40),
        "model.layers.1.self_attn.q_proj": (32, None),
        "model.layers.1.self_attn.k_proj": (16, None),
        "model.layers.1.self_attn.v_proj": (16, None),
        "model.layers.1.self_attn.o_proj": (None, 32),
    }
    for name, (rows, columns) in cuts.items():
        weight = source.tensor(f"{name}.weight").clone()
        if columns is not None:
            weight[:, columns:] = 0
        kind = DenseLinear(out_features=weight.shape[0], in_features=weight.shape[1], dtype="F32")
        zeroed[name] = (kind, {"weight": weight})
        part = weight[:rows, :columns].contiguous()
        kind = DenseLinear(out_features=part.shape[0], in_features=part.shape[1], dtype="F32")
        sliced[name] = (kind, {"weight": part})
    rewrite(tiny, tmp_path / "zeroed", zeroed)
    rewrite(tiny, tmp_path / "sliced", sliced)
    config = read_config(tiny)
    shape = {"intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config[LAYER_SHAPES] = [
        shape | {"intermediate_size": 40},
        shape | {"num_attention_heads": 2, "num_key_value_heads": 1},
    ]
    (tmp_path / "sliced" / "config.json").write_text(json.dumps(config))
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    expected = load_model(tmp_path / "zeroed", dtype=torch.float32)(ids).logits
    actual = load_model(tmp_path / "sliced", dtype=torch.float32)(ids).logits
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "rows",
    [
        "nonsense",
        [{"intermediate_size": 96}],
        [{"intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 3}] * 2,
        [{"intermediate_size": 0, "num_attention_heads": 4, "num_key_value_heads": 2}] * 2,
        [{"intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}],
    ],
)
def test_impossible_layer_shapes_are_refused(tiny: Path, rows: object) -> None:
    config = read_config(tiny) | {LAYER_SHAPES: rows}
    (tiny / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=LAYER_SHAPES):
        load_model(tiny)
