"""Fixtures that several rooms share, and how the tests meet a GPU.

Where there is none, Triton kernels run in its interpreter, on CPU tensors; where there is one, the same tests run
them compiled, and those marked `cuda` run too.
"""

import json
import os
from pathlib import Path

import pytest

from engines.process import set_openmp_environment

# Before torch is imported: with a busy neighbour, threads that spin make small products ten times as slow.
set_openmp_environment()
REPOSITORY = Path(__file__).parent.parent
# The device itself: in a container the driver's other files may be there without it.
HAS_GPU = any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()

if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HAS_GPU:
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU; docs/gpu.md says how"))


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def write_tiny_tokenizer(folder: Path) -> int:
    """A word-level tokenizer with two control tokens; returns its vocabulary's size."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", *"abcdefghijklmnopqrstuvwxyz "]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
    )
    config = {"eos_token": "</s>", "bos_token": "<s>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return len(words)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama in Hugging Face's layout, float32, untied."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny-llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        eos_token_id=2,
        bos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    write_tiny_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def real_home() -> Path:
    """A LATHE_HOME with the packaged models, converted once and kept in .cache/."""
    from compression.import_model import PACKAGED_MODELS, import_packaged
    from compression.registry import ModelNotFoundError, ModelRegistry

    home = REPOSITORY / ".cache" / "test-home"
    registry = ModelRegistry(home / "models")
    for model_id in PACKAGED_MODELS:
        try:
            registry.get(model_id)
        except ModelNotFoundError:
            import_packaged(registry, model_id)
    return home
