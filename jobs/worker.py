"""The worker: claims jobs one at a time and runs each in a process group of its own, which dies with the worker.

The parent renews the lease, writes what the child says with the fencing token, and ends the child when the job is
cancelled, too slow, given back, or no longer ours. A store that does not answer is waited for: a job under way goes on
for as long as its lease surely holds, since until then nobody else can have claimed it.
"""

import argparse
import contextlib
import errno
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
from dataclasses import asdict, dataclass, field
from pathlib import Path

from engines.logs import LEVELS, LogLevel, set_up_logging
from engines.origin import Origin, caused_by, current_origin
from engines.tracing import set_up_tracing, shut_down_tracing, span
from jobs.child import RUNNERS
from jobs.gpu import GPU_POLICIES, GpuBusyError, GpuPolicy, give_gpu_back, take_gpu
from jobs.logic import num_lost
from jobs.open import STORE_ERRORS, open_job_store
from jobs.states import InvalidTransitionError, JobStatus
from jobs.store import Job, JobNotFoundError, JobStore, JsonObject, NewEvent, StaleLeaseError

IDLE_SECONDS = 0.5
SEEN_SECONDS = 5.0
"""How often the worker shows that it lives."""
LOOK_SECONDS = 1.0
"""How often the job is looked at for a request to cancel or pause."""
REPORT_SECONDS = 0.5
"""What the child says is written at most this often; of its progress, the newest."""
MAX_BACKOFF_SECONDS = 10.0
EXIT_SECONDS = 10.0
"""How long a child may take to end after it said how its work ended."""
SHUTDOWN_SECONDS = 5.0
"""How long a stopping worker tries to reach a store that does not answer."""
_TICK_SECONDS = 0.1
_PIPE_SECONDS = 5.0

logger = logging.getLogger("lathe.worker")


TRAINING_TYPES = frozenset({"finetune", "train_projector"})
"""Jobs that take the GPU, and that write a checkpoint before they stop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """How a worker works.

    Attributes:
        checkpoint_grace_seconds: for a job of `TRAINING_TYPES` to end its step and write a checkpoint;
            `cancel_grace_seconds` is for the others, and for all of them when the worker stops.
        log_level: of the jobs' own logs.
        runners: job type to "module:function".
    """

    home: Path
    name: str = field(default_factory=lambda: f"{os.uname().nodename}-{os.getpid()}")
    lease_seconds: float = 60.0
    heartbeat_seconds: float = 10.0
    cancel_grace_seconds: float = 5.0
    checkpoint_grace_seconds: float = 60.0
    gpu_policy: GpuPolicy = "sleep"
    log_level: LogLevel = "info"
    runners: Mapping[str, str] = field(default_factory=lambda: dict(RUNNERS))

    def __post_init__(self) -> None:
        if not 0 < self.heartbeat_seconds <= self.lease_seconds / 2:
            raise ValueError(
                f"heartbeat_seconds must be above 0 and at most half of lease_seconds"
                f" ({self.lease_seconds}), got {self.heartbeat_seconds}"
            )
        for name in ("cancel_grace_seconds", "checkpoint_grace_seconds"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")

    @property
    def run_dir(self) -> Path:
        """Where the engines' sockets are."""
        return self.home / "run"


