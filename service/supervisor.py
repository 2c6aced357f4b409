"""`lathe up`: which processes make up Lathe on one machine, in which order they start, and how they stop.

Imports neither torch nor FastAPI (decision 0004). It owns the listening socket and hands it to the API process, so a
restart of the API refuses no connection, and port 0 works.
"""

import asyncio
import ctypes
import errno
import fcntl
import json
import os
import re
import shlex
import signal
import socket
import struct
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from engines.process import set_torch_environment
from service.children import (
    Child,
    ChildSpec,
    RestartPolicy,
    StartError,
    die_with_parent,
    kill_group,
    last_line,
    limit_log,
)
from service.drain import draining
from service.settings import DEFAULT_EMBEDDING_MODEL, DEFAULT_MODEL, Settings
from service.supervisor_client import MAX_LINE_BYTES, EngineProcess, SupervisorStatus
from service.terminal import Terminal

IMPORTABLE_MODELS = (DEFAULT_MODEL, DEFAULT_EMBEDDING_MODEL)
"""Come with the installation and are converted on first use."""
LISTEN_BACKLOG = 2048
MAX_UNIX_PATH_BYTES = 107
POLL_SECONDS = 0.2
API_HEAD_START_SECONDS = 3.0
REFUSE_SECONDS = 1.0
TRIM_LOGS_SECONDS = 60.0
API_STOP_SECONDS = 10.0
"""What the API process gets beyond its drain, to tell those that it stops and to close."""
ENGINE_STOP_SECONDS = 35.0
"""A host lets running requests end for 30 seconds."""
ENGINE_POLICY = RestartPolicy(max_quick_failures=5)
SERVICE_POLICY = RestartPolicy()
_SO_ATTACH_FILTER = 26
_BPF_RETURN = 0x06
_PERCENT = re.compile(rb"(\d{1,3})%")


class SupervisorError(Exception):
    """`lathe up` cannot start; the message is one line for a person."""


class _RefusedError(Exception):
    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


@dataclass(frozen=True, slots=True, kw_only=True)
class Commands:
    """How each kind of process is started; tests put small scripts here."""

    api: Callable[[int], Sequence[str]]
    worker: Callable[[], Sequence[str]]
    engine: Callable[[str], Sequence[str]]
    import_model: Callable[[str], Sequence[str]]


def default_commands(settings: Settings) -> Commands:
    # -P: a folder named like one of ours in the working directory must not be imported instead.
    python = (sys.executable, "-P", "-m")
    return Commands(
        api=lambda fd: (*python, "service.cli", "serve", "--fd", str(fd)),
        worker=lambda: (*python, "service.cli", "worker"),
        engine=lambda model: engine_command(settings, model),
        import_model=lambda model: (
            *python,
            "compression.import_model",
            model,
            "--models-dir",
            str(settings.models_dir),
        ),
    )


def engine_command(settings: Settings, model: str) -> tuple[str, ...]:
    """The command line of the host of an installed model."""
    return (
        *(sys.executable, "-P", "-m", "engines.host"),
        *("--model-id", model),
        *("--checkpoint", str(settings.models_dir / model)),
        *("--socket", str(settings.engine_socket(model))),
        *("--max-num-seqs", str(settings.max_num_seqs)),
        *("--max-num-waiting", str(settings.max_num_queued_requests)),
        *("--log-level", settings.log_level),
    )


def child_environment(settings: Settings) -> dict[str, str]:
    """Ours, with the settings that flags may have changed."""
    environment = {
        # glibc would give a process with threads a heap for each of them, of which none is used for what the others
        # freed: the API process has 46 MiB that reading tokenizers left, and takes more while threads come and go.
        "MALLOC_ARENA_MAX": "2",
        **os.environ,
        "LATHE_HOME": str(settings.home),
        "LATHE_HOST": settings.host,
        "LATHE_PORT": str(settings.port),
        "LATHE_MODELS": ",".join(settings.models),
        "PYTHONUNBUFFERED": "1",
    }
    if settings.redis_url is not None:
        environment["LATHE_REDIS_URL"] = settings.redis_url.get_secret_value()
    set_torch_environment(environment)
    return environment


