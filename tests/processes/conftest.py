"""A whole service, as `lathe up` starts it, for tests that talk to it from outside and kill parts of it."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from compression.import_model import import_folder
from compression.registry import ModelRegistry
from engines.kernels.native import NATIVE, NativeUnavailableError, build
from tests.conftest import REPOSITORY

DEADLINE_SECONDS = 120.0
TINY = "tiny"


def eventually(condition: Callable[[], Any], what: str) -> Any:
    """Poll until `condition` gives something true, and return that."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError(f"never happened: {what}")


@dataclass
class Service:
    """One `lathe up`.

    Attributes:
        home: its LATHE_HOME; survives a restart.
        settings: LATHE_* variables without the prefix.
        variables: of the environment, besides.
    """

    home: Path
    models: tuple[str, ...]
    settings: dict[str, str] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)
    port: int = 0
    process: "subprocess.Popen[bytes] | None" = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return (self.home / "up.log").read_text()

    def start(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        variables = {f"LATHE_{name}": value for name, value in self.settings.items()}
        with (self.home / "up.log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "service.cli", "up", "--home", str(self.home)),
                    *("--port", str(self.port)),
                    *(word for model in self.models for word in ("--model", model)),
                ],
                stdout=log,
                stderr=log,
                env={**os.environ, **variables, **self.variables},
                start_new_session=True,
            )
        eventually(self.is_ready, f"/ready of\n{self.log}")

    def is_ready(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log
        try:
            return httpx.get(f"{self.url}/ready").status_code == 200
        except httpx.HTTPError:
            return False

    def children(self) -> dict[str, psutil.Process]:
        """Live processes below `lathe up` by what they are: "api", "worker", "job", and models by id."""
        assert self.process is not None
        found: dict[str, psutil.Process] = {}
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                words = process.cmdline()
            except psutil.Error:
                continue
            if "serve" in words:
                found["api"] = process
            elif "worker" in words or "jobs.worker" in words:
                found["worker"] = process
            elif "jobs.child" in words:
                found["job"] = process
            elif "--model-id" in words:
                found[words[words.index("--model-id") + 1]] = process
        return found

    def stop(self, signal_number: int = signal.SIGTERM) -> int:
        """End it and wait; its exit status."""
        assert self.process is not None
        self.process.send_signal(signal_number)
        return self.process.wait(DEADLINE_SECONDS)


@pytest.fixture(scope="session")
def native_folder() -> Path:
    """Of the native kernels, built once for all homes; empty where they cannot be built."""
    folder = REPOSITORY / ".cache" / "native"
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(NativeUnavailableError):
        build(folder, flags=(NATIVE,))
    return folder


@pytest.fixture(scope="module")
def tiny_home(
    tiny_llama: Path, native_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(native_folder, home / "native")
    import_folder(ModelRegistry(home / "models"), TINY, tiny_llama, report=lambda _: None)
    return home


@pytest.fixture
def tiny_service(tiny_home: Path, tmp_path: Path) -> Iterator[Service]:
    """A service of its own over a copy of the tiny model; what a test starts is ended after it."""
    home = tmp_path / "home"
    shutil.copytree(tiny_home, home)
    times = {"JOB_LEASE_SECONDS": "2", "JOB_HEARTBEAT_SECONDS": "0.5"}
    service = Service(home, (TINY,), times)
    service.start()
    yield service
    assert service.process is not None
    if service.process.poll() is None:
        assert service.stop() == 0


@pytest.fixture(scope="module")
def quick_service(
    tiny_llama: Path, native_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    """The default models' names over tiny weights, so that thousands of requests are answered in seconds."""
    home = tmp_path_factory.mktemp("quick")
    shutil.copytree(native_folder, home / "native")
    models = ("smollm2-135m", "all-minilm-l6-v2")
    for model_id in models:
        import_folder(ModelRegistry(home / "models"), model_id, tiny_llama, report=lambda _: None)
    service = Service(home, models)
    service.start()
    yield service
    assert service.stop() == 0


@pytest.fixture(scope="session")
def real_service(
    real_home: Path, native_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    """The default models in one service for all tests that only ask questions."""
    home = tmp_path_factory.mktemp("real")
    shutil.copytree(native_folder, home / "native")
    shutil.copytree(real_home / "models", home / "models", copy_function=os.link)
    service = Service(home, ("smollm2-135m", "all-minilm-l6-v2"))
    service.start()
    yield service
    assert service.stop() == 0
