"""The enrichment cache: what an LLM wrote about a node, and what an encoder made of it, by content hash.

One SQLite file (WAL, shared by processes) with two layers, `text` and `embedding`. Values are a checksum and bytes:
msgpack for texts, float32 little-endian for vectors. A row that does not read back is a miss and is logged; a file
that is no database is replaced. The file may be deleted at any time. Keys already contain the tenant and everything
that shapes a value (`graph.enrich`); nothing here is ever stale.
"""

import logging
import sqlite3
import threading
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

Layer = Literal["text", "embedding"]

MAX_BYTES = 2 * 2**30
_EVICT_TO = 0.9  # of the cap, so that evictions are rare and large
_ROW_OVERHEAD = 96  # key, columns and index entries of one row, about
_KEYS_PER_QUERY = 500

logger = logging.getLogger("lathe.enrich.cache")

_SCHEMA = """
CREATE TABLE IF NOT EXISTS entries (
    layer TEXT NOT NULL,
    key BLOB NOT NULL,
    value BLOB NOT NULL,
    used_at INTEGER NOT NULL,
    PRIMARY KEY (layer, key)
);
CREATE INDEX IF NOT EXISTS entries_used_at ON entries (used_at);
"""


class EnrichmentCache:
    """Thread-safe. No failure of the cache fails its user: it is logged, and a read is a miss.

    Args:
        max_bytes: about the most the rows may hold; the least recently used go first.
    """

    def __init__(self, path: Path, max_bytes: int = MAX_BYTES) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._num_bytes = 0

    def get_many(self, layer: Layer, keys: Iterable[bytes]) -> dict[bytes, bytes]:
        """Values of the keys that are there."""
        wanted = list(dict.fromkeys(keys))
        found: dict[bytes, bytes] = {}
        with self._lock:
            try:
                for start in range(0, len(wanted), _KEYS_PER_QUERY):
                    found |= self._get_some(layer, wanted[start : start + _KEYS_PER_QUERY])
            except sqlite3.Error as error:
                self._failed("read", error)
        return found

    def put_many(self, layer: Layer, values: Mapping[bytes, bytes]) -> None:
        """Store values. A key that is there keeps its first value: an engine's last digits may differ."""
        if not values:
            return
        now = time.time_ns()
        rows = [(layer, key, _seal(value), now) for key, value in values.items()]
        with self._lock:
            try:
                connection = self._open()
                with connection:
                    connection.executemany(
                        "INSERT OR IGNORE INTO entries VALUES (?, ?, ?, ?)", rows
                    )
                self._num_bytes += sum(len(row[2]) + _ROW_OVERHEAD for row in rows)
                if self._num_bytes > self._max_bytes:
                    self._evict(connection)
            except sqlite3.Error as error:
                self._failed("write", error)

    def close(self) -> None:
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def _get_some(self, layer: Layer, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        connection = self._open()
        marks = ",".join("?" * len(keys))
        rows = connection.execute(
            f"SELECT key, value FROM entries WHERE layer = ? AND key IN ({marks})", (layer, *keys)
        ).fetchall()
        found: dict[bytes, bytes] = {}
        corrupted: list[tuple[str, bytes]] = []
        for key, sealed in rows:
            value = _unseal(sealed)
            if value is None:
                corrupted.append((layer, key))
            else:
                found[key] = value
        if corrupted:
            logger.warning("corrupted cache rows: %d, layer %s", len(corrupted), layer)
        now = time.time_ns()
        with connection:
            # Removed, so that the new value can take the place.
            connection.executemany("DELETE FROM entries WHERE layer = ? AND key = ?", corrupted)
            connection.executemany(
                "UPDATE entries SET used_at = ? WHERE layer = ? AND key = ?",
                [(now, layer, key) for key in found],
            )
        return found

    def _open(self) -> sqlite3.Connection:
        if self._connection is not None:
            return self._connection
        self._path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._connection = self._connect()
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise
            logger.warning("the cache file is no database, starting anew: %s", error)
            for suffix in ("", "-wal", "-shm"):
                self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)
            self._connection = self._connect()
        self._num_bytes = self._measure(self._connection)
        return self._connection

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, timeout=10, check_same_thread=False)
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            # A power cut may lose the newest rows of a cache, not corrupt it.
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.executescript(_SCHEMA)
        except sqlite3.Error:
            connection.close()
            raise
        return connection

    def _measure(self, connection: sqlite3.Connection) -> int:
        row = connection.execute(
            "SELECT coalesce(sum(length(value) + ?), 0) FROM entries", (_ROW_OVERHEAD,)
        ).fetchone()
        return int(row[0])

    def _evict(self, connection: sqlite3.Connection) -> None:
        """Delete the least recently used rows until the size is well below the cap."""
        self._num_bytes = self._measure(connection)  # other processes write too
        excess = self._num_bytes - int(self._max_bytes * _EVICT_TO)
        if self._num_bytes <= self._max_bytes:
            return
        doomed: list[tuple[int]] = []
        for rowid, size in connection.execute(
            "SELECT rowid, length(value) FROM entries ORDER BY used_at"
        ):
            doomed.append((rowid,))
            excess -= size + _ROW_OVERHEAD
            self._num_bytes -= size + _ROW_OVERHEAD
            if excess <= 0:
                break
        with connection:
            connection.executemany("DELETE FROM entries WHERE rowid = ?", doomed)

    def _failed(self, what: str, error: sqlite3.Error) -> None:
        logger.warning("cache %s failed: %s", what, error)
        if self._connection is not None:
            self._connection.close()
            self._connection = None  # opened anew next time, which replaces a broken file


def _seal(value: bytes) -> bytes:
    return zlib.crc32(value).to_bytes(4, "little") + value


def _unseal(sealed: object) -> bytes | None:
    """The value; None if its checksum is wrong."""
    if not isinstance(sealed, bytes) or len(sealed) < 4:
        return None
    value = sealed[4:]
    return value if zlib.crc32(value).to_bytes(4, "little") == sealed[:4] else None
