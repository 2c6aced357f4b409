"""Server-sent events: eager errors, lazy tokens, and a request that ends when its reader leaves."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from engines.protocol import EngineError
from service.errors import ApiError, from_engine_error

KEEP_ALIVE_SECONDS = 15.0
MEDIA_TYPE = "text/event-stream"
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def data_event(payload: Any) -> str:
    return f"data: {json.dumps(payload, ensure_ascii=True)}\n\n"


async def stream_events(chunks: Any) -> AsyncIterator[str]:
    """Write chunks as events, then [DONE]. An error after the first byte is an event of its own, and no [DONE] follows.

    Leaving this generator closes `chunks`, which aborts what still runs.
    """
    async with aclosing(with_keep_alive(chunks)) as events:
        try:
            async for event in events:
                yield event if isinstance(event, str) else data_event(event)
        except EngineError as error:
            yield data_event(from_engine_error(error).body())
            return
        except ApiError as error:
            yield data_event(error.body())
            return
    yield "data: [DONE]\n\n"


async def with_keep_alive(chunks: Any) -> AsyncIterator[Any]:
    """The chunks, and a comment after every 15 seconds of silence, so that proxies keep the connection."""
    iterator = aiter(chunks)
    pending: asyncio.Task[Any] | None = None
    try:
        while True:
            if pending is None:
                pending = asyncio.ensure_future(anext(iterator))
            done, _ = await asyncio.wait({pending}, timeout=KEEP_ALIVE_SECONDS)
            if not done:
                yield ": keep-alive\n\n"
                continue
            task, pending = pending, None
            try:
                yield task.result()
            except StopAsyncIteration:
                return
    finally:
        if pending is not None:
            pending.cancel()
            await asyncio.gather(pending, return_exceptions=True)
        await chunks.aclose()
