"""Row 9: every number and list has a cap: at it a request is served or refused for its own reasons, above it refused
by the field's name; and numbers that are none, too large or too deep are never an internal error."""

import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from service.generation_body import (
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_N,
    MAX_PROMPT_TOKENS,
    MAX_REGEX_CHARS,
    MAX_SCHEMA_CHARS,
    MAX_STOP_CHARS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
)
from service.routes.chat import MAX_MESSAGES, MAX_PARTS
from service.routes.completions import MAX_CHOICES, MAX_PROMPTS
from service.routes.embeddings import MAX_INPUTS
from tests.security.conftest import MODEL, Guarded, check_error
from tests.security.test_row05_no_url_is_fetched import examples

COMPLETION: dict[str, Any] = {"model": MODEL, "prompt": "a", "max_tokens": 1}
CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "a"}]}
HUGE = [2**31, 2**63, -(10**30), 10**4000, 1e300]


@pytest.fixture(scope="module")
def post(client: TestClient, guarded: Guarded) -> Callable[[str, Any], Any]:
    headers = guarded.headers("admin") | {"content-type": "application/json"}

    def send(path: str, body: Any) -> Any:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return client.post(path, content=content, headers=headers)

    return send


Post = Callable[[str, Any], Any]

# what: the field, and a body for each size of it
CAPS: dict[str, tuple[str, int, str, Callable[[int], dict[str, Any]]]] = {
    "n": ("completions", MAX_N, "n", lambda k: COMPLETION | {"n": k}),
    "logprobs": ("completions", MAX_LOGPROBS, "logprobs", lambda k: COMPLETION | {"logprobs": k}),
    "stop strings": (
        "completions", MAX_STOP_STRINGS, "stop",
        lambda k: COMPLETION | {"stop": [f"x{i}" for i in range(k)]},
    ),
    "stop length": ("completions", MAX_STOP_CHARS, "stop", lambda k: COMPLETION | {"stop": "x" * k}),
    "stop tokens": (
        "completions", MAX_STOP_TOKEN_IDS, "stop_token_ids",
        lambda k: COMPLETION | {"stop_token_ids": [5] * k},
    ),
    "logit_bias": (
        "completions", MAX_LOGIT_BIAS, "logit_bias",
        lambda k: COMPLETION | {"logit_bias": {f"{i:05d}"[-5:]: 1 for i in range(k)}},
    ),
    "prompts": ("completions", MAX_PROMPTS, "prompt", lambda k: COMPLETION | {"prompt": ["a"] * k}),
    "choices": (
        "completions", MAX_CHOICES // MAX_N, "n",
        lambda k: COMPLETION | {"prompt": ["a"] * k, "n": MAX_N},
    ),
    "prompt tokens": (
        "completions", MAX_PROMPT_TOKENS, "prompt", lambda k: COMPLETION | {"prompt": [5] * k},
    ),
    "prompt tokens, together": (
        "completions", MAX_PROMPT_TOKENS // 4, "prompt",
        lambda k: COMPLETION | {"prompt": [[5] * k] * 4},
    ),
    "metadata": (
        "completions", 16, "metadata", lambda k: COMPLETION | {"metadata": {f"k{i}": "" for i in range(k)}},
    ),
    "metadata value": ("completions", 512, "metadata.k", lambda k: COMPLETION | {"metadata": {"k": "x" * k}}),
    "user": ("completions", 512, "user", lambda k: COMPLETION | {"user": "x" * k}),
    "model": ("completions", 200, "model", lambda k: COMPLETION | {"model": "x" * k}),
    "regex": ("completions", MAX_REGEX_CHARS, "regex", lambda k: COMPLETION | {"regex": "a" * k}),
    "schema": (
        "chat/completions", MAX_SCHEMA_CHARS, "response_format.json_schema",
        lambda k: CHAT | {"response_format": {
            "type": "json_schema", "json_schema": {"name": "a", "schema": {"title": "x" * (k - 13)}},
        }},
    ),
    "messages": (
        "chat/completions", MAX_MESSAGES, "messages",
        lambda k: CHAT | {"messages": [{"role": "user", "content": ""}] * k},
    ),
    "parts": (
        "chat/completions", MAX_PARTS, "messages[0].content",
        lambda k: CHAT | {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * k}]},
    ),
    "top_logprobs": (
        "chat/completions", MAX_LOGPROBS, "top_logprobs",
        lambda k: CHAT | {"logprobs": True, "top_logprobs": k},
    ),
    "inputs": ("embeddings", MAX_INPUTS, "input", lambda k: {"model": MODEL, "input": ["a"] * k}),
    "items": (
        "score", 256, "items",
        lambda k: {"model": MODEL, "items": [{"context": "a", "continuations": ["b"]}] * k},
    ),
    "continuations": (
        "score", 256, "continuations",
        lambda k: {"model": MODEL, "context": "a", "continuations": ["b"] * k},
    ),
    "nodes": (
        "enrich", 1024, "nodes",
        lambda k: {"prompt": "no-such-prompt", "nodes": [{"id": i, "text": ""} for i in range(k)]},
    ),
    "node text": (
        "enrich", 2**20, "nodes[0].text",
        lambda k: {"prompt": "no-such-prompt", "nodes": [{"id": "a", "text": "x" * k}]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", CAPS)
def test_each_cap_below_at_and_above(post: Post, what: str) -> None:
    path, cap, param, body = CAPS[what]
    for size in (cap - 1, cap):
        response = post(f"/v1/{path}", body(size))
        if response.status_code != 200:
            check_error(response, 400, 404)
            error = response.json()["error"]
            assert "at most" not in error["message"] or error["param"] != param, error
    for size in (cap + 1, min(cap * 4, cap + 10**5)):
        response = post(f"/v1/{path}", body(size))
        assert check_error(response, 400) == "invalid_value"
        assert response.json()["error"]["param"].startswith(param)


def places(value: Any) -> Iterator[list[Any]]:
    """The path of every number, text and container in a body."""
    yield []
    items: list[tuple[Any, Any]] = (
        list(value.items())
        if isinstance(value, dict)
        else list(enumerate(value))
        if isinstance(value, list)
        else []
    )
    for key, item in items:
        yield from ([key, *rest] for rest in places(item))


def put(body: Any, place: list[Any], value: Any) -> Any:
    if not place:
        return value
    body = copy.deepcopy(body)
    at = body
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = value
    return body


def all_bodies(app: FastAPI) -> Iterator[tuple[str, Any]]:
    for path, example in examples(app):
        yield path.replace("{", "").replace("}", ""), example
    numbers = {
        "n": 1, "temperature": 1, "top_p": 1, "top_k": 1, "min_p": 0.1, "seed": 1, "max_tokens": 1,
        "min_tokens": 0, "presence_penalty": 0, "frequency_penalty": 0, "repetition_penalty": 1,
        "logit_bias": {"5": 1}, "stop_token_ids": [5], "skip": {"target_ratio": 0.2}, "logprobs": 1,
        "metadata": {"a": "b"},
    }  # fmt: skip
    yield "/v1/completions", COMPLETION | numbers
    yield "/v1/enrich", {
        "prompt": "summary", "model": MODEL, "nodes": [{"id": 1, "text": "a", "neighbors": ["b"]}],
        "budget": {"max_nodes": 1, "max_tokens": 1, "max_seconds": 1.0}, "max_tokens": 1,
    }  # fmt: skip
    yield "/v1/graphs", {
        "name": "g", "nodes": [{"id": 1, "text": "a", "label": 1}], "edges": [[1, 1]],
    }  # fmt: skip
    yield "/v1/fine_tuning/jobs", {
        "model": MODEL, "training_file": "file-0123456789abcdef01234567", "seed": 1,
        "method": {"type": "qgalore", "qgalore": {"rank": 64, "hyperparameters": {"n_epochs": 2}}},
    }  # fmt: skip


def some(app: FastAPI, seed: object) -> list[tuple[str, Any, list[Any]]]:
    """A third of all places of all bodies, another third for another seed."""
    found = [(path, body, place) for path, body in all_bodies(app) for place in places(body)]
    assert len(found) > 100
    return random.Random(repr(seed)).sample(found, len(found) // 3)


@pytest.mark.parametrize("text", ["NaN", "-Infinity", "1e400", "1e-400"])
def test_numbers_that_are_none_are_refused_everywhere(app: FastAPI, post: Post, text: str) -> None:
    for path, body, place in some(app, text):
        content = json.dumps(put(body, place, "@@@")).replace('"@@@"', text).encode()
        response = post(path, content)
        if text != "1e-400":  # which is 0.0
            check_error(response, 400, 404)
        assert response.status_code < 500, (path, place, response.text)


@pytest.mark.parametrize("value", HUGE, ids=lambda value: str(value)[:10])
def test_huge_numbers_are_never_an_internal_error(app: FastAPI, post: Post, value: float) -> None:
    for path, body, place in some(app, value):
        response = post(path, put(body, place, value))
        assert response.status_code < 500, (path, place, response.text)
        assert len(response.content) < 20_000


@pytest.mark.parametrize(
    "value",
    [True, "1", [], [[]], {"": {}}, "\ud800", "\x00", "x" * 5000, -1, 0.5],
    ids=lambda value: repr(value)[:12],
)  # fmt: skip
def test_other_types_are_never_an_internal_error(app: FastAPI, post: Post, value: Any) -> None:
    for path, body, place in some(app, value):
        response = post(path, put(body, place, value))
        assert response.status_code < 500, (path, place, response.text)


@pytest.mark.parametrize("depth", [50, 300, 900, 100_000])
@pytest.mark.parametrize("brackets", ["[]", '{"a":}'])
def test_depth_is_never_an_internal_error(
    app: FastAPI, post: Post, depth: int, brackets: str
) -> None:
    """Also where json reads what it could not write."""
    deep = brackets[:-1] * depth + "1" + brackets[-1] * depth
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}
    place = ["response_format", "json_schema", "schema"]
    chat = ("/v1/chat/completions", CHAT | {"response_format": form}, place)
    for path, body, place in [chat, *some(app, deep)]:
        content = json.dumps(put(body, place, "@@@")).replace('"@@@"', deep).encode()
        response = post(path, content)
        assert response.status_code < 500, (path, place, response.text)


def test_integers_of_too_many_digits_are_bad_json(post: Post) -> None:
    response = post(
        "/v1/completions", b'{"model": "tiny", "prompt": "a", "n": ' + b"9" * 5000 + b"}"
    )
    assert check_error(response, 400) == "invalid_json"


def test_a_body_has_a_size(client: TestClient, guarded: Guarded) -> None:
    limit = guarded.settings.max_body_bytes
    headers = guarded.headers("inference") | {"content-type": "application/json"}

    def pieces(size: int) -> Iterator[bytes]:
        head = b'{"model": "tiny", "prompt": "'
        yield head
        for _ in range((size - len(head) - 2) // 2**20):
            yield b"x" * 2**20
        yield b"x" * ((size - len(head) - 2) % 2**20) + b'"}'

    for size in (limit, limit + 1):  # chunked: no length is declared
        response = client.post("/v1/completions", content=pieces(size), headers=headers)
        expected = "context_length_exceeded" if size == limit else "request_too_large"
        assert check_error(response, 400, 413) == expected
