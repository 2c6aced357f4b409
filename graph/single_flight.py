"""Single flight: work that several ask for at the same time is done once (as Go's x/sync/singleflight), and is given up
when nobody waits for it any more."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(slots=True)
class _Flight(Generic[T]):
    task: "asyncio.Task[T]"
    num_waiting: int = 0


class SingleFlight(Generic[T]):
    """Work in progress, by key. Belongs to one event loop."""

    def __init__(self) -> None:
        self._flights: dict[bytes, _Flight[T]] = {}

    @property
    def num_waiting(self) -> int:
        return sum(flight.num_waiting for flight in self._flights.values())

    async def run(self, key: bytes, work: Callable[[], Awaitable[T]]) -> tuple[T, bool]:
        """The result of the work for `key`, and whether this call started it.

        The work is a task of its own: a caller that is cancelled leaves it to the others, the last one cancels it.
        What it raises is raised to everyone who waits.
        """
        flight = self._flights.get(key)
        started = flight is None
        if flight is None:
            flight = _Flight(asyncio.create_task(_awaited(work)))
            flight.task.add_done_callback(_mark_retrieved)
            self._flights[key] = flight
        flight.num_waiting += 1
        try:
            return await asyncio.shield(flight.task), started
        finally:
            flight.num_waiting -= 1
            if flight.num_waiting == 0:
                if self._flights.get(key) is flight:
                    del self._flights[key]
                flight.task.cancel()  # nothing happens to a task that is done


async def _awaited(work: Callable[[], Awaitable[T]]) -> T:
    return await work()


def _mark_retrieved(task: "asyncio.Task[T]") -> None:
    """An error that nobody waited for is no news."""
    if not task.cancelled():
        task.exception()
