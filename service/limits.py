"""How much one API key may ask for: requests and tokens in a minute, and requests at once.

Token buckets: each holds a minute's worth, fills evenly, and is kept in SQLite, or in Redis for several API processes.
A request is admitted while its key's buckets have something in them. The tokens that it then costs are taken when they
are known: those of a prompt when the engine accepts it, generated ones when the text ends. So the last admitted
requests may leave a debt, which has to be refilled before the key is served again. Tokens of jobs are not among them:
a job waits for its turn at a worker, and its time there is what `quotas.py` limits.
"""

import logging
import math
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from anyio import to_thread

from service.auth import Identity, KeyStore, Limit
from service.errors import ApiError
from service.settings import Settings

MINUTE = 60.0
BUSY_SECONDS = 10
EPSILON = 1e-6
"""A bucket of tokens must hold more than nothing."""
Unit = Literal["requests", "tokens"]

logger = logging.getLogger("lathe.limits")


@dataclass(frozen=True, slots=True)
class Bucket:
    """A bucket after it was asked.

    Attributes:
        level: what is left; below 0 is a debt.
    """

    taken: bool
    level: float


class BucketStore(Protocol):
    """Keeps buckets by name. Thread-safe; a call is one transaction."""

    def take(self, name: str, amount: float, capacity: float, least: float) -> Bucket:
        """Refill a bucket, capacity a minute, and take from it if it holds `least`. A new one is full."""

    def close(self) -> None: ...


class SqliteBuckets(BucketStore):
    """In a file of its own, which may be deleted at any time; it need not survive a power cut.

    Args:
        clock: Unix seconds; replaced in tests.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock = clock
        self._lock = threading.Lock()
        self._db: sqlite3.Connection | None = None

    def take(self, name: str, amount: float, capacity: float, least: float) -> Bucket:
        with self._lock:
            db = self._open()
            try:
                db.execute("BEGIN IMMEDIATE")
                row = db.execute("SELECT level, at FROM buckets WHERE name = ?", (name,)).fetchone()
                now = self._clock()
                level, at = row or (capacity, now)
                # a clock that was set back fills nothing, once
                level = min(capacity, level + capacity / MINUTE * max(0.0, now - at))
                taken = level >= least
                level -= amount if taken else 0.0
                db.execute("INSERT OR REPLACE INTO buckets VALUES (?, ?, ?)", (name, level, now))
                db.execute("COMMIT")
            finally:
                if db.in_transaction:
                    db.execute("ROLLBACK")
        return Bucket(taken, level)

    def _open(self) -> sqlite3.Connection:
        """Opened when first needed: without limits there is no file."""
        if self._db is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            db = sqlite3.connect(
                self._path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = OFF")
            db.execute(
                "CREATE TABLE IF NOT EXISTS buckets"
                " (name TEXT PRIMARY KEY, level REAL NOT NULL, at REAL NOT NULL) WITHOUT ROWID"
            )
            self._db = db
        return self._db

    def close(self) -> None:
        with self._lock:
            if self._db is not None:
                self._db.close()
                self._db = None


_TAKE = """
local amount, capacity, least = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1e6
local old = redis.call('HMGET', KEYS[1], 'level', 'at')
local level, at = capacity, now
if old[1] then
  level, at = tonumber(old[1]), tonumber(old[2])
  if not level or not at then return redis.error_reply('not a bucket') end
end
level = math.min(capacity, level + capacity / 60 * math.max(0, now - at))
local taken = 0
if level >= least then taken = 1; level = level - amount end
redis.call('HSET', KEYS[1], 'level', string.format('%.9f', level), 'at', string.format('%.6f', now))
redis.call('EXPIRE', KEYS[1], math.ceil((capacity - level) / capacity * 60) + 60)
return {taken, string.format('%.9f', level)}
"""


class RedisBuckets(BucketStore):
    """Hashes `PREFIX:bucket:NAME`, by Redis' own clock; a full bucket is forgotten."""

    def __init__(self, url: str, prefix: str = "lathe") -> None:
        import redis

        self._redis: Any = redis.Redis.from_url(url, socket_timeout=10, socket_connect_timeout=5)
        self._script = self._redis.register_script(_TAKE)
        self._prefix = prefix

    def take(self, name: str, amount: float, capacity: float, least: float) -> Bucket:
        key = f"{self._prefix}:bucket:{name}"
        taken, level = self._script(keys=[key], args=[amount, capacity, least])
        return Bucket(bool(taken), float(level))

    def close(self) -> None:
        self._redis.close()


