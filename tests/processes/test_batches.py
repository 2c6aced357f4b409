"""Batches of a running service, through OpenAI's client: answers, errors, states, and what a kill leaves of them."""

import io
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types import Batch

from tests.processes.conftest import TINY, Service, eventually

CHAT = {"model": TINY, "messages": [{"role": "user", "content": "abc"}], "temperature": 0}
COMPLETION = {"model": TINY, "prompt": "abc", "temperature": 0, "ignore_eos": True}
ENDED = ("failed", "completed", "expired", "cancelled")


@pytest.fixture(scope="module")
def service(tiny_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    home = tmp_path_factory.mktemp("batches") / "home"
    shutil.copytree(tiny_home, home)
    times = {"JOB_LEASE_SECONDS": "2", "JOB_HEARTBEAT_SECONDS": "0.5"}
    running = Service(home, (TINY,), times)
    running.start()
    yield running
    assert running.stop() == 0


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def submit(
    client: openai.OpenAI, endpoint: Any, bodies: Sequence[dict[str, Any]], **options: Any
) -> Batch:
    lines = [
        {"custom_id": f"r{index}", "method": "POST", "url": endpoint, "body": body}
        for index, body in enumerate(bodies)
    ]
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    file = client.files.create(file=("in.jsonl", io.BytesIO(data)), purpose="batch")
    return client.batches.create(
        input_file_id=file.id, endpoint=endpoint, completion_window="24h", **options
    )


def ended(client: openai.OpenAI, batch: Batch) -> Batch:
    def look() -> Batch | None:
        found = client.batches.retrieve(batch.id)
        return found if found.status in ENDED else None

    found: Batch = eventually(look, "the batch's end")
    return found


def rows(client: openai.OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    assert file_id is not None
    return [json.loads(line) for line in client.files.content(file_id).text.splitlines()]


def test_chat_is_answered_as_it_would_be_alone(client: openai.OpenAI) -> None:
    bodies = [CHAT | {"max_tokens": 3 + index} for index in range(20)]
    made = submit(client, "/v1/chat/completions", bodies, metadata={"for": "test"})
    assert (made.object, made.status, made.endpoint) == (
        "batch",
        "validating",
        "/v1/chat/completions",
    )
    assert made.expires_at is not None
    assert 0 <= made.expires_at - made.created_at - 24 * 3600 <= 1
    batch = ended(client, made)
    assert batch.status == "completed", batch
    assert batch.metadata == {"for": "test"}
    counts = batch.request_counts
    assert counts is not None
    assert (counts.total, counts.completed, counts.failed) == (20, 20, 0)
    assert batch.error_file_id is None
    assert batch.errors is None
    times = [batch.created_at, batch.in_progress_at, batch.finalizing_at, batch.completed_at]
    assert times == sorted(times, key=lambda moment: moment or 0)
    found = rows(client, batch.output_file_id)
    assert [row["custom_id"] for row in found] == [f"r{index}" for index in range(20)]
    assert len({row["id"] for row in found}) == 20
    assert all(row["response"]["status_code"] == 200 and row["error"] is None for row in found)
    for index in (0, 19):
        alone = client.chat.completions.create(**bodies[index])  # type: ignore[call-overload]
        body = found[index]["response"]["body"]
        assert body["choices"] == alone.model_dump(exclude_unset=True)["choices"]
        assert body["usage"]["completion_tokens"] == alone.usage.completion_tokens
    assert client.files.retrieve(batch.output_file_id or "").purpose == "batch_output"


def test_completions_and_embeddings(client: openai.OpenAI) -> None:
    completions = submit(client, "/v1/completions", [COMPLETION | {"max_tokens": 4}])
    embeddings = submit(client, "/v1/embeddings", [{"model": TINY, "input": ["ab", "c"]}])
    (completion,) = rows(client, ended(client, completions).output_file_id)
    assert completion["response"]["body"]["object"] == "text_completion"
    (embedding,) = rows(client, ended(client, embeddings).output_file_id)
    alone = client.embeddings.create(model=TINY, input=["ab", "c"], encoding_format="float")
    data = embedding["response"]["body"]["data"]
    assert [row["embedding"] for row in data] == [
        pytest.approx(row.embedding, abs=1e-5) for row in alone.data
    ]
    listed = client.batches.list(limit=1)
    assert [batch.id for batch in listed.data] == [embeddings.id]
    assert [batch.id for batch in client.batches.list(after=embeddings.id, limit=1).data] == [
        completions.id
    ]


def test_what_single_requests_get_wrong_is_in_the_error_file(client: openai.OpenAI) -> None:
    wrong = [
        CHAT | {"max_tokens": 2},
        CHAT | {"melt": True},
        CHAT | {"model": "unknown"},
        CHAT | {"max_tokens": 10_000},
    ]
    batch = ended(client, submit(client, "/v1/chat/completions", wrong))
    assert batch.status == "completed"
    counts = batch.request_counts
    assert counts is not None
    assert (counts.total, counts.completed, counts.failed) == (4, 1, 3)
    assert [row["custom_id"] for row in rows(client, batch.output_file_id)] == ["r0"]
    found = {
        row["custom_id"]: (row["response"]["status_code"], row["response"]["body"]["error"]["code"])
        for row in rows(client, batch.error_file_id)
    }
    assert found == {
        "r1": (400, "unsupported_parameter"),
        "r2": (404, "model_not_found"),
        "r3": (400, "context_length_exceeded"),
    }


def test_wrong_lines_fail_the_batch_and_are_named(client: openai.OpenAI) -> None:
    lines = [
        {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": COMPLETION},
        {"custom_id": "b", "method": "POST", "url": "/v1/embeddings", "body": {}},
        {"custom_id": "c", "method": "POST", "url": "/v1/completions", "body": {"stream": True}},
    ]
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    file = client.files.create(file=("in.jsonl", data), purpose="batch")
    made = client.batches.create(
        input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
    )
    batch = ended(client, made)
    assert batch.status == "failed"
    assert batch.failed_at is not None
    assert batch.errors is not None
    assert batch.errors.data is not None
    assert [(error.line, error.code, error.param) for error in batch.errors.data] == [
        (2, "mismatched_url", "url"),
        (3, "unsupported_parameter", "body.stream"),
    ]
    assert batch.output_file_id is None
    with pytest.raises(openai.ConflictError, match="the job is failed"):
        client.batches.cancel(made.id)


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"input_file_id": "file-none"}, 404, "input_file_id"),
        ({"endpoint": "/v1/score"}, 400, "endpoint"),
        ({"completion_window": "1h"}, 400, "completion_window"),
        ({"melt": True}, 400, "melt"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, 400, None),
    ],
)
def test_refusals(
    client: openai.OpenAI, change: dict[str, Any], status: int, param: str | None
) -> None:
    body = {"input_file_id": "file-none", "endpoint": "/v1/completions", "completion_window": "24h"}
    answer = httpx.post(f"{client.base_url}batches", json=body | change)
    assert answer.status_code == status, answer.text
    assert param is None or answer.json()["error"]["param"] == param


