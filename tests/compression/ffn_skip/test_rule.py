"""The rule by hand, and a text run at once against the same text token by token."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from compression.ffn_skip.baselines import ShareSkip
from compression.ffn_skip.profile import Substitute
from compression.ffn_skip.rule import NEVER, SkipRule, next_remaining, similarity
from compression.ffn_skip.substitute import Fitted
from compression.ffn_skip.teacher_forced import (
    AdaptiveSkip,
    blocks_skipped,
    feed_forwards_replaced,
    spread,
)
from tests.compression.ffn_skip.models import skipping_llama
from tests.reference.ffn_skip import run_text

NUM_LAYERS = 7
TAUS = (0.94, 0.965, 0.98)


@pytest.fixture(scope="module")
def model() -> Any:
    return skipping_llama(NUM_LAYERS)


def ids(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 61, (length,), generator=generator).tolist()


def test_similarity_is_of_the_residual_inclusive_pair() -> None:
    hidden = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    output = torch.tensor([[-3.0, 0.0], [0.0, 1.0]])
    expected = [4.0 * 4.0 / (5.0 * 4.0), 1.0 / 2.0**0.5]
    assert similarity(hidden, output).tolist() == pytest.approx(expected)


def test_a_hit_skips_the_next_k_middle_layers() -> None:
    """The row's similarities of layers 1, 2, ... with tau 0.5 and k 2, worked by hand."""
    remaining = torch.zeros(1, dtype=torch.int64)
    skipped = []
    for value in (0.4, 0.6, 0.9, 0.9, 0.1, 0.5, 0.0):
        is_skipped = remaining > 0
        skipped.append(bool(is_skipped))
        remaining = next_remaining(remaining, is_skipped, torch.tensor([value >= 0.5]), 2)
    assert skipped == [False, False, True, True, False, False, True]


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize(("k", "warm_up", "cold"), [(1, 0, (1, 1)), (2, 5, (0, 2)), (3, 1, (2, 0))])
def test_a_text_at_once_equals_token_by_token(
    model: Any, tau: float, k: int, warm_up: int, cold: tuple[int, int]
) -> None:
    generator = torch.Generator().manual_seed(1)
    bias_H = torch.randn(48, generator=generator) / 50
    substitutes: dict[int, Callable[[Tensor], Tensor]] = {
        3: Fitted(substitute=Substitute(kind="mean"), bias_H=bias_H)
    }
    rule = SkipRule(
        num_layers=NUM_LAYERS, cold_start=cold[0], cold_end=cold[1], k=k, warm_up=warm_up
    )
    texts = [ids(23, seed) for seed in (0, 1)]
    policy = AdaptiveSkip(rule, tau, substitutes)
    with torch.no_grad(), feed_forwards_replaced(model, policy):
        logits_BSV = model(torch.tensor(texts), use_cache=False).logits
    expected_skips = [0] * NUM_LAYERS
    for text, logits_SV in zip(texts, logits_BSV, strict=True):
        trace = run_text(
            model, text, tau=tau, k=k, warm_up=warm_up, cold=cold, substitutes=substitutes
        )
        torch.testing.assert_close(logits_SV, torch.stack(trace.logits), rtol=1e-4, atol=1e-4)
        assert trace.cache_lengths == list(range(1, 24))
        for _, layer in trace.skipped:
            expected_skips[layer] += 1
    assert policy.num_skipped == expected_skips
    assert policy.num_rows == 2 * (23 - warm_up)
    assert sum(expected_skips[: cold[0]]) == sum(expected_skips[NUM_LAYERS - cold[1] :]) == 0


def test_the_threshold_matters(model: Any) -> None:
    """The cases above skip, and not everything that they could."""
    rule = SkipRule(num_layers=NUM_LAYERS, cold_start=1, cold_end=1, warm_up=2)
    ratios = []
    for tau in (*TAUS, NEVER):
        policy = AdaptiveSkip(rule, tau)
        with torch.no_grad(), feed_forwards_replaced(model, policy):
            model(torch.tensor([ids(60)]), use_cache=False)
        ratios.append(policy.skip_ratio)
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[0] > ratios[1] > ratios[2] > ratios[3] == 0


def test_never_is_the_dense_model_and_warm_up_too(model: Any) -> None:
    text = torch.tensor([ids(30)])
    with torch.no_grad():
        dense = model(text, use_cache=False).logits
        rule = SkipRule(num_layers=NUM_LAYERS, cold_start=1, cold_end=1, warm_up=9)
        with feed_forwards_replaced(model, AdaptiveSkip(rule, NEVER)):
            never = model(text, use_cache=False).logits
        with feed_forwards_replaced(model, AdaptiveSkip(rule, 0.94)):
            skipping = model(text, use_cache=False).logits
        after = model(text, use_cache=False).logits
    torch.testing.assert_close(never, dense, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(skipping[:, :9], dense[:, :9], rtol=1e-5, atol=1e-5)
    assert (skipping[:, 9:] - dense[:, 9:]).abs().max() > 0.01
    assert torch.equal(after, dense)  # nothing of the replacement stays


def test_share_skip_leaves_out_the_output(model: Any) -> None:
    """A share of one, against a model whose layer has a feed-forward of zeros."""
    rule = SkipRule(num_layers=NUM_LAYERS, cold_start=0, cold_end=0, warm_up=0)
    text = torch.tensor([ids(19)])
    policy = ShareSkip(rule, {2: 1.0})
    with torch.no_grad():
        with feed_forwards_replaced(model, policy):
            actual = model(text, use_cache=False).logits
        weight = model.model.layers[2].mlp.down_proj.weight
        kept = weight.clone()
        weight.zero_()
        expected = model(text, use_cache=False).logits
        weight.copy_(kept)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert policy.skip_ratio == pytest.approx(1 / NUM_LAYERS)


def test_skipped_blocks_equal_a_model_without_them(model: Any) -> None:
    text = torch.tensor([ids(17)])
    with torch.no_grad():
        with blocks_skipped(model, {2: 1.0, 5: 1.0}, warm_up=0):
            actual = model(text, use_cache=False).logits
        layers = model.model.layers
        model.model.layers = torch.nn.ModuleList(
            [layer for index, layer in enumerate(layers) if index not in (2, 5)]
        )
        expected = model(text, use_cache=False).logits
        model.model.layers = layers
        with blocks_skipped(model, {2: 0.5}, warm_up=4):
            partly = model(text, use_cache=False).logits
        dense = model(text, use_cache=False).logits
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(partly[:, :4], dense[:, :4], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(partly[:, 5:], dense[:, 5:], atol=1e-3)


def test_spread_is_even() -> None:
    assert spread(6, 0.5).tolist() == [False, True, False, True, False, True]
    assert spread(100, 0.3).sum() == 30
    assert spread(5, 1.0).all()
    assert not spread(5, 0.0).any()


def test_a_failure_inside_gives_the_model_back(model: Any) -> None:
    mlps = [layer.mlp for layer in model.model.layers]

    class Failing:
        def feed_forward(self, *_: object) -> Tensor:
            raise KeyboardInterrupt

    with (
        pytest.raises(KeyboardInterrupt),
        torch.no_grad(),
        feed_forwards_replaced(model, Failing()),
    ):
        model(torch.tensor([ids(3)]), use_cache=False)
    assert [layer.mlp for layer in model.model.layers] == mlps
    hooks = [layer.post_attention_layernorm._forward_pre_hooks for layer in model.model.layers]
    assert not any(hooks)
