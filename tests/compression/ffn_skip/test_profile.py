"""The profile in a checkpoint: written, shared, read back, refused where it contradicts itself."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compression.checkpoint import (
    add_skip_profile,
    checkpoint_hash,
    open_checkpoint,
    read_manifest,
    verify_checkpoint,
)
from compression.ffn_skip.profile import SKIP_FILE, SkipPoint, SkipProfile, Substitute
from compression.hf import load_model
from compression.import_model import import_folder
from compression.pipeline import compress
from compression.recipe import parse_recipe
from compression.registry import ModelRegistry
from compression.safetensors_header import CheckpointError, TensorInfo

POINTS = (
    SkipPoint(target_ratio=0.1, tau=0.98, skip_ratio=0.101, perplexity_ratio=1.2),
    SkipPoint(target_ratio=0.3, tau=0.94, skip_ratio=0.299),
)


def profile(**changes: Any) -> SkipProfile:
    values: dict[str, Any] = {
        "num_layers": 2, "hidden_size": 64, "cold_start": 0, "cold_end": 0, "k": 1, "warm_up": 25,
        "points": POINTS, "dtype": "F32",
        "substitutes": (Substitute(kind="mean"), Substitute(kind="linear", rank=3)),
    }  # fmt: skip
    return SkipProfile(**values | changes)


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"0.mlp.skip.bias": (64,), "1.mlp.skip.bias": (64,)}
    shapes |= {"1.mlp.skip.weight_u": (64, 3), "1.mlp.skip.weight_v": (3, 64)}  # type: ignore[dict-item]
    return {f"model.layers.{n}": torch.randn(s, generator=generator) for n, s in shapes.items()}


@pytest.fixture
def tiny(tiny_llama: Path, tmp_path: Path) -> Path:
    registry = ModelRegistry(tmp_path / "models")
    import_folder(registry, "tiny", tiny_llama, report=lambda _: None)
    return registry.get("tiny").path


def test_tau_of_a_ratio() -> None:
    assert profile().tau() == 0.94
    assert profile().tau(0.1) == 0.98
    assert profile().tau(0.15) == pytest.approx(0.97)
    for ratio in (0.05, 0.31):
        with pytest.raises(ValueError, match=r"calibrated for 0\.1 to 0\.3"):
            profile().tau(ratio)
    with pytest.raises(ValueError, match=r"calibrated for 0\.1$"):
        profile(points=POINTS[:1]).tau(0.2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"points": ()}, "points must be there"),
        ({"points": POINTS[::-1]}, "rising"),
        ({"substitutes": ()}, "0 substitutes for 2 layers"),
        ({"cold_start": 1, "cold_end": 1}, "no layer between"),
        ({"k": 0}, "k at least 1"),
        ({"warm_up": -1}, "at least 0"),
        ({"version": 2}, "version 2"),
    ],
)
def test_a_contradiction_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        profile(**changes)
    for kind, rank in (("mean", 1), ("linear", 0), ("linear", 33), ("cubic", 0), ("linear", True)):
        with pytest.raises(CheckpointError, match="substitute"):
            Substitute(kind=kind, rank=rank)  # type: ignore[arg-type]


def test_a_profile_makes_a_checkpoint_of_its_own(tiny: Path, tmp_path: Path) -> None:
    source, folder = open_checkpoint(tiny).manifest, tmp_path / "skipping"
    manifest = add_skip_profile(tiny, folder, profile(), tensors(), job_id="job-1")
    assert read_manifest(folder) == manifest
    assert manifest.skip_profile == profile()
    assert manifest.job_id == "job-1"
    assert verify_checkpoint(folder).problems == ()
    opened = open_checkpoint(folder)
    for name, tensor in tensors().items():
        assert torch.equal(opened.tensor(name), tensor)
    assert manifest.promised_tensors()["model.layers.1.mlp.skip.weight_v"] == TensorInfo(
        "F32", (3, 64)
    )
    added = 64 + 64 + 2 * 3 * 64
    assert manifest.parameters == source.parameters + added
    assert manifest.tensor_bytes == source.tensor_bytes + 4 * added
    shared = tiny / "model.safetensors", folder / "model.safetensors"
    assert shared[0].samefile(shared[1])
    ids = torch.tensor([[3, 1, 4]])
    with torch.no_grad():
        logits = [load_model(path, dtype=torch.float32)(ids).logits for path in (tiny, folder)]
    assert torch.equal(*logits)
    # A profile again, over the first one: nothing of the first stays.
    plain = profile(substitutes=(Substitute(), Substitute()))
    again = add_skip_profile(folder, tmp_path / "again", plain, {})
    assert SKIP_FILE not in again.files
    assert verify_checkpoint(tmp_path / "again").problems == ()
    # What shapes an answer is in the hash, the thresholds included.
    other = replace(again, skip_profile=replace(plain, k=2))
    assert len({checkpoint_hash(m) for m in (source, manifest, again, other)}) == 4


def test_a_checkpoint_without_a_profile_loads(tiny: Path) -> None:
    data = json.loads((tiny / "lathe.json").read_text())
    del data["skip_profile"]
    (tiny / "lathe.json").write_text(json.dumps(data))
    assert read_manifest(tiny).skip_profile is None


def test_what_a_profile_does_not_promise_is_refused(tiny: Path, tmp_path: Path) -> None:
    incomplete = tensors()
    del incomplete["model.layers.1.mlp.skip.bias"]
    with pytest.raises(CheckpointError, match="promises"):
        add_skip_profile(tiny, tmp_path / "a", profile(), incomplete)
    folder = tmp_path / "b"
    add_skip_profile(tiny, folder, profile(), tensors())
    shutil.copyfile(folder / SKIP_FILE, tmp_path / "kept")
    (folder / SKIP_FILE).unlink()
    with pytest.raises(
        CheckpointError, match=r"tensor model\.layers\.0\.mlp\.skip\.bias is missing"
    ):
        open_checkpoint(folder)
    shutil.copyfile(tmp_path / "kept", folder / SKIP_FILE)
    data = json.loads((folder / "lathe.json").read_text())
    broken: Any
    for broken in ({}, data["skip_profile"] | {"version": 7}, data["skip_profile"] | {"points": 1}):
        (folder / "lathe.json").write_text(json.dumps(data | {"skip_profile": broken}))
        with pytest.raises(CheckpointError):
            read_manifest(folder)


def test_a_quantized_checkpoint_takes_a_profile_and_loses_it_when_compressed(
    tiny: Path, tmp_path: Path
) -> None:
    recipe = parse_recipe([{"int4": {"group_size": 32}}])
    compress(tiny, tmp_path / "int4", recipe, source_id="tiny")
    add_skip_profile(tmp_path / "int4", tmp_path / "both", profile(), tensors())
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        logits = [
            load_model(tmp_path / name, dtype=torch.float32)(ids).logits
            for name in ("int4", "both")
        ]
    assert torch.equal(*logits)
    add_skip_profile(tiny, tmp_path / "dense", profile(), tensors())
    manifest = compress(tmp_path / "dense", tmp_path / "again", recipe, source_id="dense")
    assert manifest.skip_profile is None
    assert verify_checkpoint(tmp_path / "again").problems == ()
