"""Which job store: SQLite unless a Redis URL is set."""

from pathlib import Path

from jobs.sqlite import SqliteJobStore
from jobs.store import JobStore


def open_job_store(database: Path, redis_url: str | None) -> JobStore:
    """Open the store. Redis needs the extra `redis`."""
    if redis_url is None:
        return SqliteJobStore(database)
    from jobs.redis import RedisJobStore

    return RedisJobStore(redis_url)
