"""A dense copy of anything, loaded by plain transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from compression.checkpoint import LAYER_SHAPES, verify_checkpoint
from compression.export import export_dense
from compression.hf import load_model
from compression.pipeline import compress
from compression.recipe import parse_recipe
from compression.registry import ModelRegistry
from compression.safetensors_header import CheckpointError
from service.cli import main
from tests.compression.models import calibration_tokens, save_and_import, tiny_decoder

RECIPES: list[list[dict[str, Any]]] = [
    [{"int4": {"group_size": 32, "symmetric": False}}],
    [{"welore": {"err": 0.5, "count": "all", "allocation": "uniform", "rank_multiple": 8}}],
    [
        {"shortgpt": {"remove": 1}},
        {"welore": {"err": 0.5, "count": "all", "allocation": "uniform", "rank_multiple": 32}},
        {"int4": {"group_size": 32, "method": "gptq"}},
    ],
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    source = save_and_import(tiny_decoder(), home / "hf", home / "models")
    for index, stages in enumerate(RECIPES):
        recipe = parse_recipe(stages)
        tokens = calibration_tokens() if recipe.calibrated else None
        folder = home / "models" / f"small-{index}"
        compress(source, folder, recipe, source_id="tiny", calibration=tokens)
    return home


@pytest.mark.parametrize("index", range(len(RECIPES)))
def test_transformers_loads_the_copy_and_gives_our_logits(
    home: Path, tmp_path: Path, index: int
) -> None:
    options = ["export", f"small-{index}", str(tmp_path / "out"), "--home", str(home)]
    result = CliRunner().invoke(main, options)
    assert result.exit_code == 0, result.output
    assert verify_checkpoint(tmp_path / "out").problems == ()
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ours = load_model(home / "models" / f"small-{index}", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, ours(ids).logits, atol=1e-3, rtol=1e-3)


def test_unequal_blocks_and_unknown_models_are_refused(home: Path, tmp_path: Path) -> None:
    source = ModelRegistry(home / "models").get("tiny").path
    config = json.loads((source / "config.json").read_text())
    shape = {"intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
    config[LAYER_SHAPES] = [shape, shape, shape | {"intermediate_size": 64}]
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=LAYER_SHAPES):
        export_dense(source, tmp_path / "out", source_id="tiny")
    result = CliRunner().invoke(main, ["export", "none", str(tmp_path), "--home", str(home)])
    assert "no model 'none'" in result.output
