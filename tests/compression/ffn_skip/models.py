"""A tiny random Llama whose feed-forwards change the residual stream about as much as a trained model's."""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def skipping_llama(
    num_layers: int = 7, vocab_size: int = 61, *, ties: bool = True, width: int = 80
) -> Any:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=48,
        intermediate_size=width,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=ties,
        eos_token_id=2,
        bos_token_id=1,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.mul_(4)
    return model
