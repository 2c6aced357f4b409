"""The engine host: the process that owns one loaded model and steps it.

    python -m engines.host --model-id ID --checkpoint DIR --socket PATH

One thread owns the engine; one event loop owns the sockets. The thread takes commands from an inbox, steps, and hands
what came out to the loop. Nothing that a client does or fails to do makes the thread wait. Embed and score calls
are cut into chunks that run between steps, so that they share the engine with generation.

Status goes to stdout as JSON lines with a "status": "loading" (with "fraction"), "ready", "draining", "failed".
"""

import argparse
import asyncio
import json
import logging
import os
import queue
import signal
import socket
import stat
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from engines.logs import LEVELS, set_up_logging
from engines.origin import Origin, caused_by
from engines.process import die_with_parent, set_torch_environment
from engines.protocol import (
    ContinuationScore,
    EmbedRequest,
    EmbedResult,
    Engine,
    EngineError,
    ErrorCode,
    ScoreRequest,
    ScoreResult,
    TokenOutput,
)
from engines.wire import (
    PROTOCOL_VERSION,
    Abort,
    ClientMessage,
    Control,
    Done,
    Embed,
    Embedded,
    Generate,
    Hello,
    HostMessage,
    Outputs,
    Refused,
    Score,
    Scored,
    Statistics,
    WireError,
    decode_client,
    encode_frame,
    read_frame,
)

MAX_UNREAD_BYTES = 8 * 2**20
"""Bytes that wait for a client before it is cut off."""
MAX_BULK_CALLS = 256
"""Embed and score calls that wait at once; further ones are refused with "queue_full"."""
MAX_CHUNK_ITEMS = 32
MAX_CHUNK_TOKENS = 2048
MAX_FAILED_STEPS = 3
DRAIN_SECONDS = 30.0
FLUSH_SECONDS = 2.0

Progress = Callable[[float], None]
"""Called with the fraction of the work done, in [0, 1]."""

logger = logging.getLogger("lathe.host")


class SocketInUseError(Exception):
    """Another process answers on the socket, or its path is something else."""


def error_code(error: Exception) -> ErrorCode:
    """What to call an exception that is no `EngineError`. Looks at names: torch may not be imported."""
    text = str(error)
    if (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in text
    ):
        return "out_of_memory"
    return "internal_error"


class _EmbedTask:
    """An embed call in chunks of texts of like length."""

    def __init__(self, call_id: int, request: EmbedRequest) -> None:
        self._call_id = call_id
        lengths = [len(ids) for ids in request.token_ids]
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        self._request = request
        self._chunks = deque(_chunks(order, lengths)) or deque([[]])
        self._rows: list[bytes] = [b""] * len(lengths)
        self._dim = 0
        self._num_tokens = 0

    def advance(self, engine: Engine) -> Embedded | None:
        """Run one chunk; the answer after the last."""
        indices = self._chunks.popleft()
        texts = tuple(self._request.token_ids[index] for index in indices)
        part = engine.embed(replace(self._request, token_ids=texts))
        row_bytes = part.dim * 4
        for place, index in enumerate(indices):
            self._rows[index] = part.vectors[place * row_bytes : (place + 1) * row_bytes]
        self._dim = part.dim
        self._num_tokens += part.num_tokens
        if self._chunks:
            return None
        vectors = b"".join(self._rows)
        result = EmbedResult(dim=self._dim, vectors=vectors, num_tokens=self._num_tokens)
        return Embedded(self._call_id, result)


class _ScoreTask:
    """A score call in chunks of continuations; each chunk computes the context anew."""

    def __init__(self, call_id: int, request: ScoreRequest) -> None:
        lengths = [len(ids) for ids in request.continuation_ids]
        self._call_id = call_id
        self._request = request
        self._chunks = deque(_chunks(range(len(lengths)), lengths)) or deque([[]])
        self._scores: list[ContinuationScore] = []
        self._num_tokens = len(request.context_ids) + sum(lengths)

    def advance(self, engine: Engine) -> Scored | None:
        indices = self._chunks.popleft()
        continuations = tuple(self._request.continuation_ids[index] for index in indices)
        part = engine.score(replace(self._request, continuation_ids=continuations))
        self._scores.extend(part.scores)
        if self._chunks:
            return None
        result = ScoreResult(scores=tuple(self._scores), num_tokens=self._num_tokens)
        return Scored(self._call_id, result)


