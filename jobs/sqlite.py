"""Jobs in SQLite (WAL), the embedded default. Every change is one BEGIN IMMEDIATE transaction; many processes may share a file."""

import json
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from jobs import logic
from jobs.states import LEASED_STATUSES, JobStatus
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
)

SCHEMA_VERSION = 1
BUSY_SECONDS = 30
_SCHEMA = """
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL, type TEXT NOT NULL,
    status TEXT NOT NULL, priority INTEGER NOT NULL, lease_until REAL, created_at REAL NOT NULL, document TEXT NOT NULL
);
CREATE INDEX jobs_by_status ON jobs (status, priority, number);
CREATE TABLE events (
    job_id TEXT NOT NULL, seq INTEGER NOT NULL, document TEXT NOT NULL, PRIMARY KEY (job_id, seq)
) WITHOUT ROWID;
CREATE TABLE workers (name TEXT PRIMARY KEY, seen_at REAL NOT NULL);
CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL);
"""


class SqliteJobStore(JobStore):
    """One connection per thread."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock = clock
        self._local = threading.local()
        self._connections: list[sqlite3.Connection] = []
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._transaction() as db:
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                for statement in _SCHEMA.split(";"):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            elif version != SCHEMA_VERSION:
                raise RuntimeError(
                    f"{path.name} has schema {version}, this version reads {SCHEMA_VERSION}"
                )

    def _db(self) -> sqlite3.Connection:
        db: sqlite3.Connection | None = getattr(self._local, "db", None)
        if db is None:
            db = sqlite3.connect(
                self._path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
            self._local.db = db
            with self._lock:
                self._connections.append(db)
        return db

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        db = self._db()
        db.execute("BEGIN IMMEDIATE")
        try:
            yield db
        except BaseException:
            db.execute("ROLLBACK")
            raise
        db.execute("COMMIT")

    def create(self, job: NewJob) -> tuple[Job, bool]:
        with self._transaction() as db:
            existing = self._find(db, job.id)
            if existing is not None:
                if existing.request_hash != job.request_hash:
                    raise RequestConflictError(job.id)
                return existing, False
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
        job = self._find(self._db(), job_id)
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
        db = self._db()
        where, values = ["1"], []
        for column, value in (("owner", owner), ("type", type), ("status", status)):
            if value is not None:
                where.append(f"{column} = ?")
                values.append(str(value))
        if after is not None:
            row = db.execute("SELECT number FROM jobs WHERE id = ?", (after,)).fetchone()
            if row is None:
                raise JobNotFoundError(after)
            where.append("number < ?")
            values.append(row[0])
        rows = db.execute(
            f"SELECT document FROM jobs WHERE {' AND '.join(where)} ORDER BY number DESC LIMIT ?",
            (*values, limit),
        )
        return [_load(row[0]) for row in rows]

    def claim(self, worker: str, types: Collection[str], lease_seconds: float) -> Job | None:
        self.reap()
        marks = ", ".join("?" * len(types))
        with self._transaction() as db:
            row = db.execute(
                f"SELECT document FROM jobs WHERE status = 'queued' AND type IN ({marks})"
                " ORDER BY priority, number LIMIT 1",
                tuple(types),
            ).fetchone()
            if row is None:
                return None
            return self._apply(db, _load(row[0]), logic.claimed(worker, lease_seconds))

    def heartbeat(self, job_id: str, fencing: int, lease_seconds: float) -> Job:
        return self._change(job_id, logic.renewed(fencing, lease_seconds))

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
        self.get(job_id)
        rows = self._db().execute(
            "SELECT document FROM events WHERE job_id = ? AND seq > ? ORDER BY seq LIMIT ?",
            (job_id, after, limit),
        )
        return [logic.event_from_json(json.loads(row[0])) for row in rows]

    def reap(self) -> list[Job]:
        reaped: list[Job] = []
        expired = (
            "SELECT document FROM jobs WHERE status IN ('running', 'pausing', 'cancelling')"
            " AND lease_until <= ?"
        )
        if self._db().execute(expired + " LIMIT 1", (self._clock(),)).fetchone() is None:
            return reaped
        with self._transaction() as db:
            for row in db.execute(expired, (self._clock(),)).fetchall():
                change = logic.lease_expired(_load(row[0]), self._clock())
                if change is not None:
                    reaped.append(self._store(db, *change))
            db.execute(
                "INSERT INTO counters VALUES ('lease_lost', ?)"
                " ON CONFLICT (name) DO UPDATE SET value = value + excluded.value",
                (len(reaped),),
            )
        return reaped

    def counts(self) -> JobCounts:
        db = self._db()
        by = {
            (row[0], JobStatus(row[1])): row[2]
            for row in db.execute("SELECT type, status, count(*) FROM jobs GROUP BY type, status")
        }
        oldest = db.execute("SELECT min(created_at) FROM jobs WHERE status = 'queued'").fetchone()[
            0
        ]
        lost = db.execute("SELECT value FROM counters WHERE name = 'lease_lost'").fetchone()
        return JobCounts(
            by_type_and_status=by,
            oldest_queued_seconds=0.0 if oldest is None else max(self._clock() - oldest, 0.0),
            lease_lost_total=lost[0] if lost else 0,
        )

    def worker_seen(self, worker: str) -> None:
        with self._transaction() as db:
            db.execute(
                "INSERT INTO workers VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET seen_at = excluded.seen_at",
                (worker, self._clock()),
            )

    def worker_ages(self) -> dict[str, float]:
        now = self._clock()
        rows = self._db().execute(
            "SELECT name, seen_at FROM workers WHERE seen_at > ?", (now - 3600,)
        )
        return {row[0]: max(now - row[1], 0.0) for row in rows}

    def close(self) -> None:
        with self._lock:
            for db in self._connections:
                db.close()
            self._connections.clear()
        self._local = threading.local()

    def _find(self, db: sqlite3.Connection, job_id: str) -> Job | None:
        row = db.execute("SELECT document FROM jobs WHERE id = ?", (job_id,)).fetchone()
        return None if row is None else _load(row[0])

    def _change(self, job_id: str, operation: logic.Operation) -> Job:
        with self._transaction() as db:
            job = self._find(db, job_id)
            if job is None:
                raise JobNotFoundError(job_id)
            return self._apply(db, job, operation)

    def _apply(self, db: sqlite3.Connection, job: Job, operation: logic.Operation) -> Job:
        return self._store(db, *operation(job, self._clock()))

    def _store(self, db: sqlite3.Connection, job: Job, events: list[NewEvent]) -> Job:
        lease = job.lease_until if job.status in LEASED_STATUSES else None
        db.execute(
            "UPDATE jobs SET status = ?, lease_until = ?, document = ? WHERE id = ?",
            (job.status, lease, _dump(job), job.id),
        )
        self._append(db, job.id, events)
        return job

    def _append(self, db: sqlite3.Connection, job_id: str, events: Sequence[NewEvent]) -> None:
        if not events:
            return
        row = db.execute("SELECT max(seq) FROM events WHERE job_id = ?", (job_id,)).fetchone()
        last = row[0] or 0
        now = self._clock()
        for offset, event in enumerate(events, start=1):
            document = json.dumps(logic.event_to_json(event, last + offset, now))
            db.execute("INSERT INTO events VALUES (?, ?, ?)", (job_id, last + offset, document))
        oldest_kept = last + len(events) - logic.MAX_EVENTS
        if oldest_kept > 0:
            db.execute("DELETE FROM events WHERE job_id = ? AND seq <= ?", (job_id, oldest_kept))


def _dump(job: Job) -> str:
    return json.dumps(logic.job_to_json(job))


def _load(document: str) -> Job:
    return logic.job_from_json(json.loads(document))
