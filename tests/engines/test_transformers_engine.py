"""The transformers engine against `generate`, `log_softmax` and naive loops, on tiny float32 models."""

import dataclasses
import struct
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from engines import transformers_engine
from engines.decoder_caches import SlotDecoder, SoloDecoder, build_decoder
from engines.protocol import (
    ROW_PLACEHOLDER,
    Constraint,
    EmbedRequest,
    EngineError,
    GenerateRequest,
    SamplingParams,
    ScoreRequest,
    Skip,
    TokenOutput,
)
from engines.transformers_engine import EngineLimits, TransformersEngine
from tests.engines.models import CONFIGS, EOS, VOCAB_SIZE, build_causal_lm

pytestmark = pytest.mark.usefixtures("single_thread")

PROMPTS = [[(7 * i + 3 * j) % 90 for j in range(1 + (5 * i) % 23)] for i in range(9)]
GREEDY = SamplingParams(max_tokens=12, temperature=0)


@pytest.fixture(scope="module")
def llama() -> TransformersEngine:
    return _engine("llama")


def _engine(architecture: str, **limits: Any) -> TransformersEngine:
    return TransformersEngine(
        lambda: build_causal_lm(architecture),
        model_id=architecture,
        limits=EngineLimits(**limits),
    )


def _request(
    request_id: str, token_ids: Sequence[int], params: SamplingParams = GREEDY, **fields: Any
) -> GenerateRequest:
    return GenerateRequest(
        request_id=request_id, token_ids=tuple(token_ids), params=params, **fields
    )


def _run(
    engine: TransformersEngine, requests: Sequence[GenerateRequest]
) -> dict[str, list[TokenOutput]]:
    for request in requests:
        engine.submit(request)
    outputs: dict[str, list[TokenOutput]] = {request.request_id: [] for request in requests}
    while engine.has_work():
        step = engine.step()
        assert len({output.request_id for output in step}) == len(step)
        for output in step:
            outputs[output.request_id].append(output)
    assert all(part[-1].finish_reason is not None for part in outputs.values())
    assert engine.stats().kv_cache_usage_ratio == 0
    return outputs


def _token_ids(outputs: Sequence[TokenOutput]) -> list[int]:
    return [token_id for output in outputs for token_id in output.token_ids]


def _one(engine: TransformersEngine, request: GenerateRequest) -> list[TokenOutput]:
    return _run(engine, [request])[request.request_id]


def _generate(
    model: Any, prompt: Sequence[int], max_tokens: int, eos: int | None = EOS, **arguments: Any
) -> list[int]:
    """transformers' own loop: the oracle."""
    ids = torch.tensor([list(prompt)])
    arguments = {"do_sample": False, "pad_token_id": 0, "use_cache": True} | arguments
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_tokens,
        eos_token_id=eos,
        **arguments,
    )
    result: list[int] = output[0, len(prompt) :].tolist()
    return result