class Worker:
    """Runs jobs until told to stop."""

    def __init__(self, store: JobStore, config: WorkerConfig) -> None:
        self._store = store
        self._config = config
        self._seen_at = float("-inf")

    def run(self, stop: threading.Event) -> None:
        """Claim and run until `stop` is set; a job under way is then given back."""
        give_gpu_back(self._config.run_dir)  # of a worker that died
        backoff = IDLE_SECONDS
        while not stop.is_set():
            claim_at = time.monotonic()
            try:
                job = self._claim(claim_at)
            except STORE_ERRORS as error:
                logger.warning(
                    "the job store does not answer (%s); next try in %.1f s",
                    type(error).__name__,
                    backoff,
                )
                stop.wait(backoff)
                backoff = min(2 * backoff, MAX_BACKOFF_SECONDS)
                continue
            except Exception:  # a value that nobody of ours wrote: told, and not spun on
                logger.exception("cannot claim a job; next try in %.1f s", MAX_BACKOFF_SECONDS)
                stop.wait(MAX_BACKOFF_SECONDS)
                continue
            backoff = IDLE_SECONDS
            if job is None:
                stop.wait(IDLE_SECONDS)
            else:
                self._run(job, claim_at, stop)

    def _claim(self, now: float) -> Job | None:
        if now - self._seen_at >= SEEN_SECONDS:
            self._store.worker_seen(self._config.name)
            self._seen_at = now
        types = tuple(self._config.runners)
        return self._store.claim(self._config.name, types, self._config.lease_seconds)

    def _run(self, job: Job, claim_at: float, stop: threading.Event) -> None:
        origin = Origin(job_id=job.id, request_id=job.request_id, traceparent=job.traceparent)
        about: dict[str, str | int] = {"lathe.job_id": job.id, "lathe.job.attempt": job.attempt}
        with caused_by(origin), span(f"job {job.type}", about) as traced:
            status = self._attempt(job, claim_at, stop)
            traced.describe({"lathe.job.status": status})
            if status in (JobStatus.FAILED, "lost"):
                traced.fail(status)

    def _attempt(self, job: Job, claim_at: float, stop: threading.Event) -> str:
        """What the job became, or "lost"."""
        logger.info("job %s attempt %d starts", job.id, job.attempt)
        attempt = _Attempt(self._store, self._config, job, claim_at, stop)
        try:
            attempt.run()
        except StaleLeaseError as error:
            logger.warning("lost a lease: %s", error)
        except JobNotFoundError:  # Redis came back with less than it was told
            logger.error("job %s: the store has lost it", job.id)
        except Exception:  # the lease runs out, and the job is tried again
            logger.exception("job %s: the attempt failed in the worker itself", job.id)
            stop.wait(IDLE_SECONDS)
        return attempt.ended_as or "lost"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Verdict:
    """How an attempt ended, as the store is told."""

    status: JobStatus
    reason: str | None = None
    result: JsonObject | None = None
    error: JsonObject | None = None


