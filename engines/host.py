"""The engine host: the process that owns one loaded model and steps it. One thread owns the engine, one loop
the sockets.

    python -m engines.host --model-id ID --checkpoint DIR --socket PATH

Tokens of a step leave in one frame per connection. A connection that ends takes its requests with it; one that does not
read is cut off, so it can never hold up the engine. Status goes to stdout as JSON lines: "loading", "ready", "failed".
"""

import argparse
import asyncio
import contextlib
import json
import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from engines.process import die_with_parent, set_openmp_environment
from engines.protocol import (
    Engine,
    EngineError,
    ErrorCode,
    GenerateRequest,
    TokenOutput,
)
from engines.wire import (
    METHODS,
    Abort,
    Call,
    ErrorInfo,
    Outputs,
    Reply,
    WireError,
    decode_payload,
    encode_frame,
    encode_payload,
    read_frame,
)

MAX_UNREAD_BYTES = 32 * 2**20
MAX_FAILED_STEPS = 3
DRAIN_SECONDS = 30.0
_IDLE_SECONDS = 0.5

logger = logging.getLogger("lathe.host")


class BrokenEngineError(Exception):
    """Steps keep failing; the process must end so that the supervisor starts a fresh one."""


class _EngineThread(threading.Thread):
    """Runs commands and steps, in that order, for as long as the host lives."""

    def __init__(
        self,
        engine: Engine,
        on_outputs: Callable[[list[TokenOutput]], None],
        on_broken: Callable[[], None],
    ) -> None:
        super().__init__(name="engine", daemon=True)
        self._engine = engine
        self._on_outputs = on_outputs
        self._on_broken = on_broken
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._running: set[str] = set()
        self._failed_steps = 0
        self.last_output_at: float | None = None

    def call(self, command: Callable[[], None]) -> None:
        self._inbox.put(command)

    def stop(self) -> None:
        self._inbox.put(None)

    def submit(self, request: GenerateRequest) -> None:
        """On the engine thread."""
        self._engine.submit(request)
        self._running.add(request.request_id)

    def abort(self, request_id: str) -> None:
        """On the engine thread."""
        self._engine.abort(request_id)
        self._running.discard(request_id)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def run(self) -> None:
        try:
            while self._run_commands():
                if self._engine.has_work():
                    self._step()
        except BrokenEngineError:
            logger.exception("the engine is broken")
            self._engine.close()
            self._on_broken()

    def _run_commands(self) -> bool:
        """Run what waits in the inbox; wait for something when there is no work. False to stop."""
        block = not self._engine.has_work()
        while True:
            try:
                command = self._inbox.get(block=block, timeout=_IDLE_SECONDS if block else None)
            except queue.Empty:
                return True
            if command is None:
                self._engine.close()
                return False
            command()
            block = False

    def _step(self) -> None:
        try:
            outputs = self._engine.step()
        except Exception as error:
            outputs = self._fail_all(error)
        else:
            self._failed_steps = 0
        if outputs:
            self.last_output_at = time.time()
            for output in outputs:
                if output.finish_reason is not None:
                    self._running.discard(output.request_id)
            self._on_outputs(outputs)

    def _fail_all(self, error: Exception) -> list[TokenOutput]:
        """A step that raises has lost the state of every running request; they get an error each."""
        logger.error("step failed", exc_info=error)
        self._failed_steps += 1
        code: ErrorCode = "internal_error"
        if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
            code = "out_of_memory"
        outputs = []
        for request_id in sorted(self._running):
            self._engine.abort(request_id)
            outputs.append(
                TokenOutput(
                    request_id=request_id,
                    finish_reason="error",
                    error="the engine failed while it ran this request",
                    error_code=code,
                )
            )
        if self._failed_steps >= MAX_FAILED_STEPS:
            self._on_outputs(outputs)
            raise BrokenEngineError(f"{self._failed_steps} steps failed in a row") from error
        return outputs