def _task(message: Embed | Score) -> _EmbedTask | _ScoreTask:
    if isinstance(message, Embed):
        return _EmbedTask(message.call_id, message.request)
    return _ScoreTask(message.call_id, message.request)


def _chunks(order: Iterable[int], lengths: list[int]) -> list[list[int]]:
    """Cut `order` where a chunk would pass `MAX_CHUNK_ITEMS` or, padded, `MAX_CHUNK_TOKENS`."""
    chunks: list[list[int]] = []
    longest = 0
    for index in order:
        longest = max(longest, lengths[index])
        full = chunks and (
            len(chunks[-1]) >= MAX_CHUNK_ITEMS or (len(chunks[-1]) + 1) * longest > MAX_CHUNK_TOKENS
        )
        if not chunks or full:
            chunks.append([])
            longest = lengths[index]
        chunks[-1].append(index)
    return chunks


@dataclass(slots=True)
class _BulkCall:
    connection: int
    call_id: int
    request_id: str
    task: _EmbedTask | _ScoreTask
    origin: Origin
    arrived_at: float


@dataclass(slots=True)
class _Running:
    """A request that the engine has, whose it is, and what to say of it when it ends.

    Attributes:
        arrived_at: on the socket; `inbox_seconds` later the engine took it.
    """

    connection: int
    origin: Origin
    num_prompt_tokens: int
    arrived_at: float
    inbox_seconds: float
    num_tokens: int = 0
    queue_seconds: float | None = None
    prefill_seconds: float | None = None


@dataclass(slots=True)
class _Stop:
    """Inbox message: refuse what comes, go on until nothing runs or `deadline` (monotonic) is over."""

    deadline: float


@dataclass(slots=True)
class _Gone:
    """Inbox message: a connection ended."""

    connection: int


@dataclass(slots=True)
class _Command:
    connection: int
    message: ClientMessage
    arrived_at: float = field(default_factory=time.monotonic)


