"""Jobs in Redis, for several API processes and machines. JSON values only; every change is WATCH, then one MULTI.

The rules of `jobs.logic` decide here what they decide for SQLite, and optimistic locking makes their answer atomic: a
change that another client overtook is worked out again. The clock is Redis' own (TIME): set forward, it costs jobs
under way an attempt; set back, they are queued again once their leases lie too far ahead. Keys, under one prefix:

    number               counts jobs; gives each its place in every order
    job:ID               the document: job, number, seq of its newest event
    events:ID            sorted set of events by seq
    all, owner:OWNER     sorted sets of ids by number
    active:OWNER         set of ids that have not ended
    queued:TYPE          sorted set of ids by priority, then number
    waiting              sorted set of queued ids by creation time
    leased               sorted set of ids by the end of their lease
    counts, lease_lost   jobs by type and status; leases that ran out
    workers              sorted set of names by when last seen
"""

import dataclasses
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from jobs import logic
from jobs.states import LEASED_STATUSES, TERMINAL_STATUSES, JobStatus
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

_PRIORITY_STEP = 2**40
"""More than there will be jobs; with MAX_PRIORITY still exact in the double that a score is."""
_PAGE = 200

_Value = TypeVar("_Value")


class CorruptValueError(Exception):
    """A value under our prefix is not the JSON that we wrote. It is never run, guessed at or repaired."""


@dataclass(frozen=True, slots=True)
class _Record:
    """The document of one job."""

    job: Job
    number: int
    last_seq: int

    def dump(self) -> str:
        return json.dumps(dataclasses.asdict(self))


