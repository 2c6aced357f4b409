"""Sampling against hand-worked rows, and against transformers' own processors as the naive reference."""

import dataclasses
import math
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopPLogitsWarper,
)

from engines import sampling
from engines.protocol import SamplingParams
from engines.sampling import (
    SamplingState,
    apply_logit_bias,
    apply_penalties,
    ban_tokens,
    build_generator,
    choose_token,
    choose_tokens,
    draw,
    keep_min_p,
    keep_top_p,
    token_logprobs,
    top_k_ids,
)

INF = math.inf
LOGITS = torch.tensor([1.0, 3.0, 2.0, 3.0, -1.0])


def _params(**fields: object) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 8, **fields})  # type: ignore[arg-type]


def _choose(
    logits_V: Tensor,
    *,
    output_ids: tuple[int, ...] = (),
    end_ids: tuple[int, ...] = (),
    seed: int = 0,
    **fields: object,
) -> int:
    return choose_token(
        logits_V,
        _params(**fields),
        prompt_ids=(),
        output_ids=output_ids,
        end_ids=end_ids,
        generator=build_generator(seed),
    )


def _kept(logits_V: Tensor) -> list[int]:
    return [index for index, value in enumerate(logits_V.tolist()) if value > -INF]


def _random_logits(seed: int, size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 3


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    assert _choose(LOGITS, temperature=0) == 1


def test_penalties_by_hand() -> None:
    logits_V = torch.tensor([2.0, -2.0, 4.0, 1.0])
    params = _params(repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25)
    result = apply_penalties(logits_V, params, prompt_ids=[0, 1], output_ids=[2, 2])
    # Repetition: 2/2, -2*2, 4/2; then token 2, generated twice, loses 0.5 + 2 * 0.25.
    assert result.tolist() == [1.0, -4.0, 1.0, 1.0]
    assert logits_V.tolist() == [2.0, -2.0, 4.0, 1.0]


def test_repetition_penalty_is_that_of_transformers() -> None:
    logits_V = _random_logits(1, 50)
    ids = [3, 7, 7, 49]
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([ids]), logits_V[None].clone())[0]
    result = apply_penalties(
        logits_V, _params(repetition_penalty=1.3), prompt_ids=ids[:2], output_ids=ids[2:]
    )
    assert torch.equal(result, expected)


def test_frequency_penalty_counts_generated_tokens_only() -> None:
    params = _params(frequency_penalty=1.0)
    result = apply_penalties(LOGITS, params, prompt_ids=[1, 1], output_ids=[3])
    assert result.tolist() == [1.0, 3.0, 2.0, 2.0, -1.0]


def test_a_huge_bias_forces_and_forbids() -> None:
    assert apply_logit_bias(LOGITS, {4: 100.0, 0: -100.0}).tolist() == [-99.0, 3.0, 2.0, 3.0, 99.0]
    assert _choose(LOGITS, temperature=0, logit_bias={4: 100.0}) == 4
    assert {_choose(LOGITS, logit_bias={4: 100.0}, seed=seed) for seed in range(50)} == {4}
    assert all(_choose(LOGITS, logit_bias={1: -100.0}, seed=seed) != 1 for seed in range(200))


def test_the_end_is_banned_until_min_tokens() -> None:
    assert _choose(LOGITS, temperature=0, min_tokens=2, output_ids=(0,), end_ids=(1, 3, 99)) == 2
    assert _choose(LOGITS, temperature=0, min_tokens=2, output_ids=(0, 0), end_ids=(1, 3)) == 1
    assert _kept(ban_tokens(LOGITS, [1, 99])) == [0, 2, 3, 4]


def test_nothing_left_to_choose_is_an_error() -> None:
    with pytest.raises(ValueError, match="rule out every token"):
        _choose(LOGITS, min_tokens=1, end_ids=(0, 1, 2, 3, 4))
    for temperature in (0.0, 1.0):
        with pytest.raises(ValueError, match="not numbers"):
            _choose(torch.tensor([1.0, math.nan]), temperature=temperature)


