"""The ledger of an enrich job: every finished row, in SQLite, so that an attempt that follows a killed one asks for
nothing again, and results have the order of the nodes whatever the order of their completion."""

import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from graph.enrich_types import EnrichRow

_SCHEMA = """
CREATE TABLE IF NOT EXISTS rows (place INTEGER PRIMARY KEY, tokens_spent INTEGER NOT NULL, row BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""
_ROWS_PER_QUERY = 1024
_decoder = msgspec.msgpack.Decoder(EnrichRow)


class Ledger:
    """One job's. What `add` has written survives the end of the process, however it comes.

    Attributes:
        num_rows: that are there.
    """

    def __init__(self, path: Path) -> None:
        self._db = sqlite3.connect(path)
        self._db.execute("PRAGMA journal_mode = WAL")
        # A power cut may lose the newest rows, which the next attempt then finds in the cache.
        self._db.execute("PRAGMA synchronous = NORMAL")
        self._db.executescript(_SCHEMA)
        self.num_rows = int(self._db.execute("SELECT count(*) FROM rows").fetchone()[0])

    def add(self, rows: Sequence[tuple[int, EnrichRow]], facts: dict[str, Any]) -> None:
        """Finished rows by their node's place, each once, and facts that change with them, in one transaction."""
        with self._db:
            self._db.executemany(
                "INSERT INTO rows VALUES (?, ?, ?)",
                [(place, row.tokens_spent, msgspec.msgpack.encode(row)) for place, row in rows],
            )
            self._db.executemany(
                "INSERT OR REPLACE INTO facts VALUES (?, ?)",
                [(name, msgspec.json.encode(value).decode()) for name, value in facts.items()],
            )
        self.num_rows += len(rows)

    def fact(self, name: str, default: Any) -> Any:
        found = self._db.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return default if found is None else msgspec.json.decode(found[0])

    def places(self, start: int, stop: int) -> set[int]:
        """Of the rows that are there."""
        query = "SELECT place FROM rows WHERE place >= ? AND place < ?"
        return {place for (place,) in self._db.execute(query, (start, stop))}

    @property
    def tokens_spent(self) -> int:
        query = "SELECT coalesce(sum(tokens_spent), 0) FROM rows"
        return int(self._db.execute(query).fetchone()[0])

    def batches(self) -> Iterator[list[EnrichRow]]:
        """All rows, by place."""
        last = -1
        while True:
            found = self._db.execute(
                "SELECT place, row FROM rows WHERE place > ? ORDER BY place LIMIT ?",
                (last, _ROWS_PER_QUERY),
            ).fetchall()
            if not found:
                return
            yield [_decoder.decode(row) for _, row in found]
            last = found[-1][0]

    def close(self) -> None:
        self._db.close()
