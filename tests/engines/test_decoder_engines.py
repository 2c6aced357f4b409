"""One suite for every decoding engine, against `generate`, `log_softmax` and naive loops, on tiny float32 models."""

import dataclasses
import struct
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from engines import engine as engine_module
from engines import transformers_engine
from engines.protocol import (
    ROW_PLACEHOLDER,
    EmbedRequest,
    Engine,
    EngineError,
    SamplingParams,
    ScoreRequest,
    Skip,
)
from tests.engines.decoding import (
    GREEDY,
    PROMPTS,
    BuildEngine,
    build_request,
    generate,
    logits,
    run,
    run_one,
    token_ids_of,
)
from tests.engines.models import CONFIGS, VOCAB_SIZE, build_causal_lm

pytestmark = pytest.mark.usefixtures("single_thread")


@pytest.fixture(scope="module")
def llama(build_engine: BuildEngine) -> Engine:
    return build_engine("llama")


# Greedy decoding is generate's, alone and in company


@pytest.mark.parametrize("architecture", CONFIGS)
def test_greedy_equals_generate_alone_and_in_company(
    architecture: str, build_engine: BuildEngine
) -> None:
    engine = build_engine(architecture)
    model = build_causal_lm(architecture)
    expected = {f"r{i}": generate(model, prompt, 12) for i, prompt in enumerate(PROMPTS)}
    assert len({tuple(ids) for ids in expected.values()}) > 5, "the oracle must be worth something"
    requests = [build_request(f"r{i}", prompt) for i, prompt in enumerate(PROMPTS)]
    together = run(engine, requests)
    assert {key: token_ids_of(part) for key, part in together.items()} == expected
    alone = {request.request_id: token_ids_of(run_one(engine, request)) for request in requests}
    assert alone == expected


def test_requests_that_come_and_go_do_not_disturb_others(llama: Engine) -> None:
    """Rows are swapped and reused while others decode; each still gets its own tokens."""
    model = build_causal_lm("llama")
    lengths = [3, 30, 1, 17, 9, 25, 2, 40, 5, 11, 6, 21]
    requests = [
        build_request(
            f"r{i}",
            PROMPTS[i % len(PROMPTS)] + [i],
            dataclasses.replace(GREEDY, max_tokens=length, ignore_eos=True),
        )
        for i, length in enumerate(lengths)
    ]
    got: dict[str, list[int]] = {request.request_id: [] for request in requests}
    pending = list(requests)
    num_steps = 0
    while pending or llama.has_work():
        if pending and num_steps % 2 == 0:
            llama.submit(pending.pop(0))
        if num_steps == 20:
            llama.abort("r7")
        for output in llama.step():
            got[output.request_id] += output.token_ids
        num_steps += 1
    for request in requests:
        expected = generate(model, request.token_ids, request.params.max_tokens, eos=None)
        if request.request_id == "r7":
            assert 0 < len(got["r7"]) < 40
            expected = expected[: len(got["r7"])]
        assert got[request.request_id] == expected


def test_chunked_prefill_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, build_engine: BuildEngine
) -> None:
    for module in (engine_module, transformers_engine):
        monkeypatch.setattr(module, "MAX_LOGITS_ROWS", 3)
    engine = build_engine("llama", max_num_seqs=5, max_num_batched_tokens=5)
    model = build_causal_lm("llama")
    requests = [build_request(f"r{i}", prompt) for i, prompt in enumerate(PROMPTS)]
    outputs = run(engine, requests)
    for request in requests:
        assert token_ids_of(outputs[request.request_id]) == generate(model, request.token_ids, 12)
    params = dataclasses.replace(GREEDY, prompt_logprobs=2)
    first = run_one(engine, build_request("r", PROMPTS[4], params))[0]
    assert first.prompt_logprobs is not None
    assert len(first.prompt_logprobs) == len(PROMPTS[4])


def test_a_long_prompt_does_not_hold_up_a_short_one(build_engine: BuildEngine) -> None:
    engine = build_engine("llama", max_num_seqs=8, max_num_batched_tokens=8)
    engine.submit(build_request("running", [1, 2], dataclasses.replace(GREEDY, ignore_eos=True)))
    engine.step()
    engine.submit(build_request("long", list(range(90)) * 2))
    engine.submit(build_request("short", [5, 6]))
    steps = [{output.request_id for output in engine.step()} for _ in range(4)]
    assert all("running" in step for step in steps)
    assert any("short" in step for step in steps[:3])
    assert not any("long" in step for step in steps)


