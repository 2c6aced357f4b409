"""Writes any checkpoint as a plain dense folder that transformers, and whatever reads its format, loads without Lathe.

INT4 codes are dequantized and low-rank factors multiplied, so nothing is saved any more; what was lost stays lost. The
folder is a Lathe checkpoint as well: `lathe verify` checks it.
"""

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from compression.checkpoint import (
    LAYER_SHAPES,
    Checkpoint,
    CheckpointWriter,
    DenseLinear,
    Manifest,
    Matrix,
    checkpoint_hash,
    layer_shapes,
    open_checkpoint,
)
from compression.encoding import DTYPES, decode, to_dense
from compression.hf import LATHE_ONLY, read_config
from compression.safetensors_header import CheckpointError


def export_dense(source: Path, destination: Path, *, source_id: str) -> Manifest:
    """Write the dense copy into an empty folder, in the dtypes of the source.

    Raises:
        CheckpointError: the source is unsound, the folder is not empty, or blocks have unequal shapes, which a plain
            config.json cannot say.
    """
    checkpoint = open_checkpoint(source)
    config = read_config(source)
    for name in LATHE_ONLY:
        config.pop(name, None)
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
    factors = [to_dense(f) for f in decode(row.linear, checkpoint.linear_tensors(row))]
    weight_OI = factors[0] if len(factors) == 1 else factors[0].float() @ factors[1].float()
    return weight_OI.to(DTYPES[row.linear.dtype])
