"""What a metered engine tells of each request, and how time is shared."""

import pytest

from engines.metering import DeviceClock, EngineUse, MeteredEngine
from engines.protocol import (
    EmbedRequest,
    EngineError,
    GenerateRequest,
    SamplingParams,
    ScoreRequest,
)
from tests.fakes.fake_async_engine import FakeAsyncEngine

pytestmark = pytest.mark.anyio


class Time:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Metered:
    """A metered engine over a clock that a test sets."""

    def __init__(self) -> None:
        self.time = Time()
        self.told: list[EngineUse] = []
        self.fake = FakeAsyncEngine()
        self.clock = DeviceClock(self.time)
        self.engine = MeteredEngine(self.fake, "m", self.told.append, self.clock)

    def request(self, name: str = "r", max_tokens: int = 9) -> GenerateRequest:
        return GenerateRequest(
            request_id=name,
            token_ids=(5, 6, 7),
            params=SamplingParams(max_tokens=max_tokens),
            tenant="t",
        )


async def test_a_request_tells_its_prompt_and_then_the_rest() -> None:
    metered = Metered()
    stream = await metered.engine.generate(metered.request(max_tokens=2))
    (first,) = metered.told
    assert (first.tenant, first.model, first.operation) == ("t", "m", "generate")
    assert (first.num_requests, first.prompt_tokens, first.completion_tokens) == (1, 3, 0)
    metered.time.now = 2.0
    async for _ in stream:
        pass
    await stream.aclose()
    _, rest = metered.told
    assert (rest.num_requests, rest.prompt_tokens, rest.completion_tokens) == (0, 0, 2)
    assert rest.device_seconds == 2.0


async def test_who_leaves_early_pays_for_what_was_read_once() -> None:
    metered = Metered()
    request = metered.request()
    stream = await metered.engine.generate(request)
    num_read = len((await anext(stream)).token_ids) + len((await anext(stream)).token_ids)
    await stream.aclose()
    await stream.aclose()
    assert [use.completion_tokens for use in metered.told] == [0, num_read]


async def test_time_is_shared_and_none_is_lost() -> None:
    """By hand: a alone 0-1, a and b 1-3, b alone 3-6: a has 1 + 1, b has 1 + 3."""
    metered = Metered()
    a = await metered.engine.generate(metered.request("a"))
    metered.time.now = 1.0
    b = await metered.engine.generate(metered.request("b"))
    metered.time.now = 3.0
    await a.aclose()
    metered.time.now = 6.0
    await b.aclose()
    metered.time.now = 100.0  # idle
    shares = [use.device_seconds for use in metered.told if use.num_requests == 0]
    assert shares == [2.0, 4.0]


async def test_vectors_and_scores_are_told() -> None:
    metered = Metered()
    await metered.engine.embed(EmbedRequest(request_id="e", token_ids=((1, 2), (3,)), tenant="t"))
    await metered.engine.score(
        ScoreRequest(request_id="s", context_ids=(1,), continuation_ids=((2, 3),), tenant="t")
    )
    seen = [(use.operation, use.num_requests, use.prompt_tokens) for use in metered.told]
    assert seen == [("embed", 1, 3), ("score", 1, 3)]


async def test_what_is_refused_costs_nothing() -> None:
    metered = Metered()
    metered.fake.refuse = EngineError("queue_full", "full")
    with pytest.raises(EngineError):
        await metered.engine.generate(metered.request())
    assert metered.told == []
    metered.fake.refuse = None
    metered.time.now = 1.0
    stream = await metered.engine.generate(metered.request())
    metered.time.now = 2.0
    await stream.aclose()
    assert metered.told[-1].device_seconds == 1.0  # it was alone
