"""What the jobs of one API key may use: seconds of a worker within a day, and bytes on the disk.

Nothing is booked. Both are worked out from what there is when something is asked for, so that no crash forgets any and
a deletion counts at once. They are looked at when a job, a file or a graph is accepted: what is accepted may go beyond
them, and the next one is then refused. Two that come at the same moment may both be accepted.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from compression.registry import ModelRegistry
from graph.llaga.projector import ProjectorRegistry
from graph.store import GraphStore
from jobs.files import FileStore
from jobs.states import LEASED_STATUSES
from jobs.store import Job, JobStore
from service.errors import ApiError
from service.limits import RateLimits
from service.settings import Settings

DAY = 24 * 3600.0
_PAGE = 200


@dataclass(frozen=True, slots=True)
class _Run:
    """Seconds in which a job held a worker, from and to in Unix seconds."""

    start: float
    end: float

    def within(self, start: float, end: float) -> float:
        return max(0.0, min(self.end, end) - max(self.start, start))


class Quotas:
    """Blocks for as long as listing a key's jobs and their folders takes.

    Args:
        clock: Unix seconds; replaced in tests.
    """

    def __init__(
        self,
        settings: Settings,
        limits: RateLimits,
        *,
        jobs: JobStore,
        files: FileStore,
        graphs: GraphStore,
        models: ModelRegistry,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._settings = settings
        self._limits = limits
        self._jobs = jobs
        self._files = files
        self._graphs = graphs
        self._models = models
        self._projectors = ProjectorRegistry(settings.projectors_dir)
        self._clock = clock

    def seconds_limit(self, owner: str) -> int:
        """0 is no limit."""
        return self._limits.of(owner, "job_seconds_per_day")

    def disk_limit(self, owner: str) -> int:
        """0 is no limit."""
        return self._limits.of(owner, "max_disk_bytes")

    def check_job(self, owner: str) -> None:
        """Raises: ApiError: job_quota_exceeded, with the time when it will not be; insufficient_quota."""
        self.check_disk(owner)
        limit = self.seconds_limit(owner)
        if not limit:
            return
        now = self._clock()
        runs = self._runs(owner, now)
        if _used(runs, now) < limit:
            return
        raise ApiError(
            "job_quota_exceeded",
            f"the jobs of a key may run for {limit} s within 24 hours, and yours ran for {_used(runs, now):.0f}",
            retry_after=_free_at(runs, limit, now) - now,
        )

    def check_disk(self, owner: str) -> None:
        """Raises: ApiError: insufficient_quota, nothing more may be kept."""
        limit = self.disk_limit(owner)
        if not limit:
            return
        used = self.disk_bytes(owner)
        if used >= limit:
            raise ApiError(
                "insufficient_quota",
                f"your files, graphs, jobs, projectors and models have {used} bytes, and {limit} are allowed",
            )

    def max_file_bytes(self, owner: str) -> int | None:
        """What its files may have beside all else that it keeps; None is no limit."""
        limit = self.disk_limit(owner)
        if not limit:
            return None
        return limit - self._bytes_beside_files(owner)

    def job_seconds(self, owner: str) -> float:
        """That jobs held a worker for within the last 24 hours."""
        now = self._clock()
        return _used(self._runs(owner, now), now)

    def disk_bytes(self, owner: str) -> int:
        """Of files, graphs, folders of jobs, and the models and projectors that jobs made."""
        return self._files.used_bytes(owner) + self._bytes_beside_files(owner)

    def _bytes_beside_files(self, owner: str) -> int:
        used = sum(info.num_bytes for info in self._graphs.list_graphs(owner, limit=sys.maxsize))
        for projector_id, _ in self._projectors.list_projectors(owner):
            used += folder_bytes(self._settings.projectors_dir / projector_id)
        job_ids = set()
        for job in self._jobs_of(owner):
            job_ids.add(job.id)
            used += folder_bytes(self._settings.jobs_dir / job.id)
        for entry in self._models.list_models() if job_ids else ():
            if entry.manifest.job_id in job_ids:
                used += folder_bytes(entry.path)
        return used

    def _runs(self, owner: str, now: float) -> list[_Run]:
        return [run for job in self._jobs_of(owner) for run in _runs_of(job, now)]

    def _jobs_of(self, owner: str) -> Iterator[Job]:
        after: str | None = None
        while page := self._jobs.list_jobs(owner=owner, after=after, limit=_PAGE):
            yield from page
            after = page[-1].id


def _runs_of(job: Job, now: float) -> Iterator[_Run]:
    """Attempts that have ended count as one that ended with the last of them."""
    if job.attempt_ended_at is not None:
        yield _Run(job.attempt_ended_at - job.device_seconds, job.attempt_ended_at)
    if job.status in LEASED_STATUSES and job.attempt_started_at is not None:
        yield _Run(job.attempt_started_at, now)


def _used(runs: list[_Run], at: float) -> float:
    return sum(run.within(at - DAY, at) for run in runs)


def _free_at(runs: list[_Run], limit: int, now: float) -> float:
    """When less than `limit` is used, if nothing runs on: to the second, by halving."""
    low, high = now, now + DAY
    while high - low > 1.0:
        middle = (low + high) / 2
        low, high = (low, middle) if _used(runs, middle) < limit else (middle, high)
    return high


def folder_bytes(folder: Path) -> int:
    """Of all files below a folder; one that is not there, or no longer, has none."""
    total = 0
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    total += folder_bytes(Path(entry.path))
                else:
                    total += entry.stat(follow_symlinks=False).st_size
    except FileNotFoundError:  # a job at work replaces what it wrote
        return total
    return total
