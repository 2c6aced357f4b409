"""How soon a second `lathe up` answers, and how fast /health is while the models load.

    python -m benchmarks.startup

Starts the service on a free port over the converted models of LATHE_HOME, polls, and stops it again, several times.
Recorded as Markdown in benchmarks/results.
"""

import datetime
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import httpx

RESULTS = Path(__file__).parent / "results"
ROUNDS = 5
POLL_SECONDS = 0.02
DEADLINE_SECONDS = 120.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def start_once() -> tuple[float, float, list[float]]:
    """Seconds from process start to /health and to /ready, and of every /health in between."""
    port = free_port()
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "service.cli", "up", "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    first_health: float | None = None
    latencies: list[float] = []
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=DEADLINE_SECONDS) as client:
            while process.poll() is None and time.perf_counter() - started < DEADLINE_SECONDS:
                asked = time.perf_counter()
                try:
                    client.get("/health").raise_for_status()
                except httpx.TransportError:  # nobody listens yet
                    time.sleep(POLL_SECONDS)
                    continue
                answered = time.perf_counter()
                if first_health is None:
                    first_health = answered - started
                else:  # the first one waited in the backlog for the process to come up
                    latencies.append(answered - asked)
                if client.get("/ready").status_code == 200:
                    return first_health, time.perf_counter() - started, latencies
                time.sleep(POLL_SECONDS)
        raise SystemExit(f"not ready: exit status {process.poll()}, see `lathe up`")
    finally:
        process.terminate()
        process.wait()


def main() -> None:
    start_once()  # converts the models where they are not, and warms the disk's cache
    rounds = [start_once() for _ in range(ROUNDS)]
    latencies = sorted(latency for _, _, some in rounds for latency in some)
    today = datetime.date.today()
    rows = [
        ("process start to /health, s", [health for health, _, _ in rounds]),
        ("process start to /ready, s", [ready for _, ready, _ in rounds]),
    ]
    lines = [
        "# Start of `lathe up` with the default models, converted before",
        "",
        f"{today}, {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()};"
        f" {ROUNDS} starts.",
        "",
        "| | median | worst |",
        "|---|---|---|",
        *(
            f"| {name} | {statistics.median(values):.2f} | {max(values):.2f} |"
            for name, values in rows
        ),
        f"| /health while the models load, ms ({len(latencies)} requests) |"
        f" {1e3 * statistics.median(latencies):.1f} | {1e3 * latencies[-1]:.1f} |",
    ]
    path = RESULTS / f"startup_{platform.machine()}_{today}.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    print(path.read_text())


if __name__ == "__main__":
    main()
