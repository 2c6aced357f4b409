"""Folders that lie: each is refused by name, and nothing is registered."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from compression.import_model import import_folder
from compression.registry import ModelRegistry
from compression.safetensors_header import CheckpointError


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 128}, "promises"),
        ({"intermediate_size": 128}, "promises"),
        ({"num_hidden_layers": 3}, r"model\.layers\.2\..*missing"),
        ({"num_hidden_layers": 1}, r"model\.layers\.1\..*in no layer"),
        ({"num_key_value_heads": 4}, "promises"),
        ({"vocab_size": 65}, "promises"),
        ({"hidden_size": "large"}, "describes no model"),
        ({"num_attention_heads": 0}, "describes no model"),
        ({"model_type": "unheard-of"}, "is not known"),
    ],
)
def test_a_configuration_that_lies_is_refused(
    tiny_llama: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = tmp_path / "liar"
    shutil.copytree(tiny_llama, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    registry = ModelRegistry(tmp_path / "models")
    with pytest.raises(CheckpointError, match=message):
        import_folder(registry, "liar", folder, report=lambda _: None)
    assert registry.list_models() == []
    assert list(tmp_path.glob("models/*")) == []
