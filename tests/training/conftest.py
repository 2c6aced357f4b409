"""Tiny checkpoints of every kind, and examples that a tiny model can learn."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from compression.pipeline import compress
from compression.recipe import parse_recipe
from tests.compression.models import save_and_import, tiny_decoder

KINDS: dict[str, list[dict[str, Any]]] = {
    "low_rank": [{"welore": {"err": 0.5, "count": "all", "rank_multiple": 8}}],
    "pruned": [{"magnitude": {"sparsity": 0.5}}],
    "two_four": [{"magnitude": {"sparsity": "2:4"}}],
    "int8": [{"int8": {}}],
    "int4": [{"int4": {"group_size": 32}}],
    "low_rank_int4": [
        {"welore": {"err": 0.4, "count": "all", "rank_multiple": 32}},
        {"int4": {"group_size": 32}},
    ],
}


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random float32 Qwen2 (biases, grouped heads, tied embeddings) of two blocks by kind of its matrices."""
    folder = tmp_path_factory.mktemp("sources")
    model = tiny_decoder(num_hidden_layers=2, intermediate_size=128)
    found = {"dense": save_and_import(model, folder / "hf", folder / "home")}
    for kind, recipe in KINDS.items():
        (folder / kind).mkdir()
        compress(found["dense"], folder / kind, parse_recipe(recipe), source_id="tiny")
        found[kind] = folder / kind
    return found


@pytest.fixture(scope="session")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Completions that repeat their prompt's letter, which is learnt in a few steps."""
    path = tmp_path_factory.mktemp("examples") / "train.jsonl"
    chooser = random.Random(0)
    rows = []
    for _ in range(80):
        letter = chooser.choice("abcdefgh")
        rows.append({"prompt": letter * 3, "completion": letter * chooser.randint(4, 8)})
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path
