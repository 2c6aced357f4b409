"""Jobs in Redis, for several API processes and machines. JSON values only; every change is WATCH, then one MULTI.

Keys under one prefix: `job:ID` the document, `events:ID` a list, `index` and `queued` and `leased` sorted sets, `counts` a
hash by type and status. The clock is Redis' own (TIME).
"""

import json
from collections.abc import Callable, Collection, Sequence
from typing import Any

import redis

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

_PRIORITY_STEP = 2**40
_SCAN = 200


class CorruptValueError(Exception):
    """A value under our prefix is not the JSON that we wrote."""


class RedisJobStore(JobStore):
    """A redis-py client is thread-safe; pipelines are made per call."""

    def __init__(self, url: str, prefix: str = "lathe") -> None:
        self._redis: Any = redis.Redis.from_url(url, decode_responses=True, socket_timeout=10)
        self._prefix = prefix

    def _key(self, *parts: str) -> str:
        return ":".join((self._prefix, *parts))

    def _now(self) -> float:
        seconds, micros = self._redis.time()
        return float(seconds) + float(micros) / 1e6

    def create(self, job: NewJob) -> tuple[Job, bool]:
        number = self._redis.incr(self._key("number"))
        now = self._now()

        def change(pipe: Any) -> tuple[Job, bool]:
            raw = pipe.get(self._key("job", job.id))
            if raw is not None:
                existing = _load(raw)
                if existing.request_hash != job.request_hash:
                    raise RequestConflictError(job.id)
                pipe.multi()
                return existing, False
            made, events = logic.created(job, now)
            length = self._length(pipe, job.id)
            pipe.multi()
            pipe.zadd(self._key("index"), {job.id: number})
            self._write(pipe, None, made, events, length, number, now)
            return made, True

        return self._atomically(job.id, change)

    def get(self, job_id: str) -> Job:
        raw = self._redis.get(self._key("job", job_id))
        if raw is None:
            raise JobNotFoundError(job_id)
        return _load(raw)

    def list_jobs(
        self,
        *,
        owner: str | None = None,
        type: str | None = None,
        status: JobStatus | None = None,
        after: str | None = None,
        limit: int = 20,
    ) -> list[Job]:
        below: float | str = "+inf"
        if after is not None:
            score = self._redis.zscore(self._key("index"), after)
            if score is None:
                raise JobNotFoundError(after)
            below = f"({score}"
        found: list[Job] = []
        start = 0
        while len(found) < limit:
            ids = self._redis.zrevrangebyscore(
                self._key("index"), below, "-inf", start=start, num=_SCAN
            )
            if not ids:
                break
            start += len(ids)
            for raw in self._redis.mget([self._key("job", job_id) for job_id in ids]):
                job = _load(raw)
                wanted = (
                    owner in (None, job.owner),
                    type in (None, job.type),
                    status in (None, job.status),
                )
                if all(wanted):
                    found.append(job)
        return found[:limit]

    def claim(self, worker: str, types: Collection[str], lease_seconds: float) -> Job | None:
        self.reap()
        while True:
            job_id = self._first_queued(types)
            if job_id is None:
                return None
            claimed = self._change(job_id, logic.claimed(worker, lease_seconds), JobStatus.QUEUED)
            if claimed is not None:
                return claimed

    def _first_queued(self, types: Collection[str]) -> str | None:
        start = 0
        while ids := self._redis.zrange(self._key("queued"), start, start + _SCAN - 1):
            start += len(ids)
            for raw in self._redis.mget([self._key("job", job_id) for job_id in ids]):
                job = _load(raw)
                if job.type in types and job.status == JobStatus.QUEUED:
                    return job.id
        return None

    def heartbeat(self, job_id: str, fencing: int, lease_seconds: float) -> Job:
        return self._must(job_id, logic.renewed(fencing, lease_seconds))

    def report(
        self,
        job_id: str,
        fencing: int,
        events: Sequence[NewEvent],
        progress: tuple[int, int] | None = None,
    ) -> None:
        self._must(job_id, logic.reported(fencing, list(events), progress))

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
        return self._must(job_id, logic.finished(fencing, status, reason, result, error))

    def request_cancel(self, job_id: str) -> Job:
        return self._must(job_id, logic.cancel_requested)

    def request_pause(self, job_id: str) -> Job:
        return self._must(job_id, logic.pause_requested)

    def request_resume(self, job_id: str) -> Job:
        return self._must(job_id, logic.resume_requested)

    def events(self, job_id: str, *, after: int = 0, limit: int = 100) -> list[Event]:
        self.get(job_id)
        raw = self._redis.lrange(self._key("events", job_id), 0, -1)
        events = [logic.event_from_json(_parse(one)) for one in raw]
        return [event for event in events if event.seq > after][:limit]

    def reap(self) -> list[Job]:
        now = self._now()
        reaped: list[Job] = []
        for job_id in self._redis.zrangebyscore(self._key("leased"), "-inf", now):
            changed = self._change(
                job_id, lambda job, at: logic.lease_expired(job, at) or (job, [])
            )
            if changed is not None and changed.status not in LEASED_STATUSES:
                reaped.append(changed)
                self._redis.incr(self._key("lease_lost"))
        return reaped

    def counts(self) -> JobCounts:
        by: dict[tuple[str, JobStatus], int] = {}
        for name, count in self._redis.hgetall(self._key("counts")).items():
            job_type, _, status = name.partition("|")
            if int(count):
                by[job_type, JobStatus(status)] = int(count)
        now = self._now()
        oldest = 0.0
        for job_id in self._redis.zrange(self._key("queued"), 0, 0):
            oldest = max(now - self.get(job_id).created_at, 0.0)
        lost = int(self._redis.get(self._key("lease_lost")) or 0)
        return JobCounts(by_type_and_status=by, oldest_queued_seconds=oldest, lease_lost_total=lost)

    def worker_seen(self, worker: str) -> None:
        self._redis.hset(self._key("workers"), worker, self._now())

    def worker_ages(self) -> dict[str, float]:
        now = self._now()
        ages = {
            w: max(now - float(t), 0.0)
            for w, t in self._redis.hgetall(self._key("workers")).items()
        }
        return {worker: age for worker, age in ages.items() if age < 3600}

    def close(self) -> None:
        self._redis.close()

    def _must(self, job_id: str, operation: logic.Operation) -> Job:
        changed = self._change(job_id, operation)
        assert changed is not None
        return changed

    def _change(
        self, job_id: str, operation: logic.Operation, only_if: JobStatus | None = None
    ) -> Job | None:
        """Apply an operation; None if the job is no longer in the status `only_if`."""

        def change(pipe: Any) -> Job | None:
            raw = pipe.get(self._key("job", job_id))
            if raw is None:
                raise JobNotFoundError(job_id)
            job = _load(raw)
            if only_if is not None and job.status != only_if:
                pipe.multi()
                return None
            now = self._now()
            changed, events = operation(job, now)
            length = self._length(pipe, job_id)
            number = int(pipe.zscore(self._key("index"), job_id))
            pipe.multi()
            self._write(pipe, job, changed, events, length, number, now)
            return changed

        return self._atomically(job_id, change)

    def _atomically(self, job_id: str, change: Callable[[Any], Any]) -> Any:
        """Run `change` until nobody else wrote the job meanwhile."""
        with self._redis.pipeline() as pipe:
            while True:
                try:
                    pipe.watch(self._key("job", job_id))
                    value = change(pipe)
                    pipe.execute()
                    return value
                except redis.WatchError:
                    continue

    def _length(self, pipe: Any, job_id: str) -> int:
        """Newest event's number."""
        last = pipe.lindex(self._key("events", job_id), -1)
        return int(_parse(last)["seq"]) if last else 0

    def _write(
        self,
        pipe: Any,
        before: Job | None,
        after: Job,
        events: list[NewEvent],
        length: int,
        number: int,
        now: float,
    ) -> None:
        pipe.set(self._key("job", after.id), json.dumps(logic.job_to_json(after)))
        for offset, event in enumerate(events, start=1):
            document = json.dumps(logic.event_to_json(event, length + offset, now))
            pipe.rpush(self._key("events", after.id), document)
        pipe.ltrim(self._key("events", after.id), -logic.MAX_EVENTS, -1)
        if after.status == JobStatus.QUEUED:
            pipe.zadd(self._key("queued"), {after.id: after.priority * _PRIORITY_STEP + number})
        else:
            pipe.zrem(self._key("queued"), after.id)
        if after.status in LEASED_STATUSES:
            pipe.zadd(self._key("leased"), {after.id: after.lease_until})
        else:
            pipe.zrem(self._key("leased"), after.id)
        if before is None or before.status != after.status:
            if before is not None:
                pipe.hincrby(self._key("counts"), f"{before.type}|{before.status}", -1)
            pipe.hincrby(self._key("counts"), f"{after.type}|{after.status}", 1)


def _parse(raw: str) -> JsonObject:
    try:
        data = json.loads(raw)
    except (ValueError, TypeError):
        raise CorruptValueError("a job value in Redis is not JSON") from None
    if not isinstance(data, dict):
        raise CorruptValueError("a job value in Redis is not an object")
    return data


def _load(raw: str) -> Job:
    try:
        return logic.job_from_json(_parse(raw))
    except (KeyError, TypeError, ValueError):
        raise CorruptValueError("a job in Redis is malformed") from None
