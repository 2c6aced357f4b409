"""Tells whoever follows a job that it has news. The store is asked once per job and poll, however many follow."""

import asyncio
from dataclasses import dataclass, field

import anyio

from jobs.store import JobStore
from service.errors import ApiError

POLL_SECONDS = 0.5


@dataclass(slots=True)
class _Feed:
    last_seq: int = 0
    num_followers: int = 0
    error: Exception | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    task: "asyncio.Task[None] | None" = None

    def wake(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()


class JobFeeds:
    """Belongs to one event loop."""

    def __init__(self, jobs: JobStore) -> None:
        self._jobs = jobs
        self._feeds: dict[str, _Feed] = {}
        self._closed: ApiError | None = None

    async def news(self, job_id: str, after: int) -> None:
        """Return once the job has an event behind `after`.

        Raises:
            ApiError: what the feeds were closed with. Else whatever the store raises.
        """
        if self._closed is not None:
            raise self._closed
        feed = self._feeds.get(job_id)
        if feed is None:
            feed = self._feeds[job_id] = _Feed()
            feed.task = asyncio.create_task(self._watch(job_id, feed), name=f"feed {job_id}")
        feed.num_followers += 1
        try:
            while feed.last_seq <= after:
                await feed.changed.wait()
                if feed.error is not None:
                    raise feed.error
        finally:
            feed.num_followers -= 1
            if not feed.num_followers:
                self._drop(job_id, feed)

    def close(self, error: ApiError) -> None:
        """Have every follower raise an error, and those that come."""
        self._closed = error
        for job_id, feed in list(self._feeds.items()):
            self._fail(job_id, feed, error)

    async def _watch(self, job_id: str, feed: _Feed) -> None:
        try:
            while True:
                events = await anyio.to_thread.run_sync(
                    lambda: self._jobs.newest_events(job_id, limit=1)
                )
                if events and events[-1].seq > feed.last_seq:
                    feed.last_seq = events[-1].seq
                    feed.wake()
                await asyncio.sleep(POLL_SECONDS)
        except Exception as error:  # every follower raises it
            self._fail(job_id, feed, error)

    def _fail(self, job_id: str, feed: _Feed, error: Exception) -> None:
        feed.error = error
        self._drop(job_id, feed)
        feed.wake()

    def _drop(self, job_id: str, feed: _Feed) -> None:
        if self._feeds.get(job_id) is feed:
            del self._feeds[job_id]
        if feed.task is not None and feed.task is not asyncio.current_task():
            feed.task.cancel()
