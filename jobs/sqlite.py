"""Jobs in SQLite (WAL), the embedded default; several processes may share a file, on a local disk.

A job is one JSON document beside the columns that are searched. Every change is one BEGIN IMMEDIATE transaction.
Leases, and when a worker was seen, are in seconds since the machine started, which setting its clock does not move.
"""

import json
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from jobs import logic
from jobs.states import TERMINAL_STATUSES, JobStatus
from jobs.store import (
    Event,
    Job,
    JobCounts,
    JobNotFoundError,
    JobStore,
    JsonObject,
    NewEvent,
    NewJob,
    RequestConflictError,
    TooManyJobsError,
)

SCHEMA_VERSION = 1
BUSY_SECONDS = 30
_SCHEMA = """
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL, type TEXT NOT NULL,
    status TEXT NOT NULL, priority INTEGER NOT NULL, lease_until REAL, created_at REAL NOT NULL, document TEXT NOT NULL
);
CREATE INDEX jobs_by_status ON jobs (status, priority, number);
CREATE INDEX jobs_by_owner ON jobs (owner, number);
CREATE TABLE events (
    job_id TEXT NOT NULL, seq INTEGER NOT NULL, document TEXT NOT NULL, PRIMARY KEY (job_id, seq)
) WITHOUT ROWID;
CREATE TABLE workers (name TEXT PRIMARY KEY, seen_at REAL NOT NULL);
CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL);
"""