def test_priorities_and_arrival_decide_who_waits(build_engine: BuildEngine) -> None:
    engine = build_engine("llama", max_num_seqs=1)
    params = dataclasses.replace(GREEDY, max_tokens=2, ignore_eos=True)
    for name, priority in (("low", 5), ("first", 0), ("second", 0), ("urgent", -1)):
        engine.submit(build_request(name, [1, 2], params, priority=priority))
    order = []
    while engine.has_work():
        order += [o.request_id for o in engine.step() if o.finish_reason]
        assert engine.stats().num_requests_running <= 1
    assert order == ["urgent", "first", "second", "low"]


# Ends


def test_eos_stop_tokens_and_limits_end_a_request(llama: Engine) -> None:
    free = dataclasses.replace(GREEDY, max_tokens=20, ignore_eos=True)
    ids = token_ids_of(run_one(llama, build_request("r", PROMPTS[3], free)))
    stop_id = ids[6]
    first = ids.index(stop_id)
    stopping = dataclasses.replace(free, stop_token_ids=(stop_id,))
    outputs = run_one(llama, build_request("r", PROMPTS[3], stopping))
    assert token_ids_of(outputs) == ids[: first + 1]
    assert outputs[-1].finish_reason == "stop"
    assert outputs[-1].stop_token_id == stop_id
    later = dataclasses.replace(stopping, min_tokens=15)
    outputs = run_one(llama, build_request("r", PROMPTS[3], later))
    assert stop_id not in token_ids_of(outputs)[:15]
    outputs = run_one(
        llama, build_request("r", PROMPTS[3], dataclasses.replace(free, max_tokens=1))
    )
    assert (token_ids_of(outputs), outputs[-1].finish_reason) == (ids[:1], "length")
    assert outputs[-1].stop_token_id is None


def test_an_aborted_request_is_gone_at_once(llama: Engine) -> None:
    llama.submit(build_request("a", PROMPTS[1]))
    llama.submit(build_request("b", PROMPTS[2]))
    llama.step()
    llama.abort("a")
    llama.abort("unknown")
    assert llama.stats().num_requests_running == 1
    while llama.has_work():
        assert {output.request_id for output in llama.step()} == {"b"}
    llama.submit(build_request("c", PROMPTS[1]))
    llama.abort("c")
    assert not llama.has_work()


# Sampling


def test_seeds_repeat_alone_and_in_company(llama: Engine) -> None:
    params = SamplingParams(max_tokens=20, temperature=1.0, seed=11, ignore_eos=True)
    request = build_request("r", PROMPTS[2], params)
    alone = token_ids_of(run_one(llama, request))
    assert token_ids_of(run_one(llama, request)) == alone
    company = [
        build_request(f"c{i}", p, dataclasses.replace(params, seed=i))
        for i, p in enumerate(PROMPTS)
    ]
    assert token_ids_of(run(llama, [*company, request])["r"]) == alone
    other = dataclasses.replace(params, seed=12)
    assert token_ids_of(run_one(llama, build_request("r", PROMPTS[2], other))) != alone


def test_greedy_and_sampled_requests_mix(llama: Engine) -> None:
    model = build_causal_lm("llama")
    sampled = SamplingParams(max_tokens=12, temperature=1.5, top_k=20, top_p=0.9, min_p=0.01)
    requests = [build_request(f"g{i}", prompt) for i, prompt in enumerate(PROMPTS[:4])]
    noise = [build_request(f"s{i}", prompt, sampled) for i, prompt in enumerate(PROMPTS[4:])]
    outputs = run(llama, [*noise, *requests])
    for request in requests:
        assert token_ids_of(outputs[request.request_id]) == generate(model, request.token_ids, 12)


def test_repetition_penalty_equals_generate(llama: Engine) -> None:
    params = dataclasses.replace(GREEDY, repetition_penalty=1.8)
    model = build_causal_lm("llama")
    expected = generate(model, PROMPTS[3], 12, repetition_penalty=1.8)
    assert token_ids_of(run_one(llama, build_request("r", PROMPTS[3], params))) == expected
    assert expected != generate(model, PROMPTS[3], 12)


# Log-probabilities


