"""Runs a recipe over a checkpoint, one matrix at a time, into a new checkpoint.

Peak memory is the largest matrix and the shard being written, not the model. Nothing of the source is changed.
"""

import re
from collections.abc import Callable
from pathlib import Path

from compression.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    DenseLinear,
    Int4Linear,
    Manifest,
    Matrix,
    checkpoint_hash,
    open_checkpoint,
)
from compression.hf import read_config
from compression.quantization.int4 import quantization_config, round_to_nearest, to_tensors
from compression.recipe import Int4, Recipe
from compression.safetensors_header import CheckpointError

Progress = Callable[[int, int], None]
_BLOCK = re.compile(r"\.(\d+)\.")


def compress(
    source: Path,
    destination: Path,
    recipe: Recipe,
    *,
    source_id: str,
    job_id: str | None = None,
    progress: Progress = lambda step, total: None,
) -> Manifest:
    """Apply a recipe.

    Args:
        destination: an empty folder; it is a checkpoint once this returns.
        progress: called with (matrices done, matrices in all); may raise to stop.

    Raises:
        CheckpointError: the source is unsound, or compressed in a way that the recipe cannot start from.
    """
    checkpoint = open_checkpoint(source)
    (stage,) = recipe.stages
    if checkpoint.manifest.kind != "decoder":
        raise CheckpointError("only decoders can be compressed")
    not_dense = [m.name for m in checkpoint.manifest.matrices if m.linear.kind != "dense"]
    if not_dense:
        raise CheckpointError(f"{not_dense[0]} is not dense: compress the original model instead")
    writer = CheckpointWriter(destination)
    matrices = _quantize_matrices(checkpoint, writer, stage, progress)
    for name in sorted(checkpoint.manifest.other_tensors):
        writer.add_other(name, checkpoint.tensor(name))
    writer.copy_files(source)
    ignore = [m.name for m in matrices if m.linear.kind == "dense"]
    if "lm_head.weight" not in checkpoint.manifest.promised_tensors():
        ignore.append(
            "lm_head"
        )  # tied to the embedding: no tensor of its own, but a Linear to loaders
    config = read_config(source)
    config["quantization_config"] = quantization_config(
        stage.group_size, symmetric=stage.symmetric, ignore=ignore
    )
    writer.write_json("config.json", config)
    source_bytes = checkpoint.manifest.tensor_bytes
    result_bytes = sum(m.num_bytes for m in matrices) + source_bytes
    result_bytes -= sum(m.num_bytes for m in checkpoint.manifest.matrices)
    return writer.finish(
        kind="decoder",
        source={"model": source_id, "checkpoint_hash": checkpoint_hash(checkpoint.manifest)},
        recipe=recipe.to_json(),
        ratios={"bytes": result_bytes / source_bytes, "parameters": 1.0},
        job_id=job_id,
    )


def _quantize_matrices(
    checkpoint: Checkpoint, writer: CheckpointWriter, stage: Int4, progress: Progress
) -> list[Matrix]:
    done: list[Matrix] = []
    rows = checkpoint.manifest.matrices
    for index, row in enumerate(rows):
        progress(index, len(rows))
        assert isinstance(row.linear, DenseLinear)
        reason = _dense_reason(row, stage)
        weight_OI = checkpoint.tensor(f"{row.name}.weight")
        tensors = {"weight": weight_OI}
        linear: DenseLinear | Int4Linear = row.linear
        if reason is None:
            linear = Int4Linear(
                out_features=row.linear.out_features,
                in_features=row.linear.in_features,
                dtype=row.linear.dtype,
                group_size=stage.group_size,
                symmetric=stage.symmetric,
                bias=row.linear.bias,
            )
            tensors = to_tensors(
                round_to_nearest(
                    weight_OI,
                    stage.group_size,
                    symmetric=stage.symmetric,
                    scale_dtype=weight_OI.dtype,
                )
            )
        if row.linear.bias:
            tensors["bias"] = checkpoint.tensor(f"{row.name}.bias")
        matrix = Matrix(name=row.name, linear=linear, dense_reason=reason)
        writer.add_linear(matrix, tensors)
        done.append(matrix)
    progress(len(rows), len(rows))
    return done


def _dense_reason(row: Matrix, stage: Int4) -> str | None:
    """Why this matrix must stay dense; None where it need not."""
    if not _BLOCK.search(row.name):
        return "outside the decoder blocks: the output head stays in full precision"
    if row.linear.in_features % stage.group_size:
        return f"in_features {row.linear.in_features} is no multiple of {stage.group_size}"
    return None
