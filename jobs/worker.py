"""The worker: claims jobs one at a time and runs each in a process group of its own, which dies with the worker.

The parent renews the lease, writes what the child says with the fencing token, and ends the child when the job is cancelled,
too slow, or no longer ours. A store that does not answer is waited for.
"""

import argparse
import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from engines.process import die_with_parent
from jobs.child import RUNNERS
from jobs.open import open_job_store
from jobs.states import JobStatus
from jobs.store import Job, JobStore, JsonObject, NewEvent, StaleLeaseError

IDLE_SECONDS = 0.5
MAX_BACKOFF_SECONDS = 10.0
_TICK_SECONDS = 0.2

logger = logging.getLogger("lathe.worker")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """Attributes: runners: job type to "module:function"."""

    home: Path
    name: str = field(default_factory=lambda: f"{os.uname().nodename}-{os.getpid()}")
    lease_seconds: float = 60.0
    heartbeat_seconds: float = 10.0
    cancel_grace_seconds: float = 5.0
    runners: Mapping[str, str] = field(default_factory=lambda: dict(RUNNERS))


class Worker:
    """Runs jobs until told to stop."""

    def __init__(self, store: JobStore, config: WorkerConfig) -> None:
        self._store = store
        self._config = config

    def run(self, stop: threading.Event) -> None:
        """Claim and run until `stop` is set; a job under way is then given back."""
        backoff = IDLE_SECONDS
        while not stop.is_set():
            try:
                self._store.worker_seen(self._config.name)
                job = self._store.claim(
                    self._config.name, tuple(self._config.runners), self._config.lease_seconds
                )
                if job is None:
                    stop.wait(IDLE_SECONDS)
                else:
                    _Attempt(self._store, self._config, job, stop).run()
                backoff = IDLE_SECONDS
            except StaleLeaseError as error:
                logger.warning("lost a lease: %s", error)
            except Exception:
                logger.exception("the job store does not answer; trying again in %.1f s", backoff)
                stop.wait(backoff)
                backoff = min(2 * backoff, MAX_BACKOFF_SECONDS)