@pytest.mark.parametrize("architecture", ["llama", "bloom"])
def test_logprobs_equal_log_softmax(architecture: str, build_engine: BuildEngine) -> None:
    engine = build_engine(architecture)
    params = dataclasses.replace(
        GREEDY, logprobs=3, prompt_logprobs=2, temperature=0.7, seed=1, ignore_eos=True
    )
    outputs = run_one(engine, build_request("r", PROMPTS[4], params))
    prompt, generated = PROMPTS[4], token_ids_of(outputs)
    logprobs_SV = logits(build_causal_lm(architecture), prompt + generated).log_softmax(-1)
    reported = [entry for output in outputs for entry in output.logprobs or ()]
    assert [entry.token_id for entry in reported] == generated
    for offset, entry in enumerate(reported):
        row = logprobs_SV[len(prompt) + offset - 1]
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-4)
        assert [token_id for token_id, _ in entry.top] == row.topk(3).indices.tolist()
    of_prompt = outputs[0].prompt_logprobs
    assert of_prompt is not None
    assert [entry.token_id for entry in of_prompt] == prompt
    assert of_prompt[0].logprob is None
    for position, entry in enumerate(of_prompt[1:]):
        expected = float(logprobs_SV[position, prompt[position + 1]])
        assert entry.logprob == pytest.approx(expected, abs=1e-4)
        assert len(entry.top) == 2


def test_prompt_logprobs_alone(llama: Engine) -> None:
    params = SamplingParams(max_tokens=0, prompt_logprobs=0)
    (output,) = run_one(llama, build_request("r", [4, 5, 6], params))
    assert output.token_ids == ()
    assert output.finish_reason == "length"
    assert output.prompt_logprobs is not None
    assert [entry.token_id for entry in output.prompt_logprobs] == [4, 5, 6]


# Embedding rows


def test_rows_that_are_token_embeddings_change_nothing(llama: Engine) -> None:
    prompt = PROMPTS[4]
    table = build_causal_lm("llama").get_input_embeddings().weight
    places = [0, 3, 4, len(prompt) - 1]
    mixed = [ROW_PLACEHOLDER if i in places else token_id for i, token_id in enumerate(prompt)]
    rows = table[[prompt[i] for i in places]].numpy().astype("<f4").tobytes()
    expected = token_ids_of(run_one(llama, build_request("r", prompt)))
    request = build_request("r", mixed, embedding_rows=rows)
    assert token_ids_of(run_one(llama, request)) == expected
    company = [build_request(f"c{i}", p) for i, p in enumerate(PROMPTS[:3])]
    assert token_ids_of(run(llama, [*company, request])["r"]) == expected


def test_rows_may_span_chunks(build_engine: BuildEngine) -> None:
    engine = build_engine("llama", max_num_seqs=3, max_num_batched_tokens=3)
    prompt = PROMPTS[4][:10]
    table = build_causal_lm("llama").get_input_embeddings().weight
    rows = table[prompt].numpy().astype("<f4").tobytes()
    params = dataclasses.replace(GREEDY, prompt_logprobs=1)
    request = build_request("r", [ROW_PLACEHOLDER] * 10, params, embedding_rows=rows)
    outputs = run_one(engine, request)
    assert token_ids_of(outputs) == generate(build_causal_lm("llama"), prompt, 12)
    assert outputs[0].prompt_logprobs is not None
    assert all(entry.logprob is None for entry in outputs[0].prompt_logprobs)


def test_rows_must_match_their_placeholders(llama: Engine) -> None:
    one = struct.pack("<32f", *[0.5] * 32)
    bad: list[tuple[list[int], bytes | None]] = [
        ([ROW_PLACEHOLDER], one * 2),
        ([ROW_PLACEHOLDER, ROW_PLACEHOLDER], one),
        ([1], one),
        ([ROW_PLACEHOLDER], None),
        ([ROW_PLACEHOLDER], struct.pack("<32f", *[float("nan")] * 32)),
    ]
    for token_ids, rows in bad:
        with pytest.raises(EngineError) as caught:
            llama.submit(build_request("r", token_ids, embedding_rows=rows))
        assert caught.value.code == "invalid_value"
    assert not llama.has_work()


