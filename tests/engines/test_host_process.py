"""Host and client over a real socket, with the host in a real process."""

import asyncio
import itertools
import signal
import socket
import stat
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from engines import wire
from engines.client import EngineClient
from engines.protocol import (
    EmbedRequest,
    EngineError,
    GenerateRequest,
    SamplingParams,
    ScoreRequest,
    TokenOutput,
    TokenStream,
)
from tests.engines.conftest import HostProcess, StartHost, eventually
from tests.fakes.echo_engine import ECHO_INFO, EOS, echo_embed, echo_score

pytestmark = [pytest.mark.anyio, pytest.mark.processes]

ENDLESS = SamplingParams(max_tokens=10**8, ignore_eos=True)
LONG = ("--max-model-len", str(2 * 10**8), "--step-seconds", "0.001")


def _request(
    request_id: str, *token_ids: int, params: SamplingParams | None = None
) -> GenerateRequest:
    params = params or SamplingParams(max_tokens=100)
    return GenerateRequest(request_id=request_id, token_ids=token_ids or (5, 6, 7), params=params)


@asynccontextmanager
async def _connect(host: HostProcess) -> AsyncIterator[EngineClient]:
    client = await EngineClient.connect(host.socket)
    try:
        yield client
    finally:
        await client.aclose()


async def _collect(client: EngineClient, request: GenerateRequest) -> list[TokenOutput]:
    return [output async for output in await client.generate(request)]


async def _extend(outputs: list[TokenOutput], stream: TokenStream) -> None:
    async for output in stream:
        outputs.append(output)


def _token_ids(outputs: list[TokenOutput]) -> list[int]:
    return [token_id for output in outputs for token_id in output.token_ids]


async def test_tokens_stream_in_order(start_host: StartHost) -> None:
    async with _connect(start_host()) as client:
        assert client.info == ECHO_INFO
        prompt = tuple(range(10, 110))
        params = SamplingParams(max_tokens=200, logprobs=1, prompt_logprobs=0)
        outputs = await _collect(client, _request("r", *prompt, params=params))
    assert _token_ids(outputs) == [*prompt, EOS]
    assert outputs[-1].finish_reason == "stop"
    assert outputs[-1].stop_token_id == EOS
    logprobs = [entry for output in outputs for entry in output.logprobs or ()]
    assert [entry.token_id for entry in logprobs] == [*prompt, EOS]
    assert outputs[0].prompt_logprobs is not None
    assert len(outputs[0].prompt_logprobs) == 100
    assert all(output.prompt_logprobs is None for output in outputs[1:])


async def test_refusals_come_before_any_token(start_host: StartHost) -> None:
    async with _connect(start_host()) as client:
        with pytest.raises(EngineError, match="at most 512 fit") as caught:
            await client.generate(_request("r", params=SamplingParams(max_tokens=10**4)))
        assert caught.value.code == "context_length_exceeded"
        with pytest.raises(EngineError) as caught:
            await client.generate(GenerateRequest(request_id="r", token_ids=(), params=ENDLESS))
        assert (caught.value.code, caught.value.param) == ("invalid_value", "prompt")
        assert _token_ids(await _collect(client, _request("r"))) == [5, 6, 7, EOS]


async def test_leaving_a_stream_aborts_its_request(start_host: StartHost) -> None:
    async with _connect(start_host(*LONG)) as client:
        stream = await client.generate(_request("r", params=ENDLESS))
        await stream.__anext__()
        assert (await client.stats()).num_requests_running == 1
        await stream.aclose()
        assert (await client.stats()).num_requests_running == 0
        with pytest.raises(StopAsyncIteration):
            await stream.__anext__()
        assert _token_ids(await _collect(client, _request("r"))) == [5, 6, 7, EOS]


async def test_closing_a_stream_wakes_its_reader(start_host: StartHost) -> None:
    async with _connect(start_host("--max-num-seqs", "1", *LONG)) as client:
        running = await client.generate(_request("running", params=ENDLESS))
        waiting = await client.generate(_request("waiting"))
        reader = asyncio.ensure_future(waiting.__anext__())
        await running.__anext__()
        await waiting.aclose()
        with pytest.raises(StopAsyncIteration):
            await reader


async def test_a_client_that_leaves_takes_its_requests_along(start_host: StartHost) -> None:
    host = start_host(*LONG)
    async with _connect(host) as observer:
        async with _connect(host) as client:
            for index in range(3):
                await client.generate(_request(f"r{index}", params=ENDLESS))
            assert (await observer.stats()).num_requests_running == 3

        async def is_idle() -> bool:
            return (await observer.stats()).num_requests_running == 0

        await eventually(is_idle)


