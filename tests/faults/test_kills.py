"""Parts of a running service are killed; what it accepted is not lost, and nothing stays behind."""

import contextlib
import random
import signal
import subprocess
import sys

import httpx
import psutil
import pytest

from tests.faults.conftest import SHORT, complete
from tests.processes.conftest import TINY, Service, eventually

pytestmark = pytest.mark.processes


def is_gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_nothing_outlives_lathe_up(tiny_service: Service, number: int) -> None:
    children = tiny_service.children()
    assert set(children) == {"api", "worker", TINY}
    status = tiny_service.stop(number)
    assert status == (-number if number == signal.SIGKILL else 0), tiny_service.log
    eventually(lambda: all(map(is_gone, children.values())), "the end of its processes")
    if number != signal.SIGKILL:
        assert list((tiny_service.home / "run").glob("*.sock")) == []


def test_a_second_one_on_the_same_home_is_refused(service: Service) -> None:
    second = subprocess.run(
        [
            *(sys.executable, "-m", "service.cli", "up", "--port", "0", "--model", TINY),
            *("--home", str(service.home)),
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert second.returncode == 1
    assert "Error: Lathe runs here already" in second.stderr
    assert complete(service).status_code == 200


@pytest.mark.parametrize("victim", [TINY, "api", "worker"])
def test_a_killed_process_is_started_again(service: Service, victim: str) -> None:
    before = complete(service).json()["choices"]
    killed = service.children()[victim]
    killed.kill()

    def is_back() -> bool:
        again = service.children().get(victim)
        return again is not None and again.pid != killed.pid and service.is_ready()

    def answers() -> bool:
        try:
            response = complete(service)
        except httpx.TransportError:  # the API process itself
            return False
        assert response.status_code in (200, 409, 503), response.text
        return response.status_code == 200

    eventually(answers, "an answer")
    eventually(is_back, f"a new {victim}")
    assert complete(service).json()["choices"] == before


@pytest.mark.parametrize("seed", [0, 1])
def test_a_compress_job_survives_kill_9(tiny_service: Service, seed: int) -> None:
    """Its process, the worker or everything is killed at random moments; then it is left alone."""
    draw = random.Random(seed)
    body = {
        "type": "compress",
        "model": TINY,
        "output": "tiny-int4",
        "recipe": [{"int4": {"group_size": 32}}],
    }
    created = httpx.post(f"{tiny_service.url}/v1/jobs", json=body)
    assert created.status_code == 201, created.text
    job_id = created.json()["id"]

    def job() -> dict[str, object]:
        found: dict[str, object] = httpx.get(f"{tiny_service.url}/v1/jobs/{job_id}").json()
        return found

    for victim in (draw.choice(["job", "worker"]), "everything"):
        running = eventually(lambda: tiny_service.children().get("job"), "a running job")
        with contextlib.suppress(psutil.TimeoutExpired):
            running.wait(draw.uniform(0, 6))
        if victim == "everything":
            tiny_service.stop(signal.SIGKILL)
            tiny_service.start()
        elif victim in (children := tiny_service.children()):
            children[victim].kill()
        if job()["status"] == "succeeded":
            break
    eventually(lambda: job()["status"] in ("succeeded", "failed", "cancelled"), "an end")
    assert job()["status"] == "succeeded", (job(), tiny_service.log)
    verified = subprocess.run(
        [
            *(sys.executable, "-m", "service.cli", "verify", "tiny-int4"),
            *("--home", str(tiny_service.home)),
        ],
        capture_output=True,
        text=True,
    )
    assert verified.returncode == 0, verified.stdout + verified.stderr
    listed = [m["id"] for m in httpx.get(f"{tiny_service.url}/v1/models").json()["data"]]
    assert sorted(listed) == ["tiny", "tiny-int4"]
    loaded = httpx.post(f"{tiny_service.url}/v1/models/tiny-int4/load?wait=true", timeout=60)
    assert loaded.status_code == 200, loaded.text
    answer = httpx.post(
        f"{tiny_service.url}/v1/completions", json=SHORT | {"model": "tiny-int4"}, timeout=60
    )
    assert answer.status_code == 200, answer.text
