"""SmolLM2-135M with heads cut and packed 2:4: sound on disk, and decoded by the engine as by transformers' modules."""

from pathlib import Path
from typing import Any

import pytest
import torch

from compression.calibration import sample_tokens
from compression.checkpoint import verify_checkpoint
from compression.hf import load_model
from compression.pipeline import compress
from compression.recipe import Calibration, parse_recipe
from engines.engine import NativeEngine
from engines.protocol import SamplingParams
from evaluation.corpora import STATE_OF_THE_UNION, load_corpus
from evaluation.perplexity import tokenize
from tests.engines.decoding import build_request, generate, run_one, token_ids_of

pytestmark = pytest.mark.real_model
NUM_TOKENS = 12


def _compressed(source: Path, folder: Path, stages: list[dict[str, Any]]) -> Path:
    settings = Calibration(corpus=STATE_OF_THE_UNION, samples=2, length=64)
    corpus = load_corpus(STATE_OF_THE_UNION)
    tokens = sample_tokens(tokenize(source, corpus)[0], settings, sha256=corpus.sha256)
    recipe = parse_recipe(stages)
    compress(source, folder, recipe, source_id="smollm2-135m", calibration=tokens)
    assert verify_checkpoint(folder).ok
    return folder


def _check_decoding(folder: Path, model: Any) -> None:
    prompt = tokenize(folder, load_corpus(STATE_OF_THE_UNION))[0][:24]
    engine = NativeEngine.load("small", folder, dtype=torch.float32)
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
    found = token_ids_of(run_one(engine, build_request("r", prompt, params)))
    assert found == generate(model, prompt, NUM_TOKENS, eos=None)


def test_heads(real_home: Path, tmp_path: Path) -> None:
    """Two of three groups stay, and two of three query heads in each; the result is a plain Llama to transformers."""
    from transformers import AutoModelForCausalLM

    source = real_home / "models" / "smollm2-135m"
    stage = {"structured": {"num_key_value_heads": 2, "heads_per_group": 2}}
    folder = _compressed(source, tmp_path / "heads", [stage])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.weight.shape == (4 * 64, 576)
    assert attention.k_proj.weight.shape == (2 * 64, 576)
    assert attention.o_proj.weight.shape == (576, 4 * 64)
    _check_decoding(folder, model)


def test_packed_two_four(real_home: Path, tmp_path: Path) -> None:
    """Of every four weights two are the source's own and two are zero."""
    source = real_home / "models" / "smollm2-135m"
    folder = _compressed(source, tmp_path / "sparse", [{"wanda": {"sparsity": "2:4"}}])
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert size < 0.67 * sum(path.stat().st_size for path in source.glob("*.safetensors"))
    dense = load_model(source, dtype=torch.float32).state_dict()
    model = load_model(folder, dtype=torch.float32)
    checked = 0
    for name, module in model.named_modules():
        if ".layers." in name and name.endswith("_proj"):
            weight_OI = module.weight
            kept_OI = weight_OI != 0
            assert kept_OI.unflatten(1, (-1, 4)).sum(dim=-1).max() <= 2
            assert torch.equal(weight_OI[kept_OI], dense[f"{name}.weight"][kept_OI])
            checked += 1
    assert checked == 7 * 30
    _check_decoding(folder, model)
