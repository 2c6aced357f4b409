"""What only the Redis store does: foreign values are refused, prefixes keep apart, an outage is told and survived."""

from collections.abc import Iterator

import pytest

from jobs.open import STORE_ERRORS, open_job_store
from jobs.states import JobStatus
from tests.jobs.conftest import Location, RedisServer, new_job

redis = pytest.importorskip("redis")
from jobs.redis import CorruptValueError, RedisJobStore  # noqa: E402

pytestmark = pytest.mark.redis


@pytest.fixture
def store(redis_url: str) -> Iterator[RedisJobStore]:
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
    opened = RedisJobStore(redis_url)
    yield opened
    opened.close()


class Boom:
    """Pickled, it would raise when loaded: nobody may load it."""

    def __reduce__(self) -> tuple[object, ...]:
        return (exec, ("raise SystemExit('a value from Redis was executed')",))


def foreign_values() -> list[bytes]:
    import pickle

    return [
        pickle.dumps(Boom()),
        b"__import__('os').abort()",
        b"[1, 2]",
        b'"text"',
        b"{}",
        b'{"job": {"id": "job-0"}, "number": 1, "last_seq": 1}',
        b"",
    ]


@pytest.mark.parametrize("value", foreign_values())
def test_a_value_that_is_not_ours_is_refused_and_named(
    store: RedisJobStore, redis_url: str, value: bytes
) -> None:
    store.create(new_job())
    with redis.Redis.from_url(redis_url) as client:
        client.set("lathe:job:job-0", value)
    for call in (
        lambda: store.get("job-0"),
        lambda: store.list_jobs(),
        lambda: store.claim("w", ("test",), 60),
        lambda: store.request_cancel("job-0"),
        lambda: store.create(new_job()),
    ):
        with pytest.raises(CorruptValueError, match="lathe:job:job-0"):
            call()


@pytest.mark.parametrize("value", foreign_values()[:5])
def test_an_event_that_is_not_ours_is_refused(
    store: RedisJobStore, redis_url: str, value: bytes
) -> None:
    store.create(new_job())
    with redis.Redis.from_url(redis_url) as client:
        client.zadd("lathe:events:job-0", {value: 2})
    with pytest.raises(CorruptValueError, match="lathe:events:job-0"):
        store.events("job-0")


def test_prefixes_keep_services_apart(store: RedisJobStore, redis_url: str) -> None:
    other = RedisJobStore(redis_url, prefix="other")
    store.create(new_job())
    assert other.list_jobs() == []
    assert other.claim("w", ("test",), 60) is None
    assert other.create(new_job(request_hash="another"))[1]
    other.close()
    with redis.Redis.from_url(redis_url) as client:
        prefixes = {key.split(b":")[0] for key in client.keys("*")}
    assert prefixes == {b"lathe", b"other"}


def test_a_restart_keeps_the_jobs_and_an_outage_is_told(redis_server: RedisServer) -> None:
    store = RedisJobStore(redis_server.url)
    store.create(new_job())
    job = store.claim("w", ("test",), 600)
    assert job is not None
    redis_server.stop()
    with pytest.raises(STORE_ERRORS):
        store.get("job-0")
    with pytest.raises(STORE_ERRORS):
        store.finish(job.id, job.fencing, JobStatus.SUCCEEDED)
    redis_server.start()
    done = store.finish(job.id, job.fencing, JobStatus.SUCCEEDED, result={"x": 1})
    assert done == store.get("job-0")
    assert [event.message for event in store.events("job-0")] == ["queued", "running", "succeeded"]
    store.close()


def test_a_lease_that_lies_too_far_ahead_has_run_out(
    store: RedisJobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis' clock was set back by hours, and the worker died."""
    store.create(new_job())
    assert store.claim("w", ("test",), 60) is not None
    now = store._now()
    monkeypatch.setattr(store, "_now", lambda: now - 300)
    assert store.reap() == []
    monkeypatch.setattr(store, "_now", lambda: now - 5 * 3600)
    assert [lost.status for lost in store.reap()] == [JobStatus.QUEUED]


def test_a_missing_client_is_explained(monkeypatch: pytest.MonkeyPatch, location: Location) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "jobs.redis", None)
    with pytest.raises(RuntimeError, match="pip install"):
        open_job_store(location[0], "redis://127.0.0.1:1/0")
