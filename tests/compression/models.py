"""Tiny checkpoints, calibration tokens and the naive forward pass that the pipeline's tests compare with."""

from pathlib import Path
from typing import Any

import torch

from compression.calibration import CalibrationTokens
from compression.import_model import import_folder
from compression.registry import ModelRegistry

VOCABULARY = 64


def save_and_import(model: Any, folder: Path, home: Path) -> Path:
    """Import a transformers model as a checkpoint; returns its folder."""
    from conformance.tiny import write_tiny_tokenizer

    model.save_pretrained(folder)
    write_tiny_tokenizer(folder)
    registry = ModelRegistry(home)
    import_folder(registry, "tiny", folder, report=lambda _: None)
    return registry.get("tiny").path


def tiny_decoder(**changes: Any) -> Any:
    """A random float32 Qwen2: Llama's blocks with biases on q, k and v; grouped heads, tied embeddings."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    settings = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "tie_word_embeddings": True, "eos_token_id": 2, "bos_token_id": 1,
    }  # fmt: skip
    model = Qwen2ForCausalLM(Qwen2Config(**settings | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)  # far enough from linear that blocks matter
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def calibration_tokens(samples: int = 5, length: int = 12) -> CalibrationTokens:
    generator = torch.Generator().manual_seed(1)
    ids_NS = torch.randint(0, VOCABULARY, (samples, length), generator=generator)
    return CalibrationTokens(ids_NS=ids_NS, provenance={"corpus": "random", "seed": 1})
