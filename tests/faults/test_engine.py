"""An engine host is killed, restarted, left by its clients, or finds its checkpoint damaged."""

import json
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from compression.checkpoint import verify_checkpoint
from tests.faults.conftest import (
    LONG,
    SHORT,
    Faulty,
    check_later,
    complete,
    last_error,
    open_socket,
    recovery_seconds,
    running_requests,
    tell,
)
from tests.processes.conftest import TINY, Service, eventually

pytestmark = pytest.mark.processes


class Streaming:
    """Long streams in threads, each read to its end; `results` are their events, once they have begun."""

    def __init__(self, service: Service, count: int, body: dict[str, object] = LONG) -> None:
        self._service = service
        self._begun = threading.Semaphore(0)
        self._threads = ThreadPoolExecutor(count)
        self._results = [self._threads.submit(self._read, body) for _ in range(count)]
        for _ in range(count):
            assert self._begun.acquire(timeout=60)

    def _read(self, body: dict[str, object]) -> list[str]:
        found: list[str] = []
        url = f"{self._service.url}/v1/completions"
        with httpx.stream("POST", url, json=body, timeout=120) as response:
            assert response.status_code == 200
            for line in response.iter_lines():
                if line.startswith("data: "):
                    found.append(line.removeprefix("data: "))
                    if len(found) == 1:
                        self._begun.release()
        return found

    def results(self) -> list[list[str]]:
        found = [result.result() for result in self._results]
        self._threads.shutdown()
        return found


