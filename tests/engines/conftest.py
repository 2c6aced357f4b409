"""Fixtures of the engine tests: host processes, and a way to wait for a condition."""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from engines.process import set_torch_environment
from engines.protocol import Engine

if TYPE_CHECKING:
    from tests.engines.decoding import BuildEngine

DEADLINE_SECONDS = 30.0

set_torch_environment()  # before any test imports torch


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def single_thread() -> Iterator[None]:
    """Tiny models gain nothing from threads, and lose much when another process is busy."""
    import torch

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="session")
def real_models_dir(real_home: Path) -> Path:
    return real_home / "models"


@pytest.fixture(scope="session")
def real_model_dir(real_models_dir: Path) -> Path:
    return real_models_dir / "smollm2-135m"


@pytest.fixture(scope="session")
def decoder_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Lathe checkpoints of the tiny models, by the name of their configuration; written once."""
    from tests.engines.models import DECODER_CONFIGS, build_from_config, write_checkpoint

    folders: dict[str, Path] = {}

    def checkpoint(name: str) -> Path:
        if name not in folders:
            model = build_from_config(DECODER_CONFIGS[name]())
            folders[name] = write_checkpoint(model, tmp_path_factory.mktemp("checkpoint"))
        return folders[name]

    return checkpoint


@pytest.fixture(scope="module", params=["native", "transformers"])
def build_engine(
    request: pytest.FixtureRequest, decoder_checkpoint: Callable[[str], Path]
) -> "BuildEngine":
    """Makes engines of one kind, in float32."""
    import torch

    from engines.engine import NativeEngine
    from engines.requests import EngineLimits
    from engines.transformers_engine import TransformersEngine
    from tests.engines.models import DECODER_CONFIGS, build_causal_lm

    def build(architecture: str, **fields: int) -> Engine:
        limits = EngineLimits(**fields)
        if request.param == "transformers":
            load = lambda: build_causal_lm(architecture)  # noqa: E731
            return TransformersEngine(load, model_id=architecture, limits=limits)
        if architecture not in DECODER_CONFIGS:
            pytest.skip(f"the native engine has no {architecture}")
        folder = decoder_checkpoint(architecture)
        return NativeEngine.load(architecture, folder, dtype=torch.float32, limits=limits)

    return build


@dataclass
class HostProcess:
    """A host under test; its status lines so far."""

    process: "subprocess.Popen[str]"
    socket: Path
    statuses: list[dict[str, Any]]

    def wait_for_status(self, status: str) -> dict[str, Any]:
        """Read status lines up to the one that says `status`, which must come."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.statuses.append(json.loads(line))
            if self.statuses[-1]["status"] == status:
                return self.statuses[-1]
        raise AssertionError(f"the host ended without {status!r}: {self.statuses}")

    def wait(self) -> int:
        return self.process.wait(DEADLINE_SECONDS)


StartHost = Callable[..., HostProcess]


@pytest.fixture
def start_host(tmp_path: Path) -> Iterator[StartHost]:
    """Start `python -m MODULE --socket PATH ARGUMENTS`, ready unless told otherwise."""
    hosts: list[HostProcess] = []

    def start(
        *arguments: str,
        module: str = "tests.fakes.echo_host",
        socket: Path = tmp_path / "engine.sock",
        ready: bool = True,
    ) -> HostProcess:
        command = [sys.executable, "-m", module, "--socket", str(socket), *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        host = HostProcess(process, socket, [])
        hosts.append(host)
        if ready:
            host.wait_for_status("ready")
        return host

    yield start
    for host in hosts:
        host.process.kill()
        host.process.wait()
        assert host.process.stdout is not None
        host.process.stdout.close()


async def eventually(condition: Callable[[], bool | Awaitable[bool]]) -> None:
    """Poll until `condition` holds; fail after a deadline."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while True:
        holds = condition()
        if holds if isinstance(holds, bool) else await holds:
            return
        assert time.monotonic() < deadline, "the condition never held"
        await asyncio.sleep(0.01)
