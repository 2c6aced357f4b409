"""Which requests of a batch have their answer: a file that only grows, so that a killed attempt is gone on with.

One JSON line per answered request. A line that a kill cut short is no answer: its request is asked again.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jobs.store import JsonObject


@dataclass(frozen=True, slots=True)
class _Entry:
    offset: int
    succeeded: bool


class BatchLedger:
    """Answers by the number of their line in the input file. Owned by one thread."""

    def __init__(self, path: Path) -> None:
        self._entries: dict[int, _Entry] = {}
        self._file = path.open("a+b")
        self._file.seek(0)
        end = 0
        for raw in self._file:
            if not raw.endswith(b"\n"):
                break
            row = json.loads(raw)
            self._entries[row["line"]] = _Entry(end, row["succeeded"])
            end += len(raw)
        self._file.truncate(end)
        self._file.seek(0, os.SEEK_END)

    def __contains__(self, line: int) -> bool:
        return line in self._entries

    @property
    def num_succeeded(self) -> int:
        return sum(entry.succeeded for entry in self._entries.values())

    @property
    def num_failed(self) -> int:
        return len(self._entries) - self.num_succeeded

    def add(self, line: int, record: JsonObject, *, succeeded: bool) -> None:
        """Keep an answer; the process may be killed from now on, the machine after `sync`."""
        row = {"line": line, "succeeded": succeeded, "record": record}
        self._entries[line] = _Entry(self._file.tell(), succeeded)
        self._file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self._file.flush()

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def records(self, *, succeeded: bool) -> Iterator[bytes]:
        """As JSON lines, in the order of the input."""
        for line in sorted(self._entries):
            entry = self._entries[line]
            if entry.succeeded == succeeded:
                self._file.seek(entry.offset)
                record = json.loads(self._file.readline())["record"]
                yield json.dumps(record, ensure_ascii=False).encode() + b"\n"
        self._file.seek(0, os.SEEK_END)

    def close(self) -> None:
        self._file.close()
