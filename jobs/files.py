"""The file store: uploads by id, under LATHE_HOME/files, with equal contents kept once.

- `files.db`: SQLite, one row per file. Its write lock is the only lock: who holds it may add and remove blobs.
- `blobs/<sha256>`: contents, never changed.
- `.new-*`: an upload under way.

A blob without a row was left by a killed process, or is needed no more: `_sweep` removes it under the lock.
"""

import hashlib
import json
import os
import re
import secrets
import sqlite3
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

from jobs.states import TERMINAL_STATUSES, JobStatus
from jobs.store import JobStore, JsonObject

FILE_ID_PATTERN = r"^file-[a-z0-9]{1,64}$"
_FILE_ID = re.compile(FILE_ID_PATTERN[:-1] + r"\Z")
UploadPurpose = Literal["fine-tune", "batch", "user_data", "calibration", "enrich"]
Purpose = UploadPurpose | Literal["fine-tune-results", "batch_output"]
"""What a file is for; jobs write the results."""
Order = Literal["asc", "desc"]
BUSY_SECONDS = 30
SCHEMA_VERSION = 1
_LEFTOVER_SECONDS = 24 * 3600
_PAGE = 100
_SCHEMA = """
CREATE TABLE files (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL, purpose TEXT NOT NULL,
    sha256 TEXT NOT NULL, num_bytes INTEGER NOT NULL, expires_at REAL, document TEXT NOT NULL
);
CREATE INDEX files_by_owner ON files (owner, number);
CREATE INDEX files_by_content ON files (sha256);
"""


class UploadNotFoundError(Exception):
    """No file has this id, or none that the asker may see."""

    def __init__(self, file_id: str) -> None:
        super().__init__(f"no file {file_id[:100]!r}")
        self.file_id = file_id


class UploadConflictError(Exception):
    """A file with this id was made from another request."""


class UploadInUseError(Exception):
    """A job that has not ended needs the file."""

    def __init__(self, file_id: str, job_id: str) -> None:
        super().__init__(f"file {file_id} is used by job {job_id}")
        self.job_id = job_id