def _logits(model: Any, ids: Sequence[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([list(ids)])).logits[0]
    return logits


# Greedy decoding is generate's, alone and in company


@pytest.mark.parametrize("architecture", CONFIGS)
def test_greedy_equals_generate_alone_and_in_company(architecture: str) -> None:
    engine = _engine(architecture)
    model = build_causal_lm(architecture)
    expected = {f"r{i}": _generate(model, prompt, 12) for i, prompt in enumerate(PROMPTS)}
    assert len({tuple(ids) for ids in expected.values()}) > 5, "the oracle must be worth something"
    requests = [_request(f"r{i}", prompt) for i, prompt in enumerate(PROMPTS)]
    together = _run(engine, requests)
    assert {key: _token_ids(part) for key, part in together.items()} == expected
    alone = {request.request_id: _token_ids(_one(engine, request)) for request in requests}
    assert alone == expected


def test_each_architecture_gets_the_decoder_that_suits_it() -> None:
    names = {name: build_decoder(build_causal_lm(name)) for name in CONFIGS}
    assert {name for name, decoder in names.items() if isinstance(decoder, SlotDecoder)} == {
        "llama",
        "gpt2",
    }
    solo = names["bloom"], names["mistral"]
    assert all(isinstance(decoder, SoloDecoder) for decoder in solo)
    assert "differ" in solo[0].name or "failed" in solo[0].name
    assert "plain attention" in solo[1].name
    assert names["llama"].bytes_per_token == 2 * 2 * 2 * 8 * 4


def test_requests_that_come_and_go_do_not_disturb_others(llama: TransformersEngine) -> None:
    """Rows are swapped and reused while others decode; each still gets its own tokens."""
    model = build_causal_lm("llama")
    lengths = [3, 30, 1, 17, 9, 25, 2, 40, 5, 11, 6, 21]
    requests = [
        _request(
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
        expected = _generate(model, request.token_ids, request.params.max_tokens, eos=None)
        if request.request_id == "r7":
            assert 0 < len(got["r7"]) < 40
            expected = expected[: len(got["r7"])]
        assert got[request.request_id] == expected


def test_chunked_prefill_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers_engine, "PREFILL_CHUNK", 5)
    monkeypatch.setattr(transformers_engine, "MAX_LOGITS_ROWS", 3)
    engine = _engine("llama")
    model = build_causal_lm("llama")
    requests = [_request(f"r{i}", prompt) for i, prompt in enumerate(PROMPTS)]
    outputs = _run(engine, requests)
    for request in requests:
        assert _token_ids(outputs[request.request_id]) == _generate(model, request.token_ids, 12)
    params = dataclasses.replace(GREEDY, prompt_logprobs=2)
    first = _one(engine, _request("r", PROMPTS[4], params))[0]
    assert first.prompt_logprobs is not None
    assert len(first.prompt_logprobs) == len(PROMPTS[4])


def test_a_long_prompt_does_not_hold_up_a_short_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers_engine, "PREFILL_CHUNK", 8)
    engine = _engine("llama")
    engine.submit(_request("running", [1, 2], dataclasses.replace(GREEDY, ignore_eos=True)))
    engine.step()
    engine.submit(_request("long", list(range(90)) * 2))
    engine.submit(_request("short", [5, 6]))
    steps = [{output.request_id for output in engine.step()} for _ in range(4)]
    assert all("running" in step for step in steps)
    assert any("short" in step for step in steps[:3])
    assert not any("long" in step for step in steps)


def test_priorities_and_arrival_decide_who_waits() -> None:
    engine = _engine("llama", max_num_seqs=1)
    params = dataclasses.replace(GREEDY, max_tokens=2, ignore_eos=True)
    for name, priority in (("low", 5), ("first", 0), ("second", 0), ("urgent", -1)):
        engine.submit(_request(name, [1, 2], params, priority=priority))
    order = []
    while engine.has_work():
        order += [o.request_id for o in engine.step() if o.finish_reason]
        assert engine.stats().num_requests_running <= 1
    assert order == ["urgent", "first", "second", "low"]


def test_the_cache_budget_limits_who_runs() -> None:
    per_token = build_decoder(build_causal_lm("llama")).bytes_per_token
    engine = _engine("llama", kv_cache_bytes=100 * per_token)
    assert engine.info.max_model_len == 100
    with pytest.raises(EngineError) as caught:
        engine.submit(_request("big", [1] * 95))
    assert caught.value.code == "context_length_exceeded"
    assert "107" in caught.value.message
    params = dataclasses.replace(GREEDY, max_tokens=30, ignore_eos=True)
    requests = [_request(f"r{i}", [i, i + 1], params) for i in range(5)]
    for request in requests:
        engine.submit(request)
    most = 0
    while engine.has_work():
        engine.step()
        most = max(most, engine.stats().num_requests_running)
    assert most == 2


# Ends


def test_eos_stop_tokens_and_limits_end_a_request(llama: TransformersEngine) -> None:
    free = dataclasses.replace(GREEDY, max_tokens=20, ignore_eos=True)
    ids = _token_ids(_one(llama, _request("r", PROMPTS[3], free)))
    stop_id = ids[6]
    first = ids.index(stop_id)
    stopping = dataclasses.replace(free, stop_token_ids=(stop_id,))
    outputs = _one(llama, _request("r", PROMPTS[3], stopping))
    assert _token_ids(outputs) == ids[: first + 1]
    assert outputs[-1].finish_reason == "stop"
    assert outputs[-1].stop_token_id == stop_id
    later = dataclasses.replace(stopping, min_tokens=15)
    outputs = _one(llama, _request("r", PROMPTS[3], later))
    assert stop_id not in _token_ids(outputs)[:15]
    outputs = _one(llama, _request("r", PROMPTS[3], dataclasses.replace(free, max_tokens=1)))
    assert (_token_ids(outputs), outputs[-1].finish_reason) == (ids[:1], "length")
    assert outputs[-1].stop_token_id is None


def test_eos_ids_come_from_the_generation_config() -> None:
    def load() -> Any:
        model = build_causal_lm("llama")
        model.generation_config.eos_token_id = [4, 5]
        return model

    engine = TransformersEngine(load, model_id="m")
    assert engine.info.eos_token_ids == (4, 5)
    bias = dataclasses.replace(GREEDY, logit_bias={5: 1000.0})
    outputs = _one(engine, _request("r", [1, 2], bias))
    assert (_token_ids(outputs), outputs[-1].stop_token_id) == ([5], 5)
    outputs = _one(engine, _request("r", [1, 2], dataclasses.replace(bias, ignore_eos=True)))
    assert _token_ids(outputs) == [5] * 12


def test_an_aborted_request_is_gone_at_once(llama: TransformersEngine) -> None:
    llama.submit(_request("a", PROMPTS[1]))
    llama.submit(_request("b", PROMPTS[2]))
    llama.step()
    llama.abort("a")
    llama.abort("unknown")
    assert llama.stats().num_requests_running == 1
    while llama.has_work():
        assert {output.request_id for output in llama.step()} == {"b"}
    llama.submit(_request("c", PROMPTS[1]))
    llama.abort("c")
    assert not llama.has_work()


# Sampling


def test_seeds_repeat_alone_and_in_company(llama: TransformersEngine) -> None:
    params = SamplingParams(max_tokens=20, temperature=1.0, seed=11, ignore_eos=True)
    request = _request("r", PROMPTS[2], params)
    alone = _token_ids(_one(llama, request))
    assert _token_ids(_one(llama, request)) == alone
    company = [
        _request(f"c{i}", p, dataclasses.replace(params, seed=i)) for i, p in enumerate(PROMPTS)
    ]
    assert _token_ids(_run(llama, [*company, request])["r"]) == alone
    other = dataclasses.replace(params, seed=12)
    assert _token_ids(_one(llama, _request("r", PROMPTS[2], other))) != alone


def test_greedy_and_sampled_requests_mix(llama: TransformersEngine) -> None:
    model = build_causal_lm("llama")
    sampled = SamplingParams(max_tokens=12, temperature=1.5, top_k=20, top_p=0.9, min_p=0.01)
    requests = [_request(f"g{i}", prompt) for i, prompt in enumerate(PROMPTS[:4])]
    noise = [_request(f"s{i}", prompt, sampled) for i, prompt in enumerate(PROMPTS[4:])]
    outputs = _run(llama, [*noise, *requests])
    for request in requests:
        assert _token_ids(outputs[request.request_id]) == _generate(model, request.token_ids, 12)


def test_repetition_penalty_equals_generate(llama: TransformersEngine) -> None:
    params = dataclasses.replace(GREEDY, repetition_penalty=1.8)
    model = build_causal_lm("llama")
    expected = _generate(model, PROMPTS[3], 12, repetition_penalty=1.8)
    assert _token_ids(_one(llama, _request("r", PROMPTS[3], params))) == expected
    assert expected != _generate(model, PROMPTS[3], 12)


# Log-probabilities


@pytest.mark.parametrize("architecture", ["llama", "bloom"])
def test_logprobs_equal_log_softmax(architecture: str) -> None:
    engine = _engine(architecture)
    params = dataclasses.replace(
        GREEDY, logprobs=3, prompt_logprobs=2, temperature=0.7, seed=1, ignore_eos=True
    )
    outputs = _one(engine, _request("r", PROMPTS[4], params))
    prompt, generated = PROMPTS[4], _token_ids(outputs)
    logprobs_SV = _logits(build_causal_lm(architecture), prompt + generated).log_softmax(-1)
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


def test_prompt_logprobs_alone(llama: TransformersEngine) -> None:
    params = SamplingParams(max_tokens=0, prompt_logprobs=0)
    (output,) = _one(llama, _request("r", [4, 5, 6], params))
    assert output.token_ids == ()
    assert output.finish_reason == "length"
    assert output.prompt_logprobs is not None
    assert [entry.token_id for entry in output.prompt_logprobs] == [4, 5, 6]


# Embedding rows


def test_rows_that_are_token_embeddings_change_nothing(llama: TransformersEngine) -> None:
    prompt = PROMPTS[4]
    table = build_causal_lm("llama").get_input_embeddings().weight
    places = [0, 3, 4, len(prompt) - 1]
    mixed = [ROW_PLACEHOLDER if i in places else token_id for i, token_id in enumerate(prompt)]
    rows = table[[prompt[i] for i in places]].numpy().astype("<f4").tobytes()
    expected = _token_ids(_one(llama, _request("r", prompt)))
    request = _request("r", mixed, embedding_rows=rows)
    assert _token_ids(_one(llama, request)) == expected
    company = [_request(f"c{i}", p) for i, p in enumerate(PROMPTS[:3])]
    assert _token_ids(_run(llama, [*company, request])["r"]) == expected


def test_rows_may_span_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers_engine, "PREFILL_CHUNK", 3)
    engine = _engine("llama")
    prompt = PROMPTS[4][:10]
    table = build_causal_lm("llama").get_input_embeddings().weight
    rows = table[prompt].numpy().astype("<f4").tobytes()
    params = dataclasses.replace(GREEDY, prompt_logprobs=1)
    request = _request("r", [ROW_PLACEHOLDER] * 10, params, embedding_rows=rows)
    outputs = _one(engine, request)
    assert _token_ids(outputs) == _generate(build_causal_lm("llama"), prompt, 12)
    assert outputs[0].prompt_logprobs is not None
    assert all(entry.logprob is None for entry in outputs[0].prompt_logprobs)


