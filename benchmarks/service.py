"""A whole service for a script that talks to it."""

import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

START_SECONDS = 300.0
POLL_SECONDS = 0.5


@contextmanager
def running_service(home: Path, port: int) -> Iterator[tuple[str, int]]:
    """`lathe up` over the models of a home until the block ends; yields its address and process id, once it is ready.

    SIGTERM ends the block, too, so that no service outlives who started it.

    Raises:
        SystemExit: it was not ready in time; with what it logged.
    """
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "service.cli", "up", "--home", str(home)),
                *("--port", str(port)),
            ],
            stdout=log,
            stderr=log,
        )
        before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
        try:
            if not _is_ready(url, process):
                raise SystemExit(f"lathe up was not ready:\n{(Path(folder) / 'log').read_text()}")
            yield url, process.pid
        finally:
            signal.signal(signal.SIGTERM, before)
            process.terminate()
            process.wait()


def _is_ready(url: str, process: "subprocess.Popen[bytes]") -> bool:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/ready").status_code == 200:
                return True
        except httpx.TransportError:
            pass
        time.sleep(POLL_SECONDS)
    return False
