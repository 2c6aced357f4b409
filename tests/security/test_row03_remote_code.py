"""Row 3: code that a checkpoint brings along does not run: at import, at load, for a tokenizer, or as a job resumes."""

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compression.hf import load_model
from compression.import_model import import_folder
from compression.registry import ModelRegistry
from compression.safetensors_header import CheckpointError
from engines.model import read_decoder_config
from service.tokenizers import load_text
from training.trainer import build_encoder

CODE = """
import pathlib
pathlib.Path({ran!r}).touch()
from transformers import LlamaConfig as C, LlamaForCausalLM as M, PreTrainedTokenizerFast as T
"""
AUTO_MAP = {
    "AutoConfig": "canary.C",
    "AutoModel": "canary.M",
    "AutoModelForCausalLM": "canary.M",
    "AutoTokenizer": ["canary.T", "canary.T"],
}


def plant(folder: Path, ran: Path, **config: Any) -> None:
    """Code beside the weights, and every file that could name it naming it."""
    for name in (
        "canary.py",
        "modeling_llama.py",
        "configuration_llama.py",
        "tokenization_llama.py",
    ):
        (folder / name).write_text(CODE.format(ran=str(ran)))
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        path = folder / name
        old = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(old | {"auto_map": AUTO_MAP, "custom_pipelines": {"x": {"impl": "canary.M"}}}
                                   | (config if name == "config.json" else {})))  # fmt: skip


def test_the_canary_works(tmp_path: Path) -> None:
    exec(CODE.format(ran=str(tmp_path / "ran")), {})
    assert (tmp_path / "ran").exists()


def test_nothing_of_it_is_imported(tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    plant(folder, tmp_path / "ran")
    registry = ModelRegistry(tmp_path / "models")
    import_folder(registry, "model", folder, report=lambda _: None)
    imported = registry.get("model").path
    assert "auto_map" not in json.loads((imported / "config.json").read_text())
    assert list(imported.glob("*.py")) == []
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "trojan"},
        {"model_type": "trojan", "architectures": ["M"]},
        {"model_type": "../trojan"},
        {"model_type": None},
        {"model_type": ["llama"]},
    ],
)
def test_an_architecture_of_its_own_is_refused(
    tiny_llama: Path, tmp_path: Path, config: dict[str, Any]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    plant(folder, tmp_path / "ran", **config)
    registry = ModelRegistry(tmp_path / "models")
    with pytest.raises(CheckpointError, match="is not known"):
        import_folder(registry, "model", folder, report=lambda _: None)
    assert registry.list_models() == []
    assert not (tmp_path / "ran").exists()


LOADERS: dict[str, Callable[[Path], object]] = {
    "compression, training and evaluation": load_model,
    "the engine": read_decoder_config,
    "the API's tokenizer": lambda folder: load_text(ModelRegistry(folder.parent).get(folder.name)),
    "a finetune job's tokenizer": lambda folder: build_encoder(folder, 32),
}


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS.keys())
@pytest.mark.parametrize("model_type", ["llama", "trojan"])
def test_code_put_into_a_registered_model_does_not_run(
    home: Path, tmp_path: Path, load: Callable[[Path], object], model_type: str
) -> None:
    """Even by who may write to the registry: data stays data. Loading may fail, or leave the code out."""
    folder = tmp_path / "models" / "tiny"
    shutil.copytree(home / "models" / "tiny", folder)
    plant(folder, tmp_path / "ran", model_type=model_type)
    with contextlib.suppress(Exception):
        load(folder)
    assert not (tmp_path / "ran").exists()
