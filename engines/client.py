"""The API process's end of an engine host's socket: one connection carries all requests, many at a time.

Reconnecting is the caller's matter: a client whose host ended stays dead.
"""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

from engines.origin import current_origin
from engines.protocol import (
    AsyncEngine,
    EmbedRequest,
    EmbedResult,
    EngineError,
    EngineInfo,
    EngineStats,
    GenerateRequest,
    ScoreRequest,
    ScoreResult,
    TokenOutput,
    TokenStream,
)
from engines.wire import (
    PROTOCOL_VERSION,
    Abort,
    Answer,
    ClientMessage,
    Control,
    Done,
    Embed,
    Embedded,
    Generate,
    Hello,
    Outputs,
    Refused,
    Score,
    Scored,
    Statistics,
    WireError,
    decode_host,
    encode_frame,
    read_frame,
)

BuildMessage = Callable[[int], ClientMessage]
"""Makes the message of a call from its id."""


class ClientTokenStream(TokenStream):
    """Outputs of one request, in order; the one with a `finish_reason` is the last.

    A request that fails raises its `EngineError` here, after the tokens that came before; no output with
    finish_reason "error" gets through. Outputs that arrived since the last read come merged into one: a slow reader
    holds at most its own request's `max_tokens` tokens, and never holds up another stream.
    """

    def __init__(self, client: "EngineClient", request_id: str) -> None:
        self._client = client
        self._request_id = request_id
        self._unread: list[TokenOutput] = []
        self._failure: EngineError | None = None
        self._arrived = asyncio.Event()
        self._ended = False

    def put(self, output: TokenOutput) -> None:
        if output.finish_reason == "error":
            code = output.error_code or "internal_error"
            self.fail(EngineError(code, output.error or "the engine failed this request"))
            return
        self._unread.append(output)
        self._arrived.set()

    def fail(self, error: EngineError) -> None:
        """What has arrived can still be read; then comes the error."""
        self._failure = error
        self._arrived.set()

    def __aiter__(self) -> AsyncIterator[TokenOutput]:
        return self

    async def __anext__(self) -> TokenOutput:
        if self._ended:
            raise StopAsyncIteration
        await self._arrived.wait()
        if not self._unread:
            if self._failure is None:  # closed by another task
                raise StopAsyncIteration
            self._end()
            raise self._failure
        output = _merge(self._unread)
        self._unread = []
        if self._failure is None:
            self._arrived.clear()
        if output.finish_reason is not None:
            self._end()
        return output

    async def aclose(self) -> None:
        """Abort the request unless it has ended; a reader that waits meanwhile sees the end."""
        if self._ended:
            return
        has_ended = any(output.finish_reason for output in self._unread)
        running = not has_ended and self._failure is None
        self._unread = []
        self._end()
        self._arrived.set()
        if running:
            self._client.abort(self._request_id)

    def _end(self) -> None:
        self._ended = True
        self._client.forget(self._request_id)


