"""What calibration measures, against slow loops and by hand."""

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from compression.ffn_skip import calibrate
from compression.ffn_skip.baselines import (
    random_shares,
    ranked_shares,
    static_shares,
    unified_layers,
)
from compression.ffn_skip.calibrate import (
    SkipCalibration,
    SkipCalibrationError,
    bisect_tau,
    choose_cold,
    summarise,
)
from compression.ffn_skip.profile import Substitute
from compression.ffn_skip.rule import SkipRule
from compression.ffn_skip.substitute import Moments, choose_substitute
from compression.ffn_skip.traffic import WeightTraffic
from tests.compression.ffn_skip.models import skipping_llama
from tests.reference.ffn_skip import cosine

WARM_UP = 3


@pytest.fixture(scope="module")
def model() -> Any:
    return skipping_llama(num_layers=5)


def ids(num_texts: int, length: int) -> Any:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(0, 61, (num_texts, length), generator=generator)


@torch.no_grad()
def naive_states(model: Any, text: Any) -> tuple[list[list[tuple[Any, Any, Any]]], list[Any]]:
    """Per layer and token (h, normed, output), and every block's (input, output)."""
    decoder = model.model
    x = decoder.embed_tokens(text[None])
    positions = torch.arange(len(text))[None]
    embeddings = decoder.rotary_emb(x, position_ids=positions)
    mask = torch.full((len(text), len(text)), -math.inf).triu(1)[None, None]
    states, blocks = [], []
    for layer in decoder.layers:
        h = (
            x
            + layer.self_attn(
                layer.input_layernorm(x), attention_mask=mask, position_embeddings=embeddings
            )[0]
        )
        normed = layer.post_attention_layernorm(h)
        output = layer.mlp(normed)
        states.append(list(zip(h[0], normed[0], output[0], strict=True)))
        blocks.append((x[0], (h + output)[0]))
        x = h + output
    return states, blocks


def test_observation_is_what_a_loop_over_tokens_sees(model: Any) -> None:
    texts = ids(3, 11)
    found = SkipCalibration(model, texts, k=1, warm_up=WARM_UP).observe()
    seen: list[list[float]] = [[] for _ in range(5)]
    influence = [0.0] * 5
    for text in texts:
        states, blocks = naive_states(model, text)
        for layer in range(5):
            seen[layer] += [cosine(h, h + out) for h, _, out in states[layer][WARM_UP:]]
            influence[layer] += sum(
                1 - cosine(a, b) for a, b in zip(*blocks[layer], strict=True)
            ) / (3 * 11)
    assert found.means == pytest.approx([sum(row) / len(row) for row in seen], abs=1e-4)
    assert found.block_influence == pytest.approx(influence, abs=1e-4)
    assert found.lowest == pytest.approx(min(min(row) for row in seen[1:-1]), abs=1e-4)
    assert found.highest == pytest.approx(max(max(row) for row in seen[1:-1]), abs=1e-4)
    assert all(sum(row["histogram"]) == 3 * (11 - WARM_UP) for row in found.similarity)


def test_damage_is_the_ratio_of_losses(model: Any) -> None:
    texts = ids(2, 13)
    found = SkipCalibration(model, texts, k=1, warm_up=0).damage(num_tokens=26)

    def loss() -> float:
        with torch.no_grad():
            logits = model(texts, use_cache=False).logits[:, :-1]
        return float(F.cross_entropy(logits.flatten(0, 1), texts[:, 1:].flatten()))

    dense = loss()
    for layer, ratio in enumerate(found):
        weight = model.model.layers[layer].mlp.down_proj.weight
        kept = weight.clone()
        weight.zero_()
        assert ratio == pytest.approx(math.exp(loss() - dense), rel=1e-4)
        weight.copy_(kept)


