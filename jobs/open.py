"""Which job store: SQLite unless a Redis URL is set; and how either says that it cannot be reached."""

import sqlite3
from contextlib import suppress
from pathlib import Path

from jobs.sqlite import SqliteJobStore
from jobs.store import JobStore

STORE_ERRORS: tuple[type[Exception], ...] = (sqlite3.OperationalError, OSError)
"""What a store that does not answer, or cannot write, raises: worth another try."""
with suppress(ImportError):
    from redis.exceptions import RedisError

    STORE_ERRORS = (*STORE_ERRORS, RedisError)


def open_job_store(database: Path, redis_url: str | None) -> JobStore:
    """Open the store.

    Raises:
        RuntimeError: Redis is asked for and its client is not installed.
    """
    if redis_url is None:
        return SqliteJobStore(database)
    try:
        from jobs.redis import RedisJobStore
    except ImportError as error:
        raise RuntimeError(
            "LATHE_REDIS_URL is set but the Redis client is missing: pip install 'lathe[redis]'"
        ) from error
    return RedisJobStore(redis_url)
