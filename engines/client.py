"""The other end of an engine host's socket: one connection that carries all requests of a process."""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

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
    METHODS,
    Abort,
    Call,
    Outputs,
    Reply,
    WireError,
    decode_payload,
    encode_frame,
    encode_payload,
    read_frame,
)

MAX_TEXTS_PER_CALL = 32
"""Texts of one embed call; more are sent as several, so that steps of running requests come between."""


class ClientStream(TokenStream):
    """Outputs of one request, in order. Ends after the output that has a finish_reason."""

    def __init__(self, client: "EngineClient", request_id: str) -> None:
        self._client = client
        self._request_id = request_id
        self._queue: asyncio.Queue[TokenOutput | EngineError] = asyncio.Queue()
        self._ended = False

    def put(self, item: TokenOutput | EngineError) -> None:
        self._queue.put_nowait(item)

    def __aiter__(self) -> AsyncIterator[TokenOutput]:
        return self

    async def __anext__(self) -> TokenOutput:
        if self._ended:
            raise StopAsyncIteration
        item = await self._queue.get()
        if isinstance(item, EngineError):
            self._end()
            raise item
        if item.finish_reason is not None:
            self._end()
        if item.finish_reason == "error":
            code = item.error_code or "internal_error"
            raise EngineError(code, item.error or "the engine failed this request")
        return item

    async def aclose(self) -> None:
        """Abort the request if it still runs."""
        if not self._ended:
            self._end()
            self._client.abort(self._request_id)

    def _end(self) -> None:
        self._ended = True
        self._client.forget(self._request_id)


class EngineClient(AsyncEngine):
    """An `AsyncEngine` behind a Unix socket. Belongs to one event loop."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._ids = itertools.count(1)
        self._calls: dict[int, asyncio.Future[Reply]] = {}
        self._streams: dict[str, ClientStream] = {}
        self._info: EngineInfo | None = None
        self._dead: EngineError | None = None
        self._task = asyncio.create_task(self._read(), name="engine-client")

    @classmethod
    async def connect(cls, socket_path: Path, timeout_seconds: float = 5.0) -> "EngineClient":
        """Connect and learn what the engine is.

        Raises:
            EngineError: engine_dead, nobody answers.
        """
        try:
            async with asyncio.timeout(timeout_seconds):
                reader, writer = await asyncio.open_unix_connection(str(socket_path))
                client = cls(reader, writer)
                client._info = await client._call("info", None)
                return client
        except (OSError, TimeoutError) as error:
            raise EngineError(
                "engine_dead", f"no engine answers: {type(error).__name__}"
            ) from error

    @property
    def info(self) -> EngineInfo:
        assert self._info is not None, "connect() sets it"
        return self._info

    @property
    def is_dead(self) -> bool:
        """The connection ended; every call raises engine_dead from now on."""
        return self._dead is not None

    async def generate(self, request: GenerateRequest) -> ClientStream:
        stream = ClientStream(self, request.request_id)
        if request.request_id in self._streams:
            raise EngineError("invalid_value", "request_id is in use", "request_id")
        self._streams[request.request_id] = stream
        try:
            await self._call("generate", request)
        except EngineError:
            self.forget(request.request_id)
            raise
        except asyncio.CancelledError:
            await stream.aclose()
            raise
        return stream

    async def embed(self, request: EmbedRequest) -> EmbedResult:
        parts: list[EmbedResult] = []
        for start in range(0, max(len(request.token_ids), 1), MAX_TEXTS_PER_CALL):
            texts = request.token_ids[start : start + MAX_TEXTS_PER_CALL]
            parts.append(await self._call("embed", replace(request, token_ids=texts)))
        return EmbedResult(
            dim=parts[0].dim,
            vectors=b"".join(part.vectors for part in parts),
            num_tokens=sum(part.num_tokens for part in parts),
        )

    async def score(self, request: ScoreRequest) -> ScoreResult:
        result: ScoreResult = await self._call("score", request)
        return result

    async def sleep(self) -> None:
        await self._call("sleep", None)

    async def wake(self) -> None:
        await self._call("wake", None)

    async def stats(self) -> EngineStats:
        result: EngineStats = await self._call("stats", None)
        return result

    def abort(self, request_id: str) -> None:
        if self._dead is None:
            self._writer.write(encode_frame(Abort(request_id)))

    def forget(self, request_id: str) -> None:
        self._streams.pop(request_id, None)

    async def aclose(self) -> None:
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    async def _call(self, method: str, payload: object) -> Any:
        if self._dead is not None:
            raise self._dead
        call_id = next(self._ids)
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._calls[call_id] = future
        try:
            self._writer.write(encode_frame(Call(call_id, method, encode_payload(payload))))
            with contextlib.suppress(ConnectionError):  # the reader task reports the end
                await self._writer.drain()
            reply = await future
        finally:
            self._calls.pop(call_id, None)
        if reply.error is not None:
            raise EngineError(reply.error.code, reply.error.message, reply.error.param)
        return decode_payload(reply.payload, METHODS[method][1])

    async def _read(self) -> None:
        reason = "the engine host ended"
        try:
            while (message := await read_frame(self._reader)) is not None:
                if isinstance(message, Outputs):
                    for output in message.outputs:
                        stream = self._streams.get(output.request_id)
                        if stream is not None:  # else aborted meanwhile
                            stream.put(output)
                elif isinstance(message, Reply):
                    future = self._calls.get(message.id)
                    if future is not None and not future.done():
                        future.set_result(message)
        except (WireError, OSError) as error:
            reason = f"the connection to the engine host broke: {type(error).__name__}"
        finally:
            self._fail(EngineError("engine_dead", reason))

    def _fail(self, error: EngineError) -> None:
        self._dead = error
        self._writer.close()
        for future in self._calls.values():
            if not future.done():
                future.set_exception(error)
        for stream in list(self._streams.values()):
            stream.put(error)
