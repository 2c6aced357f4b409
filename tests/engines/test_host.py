"""The host in this process, where a test can see what its engine was asked."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from engines.client import EngineClient, _merge
from engines.host import MAX_CHUNK_ITEMS, EngineHost, _chunks, chooses_native
from engines.protocol import (
    EmbedRequest,
    EmbedResult,
    EngineError,
    GenerateRequest,
    SamplingParams,
    TokenLogprob,
    TokenOutput,
)
from tests.engines.conftest import eventually
from tests.fakes.echo_engine import EchoEngine

pytestmark = pytest.mark.anyio


@dataclass
class RecordingEngine(EchoEngine):
    calls: list[str] = field(default_factory=list)

    def step(self) -> list[TokenOutput]:
        self.calls.append("step")
        return super().step()

    def embed(self, request: EmbedRequest) -> EmbedResult:
        self.calls.append("embed")
        return super().embed(request)


@asynccontextmanager
async def _serving(engine: EchoEngine, path: Path) -> AsyncIterator[EngineClient]:
    host = EngineHost(engine)
    ready = asyncio.Event()
    task = asyncio.create_task(host.serve(path, on_ready=ready.set))
    await ready.wait()
    client = await EngineClient.connect(path)
    try:
        yield client
    finally:
        await client.aclose()
        host.stop()
        await task
        assert host.failure is None
        assert engine.closed


async def test_a_long_embed_call_shares_the_engine(tmp_path: Path) -> None:
    engine = RecordingEngine()
    async with _serving(engine, tmp_path / "s") as client:
        params = SamplingParams(max_tokens=400, ignore_eos=True)
        request = GenerateRequest(request_id="r", token_ids=(5,), params=params)
        stream = await client.generate(request)
        texts = tuple((index, index + 1) for index in range(10 * MAX_CHUNK_ITEMS))
        await client.embed(EmbedRequest(request_id="e", token_ids=texts))
        outputs = [output async for output in stream]
    assert sum(len(output.token_ids) for output in outputs) == 400
    while_both = engine.calls[engine.calls.index("embed") : engine.calls.index("embed") + 20]
    assert while_both == ["embed", "step"] * 10
    assert engine.calls.count("embed") == 10


async def test_a_cancelled_embed_call_stops(tmp_path: Path) -> None:
    engine = RecordingEngine()
    async with _serving(engine, tmp_path / "s") as client:
        texts = tuple((1,) for _ in range(MAX_CHUNK_ITEMS * 2000))
        call = asyncio.create_task(client.embed(EmbedRequest(request_id="e", token_ids=texts)))
        await eventually(lambda: "embed" in engine.calls)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await client.stats()
        num_calls = len(engine.calls)
        await client.stats()
        assert len(engine.calls) == num_calls < 2000


async def test_an_answer_that_fits_no_frame_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with _serving(EchoEngine(), tmp_path / "s") as client:
        monkeypatch.setattr("engines.wire.MAX_FRAME_BYTES", 2000)
        texts = tuple((1,) for _ in range(200))
        with pytest.raises(EngineError, match="the answer is too large"):
            await client.embed(EmbedRequest(request_id="e", token_ids=texts))
        monkeypatch.setattr("engines.wire.MAX_FRAME_BYTES", 200)
        with pytest.raises(EngineError, match="the request is too large"):
            await client.embed(EmbedRequest(request_id="e", token_ids=texts))


def test_chunks_keep_the_order_and_the_limits() -> None:
    lengths = [1] * 40 + [600] * 4 + [5000] + [1]
    chunks = _chunks(range(len(lengths)), lengths)
    assert [index for chunk in chunks for index in chunk] == list(range(len(lengths)))
    assert [len(chunk) for chunk in chunks] == [32, 8, 3, 1, 1, 1]


def test_unread_outputs_come_as_one() -> None:
    def output(token_id: int, **fields: object) -> TokenOutput:
        logprob = TokenLogprob(token_id=token_id, logprob=-1.0)
        return TokenOutput(
            request_id="r",
            token_ids=(token_id,),
            logprobs=(logprob,),
            **fields,  # type: ignore[arg-type]
        )

    first = TokenLogprob(token_id=9, logprob=None)
    merged = _merge(
        [
            output(1, prompt_logprobs=(first,), queue_seconds=0.5, prefill_seconds=0.25),
            output(2),
            output(3, finish_reason="stop"),
        ]
    )
    assert merged.token_ids == (1, 2, 3)
    assert merged.logprobs is not None
    assert [entry.token_id for entry in merged.logprobs] == [1, 2, 3]
    assert merged.prompt_logprobs == (first,)
    assert (merged.queue_seconds, merged.prefill_seconds) == (0.5, 0.25)
    assert merged.finish_reason == "stop"


def test_the_engine_is_chosen_by_architecture_and_said(
    decoder_checkpoint: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import GPT2Config

    from engines.model import UnsupportedModelError

    caplog.set_level("INFO")
    GPT2Config().save_pretrained(tmp_path)
    llama = decoder_checkpoint("llama")
    assert chooses_native("auto", llama)
    assert "native, which supports model type llama" in caplog.text
    assert not chooses_native("auto", tmp_path)
    assert "transformers, because the native one does not support model type gpt2" in caplog.text
    assert not chooses_native("transformers", llama)
    assert chooses_native("native", llama)
    with pytest.raises(UnsupportedModelError, match="gpt2"):
        chooses_native("native", tmp_path)
