"""Server-sent events: framing, keep-alive comments, errors in mid-stream, and an end to work when a client leaves."""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeVar

import msgspec
from starlette.background import BackgroundTask
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from engines.protocol import EngineError
from service.errors import ApiError, from_engine_error

KEEP_ALIVE_SECONDS = 15.0
KEEP_ALIVE = ": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
MEDIA_TYPE = "text/event-stream"
# nginx is told to pass events on at once.
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
_TEXT = {"type": "string"}
_EVENT_SCHEMA = {
    "type": "object",
    "properties": {"id": _TEXT, "event": _TEXT, "data": _TEXT},
    "required": ["data"],
}
EVENT_STREAM: dict[int | str, dict[str, Any]] = {
    200: {"content": {MEDIA_TYPE: {"schema": _EVENT_SCHEMA}}}
}
"""OpenAPI's `responses` of a route that can stream: the schema is of one event, `data` is JSON."""
Event = TypeVar("Event", str, bytes)

logger = logging.getLogger("lathe.sse")


def encode_event(data: Any) -> bytes:
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


async def openai_events(chunks: AsyncGenerator[Any, None]) -> AsyncGenerator[bytes, None]:
    """Chunks as OpenAI streams them: `[DONE]` after a normal end only; an error is the last event."""
    try:
        async with aclosing(chunks):
            async for chunk in chunks:
                yield encode_event(chunk)
    except ApiError as error:
        yield encode_event(error.body())
    except EngineError as error:
        yield encode_event(from_engine_error(error).body())
    except Exception:
        logger.exception("a stream failed")
        yield encode_event(ApiError("internal_error", "internal error").body())
    else:
        yield DONE


async def with_keep_alive(
    events: AsyncIterator[Event], seconds: float = KEEP_ALIVE_SECONDS
) -> AsyncGenerator[Event | str, None]:
    """The events, and a comment after every so many seconds of silence, so that proxies keep the connection."""
    pending: asyncio.Future[Event | None] | None = None
    try:
        while True:
            pending = asyncio.ensure_future(_next(events))
            while not (await asyncio.wait({pending}, timeout=seconds))[0]:
                yield KEEP_ALIVE
            event = pending.result()
            if event is None:
                return
            yield event
    finally:
        if pending is not None and not pending.done():
            pending.cancel()
            await asyncio.gather(pending, return_exceptions=True)
        if isinstance(events, AsyncGenerator):
            await events.aclose()


async def _next(events: AsyncIterator[Event]) -> Event | None:
    return await anext(events, None)


class ChunkedResponse(Response):
    """Sends chunks as they come, and stops when the client leaves.

    Args:
        close: frees what the chunks come from; called once at the end, whatever the end is, even if nothing was sent.
    """

    def __init__(
        self,
        chunks: AsyncGenerator[bytes | str, None],
        close: Callable[[], Awaitable[None]],
        *,
        media_type: str,
    ) -> None:
        self._chunks = chunks
        self._close = close
        self.status_code = 200
        self.background: BackgroundTask | None = None
        self.body = b""
        self.init_headers({"Content-Type": media_type, **HEADERS})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writer = asyncio.ensure_future(self._write(send))
        watcher = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({writer, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if writer.done():
                writer.result()
        finally:
            for task in (writer, watcher):
                task.cancel()
            await asyncio.gather(writer, watcher, return_exceptions=True)
            await self._chunks.aclose()
            await self._close()

    async def _write(self, send: Send) -> None:
        headers = [item for item in self.raw_headers if item[0] != b"content-length"]
        await send({"type": "http.response.start", "status": self.status_code, "headers": headers})
        async with aclosing(self._chunks) as chunks:
            async for chunk in chunks:
                body = chunk.encode() if isinstance(chunk, str) else chunk
                await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


class EventStreamResponse(ChunkedResponse):
    """Encoded events, and a comment in every silence."""

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        close: Callable[[], Awaitable[None]],
        *,
        keep_alive_seconds: float = KEEP_ALIVE_SECONDS,
    ) -> None:
        async def close_events() -> None:
            await events.aclose()  # of a response that never began
            await close()

        super().__init__(
            with_keep_alive(events, keep_alive_seconds),
            close_events,
            media_type=f"{MEDIA_TYPE}; charset=utf-8",
        )


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
