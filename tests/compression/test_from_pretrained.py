"""Folders that plain transformers cannot express: refused by itself, read once `compression.hf` is imported."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from compression.hf import load_model
from compression.pipeline import compress
from compression.recipe import parse_recipe
from engines.kernels.metadata import RequestRows, build_metadata
from engines.model import load_decoder
from tests.compression.models import calibration_tokens, save_and_import, tiny_decoder

WELORE = {"welore": {"err": 0.5, "count": "all", "allocation": "uniform", "rank_multiple": 8}}
RECIPES: dict[str, list[dict[str, Any]]] = {
    "low rank": [WELORE],
    "low rank in INT8": [WELORE, {"int8": {}}],
    "2:4": [{"magnitude": {"sparsity": "2:4"}}],
    "unequal blocks": [{"flap": {"sparsity": 0.1}}],
    "unequal blocks in INT4": [{"flap": {"sparsity": 0.25}}, {"int4": {"group_size": 32}}],
}
PLAIN = """
import sys
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except Exception as error:
        print("refused:", error)
    else:
        print("loaded")
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("home")
    source = save_and_import(tiny_decoder(), home / "hf", home / "models")
    found = {}
    for index, (name, stages) in enumerate(RECIPES.items()):
        recipe = parse_recipe(stages)
        tokens = calibration_tokens() if recipe.calibrated else None
        found[name] = home / f"small-{index}"
        compress(source, found[name], recipe, source_id="tiny", calibration=tokens)
    return found


def test_without_the_import_they_are_refused(folders: dict[str, Path]) -> None:
    command = [sys.executable, "-c", PLAIN, *map(str, folders.values())]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [line for line in result.stdout.splitlines() if line]
    assert len(lines) == len(folders)
    for line in lines:
        assert line.startswith("refused:")
        assert "only-after-import-compression.hf" in line


@pytest.mark.parametrize("name", RECIPES)
def test_with_it_they_give_the_logits_of_load_model_and_of_the_engine(
    folders: dict[str, Path], name: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.float32)
    assert not any(parameter.is_meta for parameter in model.parameters())
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
    with torch.no_grad():
        found = model(ids).logits
        ours = load_model(folders[name], dtype=torch.float32)(ids).logits
    assert torch.equal(found, ours)
    decoder = load_decoder(folders[name], dtype=torch.float32)
    metadata = build_metadata([RequestRows(start=0, num_tokens=7)], decoder.device)
    rows_TV = decoder.logits(decoder.forward(decoder.embed(ids[0]), metadata, None))
    torch.testing.assert_close(rows_TV, ours[0], atol=1e-3, rtol=1e-3)


def test_it_cannot_be_saved_as_something_else(folders: dict[str, Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders["low rank"], dtype=torch.float32)
    with pytest.raises(ValueError, match="lathe"):
        model.save_pretrained(tmp_path / "saved")