# Embedding and scoring


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mistral"])
def test_embed_pools_the_last_hidden_states(architecture: str, build_engine: BuildEngine) -> None:
    engine = build_engine(architecture)
    model = build_causal_lm(architecture)
    for pooling in ("default", "mean", "last"):
        request = EmbedRequest(
            request_id="e",
            token_ids=tuple(tuple(prompt) for prompt in PROMPTS),
            pooling=pooling,
            normalize=False,
        )
        result = engine.embed(request)
        vectors_BH = torch.frombuffer(bytearray(result.vectors), dtype=torch.float32).view(-1, 32)
        for row, prompt in zip(vectors_BH, PROMPTS, strict=True):
            with torch.inference_mode():
                hidden_SH = model.base_model(torch.tensor([prompt])).last_hidden_state[0]
            expected = hidden_SH[-1] if pooling == "last" else hidden_SH.mean(0)
            assert torch.allclose(row, expected, atol=1e-5)
        assert (result.dim, result.num_tokens) == (32, sum(map(len, PROMPTS)))
    normalized = engine.embed(dataclasses.replace(request, normalize=True))
    vectors_BH = torch.frombuffer(bytearray(normalized.vectors), dtype=torch.float32).view(-1, 32)
    assert torch.allclose(vectors_BH.norm(dim=1), torch.ones(len(PROMPTS)))


def _naive_score(
    model: Any, context: Sequence[int], ids: Sequence[int]
) -> tuple[list[float], bool]:
    logprobs_SV = logits(model, [*context, *ids]).log_softmax(-1)
    rows = range(len(context) - 1, len(context) + len(ids) - 1)
    logprobs = [float(logprobs_SV[row, token]) for row, token in zip(rows, ids, strict=True)]
    greedy = all(int(logprobs_SV[row].argmax()) == t for row, t in zip(rows, ids, strict=True))
    return logprobs, greedy


@pytest.mark.parametrize("architecture", CONFIGS)
def test_score_equals_the_naive_loop(
    architecture: str, monkeypatch: pytest.MonkeyPatch, build_engine: BuildEngine
) -> None:
    monkeypatch.setattr(transformers_engine, "MAX_CONTINUATION_ROWS", 4)
    engine = build_engine(architecture, max_num_seqs=7, max_num_batched_tokens=7)
    model = build_causal_lm(architecture)
    context = PROMPTS[4]
    greedy = generate(model, context, 3, eos=None)
    continuations = [*PROMPTS, greedy, [4], [5]]
    request = ScoreRequest(
        request_id="s",
        context_ids=tuple(context),
        continuation_ids=tuple(tuple(ids) for ids in continuations),
    )
    result = engine.score(request)
    assert len(result.scores) == len(continuations)
    for score, ids in zip(result.scores, continuations, strict=True):
        logprobs, is_greedy = _naive_score(model, context, ids)
        assert score.token_logprobs == pytest.approx(logprobs, abs=1e-4)
        assert score.logprob == pytest.approx(sum(logprobs), abs=1e-3)
        assert score.is_greedy == is_greedy
    assert result.scores[len(PROMPTS)].is_greedy
    assert result.num_tokens == len(context) + sum(map(len, continuations))


def test_single_token_continuations_need_the_context_only(llama: Engine) -> None:
    request = ScoreRequest(request_id="s", context_ids=(1, 2), continuation_ids=((3,), (4,)))
    model = build_causal_lm("llama")
    for score, token_id in zip(llama.score(request).scores, (3, 4), strict=True):
        assert score.token_logprobs == pytest.approx(
            _naive_score(model, [1, 2], [token_id])[0], abs=1e-4
        )


# Refusals


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"token_ids": ()}, "invalid_value", "prompt"),
        ({"token_ids": (VOCAB_SIZE,)}, "invalid_value", "prompt"),
        ({"token_ids": (-2,)}, "invalid_value", "prompt"),
        ({"token_ids": (1,) * 250}, "context_length_exceeded", "max_tokens"),
        ({"skip": Skip(mode="profile")}, "unsupported_parameter", "skip"),
        ({"params": SamplingParams(max_tokens=0)}, "invalid_value", "max_tokens"),
        (
            {"params": SamplingParams(max_tokens=1, logit_bias={VOCAB_SIZE: 1.0})},
            "invalid_value",
            "logit_bias",
        ),
    ],
)
def test_what_can_not_be_done_is_refused_by_name(
    llama: Engine, fields: dict[str, Any], code: str, param: str
) -> None:
    request = dataclasses.replace(build_request("r", [1, 2]), **fields)
    with pytest.raises(EngineError) as caught:
        llama.submit(request)
    assert (caught.value.code, caught.value.param) == (code, param)
    assert not llama.has_work()
    if code == "unsupported_parameter" and llama.info.engine == "transformers":
        assert (
            param in llama.info.unsupported
        )  # the native one skips where a checkpoint has a profile


