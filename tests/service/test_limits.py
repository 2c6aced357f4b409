"""Rate limits: buckets in SQLite and Redis alike, what is admitted and charged, and what the client is told."""

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from compression.import_model import import_folder
from compression.registry import ModelRegistry
from service.app import build_app
from service.auth import LIMITS, Identity, KeyStore, Limit
from service.deps import require
from service.errors import ApiError
from service.limits import (
    BucketStore,
    RateLimits,
    RedisBuckets,
    SqliteBuckets,
    duration,
    open_buckets,
)
from service.settings import Settings
from tests.fakes.echo_engine import ECHO_INFO
from tests.fakes.fake_async_engine import FakeAsyncEngine
from tests.jobs.conftest import RedisServer
from tests.service.openai_app import ENCODER, Service, error_of

NOBODY = Identity(key_id="local", roles=frozenset({"inference"}))


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server.url
    server.stop()


@pytest.fixture(params=["sqlite", pytest.param("redis", marks=pytest.mark.redis)])
def buckets(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BucketStore]:
    if request.param == "sqlite":
        store = open_buckets(tmp_path / "limits.db", None)
    else:
        store = RedisBuckets(request.getfixturevalue("redis_url"), prefix=tmp_path.name)
    yield store
    store.close()


def test_a_bucket_is_full_is_emptied_and_may_owe(buckets: BucketStore) -> None:
    hour = 3600.0  # nothing to speak of comes back within this test
    assert buckets.take("a", 1, 3 / hour, 1).taken is False  # it never holds one
    levels = [buckets.take("b", 1, 3, 1) for _ in range(4)]
    assert [bucket.taken for bucket in levels] == [True, True, True, False]
    assert [round(bucket.level) for bucket in levels] == [2, 1, 0, 0]
    assert round(buckets.take("b", 100, 3, float("-inf")).level) == -100
    assert buckets.take("b", 0, 3, 1e-6).taken is False
    assert buckets.take("c", 1, 3, 1).taken


def test_many_at_once_take_what_there_is(buckets: BucketStore) -> None:
    from concurrent.futures import ThreadPoolExecutor

    started_at = time.time()
    with ThreadPoolExecutor(8) as threads:
        taken = list(threads.map(lambda _: buckets.take("a", 1, 10, 1).taken, range(40)))
    given_back = (time.time() - started_at) / 6
    assert 10 <= sum(taken) <= 11 + given_back


def test_a_bucket_fills_in_a_minute_whatever_the_clock_does(tmp_path: Path) -> None:
    now = [1000.0]
    buckets = SqliteBuckets(tmp_path / "limits.db", lambda: now[0])
    assert buckets.take("a", 60, 60, 60).level == 0
    now[0] += 10
    assert buckets.take("a", 0, 60, 0).level == pytest.approx(10)
    now[0] -= 500  # set back: nothing is filled, and nothing is lost
    assert buckets.take("a", 0, 60, 0).level == pytest.approx(10)
    now[0] += 5
    assert buckets.take("a", 0, 60, 0).level == pytest.approx(15)
    now[0] += 1e6
    assert buckets.take("a", 0, 60, 0).level == 60
    assert buckets.take("a", 0, 30, 0).level == 30  # the limit was lowered
    buckets.close()
    reopened = SqliteBuckets(tmp_path / "limits.db", lambda: now[0])
    assert reopened.take("a", 0, 60, 0).level == 30
    reopened.close()


