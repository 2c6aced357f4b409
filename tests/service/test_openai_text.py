"""POST /v1/score, /v1/tokenize and /v1/detokenize."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.echo_engine import echo_logprob
from tests.service.openai_app import DECODER, ENCODER, END, START, Service, error_of


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with Service(tmp_path) as service:
        yield service


def logprob(ids: list[int]) -> float:
    return sum(echo_logprob(token_id) for token_id in ids)


def test_the_whole_score(service: Service) -> None:
    context, yes, no = [10, 11], [20, 21], [30]
    body = service.post(
        "score", context=context, continuations=[yes, no], return_token_logprobs=True
    ).json()
    sums = [logprob(yes), logprob(no)]
    total = sum(map(math.exp, sums))
    (item,) = body.pop("data")
    assert item.pop("probabilities") == pytest.approx([math.exp(s) / total for s in sums])
    assert item == {
        "index": 0,
        "object": "score",
        "scores": [
            {
                "index": index,
                "logprob": sums[index],
                "is_greedy": False,
                "num_tokens": len(ids),
                "token_logprobs": [echo_logprob(token_id) for token_id in ids],
            }
            for index, ids in enumerate([yes, no])
        ],
    }
    assert body == {
        "object": "list",
        "model": DECODER,
        "usage": {"prompt_tokens": 5, "total_tokens": 5},
    }


def lm_eval_pair(service: Service, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """`TemplateLM._encode_pair` of lm-eval 0.4.13."""
    num_spaces = len(context) - len(context.rstrip())
    if num_spaces > 0:
        continuation = context[-num_spaces:] + continuation
        context = context[:-num_spaces]
    whole = service.text.encode(context + continuation)
    context_ids = service.text.encode(context)
    return context_ids, whole[len(context_ids) :]


@pytest.mark.parametrize(
    ("context", "continuation"),
    [("the wood", " turns"), ("the wood ", "turns"), ("the w", "a"), ("the\n\n", "lathe")],
)
def test_pairs_are_split_as_lm_eval_does(service: Service, context: str, continuation: str) -> None:
    service.post("score", items=[{"context": context, "continuations": [continuation]}])
    (request,) = service.engine.score_requests
    expected = lm_eval_pair(service, context, continuation)
    assert (list(request.context_ids), list(request.continuation_ids[0])) == expected


def test_a_continuation_that_melts_into_the_context(service: Service) -> None:
    answer = service.post("score", context="the wo", continuations=[" a", "od"])
    assert error_of(answer) == ("invalid_value", "continuations[1]")


def test_several_items(service: Service) -> None:
    items = [
        {"context": "a", "continuations": ["b", "c"]},
        {"context": [5], "continuations": [[6]]},
    ]
    body = service.post("score", items=items).json()
    assert [item["index"] for item in body["data"]] == [0, 1]
    assert [len(item["scores"]) for item in body["data"]] == [2, 1]
    assert body["data"][0]["scores"][0]["token_logprobs"] is None
    assert body["data"][1]["probabilities"] == [1.0]


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({}, "invalid_value", "context"),
        ({"context": "a"}, "invalid_value", "continuations"),
        ({"context": "a", "continuations": []}, "invalid_value", "continuations"),
        ({"context": "", "continuations": ["a"]}, "invalid_value", "context"),
        ({"context": " ", "continuations": ["a"]}, "invalid_value", "context"),
        ({"context": "a", "continuations": [""]}, "invalid_value", "continuations[0]"),
        ({"context": "a", "continuations": ["b", [1]]}, "invalid_value", "continuations[1]"),
        ({"context": [999_999], "continuations": [[1]]}, "invalid_value", "context"),
        ({"context": [1], "continuations": [[999_999]]}, "invalid_value", "continuations[0]"),
        ({"context": [1], "continuations": [[1]], "items": []}, "invalid_value", "items"),
        (
            {"items": [{"context": "a", "continuations": ["b", [1]]}]},
            "invalid_value",
            "items[0].continuations[1]",
        ),
        (
            {"context": [1] * 512, "continuations": [[1]]},
            "context_length_exceeded",
            "continuations[0]",
        ),
        ({"context": "a", "continuations": ["b"], "x": 1}, "unsupported_parameter", "x"),
        ({"context": "a", "continuations": ["b"], "model": ENCODER}, "invalid_value", "model"),
    ],
)
def test_refused_scores(service: Service, body: dict[str, Any], code: str, param: str) -> None:
    assert error_of(service.post("score", **body)) == (code, param)


def test_tokenize(service: Service) -> None:
    ids = service.text.encode("the wood<|im_end|>")
    body = service.post("tokenize", prompt="the wood<|im_end|>", return_token_strs=True).json()
    strings = body.pop("token_strs")
    assert body == {"count": len(ids), "max_model_len": 512, "tokens": ids}
    assert END not in ids
    assert strings[:2] == [service.text.token_string(token_id) for token_id in ids[:2]]
    assert service.post("detokenize", tokens=ids).json() == {"prompt": "the wood<|im_end|>"}


def test_tokenize_adds_what_the_model_expects(service: Service) -> None:
    both = [
        service.post("tokenize", model=ENCODER, prompt="a b", add_special_tokens=add).json()[
            "tokens"
        ]
        for add in (True, False)
    ]
    assert both == [[2, 4, 5, 3], [4, 5]]


def test_tokenize_messages(service: Service) -> None:
    messages = [{"role": "user", "content": "a<|im_end|>"}]
    body = service.post("tokenize", messages=messages).json()
    assert body["token_strs"] is None
    assert (body["tokens"].count(START), body["tokens"].count(END)) == (2, 1)
    shorter = service.post("tokenize", messages=messages, add_generation_prompt=False).json()
    assert body["tokens"][: shorter["count"]] == shorter["tokens"]
    assert shorter["count"] < body["count"]


def test_detokenize_special_tokens(service: Service) -> None:
    (letter,) = service.text.encode("a")
    for skip, expected in ((False, "a<|im_end|>"), (True, "a")):
        answer = service.post("detokenize", tokens=[letter, END], skip_special_tokens=skip)
        assert answer.json() == {"prompt": expected}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("tokenize", {}, "prompt"),
        ("tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt"),
        ("tokenize", {"prompt": 1}, "prompt"),
        ("tokenize", {"prompt": "a" * (2**20 + 1)}, "prompt"),
        ("tokenize", {"messages": [{"role": "x", "content": "a"}]}, "messages[0].role"),
        ("detokenize", {"tokens": [1, 999_999]}, "tokens[1]"),
        ("detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("detokenize", {"tokens": ["1"]}, "tokens[0]"),
        ("detokenize", {}, "tokens"),
    ],
)
def test_refused_texts(service: Service, path: str, body: dict[str, Any], param: str) -> None:
    assert error_of(service.post(path, **body)) == ("invalid_value", param)
