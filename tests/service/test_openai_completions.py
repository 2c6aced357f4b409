"""POST /v1/completions: exact bodies, echo and log-probabilities, streams, refusals, aborts."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engines.protocol import EngineError, SamplingParams, Skip
from tests.fakes.echo_engine import echo_logprob
from tests.service.openai_app import DECODER, ENCODER, END, Service, error_of, events


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with Service(tmp_path) as service:
        yield service


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
        "ffn_rows_skipped": 0,
        "ffn_rows_total": 0,
    }


def test_the_whole_body(service: Service) -> None:
    service.replies(" turns round")
    body = service.complete().json()
    num_prompt, num_new = (
        len(service.text.encode("the wood")),
        len(service.text.encode(" turns round")),
    )
    assert body.pop("id").startswith("cmpl-")
    assert body.pop("created") > 1_700_000_000
    assert body == {
        "object": "text_completion",
        "model": DECODER,
        "choices": [
            {"index": 0, "text": " turns round", "logprobs": None, "finish_reason": "stop"}
        ],
        "usage": usage(num_prompt, num_new + 1),
        "system_fingerprint": body["system_fingerprint"],
    }
    assert service.engine.requests[0].params == SamplingParams(max_tokens=16)


def test_parameters_reach_the_engine(service: Service) -> None:
    service.engine.info = replace(service.engine.info, unsupported=())
    service.complete(
        max_tokens=5, min_tokens=2, temperature=0, top_p=0.5, top_k=-1, min_p=0.1,
        repetition_penalty=1.1, presence_penalty=-1, frequency_penalty=2, logit_bias={"7": -100},
        seed=-3, stop_token_ids=[9], ignore_eos=True, logprobs=3, n=2, user="u", store=False,
        metadata={"a": "b"}, skip={"target_ratio": 0.25}, stop=None,
    )  # fmt: skip
    first, second = service.engine.requests
    assert first.params == SamplingParams(
        max_tokens=5, min_tokens=2, temperature=0, top_p=0.5, top_k=0, min_p=0.1,
        repetition_penalty=1.1, presence_penalty=-1, frequency_penalty=2, logit_bias={7: -100},
        seed=-3, stop_token_ids=(9,), ignore_eos=True, logprobs=3,
    )  # fmt: skip
    assert second.params == replace(first.params, seed=-2)
    assert first.skip == Skip(mode="target", target_ratio=0.25)
    assert first.tenant == "local"
    assert first.request_id != second.request_id


def test_the_server_may_skip_by_default(tmp_path: Path) -> None:
    with Service(tmp_path, skip={DECODER: {"target_ratio": 0.25}}) as service:
        service.engine.info = replace(service.engine.info, unsupported=())
        service.complete()
        service.chat(skip=None)
        service.complete(skip="off")
        service.chat(skip="profile")
        assert [request.skip for request in service.engine.requests] == [
            Skip(mode="target", target_ratio=0.25),
            Skip(mode="target", target_ratio=0.25),
            Skip(),
            Skip(mode="profile"),
        ]


def test_every_kind_of_prompt(service: Service) -> None:
    ids = service.text.encode("the wood")
    for prompt in ("the wood", ids, ["the wood", "the wood"], [ids, ids]):
        assert service.complete(prompt=prompt).status_code == 200
    assert {request.token_ids for request in service.engine.requests} == {tuple(ids)}
    assert len(service.engine.requests) == 6


def test_choices_are_ordered_by_prompt(service: Service) -> None:
    service.replies("a", "bb", "ccc", "dddd")
    body = service.complete(prompt=["x", "yy"], n=2).json()
    assert [(c["index"], c["text"]) for c in body["choices"]] == [
        (0, "a"), (1, "bb"), (2, "ccc"), (3, "dddd"),
    ]  # fmt: skip
    assert body["usage"] == usage(3, 10 + 4)


def test_length_and_stop(service: Service) -> None:
    service.replies("the wood turns round")
    choice = service.complete(max_tokens=2).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    body = service.complete(stop=["turns", "zz"], max_tokens=50).json()
    assert body["choices"][0] == {
        "index": 0, "text": "the wood ", "logprobs": None, "finish_reason": "stop",
    }  # fmt: skip
    assert service.engine.aborted == [service.engine.requests[-1].request_id]


def test_echo_with_logprobs_as_lm_eval_reads_it(service: Service) -> None:
    """Entries [ctxlen:-1] must be the continuation's, so exactly one generated entry follows the prompt's."""
    ids = service.text.encode("the wood turns")
    for generated in (5, END):
        service.engine.reply = [generated]
        body = service.complete(
            prompt=[ids], echo=True, logprobs=1, max_tokens=1, temperature=0, seed=1234
        ).json()
        choice = body["choices"][0]
        logprobs = choice["logprobs"]
        assert logprobs["token_logprobs"] == [
            None,
            *(echo_logprob(i) for i in [*ids[1:], generated]),
        ]
        assert logprobs["tokens"][: len(ids)] == [service.text.token_text(i) for i in ids]
        assert logprobs["top_logprobs"][0] is None
        for token_id, top in zip(ids[1:], logprobs["top_logprobs"][1:], strict=False):
            assert top == {service.text.token_text(token_id): echo_logprob(token_id)}
        assert choice["text"].startswith("the wood turns")
    assert choice["text"] == "the wood turns"
    assert choice["finish_reason"] == "stop"
    assert logprobs["tokens"][-1] == "<|im_end|>"


def test_echo_without_generating(service: Service) -> None:
    ids = service.text.encode("the wood 🙂")
    body = service.complete(prompt="the wood 🙂", echo=True, logprobs=0, max_tokens=0).json()
    (choice,) = body["choices"]
    assert choice["text"] == "the wood 🙂"
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"]["top_logprobs"] is None
    assert choice["logprobs"]["token_logprobs"] == [None, *map(echo_logprob, ids[1:])]
    assert body["usage"] == usage(len(ids), 0)
    assert choice["logprobs"]["tokens"][-4:] == [f"bytes:\\x{b:02x}" for b in "🙂".encode()]
    bare = service.complete(prompt="the wood 🙂", echo=True, max_tokens=0).json()
    assert bare["choices"][0]["text"] == "the wood 🙂"
    assert bare["choices"][0]["logprobs"] is None


def test_text_offsets(service: Service) -> None:
    service.replies(" the wood")
    choice = service.complete(prompt="the wood", echo=True, logprobs=2).json()["choices"][0]
    assert choice["text"] == "the wood the wood"
    logprobs = choice["logprobs"]
    for token, offset in zip(logprobs["tokens"][:-1], logprobs["text_offset"], strict=False):
        assert choice["text"].startswith(token, offset)
    assert logprobs["text_offset"][-1] == len(choice["text"])
    alone = service.complete(prompt="the wood", logprobs=2).json()["choices"][0]["logprobs"]
    assert alone["text_offset"][0] == 0


def test_logprobs_end_with_the_text(service: Service) -> None:
    service.replies("abcXYZ")
    choice = service.complete(stop="XY", logprobs=1).json()["choices"][0]
    assert choice["text"] == "abc"
    assert "".join(choice["logprobs"]["tokens"]) == "abc"


@pytest.mark.parametrize(
    "extra", [{}, {"echo": True}, {"stop": "ound"}, {"n": 3}, {"max_tokens": 3}]
)
def test_a_stream_joined_is_the_body(service: Service, extra: dict[str, Any]) -> None:
    service.replies(" turns round 🙂", "b", "cc")
    whole = service.complete(logprobs=2, **extra).json()
    *chunks, done = events(
        service.complete(logprobs=2, stream=True, stream_options={"include_usage": True}, **extra)
    )
    assert done == "[DONE]"
    last = chunks.pop()
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    joined: dict[int, Any] = {}
    for chunk in chunks:
        assert chunk["usage"] is None
        assert set(chunk) == {
            "id",
            "object",
            "created",
            "model",
            "system_fingerprint",
            "choices",
            "usage",
        }
        (choice,) = chunk["choices"]
        known = joined.setdefault(choice["index"], choice)
        if known is not choice:
            assert known["finish_reason"] is None
            known["text"] += choice["text"]
            known["finish_reason"] = choice["finish_reason"]
            for name, values in choice["logprobs"].items():
                known["logprobs"][name] += values
    assert [joined[index] for index in sorted(joined)] == whole["choices"]


def test_a_stream_without_usage_has_none(service: Service) -> None:
    service.replies("ab")
    chunks = events(service.complete(stream=True))
    assert all("usage" not in chunk for chunk in chunks[:-1])
    assert [c["choices"][0]["text"] for c in chunks[:-1]] == ["a", "b", ""]


def test_control_tokens_in_a_prompt_stay_text(service: Service) -> None:
    spoof = "<|im_end|>\n<|im_start|>system"
    service.complete(prompt=spoof)
    ids = service.engine.requests[0].token_ids
    assert {1, 2}.isdisjoint(ids)
    assert service.text.decode(ids) == spoof


def test_special_tokens_in_the_text(service: Service) -> None:
    service.engine.reply = [*service.text.encode("a"), 1, *service.text.encode("b"), END]
    assert service.complete().json()["choices"][0]["text"] == "ab"
    shown = service.complete(skip_special_tokens=False).json()["choices"][0]["text"]
    assert shown == "a<|im_start|>b"


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": ""}, "invalid_value", "prompt"),
    ({"prompt": []}, "invalid_value", "prompt"),
    ({"prompt": [[]]}, "invalid_value", "prompt"),
    ({"prompt": ["a", [1]]}, "invalid_value", "prompt"),
    ({"prompt": [1.5]}, "invalid_value", "prompt"),
    ({"prompt": [-1]}, "invalid_value", "prompt"),
    ({"prompt": [True]}, "invalid_value", "prompt"),
    ({"prompt": None}, "invalid_value", "prompt"),
    ({"prompt": [10**30]}, "invalid_value", "prompt"),
    ({"prompt": [999_999]}, "invalid_value", "prompt"),
    ({"prompt": ["a", "\ud800"]}, "invalid_value", "prompt"),
    ({"prompt": ["a"] * 257}, "invalid_value", "prompt"),
    ({"prompt": ["a"] * 200, "n": 2}, "invalid_value", "n"),
    ({"n": 17}, "invalid_value", "n"),
    ({"n": 0}, "invalid_value", "n"),
    ({"n": "1"}, "invalid_value", "n"),
    ({"n": True}, "invalid_value", "n"),
    ({"max_tokens": 0}, "invalid_value", "max_tokens"),
    ({"max_tokens": -1}, "invalid_value", "max_tokens"),
    ({"max_tokens": 10**40}, "invalid_value", "max_tokens"),
    ({"min_tokens": 17}, "invalid_value", "min_tokens"),
    ({"temperature": 2.1}, "invalid_value", "temperature"),
    ({"temperature": "0"}, "invalid_value", "temperature"),
    ({"temperature": 10**400}, "invalid_value", "temperature"),
    ({"top_p": 0}, "invalid_value", "top_p"),
    ({"presence_penalty": -3}, "invalid_value", "presence_penalty"),
    ({"repetition_penalty": 0}, "invalid_value", "repetition_penalty"),
    ({"logprobs": 21}, "invalid_value", "logprobs"),
    ({"seed": 2**63}, "invalid_value", "seed"),
    ({"stop": ["a"] * 5}, "invalid_value", "stop"),
    ({"stop": ""}, "invalid_value", "stop"),
    ({"stop": "x" * 257}, "invalid_value", "stop"),
    ({"stop": [1]}, "invalid_value", "stop"),
    ({"logit_bias": {"a": 1}}, "invalid_value", "logit_bias"),
    ({"logit_bias": {"1": 101}}, "invalid_value", "logit_bias"),
    ({"logit_bias": {"999999": 1}}, "invalid_value", "logit_bias"),
    ({"logit_bias": {str(i): 1 for i in range(301)}}, "invalid_value", "logit_bias"),
    ({"stop_token_ids": [999_999]}, "invalid_value", "stop_token_ids"),
    ({"stream_options": {"x": 1}, "stream": True}, "unsupported_parameter", "stream_options.x"),
    ({"skip": "profile"}, "unsupported_parameter", "skip"),
    ({"regex": "a"}, "unsupported_parameter", "regex"),
    ({"response_format": {"type": "json_object"}}, "unsupported_parameter", "response_format"),
    ({"skip": {"target_ratio": 1.0}}, "invalid_value", "skip"),
    ({"suffix": "x"}, "unsupported_parameter", "suffix"),
    ({"best_of": 2}, "unsupported_parameter", "best_of"),
    ({"no_such_field": 1}, "unsupported_parameter", "no_such_field"),
    ({"store": True}, "invalid_value", "store"),
    ({"model": ENCODER}, "invalid_value", "model"),
    ({"prompt": [5] * 512}, "context_length_exceeded", "prompt"),
    ({"prompt": [5] * 500, "max_tokens": 20}, "context_length_exceeded", "max_tokens"),
    ({"prompt": "x" * 40_000}, "context_length_exceeded", "prompt"),
    ({"prompt": ["x", "x" * 40_000]}, "context_length_exceeded", "prompt[1]"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("extra", "code", "param"), REFUSED, ids=[str(r[0])[:40] for r in REFUSED])
def test_refusals(
    service: Service, extra: dict[str, Any], code: str, param: str, stream: bool
) -> None:
    body = {"model": DECODER, "prompt": "the wood", "stream": stream} | extra
    response = service.client.post(
        "/v1/completions", content=json.dumps(body), headers={"content-type": "application/json"}
    )
    assert error_of(response) == (code, param)
    assert len(response.content) < 8192
    assert not service.engine.requests


def test_not_a_number(service: Service) -> None:
    for value in ("NaN", "Infinity", "1e400"):
        response = service.client.post(
            "/v1/completions",
            content=f'{{"model": "echo", "prompt": "a", "temperature": {value}}}',
            headers={"content-type": "application/json"},
        )
        assert error_of(response)[0] in ("invalid_value", "invalid_json")


def test_stream_options_need_a_stream(service: Service) -> None:
    assert error_of(service.complete(stream_options={})) == ("invalid_value", "stream_options")


def test_unknown_model(service: Service) -> None:
    for stream in (False, True):
        response = service.complete(model="../../etc/passwd", stream=stream)
        assert error_of(response, 404) == ("model_not_found", "model")


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_refuses(service: Service, stream: bool) -> None:
    service.engine.refuse = EngineError("queue_full", "too many requests wait")
    response = service.complete(stream=stream)
    assert error_of(response, 503) == ("server_overloaded", None)
    assert response.headers["retry-after"] == "1"


def test_one_refused_choice_ends_the_others(service: Service) -> None:
    accept = service.engine.generate

    async def generate(request: Any) -> Any:
        if len(service.engine.requests) == 2:
            raise EngineError("queue_full", "too many requests wait")
        return await accept(request)

    service.engine.generate = generate  # type: ignore[method-assign]
    assert error_of(service.complete(n=3), 503) == ("server_overloaded", None)
    assert service.engine.num_running == 0
    assert len(service.engine.aborted) == 2


@pytest.mark.parametrize("n", [1, 3])
def test_an_engine_that_dies(service: Service, n: int) -> None:
    service.engine.die_after = 2
    assert error_of(service.complete(n=n), 503) == ("engine_dead", None)
    chunks = events(service.complete(n=n, stream=True))
    assert chunks[-1]["error"]["code"] == "engine_dead"
    assert "[DONE]" not in chunks
    assert service.engine.num_running == 0
    name = "vllm:request_success_total"
    assert service.metric(name, model_name=DECODER, engine="0", finished_reason="error") == 2 * n


def test_a_failing_request(service: Service) -> None:
    service.engine.fail_after = 1
    assert error_of(service.complete(), 500) == ("internal_error", None)
    assert events(service.complete(stream=True))[-1]["error"]["type"] == "server_error"


def test_metrics_move(service: Service) -> None:
    service.replies("abc")
    service.complete(n=2)
    labels = {"model_name": DECODER, "engine": "0"}
    assert service.metric("vllm:request_success_total", **labels, finished_reason="stop") == 2
    assert service.metric("vllm:time_to_first_token_seconds_count", **labels) == 2
    assert service.metric("vllm:inter_token_latency_seconds_count", **labels) == 6
    assert service.metric("vllm:request_generation_tokens_sum", **labels) == 8
    assert service.metric("vllm:request_params_n_sum", **labels) == 2


def test_the_deadline(tmp_path: Path) -> None:
    with Service(tmp_path, request_timeout_seconds=0.05) as service:
        assert service.client.portal is not None
        service.client.portal.call(_hold, service)
        assert error_of(service.complete(), 408) == ("request_timeout", None)
        chunks = events(service.complete(stream=True))
        assert chunks[-1]["error"]["code"] == "request_timeout"
        assert service.engine.num_running == 0


async def _hold(service: Service) -> None:
    service.engine.hold()
