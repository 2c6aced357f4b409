"""Copies for other programs, loaded by plain transformers: dense ones, codes, and blocks of unequal shape."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from compression.checkpoint import LAYER_SHAPES, verify_checkpoint, write_manifest
from compression.export import export
from compression.hf import fingerprint, load_model, read_config
from compression.pipeline import compress
from compression.recipe import parse_recipe
from compression.registry import ModelRegistry
from compression.safetensors_header import CheckpointError
from service.cli import main
from tests.compression.models import calibration_tokens, save_and_import, tiny_decoder

RECIPES: list[list[dict[str, Any]]] = [
    [{"int4": {"group_size": 32, "symmetric": False}}],
    [{"welore": {"err": 0.5, "count": "all", "allocation": "uniform", "rank_multiple": 8}}],
    [
        {"shortgpt": {"remove": 1}},
        {"welore": {"err": 0.5, "count": "all", "allocation": "uniform", "rank_multiple": 32}},
        {"int4": {"group_size": 32, "method": "gptq"}},
    ],
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    source = save_and_import(tiny_decoder(), home / "hf", home / "models")
    for index, stages in enumerate(RECIPES):
        recipe = parse_recipe(stages)
        tokens = calibration_tokens() if recipe.calibrated else None
        folder = home / "models" / f"small-{index}"
        manifest = compress(source, folder, recipe, source_id="tiny", calibration=tokens)
        write_manifest(folder, replace(manifest, fingerprint=fingerprint(load_model(folder))))
    return home


@pytest.mark.parametrize("index", range(len(RECIPES)))
def test_transformers_loads_the_copy_and_gives_our_logits(
    home: Path, tmp_path: Path, index: int
) -> None:
    options = ["export", f"small-{index}", str(tmp_path / "out"), "--home", str(home)]
    result = CliRunner().invoke(main, options)
    assert result.exit_code == 0, result.output
    assert verify_checkpoint(tmp_path / "out").problems == ()
    verified = CliRunner().invoke(main, ["verify", str(tmp_path / "out"), "--home", str(home)])
    assert "logits are as promised" in verified.output
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ours = load_model(home / "models" / f"small-{index}", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, ours(ids).logits, atol=1e-3, rtol=1e-3)


def test_unequal_blocks_and_unknown_models_are_refused(home: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(home / "models" / "tiny", source)
    config = read_config(source)
    shape = {"intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
    config[LAYER_SHAPES] = [shape, shape, shape | {"intermediate_size": 64}]
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=LAYER_SHAPES):
        export(source, tmp_path / "out", source_id="tiny")
    result = CliRunner().invoke(main, ["export", "none", str(tmp_path), "--home", str(home)])
    assert "no model 'none'" in result.output


@pytest.mark.parametrize("stage", [{"int8": {}}, {"int4": {"group_size": 32}}])
def test_codes_go_out_as_they_are(
    home: Path, tmp_path: Path, stage: dict[str, dict[str, Any]]
) -> None:
    source = ModelRegistry(home / "models").get("tiny").path
    compress(source, tmp_path / "small", parse_recipe([stage]), source_id="tiny")
    out = tmp_path / "out"
    export(tmp_path / "small", out, source_id="small", format="compressed-tensors")
    assert verify_checkpoint(out).problems == ()
    plain = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
    with torch.no_grad():
        ours = load_model(tmp_path / "small", dtype=torch.float32)(ids).logits
        torch.testing.assert_close(plain(ids).logits, ours, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "message"), [("tiny", "has dense"), ("small-0", "asymmetric"), ("small-1", "low_rank")]
)
def test_what_is_no_code_is_refused_as_compressed_tensors(
    home: Path, tmp_path: Path, name: str, message: str
) -> None:
    options = ["export", name, str(tmp_path / "out"), "--format", "compressed-tensors"]
    result = CliRunner().invoke(main, [*options, "--home", str(home)])
    assert result.exit_code != 0
    assert message in result.output


class DeciConfig(LlamaConfig):  # type: ignore[misc]
    """As NVIDIA's own: what is not in `block_configs` is None."""

    model_type = "nemotron-nas"

    def __init__(
        self,
        block_configs: list[dict[str, Any]] | None = None,
        intermediate_size: None = None,
        num_key_value_heads: None = None,
        **fields: Any,
    ) -> None:
        super().__init__(intermediate_size=256, **fields)
        self.block_configs = block_configs