async def test_a_killed_host_fails_every_open_stream(start_host: StartHost) -> None:
    host = start_host(*LONG)
    async with _connect(host) as client:
        streams = [await client.generate(_request(f"r{i}", params=ENDLESS)) for i in range(5)]
        await streams[0].__anext__()
        host.process.kill()

        async def read_to_the_end(index: int) -> str:
            try:
                async for _ in streams[index]:
                    pass
            except EngineError as error:
                return error.code
            return "ended"

        codes = await asyncio.gather(*(read_to_the_end(index) for index in range(5)))
        assert codes == ["engine_dead"] * 5
        await asyncio.wait_for(client.closed.wait(), 10)
        assert client.is_dead
        with pytest.raises(EngineError, match="ended"):
            await client.stats()
    with pytest.raises(EngineError, match="does not answer"):
        await EngineClient.connect(host.socket)


async def test_a_client_that_does_not_read_is_cut_off(start_host: StartHost) -> None:
    host = start_host(*LONG, "--step-seconds", "0")
    params = SamplingParams(max_tokens=10**8, ignore_eos=True, logprobs=50)
    reader, writer = await asyncio.open_unix_connection(str(host.socket), limit=1024)
    writer.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    writer.write(wire.encode_frame(wire.Generate(1, _request("deaf", params=params))))
    async with _connect(host) as client:

        async def is_running() -> bool:
            return (await client.stats()).generation_tokens_total > 0

        await eventually(is_running)
        assert _token_ids(await _collect(client, _request("r"))) == [5, 6, 7, EOS]

        async def is_cut_off() -> bool:
            return (await client.stats()).num_requests_running == 0

        await eventually(is_cut_off)
    writer.close()
    assert reader is not None


async def test_two_hundred_streams_at_once(start_host: StartHost) -> None:
    async with _connect(start_host("--max-num-seqs", "16")) as client:
        requests = [_request(f"r{i}", *range(10, 20 + i % 7), 100 + i) for i in range(200)]
        results = await asyncio.gather(*(_collect(client, request) for request in requests))
    for request, outputs in zip(requests, results, strict=True):
        assert _token_ids(outputs) == [*request.token_ids, EOS]


async def test_garbage_closes_its_connection_only(start_host: StartHost) -> None:
    host = start_host()
    async with _connect(host) as client:
        for garbage in (
            b"\xff" * 64,
            (5).to_bytes(4, "big") + b"\xc1\xc1\xc1\xc1\xc1",
            b"GET / HTTP/1.1\r\n\r\n",
        ):
            reader, writer = await asyncio.open_unix_connection(str(host.socket))
            writer.write(garbage)
            assert await wire.read_frame(reader)  # the greeting
            assert await asyncio.wait_for(reader.read(), 10) == b""
            writer.close()
        assert _token_ids(await _collect(client, _request("r"))) == [5, 6, 7, EOS]


async def test_a_request_id_runs_once_on_a_host(start_host: StartHost) -> None:
    host = start_host(*LONG)
    async with _connect(host) as first, _connect(host) as second:
        await first.generate(_request("r", params=ENDLESS))
        with pytest.raises(EngineError, match="in use"):
            await first.generate(_request("r"))
        with pytest.raises(EngineError, match="in use"):
            await second.generate(_request("r"))
        second.abort("r")  # not its own
        assert (await second.stats()).num_requests_running == 1


async def test_a_failed_step_ends_its_requests_and_the_host_goes_on(start_host: StartHost) -> None:
    async with _connect(start_host("--raise-on-token", "13")) as client:
        with pytest.raises(EngineError) as caught:
            await _collect(client, _request("bad", 13))
        assert caught.value.code == "internal_error"
        assert _token_ids(await _collect(client, _request("good"))) == [5, 6, 7, EOS]


async def test_a_failed_request_shows_its_tokens_first(start_host: StartHost) -> None:
    async with _connect(start_host("--raise-on-token", "13", *LONG)) as client:
        stream = await client.generate(_request("running", params=ENDLESS))
        outputs = [await stream.__anext__()]
        await client.generate(_request("bad", 13))
        with pytest.raises(EngineError, match="the engine failed"):
            await _extend(outputs, stream)
        token_ids = _token_ids(outputs)
        assert token_ids == [5 + index % 3 for index in range(len(token_ids))]
        with pytest.raises(StopAsyncIteration):
            await stream.__anext__()
        await stream.aclose()