class _EngineThread(threading.Thread):
    """Owns the engine. Its only way in is `post`; its only ways out are the three callbacks.

    Attributes:
        failure: what broke the engine; None after an orderly end.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        on_answer: Callable[[int, HostMessage], None],
        on_outputs: Callable[[dict[int, list[TokenOutput]]], None],
        on_end: Callable[[], None],
    ) -> None:
        super().__init__(name="engine", daemon=True)
        self.failure: BaseException | None = None
        self._engine = engine
        self._on_answer = on_answer
        self._on_outputs = on_outputs
        self._on_end = on_end
        self._inbox: queue.SimpleQueue[_Command | _Gone | _Stop] = queue.SimpleQueue()
        self._running: dict[str, _Running] = {}
        self._bulk: deque[_BulkCall] = deque()
        self._stop_at: float | None = None
        self._num_failed_steps = 0

    def post(self, message: "_Command | _Gone | _Stop") -> None:
        self._inbox.put(message)

    def run(self) -> None:
        try:
            while not self._is_over():
                self._drain_inbox()
                if self._engine.has_work():
                    self._step()
                if self._bulk:
                    self._advance_bulk()
            self._fail_running("engine_dead", "the engine process is shutting down")
            self._engine.close()
        except BaseException as error:
            logger.exception("the engine is broken")
            self.failure = error
        finally:
            self._on_end()

    def _is_over(self) -> bool:
        if self._stop_at is None:
            return False
        idle = not self._running and not self._bulk
        return idle or time.monotonic() >= self._stop_at

    def _drain_inbox(self) -> None:
        """Take everything that waits; with nothing to run, wait for something."""
        try:
            if not self._engine.has_work() and not self._bulk:
                timeout = None
                if self._stop_at is not None:
                    timeout = max(self._stop_at - time.monotonic(), 0)
                self._take(self._inbox.get(timeout=timeout))
            while True:
                self._take(self._inbox.get_nowait())
        except queue.Empty:
            return

    def _take(self, posted: "_Command | _Gone | _Stop") -> None:
        if isinstance(posted, _Stop):
            self._stop_at = posted.deadline
        elif isinstance(posted, _Gone):
            owned = [key for key, r in self._running.items() if r.connection == posted.connection]
            for request_id in owned:
                self._abort(request_id)
            self._bulk = deque(b for b in self._bulk if b.connection != posted.connection)
        elif isinstance(posted.message, Abort):
            request_id = posted.message.request_id
            running = self._running.get(request_id)
            if running is not None and running.connection == posted.connection:
                self._abort(request_id)
            aborted = (posted.connection, request_id)
            self._bulk = deque(b for b in self._bulk if (b.connection, b.request_id) != aborted)
        else:
            origin = Origin() if isinstance(posted.message, Control) else posted.message.origin
            with caused_by(origin):
                self._perform(posted.connection, posted.message, posted.arrived_at)

    def _perform(
        self, connection: int, message: "Generate | Embed | Score | Control", arrived_at: float
    ) -> None:
        call_id = message.call_id
        try:
            if self._stop_at is not None and not isinstance(message, Control):
                raise EngineError("engine_dead", "the engine process is shutting down")
            answer = self._answer(connection, message, arrived_at)
        except EngineError as error:
            answer = Refused(call_id, error.code, error.message, error.param)
        except Exception as error:
            logger.exception("a call failed")
            answer = Refused(call_id, error_code(error), "the engine failed this call", None)
        if answer is not None:
            self._on_answer(connection, answer)

    def _answer(
        self, connection: int, message: "Generate | Embed | Score | Control", arrived_at: float
    ) -> HostMessage | None:
        """The answer; None where it comes when the last chunk is done."""
        if isinstance(message, Generate):
            self._submit(connection, message, arrived_at)
            return Done(message.call_id)
        if isinstance(message, Control):
            if message.operation == "stats":
                return Statistics(message.call_id, self._engine.stats())
            if message.operation == "sleep":
                self._engine.sleep()
            else:
                self._engine.wake()
            return Done(message.call_id)
        if len(self._bulk) >= MAX_BULK_CALLS:
            raise EngineError("queue_full", f"{MAX_BULK_CALLS} embed and score calls wait already")
        request_id = message.request.request_id
        self._bulk.append(
            _BulkCall(
                connection, message.call_id, request_id, _task(message), message.origin, arrived_at
            )
        )
        return None

    def _submit(self, connection: int, message: Generate, arrived_at: float) -> None:
        request = message.request
        if request.request_id in self._running:
            raise EngineError("invalid_value", "the request id is in use", "request_id")
        self._engine.submit(request)
        self._running[request.request_id] = _Running(
            connection,
            message.origin,
            len(request.token_ids),
            arrived_at=arrived_at,
            inbox_seconds=time.monotonic() - arrived_at,
        )

    def _abort(self, request_id: str) -> None:
        self._log_end(request_id, self._running.pop(request_id), "abort")
        self._engine.abort(request_id)

    def _log_end(self, request_id: str, running: _Running, finish_reason: str) -> None:
        fields: dict[str, object] = {
            "engine_request_id": request_id,
            "finish_reason": finish_reason,
            "prompt_tokens": running.num_prompt_tokens,
            "tokens": running.num_tokens,
            "seconds": round(time.monotonic() - running.arrived_at, 4),
        }
        if running.queue_seconds is not None and running.prefill_seconds is not None:
            fields["queue_seconds"] = round(running.queue_seconds, 4)
            fields["prefill_seconds"] = round(running.prefill_seconds, 4)
        with caused_by(running.origin):
            logger.info("generated", extra=fields)

    def _step(self) -> None:
        try:
            outputs = self._engine.step()
        except Exception as error:
            logger.exception("a step failed")
            self._num_failed_steps += 1
            if self._num_failed_steps >= MAX_FAILED_STEPS:
                raise
            self._fail_running(error_code(error), "the engine failed while it ran this request")
        else:
            self._num_failed_steps = 0
            self._send(outputs)

    def _fail_running(self, code: ErrorCode, message: str) -> None:
        """End every request with an error output, and every embed and score call with a refusal."""
        request_ids = list(self._running)
        for request_id in request_ids:
            self._engine.abort(request_id)
        self._send(
            TokenOutput(
                request_id=request_id, finish_reason="error", error=message, error_code=code
            )
            for request_id in request_ids
        )
        for call in self._bulk:
            self._on_answer(call.connection, Refused(call.call_id, code, message, None))
        self._bulk.clear()

    def _send(self, outputs: Iterable[TokenOutput]) -> None:
        by_connection: dict[int, list[TokenOutput]] = {}
        for output in outputs:
            running = self._running.get(output.request_id)
            if running is None:
                logger.error("an output for a request that does not run: %s", output.request_id)
                continue
            if output.queue_seconds is not None:
                queue_seconds = running.inbox_seconds + output.queue_seconds
                output = replace(output, queue_seconds=queue_seconds)
                running.queue_seconds = output.queue_seconds
                running.prefill_seconds = output.prefill_seconds
            by_connection.setdefault(running.connection, []).append(output)
            running.num_tokens += len(output.token_ids)
            if output.finish_reason is not None:
                del self._running[output.request_id]
                self._log_end(output.request_id, running, output.finish_reason)
        if by_connection:
            self._on_outputs(by_connection)

    def _advance_bulk(self) -> None:
        """One chunk of one call, in turn."""
        call = self._bulk.popleft()
        with caused_by(call.origin):
            answer = self._advance(call)
            if answer is None:
                self._bulk.append(call)
                return
            seconds = round(time.monotonic() - call.arrived_at, 4)
            fields = {"engine_request_id": call.request_id, "seconds": seconds}
            logger.info("answered", extra=fields | {"answer": type(answer).__name__.lower()})
        self._on_answer(call.connection, answer)

    def _advance(self, call: _BulkCall) -> HostMessage | None:
        try:
            return call.task.advance(self._engine)
        except EngineError as error:
            return Refused(call.call_id, error.code, error.message, error.param)
        except Exception as error:
            logger.exception("an embed or score call failed")
            return Refused(call.call_id, error_code(error), "the engine failed this call", None)


@dataclass(slots=True)
class _Connection:
    """One client's end, on the loop."""

    number: int
    writer: asyncio.StreamWriter
    max_unread_bytes: int
    is_open: bool = field(default=True)

    def send(self, message: HostMessage) -> None:
        """Write without waiting; a client that leaves too much unread is cut off."""
        if not self.is_open:
            return
        if self.writer.transport.get_write_buffer_size() > self.max_unread_bytes:
            logger.warning("connection %d closed: the client does not read", self.number)
            self.cut()
            return
        try:
            frame = encode_frame(message)
        except WireError as error:
            logger.warning("connection %d: %s", self.number, error)
            if isinstance(message, Hello | Outputs):
                self.cut()
                return
            text = f"the answer is too large: {error}"
            frame = encode_frame(Refused(message.call_id, "invalid_value", text, None))
        self.writer.write(frame)

    def cut(self) -> None:
        """End at once; what is unread is lost. The connection's reader notices and cleans up."""
        self.is_open = False
        self.writer.transport.abort()