def is_installed(models_dir: Path, model: str) -> bool:
    """Whether the id names a checkpoint. Compares with a listing: an id never becomes a path by itself."""
    if model.startswith(".") or not models_dir.is_dir():
        return False
    folder = next((entry for entry in models_dir.iterdir() if entry.name == model), None)
    return folder is not None and (folder / "lathe.json").is_file()


@dataclass(slots=True, kw_only=True)
class _Runtime:
    """What exists only while `run` runs."""

    url: str
    listener: socket.socket
    api: Child
    worker: Child
    engines: dict[str, Child] = field(default_factory=dict)


class Supervisor:
    """Runs Lathe until `stop` is called or a signal comes.

    Args:
        terminal: where a person reads along.
        service_policy, engine_policy: of the API process and the worker, and of the hosts.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        commands: Commands | None = None,
        terminal: Terminal | None = None,
        service_policy: RestartPolicy = SERVICE_POLICY,
        engine_policy: RestartPolicy = ENGINE_POLICY,
        has_keys: bool = False,
    ) -> None:
        self._settings = settings
        self._commands = commands or default_commands(settings)
        self._terminal = terminal or Terminal()
        self._service_policy = service_policy
        self._engine_policy = engine_policy
        self._has_keys = has_keys
        self._logs = settings.home / "logs"
        self._env = child_environment(settings)
        self._stop_requested = asyncio.Event()
        self._hurry = asyncio.Event()
        self._gate = asyncio.Event()
        self._import_lock = asyncio.Lock()
        self._started_at = time.monotonic()
        self._busy_since: dict[str, float] = {}
        self._failure: BaseException | None = None
        self.ready = asyncio.Event()
        self.url = ""

    def stop(self) -> None:
        """Ask for an orderly end; a second call ends everything at once."""
        if self._stop_requested.is_set():
            self._hurry.set()
        self._stop_requested.set()

    async def run(self) -> None:
        """Start everything, watch over it, and return once everything has ended.

        Raises:
            SupervisorError: another supervisor has this home, or the port is taken.
        """
        prepare_home(self._settings)
        with hold_lock(self._settings.run_dir / "supervisor.lock"):
            listener = listen(self._settings.host, self._settings.port)
            host, port = listener.getsockname()[:2]
            self.url = f"http://{_url_host(host)}:{port}"
            await self._run_with(listener)
        if self._failure is not None:
            raise self._failure

    async def _run_with(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._child_task_failed)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        runtime = self._start(listener)
        self._settings.supervisor_socket.unlink(missing_ok=True)
        server = await asyncio.start_unix_server(
            partial(self._answer_connection, runtime),
            self._settings.supervisor_socket,
            limit=MAX_LINE_BYTES,
        )
        self._settings.supervisor_socket.chmod(0o600)
        background = [
            asyncio.create_task(self._open_gate(runtime)),
            asyncio.create_task(self._announce_ready(runtime)),
            asyncio.create_task(self._draw_progress(runtime)),
            asyncio.create_task(self._trim_logs()),
        ]
        try:
            await self._stop_requested.wait()
        finally:
            for task in background:
                task.cancel()
            await asyncio.gather(*background, return_exceptions=True)
            server.close()
            self._settings.supervisor_socket.unlink(missing_ok=True)
            await self._stop_all(runtime)
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)
            loop.set_exception_handler(None)

    def _start(self, listener: socket.socket) -> _Runtime:
        settings = self._settings
        api = self._service(
            "api",
            lambda: self._commands.api(listener.fileno()),
            stop_seconds=settings.drain_seconds + API_STOP_SECONDS,
            pass_fds=(listener.fileno(),),
        )
        api.start()
        worker = self._service(
            "worker",
            self._commands.worker,
            stop_seconds=settings.job_cancel_grace_seconds + 10.0,
            prepare=self._wait_for_gate,
        )
        runtime = _Runtime(url=self.url, listener=listener, api=api, worker=worker)
        for model in settings.models:
            self._load(runtime, model)
        worker.start()
        return runtime

    def _service(
        self,
        name: str,
        command: Callable[[], Sequence[str]],
        *,
        stop_seconds: float,
        pass_fds: tuple[int, ...] = (),
        prepare: Callable[[], Awaitable[None]] | None = None,
    ) -> Child:
        spec = ChildSpec(
            name=name,
            command=command,
            log=self._logs / f"{name}.log",
            env=self._env,
            policy=self._service_policy,
            pass_fds=pass_fds,
            prepare=prepare,
            stop_seconds=stop_seconds,
        )
        return Child(spec, self._child_changed)

    def _load(self, runtime: _Runtime, model: str) -> Child:
        child: Child
        spec = ChildSpec(
            name=model,
            command=lambda: self._commands.engine(model),
            log=self._logs / f"engine-{model}.log",
            env=self._env,
            policy=self._engine_policy,
            prepare=lambda: self._prepare_engine(child),
            speaks_status=True,
            stop_seconds=ENGINE_STOP_SECONDS,
        )
        child = Child(spec, self._child_changed)
        runtime.engines[model] = child
        child.start()
        return child

    async def _prepare_engine(self, child: Child) -> None:
        await self._gate.wait()
        model = child.name
        settings = self._settings
        path = settings.engine_socket(model)
        if len(os.fsencode(path)) > MAX_UNIX_PATH_BYTES:
            raise StartError(
                f"the socket path of {model} has {len(os.fsencode(path))} bytes, the kernel allows "
                f"{MAX_UNIX_PATH_BYTES}; choose a shorter LATHE_HOME"
            )
        if not is_installed(settings.models_dir, model):
            if model not in IMPORTABLE_MODELS:
                raise StartError(f"there is no model {model!r}; bring one in with `lathe import`")
            async with self._import_lock:  # one at a time: each uses all cores
                child.set_state("importing")
                started = time.monotonic()
                await self._import(child)
                self._say(f"{model}: converted in {time.monotonic() - started:.1f} s")
        if await accepts_connections(path):
            raise StartError(f"another process serves {model} already; end it first")
        path.unlink(missing_ok=True)

    async def _import(self, child: Child) -> None:
        """Convert a model that came with the installation. Cancelling kills the conversion."""
        log_path = self._logs / "import.log"
        limit_log(log_path)
        with log_path.open("ab") as log:
            log_start = log.tell()
            process = await asyncio.create_subprocess_exec(
                *self._commands.import_model(child.name),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                env=self._env,
                start_new_session=True,
                preexec_fn=die_with_parent(),
            )
            assert process.stdout is not None
            try:
                # A progress bar redraws itself without newlines: read what comes, find the percentage.
                while chunk := await process.stdout.read(4096):
                    log.write(chunk)
                    log.flush()
                    if percents := _PERCENT.findall(chunk):
                        child.set_state("importing", min(1.0, int(percents[-1]) / 100))
                code = await process.wait()
            finally:
                kill_group(process.pid)
                await process.wait()
        if code != 0:
            raise StartError(
                f"importing {child.name} failed: {last_line(log_path, log_start) or f'exit code {code}'}"
            )

    def _child_changed(self, child: Child) -> None:
        """Tell the person at the terminal."""
        snapshot, now = child.snapshot, time.monotonic()
        seconds = now - self._busy_since.pop(child.name, now)
        if snapshot.state in ("importing", "starting"):
            self._busy_since[child.name] = now
        elif snapshot.state == "ready" and child.spec.speaks_status:
            self._say(f"{child.name}: loaded in {seconds:.1f} s")
        elif snapshot.state == "backoff":
            self._say(f"{child.name}: {snapshot.error}; starts again soon")
        elif snapshot.state == "failed":
            self._say(
                f"{child.name}: {snapshot.error}; stays down until it is loaded again "
                f"(log: {child.spec.log})"
            )

    def _say(self, text: str) -> None:
        self._terminal.line(f"{time.strftime('%H:%M:%S')}  {text}")

    async def _draw_progress(self, runtime: _Runtime) -> None:
        labels = {"importing": "converting", "starting": "loading"}
        while True:
            for child in runtime.engines.values():
                label = labels.get(child.snapshot.state)
                if label is not None:
                    since = self._busy_since.get(child.name, time.monotonic())
                    self._terminal.progress(f"{label} {child.name}", child.snapshot.fraction, since)
                    break
            await asyncio.sleep(POLL_SECONDS)

    async def _open_gate(self, runtime: _Runtime) -> None:
        """The API process gets the cores to itself until it answers; the request waits in its socket till then."""
        host, port = runtime.listener.getsockname()[:2]
        await http_status(host, port, "/health", API_HEAD_START_SECONDS)
        self._gate.set()

    async def _wait_for_gate(self) -> None:
        await self._gate.wait()

    async def _announce_ready(self, runtime: _Runtime) -> None:
        """Print the banner once every host is up or has failed, and `/ready` agrees."""
        host, port = runtime.listener.getsockname()[:2]
        while True:
            states = {child.snapshot.state for child in runtime.engines.values()}
            settled = states <= {"ready", "failed"}
            if settled and ("failed" in states or await http_status(host, port, "/ready") == 200):
                break
            await asyncio.sleep(POLL_SECONDS)
        failed = [name for name, c in runtime.engines.items() if c.snapshot.state == "failed"]
        for line in banner(self._settings, runtime.url, failed, has_keys=self._has_keys):
            self._terminal.line(line)
        self.ready.set()

    async def _trim_logs(self) -> None:
        while True:
            await asyncio.sleep(TRIM_LOGS_SECONDS)
            for path in self._logs.glob("*.log"):
                limit_log(path)

    async def _stop_all(self, runtime: _Runtime) -> None:
        """The API first, so that nothing new comes in; then the worker gives its job back; then the hosts."""
        self._say("stopping (once more to stop at once)")
        await self._stop_children([runtime.api])
        await turn_away(runtime.listener)
        await self._stop_children([runtime.worker])
        await self._stop_children(list(runtime.engines.values()))
        for model in runtime.engines:
            self._settings.engine_socket(model).unlink(missing_ok=True)
        self._say("stopped")

    async def _stop_children(self, children: Sequence[Child]) -> None:
        hurry = asyncio.create_task(self._hurry_up(children))
        await asyncio.gather(*(child.stop(at_once=self._hurry.is_set()) for child in children))
        hurry.cancel()

    async def _hurry_up(self, children: Sequence[Child]) -> None:
        await self._hurry.wait()
        await asyncio.gather(*(child.stop(at_once=True) for child in children))

    def _child_task_failed(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """A defect of ours in a background task: end in order, then say so with a traceback."""
        loop.default_exception_handler(context)
        self._failure = context.get("exception") or RuntimeError(context["message"])
        self._stop_requested.set()

    async def _answer_connection(
        self, runtime: _Runtime, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        try:
            while line := await reader.readline():
                answer = await self._answer(runtime, line)
                writer.write(json.dumps(answer).encode() + b"\n")
                await writer.drain()
        except (OSError, ValueError):
            pass  # the asker left, or sent a line beyond the limit: nobody is there to be told
        finally:
            writer.close()

    async def _answer(self, runtime: _Runtime, line: bytes) -> dict[str, Any]:
        try:
            request = json.loads(line)
            if not isinstance(request, dict):
                raise _RefusedError("invalid_value", "a request is a JSON object")
            return {"ok": True, **await self._perform(runtime, request)}
        except ValueError:
            return {
                "ok": False,
                "code": "invalid_value",
                "message": "a request is one line of JSON",
            }
        except _RefusedError as error:
            return {"ok": False, "code": error.code, "message": error.message}

    async def _perform(self, runtime: _Runtime, request: Mapping[str, Any]) -> dict[str, Any]:
        operation, model = request.get("op"), request.get("model")
        if operation == "status":
            return {"status": self._status(runtime).to_json()}
        if operation not in ("load", "unload", "restart"):
            raise _RefusedError(
                "invalid_value", f"op is {operation!r}; allowed: status, load, unload, restart"
            )
        if not isinstance(model, str):
            raise _RefusedError("invalid_value", "model must be a string")
        if self._stop_requested.is_set():
            raise _RefusedError("draining", "the supervisor is stopping")
        if operation == "load":
            return {"engine": self._perform_load(runtime, model)}
        if operation == "restart":
            return {"engine": await self._perform_restart(runtime, model)}
        await self._perform_unload(runtime, model)
        return {}

    def _perform_load(self, runtime: _Runtime, model: str) -> dict[str, Any]:
        child = runtime.engines.get(model)
        if child is None:
            known = model in IMPORTABLE_MODELS or is_installed(self._settings.models_dir, model)
            if not known:
                raise _RefusedError("model_not_found", f"there is no model {model!r}")
            child = self._load(runtime, model)
        elif child.snapshot.state == "stopping":
            raise _RefusedError("model_in_use", f"{model} is being unloaded; ask again when it is")
        else:
            child.retry()
        return _engine_json(child)

    async def _perform_unload(self, runtime: _Runtime, model: str) -> None:
        child = self._loaded(runtime, model)
        await child.stop()
        if runtime.engines.get(model) is child:
            del runtime.engines[model]
            self._settings.engine_socket(model).unlink(missing_ok=True)
            self._say(f"{model}: unloaded")

    async def _perform_restart(self, runtime: _Runtime, model: str) -> dict[str, Any]:
        child = self._loaded(runtime, model)
        if child.snapshot.state == "stopping":
            raise _RefusedError("model_in_use", f"{model} is being unloaded or restarted")
        await child.stop()
        if self._stop_requested.is_set():
            raise _RefusedError("draining", "the supervisor is stopping")
        if runtime.engines.get(model) is not child:
            raise _RefusedError("model_not_loaded", f"{model} was unloaded meanwhile")
        self._say(f"{model}: restarts")
        return _engine_json(self._load(runtime, model))

    def _loaded(self, runtime: _Runtime, model: str) -> Child:
        child = runtime.engines.get(model)
        if child is None:
            raise _RefusedError("model_not_loaded", f"{model} is not loaded")
        return child

    def _status(self, runtime: _Runtime) -> SupervisorStatus:
        return SupervisorStatus(
            pid=os.getpid(),
            engines={model: _engine_process(child) for model, child in runtime.engines.items()},
            api_pid=runtime.api.snapshot.pid,
            worker_pid=runtime.worker.snapshot.pid,
        )


def _engine_process(child: Child) -> EngineProcess:
    snapshot = child.snapshot
    return EngineProcess(
        model=child.name,
        state=snapshot.state,
        pid=snapshot.pid,
        restarts=snapshot.restarts,
        error=snapshot.error,
        since=snapshot.since,
    )


def _engine_json(child: Child) -> dict[str, Any]:
    process = _engine_process(child)
    return {name: getattr(process, name) for name in process.__slots__}


def prepare_home(settings: Settings) -> None:
    """Make the folders. Only their owner may look into them: they hold sockets, keys and jobs."""
    try:
        settings.home.mkdir(parents=True, exist_ok=True, mode=0o700)
        for folder in (settings.run_dir, settings.models_dir, settings.home / "logs"):
            folder.mkdir(exist_ok=True, mode=0o700)
    except OSError as error:
        raise SupervisorError(f"cannot use LATHE_HOME {settings.home}: {error.strerror}") from error
    path_bytes = len(os.fsencode(settings.supervisor_socket))
    if path_bytes > MAX_UNIX_PATH_BYTES:
        raise SupervisorError(
            f"LATHE_HOME is too long: its socket path has {path_bytes} bytes, the kernel allows "
            f"{MAX_UNIX_PATH_BYTES}"
        )


@contextmanager
def hold_lock(path: Path) -> Iterator[None]:
    """Own a home while the block runs. The kernel drops the lock with the process, however that ends."""
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            raise SupervisorError(
                f"Lathe runs here already (process {owner}, home {path.parent.parent})"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def listen(host: str, port: int) -> socket.socket:
    """Bind the API's address.

    Raises:
        SupervisorError: it is taken, or it is not ours.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind)
    except OSError as error:
        raise SupervisorError(f"cannot listen on {host}: {error.strerror}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _bind(listener, address)
        listener.listen(LISTEN_BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise SupervisorError(
                f"port {port} is in use; end what uses it, or choose another: lathe up --port {port + 1}"
            ) from error
        raise SupervisorError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    return listener


async def turn_away(listener: socket.socket) -> None:
    """Close a listening socket after a word to those who wait in it: the API process may have ended before them."""
    waiting: list[socket.socket] = []
    admit_nobody(listener)
    listener.setblocking(False)
    with suppress(BlockingIOError):
        while True:
            waiting.append(listener.accept()[0])
    listener.close()
    await asyncio.gather(*map(_refuse, waiting))


def admit_nobody(listener: socket.socket) -> None:
    """Have the kernel drop what asks for a connection, so that nobody comes to wait between the last look and the
    close, which would reset it. Whoever asks tries again in a second, and is refused. Linux only."""
    if sys.platform != "linux":
        return
    drop_all = ctypes.create_string_buffer(struct.pack("HBBI", _BPF_RETURN, 0, 0, 0))
    program = struct.pack("HP", 1, ctypes.addressof(drop_all))
    listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)


async def _refuse(connection: socket.socket) -> None:
    error = draining()
    body = json.dumps(error.body()).encode()
    headers = error.headers() | {
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "Connection": "close",
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    reader, writer = await asyncio.open_connection(sock=connection)
    with suppress(OSError, TimeoutError):
        writer.write(f"HTTP/1.1 {error.status} Service Unavailable\r\n{head}\r\n".encode() + body)
        writer.write_eof()
        # Closed with its request unread, it would be reset.
        async with asyncio.timeout(REFUSE_SECONDS):
            while await reader.read(65536):
                pass
    writer.close()


def _bind(listener: socket.socket, address: Any, patience_seconds: float = 1.0) -> None:
    """Bind; where a killed predecessor's processes are just ending, their port is free in a moment."""
    deadline = time.monotonic() + patience_seconds
    while True:
        try:
            return listener.bind(address)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                raise
            time.sleep(0.05)


async def accepts_connections(path: Path) -> bool:
    """Whether a process listens on a Unix socket; a stale file refuses."""
    try:
        _, writer = await asyncio.open_unix_connection(path)
    except OSError:
        return False
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()
    return True


async def http_status(host: str, port: int, path: str, timeout_seconds: float = 2.0) -> int | None:
    """GET a path of our own API; its status, or None where no answer comes."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    try:
        async with asyncio.timeout(timeout_seconds):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                head = f"GET {path} HTTP/1.1\r\nHost: {_url_host(host)}:{port}\r\nConnection: close\r\n\r\n"
                writer.write(head.encode())
                status_line = await reader.readline()
            finally:
                writer.close()
        return int(status_line.split()[1])
    except (OSError, TimeoutError, IndexError, ValueError):
        return None


def _url_host(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def banner(settings: Settings, url: str, failed: Sequence[str], *, has_keys: bool) -> list[str]:
    """What to print once Lathe is up: where it is, and a first request to copy."""
    body = {"messages": [{"role": "user", "content": "What is a lathe?"}], "max_tokens": 60}
    model = next((m for m in settings.models if m != settings.embedding_model), DEFAULT_MODEL)
    headers = ["-H 'Content-Type: application/json'"]
    if has_keys:
        headers.append('-H "Authorization: Bearer $LATHE_API_KEY"')
    problems = [f"Without {model}: it failed to load, see above." for model in failed]
    return [
        "",
        f"Lathe is ready at {url}",
        *problems,
        f"  docs  {url}/docs",
        f"  logs  {settings.home / 'logs'}",
        "",
        f"curl {url}/v1/chat/completions {' '.join(headers)} \\",
        f"  -d {shlex.quote(json.dumps({'model': model, **body}))}",
        "",
        "Ctrl-C stops it.",
    ]