class SqliteJobStore(JobStore):
    """Keeps as many connections as were ever used at once, not one per thread: threads of a pool come and go.

    Args:
        clock: Unix seconds; replaced in tests, like the others.
        uptime: seconds since the machine started, the same in every process.
    """

    def __init__(
        self,
        path: Path,
        clock: Callable[[], float] = time.time,
        uptime: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path = path
        self._clock = clock
        self._uptime = uptime
        self._idle: list[sqlite3.Connection] = []
        self._closed = False
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._connection() as db:
            db.execute("PRAGMA journal_mode = WAL")  # kept in the file
            version = _schema_version(db)
        if version == 0:  # to open one that is there, nobody waits for those who write to it
            with self._transaction() as db:
                version = _schema_version(db)
                if version == 0:
                    for statement in _SCHEMA.split(";"):
                        db.execute(statement)
                    db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
                    version = SCHEMA_VERSION
        if version != SCHEMA_VERSION:
            raise RuntimeError(
                f"{path.name} has schema {version}, this version reads {SCHEMA_VERSION}"
            )

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """A connection that no other thread uses meanwhile."""
        with self._lock:
            db = self._idle.pop() if self._idle else None
        if db is None:
            db = sqlite3.connect(
                self._path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
            db.execute("PRAGMA synchronous = FULL")
        try:
            yield db
        finally:
            if db.in_transaction:  # the disk may be full; what was not committed is undone
                db.execute("ROLLBACK")
            with self._lock:
                keep = not self._closed
                if keep:
                    self._idle.append(db)
            if not keep:
                db.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._connection() as db:
            db.execute("BEGIN IMMEDIATE")
            yield db
            db.execute("COMMIT")

    def create(self, job: NewJob, *, max_active: int = 0) -> tuple[Job, bool]:
        with self._transaction() as db:
            existing = _find(db, job.id)
            if existing is not None:
                if existing.request_hash != job.request_hash:
                    raise RequestConflictError(job.id)
                return existing, False
            if max_active and _num_active(db, job.owner) >= max_active:
                raise TooManyJobsError(job.owner)
            made, events = logic.created(job, self._clock())
            db.execute(
                "INSERT INTO jobs (id, owner, type, status, priority, created_at, document)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                (
                    made.id,
                    made.owner,
                    made.type,
                    made.status,
                    made.priority,
                    made.created_at,
                    _dump(made),
                ),
            )
            self._append(db, made.id, events)
            return made, True

    def get(self, job_id: str) -> Job:
        with self._connection() as db:
            job = _find(db, job_id)
        if job is None:
            raise JobNotFoundError(job_id)
        return job

    def list_jobs(
        self,
        *,
        owner: str | None = None,
        type: str | None = None,
        status: JobStatus | None = None,
        after: str | None = None,
        limit: int = 20,
    ) -> list[Job]:
        where: list[str] = []
        values: list[str | int] = []
        for column, value in (("owner", owner), ("type", type), ("status", status)):
            if value is not None:
                where.append(f"{column} = ?")
                values.append(str(value))
        with self._connection() as db:
            if after is not None:
                where.append("number < ?")
                values.append(_number(db, after, owner))
            condition = f"WHERE {' AND '.join(where)} " if where else ""
            rows = db.execute(
                f"SELECT document FROM jobs {condition}ORDER BY number DESC LIMIT ?",
                (*values, limit),
            )
            return [_load(row[0]) for row in rows.fetchall()]

    def claim(self, worker: str, types: Collection[str], lease_seconds: float) -> Job | None:
        self.reap()
        marks = ", ".join("?" * len(types))
        first = (
            f"SELECT document FROM jobs WHERE status = 'queued' AND type IN ({marks})"
            " ORDER BY priority, number LIMIT 1"
        )
        with self._connection() as db:  # an idle worker only reads
            if db.execute(first, tuple(types)).fetchone() is None:
                return None
        with self._transaction() as db:
            row = db.execute(first, tuple(types)).fetchone()
            if row is None:
                return None
            until = self._uptime() + lease_seconds
            return self._apply(db, _load(row[0]), logic.claimed(worker, until))

    def heartbeat(self, job_id: str, fencing: int, lease_seconds: float) -> Job:
        return self._change(job_id, logic.renewed(fencing, self._uptime() + lease_seconds))

    def report(
        self,
        job_id: str,
        fencing: int,
        events: Sequence[NewEvent],
        progress: tuple[int, int] | None = None,
    ) -> None:
        self._change(job_id, logic.reported(fencing, list(events), progress))

    def finish(
        self,
        job_id: str,
        fencing: int,
        status: JobStatus,
        *,
        reason: str | None = None,
        result: JsonObject | None = None,
        error: JsonObject | None = None,
    ) -> Job:
        return self._change(job_id, logic.finished(fencing, status, reason, result, error))

    def request_cancel(self, job_id: str) -> Job:
        return self._change(job_id, logic.cancel_requested)

    def request_pause(self, job_id: str) -> Job:
        return self._change(job_id, logic.pause_requested)

    def request_resume(self, job_id: str) -> Job:
        return self._change(job_id, logic.resume_requested)

    def events(self, job_id: str, *, after: int = 0, limit: int = 100) -> list[Event]:
        with self._connection() as db:
            if _find(db, job_id) is None:
                raise JobNotFoundError(job_id)
            rows = db.execute(
                "SELECT document FROM events WHERE job_id = ? AND seq > ? ORDER BY seq LIMIT ?",
                (job_id, after, limit),
            )
            return [logic.event_from_json(json.loads(row[0])) for row in rows.fetchall()]

    def newest_events(
        self, job_id: str, *, before: int | None = None, limit: int = 100
    ) -> list[Event]:
        with self._connection() as db:
            if _find(db, job_id) is None:
                raise JobNotFoundError(job_id)
            rows = db.execute(
                "SELECT document FROM events WHERE job_id = ? AND (? IS NULL OR seq < ?)"
                " ORDER BY seq DESC LIMIT ?",
                (job_id, before, before, limit),
            )
            return [logic.event_from_json(json.loads(row[0])) for row in rows.fetchall()]

    def reap(self) -> list[Job]:
        expired = (
            "SELECT document FROM jobs WHERE status IN ('running', 'pausing', 'cancelling')"
            " AND NOT (lease_until > ?1 AND lease_until <= ?1 + ?2)"
        )
        limit = logic.MAX_LEASE_SECONDS
        with self._connection() as db:
            if db.execute(expired + " LIMIT 1", (self._uptime(), limit)).fetchone() is None:
                return []
        with self._transaction() as db:
            now = self._uptime()
            rows = db.execute(expired, (now, limit)).fetchall()
            reaped = [self._apply(db, _load(row[0]), logic.lease_expired(now)) for row in rows]
            db.execute(
                "INSERT INTO counters VALUES ('lease_lost', ?)"
                " ON CONFLICT (name) DO UPDATE SET value = value + excluded.value",
                (len(reaped),),
            )
            return reaped

    def counts(self) -> JobCounts:
        with self._connection() as db:
            by = {
                (row[0], JobStatus(row[1])): row[2]
                for row in db.execute(
                    "SELECT type, status, count(*) FROM jobs GROUP BY type, status"
                ).fetchall()
            }
            oldest = db.execute(
                "SELECT min(created_at) FROM jobs WHERE status = 'queued'"
            ).fetchone()[0]
            lost = db.execute("SELECT value FROM counters WHERE name = 'lease_lost'").fetchone()
        return JobCounts(
            by_type_and_status=by,
            oldest_queued_seconds=0.0 if oldest is None else max(self._clock() - oldest, 0.0),
            lease_lost_total=lost[0] if lost else 0,
        )

    def worker_seen(self, worker: str) -> None:
        with self._transaction() as db:
            now = self._uptime()
            db.execute(
                "INSERT INTO workers VALUES (?, ?)"
                " ON CONFLICT (name) DO UPDATE SET seen_at = excluded.seen_at",
                (worker, now),
            )
            since = now - logic.WORKER_SECONDS
            db.execute("DELETE FROM workers WHERE seen_at < ? OR seen_at > ?", (since, now))

    def worker_ages(self) -> dict[str, float]:
        now = self._uptime()
        seen = "SELECT name, seen_at FROM workers WHERE seen_at > ? AND seen_at <= ?"
        with self._connection() as db:
            rows = db.execute(seen, (now - logic.WORKER_SECONDS, now)).fetchall()
        return {row[0]: now - row[1] for row in rows}

    def close(self) -> None:
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for db in idle:
            db.close()

    def _change(self, job_id: str, operation: logic.Operation) -> Job:
        with self._transaction() as db:
            job = _find(db, job_id)
            if job is None:
                raise JobNotFoundError(job_id)
            return self._apply(db, job, operation)

    def _apply(self, db: sqlite3.Connection, job: Job, operation: logic.Operation) -> Job:
        change = operation(job, self._clock())
        if change is None:
            return job
        changed, events = change
        db.execute(
            "UPDATE jobs SET status = ?, lease_until = ?, document = ? WHERE id = ?",
            (changed.status, changed.lease_until, _dump(changed), changed.id),
        )
        self._append(db, changed.id, events)
        return changed

    def _append(self, db: sqlite3.Connection, job_id: str, events: Sequence[NewEvent]) -> None:
        if not events:
            return
        row = db.execute("SELECT max(seq) FROM events WHERE job_id = ?", (job_id,)).fetchone()
        last = row[0] or 0
        now = self._clock()
        for seq, event in enumerate(events, start=last + 1):
            document = json.dumps(logic.event_to_json(event, seq, now))
            db.execute("INSERT INTO events VALUES (?, ?, ?)", (job_id, seq, document))
        dropped = last + len(events) - logic.MAX_EVENTS
        if dropped > 0:
            db.execute("DELETE FROM events WHERE job_id = ? AND seq <= ?", (job_id, dropped))


def _schema_version(db: sqlite3.Connection) -> int:
    """0: nothing was made yet."""
    version: int = db.execute("PRAGMA user_version").fetchone()[0]
    return version


def _find(db: sqlite3.Connection, job_id: str) -> Job | None:
    row = db.execute("SELECT document FROM jobs WHERE id = ?", (job_id,)).fetchone()
    return None if row is None else _load(row[0])


def _num_active(db: sqlite3.Connection, owner: str) -> int:
    ended = ", ".join(f"'{status}'" for status in sorted(TERMINAL_STATUSES))
    row = db.execute(
        f"SELECT count(*) FROM jobs WHERE owner = ? AND status NOT IN ({ended})", (owner,)
    ).fetchone()
    number: int = row[0]
    return number


def _number(db: sqlite3.Connection, job_id: str, owner: str | None) -> int:
    """Raises: JobNotFoundError."""
    row = db.execute("SELECT number, owner FROM jobs WHERE id = ?", (job_id,)).fetchone()
    if row is None or owner not in (None, row[1]):
        raise JobNotFoundError(job_id)
    number: int = row[0]
    return number


def _dump(job: Job) -> str:
    return json.dumps(logic.job_to_json(job))


def _load(document: str) -> Job:
    return logic.job_from_json(json.loads(document))
