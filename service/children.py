"""A child process kept alive: started in a group of its own, restarted with back-off, stopped with grace.

A child dies with its parent (PR_SET_PDEATHSIG), so `kill -9` of the supervisor leaves nothing behind. Its output
goes straight into its log file; the supervisor reads only the status lines of those that write them.
"""

import asyncio
import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from service.supervisor_client import EngineState as ChildState

MAX_LOG_BYTES = 16 * 2**20
MAX_ERROR_CHARS = 500
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartPolicy:
    """When a child that ended is started again.

    Attributes:
        first_seconds: wait before the first restart; doubles up to `max_seconds`.
        healthy_seconds: a child that was ready for so long starts with a clean slate when it ends.
        max_quick_failures: after so many without a healthy spell the child is "failed"; None never gives up.
    """

    first_seconds: float = 0.5
    max_seconds: float = 30.0
    healthy_seconds: float = 60.0
    max_quick_failures: int | None = None

    def delay_seconds(self, quick_failures: int) -> float:
        """Wait after the given number (1, 2, ...) of failures in a row."""
        return min(self.max_seconds, self.first_seconds * 2.0 ** (quick_failures - 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildSpec:
    """What to run and how.

    Attributes:
        command: asked before every start.
        log: takes stdout and stderr; appended to, see `limit_log`.
        prepare: awaited before every start; what it raises counts as a failed start.
        speaks_status: the child writes JSON lines to stdout, and is ready when it says `"status": "ready"`; any
            other child is taken for ready when it runs.
        stop_seconds: from SIGTERM to SIGKILL.
    """

    name: str
    command: Callable[[], Sequence[str]]
    log: Path
    env: Mapping[str, str]
    policy: RestartPolicy
    prepare: Callable[[], Awaitable[None]] | None = None
    pass_fds: tuple[int, ...] = ()
    speaks_status: bool = False
    stop_seconds: float = 10.0


@dataclass(slots=True, kw_only=True)
class Snapshot:
    """Where a child stands. `since` is in Unix seconds, `fraction` a share of what it is doing now."""

    state: ChildState
    pid: int | None = None
    restarts: int = 0
    error: str | None = None
    since: float = field(default_factory=time.time)
    fraction: float | None = None


class StartError(Exception):
    """A child cannot be started; the message says why, for a person."""


class Child:
    """One supervised child. All methods belong to the event loop's thread.

    Args:
        on_change: called after every change of state, with the child.
    """

    def __init__(self, spec: ChildSpec, on_change: Callable[["Child"], None]) -> None:
        self.spec = spec
        self.snapshot = Snapshot(state="starting")
        self._on_change = on_change
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = asyncio.Event()
        self._retry = asyncio.Event()
        self._quick_failures = 0
        self._reported_error: str | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        return self.spec.name

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name=f"child {self.name}")

    def retry(self) -> None:
        """Start now and with a clean slate where the child waits in "backoff" or "failed"."""
        if self.snapshot.state in ("backoff", "failed"):
            self._quick_failures = 0
            self.snapshot.restarts = 0
            self._retry.set()

    async def stop(self, *, at_once: bool = False) -> None:
        """End the child and its process group, and wait until it is gone."""
        self._stopping.set()
        if self.snapshot.state != "stopping":
            self._change("stopping", pid=self.snapshot.pid)
        await self._terminate(0.0 if at_once else self.spec.stop_seconds)
        if self._task is not None:
            await self._task

    async def _run(self) -> None:
        while not self._stopping.is_set():
            ready_at = await self._run_once()
            if self._stopping.is_set():
                break
            healthy = ready_at is not None and (
                time.monotonic() - ready_at >= self.spec.policy.healthy_seconds
            )
            self._quick_failures = 1 if healthy else self._quick_failures + 1
            await self._wait_for_restart()

    async def _run_once(self) -> float | None:
        """Start the child and wait for its end. Returns when it became ready, if it did."""
        self._reported_error = None
        try:
            if self.spec.prepare is not None:
                await self._until_stopped(self.spec.prepare())
            if self._stopping.is_set():
                return None
            limit_log(self.spec.log)
            log_start = self.spec.log.stat().st_size if self.spec.log.exists() else 0
            process = await self._spawn()
        except (OSError, StartError) as error:
            self.snapshot.error = str(error)[:MAX_ERROR_CHARS]
            return None
        self._process = process
        if self._stopping.is_set():  # asked to stop while the process was being made
            await self._terminate(0.0)
        self._change("starting", pid=process.pid)
        if self.spec.speaks_status:
            ready_at = await self._follow_status(process)
        else:
            ready_at = time.monotonic()
            self._change("ready", pid=process.pid)
        code = await process.wait()
        kill_group(process.pid)
        self._process = None
        if not self._stopping.is_set():
            said = self._reported_error or last_line(self.spec.log, log_start)
            self.snapshot.error = f"{describe_exit(code)}: {said}" if said else describe_exit(code)
        return ready_at

    async def _until_stopped(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        stopped = asyncio.create_task(self._stopping.wait())
        await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if not task.done():
            task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    async def _spawn(self) -> asyncio.subprocess.Process:
        with self.spec.log.open("ab") as log:
            return await asyncio.create_subprocess_exec(
                *self.spec.command(),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE if self.spec.speaks_status else log,
                stderr=log,
                env=dict(self.spec.env),
                pass_fds=self.spec.pass_fds,
                start_new_session=True,
                preexec_fn=die_with_parent(),
            )

    async def _follow_status(self, process: asyncio.subprocess.Process) -> float | None:
        assert process.stdout is not None
        ready_at: float | None = None
        with self.spec.log.open("ab") as log:
            while True:
                try:
                    line = await process.stdout.readline()
                except ValueError:  # longer than the reader's limit: not one of ours
                    continue
                if not line:
                    return ready_at
                with suppress(OSError):  # a full disk must not end the supervision
                    log.write(line)
                    log.flush()
                status = parse_status(line)
                if status is None:
                    continue
                self._take_status(status)
                if status["status"] == "ready" and ready_at is None:
                    ready_at = time.monotonic()
                    self._change("ready", pid=process.pid)

    def _take_status(self, status: Mapping[str, Any]) -> None:
        fraction = status.get("fraction")
        if isinstance(fraction, int | float):
            self.snapshot.fraction = float(fraction)
        if status["status"] == "failed":
            self._reported_error = str(status.get("error", ""))[:MAX_ERROR_CHARS]

    async def _wait_for_restart(self) -> None:
        policy = self.spec.policy
        gives_up = (
            policy.max_quick_failures is not None
            and self._quick_failures >= policy.max_quick_failures
        )
        self._retry.clear()
        self._change("failed" if gives_up else "backoff")
        timeout = None if gives_up else policy.delay_seconds(self._quick_failures)
        waits = [asyncio.create_task(event.wait()) for event in (self._retry, self._stopping)]
        await asyncio.wait(waits, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        if self._stopping.is_set():
            return
        if not self._retry.is_set():
            self.snapshot.restarts += 1
        self._change("starting")

    async def _terminate(self, grace_seconds: float) -> None:
        process = self._process
        if process is None:
            return
        with suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), grace_seconds)
        except TimeoutError:
            kill_group(process.pid)
            await process.wait()
        kill_group(process.pid)

    def _change(self, state: ChildState, pid: int | None = None) -> None:
        if self._stopping.is_set() and state != "stopping":
            return
        self.snapshot.state = state
        self.snapshot.pid = pid
        self.snapshot.since = time.time()
        self.snapshot.fraction = None
        self._on_change(self)

    def set_state(self, state: ChildState, fraction: float | None = None) -> None:
        """For `prepare`: show what is being prepared and how far it is."""
        if self.snapshot.state != state:
            self._change(state)
        self.snapshot.fraction = fraction


def die_with_parent() -> Callable[[], None] | None:
    """What a forked child runs before exec, so that the kernel kills it when the parent dies.

    The signal follows the parent's *thread*: processes must be started from the main thread.
    """
    if _LIBC is None:
        return None
    prctl = _LIBC.prctl
    parent = os.getpid()

    def set_signal() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)

    return set_signal


