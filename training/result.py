"""Writes a finetuned model as a checkpoint: what was trained anew, all else as the source has it, to the bit.

Kinds stay, but for quantized layers that were trained: they become dense. A skip profile does not carry over: it was
calibrated for other weights.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from compression.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    DenseLinear,
    LinearKind,
    LowRankLinear,
    Manifest,
    Matrix,
    TwoFourLinear,
    checkpoint_hash,
    write_manifest,
)
from compression.encoding import DTYPES, encode_two_four
from compression.hf import LATHE_ONLY, is_lathe_only, read_config
from training.methods import TrainableModel
from training.spec import has_codes

JsonObject = dict[str, Any]


def write_result(
    trained: TrainableModel,
    source: Checkpoint,
    output: Path,
    *,
    source_id: str,
    job_id: str | None,
    provenance: JsonObject,
) -> Manifest:
    """Write into an empty folder.

    Args:
        provenance: becomes {"finetune": provenance}, the last of the manifest's `stage_results`.
    """
    before = source.manifest
    writer = CheckpointWriter(output)
    for row in before.matrices:
        if trained.is_trained(row.name):
            writer.add_linear(*_trained_matrix(trained, source, row))
        else:
            names = row.linear.tensors()
            writer.add_linear(row, {s: source.tensor(f"{row.name}.{s}") for s in names})
    for name, (dtype, _) in sorted(before.other_tensors.items()):
        tensor = source.tensor(name)
        if trained.is_trained(name):
            tensor = _stored(trained.model.get_parameter(name), dtype)
        writer.add_other(name, tensor)
    writer.copy_files(source.folder)
    config = read_config(source.folder)
    codes_left = any(
        has_codes(row.linear) and not trained.is_trained(row.name) for row in before.matrices
    )
    kinds = {row.linear.kind for row in before.matrices}
    if is_lathe_only(config, kinds):
        config |= LATHE_ONLY
    elif not codes_left:
        config.pop("quantization_config", None)
    writer.write_json("config.json", config)
    manifest = writer.finish(
        kind=before.kind,
        source={"model": source_id, "checkpoint_hash": checkpoint_hash(before)},
        # Codes that are gone may be made again.
        recipe=[s for s in before.recipe if codes_left or not s.keys() & {"int4", "int8"}],
        stage_results=[*before.stage_results, {"finetune": provenance}],
        calibration=before.calibration,
        job_id=job_id,
    )
    ratios = {
        "bytes": manifest.tensor_bytes / before.tensor_bytes,
        "parameters": manifest.parameters / before.parameters,
    }
    manifest = replace(manifest, ratios={**before.ratios, **ratios})
    write_manifest(output, manifest)
    return manifest


def _trained_matrix(
    trained: TrainableModel, source: Checkpoint, row: Matrix
) -> tuple[Matrix, dict[str, Tensor]]:
    linear, tensors = row.linear, {}
    kind: LinearKind
    dtype = linear.dtype
    if isinstance(linear, LowRankLinear):
        tensors["weight_u"] = _stored(trained.matrix(f"{row.name}.weight_u"), dtype)
        tensors["weight_v"] = _stored(trained.matrix(f"{row.name}.weight_v"), dtype)
        kinds = [
            DenseLinear(out_features=f.out_features, in_features=f.in_features, dtype=dtype)
            for f in (linear.weight_u, linear.weight_v)
        ]
        kind = LowRankLinear(weight_u=kinds[0], weight_v=kinds[1], bias=linear.bias)
        bias_name = f"{row.name}.weight_u.bias"
    elif isinstance(linear, TwoFourLinear):
        kind, tensors = encode_two_four(_stored(trained.matrix(row.name), dtype), dtype)
        kind = replace(kind, bias=linear.bias)
        bias_name = f"{row.name}.bias"
    else:
        tensors["weight"] = _stored(trained.matrix(row.name), dtype)
        kind = DenseLinear(
            out_features=linear.out_features,
            in_features=linear.in_features,
            dtype=dtype,
            bias=linear.bias,
        )
        bias_name = f"{row.name}.bias"
    if linear.bias:
        tensors["bias"] = source.tensor(f"{row.name}.bias")
        if trained.is_trained(bias_name):
            tensors["bias"] = _stored(trained.model.get_parameter(bias_name), dtype)
    return replace(row, linear=kind), tensors


def _stored(tensor: Tensor, dtype: str) -> Tensor:
    return tensor.detach().to("cpu", DTYPES[dtype]).contiguous()