def open_buckets(path: Path, redis_url: str | None) -> BucketStore:
    return SqliteBuckets(path) if redis_url is None else RedisBuckets(redis_url)


class RateLimits:
    """The limits of every key: its own, where it has any, else the server's. 0 is no limit.

    Requests under way are counted here, so of this process alone, from one event loop.
    """

    def __init__(self, keys: KeyStore, settings: Settings, buckets: BucketStore) -> None:
        self._keys = keys
        self._settings = settings
        self._buckets = buckets
        self._num_open: Counter[str] = Counter()
        # charges are written in order, beside the event loop that they come from
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="limits")

    def of(self, key_id: str, name: Limit) -> int:
        """A key's limit; 0 is none."""
        key = self._keys.find(key_id)
        own = None if key is None else key.limit(name)
        server: int = getattr(self._settings, name)
        return server if own is None else own

    @contextmanager
    def one_more(self, key_id: str) -> Iterator[None]:
        """While a request of a key is under way; a stream is until its last event.

        Raises:
            ApiError: rate_limit_exceeded.
        """
        limit = self.of(key_id, "max_open_requests")
        if limit and self._num_open[key_id] >= limit:
            raise ApiError(
                "rate_limit_exceeded",
                f"this key may have {limit} requests under way at once, streams included, and has",
            )
        self._num_open[key_id] += 1
        try:
            yield
        finally:
            self._num_open[key_id] -= 1
            if not self._num_open[key_id]:
                del self._num_open[key_id]

    async def admit(
        self, identity: Identity, headers: dict[str, str], *, costs_tokens: bool
    ) -> None:
        """Count a request; on a thread, unless its key has no limit.

        Args:
            headers: gets OpenAI's `x-ratelimit-*`, whether admitted or not.
            costs_tokens: refuse it also where the key has no tokens left.

        Raises:
            ApiError: rate_limit_exceeded.
        """
        key_id = identity.key_id
        tokens = self.of(key_id, "tokens_per_minute") if costs_tokens else 0
        if tokens:
            await to_thread.run_sync(self._ask, key_id, "tokens", tokens, 0.0, EPSILON, headers)
        requests = self.of(key_id, "requests_per_minute")
        if requests:
            await to_thread.run_sync(self._ask, key_id, "requests", requests, 1.0, 1.0, headers)

    def _ask(
        self,
        key_id: str,
        unit: Unit,
        limit: int,
        amount: float,
        least: float,
        headers: dict[str, str],
    ) -> None:
        bucket = self._buckets.take(f"{unit}:{key_id}", amount, limit, least)
        per_second = limit / MINUTE
        headers |= {
            f"x-ratelimit-limit-{unit}": str(limit),
            f"x-ratelimit-remaining-{unit}": str(max(0, math.floor(bucket.level + EPSILON))),
            f"x-ratelimit-reset-{unit}": duration((limit - bucket.level) / per_second),
        }
        if not bucket.taken:
            raise ApiError(
                "rate_limit_exceeded",
                f"this key may use {limit} {unit} per minute and has none left",
                retry_after=(least - bucket.level) / per_second,
            )

    def charge(self, key_id: str, num_tokens: int) -> None:
        """Take tokens that were spent, soon. Does not block."""
        limit = self.of(key_id, "tokens_per_minute")
        if limit and num_tokens:
            self._writer.submit(self._charge, key_id, num_tokens, limit)

    def _charge(self, key_id: str, num_tokens: int, limit: int) -> None:
        try:
            self._buckets.take(f"tokens:{key_id}", num_tokens, limit, -math.inf)
        except (
            Exception
        ):  # the answer is on its way; whoever asks next is told that the store is gone
            logger.exception("tokens could not be charged", extra={"key_id": key_id})

    def flush(self) -> None:
        """Wait until every charge so far is written."""
        self._writer.submit(lambda: None).result()

    def close(self) -> None:
        self._writer.shutdown()
        self._buckets.close()


def duration(seconds: float) -> str:
    """As OpenAI's headers write it: "120ms", "7.5s", "1m30s"."""
    milliseconds = math.ceil(seconds * 1000 - EPSILON)
    if milliseconds < 1000:
        return f"{max(0, milliseconds)}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    return (f"{minutes}m" if minutes else "") + f"{rest / 1000:g}s"
