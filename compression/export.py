"""Writes any checkpoint as a plain dense folder that transformers, and whatever reads its format, loads without Lathe.

INT4 codes are dequantized and low-rank factors multiplied, so nothing is saved any more; what was lost stays lost. The
folder is a Lathe checkpoint as well: `lathe verify` checks it.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from compression.checkpoint import (
    LAYER_SHAPES,
    Checkpoint,
    CheckpointWriter,
    DenseLinear,
    FactorKind,
    LowRankLinear,
    Manifest,
    Matrix,
    checkpoint_hash,
    factor_suffix,
    layer_shapes,
    open_checkpoint,
)
from compression.hf import read_config
from compression.quantization.int4 import dequantize, from_tensors
from compression.safetensors_header import CheckpointError


def export_dense(source: Path, destination: Path, *, source_id: str) -> Manifest:
    """Write the dense copy into an empty folder, in the dtypes of the source.

    Raises:
        CheckpointError: the source is unsound, the folder is not empty, or blocks have unequal shapes, which a plain
            config.json cannot say.
    """
    checkpoint = open_checkpoint(source)
    config = read_config(source)
    config.pop("quantization_config", None)
    shapes = layer_shapes(config)
    if shapes is not None:
        if len(set(shapes)) > 1:
            raise CheckpointError(
                f"blocks have unequal shapes ({LAYER_SHAPES}): a plain config.json cannot say so"
            )
        config.pop(LAYER_SHAPES)
        config |= {
            "intermediate_size": shapes[0].intermediate_size,
            "num_attention_heads": shapes[0].num_attention_heads,
            "num_key_value_heads": shapes[0].num_key_value_heads,
        }
    writer = CheckpointWriter(destination)
    for row in checkpoint.manifest.matrices:
        linear = row.linear
        dense = DenseLinear(
            out_features=linear.out_features,
            in_features=linear.in_features,
            dtype=linear.dtype,
            bias=linear.bias,
        )
        tensors = {"weight": _weight(checkpoint, row)}
        if linear.bias:
            tensors["bias"] = checkpoint.tensor(f"{row.name}.bias")
        writer.add_linear(replace(row, linear=dense, dense_reason=None), tensors)
    for name in sorted(checkpoint.manifest.other_tensors):
        writer.add_other(name, checkpoint.tensor(name))
    writer.copy_files(source)
    writer.write_json("config.json", config)
    origin = {"model": source_id, "checkpoint_hash": checkpoint_hash(checkpoint.manifest)}
    return writer.finish(
        kind=checkpoint.manifest.kind, source=origin, text=checkpoint.manifest.text
    )


def _weight(checkpoint: Checkpoint, row: Matrix) -> Tensor:
    stored = {suffix: checkpoint.tensor(f"{row.name}.{suffix}") for suffix in row.linear.tensors()}
    if not isinstance(row.linear, LowRankLinear):
        return _factor(row.linear, stored)
    kind_u, kind_v = row.linear.weight_u, row.linear.weight_v
    u = _factor(kind_u, {s: stored[factor_suffix("u", s)] for s in kind_u.tensors()})
    v = _factor(kind_v, {s: stored[factor_suffix("v", s)] for s in kind_v.tensors()})
    return (u.float() @ v.float()).to(u.dtype)


def _factor(kind: FactorKind, tensors: dict[str, Tensor]) -> Tensor:
    if kind.kind == "dense":
        return tensors["weight"]
    dtype: torch.dtype = tensors["weight_scale"].dtype
    return dequantize(from_tensors(tensors)).to(dtype)
