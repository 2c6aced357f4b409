"""The export job: an archive that plain transformers loads, and what cannot be exported."""

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from compression.checkpoint import verify_checkpoint
from compression.hf import load_model
from compression.pipeline import compress
from compression.recipe import parse_recipe
from compression.registry import ModelRegistry
from jobs import child
from jobs.context import RunnerContext
from jobs.spec import SpecError, parse_spec
from tests.compression.models import save_and_import, tiny_decoder


@pytest.fixture
def home(tmp_path: Path) -> Path:
    home = tmp_path / "home"
    source = save_and_import(tiny_decoder(), tmp_path / "hf", home / "models")
    recipe = parse_recipe([{"int4": {"group_size": 32}}])
    compress(source, home / "models" / "small", recipe, source_id="tiny")
    return home


def outcome(home: Path, body: dict[str, Any]) -> tuple[Path, Any]:
    """As the job's process reports it, of a body that went through the API's checks."""
    context = RunnerContext(
        job_id="job-1",
        owner="me",
        attempt=1,
        spec=parse_spec(body).model_dump(mode="json"),
        folder=home / "jobs" / "job-1",
        home=home,
        send=lambda _: None,
    )
    context.folder.mkdir(parents=True, exist_ok=True)
    return context.artifacts, json.loads(child._outcome(context, child.RUNNERS["export"]))


@pytest.mark.parametrize("format_", ["dense", "compressed-tensors"])
def test_the_archive_loads_in_transformers(home: Path, tmp_path: Path, format_: str) -> None:
    from transformers import AutoModelForCausalLM

    artifacts, found = outcome(home, {"type": "export", "model": "small", "format": format_})
    assert found["result"]["artifacts"] == [path.name for path in artifacts.iterdir()]
    with tarfile.open(artifacts / "model.tar") as archive:
        archive.extractall(tmp_path / "out", filter="data")
    assert verify_checkpoint(tmp_path / "out" / "small").ok
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "small", dtype=torch.float32)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        ours = load_model(home / "models" / "small", dtype=torch.float32)(ids).logits
        torch.testing.assert_close(plain(ids).logits, ours, atol=1e-3, rtol=1e-3)
    assert outcome(home, {"type": "export", "model": "small", "format": format_})[1] == found


def test_what_cannot_be_exported_is_said_and_leaves_no_archive(home: Path) -> None:
    body = {"type": "export", "model": "tiny", "format": "compressed-tensors"}
    artifacts, found = outcome(home, body)
    assert found["failed"]["code"] == "bad_data"
    assert "has dense" in found["failed"]["message"]
    assert list(artifacts.iterdir()) == []
    weights = ModelRegistry(home / "models").get("small").path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    artifacts, found = outcome(home, {"type": "export", "model": "small"})
    assert found["failed"]["code"] == "bad_data"
    assert "sha256" in found["failed"]["message"]
    assert list(artifacts.iterdir()) == []
    assert outcome(home, {"type": "export", "model": "none"})[1]["failed"]["code"] == (
        "model_not_found"
    )


def test_unknown_formats_are_refused_by_the_field() -> None:
    with pytest.raises(SpecError) as refused:
        parse_spec({"type": "export", "model": "m", "format": "gguf"})
    assert refused.value.param == "format"