class EngineHost:
    """Serves one engine on one Unix socket, from the calling event loop."""

    def __init__(
        self,
        engine: Engine,
        *,
        max_unread_bytes: int = MAX_UNREAD_BYTES,
        drain_seconds: float = DRAIN_SECONDS,
    ) -> None:
        self._info = engine.info
        self._max_unread_bytes = max_unread_bytes
        self._drain_seconds = drain_seconds
        self._connections: dict[int, _Connection] = {}
        self._num_connections = 0
        self._handlers: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended = asyncio.Event()
        self._is_stopping = False
        self._thread = _EngineThread(
            engine,
            on_answer=lambda number, message: self._on_loop(self._answer, number, message),
            on_outputs=lambda outputs: self._on_loop(self._deliver, outputs),
            on_end=lambda: self._on_loop(self._ended.set),
        )

    @property
    def failure(self) -> BaseException | None:
        """What broke the engine, once `serve` has returned."""
        return self._thread.failure

    async def serve(self, path: Path, *, on_ready: Callable[[], None] | None = None) -> None:
        """Listen until `stop` has let running requests end, or the engine breaks. Once only.

        Raises:
            SocketInUseError
        """
        self._loop = asyncio.get_running_loop()
        server = await asyncio.start_unix_server(self._accept, sock=bind_socket(path))
        self._thread.start()
        if on_ready is not None:
            on_ready()
        try:
            await self._ended.wait()
        finally:
            server.close()
            path.unlink(missing_ok=True)  # noqa: ASYNC240
            await self._close_connections()

    def stop(self) -> None:
        """Refuse new requests; running ones have `drain_seconds`. From the loop; again: at once."""
        seconds = 0.0 if self._is_stopping else self._drain_seconds
        self._is_stopping = True
        self._thread.post(_Stop(time.monotonic() + seconds))

    async def _close_connections(self) -> None:
        """Give what was written a moment to leave."""
        for connection in self._connections.values():
            connection.writer.close()
        if self._handlers:
            await asyncio.wait(self._handlers, timeout=FLUSH_SECONDS)
        for connection in self._connections.values():
            connection.cut()
        if self._handlers:
            await asyncio.wait(self._handlers)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._handlers.add(task)
        task.add_done_callback(self._handlers.discard)
        self._num_connections += 1
        connection = _Connection(self._num_connections, writer, self._max_unread_bytes)
        self._connections[connection.number] = connection
        connection.send(Hello(PROTOCOL_VERSION, self._info))
        try:
            while (body := await read_frame(reader)) is not None:
                self._thread.post(_Command(connection.number, decode_client(body)))
        except WireError as error:
            logger.warning("connection %d closed: %s", connection.number, error)
        except OSError as error:
            logger.info("connection %d broke: %s", connection.number, type(error).__name__)
        finally:
            connection.is_open = False
            del self._connections[connection.number]
            self._thread.post(_Gone(connection.number))
            writer.close()

    def _on_loop(self, callback: Callable[..., None], *arguments: object) -> None:
        """From the engine thread."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(callback, *arguments)
        except RuntimeError:  # the loop has closed: nobody is left to tell
            logger.info("the event loop has ended before the engine")

    def _answer(self, number: int, message: HostMessage) -> None:
        connection = self._connections.get(number)
        if connection is not None:
            connection.send(message)

    def _deliver(self, outputs: dict[int, list[TokenOutput]]) -> None:
        for number, group in outputs.items():
            self._answer(number, Outputs(tuple(group)))


def bind_socket(path: Path) -> socket.socket:
    """A listening socket that only this user can open; a stale file in its place is removed.

    Raises:
        SocketInUseError
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if path.exists():
        if not stat.S_ISSOCK(path.stat().st_mode):
            raise SocketInUseError("the socket's path is a file of another kind")
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(path))
            except OSError:
                path.unlink(missing_ok=True)
            else:
                raise SocketInUseError("another process serves this model on the same socket")
    listener = socket.socket(socket.AF_UNIX)
    previous = os.umask(0o177)
    try:
        listener.bind(str(path))
        listener.listen()
    except OSError:
        listener.close()
        raise
    finally:
        os.umask(previous)
    return listener


