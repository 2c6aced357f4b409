"""The fakes keep the protocol, so that tests built on them mean something."""

import pytest

from engines.protocol import AsyncEngine, Engine, EngineError, GenerateRequest, SamplingParams
from tests.fakes.echo_engine import EOS, EchoEngine
from tests.fakes.fake_async_engine import FakeAsyncEngine


def _request(max_tokens: int = 8) -> GenerateRequest:
    params = SamplingParams(max_tokens=max_tokens, logprobs=1)
    return GenerateRequest(request_id="r", token_ids=(5, 6), params=params)


def test_echo_engine_repeats_the_prompt_and_stops() -> None:
    engine: Engine = EchoEngine()
    engine.submit(_request())
    outputs = []
    while engine.has_work():
        outputs += engine.step()
    assert [output.token_ids for output in outputs] == [(5,), (6,), (EOS,)]
    assert outputs[-1].finish_reason == "stop"
    assert outputs[-1].stop_token_id == EOS


@pytest.mark.anyio
async def test_fake_async_engine_is_scripted_and_sees_aborts() -> None:
    fake = FakeAsyncEngine(reply=[7, 8, 9])
    engine: AsyncEngine = fake
    stream = await engine.generate(_request(max_tokens=3))
    assert [output.token_ids async for output in stream] == [(7,), (8,), (9,)]
    stream = await engine.generate(_request())
    await stream.__anext__()
    await stream.aclose()
    assert fake.aborted == ["r"]
    assert fake.num_running == 0
    fake.is_dead = True
    with pytest.raises(EngineError, match="died"):
        await engine.generate(_request())
