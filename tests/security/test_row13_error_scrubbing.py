"""Row 13: an error tells nothing of our insides: no path, no address, no trace, no neighbour's text; 8 KiB at most."""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient

from compression.safetensors_header import CheckpointError
from engines.protocol import EngineError
from service.errors import ERRORS, ApiError, scrub
from tests.security.conftest import MAX_ERROR_BYTES, MODEL, Guarded, check_error

INSIDES = re.compile(
    rb"0x[0-9a-fA-F]{6,}|Traceback|/home/|/root/|/tmp/|/usr/|site-packages|\.py\b|line \d+, in"
)
SECRET = "sk-neighbours-secret"
LEAKY = (
    f'Traceback (most recent call last): File "/usr/lib/python3.11/site-packages/x.py", line 3, in y '
    f"<object at 0x7f3a5c0ffee0> /root/.cache/lathe/models/x C {SECRET} {'z' * 100_000}"
)


def check_clean(response: Any, *statuses: int) -> None:
    check_error(response, *statuses)
    assert not INSIDES.search(response.content), response.content[:500]
    assert len(response.content) <= MAX_ERROR_BYTES


RAISED: dict[str, tuple[Callable[[], BaseException], int]] = {
    "a bug": (lambda: RuntimeError(LEAKY), 500),
    "a missing key": (lambda: KeyError(LEAKY), 500),
    "a file": (lambda: FileNotFoundError(2, "No such file or directory", "/root/.cache/lathe/x"), 500),
    "a full disk": (lambda: OSError(28, "No space left on device", "/root/.cache/lathe/x"), 507),
    "a checkpoint": (lambda: CheckpointError(LEAKY), 500),
    "memory": (lambda: MemoryError(LEAKY), 500),
    "recursion": (lambda: RecursionError(LEAKY), 400),
    "an assertion": (lambda: AssertionError(LEAKY), 500),
    "an engine's bug": (lambda: EngineError("internal_error", LEAKY), 500),
    "an engine's death": (lambda: EngineError("engine_dead", LEAKY), 503),
    "an engine's refusal": (lambda: EngineError("invalid_value", LEAKY, "prompt" * 100), 400),
}  # fmt: skip


@pytest.mark.parametrize(("make", "status"), RAISED.values(), ids=RAISED.keys())
@pytest.mark.parametrize("stream", [False, True])
def test_whatever_is_raised_is_scrubbed(
    client: TestClient,
    guarded: Guarded,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[], BaseException],
    status: int,
    stream: bool,
) -> None:
    async def fail(request: object) -> None:
        raise make()

    monkeypatch.setattr(guarded.engine, "generate", fail)
    body = {"model": MODEL, "prompt": "a", "stream": stream}
    response = client.post("/v1/completions", json=body, headers=guarded.headers("inference"))
    check_clean(response, status)
    assert SECRET.encode() not in response.content


def test_an_internal_error_says_its_request_id_and_nothing_else(
    client: TestClient, guarded: Guarded, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(request: object) -> None:
        raise RuntimeError(LEAKY)

    monkeypatch.setattr(guarded.engine, "generate", fail)
    response = client.post(
        "/v1/completions",
        json={"model": MODEL, "prompt": "a"},
        headers=guarded.headers("inference") | {"x-request-id": "abc"},
    )
    assert response.json()["error"]["message"] == "internal error; request id abc"


def test_an_error_inside_a_stream_is_scrubbed_too(client: TestClient, guarded: Guarded) -> None:
    guarded.engine.fail_after = 1
    try:
        response = client.post(
            "/v1/completions",
            json={"model": MODEL, "prompt": "abc", "stream": True},
            headers=guarded.headers("inference"),
        )
    finally:
        guarded.engine.fail_after = None
    assert '"code":"internal_error"' in response.text
    assert "[DONE]" not in response.text
    assert not INSIDES.search(response.content)


@pytest.mark.parametrize(
    "text",
    [
        "x" * 10**6, "\U0001f600" * 10**5, "\x00" * 10**5, '"' * 10**5, "\\" * 10**5, "\ud83d" * 1000,
        "0x7fffdeadbeef", "/home/user/.ssh/id_rsa", "</script><script>alert(1)</script>",
    ],
    ids=range(9),
)  # fmt: skip
def test_what_a_request_holds_makes_no_large_error(
    client: TestClient, guarded: Guarded, text: str
) -> None:
    headers = guarded.headers("admin") | {"content-type": "application/json"}
    for path, body in (
        ("completions", {"model": text, "prompt": "a"}),
        ("completions", {"model": MODEL, "prompt": "a", text: 1}),
        ("completions", {"model": MODEL, "prompt": "a", "stop": [text] * 9}),
        ("completions", {"model": MODEL, "prompt": "a", "logit_bias": {text: 1}}),
        ("chat/completions", {"model": MODEL, "messages": [{"role": text, "content": "a"}]}),
        ("jobs", {"type": text}),
        ("jobs", {"type": "compress", text: text}),
        (
            "jobs",
            {"type": "compress", "model": MODEL, "output": text, "recipe": [{text: {text: text}}]},
        ),
        ("enrich", {"prompt": text, "nodes": [{"id": text, "text": text}]}),
        ("graphs", {"name": text, "nodes": [{"id": "a", "text": "", "split": text}]}),
    ):
        response = client.post(f"/v1/{path}", content=json.dumps(body).encode(), headers=headers)
        check_clean(response, 400, 404)
        assert response.headers["content-type"] == "application/json"


@pytest.mark.parametrize("code", ERRORS)
def test_every_error_there_is_stays_small(code: str) -> None:
    for text in (LEAKY, "\U0001f600" * 10**5, "\ud800" * 10**4, "\x01" * 10**5):
        content = json.dumps(ApiError(code, text, text).body(), ensure_ascii=False).encode()
        assert len(content) <= MAX_ERROR_BYTES
        assert not INSIDES.search(content), content[:300]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"), ("at 0x7f3a5c0ffee0>", "at …>"), ("0x12", "0x12"), ("x: Traceback (most\nx", "x: …"),
        ("/home/user/x y", "… y"), ("a/b", "a/b"), ("cannot open '/var/lib/x'", "cannot open '…'"),
        ("lib/python3.11/site-packages/x/y.py:3", "…:3"), ("\ud800", "?"), ("and/or /v1/models", "and/or /v1/models"),
    ],
)  # fmt: skip
def test_scrubbing_by_hand(text: str, shown: str) -> None:
    assert scrub(text) == shown