class RedisJobStore(JobStore):
    """Thread-safe: the client is, and every pipeline belongs to one call."""

    def __init__(self, url: str, prefix: str = "lathe") -> None:
        # One retry is for a pooled connection that a restart of Redis closed; longer outages are the caller's.
        # What we write is ASCII, so bytes that are not UTF-8 are replaced by a character that `_parse` refuses.
        self._redis: Any = redis.Redis.from_url(
            url,
            decode_responses=True,
            encoding_errors="replace",
            socket_timeout=10,
            socket_connect_timeout=5,
            retry=Retry(NoBackoff(), 1),
        )
        self._prefix = prefix

    def create(self, job: NewJob, *, max_active: int = 0) -> tuple[Job, bool]:
        key = self._key("job", job.id)
        active = self._key("active", job.owner)

        def change(pipe: Any) -> tuple[Job, bool]:
            raw = pipe.get(key)
            if raw is not None:
                existing = _load(key, raw).job
                if existing.request_hash != job.request_hash:
                    raise RequestConflictError(job.id)
                return existing, False
            if max_active and pipe.scard(active) >= max_active:
                raise TooManyJobsError(job.owner)
            number = int(self._redis.incr(self._key("number")))
            now = self._now()
            made, events = logic.created(job, now)
            pipe.multi()
            pipe.zadd(self._key("all"), {made.id: number})
            pipe.zadd(self._key("owner", made.owner), {made.id: number})
            self._write(pipe, None, _Record(made, number, 0), events, now)
            return made, True

        return self._atomically((key, active), change)

    def get(self, job_id: str) -> Job:
        key = self._key("job", job_id)
        raw = self._redis.get(key)
        if raw is None:
            raise JobNotFoundError(job_id)
        return _load(key, raw).job

    def list_jobs(
        self,
        *,
        owner: str | None = None,
        type: str | None = None,
        status: JobStatus | None = None,
        after: str | None = None,
        limit: int = 20,
    ) -> list[Job]:
        index = self._key("all") if owner is None else self._key("owner", owner)
        below = "+inf"
        if after is not None:
            number = self._redis.zscore(index, after)
            if number is None:
                raise JobNotFoundError(after)
            below = f"({number:.0f}"
        found: list[Job] = []
        while len(found) < limit:
            page = self._redis.zrevrangebyscore(
                index, below, "-inf", start=0, num=_PAGE, withscores=True
            )
            if not page:
                break
            below = f"({page[-1][1]:.0f}"
            keys = [self._key("job", job_id) for job_id, _ in page]
            for key, raw in zip(keys, self._redis.mget(keys), strict=True):
                job = _load(key, raw).job
                if type in (None, job.type) and status in (None, job.status):
                    found.append(job)
        return found[:limit]

    def claim(self, worker: str, types: Collection[str], lease_seconds: float) -> Job | None:
        self.reap()
        while (job_id := self._first_queued(types)) is not None:
            job = self._change(job_id, logic.claimed(worker, self._now() + lease_seconds))
            if job is not None:
                return job
        return None

    def _first_queued(self, types: Collection[str]) -> str | None:
        pipe = self._redis.pipeline(transaction=False)
        for job_type in types:
            pipe.zrange(self._key("queued", job_type), 0, 0, withscores=True)
        heads = [(score, job_id) for head in pipe.execute() for job_id, score in head]
        return min(heads)[1] if heads else None

    def heartbeat(self, job_id: str, fencing: int, lease_seconds: float) -> Job:
        return self._must_change(job_id, logic.renewed(fencing, self._now() + lease_seconds))

    def report(
        self,
        job_id: str,
        fencing: int,
        events: Sequence[NewEvent],
        progress: tuple[int, int] | None = None,
    ) -> None:
        self._must_change(job_id, logic.reported(fencing, list(events), progress))

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
        operation = logic.finished(fencing, status, reason, result, error)
        return self._must_change(job_id, operation)

    def request_cancel(self, job_id: str) -> Job:
        return self._must_change(job_id, logic.cancel_requested)

    def request_pause(self, job_id: str) -> Job:
        return self._must_change(job_id, logic.pause_requested)

    def request_resume(self, job_id: str) -> Job:
        return self._must_change(job_id, logic.resume_requested)

    def events(self, job_id: str, *, after: int = 0, limit: int = 100) -> list[Event]:
        if not self._redis.exists(self._key("job", job_id)):
            raise JobNotFoundError(job_id)
        key = self._key("events", job_id)
        rows = self._redis.zrangebyscore(key, f"({after}", "+inf", start=0, num=limit)
        return [_load_event(key, row) for row in rows]

    def newest_events(
        self, job_id: str, *, before: int | None = None, limit: int = 100
    ) -> list[Event]:
        if not self._redis.exists(self._key("job", job_id)):
            raise JobNotFoundError(job_id)
        key = self._key("events", job_id)
        below = "+inf" if before is None else f"({before}"
        rows = self._redis.zrevrangebyscore(key, below, "-inf", start=0, num=limit)
        return [_load_event(key, row) for row in rows]

    def reap(self) -> list[Job]:
        now = self._now()
        leased = self._redis.zrange(self._key("leased"), 0, -1, withscores=True)
        expired = [job_id for job_id, until in leased if logic.has_run_out(until, now)]
        lost = self._key("lease_lost")
        changed = (self._change(job_id, logic.lease_expired(now), count=lost) for job_id in expired)
        return [job for job in changed if job is not None]

    def counts(self) -> JobCounts:
        pipe = self._redis.pipeline(transaction=False)
        pipe.hgetall(self._key("counts"))
        pipe.zrange(self._key("waiting"), 0, 0, withscores=True)
        pipe.get(self._key("lease_lost"))
        numbers, oldest, lost = pipe.execute()
        by: dict[tuple[str, JobStatus], int] = {}
        for name, count in numbers.items():
            job_type, _, status = name.rpartition("|")
            if int(count):
                by[job_type, JobStatus(status)] = int(count)
        return JobCounts(
            by_type_and_status=by,
            oldest_queued_seconds=max(self._now() - oldest[0][1], 0.0) if oldest else 0.0,
            lease_lost_total=int(lost or 0),
        )

    def worker_seen(self, worker: str) -> None:
        now = self._now()
        pipe = self._redis.pipeline()
        pipe.zadd(self._key("workers"), {worker: now})
        pipe.zremrangebyscore(self._key("workers"), "-inf", now - logic.WORKER_SECONDS)
        pipe.zremrangebyscore(self._key("workers"), now + logic.MAX_LEASE_SECONDS, "+inf")
        pipe.execute()

    def worker_ages(self) -> dict[str, float]:
        now = self._now()
        rows = self._redis.zrangebyscore(
            self._key("workers"), now - logic.WORKER_SECONDS, "+inf", withscores=True
        )
        return {worker: max(now - seen, 0.0) for worker, seen in rows}

    def close(self) -> None:
        self._redis.close()

    def _key(self, *parts: str) -> str:
        return ":".join((self._prefix, *parts))

    def _now(self) -> float:
        seconds, micros = self._redis.time()
        return float(seconds) + float(micros) / 1e6

    def _must_change(self, job_id: str, operation: logic.Operation) -> Job:
        job = self._change(job_id, operation)
        assert job is not None, "only claims and expired leases may find nothing to do"
        return job

    def _change(
        self, job_id: str, operation: logic.Operation, count: str | None = None
    ) -> Job | None:
        """Apply an operation, and add one to the key `count`; None if it found nothing to do."""
        key = self._key("job", job_id)

        def change(pipe: Any) -> Job | None:
            raw = pipe.get(key)
            if raw is None:
                raise JobNotFoundError(job_id)
            record = _load(key, raw)
            now = self._now()
            outcome = operation(record.job, now)
            if outcome is None:
                return None
            job, events = outcome
            pipe.multi()
            if count is not None:
                pipe.incr(count)
            self._write(pipe, record.job, dataclasses.replace(record, job=job), events, now)
            return job

        return self._atomically((key,), change)

    def _atomically(self, keys: tuple[str, ...], change: Callable[[Any], _Value]) -> _Value:
        """Run `change` until nobody else wrote the keys meanwhile; each round lost is another client's progress."""
        with self._redis.pipeline() as pipe:
            while True:
                try:
                    pipe.watch(*keys)
                    value = change(pipe)
                    pipe.execute()
                    return value
                except redis.WatchError:
                    pipe.reset()

    def _write(
        self, pipe: Any, before: Job | None, record: _Record, events: list[NewEvent], now: float
    ) -> None:
        """Queue everything that follows from one change into the transaction."""
        job = record.job
        record = dataclasses.replace(record, last_seq=record.last_seq + len(events))
        pipe.set(self._key("job", job.id), record.dump())
        self._write_events(pipe, record, events, now)
        if job.status == JobStatus.QUEUED:
            score = job.priority * _PRIORITY_STEP + record.number
            pipe.zadd(self._key("queued", job.type), {job.id: score})
            pipe.zadd(self._key("waiting"), {job.id: job.created_at})
        else:
            pipe.zrem(self._key("queued", job.type), job.id)
            pipe.zrem(self._key("waiting"), job.id)
        if job.status in LEASED_STATUSES:
            pipe.zadd(self._key("leased"), {job.id: job.lease_until})
        else:
            pipe.zrem(self._key("leased"), job.id)
        if before is None or before.status != job.status:
            active = self._key("active", job.owner)
            if job.status in TERMINAL_STATUSES:
                pipe.srem(active, job.id)
            else:
                pipe.sadd(active, job.id)
            if before is not None:
                pipe.hincrby(self._key("counts"), f"{before.type}|{before.status}", -1)
            pipe.hincrby(self._key("counts"), f"{job.type}|{job.status}", 1)

    def _write_events(self, pipe: Any, record: _Record, events: list[NewEvent], now: float) -> None:
        if not events:
            return
        first = record.last_seq - len(events) + 1
        documents = {
            json.dumps(logic.event_to_json(event, seq, now)): seq
            for seq, event in enumerate(events, start=first)
        }
        key = self._key("events", record.job.id)
        pipe.zadd(key, documents)
        pipe.zremrangebyscore(key, "-inf", record.last_seq - logic.MAX_EVENTS)


def _parse(key: str, raw: str | None) -> JsonObject:
    try:
        if raw is None or not raw.isascii():
            raise ValueError
        data = json.loads(raw)
        if not isinstance(data, dict):
            raise ValueError
    except ValueError:
        raise CorruptValueError(f"the value of Redis key {key!r} is not a JSON object") from None
    return data


def _load(key: str, raw: str | None) -> _Record:
    data = _parse(key, raw)
    try:
        return _Record(
            job=logic.job_from_json(data["job"]),
            number=int(data["number"]),
            last_seq=int(data["last_seq"]),
        )
    except (KeyError, TypeError, ValueError):
        raise CorruptValueError(f"the value of Redis key {key!r} is not a job") from None


def _load_event(key: str, raw: str) -> Event:
    data = _parse(key, raw)
    try:
        return logic.event_from_json(data)
    except TypeError:
        raise CorruptValueError(f"a value of Redis key {key!r} is not an event") from None