class QuotaExceededError(Exception):
    """The owner's files would hold more bytes than they may."""

    def __init__(self, used: int, added: int, allowed: int) -> None:
        super().__init__(
            f"your files hold {used} bytes, this one has {added}, and {allowed} are allowed"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class FileInfo:
    """A file as stored. Times are Unix seconds.

    Attributes:
        owner: id of the API key that uploaded it.
        filename: as the client called it; never a path here.
        request_hash: guards an idempotency key against another body.
    """

    id: str
    owner: str
    filename: str
    purpose: Purpose
    num_bytes: int
    sha256: str
    created_at: float
    expires_at: float | None
    request_hash: str


class Upload:
    """Bytes on their way in, hashed as they come. Leaving the context removes what was not added to the store."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_bytes = 0
        self._digest = hashlib.sha256()
        self._file = path.open("xb")

    def __enter__(self) -> "Upload":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with suppress(OSError):  # what could not be written on a full disk is not wanted either
            self._file.close()
        self.path.unlink(missing_ok=True)

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.num_bytes += len(data)

    def finish(self) -> str:
        """Make the bytes durable; returns their sha256."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._digest.hexdigest()


class FileStore:
    """Uploads of all owners. Safe from several threads and processes on one machine.

    Args:
        clock: Unix seconds; replaced in tests.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        self._dir = folder
        self._clock = clock
        self._blobs = folder / "blobs"

    def begin(self) -> Upload:
        """A new upload; use as a context manager."""
        self._blobs.mkdir(parents=True, exist_ok=True)
        return Upload(self._dir / f".new-{secrets.token_hex(8)}")

    def add(
        self,
        upload: Upload,
        *,
        file_id: str,
        owner: str,
        filename: str,
        purpose: Purpose,
        request_hash: str,
        max_owner_bytes: int | None = None,
        lifetime_seconds: float | None = None,
    ) -> tuple[FileInfo, bool]:
        """Store a finished upload; an id that exists with the same `request_hash` returns (existing, False).

        Raises:
            UploadConflictError: the id exists, made from another request or by another owner.
            QuotaExceededError
        """
        if not _FILE_ID.match(file_id):
            raise ValueError(f"file id must match {FILE_ID_PATTERN}, got {file_id!r}")
        sha256 = upload.finish()
        now = self._clock()
        info = FileInfo(
            id=file_id,
            owner=owner,
            filename=filename,
            purpose=purpose,
            num_bytes=upload.num_bytes,
            sha256=sha256,
            created_at=now,
            expires_at=None if lifetime_seconds is None else now + lifetime_seconds,
            request_hash=request_hash,
        )
        with self._locked() as db:
            existing = _find(db, file_id)
            if existing is not None:
                if (existing.owner, existing.request_hash) != (owner, request_hash):
                    raise UploadConflictError(file_id)
                return existing, False
            used = _used_bytes(db, owner)
            if max_owner_bytes is not None and used + info.num_bytes > max_owner_bytes:
                raise QuotaExceededError(used, info.num_bytes, max_owner_bytes)
            os.replace(upload.path, self._blobs / sha256)  # the same bytes, if it is there already
            db.execute(
                "INSERT INTO files (id, owner, purpose, sha256, num_bytes, expires_at, document)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                (
                    info.id,
                    owner,
                    purpose,
                    sha256,
                    info.num_bytes,
                    info.expires_at,
                    json.dumps(asdict(info)),
                ),
            )
        return info, True

    def used_bytes(self, owner: str) -> int:
        """Of an owner's files; equal contents count each time."""
        if not self._dir.is_dir():
            return 0
        with self._connection() as db:
            return _used_bytes(db, owner)

    def get(self, file_id: str, owner: str | None) -> FileInfo:
        """A file that has not expired, of this owner; None is anybody.

        Raises:
            UploadNotFoundError
        """
        if not self._dir.is_dir():  # nothing was ever uploaded
            raise UploadNotFoundError(file_id)
        with self._connection() as db:
            return self._require(db, file_id, owner)

    def path(self, info: FileInfo) -> Path:
        """Where the content lies."""
        return self._blobs / info.sha256

    def open_for_job(self, file_id: str) -> tuple[FileInfo, Path]:
        """A file that a job names, whoever's it is and expired or not: the job was accepted with it.

        Raises:
            UploadNotFoundError
        """
        info = None
        if self._dir.is_dir():
            with self._connection() as db:
                info = _find(db, file_id)
        if info is None or not self.path(info).is_file():
            raise UploadNotFoundError(file_id)
        return info, self.path(info)

    def list_files(
        self,
        owner: str | None,
        *,
        purpose: str | None = None,
        after: str | None = None,
        limit: int = 20,
        order: Order = "desc",
    ) -> list[FileInfo]:
        """By age; `after` is the id of the last file of the page before.

        Raises:
            UploadNotFoundError: `after` is unknown.
        """
        if not self._dir.is_dir():
            if after is not None:
                raise UploadNotFoundError(after)
            return []
        where = ["(expires_at IS NULL OR expires_at > ?)"]
        values: list[str | float] = [self._clock()]
        for column, value in (("owner", owner), ("purpose", purpose)):
            if value is not None:
                where.append(f"{column} = ?")
                values.append(value)
        with self._connection() as db:
            if after is not None:
                self._require(db, after, owner)
                row = db.execute("SELECT number FROM files WHERE id = ?", (after,)).fetchone()
                where.append("number < ?" if order == "desc" else "number > ?")
                values.append(row[0])
            rows = db.execute(
                f"SELECT document FROM files WHERE {' AND '.join(where)}"
                f" ORDER BY number {order.upper()} LIMIT ?",
                (*values, limit),
            )
            return [_load(row[0]) for row in rows.fetchall()]

    @contextmanager
    def held(self, file_ids: Collection[str], owner: str | None) -> Iterator[list[FileInfo]]:
        """The files, none of which can be deleted meanwhile: for the moment in which a job is created.

        Raises:
            UploadNotFoundError
        """
        if not file_ids:
            yield []
            return
        with self._locked() as db:
            yield [self._require(db, file_id, owner) for file_id in file_ids]

    def delete(self, file_id: str, owner: str | None, in_use: Callable[[], dict[str, str]]) -> None:
        """Args:
            in_use: file id to the job that needs it; asked while no new job can come to need one.

        Raises:
            UploadNotFoundError
            UploadInUseError
        """
        if not self._dir.is_dir():
            raise UploadNotFoundError(file_id)
        with self._locked() as db:
            self._require(db, file_id, owner)
            job_id = in_use().get(file_id)
            if job_id is not None:
                raise UploadInUseError(file_id, job_id)
            db.execute("DELETE FROM files WHERE id = ?", (file_id,))
        self._sweep()

    def purge(self, in_use: Callable[[], dict[str, str]]) -> None:
        """Remove files that have expired and that no job needs, and what killed processes left behind."""
        if not self._dir.is_dir():
            return
        with self._locked() as db:
            rows = db.execute("SELECT id FROM files WHERE expires_at <= ?", (self._clock(),))
            expired = {row[0] for row in rows.fetchall()}
            for file_id in expired - in_use().keys() if expired else ():
                db.execute("DELETE FROM files WHERE id = ?", (file_id,))
        for path in self._dir.glob(".new-*"):
            with suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > _LEFTOVER_SECONDS:
                    path.unlink()
        self._sweep()

    def _sweep(self) -> None:
        """In a transaction of its own, behind the one that deleted rows: a kill between them leaves only a blob."""
        with self._locked() as db:
            kept = {row[0] for row in db.execute("SELECT DISTINCT sha256 FROM files").fetchall()}
            for path in self._blobs.iterdir():
                if path.name not in kept:
                    path.unlink()

    def _require(self, db: sqlite3.Connection, file_id: str, owner: str | None) -> FileInfo:
        info = _find(db, file_id)
        if (
            info is None
            or owner not in (None, info.owner)
            or (info.expires_at is not None and info.expires_at <= self._clock())
        ):
            raise UploadNotFoundError(file_id)
        return info

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        self._blobs.mkdir(parents=True, exist_ok=True)
        db = sqlite3.connect(self._dir / "files.db", timeout=BUSY_SECONDS, isolation_level=None)
        try:
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                _create_tables(db)
            elif version != SCHEMA_VERSION:
                raise RuntimeError(
                    f"files.db has schema {version}, this version reads {SCHEMA_VERSION}"
                )
            yield db
        finally:
            db.close()

    @contextmanager
    def _locked(self) -> Iterator[sqlite3.Connection]:
        """A transaction that no other process writes or begins beside; undone where the body raises."""
        with self._connection() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
            except BaseException:
                db.execute("ROLLBACK")
                raise
            db.execute("COMMIT")


def _create_tables(db: sqlite3.Connection) -> None:
    db.execute("BEGIN IMMEDIATE")
    if db.execute("PRAGMA user_version").fetchone()[0] == 0:  # nobody was faster
        for statement in _SCHEMA.split(";"):
            db.execute(statement)
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    db.execute("COMMIT")


def _find(db: sqlite3.Connection, file_id: str) -> FileInfo | None:
    row = db.execute("SELECT document FROM files WHERE id = ?", (file_id,)).fetchone()
    return None if row is None else _load(row[0])


def _used_bytes(db: sqlite3.Connection, owner: str) -> int:
    row = db.execute("SELECT coalesce(sum(num_bytes), 0) FROM files WHERE owner = ?", (owner,))
    used: int = row.fetchone()[0]
    return used


def _load(document: str) -> FileInfo:
    return FileInfo(**json.loads(document))


def files_of(spec: JsonObject) -> list[str]:
    """Ids of the files that a job's specification names."""
    calibration = spec.get("calibration") or {}
    own = (spec.get(name) for name in ("training_file", "validation_file", "file", "input_file_id"))
    named = (*own, calibration.get("file"))
    return [file_id for file_id in named if file_id is not None]


def files_in_use(jobs: JobStore) -> dict[str, str]:
    """File id to a job that needs it and has not ended."""
    found: dict[str, str] = {}
    for status in JobStatus:
        after: str | None = None
        while status not in TERMINAL_STATUSES:
            page = jobs.list_jobs(status=status, after=after, limit=_PAGE)
            found |= {file_id: job.id for job in page for file_id in files_of(job.spec)}
            if len(page) < _PAGE:
                break
            after = page[-1].id
    return found