def test_top_k_keeps_ties() -> None:
    assert top_k_ids(LOGITS, 1).tolist() == [1, 3]
    assert top_k_ids(LOGITS, 3).tolist() == [1, 2, 3]


def test_top_p_by_hand() -> None:
    logits_V = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert _kept(keep_top_p(logits_V, 0.5)) == [0]
    assert _kept(keep_top_p(logits_V, 0.51)) == [0, 1]
    assert _kept(keep_top_p(logits_V, 0.81)) == [0, 1, 2]
    assert _kept(keep_top_p(logits_V, 0.99)) == [0, 1, 2, 3]


@pytest.mark.parametrize("top_p", [1e-9, 1e-3])
def test_a_tiny_top_p_keeps_one(top_p: float) -> None:
    assert _kept(keep_top_p(torch.zeros(1000), top_p)) in ([0], [0, 1])
    assert len(_kept(keep_top_p(_random_logits(0, 1000), top_p))) == 1


@given(st.integers(0, 10**6), st.sampled_from([2, 5, 255, 256, 257, 1000]), st.floats(0.01, 0.99))
@settings(deadline=None)
def test_top_p_is_that_of_transformers(seed: int, size: int, top_p: float) -> None:
    logits_V = _random_logits(seed, size)
    expected = TopPLogitsWarper(top_p)(torch.zeros(1, 1), logits_V[None].clone())[0]
    result = keep_top_p(logits_V, top_p)
    mass = float(logits_V.softmax(0)[_kept(result)].sum())
    # The two sum in opposite directions, so at the very boundary one token may differ.
    assert _kept(result) == _kept(expected) or abs(mass - top_p) < 1e-5


@pytest.mark.parametrize("min_p", [0.01, 0.2, 1.0])
def test_min_p_is_that_of_transformers(min_p: float) -> None:
    logits_V = _random_logits(3, 300)
    expected = MinPLogitsWarper(min_p)(torch.zeros(1, 1), logits_V[None].clone())[0]
    assert _kept(keep_min_p(logits_V, min_p)) == _kept(expected)


def test_draws_follow_the_distribution() -> None:
    logits_V = torch.tensor([0.1, 0.2, 0.7]).log()
    generator = build_generator(7)
    counts = torch.zeros(3)
    for _ in range(4000):
        counts[draw(logits_V, generator)] += 1
    assert torch.allclose(counts / 4000, torch.tensor([0.1, 0.2, 0.7]), atol=0.03)


def test_ruled_out_tokens_are_never_drawn() -> None:
    logits_V = torch.tensor([-INF, 0.0, -INF, 0.0, -INF])
    generator = build_generator(7)
    assert {draw(logits_V, generator) for _ in range(300)} == {1, 3}


def test_temperature_and_truncation_work_together() -> None:
    logits_V = _random_logits(5, 400)
    greedy = int(logits_V.argmax())
    assert {_choose(logits_V, temperature=1e-30, seed=s) for s in range(20)} == {greedy}
    assert {_choose(logits_V, temperature=5.0, top_k=1, seed=s) for s in range(20)} == {greedy}
    drawn = {_choose(logits_V, temperature=5.0, top_k=5, top_p=0.999, seed=s) for s in range(300)}
    assert drawn == set(logits_V.topk(5).indices.tolist())


def test_seeds_repeat_and_differ() -> None:
    logits_V = _random_logits(9, 1000)

    def sequence(seed: int | None) -> list[int]:
        generator = build_generator(seed)
        return [draw(logits_V, generator) for _ in range(20)]

    assert sequence(1) == sequence(1)
    assert sequence(1) != sequence(2)
    assert sequence(None) != sequence(None)


def test_a_draw_survives_noise_in_the_last_bits() -> None:
    logits_V = _random_logits(9, 1000)
    noisy_V = logits_V + 1e-6 * _random_logits(10, 1000)
    first, second = build_generator(3), build_generator(3)
    assert [draw(logits_V, first) for _ in range(50)] == [draw(noisy_V, second) for _ in range(50)]