class EngineHost:
    """Serves one engine on one Unix socket. `serve` runs until `stop` is called or the engine breaks."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._connections: dict[int, _Connection] = {}
        self._next_connection = 0
        self._readers: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopped: asyncio.Event | None = None
        self._draining = False
        self.broken = False
        self.thread = _EngineThread(engine, self._post_outputs, self._post_broken)

    async def serve(
        self, socket_path: Path, *, on_ready: Callable[[], None] = lambda: None
    ) -> None:
        """Listen until stopped. The socket is for this user only; a stale one is replaced."""
        self._loop = asyncio.get_running_loop()
        self._stopped = asyncio.Event()
        _clear(socket_path)
        previous = os.umask(0o177)
        try:
            server = await asyncio.start_unix_server(self._accept, path=str(socket_path))
        finally:
            os.umask(previous)
        self.thread.start()
        on_ready()
        try:
            await self._stopped.wait()
            await self._drain()
        finally:
            server.close()
            for connection in list(self._connections.values()):
                connection.close()
            await asyncio.gather(*self._readers)
            self.thread.stop()
            await asyncio.to_thread(self.thread.join)
            _clear(socket_path)

    def stop(self) -> None:
        """Refuse new requests, let running ones end for a while, then return from `serve`."""
        self._draining = True
        if self._stopped is not None:
            self._stopped.set()

    async def _drain(self) -> None:
        deadline = time.monotonic() + (0 if self.broken else DRAIN_SECONDS)
        # the engine thread sets no event
        while self.thread.num_running and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.05)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._readers.add(task)
        task.add_done_callback(self._readers.discard)
        connection = _Connection(self, self._next_connection, writer)
        self._connections[self._next_connection] = connection
        self._next_connection += 1
        try:
            while (message := await read_frame(reader)) is not None:
                connection.handle(message)
        except (WireError, OSError) as error:
            logger.warning("connection closed: %s", error)
        finally:
            self._connections.pop(connection.number, None)
            connection.close()

    def engine_call(
        self, work: Callable[[], Any], done: Callable[[Reply], None], call_id: int
    ) -> None:
        """Run `work` on the engine thread and hand its reply to `done` on the loop."""
        loop = self._loop
        assert loop is not None

        def command() -> None:
            loop.call_soon_threadsafe(done, _reply(call_id, work))

        self.thread.call(command)

    def methods(self, connection: "_Connection") -> dict[str, Callable[[Any], Any]]:
        """What each call does; run on the engine thread."""

        def generate(request: GenerateRequest) -> None:
            if self._draining:
                raise EngineError("engine_dead", "the engine host is shutting down")
            self.thread.submit(replace(request, request_id=connection.scoped(request.request_id)))

        return {
            "info": lambda _: self._engine.info,
            "stats": lambda _: replace(
                self._engine.stats(), last_output_at=self.thread.last_output_at
            ),
            "generate": generate,
            "embed": self._embed,
            "score": self._score,
            "sleep": lambda _: self._engine.sleep(),
            "wake": lambda _: self._engine.wake(),
        }

    def _embed(self, request: Any) -> Any:
        result = self._engine.embed(request)
        self.thread.last_output_at = time.time()
        return result

    def _score(self, request: Any) -> Any:
        result = self._engine.score(request)
        self.thread.last_output_at = time.time()
        return result

    def _post_outputs(self, outputs: list[TokenOutput]) -> None:
        """From the engine thread: one hop to the loop for a whole step."""
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed: the host is ending
            self._loop.call_soon_threadsafe(self._send_outputs, outputs)

    def _send_outputs(self, outputs: list[TokenOutput]) -> None:
        by_connection: dict[int, list[TokenOutput]] = {}
        for output in outputs:
            number, _, request_id = output.request_id.partition(":")
            by_connection.setdefault(int(number), []).append(replace(output, request_id=request_id))
        for key, group in by_connection.items():
            connection = self._connections.get(key)
            if connection is not None:
                connection.send_outputs(group)

    def _post_broken(self) -> None:
        assert self._loop is not None
        self.broken = True
        self._loop.call_soon_threadsafe(self.stop)


def _clear(socket_path: Path) -> None:
    socket_path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    socket_path.unlink(missing_ok=True)


class _Connection:
    """One client: its requests, and its end of the socket."""

    def __init__(self, host: EngineHost, number: int, writer: asyncio.StreamWriter) -> None:
        self.number = number
        self._host = host
        self._writer = writer
        self._methods = host.methods(self)
        self._request_ids: set[str] = set()
        self._closed = False

    def scoped(self, request_id: str) -> str:
        """Ids of different clients never meet."""
        return f"{self.number}:{request_id}"

    def handle(self, message: object) -> None:
        """Raises: WireError: a message that only a host may send, or a malformed payload."""
        if isinstance(message, Abort):
            self._request_ids.discard(message.request_id)
            self._host.thread.call(lambda: self._host.thread.abort(self.scoped(message.request_id)))
            return
        if not isinstance(message, Call):
            raise WireError(f"unexpected {type(message).__name__}")
        if message.method not in METHODS:
            self._reply(_error(message.id, EngineError("invalid_value", "unknown method")))
            return
        payload_type = METHODS[message.method][0]
        payload = decode_payload(message.payload, payload_type)
        if isinstance(payload, GenerateRequest):
            self._request_ids.add(payload.request_id)
        method = self._methods[message.method]
        self._host.engine_call(lambda: method(payload), self._reply, message.id)

    def send_outputs(self, outputs: list[TokenOutput]) -> None:
        for output in outputs:
            if output.finish_reason is not None:
                self._request_ids.discard(output.request_id)
        self._write(encode_frame(Outputs(outputs)))

    def close(self) -> None:
        """Close the socket and abort what still runs for it."""
        if self._closed:
            return
        self._closed = True
        self._writer.close()
        for request_id in self._request_ids:
            scoped = self.scoped(request_id)
            self._host.thread.call(lambda scoped=scoped: self._host.thread.abort(scoped))  # type: ignore[misc]

    def _reply(self, reply: Reply) -> None:
        self._write(encode_frame(reply))

    def _write(self, frame: bytes) -> None:
        if self._closed:
            return
        self._writer.write(frame)
        if self._writer.transport.get_write_buffer_size() > MAX_UNREAD_BYTES:
            logger.warning("connection closed: the client does not read")
            self._writer.transport.abort()


def _reply(call_id: int, work: Callable[[], Any]) -> Reply:
    try:
        return Reply(call_id, encode_payload(work()))
    except EngineError as error:
        return _error(call_id, error)
    except Exception as error:
        logger.exception("call failed")
        code: ErrorCode = "internal_error"
        if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
            code = "out_of_memory"
        return _error(call_id, EngineError(code, "the engine failed this call"))


def _error(call_id: int, error: EngineError) -> Reply:
    return Reply(call_id, error=ErrorInfo(error.code, error.message, error.param))


def _status(**fields: object) -> None:
    print(json.dumps(fields), flush=True)


def _build_engine(arguments: argparse.Namespace) -> Engine:
    from compression.checkpoint import read_manifest

    if read_manifest(arguments.checkpoint).kind == "encoder":
        from engines.encoder_engine import EncoderEngine

        return EncoderEngine.load(arguments.model_id, arguments.checkpoint)
    from engines.transformers_engine import TransformersEngine

    return TransformersEngine.load(
        arguments.model_id, arguments.checkpoint, max_num_seqs=arguments.max_num_seqs
    )


async def _serve(host: EngineHost, socket_path: Path, ready: Callable[[], None]) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, host.stop)
    await host.serve(socket_path, on_ready=ready)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m engines.host")
    parser.add_argument("--model-id", required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--max-num-seqs", type=int, default=16)
    parser.add_argument("--num-threads", type=int, default=0, help="0: as many as torch chooses")
    arguments = parser.parse_args(argv)
    die_with_parent()
    set_openmp_environment()
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(name)s %(message)s")
    start = time.monotonic()
    _status(status="loading", model=arguments.model_id)
    try:
        if arguments.num_threads:
            import torch

            torch.set_num_threads(arguments.num_threads)
        engine = _build_engine(arguments)
    except Exception as error:
        logger.exception("loading failed")
        _status(status="failed", model=arguments.model_id, error=f"{type(error).__name__}: {error}")
        return 1
    host = EngineHost(engine)
    seconds = round(time.monotonic() - start, 2)
    asyncio.run(
        _serve(
            host,
            arguments.socket,
            lambda: _status(status="ready", model=arguments.model_id, load_seconds=seconds),
        )
    )
    return 1 if host.broken else 0


if __name__ == "__main__":
    sys.exit(main())
