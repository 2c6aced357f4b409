"""The decoder's logits against transformers', for every architecture, in every way of cutting rows into passes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import GPT2Config, LlamaConfig

from compression.hf import load_model
from compression.pipeline import compress
from compression.recipe import parse_recipe
from compression.safetensors_header import CheckpointError
from engines.kernels.metadata import BLOCK_SIZE, RequestRows, build_metadata
from engines.model import (
    DecoderModel,
    UnsupportedModelError,
    build_kv_cache,
    bytes_per_block,
    load_decoder,
    read_decoder_config,
)
from tests.engines.models import (
    DECODER_CONFIGS,
    SIZES,
    VOCAB_SIZE,
    build_from_config,
    write_checkpoint,
)

pytestmark = pytest.mark.usefixtures("single_thread")

LENGTHS = (1, 16, 37, 50)


def _prompts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(VOCAB_SIZE, (length,), generator=generator) for length in LENGTHS]


def _reference(model: Any, ids_T: Tensor) -> Tensor:
    with torch.inference_mode():
        logits_TV: Tensor = model(ids_T[None]).logits[0]
    return logits_TV


def _in_one_pass(decoder: DecoderModel, prompts: list[Tensor]) -> list[Tensor]:
    """Without a cache."""
    metadata = build_metadata(
        [RequestRows(start=0, num_tokens=len(ids_T)) for ids_T in prompts], decoder.device
    )
    hidden_TH = decoder.forward(decoder.embed(torch.cat(prompts)), metadata, None)
    return list(torch.split(decoder.logits(hidden_TH), [len(ids_T) for ids_T in prompts]))


def _in_chunks(decoder: DecoderModel, prompts: list[Tensor], sizes: list[int]) -> list[Tensor]:
    """Requests start one pass after another and take chunks of the sizes in turn; blocks are scattered."""
    tables = [[2 + index + len(prompts) * block for block in range(4)] for index in range(4)]
    cache = build_kv_cache(decoder, 2 + 4 * len(prompts))
    for keys, values in cache:
        keys[1], values[1] = (
            torch.nan,
            torch.nan,
        )  # nobody's block; block 0 is what tables are padded with
    done = [0] * len(prompts)
    logits: list[list[Tensor]] = [[] for _ in prompts]
    num_passes = 0
    while any(count < len(ids_T) for count, ids_T in zip(done, prompts, strict=True)):
        chosen: list[int] = []
        rows: list[RequestRows] = []
        for index, ids_T in enumerate(prompts):
            size = min(sizes[(num_passes + index) % len(sizes)], len(ids_T) - done[index])
            if size and index <= num_passes:
                table = tables[index][: -(-(done[index] + size) // BLOCK_SIZE)]
                rows.append(RequestRows(start=done[index], num_tokens=size, block_table=table))
                chosen.append(index)
        num_passes += 1
        if not rows:
            continue
        parts = [
            prompts[i][r.start : r.start + r.num_tokens] for i, r in zip(chosen, rows, strict=True)
        ]
        metadata = build_metadata(rows, decoder.device)
        hidden_TH = decoder.forward(decoder.embed(torch.cat(parts)), metadata, cache)
        split = torch.split(decoder.logits(hidden_TH), [len(part) for part in parts])
        for index, logits_QV in zip(chosen, split, strict=True):
            logits[index].append(logits_QV)
            done[index] += len(logits_QV)
    return [torch.cat(parts) for parts in logits]


@pytest.mark.parametrize("name", DECODER_CONFIGS)
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    model = build_from_config(DECODER_CONFIGS[name]())
    decoder = load_decoder(write_checkpoint(model, tmp_path), dtype=torch.float32)
    prompts = _prompts()
    expected = [_reference(model, ids_T) for ids_T in prompts]
    assert min(float(logits_TV.std()) for logits_TV in expected) > 0.3
    passes = [_in_one_pass(decoder, prompts)]
    passes += [_in_chunks(decoder, prompts, sizes) for sizes in ([1], [7, 1, 16], [50])]
    for computed in passes:
        for actual, wanted in zip(computed, expected, strict=True):
            torch.testing.assert_close(actual, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_int4_logits_equal_those_of_transformers_modules(name: str, tmp_path: Path) -> None:
    model = build_from_config(DECODER_CONFIGS[name]())
    folder = write_checkpoint(model, tmp_path, int4=True)
    decoder = load_decoder(folder, dtype=torch.float32)
    assert any(linear.kernel.startswith("int4") for linear in decoder.linears())
    prompts = _prompts()
    expected = [_reference(load_model(folder, dtype=torch.float32), ids_T) for ids_T in prompts]
    for computed in (_in_one_pass(decoder, prompts), _in_chunks(decoder, prompts, [1, 9])):
        for actual, wanted in zip(computed, expected, strict=True):
            torch.testing.assert_close(actual, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("int4", [False, True])
def test_low_rank_logits_equal_those_of_transformers_modules(int4: bool, tmp_path: Path) -> None:
    model = build_from_config(DECODER_CONFIGS["qwen2"]())
    folder = tmp_path / "low-rank"
    stages: list[dict[str, Any]] = [
        {"welore": {"err": 0.3, "count": "all", "rank_multiple": 8}},
        *([{"int4": {"group_size": 32}}] if int4 else []),
    ]
    compress(write_checkpoint(model, tmp_path), folder, parse_recipe(stages), source_id="model")
    decoder = load_decoder(folder, dtype=torch.float32)
    assert any("low rank" in linear.kernel for linear in decoder.linears())
    reference = load_model(folder, dtype=torch.float32)
    prompts = _prompts()
    for actual, ids_T in zip(_in_chunks(decoder, prompts, [1, 9]), prompts, strict=True):
        torch.testing.assert_close(actual, _reference(reference, ids_T), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "stages",
    [
        [{"int8": {}}],
        [{"welore": {"err": 0.3, "count": "all", "rank_multiple": 8}}, {"int8": {}}],
        [{"magnitude": {"sparsity": "2:4"}}],
    ],
    ids=lambda stages: "+".join(next(iter(s)) for s in stages),
)
def test_other_kinds_give_the_logits_of_transformers_modules(
    stages: list[dict[str, Any]], tmp_path: Path
) -> None:
    model = build_from_config(DECODER_CONFIGS["qwen2"]())
    folder = tmp_path / "small"
    compress(write_checkpoint(model, tmp_path), folder, parse_recipe(stages), source_id="model")
    reference = load_model(folder, dtype=torch.float32)
    prompts = _prompts()
    decoder = load_decoder(folder, dtype=torch.float32)
    for actual, ids_T in zip(_in_chunks(decoder, prompts, [1, 9]), prompts, strict=True):
        torch.testing.assert_close(actual, _reference(reference, ids_T), atol=1e-4, rtol=1e-4)
    coarse = load_decoder(
        folder, dtype=torch.bfloat16
    )  # on the native products, where there are any
    for actual, ids_T in zip(_in_chunks(coarse, prompts, [1, 9]), prompts, strict=True):
        expected = _reference(reference, ids_T)
        assert (actual - expected).norm() < 0.1 * expected.norm()


def test_bfloat16_is_as_close_to_float32_as_transformers_is(tmp_path: Path) -> None:
    model = build_from_config(DECODER_CONFIGS["llama"]())
    folder = write_checkpoint(model, tmp_path)
    decoder = load_decoder(folder, dtype=torch.bfloat16)
    theirs = load_model(folder, dtype=torch.bfloat16)
    prompts = _prompts()
    for actual, ids_T in zip(_in_chunks(decoder, prompts, [8, 1]), prompts, strict=True):
        exact_TV = _reference(model, ids_T)
        error = (_reference(theirs, ids_T).float() - exact_TV).norm()
        assert (actual - exact_TV).norm() < 2 * error


def test_blocks_of_differing_shape(tmp_path: Path) -> None:
    """Each layer's feed-forward width and heads are its tensors', whatever config.json says of all."""
    model = build_from_config(DECODER_CONFIGS["llama"]())
    folder = write_checkpoint(model, tmp_path)
    plain = load_decoder(folder, dtype=torch.float32)
    manifest = json.loads((folder / "lathe.json").read_text())
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    kept = 21
    for name, axis in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
        key = f"model.layers.1.mlp.{name}.weight"
        tensors[key] = tensors[key].narrow(axis, 0, kept).contiguous()
        row = next(m for m in manifest["matrices"] if m["name"] == f"model.layers.1.mlp.{name}")
        row["in_features" if axis else "out_features"] = kept
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "lathe.json").write_text(json.dumps(manifest))
    narrow = load_decoder(folder, dtype=torch.float32)
    with torch.no_grad():
        mlp = model.model.layers[1].mlp
        mlp.down_proj.weight[:, kept:] = 0
    prompts = _prompts()
    for actual, ids_T in zip(_in_chunks(narrow, prompts, [1, 9]), prompts, strict=True):
        torch.testing.assert_close(actual, _reference(model, ids_T), atol=1e-4, rtol=1e-4)
    assert sum(t.numel() for t in narrow.tensors()) < sum(t.numel() for t in plain.tensors())


def test_facts_of_a_model(tmp_path: Path) -> None:
    model = build_from_config(DECODER_CONFIGS["qwen2"]())
    folder = write_checkpoint(model, tmp_path)
    decoder = load_decoder(folder, dtype=torch.float32)
    assert decoder.config.windows == (None, 8)
    assert decoder.config.eos_token_ids == (96,)
    # 2 (key and value) * 2 layers * 2 heads * 8 values * 16 tokens * 4 bytes
    assert bytes_per_block(decoder) == 4096
    held = {tensor.data_ptr(): tensor.nbytes for tensor in decoder.tensors()}
    tables = 2 * 256 * 4 * 4
    assert sum(held.values()) == sum(p.numel() for p in model.parameters()) * 4 + tables


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "activation gelu"),
        (
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 100.0,
                    "factor": 2.0,
                    "short_factor": [1.0] * 4,
                    "long_factor": [1.0] * 4,
                }
            },
            "rope scaling longrope",
        ),
        (
            {
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 100.0,
                    "partial_rotary_factor": 0.5,
                }
            },
            "partial_rotary_factor 0.5",
        ),
    ],
)
def test_what_the_decoder_does_not_have_is_named(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    LlamaConfig(**SIZES, **changes).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=message):
        read_decoder_config(tmp_path)


def test_other_architectures_are_named(tmp_path: Path) -> None:
    GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="model type gpt2"):
        read_decoder_config(tmp_path)


def test_a_tensor_without_a_place_is_named(tmp_path: Path) -> None:
    """A Llama that has Qwen3's norms, say, would compute something else without them."""
    model = build_from_config(DECODER_CONFIGS["llama"]())
    folder = write_checkpoint(model, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"layers\.1\..* has no place"):
        load_decoder(folder)
    config["num_hidden_layers"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"no linear layer model\.layers\.2"):
        load_decoder(folder)