def test_a_full_queue_refuses(build_engine: BuildEngine) -> None:
    engine = build_engine("llama", max_num_seqs=1, max_num_waiting=2)
    for index in range(2):
        engine.submit(build_request(f"r{index}", [1, 2]))
    with pytest.raises(EngineError) as caught:
        engine.submit(build_request("r2", [1, 2]))
    assert caught.value.code == "queue_full"
    engine.step()
    engine.submit(build_request("r2", [1, 2]))
    assert engine.stats().num_requests_waiting == 2


def test_score_and_embed_refuse_what_does_not_fit(llama: Engine) -> None:
    score = ScoreRequest(request_id="s", context_ids=(1,) * 250, continuation_ids=((2,), (3,) * 7))
    with pytest.raises(EngineError) as caught:
        llama.score(score)
    assert (caught.value.code, caught.value.param) == (
        "context_length_exceeded",
        "continuations[1]",
    )
    for texts, code in (((), "invalid_value"), ((1,) * 257, "context_length_exceeded")):
        with pytest.raises(EngineError) as caught:
            llama.embed(EmbedRequest(request_id="e", token_ids=((1,), texts)))
        assert (caught.value.code, caught.value.param) == (code, "input[1]")


# Failures, sleep, counters


def test_a_request_that_rules_out_every_token_fails_alone(llama: Engine) -> None:
    bias = {token_id: -float("inf") for token_id in range(VOCAB_SIZE)}
    bad = build_request("bad", [1], dataclasses.replace(GREEDY, logit_bias=bias))
    outputs = run(llama, [bad, build_request("good", PROMPTS[3])])
    assert outputs["bad"][-1].finish_reason == "error"
    assert "rule out every token" in (outputs["bad"][-1].error or "")
    assert outputs["good"][-1].finish_reason in ("stop", "length")


def test_sleep_frees_and_wake_restores(build_engine: BuildEngine) -> None:
    engine = build_engine("llama")
    expected = token_ids_of(run_one(engine, build_request("r", PROMPTS[3])))
    engine.submit(build_request("running", PROMPTS[1]))
    engine.step()
    engine.submit(build_request("waiting", PROMPTS[2]))
    engine.sleep()
    engine.sleep()
    assert engine.stats().sleeping
    lost = {output.request_id: output for output in engine.step()}
    assert {output.error_code for output in lost.values()} == {"sleeping"}
    assert lost.keys() == {"running", "waiting"}
    assert not engine.has_work()
    for call in (
        lambda: engine.submit(build_request("r", [1])),
        lambda: engine.embed(EmbedRequest(request_id="e", token_ids=((1,),))),
        lambda: engine.score(
            ScoreRequest(request_id="s", context_ids=(1,), continuation_ids=((2,),))
        ),
    ):
        with pytest.raises(EngineError) as caught:
            call()
        assert caught.value.code == "sleeping"
    engine.wake()
    engine.wake()
    assert token_ids_of(run_one(engine, build_request("r", PROMPTS[3]))) == expected


def test_counters(llama: Engine) -> None:
    before = llama.stats()
    outputs = run(llama, [build_request("a", PROMPTS[3]), build_request("b", PROMPTS[4])])
    after = llama.stats()
    generated = sum(len(token_ids_of(part)) for part in outputs.values())
    assert after.generation_tokens_total - before.generation_tokens_total == generated
    prompt_tokens = len(PROMPTS[3]) + len(PROMPTS[4])
    assert after.prompt_tokens_total - before.prompt_tokens_total == prompt_tokens
    assert after.last_output_at is not None
    assert after.rss_bytes > 2**20
    assert llama.info.resident_bytes > 0
    assert llama.info.kernels


# Where the time went


def test_the_first_token_says_how_long_its_request_waited(build_engine: BuildEngine) -> None:
    """With one seat, the second request waits for as long as the first is at work, and says so."""
    engine = build_engine("llama", max_num_seqs=1)
    params = dataclasses.replace(GREEDY, max_tokens=6, ignore_eos=True)
    outputs = run(engine, [build_request(f"r{i}", PROMPTS[i], params) for i in range(2)])
    for parts in outputs.values():
        assert len(parts) == 6
        assert all(
            part.queue_seconds is None and part.prefill_seconds is None for part in parts[1:]
        )
    (first, *_), (second, *_) = outputs["r0"], outputs["r1"]
    assert first.queue_seconds is not None
    assert first.prefill_seconds is not None
    assert second.queue_seconds is not None
    assert 0 <= first.queue_seconds < second.queue_seconds
    assert second.queue_seconds > first.queue_seconds + first.prefill_seconds
