"""Writes any checkpoint in a form that other programs load without Lathe, or says why it has none.

`dense`: codes are dequantized and low-rank factors multiplied, so nothing is saved any more; what was lost stays lost.
`compressed-tensors`: the codes as they are. `nemotron-nas`: dense weights of unequal blocks, see `nemotron_nas.py`. The
folder is a Lathe checkpoint as well: `lathe verify` checks it, and its logits against the source's fingerprint.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from compression import nemotron_nas
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
    torch_dtype_name,
)
from compression.encoding import DTYPES, decode, to_dense
from compression.hf import LATHE_ONLY, read_config
from compression.recipe import ExportFormat
from compression.safetensors_header import CheckpointError

JsonObject = dict[str, Any]
Tensors = dict[str, Tensor]


def export(
    source: Path, destination: Path, *, source_id: str, format: ExportFormat = "dense"
) -> Manifest:
    """Write a copy into an empty folder, in the dtypes of the source.

    Raises:
        CheckpointError: the source is unsound, the folder is not empty, or the format cannot say what the source is.
    """
    checkpoint = open_checkpoint(source)
    config, rewrite = _PREPARE[format](checkpoint)
    writer = CheckpointWriter(destination)
    for row in checkpoint.manifest.matrices:
        writer.add_linear(*rewrite(row))
    for name in sorted(checkpoint.manifest.other_tensors):
        writer.add_other(name, checkpoint.tensor(name))
    writer.copy_files(source)
    writer.write_json("config.json", config)
    before = checkpoint.manifest
    loads_here = (
        format != "nemotron-nas"
    )  # transformers has no class of that name to compare logits with
    return writer.finish(
        kind=before.kind,
        source={"model": source_id, "checkpoint_hash": checkpoint_hash(before)},
        text=before.text,
        fingerprint=before.fingerprint if loads_here else None,
    )


Rewrite = Callable[[Matrix], tuple[Matrix, Tensors]]


def _prepare_dense(checkpoint: Checkpoint) -> tuple[JsonObject, Rewrite]:
    config = _without_marks(read_config(checkpoint.folder))
    shapes = layer_shapes(config)
    if shapes is not None:
        if len(set(shapes)) > 1:
            raise CheckpointError(
                f"blocks have unequal shapes ({LAYER_SHAPES}): a plain config.json cannot say so, nemotron-nas can"
            )
        config.pop(LAYER_SHAPES)
        config |= {
            "intermediate_size": shapes[0].intermediate_size,
            "num_attention_heads": shapes[0].num_attention_heads,
            "num_key_value_heads": shapes[0].num_key_value_heads,
        }
    return config, lambda row: _dense_row(row, dense_tensors(checkpoint, row))


def _prepare_compressed_tensors(checkpoint: Checkpoint) -> tuple[JsonObject, Rewrite]:
    config = read_config(checkpoint.folder)
    method = config.get("quantization_config", {}).get("quant_method")
    if method != "compressed-tensors":
        kinds = sorted({row.linear.kind for row in checkpoint.manifest.matrices})
        raise CheckpointError(
            f"compressed-tensors has INT4 and INT8 weights in blocks of equal shape; this model has {', '.join(kinds)}"
            f"{' in unequal blocks' if LAYER_SHAPES in config else ''}"
        )
    for row in checkpoint.manifest.matrices:
        if not getattr(row.linear, "symmetric", True):
            raise CheckpointError(
                f"{row.name} is asymmetric: transformers expects its zero points unpacked, others packed"
            )
    return config, lambda row: (row, checkpoint.linear_tensors(row))


def _prepare_nemotron_nas(checkpoint: Checkpoint) -> tuple[JsonObject, Rewrite]:
    config = _without_marks(read_config(checkpoint.folder))
    layout = nemotron_nas.plan_layout(config, checkpoint.manifest.matrices)

    def rewrite(row: Matrix) -> tuple[Matrix, Tensors]:
        return _dense_row(row, layout.pad(row.name, dense_tensors(checkpoint, row)))

    return layout.config, rewrite


_PREPARE: dict[ExportFormat, Callable[[Checkpoint], tuple[JsonObject, Rewrite]]] = {
    "dense": _prepare_dense,
    "compressed-tensors": _prepare_compressed_tensors,
    "nemotron-nas": _prepare_nemotron_nas,
}


def _without_marks(config: JsonObject) -> JsonObject:
    return {name: value for name, value in config.items() if name not in LATHE_ONLY}


def _dense_row(row: Matrix, tensors: Tensors) -> tuple[Matrix, Tensors]:
    out_features, in_features = tensors["weight"].shape
    linear = DenseLinear(
        out_features=out_features,
        in_features=in_features,
        dtype=torch_dtype_name(tensors["weight"]),
        bias="bias" in tensors,
    )
    return replace(row, linear=linear, dense_reason=None), tensors


def dense_tensors(checkpoint: Checkpoint, row: Matrix) -> Tensors:
    """The weight that a layer of any kind stands for, and its bias, in the stored dtype."""
    stored = checkpoint.linear_tensors(row)
    factors = [to_dense(factor) for factor in decode(row.linear, stored)]
    weight_OI = factors[0] if len(factors) == 1 else factors[0].float() @ factors[1].float()
    tensors = {"weight": weight_OI.to(DTYPES[row.linear.dtype])}
    return tensors | ({"bias": stored["bias"]} if row.linear.bias else {})