def test_rows_must_match_their_placeholders(llama: TransformersEngine) -> None:
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
            llama.submit(_request("r", token_ids, embedding_rows=rows))
        assert caught.value.code == "invalid_value"
    assert not llama.has_work()


# Embedding and scoring


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mistral"])
def test_embed_pools_the_last_hidden_states(architecture: str) -> None:
    engine = _engine(architecture)
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
    logprobs_SV = _logits(model, [*context, *ids]).log_softmax(-1)
    rows = range(len(context) - 1, len(context) + len(ids) - 1)
    logprobs = [float(logprobs_SV[row, token]) for row, token in zip(rows, ids, strict=True)]
    greedy = all(int(logprobs_SV[row].argmax()) == t for row, t in zip(rows, ids, strict=True))
    return logprobs, greedy


@pytest.mark.parametrize("architecture", CONFIGS)
def test_score_equals_the_naive_loop(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers_engine, "MAX_CONTINUATION_ROWS", 4)
    monkeypatch.setattr(transformers_engine, "PREFILL_CHUNK", 7)
    engine = _engine(architecture)
    model = build_causal_lm(architecture)
    context = PROMPTS[4]
    greedy = _generate(model, context, 3, eos=None)
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


def test_single_token_continuations_need_the_context_only(llama: TransformersEngine) -> None:
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
        (
            {"constraint": Constraint(kind="json_object")},
            "unsupported_parameter",
            "response_format",
        ),
        ({"constraint": Constraint(kind="regex", text="a")}, "unsupported_parameter", "regex"),
        ({"params": SamplingParams(max_tokens=0)}, "invalid_value", "max_tokens"),
        (
            {"params": SamplingParams(max_tokens=1, logit_bias={VOCAB_SIZE: 1.0})},
            "invalid_value",
            "logit_bias",
        ),
    ],
)
def test_what_can_not_be_done_is_refused_by_name(
    llama: TransformersEngine, fields: dict[str, Any], code: str, param: str
) -> None:
    request = dataclasses.replace(_request("r", [1, 2]), **fields)
    with pytest.raises(EngineError) as caught:
        llama.submit(request)
    assert (caught.value.code, caught.value.param) == (code, param)
    assert not llama.has_work()
    if code == "unsupported_parameter":
        assert param in llama.info.unsupported