class _Attempt:
    """One attempt at one job. Owned by one thread; another only fills `_messages`.

    Attributes:
        ended_as: what the store was told; None until then.
    """

    def __init__(
        self,
        store: JobStore,
        config: WorkerConfig,
        job: Job,
        claim_at: float,
        stop: threading.Event,
    ) -> None:
        self.ended_as: JobStatus | None = None
        self._store = store
        self._config = config
        self._job = job
        self._stop = stop
        self._folder = config.home / "jobs" / job.id
        self._started_at = time.monotonic()
        self._messages: queue.Queue[JsonObject | None] = queue.Queue()
        self._pipe_open = True
        self._events: list[NewEvent] = []
        self._progress: tuple[int, int] | None = None
        self._step = 0
        self._outcome: JsonObject | None = None
        self._outcome_at: float | None = None
        self._asked: _Verdict | None = None
        self._asked_at: float | None = None
        # Of the lease, by our clock, counted from before each renewal was sent: it surely holds until then.
        self._lease_ends = claim_at + config.lease_seconds
        self._renew_at = claim_at + config.heartbeat_seconds
        self._look_at = 0.0
        self._report_at = 0.0
        self._backoff = 0.0
        self._call_at = 0.0

    def run(self) -> None:
        """Raises: StaleLeaseError: the job is somebody else's, or may be by now; the child is gone."""
        if self._job.type not in TRAINING_TYPES:
            self._run_child()
            return
        try:
            take_gpu(self._config.run_dir, self._config.gpu_policy)
            self._run_child()
        except GpuBusyError as error:
            self._outcome = {"failed": {"code": "gpu_busy", "message": str(error)}}
            self._finish(None)
        finally:
            give_gpu_back(self._config.run_dir)

    def _run_child(self) -> None:
        process: subprocess.Popen[bytes] | None = None
        try:
            process = self._start()
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            code = "disk_full" if full else "runner_crashed"
            message = "the disk is full" if full else "the job's process could not be started"
            logger.exception("job %s: %s", self._job.id, message)
            self._outcome = {"failed": {"code": code, "message": message}}
        if process is not None:
            try:
                self._watch(process)
            finally:
                _kill_group(process)
            self._drain()
        self._finish(None if process is None else process.returncode)

    def _start(self) -> "subprocess.Popen[bytes]":
        self._folder.mkdir(parents=True, exist_ok=True)
        attempt = {
            "job_id": self._job.id,
            "owner": self._job.owner,
            "attempt": self._job.attempt,
            "spec": self._job.spec,
            "folder": str(self._folder),
            "home": str(self._config.home),
            "runner": self._config.runners[self._job.type],
            "origin": asdict(current_origin()),
            "log_level": self._config.log_level,
        }
        # A job has no business with the store, so it is not told where it is.
        environment = {k: v for k, v in os.environ.items() if k != "LATHE_REDIS_URL"}
        environment["LATHE_PARENT_PID"] = str(os.getpid())
        with (self._folder / f"attempt-{self._job.attempt}.log").open("ab") as log:
            read_end, write_end = os.pipe()
            try:
                process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "jobs.child", str(write_end)],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    pass_fds=(write_end,),
                    start_new_session=True,
                    env=environment,
                )
            except OSError:
                os.close(read_end)
                raise
            finally:
                os.close(write_end)
        threading.Thread(target=self._read, args=(read_end,), daemon=True).start()
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError), process.stdin as pipe:  # it may be dead already
            pipe.write(json.dumps(attempt).encode())
        return process

    def _read(self, descriptor: int) -> None:
        """The thread that reads the pipe; None is its end."""
        with os.fdopen(descriptor, encoding="utf-8", errors="replace") as pipe:
            for line in pipe:
                try:
                    message = json.loads(line)
                except ValueError:
                    message = None
                if isinstance(message, dict):
                    self._messages.put(message)
                else:
                    logger.error("job %s: its process wrote no JSON object", self._job.id)
        self._messages.put(None)

    def _watch(self, process: "subprocess.Popen[bytes]") -> None:
        """Until the child has ended."""
        while process.poll() is None:
            self._collect(_TICK_SECONDS)
            now = time.monotonic()
            self._talk_to_store(now)
            deadline = self._job.deadline_seconds
            if deadline is not None and now - self._started_at > deadline:
                message = f"the job ran longer than its limit of {deadline:g} s"
                error = {"code": "deadline_exceeded", "message": message}
                self._ask(_Verdict(status=JobStatus.FAILED, reason=error["code"], error=error))
            if self._stop.is_set():
                self._ask(_Verdict(status=JobStatus.QUEUED, reason="worker_shutdown"))
            self._enforce(process, now)

    def _collect(self, wait_seconds: float) -> None:
        """Take what the child said, waiting for the first of it."""
        try:
            message = self._messages.get(timeout=wait_seconds)
            while True:
                self._take(message)
                message = self._messages.get_nowait()
        except queue.Empty:
            pass

    def _take(self, message: JsonObject | None) -> None:
        if message is None:
            self._pipe_open = False
        elif "progress" in message:
            step, total = message["progress"]
            self._step = int(step)
            self._progress = (self._step, int(total))
        elif "kind" in message:
            self._events.append(NewEvent(**message))
        else:
            self._outcome = message
            self._outcome_at = time.monotonic()

    def _drain(self) -> None:
        """Take the rest; the group is dead, so the pipe closes unless a process left the group."""
        deadline = time.monotonic() + _PIPE_SECONDS
        while self._pipe_open and time.monotonic() < deadline:
            self._collect(_TICK_SECONDS)

    def _talk_to_store(self, now: float) -> None:
        """Renew, look and report, each when it is due.

        Raises:
            StaleLeaseError: also where the lease could not be renewed in time.
        """
        if now >= self._call_at:
            try:
                if now >= self._renew_at:
                    self._renew(now)
                if now >= self._look_at:
                    self._look(self._store.get(self._job.id))
                    self._look_at = now + LOOK_SECONDS
                if now >= self._report_at:
                    self._report()
                    self._report_at = now + REPORT_SECONDS
                self._backoff = 0.0
            except STORE_ERRORS as error:
                self._backoff = min(max(2 * self._backoff, 0.2), self._config.heartbeat_seconds)
                self._call_at = now + self._backoff
                logger.warning(
                    "job %s: the job store does not answer (%s); next try in %.1f s",
                    self._job.id,
                    type(error).__name__,
                    self._backoff,
                )
        if time.monotonic() > self._lease_ends:
            raise StaleLeaseError(
                f"job {self._job.id}: its lease could not be renewed within"
                f" {self._config.lease_seconds} s"
            )

    def _renew(self, now: float) -> None:
        job = self._store.heartbeat(self._job.id, self._job.fencing, self._config.lease_seconds)
        self._lease_ends = now + self._config.lease_seconds
        self._renew_at = now + self._config.heartbeat_seconds
        self._look(job)
        self._store.worker_seen(self._config.name)
        self._store.reap()

    def _look(self, job: Job) -> None:
        """Do what the job was asked to. Raises: StaleLeaseError."""
        if job.fencing != self._job.fencing:
            raise StaleLeaseError(f"job {job.id}: attempt {job.attempt} is another worker's")
        if job.status == JobStatus.CANCELLING:
            self._ask(_Verdict(status=JobStatus.CANCELLED, reason="user"))
        elif job.status == JobStatus.PAUSING:
            self._ask(_Verdict(status=JobStatus.PAUSED, reason="user"))

    def _ask(self, verdict: _Verdict) -> None:
        """The child is to end, and this is why; the first reason stays, but for a cancel."""
        if self._asked is None or verdict.status == JobStatus.CANCELLED:
            self._asked = verdict

    def _enforce(self, process: "subprocess.Popen[bytes]", now: float) -> None:
        """SIGTERM once, SIGKILL after the grace; a child that is done and does not end is killed as well."""
        if self._outcome_at is not None and now - self._outcome_at > EXIT_SECONDS:
            _kill_group(process)
        if self._asked is None or process.poll() is not None:
            return
        if self._asked_at is None:
            self._asked_at = now
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        elif now - self._asked_at > self._grace_seconds():
            _kill_group(process)

    def _grace_seconds(self) -> float:
        if self._job.type in TRAINING_TYPES and not self._stop.is_set():
            return self._config.checkpoint_grace_seconds
        return self._config.cancel_grace_seconds

    def _report(self) -> None:
        """Write what has gathered; it is kept until the store has it."""
        if not self._events and self._progress is None:
            return
        events = list(self._events)
        if self._progress is not None:
            step, total = self._progress
            data = {"step": step, "total": total}
            events.append(NewEvent(kind="progress", message=f"{step}/{total}", data=data))
        self._store.report(self._job.id, self._job.fencing, events, self._progress)
        self._events.clear()
        self._progress = None

    def _finish(self, returncode: int | None) -> None:
        """Tell the store how it ended, however long that takes; a stopping worker soon gives up.

        Raises:
            StaleLeaseError
        """
        verdict = self._verdict(returncode)
        backoff = 0.2
        stopping_until: float | None = None
        while True:
            try:
                self._report()
                self.ended_as = self._end(verdict)
                logger.info(
                    "job %s attempt %d: %s", self._job.id, self._job.attempt, verdict.status
                )
                return
            except STORE_ERRORS as error:
                logger.warning("job %s: cannot end it yet (%s)", self._job.id, type(error).__name__)
            if self._stop.is_set():
                stopping_until = stopping_until or time.monotonic() + SHUTDOWN_SECONDS
                if time.monotonic() > stopping_until:
                    logger.warning("job %s: left to its lease", self._job.id)
                    return
                time.sleep(_TICK_SECONDS)
            else:
                self._stop.wait(backoff)
                backoff = min(2 * backoff, MAX_BACKOFF_SECONDS)

    def _end(self, verdict: _Verdict) -> JobStatus:
        try:
            self._store.finish(
                self._job.id,
                self._job.fencing,
                verdict.status,
                reason=verdict.reason,
                result=verdict.result,
                error=verdict.error,
            )
        except InvalidTransitionError as error:
            # Cancelled in the moment that it was given back or paused: a cancel is what remains possible.
            if error.current != JobStatus.CANCELLING:
                raise
            self._store.finish(self._job.id, self._job.fencing, JobStatus.CANCELLED, reason="user")
            return JobStatus.CANCELLED
        return verdict.status

    def _verdict(self, returncode: int | None) -> _Verdict:
        outcome = self._outcome
        if outcome is not None and "result" in outcome:
            return _Verdict(status=JobStatus.SUCCEEDED, result=outcome["result"])
        if self._asked is not None:
            return self._asked
        if outcome is not None and "failed" in outcome:
            failed = outcome["failed"]
            return _Verdict(
                status=JobStatus.FAILED,
                reason=failed["code"],
                result=outcome.get("found"),
                error=failed,
            )
        return self._crashed(returncode)

    def _crashed(self, returncode: int | None) -> _Verdict:
        """The child said nothing of how it ended: it is tried again, up to `max_attempts`."""
        lost = num_lost(self._job, self._step)
        if lost < self._job.max_attempts:
            return _Verdict(status=JobStatus.QUEUED, reason="runner_crashed")
        how = f"ended with status {returncode}"
        if returncode == -signal.SIGKILL:
            how = "was killed (SIGKILL), most often because the machine ran out of memory"
        elif returncode is not None and returncode < 0:
            how = f"was ended by signal {-returncode}"
        message = f"the job's process {how} and left no result; {lost} attempts were lost"
        error = {"code": "runner_crashed", "message": message}
        return _Verdict(status=JobStatus.FAILED, reason="runner_crashed", error=error)