def deci_width(ffn_mult: float, hidden_size: int) -> int:
    """As NVIDIA, vLLM and llama.cpp derive it."""
    width = int(2 * ffn_mult * hidden_size / 3)
    return width if width % 256 == 0 else width + 256 - width % 256


class DeciForCausalLM(LlamaForCausalLM):  # type: ignore[misc]
    """Llama with blocks resized by `block_configs`."""

    config_class = DeciConfig

    def __init__(self, config: DeciConfig) -> None:
        super().__init__(config)
        hidden, heads = config.hidden_size, config.num_attention_heads
        size = hidden // heads
        for layer, block in zip(self.model.layers, config.block_configs or (), strict=True):
            width = deci_width(block["ffn"]["ffn_mult"], hidden)
            attention = layer.self_attn
            attention.num_key_value_groups = block["attention"]["n_heads_in_group"]
            key_values = heads // attention.num_key_value_groups * size
            for name in ("k_proj", "v_proj"):
                linear = torch.nn.Linear(hidden, key_values, bias=config.attention_bias)
                attention.set_submodule(name, linear)
            for name in ("gate_proj", "up_proj"):
                layer.mlp.set_submodule(name, torch.nn.Linear(hidden, width, bias=config.mlp_bias))
            layer.mlp.down_proj = torch.nn.Linear(width, hidden, bias=config.mlp_bias)


AutoConfig.register("nemotron-nas", DeciConfig, exist_ok=True)
AutoModelForCausalLM.register(DeciConfig, DeciForCausalLM, exist_ok=True)


@pytest.mark.parametrize(
    "stages",
    [
        [{"flap": {"sparsity": 0.1}}],
        [{"flap": {"sparsity": 0.25}}, {"int4": {"group_size": 32}}],
        [{"shortgpt": {"remove": 1}}, {"flap": {"sparsity": 0.5}}],
        [{"structured": {"heads_per_group": 1, "ffn_width": 64}}],
        [{"welore": {"err": 0.5, "count": "all", "allocation": "uniform", "rank_multiple": 8}}],
    ],
    ids=lambda stages: "+".join(next(iter(s)) for s in stages),
)
def test_unequal_blocks_load_as_nemotron_nas(
    home: Path, tmp_path: Path, stages: list[dict[str, Any]]
) -> None:
    source = ModelRegistry(home / "models").get("tiny").path
    recipe = parse_recipe(stages)
    tokens = calibration_tokens() if recipe.calibrated else None
    small, out = tmp_path / "small", tmp_path / "out"
    compress(source, small, recipe, source_id="tiny", calibration=tokens)
    manifest = export(small, out, source_id="small", format="nemotron-nas")
    assert verify_checkpoint(out).problems == ()
    config = read_config(out)
    assert len(config["block_configs"]) == config["num_hidden_layers"]
    assert {row.linear.kind for row in manifest.matrices} == {"dense"}
    plain, report = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
    with torch.no_grad():
        ours = load_model(small, dtype=torch.float32)(ids).logits
        torch.testing.assert_close(plain(ids).logits, ours, atol=1e-3, rtol=1e-3)


def test_what_nemotron_nas_cannot_say_is_refused(tmp_path: Path) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, head_dim=16, max_position_embeddings=64,
        )
    )  # fmt: skip
    source = save_and_import(model, tmp_path / "hf", tmp_path / "models")
    with pytest.raises(CheckpointError, match="qwen3"):
        export(source, tmp_path / "out", source_id="tiny", format="nemotron-nas")
    window = tiny_decoder(use_sliding_window=True, sliding_window=8, max_window_layers=1)
    source = save_and_import(window, tmp_path / "hf2", tmp_path / "models2")
    with pytest.raises(CheckpointError, match="sliding window"):
        export(source, tmp_path / "out", source_id="tiny", format="nemotron-nas")
    assert not (tmp_path / "out").exists()