def test_kill_9_fails_what_runs_by_name_and_nothing_else(
    service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    streaming = Streaming(service, 4)
    whole = ThreadPoolExecutor(1).submit(
        httpx.post,
        f"{service.url}/v1/completions",
        json=LONG | {"stream": False},
        timeout=120,
    )
    eventually(lambda: running_requests(service) == 5, "five running requests")
    began = time.monotonic()
    service.children()[TINY].kill()
    assert [last_error(found) for found in streaming.results()] == ["engine_dead"] * 4
    assert check_later(whole.result()) == "engine_dead"
    ready = httpx.get(f"{service.url}/ready")
    assert check_later(ready) == "model_loading"
    assert ready.json()["models"][TINY]["ready"] is False
    assert check_later(complete(service)) in ("engine_dead", "model_loading")
    tell(capsys, f"engine host, kill -9: well after {recovery_seconds(service, began):.1f} s")


def test_a_rolling_restart_drops_nothing(
    service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    before = service.children()
    stopping = threading.Event()

    def keep_asking() -> Counter[str]:
        seen: Counter[str] = Counter()
        while not stopping.is_set():
            response = complete(service)  # a cut connection would raise
            seen["200" if response.status_code == 200 else check_later(response)] += 1
        return seen

    threads = ThreadPoolExecutor(2)
    asking = [threads.submit(keep_asking) for _ in range(2)]
    streaming = Streaming(service, 2, LONG | {"max_tokens": 1500})
    began = time.monotonic()
    answer = httpx.post(f"{service.url}/v1/models/{TINY}/restart?wait=true", timeout=120)
    assert answer.status_code == 200, answer.text
    seconds = recovery_seconds(service, began)
    stopping.set()
    for found in streaming.results():  # they had the time to end
        assert found[-1] == "[DONE]"
    seen = sum((one.result() for one in asking), Counter())
    assert set(seen) <= {"200", "engine_dead", "model_loading"}
    assert seen["200"]
    after = service.children()
    assert after[TINY].pid != before[TINY].pid
    assert after["api"].pid == before["api"].pid
    assert httpx.get(f"{service.url}/ready").json()["models"][TINY]["restarts"] == 0
    tell(capsys, f"engine host, restarted: well after {seconds:.1f} s; meanwhile {dict(seen)}")


def test_a_model_that_is_not_loaded_cannot_be_restarted(service: Service) -> None:
    response = httpx.post(f"{service.url}/v1/models/absent/restart")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


def ended_requests(service: Service) -> list[dict[str, object]]:
    log = (service.home / "logs" / f"engine-{TINY}.log").read_text().splitlines()
    return [json.loads(line) for line in log if '"finish_reason"' in line]


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_who_leaves_frees_the_engine(service: Service, phase: str, stream: bool) -> None:
    """In prefill: 24 prompts of 7000 tokens, for an engine that runs 16. In decode: thousands of tokens to come."""
    count = 24 if phase == "prefill" else 4
    before = len(ended_requests(service))
    left = []
    for number in range(count):
        body = LONG | {"stream": stream}
        if phase == "prefill":  # all different, so that none finds its prefix
            body |= {"prompt": [5 + number, number + stream] * 3500, "max_tokens": 1000}
        content = json.dumps(body)
        head = (
            "POST /v1/completions HTTP/1.1\nHost: 127.0.0.1\nContent-Type: application/json\n"
            f"Content-Length: {len(content)}\n\n"
        )
        left.append(open_socket(service, head + content))
    eventually(lambda: running_requests(service) >= min(count, 4), "running requests")
    for connection in left:
        connection.close()
    eventually(lambda: running_requests(service) == 0, "no running request")
    eventually(lambda: len(ended_requests(service)) == before + count, "their ends in the log")
    ended = ended_requests(service)[before:]
    assert {row["finish_reason"] for row in ended} == {"abort"}
    assert any(row["tokens"] == 0 for row in ended) == (phase == "prefill")
    assert complete(service).status_code == 200


def cut_in_half(folder: Path) -> Path:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def no_tokenizer(folder: Path) -> Path:
    (folder / "tokenizer.json").unlink()
    return folder / "tokenizer.json"


def broken_manifest(folder: Path) -> Path:
    (folder / "lathe.json").write_text('{"format_version": 1, "files"')
    return folder / "lathe.json"


@pytest.mark.parametrize("damage", [cut_in_half, no_tokenizer, broken_manifest])
def test_a_damaged_checkpoint_is_refused_by_name_and_the_service_stays_up(
    service: Service, faults_home: Path, damage: Callable[[Path], Path]
) -> None:
    model = f"bad-{damage.__name__.replace('_', '-')}"
    folder = service.home / "models" / model
    shutil.copytree(faults_home / "models" / TINY, folder)
    damaged = damage(folder)
    response = httpx.post(
        f"{service.url}/v1/completions", json=SHORT | {"model": model}, timeout=120
    )
    assert response.status_code == 500, response.text
    assert response.json()["error"]["code"] == "model_load_failed"
    assert damaged.stem.replace("lathe", "checkpoint") in response.json()["error"]["message"]
    eventually(service.is_ready, "/ready without the damaged model")
    assert httpx.get(f"{service.url}/v1/models").status_code == 200
    assert any(damaged.name in problem for problem in verify_checkpoint(folder).problems)
    if model in service.children():  # a host reads no tokenizer
        unloaded = httpx.post(f"{service.url}/v1/models/{model}/unload", timeout=60)
        assert unloaded.status_code == 200, unloaded.text
    shutil.rmtree(folder)
    assert complete(service).status_code == 200


def test_a_checkpoint_that_is_damaged_while_it_is_served_can_be_repaired(
    service: Service, faulty: Faulty, capsys: pytest.CaptureFixture[str]
) -> None:
    path = service.home / "models" / TINY / "model.safetensors"
    sound = path.read_bytes()
    path.write_bytes(sound[: len(sound) // 2])
    service.children()[TINY].kill()

    def error() -> str:
        model = httpx.get(f"{service.url}/ready").json()["models"][TINY]
        return model["error"] if model["state"] == "backoff" else ""

    eventually(lambda: "model.safetensors" in error(), "the file's name in /ready")
    assert httpx.get(f"{service.url}/health").status_code == 200
    assert check_later(complete(service)) in ("engine_dead", "model_loading")
    path.write_bytes(sound)
    began = time.monotonic()
    httpx.post(f"{service.url}/v1/models/{TINY}/load?wait=true", timeout=120)
    tell(capsys, f"checkpoint repaired: well after {recovery_seconds(service, began):.1f} s")
