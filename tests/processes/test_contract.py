"""The running service on the real models, seen by clients that others wrote."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from conformance.schemathesis_check import command
from tests.processes.conftest import Service
from tests.service.bad_requests import bad_requests

MODEL = "smollm2-135m"
NUM_BAD_REQUESTS = 2000
MAX_ERROR_BYTES = 8 * 1024


@pytest.fixture(scope="module")
def client(real_service: Service) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{real_service.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_chat_whole_and_streamed_say_the_same(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    options = {"model": MODEL, "messages": messages, "max_tokens": 24, "temperature": 0}
    whole = client.chat.completions.create(**options)  # type: ignore[call-overload]
    text = whole.choices[0].message.content
    assert "Paris" in text
    assert whole.usage.completion_tokens <= 24
    stream = client.chat.completions.create(  # type: ignore[call-overload]
        **options, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    usage = chunks[-1].usage
    assert usage.prompt_tokens == whole.usage.prompt_tokens
    assert usage.completion_tokens == whole.usage.completion_tokens
    assert 0 < usage.prompt_tokens_details.cached_tokens < usage.prompt_tokens


def test_completion_with_echo_and_logprobs(client: openai.OpenAI) -> None:
    prompt = "The capital of France is"
    answer = client.completions.create(
        model=MODEL, prompt=prompt, max_tokens=4, temperature=0, echo=True, logprobs=2
    )
    choice = answer.choices[0]
    assert choice.text.startswith(prompt + " Paris")
    logprobs = choice.logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.token_logprobs is not None
    assert "".join(logprobs.tokens) == choice.text
    assert logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in logprobs.token_logprobs[1:])
    assert logprobs.text_offset == [
        len("".join(logprobs.tokens[:index])) for index in range(len(logprobs.tokens))
    ]


def test_embeddings_know_what_is_alike(client: openai.OpenAI) -> None:
    texts = ["A cat sleeps on the sofa.", "A kitten naps on the couch.", "Interest rates rose."]
    answer = client.embeddings.create(model="all-minilm-l6-v2", input=texts)  # base64 on the wire
    cat, kitten, rates = (row.embedding for row in answer.data)
    assert len(cat) == 384

    def dot(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True))

    assert dot(cat, cat) == pytest.approx(1, abs=1e-5)
    assert dot(cat, kitten) > 0.5 > 0.2 > dot(cat, rates)
    pooled = client.embeddings.create(model=MODEL, input="A cat", encoding_format="float")
    assert len(pooled.data[0].embedding) == 576


def test_models_and_error_types(client: openai.OpenAI) -> None:
    assert {model.id for model in client.models.list()} >= {MODEL, "all-minilm-l6-v2"}
    assert client.models.retrieve(MODEL).owned_by == "lathe"
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="none", prompt="a")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model=MODEL, prompt="a", temperature=9)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as too_long:
        client.completions.create(model=MODEL, prompt="a", max_tokens=10**6)
    assert too_long.value.code == "context_length_exceeded"


def test_bad_requests_only_get_4xx(real_service: Service) -> None:
    with httpx.Client(base_url=real_service.url, timeout=60) as http:
        openapi = http.get("/openapi.json").json()
        statuses = set()
        for bad in bad_requests(openapi, NUM_BAD_REQUESTS, seed=0):
            response = http.request(bad.method, bad.path, content=bad.body, headers=bad.headers)
            assert 400 <= response.status_code < 500, (bad, response.text)
            assert len(response.content) <= MAX_ERROR_BYTES
            error = response.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}, bad
            statuses.add(response.status_code)
        assert statuses >= {400, 403, 404, 405, 415}
        assert http.get("/ready").status_code == 200


def test_schemathesis_finds_no_violation(quick_service: Service, tmp_path: Path) -> None:
    done = subprocess.run(
        [*command(quick_service.url, 10), "--generation-deterministic"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "120"},
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert httpx.get(f"{quick_service.url}/ready").status_code == 200
