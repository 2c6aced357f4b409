"""The demo: where it starts a service of its own, that it ends it, and that it leaves nothing in another's."""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from examples import demo

NOWHERE = "http://127.0.0.1:9"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What the demo has started: a process each that answers nothing, and the words that it was to be."""
    found: list[Any] = []
    popen = subprocess.Popen

    def start(command: list[str]) -> Any:
        process = popen([sys.executable, "-c", "import time; time.sleep(600)"])
        found.append((process, command))
        return process

    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setattr(demo, "START_SECONDS", 0)
    yield found
    for process, _ in found:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("url", "host", "port"),
    [(NOWHERE, "127.0.0.1", "9"), ("http://localhost:9/", "localhost", "9"),
     ("http://[::1]:9", "::1", "9"), ("http://127.0.0.2:9", "127.0.0.2", "9")],
)  # fmt: skip
def test_a_service_of_its_own_is_started_where_it_is_looked_for_and_ended_if_it_is_not_ready(
    started: list[Any], monkeypatch: pytest.MonkeyPatch, url: str, host: str, port: str
) -> None:
    monkeypatch.setattr(demo, "URL", url)
    with pytest.raises(SystemExit, match="the service did not start"):
        demo.main()
    [(process, command)] = started
    assert command[command.index("up") :] == ["up", "--host", host, "--port", port]
    assert process.returncode is not None


@pytest.mark.parametrize("url", ["https://127.0.0.1:9", "ftp://127.0.0.1:9", f"{NOWHERE}/lathe"])
def test_no_service_is_started_for_a_url_that_it_would_not_answer_at(
    started: list[Any], monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setattr(demo, "URL", url)
    with pytest.raises(SystemExit, match=f"no service at {url}"):
        demo.main()
    assert started == []


@pytest.mark.parametrize("host", ["192.0.2.1", "example.org", "0.0.0.0"])
def test_another_machine_is_no_loopback(host: str) -> None:
    assert not demo.is_loopback(host)


@pytest.mark.parametrize("fails", [False, True])
def test_the_compressed_model_is_unloaded_and_deleted(
    monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    sent: list[tuple[str, str]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        sent.append((request.method, request.url.path))
        return httpx.Response(200)

    def show_graph(_: httpx.Client) -> None:
        if fails:
            raise KeyboardInterrupt

    monkeypatch.setattr(demo, "show_compression", lambda _: "small")
    monkeypatch.setattr(demo, "show_chat", lambda *_: None)
    monkeypatch.setattr(demo, "show_graph", show_graph)
    with httpx.Client(transport=httpx.MockTransport(answer), base_url=NOWHERE) as client:
        if fails:
            with pytest.raises(KeyboardInterrupt):
                demo.show(client)
        else:
            demo.show(client)
    assert sent[-2:] == [("POST", "/v1/models/small/unload"), ("DELETE", "/v1/models/small")]


def test_a_model_that_cannot_be_deleted_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    def answer(_: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    with httpx.Client(transport=httpx.MockTransport(answer), base_url=NOWHERE) as client:
        demo.delete_model(client, "small")
    assert (
        "small is still there; to delete it: lathe models delete small" in capsys.readouterr().out
    )
