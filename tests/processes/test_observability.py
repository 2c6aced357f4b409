"""What an operator sees of a running service: logs and traces that follow a request and a job through its processes."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.collector import CollectedSpan, Collector, collecting
from tests.processes.conftest import TINY, Service, eventually

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with collecting() as running:
        yield running


@pytest.fixture(scope="module")
def service(
    tiny_home: Path, collector: Collector, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    home = tmp_path_factory.mktemp("traced") / "home"
    shutil.copytree(tiny_home, home)
    settings = {"OTLP_ENDPOINT": collector.url}
    service = Service(home, (TINY,), settings, {"OTEL_BSP_SCHEDULE_DELAY": "200"})
    service.start()
    yield service
    assert service.stop() == 0


def lines(path: Path, **wanted: str) -> list[dict[str, Any]]:
    """Log lines with these fields. Every line must be JSON."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in found if wanted.items() <= line.items()]


def span_named(collector: Collector, trace: str, name: str) -> CollectedSpan:
    def look() -> CollectedSpan | None:
        return next((one for one in collector.spans(trace) if one.name == name), None)

    found: CollectedSpan = eventually(look, f"a span {name}")
    return found


def test_a_request_is_followed_into_the_engine(service: Service, collector: Collector) -> None:
    headers = {"x-request-id": "mine-1", "traceparent": f"00-{TRACE}-{PARENT}-01"}
    body = {"model": TINY, "prompt": "abc", "max_tokens": 5, "temperature": 0, "ignore_eos": True}
    answer = httpx.post(f"{service.url}/v1/completions", json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    (host,) = eventually(
        lambda: lines(service.home / "logs" / f"engine-{TINY}.log", request_id="mine-1"), "a line"
    )
    assert host["message"] == "generated"
    assert host["trace_id"] == TRACE
    assert (host["prompt_tokens"], host["tokens"]) == (3, 5)
    assert host["finish_reason"] == "length"
    (api,) = eventually(
        lambda: lines(service.home / "logs" / "api.log", request_id="mine-1", message="request"),
        "a line",
    )
    assert (api["route"], api["status"], api["trace_id"]) == ("/v1/completions", 200, TRACE)

    request = span_named(collector, TRACE, "POST /v1/completions")
    assert (request.parent, request.process, request.failed) == (PARENT, "api", False)
    assert request.attributes == {
        "http.request.method": "POST",
        "http.route": "/v1/completions",
        "http.response.status_code": 200,
        "lathe.request_id": "mine-1",
    }
    queue, prefill, decode = (
        span_named(collector, TRACE, name) for name in ("queue", "prefill", "decode")
    )
    assert {one.parent for one in (queue, prefill, decode)} == {request.id}
    assert queue.start <= queue.end <= prefill.end <= decode.end
    assert abs(queue.end - prefill.start) < 1_000_000  # one clock's rounding
    assert abs(prefill.end - decode.start) < 1_000_000
    assert prefill.attributes["gen_ai.usage.input_tokens"] == 3
    assert decode.attributes["gen_ai.usage.output_tokens"] == 5


def test_a_request_that_fails_says_so(service: Service, collector: Collector) -> None:
    trace = "1" * 32
    headers = {"x-request-id": "mine-2", "traceparent": f"00-{trace}-{PARENT}-01"}
    body = {"model": "unknown", "prompt": "abc"}
    answer = httpx.post(f"{service.url}/v1/completions", json=body, headers=headers)
    assert answer.status_code == 404
    request = span_named(collector, trace, "POST /v1/completions")
    assert request.attributes["http.response.status_code"] == 404
    assert not request.failed  # the caller's mistake is not the service's
    assert [one.name for one in collector.spans(trace)] == ["POST /v1/completions"]


def test_a_caller_who_does_not_record_is_not_recorded(
    service: Service, collector: Collector
) -> None:
    silent, loud = "2" * 32, "3" * 32
    for trace, flags in ((silent, "00"), (loud, "01")):
        headers = {"traceparent": f"00-{trace}-{PARENT}-{flags}"}
        httpx.get(f"{service.url}/v1/models", headers=headers)
    span_named(collector, loud, "GET /v1/models")
    assert collector.spans(silent) == []


def test_a_job_is_followed_into_its_process(service: Service, collector: Collector) -> None:
    trace = "4" * 32
    headers = {"x-request-id": "mine-3", "traceparent": f"00-{trace}-{PARENT}-01"}
    body = {"type": "export", "model": TINY, "format": "dense"}
    created = httpx.post(f"{service.url}/v1/jobs", json=body, headers=headers)
    assert created.status_code == 201, created.text
    job_id = created.json()["id"]

    def has_ended() -> bool:
        status: str = httpx.get(f"{service.url}/v1/jobs/{job_id}").json()["status"]
        return status in ("succeeded", "failed")

    eventually(has_ended, "the job's end")
    request = span_named(collector, trace, "POST /v1/jobs")
    job = span_named(collector, trace, "job export")
    assert (job.parent, job.process) == (request.id, "worker")
    assert job.attributes == {
        "lathe.job_id": job_id,
        "lathe.job.attempt": 1,
        "lathe.job.status": "succeeded",
    }
    ids = {"job_id": job_id, "request_id": "mine-3", "trace_id": trace}
    worker = lines(service.home / "logs" / "worker.log", **ids)
    assert [line["message"].rpartition(" ")[2] for line in worker] == ["starts", "succeeded"]
    child = lines(service.home / "jobs" / job_id / "attempt-1.log", **ids)
    assert child[0]["message"] == f"attempt 1 of {job_id} starts"