@pytest.mark.real_model
def test_logits_of_the_real_model_are_as_exact_as_transformers(real_model_dir: Path) -> None:
    """Both are some 1e-4 away from float64 where logits reach 30; neither is the other's truth to more than that."""
    decoder = load_decoder(real_model_dir, dtype=torch.float32)
    model = load_model(real_model_dir, dtype=torch.float32)
    tokenizer = Tokenizer.from_file(str(real_model_dir / "tokenizer.json"))
    texts = [
        "The capital of France is Paris, a city on the Seine that two million people live in.",
        "def add(a: int, b: int) -> int:\n    return a + b\n\nprint(add(3, 4))",
        "Hello",
        "Water boils at 100 degrees Celsius at sea level, and at less on a mountain.",
    ]
    prompts = [torch.tensor(tokenizer.encode(text).ids) for text in texts]
    theirs = [_reference(model, ids_T) for ids_T in prompts]
    exact = [_reference(model.double(), ids_T) for ids_T in prompts]
    ours = _in_chunks(decoder, prompts, [17, 1])
    error = _largest_difference(ours, exact)
    assert error < 2 * _largest_difference(theirs, exact)
    assert error < 2e-4
    for our_TV, their_TV in zip(ours, theirs, strict=True):
        assert torch.equal(our_TV.argmax(dim=1), their_TV.argmax(dim=1))


def _largest_difference(logits: list[Tensor], exact: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(logits, exact, strict=True))