def test_a_full_queue_refuses() -> None:
    engine = _engine("llama", max_num_seqs=1, max_num_waiting=2)
    for index in range(2):
        engine.submit(_request(f"r{index}", [1, 2]))
    with pytest.raises(EngineError) as caught:
        engine.submit(_request("r2", [1, 2]))
    assert caught.value.code == "queue_full"
    engine.step()
    engine.submit(_request("r2", [1, 2]))
    assert engine.stats().num_requests_waiting == 2


def test_score_and_embed_refuse_what_does_not_fit(llama: TransformersEngine) -> None:
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


def test_out_of_memory_costs_the_youngest_only(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = _engine("llama")
    model = build_causal_lm("llama")
    for index in range(3):
        engine.submit(_request(f"r{index}", PROMPTS[index + 1]))
    outputs = engine.step()
    decode = engine._decoder.decode

    def fail_once(keys: Sequence[str], token_ids: Sequence[int]) -> torch.Tensor:
        monkeypatch.setattr(engine._decoder, "decode", decode)
        raise torch.OutOfMemoryError("told to")

    monkeypatch.setattr(engine._decoder, "decode", fail_once)
    while engine.has_work():
        outputs += engine.step()
    for index in range(2):
        mine = [output for output in outputs if output.request_id == f"r{index}"]
        assert _token_ids(mine) == _generate(model, PROMPTS[index + 1], 12)
    lost = [output for output in outputs if output.request_id == "r2"][-1]
    assert (lost.finish_reason, lost.error_code) == ("error", "out_of_memory")


def test_a_failing_pass_ends_its_requests_and_the_engine_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = _engine("llama")
    expected = _token_ids(_one(engine, _request("r", PROMPTS[3])))

    def fail(*_: object) -> torch.Tensor:
        raise RuntimeError("told to fail")

    for method in ("prefill", "decode"):
        with monkeypatch.context() as patch:
            patch.setattr(engine._decoder, method, fail)
            outputs = _one(engine, _request("r", PROMPTS[3]))
        assert (outputs[-1].finish_reason, outputs[-1].error_code) == ("error", "internal_error")
        assert "told to fail" not in (outputs[-1].error or "")
    assert _token_ids(_one(engine, _request("r", PROMPTS[3]))) == expected


def test_a_request_that_rules_out_every_token_fails_alone(llama: TransformersEngine) -> None:
    bias = {token_id: -float("inf") for token_id in range(VOCAB_SIZE)}
    bad = _request("bad", [1], dataclasses.replace(GREEDY, logit_bias=bias))
    outputs = _run(llama, [bad, _request("good", PROMPTS[3])])
    assert outputs["bad"][-1].finish_reason == "error"
    assert "rule out every token" in (outputs["bad"][-1].error or "")
    assert outputs["good"][-1].finish_reason in ("stop", "length")


def test_sleep_frees_and_wake_restores() -> None:
    engine = _engine("llama")
    expected = _token_ids(_one(engine, _request("r", PROMPTS[3])))
    engine.submit(_request("running", PROMPTS[1]))
    engine.step()
    engine.submit(_request("waiting", PROMPTS[2]))
    engine.sleep()
    engine.sleep()
    assert engine.stats().sleeping
    assert engine._model is None
    lost = {output.request_id: output for output in engine.step()}
    assert {output.error_code for output in lost.values()} == {"sleeping"}
    assert lost.keys() == {"running", "waiting"}
    assert not engine.has_work()
    for call in (
        lambda: engine.submit(_request("r", [1])),
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
    assert _token_ids(_one(engine, _request("r", PROMPTS[3]))) == expected


def test_counters(llama: TransformersEngine) -> None:
    before = llama.stats()
    outputs = _run(llama, [_request("a", PROMPTS[3]), _request("b", PROMPTS[4])])
    after = llama.stats()
    generated = sum(len(_token_ids(part)) for part in outputs.values())
    assert after.generation_tokens_total - before.generation_tokens_total == generated
    prompt_tokens = len(PROMPTS[3]) + len(PROMPTS[4])
    assert after.prompt_tokens_total - before.prompt_tokens_total == prompt_tokens
    assert after.last_output_at is not None
    assert after.rss_bytes > 2**20
    assert llama.info.resident_bytes > 0
    assert llama.info.kernels["decode"].startswith("one pass for all")