def test_logprobs_are_log_softmax_of_the_raw_row() -> None:
    logits_SV = _random_logits(4, 60).view(3, 20).to(torch.bfloat16)
    expected = torch.log_softmax(logits_SV.float(), dim=-1)
    entries = token_logprobs(logits_SV, [5, 0, 19], 3)
    for row, (entry, token_id) in enumerate(zip(entries, [5, 0, 19], strict=True)):
        assert entry.token_id == token_id
        assert entry.logprob == pytest.approx(float(expected[row, token_id]))
        order = expected[row].argsort(descending=True, stable=True)[:3].tolist()
        assert sorted(value for _, value in entry.top)[::-1] == [value for _, value in entry.top]
        assert {t for t, _ in entry.top} == set(order)
    assert token_logprobs(logits_SV, [1, 1, 1], 0)[0].top == ()
    assert len(token_logprobs(logits_SV, [1, 1, 1], 100)[0].top) == 20


def test_the_candidate_shortcut_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [_random_logits(seed, 600).round(decimals=1) for seed in range(10)]
    short = [_kept(keep_top_p(row, 0.8)) for row in rows]
    monkeypatch.setattr(sampling, "NUM_TOP_P_CANDIDATES", 10**6)
    assert short == [_kept(keep_top_p(row, 0.8)) for row in rows]


# Rows together


def _state(params: SamplingParams, **fields: Any) -> SamplingState:
    fields = {"prompt_ids": (), "end_ids": (), "output_ids": []} | fields
    return SamplingState(params=params, generator=build_generator(params.seed), **fields)


def _alone(logits_V: torch.Tensor, state: SamplingState) -> int:
    return choose_token(
        logits_V,
        state.params,
        prompt_ids=state.prompt_ids,
        output_ids=state.output_ids,
        end_ids=state.end_ids,
        generator=build_generator(state.params.seed),
    )


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("vocab_size", [7, 1000])
def test_rows_together_get_what_each_gets_alone(vocab_size: int, device: str) -> None:
    """Every mixture of parameters; rounded logits, so that ties are everywhere."""
    choose = random.Random(0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        states = []
        for seed in range(12):
            params = SamplingParams(
                max_tokens=9,
                temperature=choose.choice([0.0, 0.5, 1.0, 2.0]),
                top_k=choose.choice([0, 0, 1, 5, 300, 5000]),
                top_p=choose.choice([1.0, 1.0, 0.1, 0.9, 0.999]),
                min_p=choose.choice([0.0, 0.0, 0.0, 0.2]),
                repetition_penalty=choose.choice([1.0, 1.0, 1.3]),
                logit_bias=choose.choice([{}, {}, {3: 2.0}]),
                seed=seed,
            )
            states.append(_state(params, prompt_ids=(1, 2), output_ids=[3, 3]))
        logits_SV = torch.randn(12, vocab_size, generator=generator) * 3
        logits_SV = (logits_SV * 4).round() / 4
        expected = [_alone(logits_V, s) for logits_V, s in zip(logits_SV, states, strict=True)]
        assert choose_tokens(logits_SV.to(device), states) == expected


def test_drawn_rows_have_the_distribution_of_the_cut_softmax() -> None:
    logits_V = torch.linspace(3, -3, 400)
    params = SamplingParams(max_tokens=1, temperature=1.0, top_k=8)
    states = [_state(dataclasses.replace(params, seed=seed)) for seed in range(4000)]
    drawn = choose_tokens(logits_V.expand(4000, -1), states)
    counts_V = torch.bincount(torch.tensor(drawn), minlength=400)
    assert counts_V[8:].sum() == 0
    expected_V = logits_V[:8].softmax(0)
    assert (counts_V[:8] / 4000 - expected_V).abs().max() < 0.03


def test_a_row_without_a_choice_fails_alone() -> None:
    logits_SV = torch.zeros(3, 5)
    logits_SV[1, 2] = torch.nan
    chosen = choose_tokens(
        logits_SV, [_state(SamplingParams(max_tokens=1, temperature=0)) for _ in range(3)]
    )
    assert (chosen[0], chosen[2]) == (0, 0)
    assert isinstance(chosen[1], ValueError)