class EngineClient(AsyncEngine):
    """An `AsyncEngine` behind a Unix socket. Belongs to the event loop that connected it.

    Attributes:
        closed: set once the connection has ended; every call then raises "engine_dead", or what it was closed with.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.closed = asyncio.Event()
        self._reader = reader
        self._writer = writer
        self._call_ids = itertools.count(1)
        self._calls: dict[int, asyncio.Future[Answer]] = {}
        self._streams: dict[str, ClientTokenStream] = {}
        self._info: EngineInfo | None = None
        self._failure: EngineError | None = None
        self._task: asyncio.Task[None] | None = None

    @classmethod
    async def connect(cls, socket_path: Path, timeout_seconds: float = 5.0) -> "EngineClient":
        """Connect, and learn what the engine is.

        Raises:
            EngineError: "engine_dead": nobody answers, or not in this protocol.
        """
        client: EngineClient | None = None
        try:
            async with asyncio.timeout(timeout_seconds):
                client = cls(*await asyncio.open_unix_connection(str(socket_path)))
                client._info = await client._read_hello()
        except (OSError, TimeoutError, WireError) as error:
            if client is not None:
                client._writer.transport.abort()
            message = "the engine does not answer"
            if isinstance(error, WireError):
                message = f"the engine speaks another protocol: {error}"
            raise EngineError("engine_dead", message) from error
        client._task = asyncio.create_task(client._read_messages(), name="engine-client")
        return client

    @property
    def info(self) -> EngineInfo:
        assert self._info is not None, "connect() sets it"
        return self._info

    @property
    def is_dead(self) -> bool:
        return self._failure is not None

    async def generate(self, request: GenerateRequest) -> ClientTokenStream:
        request_id = request.request_id
        if request_id in self._streams:
            raise EngineError("invalid_value", f"request id {request_id} is in use", "request_id")
        stream = ClientTokenStream(self, request_id)
        self._streams[request_id] = stream
        try:
            await self._call(lambda call_id: Generate(call_id, request, current_origin()))
        except EngineError:
            self.forget(request_id)
            raise
        except asyncio.CancelledError:
            await stream.aclose()
            raise
        return stream

    async def embed(self, request: EmbedRequest) -> EmbedResult:
        answer = await self._bulk_call(
            request.request_id, lambda id_: Embed(id_, request, current_origin())
        )
        assert isinstance(answer, Embedded)
        return answer.result

    async def score(self, request: ScoreRequest) -> ScoreResult:
        answer = await self._bulk_call(
            request.request_id, lambda id_: Score(id_, request, current_origin())
        )
        assert isinstance(answer, Scored)
        return answer.result

    async def sleep(self) -> None:
        await self._control("sleep")

    async def wake(self) -> None:
        await self._control("wake")

    async def stats(self) -> EngineStats:
        answer = await self._control("stats")
        assert isinstance(answer, Statistics)
        return answer.result

    def abort(self, request_id: str) -> None:
        """End a request of this client; one that is unknown or has ended is ignored."""
        if not self.is_dead:
            self._writer.write(encode_frame(Abort(request_id)))

    def forget(self, request_id: str) -> None:
        self._streams.pop(request_id, None)

    async def aclose(self, error: EngineError | None = None) -> None:
        """Leave: the host aborts what still runs for this client, which ends with `error`."""
        self._fail(error or EngineError("engine_dead", "the client was closed"))
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    async def _control(self, operation: Literal["stats", "sleep", "wake"]) -> Answer:
        return await self._call(lambda call_id: Control(call_id, operation))

    async def _bulk_call(self, request_id: str, build: BuildMessage) -> Answer:
        try:
            return await self._call(build)
        except asyncio.CancelledError:
            self.abort(request_id)
            raise

    async def _call(self, build: BuildMessage) -> Answer:
        if self._failure is not None:
            raise _copy(self._failure)
        call_id = next(self._call_ids)
        try:
            frame = encode_frame(build(call_id))
        except WireError as error:
            raise EngineError("invalid_value", f"the request is too large: {error}") from None
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._calls[call_id] = future
        try:
            self._writer.write(frame)
            with contextlib.suppress(ConnectionError):  # the reading task fails the future
                await self._writer.drain()
            answer = await future
        finally:
            del self._calls[call_id]
        if isinstance(answer, Refused):
            raise EngineError(answer.code, answer.message, answer.param)
        return answer

    async def _read_hello(self) -> EngineInfo:
        body = await read_frame(self._reader)
        if body is None:
            raise WireError("the host closed the connection")
        message = decode_host(body)
        if not isinstance(message, Hello) or message.version != PROTOCOL_VERSION:
            raise WireError(f"expected a greeting of version {PROTOCOL_VERSION}")
        return message.info

    async def _read_messages(self) -> None:
        reason = "the engine process ended"
        try:
            while (body := await read_frame(self._reader)) is not None:
                self._take(decode_host(body))
        except WireError as error:
            reason = f"the connection to the engine broke: {error}"
        except OSError as error:
            reason = f"the connection to the engine broke: {type(error).__name__}"
        finally:
            self._fail(EngineError("engine_dead", reason))

    def _take(self, message: object) -> None:
        if isinstance(message, Outputs):
            for output in message.outputs:
                stream = self._streams.get(output.request_id)
                if stream is not None:  # else it was aborted while this was under way
                    stream.put(output)
        elif isinstance(message, Done | Refused | Embedded | Scored | Statistics):
            future = self._calls.get(message.call_id)
            if future is not None and not future.done():
                future.set_result(message)
        else:
            raise WireError(f"unexpected {type(message).__name__}")

    def _fail(self, error: EngineError) -> None:
        if self._failure is not None:
            return
        self._failure = error
        self._writer.close()
        for future in self._calls.values():
            if not future.done():
                future.set_exception(_copy(self._failure))
        for stream in self._streams.values():
            stream.fail(_copy(self._failure))
        self.closed.set()


def _copy(error: EngineError) -> EngineError:
    """Each raise gets its own instance, so that tracebacks do not pile up on a shared one."""
    return EngineError(error.code, error.message, error.param)


def _merge(outputs: list[TokenOutput]) -> TokenOutput:
    """One output that says what all of them say; the counters and the end are the last one's."""
    if len(outputs) == 1:
        return outputs[0]
    logprobs = [o.logprobs for o in outputs if o.logprobs is not None]
    return replace(
        outputs[-1],
        token_ids=tuple(token_id for o in outputs for token_id in o.token_ids),
        logprobs=tuple(entry for part in logprobs for entry in part) if logprobs else None,
        prompt_logprobs=outputs[0].prompt_logprobs,
        queue_seconds=outputs[0].queue_seconds,
        prefill_seconds=outputs[0].prefill_seconds,
    )