def test_a_file_of_another_purpose_is_refused(client: openai.OpenAI) -> None:
    file = client.files.create(file=("a.txt", b"x"), purpose="user_data")
    with pytest.raises(openai.BadRequestError, match="this needs 'batch'"):
        client.batches.create(
            input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
        )
    with pytest.raises(openai.NotFoundError, match="no batch"):
        client.batches.retrieve("batch-none")


LONG = [COMPLETION | {"max_tokens": 100, "seed": index} for index in range(600)]


def num_answered(client: openai.OpenAI, batch: Batch) -> int:
    counts = client.batches.retrieve(batch.id).request_counts
    assert counts is not None
    return counts.completed


def test_a_cancelled_batch_keeps_its_answers(client: openai.OpenAI) -> None:
    made = submit(client, "/v1/completions", LONG)
    eventually(lambda: num_answered(client, made), "a first answer")
    with pytest.raises(openai.ConflictError, match="is used by job"):
        client.files.delete(made.input_file_id)
    assert client.batches.cancel(made.id).status in ("cancelling", "cancelled")
    batch = ended(client, made)
    assert batch.status == "cancelled"
    assert batch.cancelling_at is not None
    assert batch.cancelled_at is not None
    counts = batch.request_counts
    assert counts is not None
    assert 0 < counts.completed < counts.total == len(LONG)
    assert len(rows(client, batch.output_file_id)) == counts.completed


def test_after_kill_9_nothing_answered_is_asked_again(
    service: Service, client: openai.OpenAI
) -> None:
    """The job's process, then everything; the answers of before are those of the finished batch."""
    made = submit(client, "/v1/completions", LONG)
    ledger = service.home / "jobs" / made.id / "ledger.jsonl"

    def answers() -> dict[int, str]:
        whole = [line for line in ledger.read_bytes().split(b"\n")[:-1]]
        found = [json.loads(line) for line in whole]
        ids = [row["line"] for row in found]
        assert len(ids) == len(set(ids)), "a line was answered twice"
        return {row["line"]: row["record"]["id"] for row in found}

    eventually(lambda: num_answered(client, made) > 20, "some answers")
    service.children()["job"].kill()
    before = answers()
    eventually(lambda: len(answers()) > len(before) + 20, "answers of a second attempt")
    service.stop(9)
    killed = answers()
    service.start()
    client.base_url = httpx.URL(f"{service.url}/v1/")  # type: ignore[assignment]
    batch = ended(client, made)
    assert batch.status == "completed", batch
    found = rows(client, batch.output_file_id)
    assert [row["custom_id"] for row in found] == [f"r{index}" for index in range(len(LONG))]
    by_line = {index + 1: row["id"] for index, row in enumerate(found)}
    assert before.items() <= killed.items() <= by_line.items()
    assert answers() == by_line


def test_an_engine_that_is_away_is_waited_for(service: Service, client: openai.OpenAI) -> None:
    made = submit(client, "/v1/completions", LONG[:100])
    eventually(lambda: num_answered(client, made), "a first answer")
    service.children()[TINY].kill()
    batch = ended(client, made)
    assert batch.status == "completed"
    counts = batch.request_counts
    assert counts is not None
    assert (counts.completed, counts.failed) == (100, 0)
    assert time.time() < (batch.expires_at or 0)