def kill_group(pid: int) -> None:
    """SIGKILL whatever is left of the process group that a child led."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def parse_status(line: bytes) -> dict[str, Any] | None:
    """A status line is a JSON object with a string "status"; anything else is ordinary output."""
    try:
        status = json.loads(line)
    except ValueError:
        return None
    if isinstance(status, dict) and isinstance(status.get("status"), str):
        return status
    return None


def limit_log(path: Path) -> None:
    """Keep one older generation once a log is large. Safe while a child appends to it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.stat().st_size < MAX_LOG_BYTES:
        return
    older = path.with_suffix(path.suffix + ".1")
    older.write_bytes(path.read_bytes())
    os.truncate(path, 0)


def last_line(path: Path, start: int) -> str:
    """What was last written after byte `start`, status lines aside, cut to a readable length. Of a line of our own
    log it is the message, or the exception that goes with it."""
    if not path.exists():
        return ""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(min(start, size), size - 16384))
        lines = [line.strip() for line in file.read().splitlines()]
    said = next((line for line in reversed(lines) if line and parse_status(line) is None), b"")
    return _message(said.decode(errors="replace"))[:MAX_ERROR_CHARS]


def _message(line: str) -> str:
    try:
        fields = json.loads(line)
    except ValueError:
        return line
    if not isinstance(fields, dict) or not isinstance(fields.get("message"), str):
        return line
    exception = str(fields.get("exception", "")).strip()
    return exception.splitlines()[-1] if exception else fields["message"]


def describe_exit(code: int) -> str:
    if code < 0:
        return f"killed by signal {-code} ({signal.strsignal(-code)})"
    return f"ended with exit code {code}"