def say(status: str, **fields: object) -> None:
    """One status line; the supervisor reads them."""
    print(json.dumps({"status": status, **fields}), flush=True)


def run_host(
    load: Callable[[Progress], Engine],
    *,
    model_id: str,
    socket_path: Path,
    drain_seconds: float = DRAIN_SECONDS,
) -> int:
    """Load an engine and serve it until SIGTERM or SIGINT. Returns the process's exit code."""
    start = time.monotonic()

    def report(fraction: float) -> None:
        say("loading", model=model_id, fraction=round(fraction, 3))

    report(0.0)
    try:
        engine = load(report)
    except Exception as error:
        logger.exception("loading failed")
        say("failed", model=model_id, error=f"{type(error).__name__}: {error}")
        return 1
    seconds = round(time.monotonic() - start, 3)

    async def serve() -> EngineHost:
        host = EngineHost(engine, drain_seconds=drain_seconds)

        def stop() -> None:
            say("draining", model=model_id)
            host.stop()

        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop)
        ready = lambda: say("ready", model=model_id, load_seconds=seconds)  # noqa: E731
        await host.serve(socket_path, on_ready=ready)
        return host

    try:
        failure = asyncio.run(serve()).failure
    except (OSError, SocketInUseError) as error:
        failure = error
    if failure is not None:
        say("failed", model=model_id, error=f"{type(failure).__name__}: {failure}")
        return 1
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m engines.host", description=__doc__)
    parser.add_argument("--model-id", required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--max-num-seqs", type=int, default=16)
    parser.add_argument("--max-num-waiting", type=int, default=256)
    parser.add_argument("--max-num-batched-tokens", type=int, default=512)
    parser.add_argument("--kv-cache-bytes", type=int, help="default: see memory.py")
    parser.add_argument("--engine", choices=("auto", "native", "transformers"), default="auto")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--num-threads", type=int, help="default: all cores")
    parser.add_argument("--drain-seconds", type=float, default=DRAIN_SECONDS)
    parser.add_argument("--log-level", choices=LEVELS, default="info")
    arguments = parser.parse_args(argv)
    die_with_parent()
    set_torch_environment()
    set_up_logging(arguments.log_level)
    return run_host(
        lambda report: _load_engine(arguments, report),
        model_id=arguments.model_id,
        socket_path=arguments.socket,
        drain_seconds=arguments.drain_seconds,
    )


def _load_engine(arguments: argparse.Namespace, report: Progress) -> Engine:
    """Imports torch and transformers: not before the environment is set."""
    from compression.checkpoint import read_manifest

    kind = read_manifest(arguments.checkpoint).kind
    report(0.05)
    import torch

    torch.set_num_threads(arguments.num_threads or os.cpu_count() or 1)
    report(0.2)
    if kind == "encoder":
        from engines.encoder_engine import EncoderEngine

        return EncoderEngine.load(arguments.model_id, arguments.checkpoint, device=arguments.device)
    from engines.requests import EngineLimits

    load: Callable[..., Engine]
    if chooses_native(arguments.engine, arguments.checkpoint):
        from engines.engine import NativeEngine

        load = NativeEngine.load
    else:
        from engines.transformers_engine import TransformersEngine

        load = TransformersEngine.load
    engine = load(
        arguments.model_id,
        arguments.checkpoint,
        dtype=getattr(torch, arguments.dtype),
        device=arguments.device,
        limits=EngineLimits(
            max_num_seqs=arguments.max_num_seqs,
            max_num_waiting=arguments.max_num_waiting,
            max_num_batched_tokens=arguments.max_num_batched_tokens,
            kv_cache_bytes=arguments.kv_cache_bytes,
        ),
    )
    for op, implementation in engine.info.kernels.items():
        logger.info("%s: %s", op, implementation)
    return engine


def chooses_native(wish: str, checkpoint: Path) -> bool:
    """Whether the native engine serves a decoder; "auto" leaves it what it supports, and the rest to transformers.

    Raises:
        UnsupportedModelError: "native" was asked for and cannot be.
    """
    if wish == "transformers":
        return False
    from engines.model import UnsupportedModelError, read_decoder_config

    try:
        config = read_decoder_config(checkpoint)
    except UnsupportedModelError as error:
        if wish == "native":
            raise
        logger.info("engine: transformers, because the native one does not support %s", error)
        return False
    logger.info("engine: native, which supports model type %s", config.model_type)
    return True


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # An engine thread inside a long kernel would crash in the interpreter's teardown.
    os._exit(code)
