"""Stopping without cutting anybody off: who is still answered, what the others are told, and until when."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from service.errors import ApiError

POLL_SECONDS = 0.05


def draining() -> ApiError:
    return ApiError("draining", "the service is stopping; ask again when it is back")


class Drain:
    """Requests register here; once it has begun, no other gets in. Belongs to one event loop.

    Attributes:
        is_hurried: somebody asked a second time to stop.
    """

    def __init__(self) -> None:
        self.has_begun = False
        self.is_hurried = False
        self._running: set[asyncio.Timeout] = set()

    @asynccontextmanager
    async def admitted(self) -> AsyncIterator[None]:
        """Run a request.

        Raises:
            ApiError: draining: it came too late, or took longer than `end` allows.
        """
        if self.has_begun:
            raise draining()
        try:
            async with asyncio.timeout(None) as limit:
                self._running.add(limit)
                try:
                    yield
                finally:
                    self._running.discard(limit)
        except TimeoutError:
            if not limit.expired():
                raise
            raise draining() from None

    def begin(self) -> None:
        self.has_begun = True

    def end(self) -> None:
        """Stop what still runs."""
        now = asyncio.get_running_loop().time()
        for limit in self._running:
            limit.reschedule(now)

    async def wait(self, seconds: float) -> None:
        """Until nothing runs, at most so many seconds; not at all once `is_hurried`."""
        ends_at = time.monotonic() + seconds
        while self._running and not self.is_hurried and time.monotonic() < ends_at:  # noqa: ASYNC110 -- counted, not signalled
            await asyncio.sleep(POLL_SECONDS)