def _kill_group(process: "subprocess.Popen[bytes]") -> None:
    """Also what the child left behind in its group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_until_signal(store: JobStore, config: WorkerConfig) -> None:
    """Run a worker in this process, on its main thread, until SIGTERM or SIGINT."""
    stop = threading.Event()

    def on_signal(*_: object) -> None:
        # Not here: the main thread may hold the event's lock in this very moment, and would wait for itself.
        threading.Thread(target=stop.set).start()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    logger.info("worker %s takes %s", config.name, ", ".join(config.runners))
    Worker(store, config).run(stop)
    store.close()


def main(argv: list[str] | None = None, runners: Mapping[str, str] | None = None) -> int:
    """Run one worker until SIGTERM or SIGINT. Redis is used where LATHE_REDIS_URL is set.

    Args:
        runners: of job types that rooms above this one bring along.
    """
    parser = argparse.ArgumentParser(prog="lathe worker")
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--lease-seconds", type=float, default=60.0)
    parser.add_argument("--heartbeat-seconds", type=float, default=10.0)
    parser.add_argument("--cancel-grace-seconds", type=float, default=5.0)
    parser.add_argument("--checkpoint-grace-seconds", type=float, default=60.0)
    parser.add_argument("--gpu-policy", choices=GPU_POLICIES, default="sleep")
    parser.add_argument("--log-level", choices=LEVELS, default="info")
    parser.add_argument("--otlp-endpoint")
    arguments = parser.parse_args(argv)
    set_up_logging(arguments.log_level)
    set_up_tracing("worker", arguments.otlp_endpoint)
    config = WorkerConfig(
        home=arguments.home,
        lease_seconds=arguments.lease_seconds,
        heartbeat_seconds=arguments.heartbeat_seconds,
        cancel_grace_seconds=arguments.cancel_grace_seconds,
        checkpoint_grace_seconds=arguments.checkpoint_grace_seconds,
        gpu_policy=arguments.gpu_policy,
        log_level=arguments.log_level,
        runners={**RUNNERS, **(runners or {})},
    )
    store = open_job_store(arguments.home / "lathe.db", os.environ.get("LATHE_REDIS_URL"))
    run_until_signal(store, config)
    shut_down_tracing()
    return 0


if __name__ == "__main__":
    sys.exit(main())