@pytest.mark.redis
def test_a_foreign_value_in_redis_is_refused_not_guessed_at(redis_url: str) -> None:
    import redis

    with redis.Redis.from_url(redis_url) as client:
        client.hset("p:bucket:a", mapping={"level": b"\x80\x04K\x01.", "at": "0"})
        client.set("p:bucket:b", b"\x80\x04K\x01.")
        buckets = RedisBuckets(redis_url, prefix="p")
        for name in ("a", "b"):
            with pytest.raises(redis.ResponseError):
                buckets.take(name, 1, 10, 1)
        buckets.take("c", 1, 10, 1)
        assert 60 < client.ttl("p:bucket:c") <= 120
        buckets.close()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0ms"), (0.12, "120ms"), (1, "1s"), (7.5, "7.5s"), (90, "1m30s"), (60, "1m0s"), (-1, "0ms")],
)  # fmt: skip
def test_durations_are_openais(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def limits_of(tmp_path: Path, **limits: Any) -> RateLimits:
    buckets = SqliteBuckets(tmp_path / "limits.db", lambda: 0.0)
    settings = Settings(home=tmp_path, **limits)
    return RateLimits(KeyStore(settings.keys_file), settings, buckets)


@pytest.mark.anyio
async def test_without_limits_nothing_is_kept_or_said(tmp_path: Path) -> None:
    limits = limits_of(tmp_path)
    headers: dict[str, str] = {}
    await limits.admit(NOBODY, headers, costs_tokens=True)
    limits.charge("local", 10**9)
    limits.close()
    assert headers == {}
    assert not (tmp_path / "limits.db").exists()


def test_a_keys_own_limits_come_before_the_servers(tmp_path: Path) -> None:
    keys = KeyStore(tmp_path / "keys.json")
    own, _ = keys.create("own", ("inference",), {"requests_per_minute": 1})
    free, _ = keys.create("free", ("inference",), {name: 0 for name in LIMITS})
    limits = limits_of(tmp_path, requests_per_minute=2, tokens_per_minute=9)
    rates: tuple[Limit, ...] = ("requests_per_minute", "tokens_per_minute")
    assert [limits.of(own.id, name) for name in rates] == [1, 9]
    assert [limits.of(free.id, name) for name in LIMITS] == [0] * len(LIMITS)
    assert [limits.of("local", name) for name in rates] == [2, 9]
    limits.close()


@pytest.mark.anyio
async def test_a_refusal_says_when_to_come_back(tmp_path: Path) -> None:
    limits = limits_of(tmp_path, requests_per_minute=2, tokens_per_minute=60)
    headers: dict[str, str] = {}
    for _ in range(2):
        await limits.admit(NOBODY, headers, costs_tokens=True)
    with pytest.raises(ApiError) as refused:
        await limits.admit(NOBODY, headers, costs_tokens=True)
    assert refused.value.status == 429
    assert refused.value.headers()["Retry-After"] == "30"
    assert headers == {
        "x-ratelimit-limit-requests": "2",
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "1m0s",
        "x-ratelimit-limit-tokens": "60",
        "x-ratelimit-remaining-tokens": "60",
        "x-ratelimit-reset-tokens": "0ms",
    }
    limits.charge("local", 90)
    limits.flush()
    with pytest.raises(ApiError, match="60 tokens") as spent:
        await limits.admit(NOBODY, headers, costs_tokens=True)
    assert spent.value.headers()["Retry-After"] == "31"  # 30 of debt, and then more than nothing
    assert headers["x-ratelimit-reset-tokens"] == "1m30s"
    limits.close()


class Limited(Service):
    """The OpenAI routes with limits, as `build_state` puts them together."""

    def __init__(self, home: Path, **limits: int) -> None:
        super().__init__(home)
        self.limits = limits_of(home, **limits)
        self.state.limits = self.limits
        self.state.engines._meter = lambda use: self.limits.charge(
            use.tenant, use.prompt_tokens + use.completion_tokens
        )

    def __exit__(self, *details: Any) -> None:
        super().__exit__(*details)
        self.limits.close()

    def left(self) -> int:
        """Tokens, from the headers of an answer that costs none."""
        self.limits.flush()
        answer = self.post("tokenize", prompt="a")
        return int(answer.headers["x-ratelimit-remaining-tokens"])


def test_requests_are_counted_and_looking_is_free(tmp_path: Path) -> None:
    with Limited(tmp_path, requests_per_minute=2) as service:
        first = service.complete(max_tokens=1)
        assert first.headers["x-ratelimit-limit-requests"] == "2"
        assert first.headers["x-ratelimit-remaining-requests"] == "1"
        assert "x-ratelimit-limit-tokens" not in first.headers
        streamed = service.chat(stream=True)
        assert streamed.headers["x-ratelimit-remaining-requests"] == "0"
        refused = service.chat()
        assert error_of(refused, 429) == ("rate_limit_exceeded", None)
        assert refused.headers["Retry-After"] == "30"
        assert refused.headers["x-ratelimit-reset-requests"] == "1m0s"
        assert len(service.engine.requests) == 2
        assert service.client.get("/health").status_code == 404  # not one of these routes: no 429


@pytest.mark.parametrize(
    ("ask", "cost"),
    [
        # "the wood" echoed: as many tokens again as the prompt has, at most max_tokens
        (lambda s: s.complete(max_tokens=2), lambda s: len(s.text.encode("the wood")) + 2),
        (
            lambda s: s.complete(max_tokens=1, n=3, stream=True),
            lambda s: 3 * (len(s.text.encode("the wood")) + 1),
        ),
        (lambda s: s.post("embeddings", model=ENCODER, input=["a b", "c"]), lambda s: 7),
        (
            lambda s: s.post("score", context=[5, 6], continuations=[[7], [8, 9]]),
            lambda s: 5,
        ),
    ],
)
def test_tokens_are_charged_as_they_were_used(
    tmp_path: Path, ask: Callable[[Service], Any], cost: Callable[[Service], int]
) -> None:
    with Limited(tmp_path, tokens_per_minute=1000) as service:
        assert ask(service).status_code == 200
        assert service.left() == 1000 - cost(service)


def test_who_owes_tokens_is_refused_until_they_are_back(tmp_path: Path) -> None:
    with Limited(tmp_path, tokens_per_minute=3) as service:
        assert service.complete(max_tokens=2).status_code == 200
        service.limits.flush()
        refused = service.complete(max_tokens=2)
        assert error_of(refused, 429) == ("rate_limit_exceeded", None)
        assert refused.headers["x-ratelimit-remaining-tokens"] == "0"
        assert len(service.engine.requests) == 1


@pytest.mark.anyio
async def test_a_key_has_so_many_requests_under_way(tmp_path: Path) -> None:
    """A stream is under way until its end; a refusal, and one that failed, are not."""
    service = Limited(tmp_path, max_open_requests=2)
    gate = service.engine.hold()
    body = {"model": "echo", "prompt": "the wood", "max_tokens": 2}
    transport = httpx.ASGITransport(service.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:

        async def ask(**more: Any) -> httpx.Response:
            return await client.post("/v1/completions", json=body | more)

        running = [asyncio.create_task(ask(stream=stream)) for stream in (True, False)]
        async with asyncio.timeout(60):
            while service.engine.num_running < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        for _ in range(2):
            refused = await ask()
            assert error_of(refused, 429) == ("rate_limit_exceeded", None)
            assert refused.headers["Retry-After"] == "1"
            assert "2 requests under way" in refused.json()["error"]["message"]
        gate.set()
        assert [(await answer).status_code for answer in running] == [200, 200]
        assert [(await ask(max_tokens=0)).status_code for _ in range(3)] == [400, 400, 400]
        assert (await ask()).status_code == 200
    service.limits.close()


def test_a_store_that_is_gone_lets_nobody_in_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "limits.db").mkdir()
    with Limited(tmp_path, requests_per_minute=5) as service:
        assert service.complete().status_code in (500, 503)
        assert service.engine.requests == []


def test_the_application_keeps_them(tiny_llama: Path, tmp_path: Path) -> None:
    """From the settings and the keys' file to a refusal, with keys that do not feel each other."""
    import_folder(ModelRegistry(tmp_path / "models"), "tiny", tiny_llama, report=lambda _: None)
    settings = Settings(home=tmp_path, models=("tiny",), requests_per_minute=1, tokens_per_minute=5)
    keys = KeyStore(settings.keys_file)
    (_, plain), (_, free) = (
        keys.create("plain", ("inference",), {"tokens_per_minute": 0}),
        keys.create("free", ("inference",), {"requests_per_minute": 0}),
    )
    app = build_app(settings)
    engine = FakeAsyncEngine(info=replace(ECHO_INFO, model="tiny", vocab_size=32))
    app.state.lathe.engines.add("tiny", engine)
    body = {"model": "tiny", "prompt": "abc", "max_tokens": 3}
    with TestClient(app, raise_server_exceptions=False) as client:

        def ask(secret: str) -> Any:
            bearer = {"authorization": f"Bearer {secret}"}
            return client.post("/v1/completions", json=body, headers=bearer)

        first = ask(plain)
        assert (first.status_code, first.headers["x-ratelimit-remaining-requests"]) == (200, "0")
        error = ask(plain)
        assert error_of(error, 429) == ("rate_limit_exceeded", None)
        assert error.headers["x-ratelimit-limit-requests"] == "1"
        assert 0 < int(error.headers["Retry-After"]) <= 60
        other = ask(free)
        assert (other.status_code, other.headers["x-ratelimit-remaining-tokens"]) == (200, "5")
        app.state.lathe.limits.flush()
        owing = ask(free)  # six tokens of five
        assert owing.status_code == 429
        assert "tokens" in owing.json()["error"]["message"]
        assert (
            client.get("/v1/models", headers={"authorization": f"Bearer {plain}"}).status_code
            == 200
        )
    assert len(engine.requests) == 2
    assert settings.limits_database.exists()


@pytest.mark.anyio
async def test_a_wrong_role_costs_nothing() -> None:
    """It is refused before anything is asked of the state."""
    with pytest.raises(ApiError, match="role 'jobs'"):
        await require("jobs")(None, None, NOBODY)  # type: ignore[arg-type]