class _Attempt:
    """One attempt at one job."""

    def __init__(
        self, store: JobStore, config: WorkerConfig, job: Job, stop: threading.Event
    ) -> None:
        self._store = store
        self._config = config
        self._job = job
        self._stop = stop
        self._folder = config.home / "jobs" / job.id
        self._messages: queue.Queue[JsonObject | None] = queue.Queue()
        self._outcome: JsonObject | None = None
        self._asked: tuple[JobStatus, str] | None = None
        self._asked_at = 0.0

    def run(self) -> None:
        """Raises: StaleLeaseError: the job is somebody else's; the child is gone."""
        self._folder.mkdir(parents=True, exist_ok=True)
        process = self._start()
        try:
            self._watch(process)
        finally:
            _kill_group(process)
        self._finish(process.returncode)

    def _start(self) -> subprocess.Popen[bytes]:
        read_end, write_end = os.pipe()
        attempt = {
            "job_id": self._job.id,
            "attempt": self._job.attempt,
            "spec": self._job.spec,
            "folder": str(self._folder),
            "home": str(self._config.home),
            "runner": self._config.runners[self._job.type],
        }
        with (self._folder / f"attempt-{self._job.attempt}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "jobs.child", str(write_end)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=(write_end,),
                start_new_session=True,
                env={**os.environ, "LATHE_PARENT_PID": str(os.getpid())},
            )
        os.close(write_end)
        assert process.stdin is not None
        process.stdin.write(json.dumps(attempt).encode())
        process.stdin.close()
        threading.Thread(target=self._read, args=(read_end,), daemon=True).start()
        return process

    def _read(self, descriptor: int) -> None:
        with os.fdopen(descriptor) as pipe:
            for line in pipe:
                try:
                    self._messages.put(json.loads(line))
                except ValueError:
                    logger.error("a child wrote a line that is not JSON")
        self._messages.put(None)

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        """Until the child has ended and all it said is written."""
        started = heartbeat = time.monotonic()
        open_pipe = True
        while open_pipe or process.poll() is None:
            open_pipe = self._write(wait=open_pipe) and open_pipe
            now = time.monotonic()
            if now - heartbeat >= self._config.heartbeat_seconds or (
                now - heartbeat >= 1.0 and self._asked is None
            ):
                heartbeat = now
                self._beat()
            deadline = self._job.deadline_seconds
            if deadline is not None and now - started > deadline:
                self._ask(JobStatus.FAILED, "deadline_exceeded")
            if self._stop.is_set():
                self._ask(JobStatus.QUEUED, "worker_shutdown")
            self._enforce(process, now)
            if not open_pipe:
                time.sleep(0.01)

    def _beat(self) -> None:
        """Renew the lease and learn whether to stop. Also once a second, so that a cancel is noticed soon."""
        self._store.worker_seen(self._config.name)
        job = self._store.heartbeat(self._job.id, self._job.fencing, self._config.lease_seconds)
        if job.status == JobStatus.CANCELLING:
            self._ask(JobStatus.CANCELLED, "user")

    def _ask(self, status: JobStatus, reason: str) -> None:
        if self._asked is None:
            self._asked = (status, reason)

    def _enforce(self, process: subprocess.Popen[bytes], now: float) -> None:
        """SIGTERM once, SIGKILL after the grace."""
        if self._asked is None or process.poll() is not None:
            return
        if not self._asked_at:
            self._asked_at = now
            os.killpg(process.pid, signal.SIGTERM)
        elif now - self._asked_at > self._config.cancel_grace_seconds:
            _kill_group(process)

    def _write(self, *, wait: bool) -> bool:
        """Hand on what the child said; False once its end of the pipe is closed."""
        events: list[NewEvent] = []
        progress: tuple[int, int] | None = None
        timeout = _TICK_SECONDS if wait else 0.0
        still_open = True
        try:
            message = self._messages.get(timeout=timeout) if wait else self._messages.get_nowait()
            while True:
                if message is None:
                    still_open = False
                elif "progress" in message:
                    step, total = message["progress"]
                    progress = (int(step), int(total))
                elif "kind" in message:
                    events.append(NewEvent(**message))
                else:
                    self._outcome = message
                message = self._messages.get_nowait()
        except queue.Empty:
            pass
        if progress is not None:
            data = {"step": progress[0], "total": progress[1]}
            message_text = f"{progress[0]}/{progress[1]}"
            events.append(NewEvent(kind="progress", message=message_text, data=data))
        if events or progress:
            self._store.report(self._job.id, self._job.fencing, events, progress)
        return still_open

    def _finish(self, returncode: int | None) -> None:
        status, reason, result, error = self._verdict(returncode)
        self._store.finish(
            self._job.id, self._job.fencing, status, reason=reason, result=result, error=error
        )

    def _verdict(
        self, returncode: int | None
    ) -> tuple[JobStatus, str | None, JsonObject | None, JsonObject | None]:
        outcome = self._outcome
        if outcome is not None and "result" in outcome:
            return JobStatus.SUCCEEDED, None, outcome["result"], None
        if self._asked is not None:
            status, reason = self._asked
            error = None
            if status == JobStatus.FAILED:
                limit = self._job.deadline_seconds
                error = {"code": reason, "message": f"the job ran longer than {limit} s"}
            return status, reason, None, error
        if outcome is not None and "failed" in outcome:
            failed = outcome["failed"]
            return JobStatus.FAILED, failed["code"], outcome.get("found"), failed
        message = f"the job's process ended with status {returncode} and said nothing"
        if returncode == -signal.SIGKILL:
            message = "the job's process was killed, probably for lack of memory"
        return (
            JobStatus.FAILED,
            "runner_crashed",
            None,
            {"code": "runner_crashed", "message": message},
        )


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
    process.wait()


def main(argv: list[str] | None = None) -> int:
    """Run one worker until SIGTERM or SIGINT. Redis is used where LATHE_REDIS_URL is set."""
    parser = argparse.ArgumentParser(prog="lathe worker")
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--lease-seconds", type=float, default=60.0)
    parser.add_argument("--heartbeat-seconds", type=float, default=10.0)
    parser.add_argument("--cancel-grace-seconds", type=float, default=5.0)
    arguments = parser.parse_args(argv)
    die_with_parent()
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(name)s %(message)s", level="INFO")
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    store = open_job_store(arguments.home / "lathe.db", os.environ.get("LATHE_REDIS_URL"))
    config = WorkerConfig(
        home=arguments.home,
        lease_seconds=arguments.lease_seconds,
        heartbeat_seconds=arguments.heartbeat_seconds,
        cancel_grace_seconds=arguments.cancel_grace_seconds,
    )
    logger.info("worker %s takes %s", config.name, ", ".join(config.runners))
    Worker(store, config).run(stop)
    store.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
