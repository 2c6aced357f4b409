"""The native engine: tokens do not depend on cuts, company, prefixes or preemption, and blocks are never lost."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engines.engine import NativeEngine
from engines.model import DecoderModel
from engines.protocol import (
    ROW_PLACEHOLDER,
    EngineError,
    GenerateRequest,
    SamplingParams,
    ScoreRequest,
)
from engines.requests import EngineLimits
from tests.engines.decoding import (
    GREEDY,
    PROMPTS,
    build_request,
    generate,
    run,
    run_one,
    token_ids_of,
)
from tests.engines.models import DECODER_CONFIGS, EOS, build_from_config

pytestmark = pytest.mark.usefixtures("single_thread")

BLOCK_BYTES = 4096  # of the tiny models: 2 * 2 layers * 2 heads * 8 values * 16 tokens * 4 bytes
LONG = dataclasses.replace(GREEDY, max_tokens=40, ignore_eos=True)
Build = Callable[..., NativeEngine]


@pytest.fixture(scope="module")
def build(decoder_checkpoint: Callable[[str], Path]) -> Build:
    def build(name: str = "llama", **limits: Any) -> NativeEngine:
        folder = decoder_checkpoint(name)
        return NativeEngine.load(name, folder, dtype=torch.float32, limits=EngineLimits(**limits))

    return build


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
def test_greedy_equals_generate_however_it_comes_about(name: str, build: Build) -> None:
    """Alone, among 16, with prompts in pieces, from a found prefix, and after preemptions."""
    model = build_from_config(DECODER_CONFIGS[name]())
    prompts = [[(7 * i + 3 * j) % 90 for j in range(3 + (11 * i) % 60)] for i in range(16)]
    requests = [build_request(f"r{i}", prompt, LONG) for i, prompt in enumerate(prompts)]
    expected = {f"r{i}": generate(model, p, 40, eos=None) for i, p in enumerate(prompts)}
    assert len({tuple(ids) for ids in expected.values()}) > 8

    def tokens(engine: NativeEngine, asked: list[GenerateRequest]) -> dict[str, list[int]]:
        return {key: token_ids_of(part) for key, part in run(engine, asked).items()}

    engine = build(name)
    assert tokens(engine, requests[5:6]) == {"r5": expected["r5"]}
    assert tokens(engine, requests) == expected
    assert engine.stats().preemptions_total == 0
    hits = engine.stats().prefix_cache_hits_total
    assert tokens(engine, requests) == expected
    assert engine.stats().prefix_cache_hits_total - hits > 200
    assert tokens(build(name, max_num_batched_tokens=16), requests) == expected
    tight = build(name, kv_cache_bytes=12 * BLOCK_BYTES)
    assert tokens(tight, requests) == expected
    assert tight.stats().preemptions_total > 3


def test_seeded_draws_survive_a_preemption(build: Build) -> None:
    params = dataclasses.replace(LONG, temperature=0.8, top_p=0.9)
    requests = [
        build_request(f"r{i}", prompt, dataclasses.replace(params, seed=i, top_k=30 * (i % 2)))
        for i, prompt in enumerate(PROMPTS)
    ]
    roomy, tight = run(build(), requests), run(build(kv_cache_bytes=8 * BLOCK_BYTES), requests)
    assert {k: token_ids_of(v) for k, v in roomy.items()} == {
        k: token_ids_of(v) for k, v in tight.items()
    }


def test_logprobs_survive_a_preemption(build: Build) -> None:
    params = dataclasses.replace(LONG, logprobs=1, prompt_logprobs=1)
    prompts = [[(5 * i + 3 * j) % 90 for j in range(30)] for i in range(6)]
    requests = [build_request(f"r{i}", prompt, params) for i, prompt in enumerate(prompts)]
    tight = build(kv_cache_bytes=8 * BLOCK_BYTES, max_num_batched_tokens=16)
    outputs = run(tight, requests)
    assert tight.stats().preemptions_total > 0
    for key, wanted in run(build(), requests).items():
        ours = [entry for output in outputs[key] for entry in output.logprobs or ()]
        theirs = [entry for output in wanted for entry in output.logprobs or ()]
        assert [entry.token_id for entry in ours] == [entry.token_id for entry in theirs]
        assert [e.logprob for e in ours] == pytest.approx([e.logprob for e in theirs], abs=1e-4)
        mine, other = outputs[key][0].prompt_logprobs, wanted[0].prompt_logprobs
        assert mine is not None
        assert other is not None
        assert len(mine) == len(other) == 30
        assert [e.logprob for e in mine[1:]] == pytest.approx(
            [e.logprob for e in other[1:]], abs=1e-4
        )


def test_a_prompt_finds_its_beginning(build: Build) -> None:
    engine = build()
    prompt = [(3 * j) % 90 for j in range(50)]
    assert run_one(engine, build_request("a", prompt))[-1].num_cached_tokens == 0
    assert run_one(engine, build_request("b", [*prompt, 5]))[-1].num_cached_tokens == 48
    assert run_one(engine, build_request("c", prompt[:32]))[-1].num_cached_tokens == 16
    other = build_request("d", prompt, tenant="other")
    assert run_one(engine, other)[-1].num_cached_tokens == 0
    stats = engine.stats()
    assert stats.prefix_cache_queries_total == 50 + 51 + 32 + 50
    assert stats.prefix_cache_hits_total == 48 + 16


def test_an_answer_is_a_prefix_too(build: Build) -> None:
    """A chat's next turn begins with the last one's output."""
    engine = build()
    prompt = [(3 * j) % 90 for j in range(20)]
    answer = token_ids_of(run_one(engine, build_request("a", prompt, LONG)))
    outputs = run_one(engine, build_request("b", [*prompt, *answer, 7]))
    assert outputs[-1].num_cached_tokens == 48  # 59 tokens were computed: the last one never is


def test_rows_are_a_prefix_of_their_own(build: Build) -> None:
    engine = build()
    generator = torch.Generator().manual_seed(0)
    rows_RH = torch.randn(2, 32, generator=generator)
    prompt = [ROW_PLACEHOLDER, *range(40), ROW_PLACEHOLDER]

    def request(key: str, rows_RH: torch.Tensor) -> GenerateRequest:
        rows = rows_RH.numpy().astype("<f4").tobytes()
        return build_request(key, prompt, embedding_rows=rows)

    first = run_one(engine, request("a", rows_RH))
    same = run_one(engine, request("b", rows_RH))
    assert same[-1].num_cached_tokens == 32
    assert token_ids_of(same) == token_ids_of(first)
    changed = run_one(engine, request("c", rows_RH.flip(0)))
    assert changed[-1].num_cached_tokens == 0


def test_an_abort_frees_blocks_at_once(build: Build) -> None:
    engine = build()
    for key in ("a", "b"):
        engine.submit(build_request(key, [*range(40)] if key == "a" else [1], LONG))
    engine.step()
    before = engine.stats().kv_cache_usage_ratio
    engine.abort("a")
    assert 0 < engine.stats().kv_cache_usage_ratio < before / 2
    engine.abort("b")
    assert engine.stats().kv_cache_usage_ratio == 0
    assert not engine.has_work()


def test_a_request_that_can_never_fit_is_refused_with_the_arithmetic(build: Build) -> None:
    engine = build(kv_cache_bytes=4 * BLOCK_BYTES + 100)
    assert engine.info.max_model_len == 64
    engine.submit(build_request("fits", [1] * 52))
    with pytest.raises(EngineError) as caught:
        engine.submit(build_request("does not", [1] * 53))
    assert caught.value.code == "context_length_exceeded"
    for number in ("53", "12", "65", "64"):
        assert number in caught.value.message
    with pytest.raises(ValueError, match="less than one block of 4096"):
        build(kv_cache_bytes=100)


def test_a_long_continuation_is_scored_in_passes_of_a_step(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = ScoreRequest(
        request_id="s",
        context_ids=tuple(range(3, 24)),
        continuation_ids=(tuple(range(5, 55)), (7,), tuple(range(5, 30))),
    )
    engine = build(max_num_batched_tokens=16)
    sizes: list[int] = []
    forward = engine._forward_rows

    def watched(model: DecoderModel, hidden_TH: torch.Tensor, *arguments: Any) -> torch.Tensor:
        sizes.append(len(hidden_TH))
        return forward(model, hidden_TH, *arguments)

    monkeypatch.setattr(engine, "_forward_rows", watched)
    result = engine.score(request)
    assert max(sizes) == 16
    for ours, theirs in zip(result.scores, build().score(request).scores, strict=True):
        assert ours.token_logprobs == pytest.approx(theirs.token_logprobs, abs=1e-5)
        assert ours.is_greedy == theirs.is_greedy
    assert engine.stats().kv_cache_usage_ratio == 0


def test_scores_share_the_cache_and_preempt(build: Build) -> None:
    """A score that needs the blocks of running requests takes them; both come out right."""
    context, continuations = [(3 * j) % 90 for j in range(37)], ((1, 2, 3), (1, 2, 9), (4,) * 20)
    request = ScoreRequest(
        request_id="s", context_ids=tuple(context), continuation_ids=continuations
    )
    expected = build().score(request)
    engine = build(kv_cache_bytes=4 * BLOCK_BYTES)
    engine.submit(build_request("r", [*range(20)], LONG))
    engine.step()
    result = engine.score(request)
    assert engine.stats().preemptions_total == 1
    for ours, theirs in zip(result.scores, expected.scores, strict=True):
        assert ours.token_logprobs == pytest.approx(theirs.token_logprobs, abs=1e-4)
    outputs = []
    while engine.has_work():
        outputs += engine.step()
    model = build_from_config(DECODER_CONFIGS["llama"]())
    assert token_ids_of(outputs)[-39:] == generate(model, [*range(20)], 40, eos=None)[-39:]
    hits = engine.stats().prefix_cache_hits_total
    roomy = build()
    roomy.score(request)
    roomy.score(request)
    assert roomy.stats().prefix_cache_hits_total - hits == 32
    assert roomy.stats().kv_cache_usage_ratio == 0


def test_out_of_memory_costs_the_worst_ranked_only(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build()
    for index in range(3):
        engine.submit(build_request(f"r{index}", PROMPTS[index + 1], LONG, priority=-index))
    outputs = engine.step()
    forward = engine._forward

    def fail_once(*_: object) -> torch.Tensor:
        monkeypatch.setattr(engine, "_forward", forward)
        raise torch.OutOfMemoryError("told to")

    monkeypatch.setattr(engine, "_forward", fail_once)
    while engine.has_work():
        outputs += engine.step()
    model = build_from_config(DECODER_CONFIGS["llama"]())
    for index in (1, 2):
        mine = [output for output in outputs if output.request_id == f"r{index}"]
        assert token_ids_of(mine) == generate(model, PROMPTS[index + 1], 40, eos=None)
    lost = [output for output in outputs if output.request_id == "r0"][-1]
    assert (lost.finish_reason, lost.error_code) == ("error", "out_of_memory")
    assert engine.stats().kv_cache_usage_ratio == 0


def test_a_failing_pass_ends_its_requests_and_the_engine_goes_on(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build()
    expected = token_ids_of(run_one(engine, build_request("r", PROMPTS[3])))

    def fail(*_: object) -> torch.Tensor:
        raise RuntimeError("told to fail")

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_forward", fail)
        outputs = run_one(engine, build_request("r", PROMPTS[3]))
    assert (outputs[-1].finish_reason, outputs[-1].error_code) == ("error", "internal_error")
    assert "told to fail" not in (outputs[-1].error or "")
    assert token_ids_of(run_one(engine, build_request("r", PROMPTS[3]))) == expected


@pytest.mark.parametrize("in_one_call", [True, False])
def test_what_is_no_number_stays_with_its_request(in_one_call: bool, build: Build) -> None:
    """Not even the next holder of its blocks, or one padded with them, gets a NaN."""
    engine = build("rope linear", kv_cache_bytes=8 * BLOCK_BYTES)
    if not in_one_call:
        engine._cpu_step = "plain torch reads whole blocks, and masks what is behind the last token"
    good = build_request("good", PROMPTS[4])
    expected = token_ids_of(run_one(engine, good))
    assert engine._model is not None
    embedding_VH = engine._model.embedding
    assert isinstance(embedding_VH, torch.Tensor)
    embedding_H = embedding_VH[95].clone()
    embedding_VH[95] = torch.nan
    bad = build_request("bad", [95] * 120, dataclasses.replace(GREEDY, max_tokens=8))
    outputs = run(engine, [bad, good])
    assert outputs["bad"][-1].finish_reason == "error"
    assert "not numbers" in (outputs["bad"][-1].error or "")
    assert token_ids_of(outputs["good"]) == expected
    embedding_VH[95] = embedding_H
    others = [build_request(f"r{i}", prompt) for i, prompt in enumerate(PROMPTS)]
    assert all(part[-1].finish_reason != "error" for part in run(engine, others).values())
    embedding_VH[95] = torch.nan
    assert run_one(engine, bad)[-1].finish_reason == "error"
    embedding_VH[95] = embedding_H
    cured = run_one(engine, bad)[-1]
    assert (cured.finish_reason, cured.num_cached_tokens) == ("length", 0)


def test_sleep_keeps_counters_and_forgets_the_cache(build: Build) -> None:
    engine = build()
    prompt = [(3 * j) % 90 for j in range(50)]
    expected = token_ids_of(run_one(engine, build_request("a", prompt)))
    run_one(engine, build_request("b", prompt))
    hits = engine.stats().prefix_cache_hits_total
    assert hits == 48
    engine.sleep()
    assert engine._model is None
    assert engine._kv_cache == []
    engine.wake()
    outputs = run_one(engine, build_request("c", prompt))
    assert (token_ids_of(outputs), outputs[-1].num_cached_tokens) == (expected, 0)
    assert engine.stats().prefix_cache_hits_total == hits


def test_n_choices_of_one_prompt_share_its_blocks(build: Build) -> None:
    engine = build()
    prompt = [(3 * j) % 90 for j in range(50)]
    params = SamplingParams(max_tokens=8, temperature=1.0, ignore_eos=True)
    run_one(engine, build_request("first", prompt, params))
    choices = [
        build_request(f"r{i}", prompt, dataclasses.replace(params, seed=i)) for i in range(4)
    ]
    for request in choices:
        engine.submit(request)
    engine.step()
    # 3 shared blocks, and one of each choice's own
    num_blocks = engine._scheduler.blocks.num_usable
    assert engine.stats().kv_cache_usage_ratio == pytest.approx((3 + 4) / num_blocks)
    while engine.has_work():
        engine.step()


def test_eos_ids_come_from_the_checkpoint(build: Build) -> None:
    engine = build()
    assert engine.info.eos_token_ids == (EOS,)
    bias = dataclasses.replace(GREEDY, logit_bias={EOS: 1000.0})
    outputs = run_one(engine, build_request("r", [1, 2], bias))
    assert (token_ids_of(outputs), outputs[-1].stop_token_id) == ([EOS], EOS)
