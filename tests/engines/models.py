"""Tiny random models for the engine tests: architectures that transformers knows, at sizes a test can afford."""

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
)

VOCAB_SIZE = 97
EOS = 96


def _llama() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=EOS,
        bos_token_id=1,
        tie_word_embeddings=True,
    )


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
    return MistralConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        sliding_window=8,
        eos_token_id=EOS,
        bos_token_id=1,
    )


def _bloom() -> BloomConfig:
    """Position by biases on attention, not by position ids."""
    return BloomConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, n_layer=2, n_head=4, eos_token_id=EOS, bos_token_id=1
    )


CONFIGS = {"llama": _llama, "gpt2": _gpt2, "mistral": _mistral, "bloom": _bloom}


def build_causal_lm(architecture: str, seed: int = 0) -> Any:
    """A float32 model in eval mode; weights are large enough for decided argmaxes."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[architecture]())
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    return model.eval().requires_grad_(False)


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
