"""On real activations of SmolLM2-135M each method must lose less than the one it claims to improve on."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compression.hf import load_model
from compression.inverse_hessian import squared_error
from compression.pruning.magnitude import magnitude_keep_mask
from compression.pruning.masks import NM, Sparsity
from compression.pruning.sparsegpt import sparsegpt
from compression.pruning.wanda import wanda_keep_mask
from compression.quantization.awq import search_scale
from compression.quantization.gptq import gptq
from compression.quantization.int4 import dequantize, round_to_nearest
from compression.quantization.ranges import round_in_best_range
from compression.statistics import InputStatistics
from evaluation.corpora import STATE_OF_THE_UNION, load_corpus
from evaluation.perplexity import tokenize

pytestmark = pytest.mark.real_model
LAYER = 12
Statistics = dict[str, InputStatistics]
Weights = dict[str, tuple[Tensor, InputStatistics]]


@pytest.fixture(scope="module")
def measured(real_home: Path) -> tuple[dict[str, Tensor], Statistics, Statistics]:
    """Two layers of one block: weights, and statistics of their inputs over 1,024 tokens and over 1,024 others."""
    folder = real_home / "models" / "smollm2-135m"
    token_ids, _ = tokenize(folder, load_corpus(STATE_OF_THE_UNION))
    model = load_model(folder)
    block = model.model.layers[LAYER]
    linears = {"o_proj": block.self_attn.o_proj, "up_proj": block.mlp.up_proj}

    def statistics_of(token_ids: list[int]) -> Statistics:
        found = {}
        handles = []
        for name, linear in linears.items():
            statistics = InputStatistics(name=name, num_channels=linear.in_features, gram=True)
            found[name] = statistics
            handles.append(
                linear.register_forward_pre_hook(lambda _, args, s=statistics: s.add(args[0]))
            )
        with torch.inference_mode():
            model.model(torch.tensor(token_ids).reshape(4, 256), use_cache=False)
        for handle in handles:
            handle.remove()
        return found

    weights = {name: linear.weight for name, linear in linears.items()}
    return weights, statistics_of(token_ids[:1024]), statistics_of(token_ids[8192:9216])


@pytest.fixture(scope="module")
def layers(measured: tuple[dict[str, Tensor], Statistics, Statistics]) -> Weights:
    weights, statistics, _ = measured
    return {name: (weight_OI, statistics[name]) for name, weight_OI in weights.items()}


def gram_of(statistics: InputStatistics) -> Tensor:
    assert statistics.gram_II is not None
    return statistics.gram_II


@pytest.mark.parametrize("sparsity", [0.5, NM(2, 4)])
@pytest.mark.parametrize("name", ["o_proj", "up_proj"])
def test_sparsegpt_loses_less_than_wanda_and_wanda_less_than_magnitude(
    layers: Weights, name: str, sparsity: Sparsity
) -> None:
    weight_OI, statistics = layers[name]
    gram_II = gram_of(statistics)

    def error(pruned_OI: Tensor) -> float:
        return squared_error(pruned_OI - weight_OI, gram_II)

    magnitude = error(weight_OI * magnitude_keep_mask(weight_OI, sparsity))
    wanda = error(weight_OI * wanda_keep_mask(weight_OI, statistics.norm, sparsity))
    assert error(sparsegpt(weight_OI, gram_II, sparsity)) < 0.9 * wanda
    assert wanda < magnitude


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", ["o_proj", "up_proj"])
def test_gptq_and_awq_lose_less_than_round_to_nearest(
    layers: Weights, name: str, symmetric: bool
) -> None:
    weight_OI, statistics = layers[name]
    gram_II = gram_of(statistics)
    nearest = round_to_nearest(weight_OI, 64, symmetric=symmetric, scale_dtype=torch.bfloat16)
    nearest_error = squared_error(dequantize(nearest) - weight_OI, gram_II)
    quantized = gptq(weight_OI, gram_II, 64, symmetric=symmetric, scale_dtype=torch.bfloat16)
    assert squared_error(dequantize(quantized) - weight_OI, gram_II) < 0.4 * nearest_error
    scale = search_scale(
        [weight_OI],
        gram_II,
        statistics.mean_abs_I,
        64,
        symmetric=symmetric,
        scale_dtype=torch.bfloat16,
    )
    assert scale.error < nearest_error
    assert scale.nearest_error == pytest.approx(nearest_error, rel=1e-3)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", ["o_proj", "up_proj"])
def test_off_the_grid_and_on_unseen_text_gptq_and_awq_still_lose_less_than_round_to_nearest(
    measured: tuple[dict[str, Tensor], Statistics, Statistics], name: str, symmetric: bool
) -> None:
    # The packaged weights come from a 4-bit GGUF. A tenth of their spread leaves nothing of that grid.
    weights, seen, unseen = measured
    weight_OI = weights[name].float()
    noise_OI = torch.randn(weight_OI.shape, generator=torch.Generator().manual_seed(0))
    weight_OI = weight_OI + 0.1 * weight_OI.std() * noise_OI
    settings: dict[str, Any] = {"symmetric": symmetric, "scale_dtype": torch.bfloat16}

    def error(new_OI: Tensor) -> float:
        return squared_error(new_OI - weight_OI, gram_of(unseen[name]))

    gram_II = gram_of(seen[name])
    nearest = error(dequantize(round_to_nearest(weight_OI, 64, **settings)))
    assert error(dequantize(gptq(weight_OI, gram_II, 64, **settings))) < 0.6 * nearest
    found = search_scale([weight_OI], gram_II, seen[name].mean_abs_I, 64, **settings)
    importance_I = gram_II.diagonal() / found.scale_I.square()
    scaled = round_in_best_range(weight_OI * found.scale_I, importance_I, 64, **settings)
    assert error(dequantize(scaled) / found.scale_I) < 0.9 * nearest
