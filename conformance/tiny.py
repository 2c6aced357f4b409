"""A home with the default models' names over tiny random weights: a service that answers at once and knows nothing."""

import json
from pathlib import Path

from service.settings import DEFAULT_EMBEDDING_MODEL, DEFAULT_MODEL


def write_tiny_home(home: Path) -> None:
    from compression.import_model import import_folder
    from compression.registry import ModelRegistry

    source = home / "tiny-llama"
    write_tiny_llama(source)
    for model_id in (DEFAULT_MODEL, DEFAULT_EMBEDDING_MODEL):
        import_folder(ModelRegistry(home / "models"), model_id, source, report=lambda _: None)


def write_tiny_llama(folder: Path) -> None:
    """A random two-layer Llama in Hugging Face's layout, float32, untied."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

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