def test_substitutes_are_fitted_on_the_dense_rows_of_every_other_batch(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "TOKENS_PER_BATCH", 40)
    monkeypatch.setattr(calibrate, "MAX_MOMENT_BYTES", 2 * 2 * 2 * 8 * 48**2)  # two layers at once
    texts = ids(8, 20)
    calibration = SkipCalibration(model, texts, k=1, warm_up=WARM_UP)
    rule = calibration.rule((1, 1))
    found = calibration.fit_substitutes(rule, rank=2)
    assert found.keys() == {1, 2, 3}
    states = [naive_states(model, text)[0] for text in texts]
    for layer, (fitted, missed) in found.items():
        halves = [Moments(48), Moments(48)]
        for index in range(8):  # two texts to a batch
            rows = states[index][layer][WARM_UP:]
            x, y = torch.stack([r[1] for r in rows]), torch.stack([r[2] for r in rows])
            halves[index // 2 % 2].add(x, y)
        expected, expected_missed = choose_substitute(*halves, rank=2)
        assert fitted.substitute == expected.substitute
        assert missed == pytest.approx(expected_missed, rel=1e-3)
        probe = torch.randn(4, 48)
        torch.testing.assert_close(fitted(probe), expected(probe), rtol=1e-3, atol=1e-4)


def test_a_threshold_for_each_share(model: Any) -> None:
    calibration = SkipCalibration(model, ids(4, 60), k=1, warm_up=WARM_UP)
    observation = calibration.observe()
    rule = calibration.rule((1, 1))
    bounds = {"low": observation.lowest, "high": observation.highest, "num_tokens": 240}
    taus = []
    for target in (0.04, 0.1, 0.15):
        tau, policy = calibration.find_tau(rule, target, {}, **bounds)  # type: ignore[arg-type]
        assert policy.skip_ratio == pytest.approx(target, abs=0.015)
        assert policy.num_rows == 4 * (60 - WARM_UP)
        taus.append(tau)
    assert taus == sorted(taus, reverse=True)
    with pytest.raises(SkipCalibrationError, match=r"0\.5 cannot be reached: at most 0\.2"):
        calibration.find_tau(rule, 0.5, {}, **bounds)  # type: ignore[arg-type]


def test_bisection_finds_the_crossing() -> None:
    tau, share = bisect_tau(lambda t: 1 - t, 0.3, low=0.0, high=1.0, tolerance=0.001)
    assert share == pytest.approx(0.3, abs=0.001)
    assert tau == pytest.approx(0.7, abs=0.001)
    steps = bisect_tau(lambda t: 0.4 if t < 0.5 else 0.1, 0.35, low=0.0, high=1.0)
    assert steps[1] == 0.4  # never reached exactly: the nearest


def test_cold_layers_are_outside_of_the_longest_run() -> None:
    good, bad = 0.95, 0.5
    assert choose_cold([bad, good, good, bad], [1.1] * 4) == (1, 1)
    assert choose_cold([good] * 4, [9.0, 1.1, 1.1, 1.1]) == (1, 0)
    assert choose_cold([good] * 3, [1.0] * 3) == (0, 0)
    assert choose_cold([good, bad, good, good, bad], [1.0] * 5) == (2, 1)
    with pytest.raises(SkipCalibrationError, match="no layer may skip"):
        choose_cold([bad, good], [1.0, math.nan])


def test_summary_of_similarities() -> None:
    row = summarise(torch.tensor([-1.0, 0.8, 0.805, 0.995, 1.0]))
    assert row["histogram"] == [3, *[0] * 18, 2]
    assert row["mean"] == pytest.approx(0.52)


def test_what_cannot_be_calibrated_is_refused(model: Any) -> None:
    with pytest.raises(SkipCalibrationError, match="none behind a warm-up of 25"):
        SkipCalibration(model, ids(2, 26), k=1, warm_up=25)
    few = SkipCalibration(model, ids(2, 26), k=1, warm_up=5)
    with pytest.raises(SkipCalibrationError, match="52 calibration tokens are too few"):
        few.fit_substitutes(few.rule((1, 1)), rank=2)


def test_shares_of_the_baselines() -> None:
    rule = SkipRule(num_layers=10, cold_start=1, cold_end=1)
    assert random_shares(rule, 0.2) == dict.fromkeys(range(1, 9), 0.25)
    with pytest.raises(ValueError, match="only 8 layers may skip"):
        random_shares(rule, 0.9)
    means = [1.0, 0.2, 0.9, 0.3, 0.8, 0.1, 0.1, 0.1, 0.1, 1.0]
    assert static_shares(rule, means, 0.25) == {2: 1.0, 4: 1.0, 3: 0.5}
    assert ranked_shares([3, 1], 1.0) == {3: 1.0}


def test_unified_layer_skipping_by_hand() -> None:
    """12 blocks, 6 kept: interval 12 // 5 = 2, so 0, 2, 4, 6, 8 and the last stay."""
    assert unified_layers(12, 6) == [1, 3, 5, 7, 9, 10]
    assert unified_layers(12, 0) == []
    assert unified_layers(5, 3) == [1, 2, 3]
    with pytest.raises(ValueError, match="at least 2"):
        unified_layers(5, 4)


def test_weight_traffic_by_hand() -> None:
    traffic = WeightTraffic(total=1000, blocks=(300, 300), feed_forwards=(200, 200))
    linear = Substitute(kind="linear", rank=1)  # bias 4, u 4, v 4 numbers of 2 bytes
    saved = traffic.saved_by_rows([5, 10], 10, {1: linear}, hidden_size=4, dtype="BF16")
    assert saved == pytest.approx((0.5 * 200 + 1.0 * (200 - 24)) / 1000)
    assert traffic.feed_forwards_of(0.1) == pytest.approx(0.25)
    assert traffic.blocks_of(0.3) == pytest.approx(1.0)
