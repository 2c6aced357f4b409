"""What every key has used and saved, by day, model and operation: counters in one SQLite file of the home.

Counters are gathered in memory and written together, so that no request waits for the disk; a killed process loses what
it has not flushed. Several processes may add to one file.
"""

import logging
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from engines.metering import EngineUse
from graph.enrich_types import EnrichRequest, EnrichUsage

FLUSH_SECONDS = 2.0
BUSY_SECONDS = 10
UsageOperation = Literal["generate", "embed", "score", "enrich"]

logger = logging.getLogger("lathe.usage")
_SCHEMA = """
CREATE TABLE IF NOT EXISTS usage (
    key_id TEXT NOT NULL, day TEXT NOT NULL, model TEXT NOT NULL, operation TEXT NOT NULL, counter TEXT NOT NULL,
    amount REAL NOT NULL, PRIMARY KEY (key_id, day, model, operation, counter)
) WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counters:
    """Of `generate`, `embed` and `score`: requests to engines, whatever asked for them. Of `enrich`: enrichments.

    Attributes:
        items: nodes of enrichments; cached_items: those that no engine worked for.
        cached_tokens: what enrichments would have cost without cache and deduplication.
    """

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prefix_hit_tokens: int = 0
    device_seconds: float = 0.0
    items: int = 0
    cached_items: int = 0
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageRow:
    key_id: str
    model: str
    operation: UsageOperation
    counters: Counters


class UsageStore:
    """Thread-safe. A failure is logged and fails nobody: the counters are kept for the next flush.

    Args:
        clock: Unix seconds; replaced in tests.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock = clock
        self._lock = threading.Lock()
        self._pending: Counter[tuple[str, str, str, str, str]] = Counter()
        self._db: sqlite3.Connection | None = None

    def used(self, use: EngineUse) -> None:
        """Count a part of an engine's request. The canary's have no tenant, and are not counted."""
        if use.tenant:
            counters = Counters(
                requests=use.num_requests,
                prompt_tokens=use.prompt_tokens,
                completion_tokens=use.completion_tokens,
                prefix_hit_tokens=use.prefix_hit_tokens,
                device_seconds=use.device_seconds,
            )
            self._add(use.tenant, use.model, use.operation, counters)

    def enriched(self, request: EnrichRequest, usage: EnrichUsage) -> None:
        """Count an enrichment, or what was done of one that was left; what engines did for it they tell themselves."""
        counters = Counters(
            requests=1,
            items=sum(usage.num_by_status.values()),
            cached_items=usage.num_by_status["cached"],
            cached_tokens=max(0, usage.cached_tokens),
        )
        self._add(request.tenant, request.model, "enrich", counters)

    def _add(self, key_id: str, model: str, operation: UsageOperation, counters: Counters) -> None:
        day = time.strftime("%Y-%m-%d", time.gmtime(self._clock()))
        with self._lock:
            for name in COUNTERS:
                amount = getattr(counters, name)
                if amount:
                    self._pending[key_id, day, model, operation, name] += amount

    def flush(self) -> None:
        """Write what has gathered."""
        with self._lock:
            if not self._pending:
                return
            try:
                db = self._open()
                with db:
                    db.executemany(
                        "INSERT INTO usage VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT"
                        " DO UPDATE SET amount = amount + excluded.amount",
                        [(*key, amount) for key, amount in self._pending.items()],
                    )
                self._pending.clear()
            except sqlite3.Error as error:
                logger.warning("usage could not be written: %s", error)

    def read(self, key_id: str | None, since: str | None = None) -> list[UsageRow]:
        """Sums by key, model and operation.

        Args:
            key_id: whose; None is everybody's.
            since: a day, "2026-01-31".
        """
        self.flush()
        with self._lock:
            found = (
                self._open()
                .execute(
                    "SELECT key_id, model, operation, counter, sum(amount) FROM usage"
                    " WHERE (? IS NULL OR key_id = ?) AND (? IS NULL OR day >= ?)"
                    " GROUP BY key_id, model, operation, counter",
                    (key_id, key_id, since, since),
                )
                .fetchall()
            )
        sums: dict[tuple[str, str, UsageOperation], dict[str, float]] = {}
        for key, model, operation, counter, amount in found:
            sums.setdefault((key, model, operation), {})[counter] = amount
        return [
            UsageRow(key_id=key, model=model, operation=operation, counters=_counters(amounts))
            for (key, model, operation), amounts in sums.items()
        ]

    def close(self) -> None:
        self.flush()
        with self._lock:
            if self._db is not None:
                self._db.close()
                self._db = None

    def _open(self) -> sqlite3.Connection:
        """Opened when first needed."""
        if self._db is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            db = sqlite3.connect(self._path, timeout=BUSY_SECONDS, check_same_thread=False)
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = NORMAL")
            db.executescript(_SCHEMA)
            self._db = db
        return self._db


COUNTERS = tuple(field.name for field in fields(Counters))


def _counters(amounts: dict[str, float]) -> Counters:
    known = {name: amount for name, amount in amounts.items() if name in COUNTERS}
    return Counters(
        **{n: a if n == "device_seconds" else int(a) for n, a in known.items()}  # type: ignore[arg-type]
    )


def seconds_per_token(rows: list[UsageRow], model: str) -> float | None:
    """Device time that a token of a model's generations took; None where there were none."""
    found = total([row for row in rows if row.model == model and row.operation == "generate"])
    num_tokens = found.prompt_tokens + found.completion_tokens
    return found.device_seconds / num_tokens if num_tokens else None


def total(rows: list[UsageRow]) -> Counters:
    return Counters(**{name: sum(getattr(row.counters, name) for row in rows) for name in COUNTERS})