async def test_steps_that_keep_failing_end_the_process(start_host: StartHost) -> None:
    host = start_host("--raise-on-token", "13")
    async with _connect(host) as client:
        for index in range(2):
            with pytest.raises(EngineError, match="the engine failed"):
                await _collect(client, _request(f"bad{index}", 13))
        with pytest.raises(EngineError, match="ended"):
            await _collect(client, _request("last", 13))
    assert host.wait_for_status("failed")["error"] == "RuntimeError: told to raise"
    assert host.wait() == 1


async def _submit_until_refused(client: EngineClient) -> None:
    for index in itertools.count():
        await client.generate(_request(f"late{index}"))


async def test_sigterm_lets_running_requests_end(start_host: StartHost) -> None:
    host = start_host(*LONG, "--drain-seconds", "60")
    async with _connect(host) as client:
        params = SamplingParams(max_tokens=500, ignore_eos=True)
        stream = await client.generate(_request("r", params=params))
        outputs = [await stream.__anext__()]
        host.process.send_signal(signal.SIGTERM)
        await asyncio.to_thread(host.wait_for_status, "draining")
        with pytest.raises(EngineError) as caught:
            await _submit_until_refused(client)
        assert caught.value.code == "engine_dead"
        outputs += [output async for output in stream]
    assert len(_token_ids(outputs)) == 500
    assert outputs[-1].finish_reason == "length"
    assert host.wait() == 0
    assert not host.socket.exists()


async def test_draining_has_a_limit(start_host: StartHost) -> None:
    host = start_host(*LONG, "--drain-seconds", "0.2")
    async with _connect(host) as client:
        stream = await client.generate(_request("r", params=ENDLESS))
        host.process.send_signal(signal.SIGTERM)
        with pytest.raises(EngineError, match="shutting down") as caught:
            async for _ in stream:
                pass
    assert caught.value.code == "engine_dead"
    assert host.wait() == 0


async def test_the_socket_is_private_and_has_one_owner(start_host: StartHost) -> None:
    host = start_host()
    assert stat.S_IMODE(host.socket.stat().st_mode) == 0o600
    second = start_host(ready=False)
    assert "SocketInUseError" in second.wait_for_status("failed")["error"]
    assert second.wait() == 1
    host.process.kill()
    host.wait()
    assert host.socket.exists()
    async with _connect(start_host()) as client:
        assert (await client.stats()).num_requests_running == 0


def test_a_file_is_never_taken_for_a_stale_socket(start_host: StartHost) -> None:
    host = start_host()
    path = host.socket.with_name("notes.txt")
    path.write_text("keep me")
    assert start_host(socket=path, ready=False).wait() == 1
    assert path.read_text() == "keep me"


async def test_a_host_dies_with_its_parent(tmp_path: Path) -> None:
    path = tmp_path / "s"
    program = (
        "import subprocess, sys;"
        f"h = subprocess.Popen([sys.executable, '-m', 'tests.fakes.echo_host', '--socket', {str(path)!r}]);"
        "h.wait()"
    )
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", program)
    await eventually(path.exists)
    client = await EngineClient.connect(path)
    parent.kill()
    await parent.wait()
    await asyncio.wait_for(client.closed.wait(), 10)
    await client.aclose()


def test_a_failed_load_says_so(start_host: StartHost) -> None:
    host = start_host("--fail-load", ready=False)
    assert host.wait_for_status("failed")["error"] == "ValueError: told to fail"
    assert host.statuses[0] == {"status": "loading", "model": "echo", "fraction": 0.0}
    assert host.wait() == 1


async def test_embed_and_score_come_back_whole(start_host: StartHost) -> None:
    texts = tuple(tuple(range(1, 2 + i * 37 % 101)) for i in range(150))
    embed = EmbedRequest(request_id="e", token_ids=texts)
    score = ScoreRequest(request_id="s", context_ids=(1, 2), continuation_ids=texts)
    async with _connect(start_host()) as client:
        assert await client.embed(embed) == echo_embed(embed)
        result = await client.score(score)
        assert result.scores == echo_score(score).scores
        assert result.num_tokens == 2 + sum(len(ids) for ids in texts)


async def test_sleep_and_wake(start_host: StartHost) -> None:
    async with _connect(start_host()) as client:
        await client.sleep()
        assert (await client.stats()).sleeping
        with pytest.raises(EngineError) as caught:
            await client.generate(_request("r"))
        assert caught.value.code == "sleeping"
        await client.wake()
        assert _token_ids(await _collect(client, _request("r"))) == [5, 6, 7, EOS]
