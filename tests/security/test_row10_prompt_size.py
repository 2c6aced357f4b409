"""Row 10: a huge prompt is refused by its length before any work, and what work there is goes on beside the event
loop, without the interpreter's lock."""

import asyncio
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient

from engines.text import TextTokenizer
from service.tokenizers import INLINE_CHARS, ModelText
from tests.security.conftest import MODEL, Guarded, check_error
from tests.service.openai_app import decoder_json

MIB = 2**20
SIZE = 31 * MIB


@pytest.mark.parametrize("char", ["a", " ", "\U0001f600"])
def test_31_mib_of_one_character_are_refused_unread(
    client: TestClient, guarded: Guarded, monkeypatch: pytest.MonkeyPatch, char: str
) -> None:
    """No tokenizer sees a text that cannot fit."""
    seen: list[int] = []
    monkeypatch.setattr(TextTokenizer, "encode", lambda self, text, *a, **k: seen.append(len(text)))
    text = (char * (SIZE // len(char.encode()))).encode()
    head = b'{"model": "' + MODEL.encode() + b'", '
    headers = guarded.headers("inference") | {"content-type": "application/json"}
    for path, before, after in (
        ("completions", b'"prompt": "', b'"}'),
        ("chat/completions", b'"messages": [{"role": "user", "content": "', b'"}]}'),
        ("embeddings", b'"input": "', b'"}'),
        ("score", b'"continuations": ["a"], "context": "', b'"}'),
        ("tokenize", b'"prompt": "', b'"}'),
    ):
        body = head + before + text.replace(b"\n", b"\\n")[: SIZE // 4 * 4] + after
        response = client.post(f"/v1/{path}", content=body, headers=headers)
        code = check_error(response, 400)
        assert code in ("context_length_exceeded", "invalid_value", "invalid_json")
    assert sum(seen) == 0


def test_tokenizing_leaves_the_interpreter_to_others() -> None:
    """Nobody is made to give the lock up here, so another thread counts on only if the tokenizer does by itself."""
    tokenizer = TextTokenizer(decoder_json())
    count = 0
    done = False

    def count_on() -> None:
        nonlocal count
        while not done:
            count += 1
            time.sleep(0)  # lets go of the lock at once

    counter = threading.Thread(target=count_on)
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1000.0)
    try:
        counter.start()
        while not count:
            time.sleep(0.001)
        before = count
        ids = tokenizer.encode("the wood " * 50_000)
        after = count
    finally:
        sys.setswitchinterval(switch)
        done = True
        counter.join()
    assert len(ids) > 50_000
    assert after > before


def test_health_answers_while_texts_are_tokenized(
    client: TestClient, guarded: Guarded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokenizer does not come back before /health has answered."""
    begun, healthy = threading.Event(), threading.Event()
    real = TextTokenizer.encode

    def held(self: TextTokenizer, text: str, *args: Any, **kwargs: Any) -> list[int]:
        if len(text) > INLINE_CHARS:
            begun.set()
            assert healthy.wait(30)
        return real(self, text, *args, **kwargs)

    monkeypatch.setattr(TextTokenizer, "encode", held)
    answers: list[Any] = []
    body = {"model": MODEL, "prompt": "a" * (INLINE_CHARS + 1)}
    headers = guarded.headers("inference")
    asking = threading.Thread(
        target=lambda: answers.append(client.post("/v1/tokenize", json=body, headers=headers))
    )
    asking.start()
    assert begun.wait(30)
    assert client.get("/health").status_code == 200
    assert client.get("/v1/models", headers=headers).status_code == 200
    healthy.set()
    asking.join(30)
    assert answers[0].json()["count"] == INLINE_CHARS + 1


@pytest.mark.parametrize(
    "ask",
    [
        lambda text, long: text.encode(long, None, None),
        lambda text, long: text.encode_chat([{"role": "user", "content": long}], None),
        lambda text, long: text.decode([5] * (INLINE_CHARS + 1)),
    ],
)
def test_long_texts_are_worked_on_by_a_thread(
    monkeypatch: pytest.MonkeyPatch, ask: Callable[[ModelText, str], Any]
) -> None:
    from engines.chat_template import ChatTemplate

    threads: set[str] = set()
    for name in ("encode", "encode_segments", "decode"):
        real = getattr(TextTokenizer, name)

        def noted(*args: Any, real: Any = real, **kwargs: Any) -> Any:
            threads.add(threading.current_thread().name)
            return real(*args, **kwargs)

        monkeypatch.setattr(TextTokenizer, name, noted)
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}")
    text = ModelText(TextTokenizer(decoder_json()), template)
    threads.clear()
    asyncio.run(ask(text, "a" * (INLINE_CHARS + 1)))
    assert threads
    assert all(name.startswith("tokenizer") for name in threads)
