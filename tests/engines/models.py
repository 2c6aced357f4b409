"""Tiny random models for the engine tests: architectures that transformers knows, at sizes a test can afford."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    BloomConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from compression.import_model import import_folder
from compression.pipeline import compress
from compression.recipe import parse_recipe
from compression.registry import ModelRegistry
from conformance.tiny import write_tiny_tokenizer

VOCAB_SIZE = 97
EOS = 96


SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": EOS,
    "bos_token_id": 1,
}


def _llama() -> LlamaConfig:
    return LlamaConfig(**SIZES, tie_word_embeddings=True)


def _gpt2() -> GPT2Config:
    return GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=256,
        eos_token_id=EOS,
        bos_token_id=EOS,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )


def _mistral() -> MistralConfig:
    """A sliding window shorter than the tests' prompts."""
    return MistralConfig(**SIZES, sliding_window=8)


def _bloom() -> BloomConfig:
    """Position by biases on attention, not by position ids."""
    return BloomConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, n_layer=2, n_head=4, eos_token_id=EOS, bos_token_id=1
    )


def _rope_scaled(**rope: Any) -> LlamaConfig:
    return LlamaConfig(**SIZES, rope_parameters={"rope_theta": 500.0, **rope})


def _qwen2() -> Qwen2Config:
    """Biased projections, and a window in the upper layer only."""
    window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    return Qwen2Config(**SIZES, **window, tie_word_embeddings=True)


CONFIGS = {"llama": _llama, "gpt2": _gpt2, "mistral": _mistral, "bloom": _bloom}

DECODER_CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": _llama,
    "llama with biases": lambda: LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama of one head group": lambda: LlamaConfig(
        **{**SIZES, "num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 30}
    ),
    "rope linear": lambda: _rope_scaled(rope_type="linear", factor=2.0),
    "rope dynamic": lambda: _rope_scaled(rope_type="dynamic", factor=2.0),
    "rope llama3": lambda: _rope_scaled(
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=64,
    ),
    "rope yarn": lambda: _rope_scaled(
        rope_type="yarn", factor=4.0, original_max_position_embeddings=64
    ),
    "mistral": _mistral,
    "mistral with wide heads": lambda: MistralConfig(**SIZES, sliding_window=None, head_dim=16),
    "qwen2": _qwen2,
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=8),
    "qwen3 with wide heads": lambda: Qwen3Config(
        **SIZES, head_dim=32, use_sliding_window=True, sliding_window=8, max_window_layers=1
    ),
}
"""Configurations that `engines.model` computes."""


def build_causal_lm(architecture: str, seed: int = 0) -> Any:
    return build_from_config(CONFIGS[architecture](), seed)


def build_from_config(config: Any, seed: int = 0) -> Any:
    """A float32 model in eval mode; weights are large enough for decided argmaxes, norms and biases not neutral."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.25)
        else:
            parameter.data += torch.empty_like(parameter).uniform_(-0.2, 0.2)
    return model.eval().requires_grad_(False)


def write_checkpoint(model: Any, parent: Path, *, int4: bool = False) -> Path:
    """Save a transformers model as a Lathe checkpoint; with `int4`, in asymmetric groups of 32."""
    folder = parent / "hugging-face"
    model.save_pretrained(folder)
    write_tiny_tokenizer(folder)
    registry = ModelRegistry(parent / "models")
    import_folder(registry, "model", folder, report=lambda _: None)
    checkpoint = registry.get("model").path
    if not int4:
        return checkpoint
    recipe = parse_recipe([{"int4": {"group_size": 32, "symmetric": False}}])
    compress(checkpoint, parent / "int4", recipe, source_id="model")
    return parent / "int4"


def build_encoder(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
    )
    return BertModel(config, add_pooling_layer=False).eval().requires_grad_(False)
