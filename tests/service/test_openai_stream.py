"""Streams: keep-alive comments, errors, and aborts when the client leaves, over ASGI and over a real connection."""

import asyncio
import json
import socket
import struct
import threading
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import uvicorn

from engines.protocol import EngineError
from service.errors import ApiError
from service.sse import DONE, EventStreamResponse, openai_events, with_keep_alive
from tests.service.openai_app import DECODER, ENCODER, Service

DEADLINE_SECONDS = 20.0


class Connection:
    """An ASGI connection in memory."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []
        self.left = asyncio.Event()
        self.body_sent = asyncio.Event()
        self.silent = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)
        if message.get("body"):
            self.body_sent.set()
        if self.body.count(b": keep-alive") > 1:
            self.silent.set()

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)


class Source:
    """Events, and what became of them."""

    def __init__(self, *events: Any) -> None:
        self.events = events
        self.go_on = asyncio.Event()
        self.ended = asyncio.Event()
        self.num_closed = 0

    async def generate(self) -> AsyncGenerator[Any, None]:
        try:
            for event in self.events:
                if event is ...:
                    await self.go_on.wait()
                elif isinstance(event, Exception):
                    raise event
                else:
                    yield event
        finally:
            self.ended.set()

    async def close(self) -> None:
        self.num_closed += 1


@pytest.mark.anyio
async def test_events_as_they_are() -> None:
    source, connection = Source(b"a", b"b"), Connection()
    response = EventStreamResponse(source.generate(), source.close)
    await response({}, connection.receive, connection.send)
    assert connection.body == b"ab"
    start = connection.sent[0]
    assert (b"content-type", b"text/event-stream; charset=utf-8") in start["headers"]
    assert all(name != b"content-length" for name, _ in start["headers"])
    assert connection.sent[-1] == {"type": "http.response.body", "body": b""}
    assert source.num_closed == 1


@pytest.mark.anyio
async def test_a_comment_in_every_silence() -> None:
    source, connection = Source(b"a", ..., b"b"), Connection()
    response = EventStreamResponse(source.generate(), source.close, keep_alive_seconds=0.001)
    running = asyncio.ensure_future(response({}, connection.receive, connection.send))
    async with asyncio.timeout(DEADLINE_SECONDS):
        await connection.silent.wait()
        source.go_on.set()
        await running
    assert connection.body.startswith(b"a: keep-alive\n\n: keep-alive\n\n")
    assert connection.body.endswith(b": keep-alive\n\nb")


@pytest.mark.anyio
async def test_a_client_that_leaves_ends_the_source() -> None:
    source, connection = Source(b"a", ..., b"b"), Connection()
    response = EventStreamResponse(source.generate(), source.close)
    running = asyncio.ensure_future(response({}, connection.receive, connection.send))
    async with asyncio.timeout(DEADLINE_SECONDS):
        await connection.body_sent.wait()
        assert not source.ended.is_set()
        connection.left.set()
        await running
    assert source.ended.is_set()
    assert source.num_closed == 1
    assert connection.body == b"a"


@pytest.mark.anyio
async def test_a_failing_source_is_raised_and_closed() -> None:
    source, connection = Source(b"a", ValueError("x")), Connection()
    response = EventStreamResponse(source.generate(), source.close)
    with pytest.raises(ValueError, match="x"):
        await response({}, connection.receive, connection.send)
    assert source.num_closed == 1


@pytest.mark.anyio
async def test_leaving_the_keep_alive_closes_its_source() -> None:
    source = Source("a", ...)
    events = with_keep_alive(source.generate(), 0.001)
    assert await anext(events) == "a"
    assert await anext(events) == ": keep-alive\n\n"
    await events.aclose()
    assert source.ended.is_set()


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("error", "code"),
    [
        (EngineError("queue_full", "full"), "server_overloaded"),
        (ApiError("request_timeout", "late"), "request_timeout"),
        (RuntimeError("secret"), "internal_error"),
    ],
)
async def test_an_error_is_the_last_event(error: Exception, code: str) -> None:
    events = [event async for event in openai_events(Source({"a": 1}, error).generate())]
    assert events[0] == b'data: {"a":1}\n\n'
    body = json.loads(events[1].removeprefix(b"data: "))
    assert body["error"]["code"] == code
    assert "secret" not in body["error"]["message"]
    assert len(events) == 2
    ended = [event async for event in openai_events(Source({"a": 1}).generate())]
    assert ended[-1] == DONE


@pytest.fixture
def service(tmp_path: Path) -> Service:
    return Service(tmp_path)


@pytest.fixture
def address(service: Service) -> Iterator[tuple[str, int]]:
    """A real server on a free port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(service.app, log_config=None, lifespan="off")
        server = uvicorn.Server(config)
        started = threading.Event()
        startup = server.startup

        async def announce(sockets: Any = None) -> None:
            await startup(sockets)
            started.set()

        server.startup = announce  # type: ignore[method-assign]
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        assert started.wait(DEADLINE_SECONDS)
        yield listener.getsockname()
        server.should_exit = True
        thread.join(DEADLINE_SECONDS)


@pytest.fixture
def client(address: tuple[str, int]) -> Iterator[openai.OpenAI]:
    host, port = address
    with openai.OpenAI(base_url=f"http://{host}:{port}/v1", api_key="-", max_retries=0) as client:
        yield client


class Aborts(list[str]):
    """Ids of aborted requests; says when there are so many."""

    def __init__(self, expected: int) -> None:
        super().__init__()
        self.expected = expected
        self.complete = threading.Event()

    def append(self, item: str) -> None:
        super().append(item)
        if len(self) == self.expected:
            self.complete.set()


def forever(service: Service) -> None:
    """The engine gives one token and then nothing more."""
    service.engine.gate = asyncio.Event()


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_a_disconnect_aborts_the_engine_requests(
    service: Service, address: tuple[str, int], path: str, stream: bool, n: int
) -> None:
    forever(service)
    service.engine.aborted = aborts = Aborts(n)
    submitted = threading.Event()
    generate = service.engine.generate

    async def announce(request: Any) -> Any:
        accepted = await generate(request)
        if len(service.engine.requests) == n:
            submitted.set()
        return accepted

    service.engine.generate = announce  # type: ignore[method-assign]
    body = {"model": DECODER, "n": n, "stream": stream}
    body |= (
        {"prompt": "a"}
        if path == "completions"
        else {"messages": [{"role": "user", "content": "a"}]}
    )
    content = json.dumps(body).encode()
    with socket.create_connection(address) as connection:
        connection.sendall(
            f"POST /v1/{path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(content)}\r\n\r\n".encode()
            + content
        )
        assert submitted.wait(DEADLINE_SECONDS)
        if stream:
            assert b"200 OK" in connection.recv(4096)
        # Reset, as a killed client's kernel does.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert aborts.complete.wait(DEADLINE_SECONDS)
    assert len(set(aborts)) == n


def test_openai_chat(service: Service, client: openai.OpenAI) -> None:
    service.replies("Hello 🙂")
    answer = client.chat.completions.create(
        model=DECODER, messages=[{"role": "user", "content": "Hi"}], logprobs=True, top_logprobs=2
    )
    assert answer.choices[0].message.content == "Hello 🙂"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content
    assert content is not None
    assert b"".join(bytes(e.bytes or []) for e in content).decode() == "Hello 🙂"
    assert all(len(entry.top_logprobs) == 2 for entry in content)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_openai_stream(service: Service, client: openai.OpenAI) -> None:
    service.replies("one two")
    chunks = list(
        client.chat.completions.create(
            model=DECODER,
            messages=[{"role": "user", "content": "Hi"}],
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == "one two"
    assert [c.choices[0].finish_reason for c in chunks[:-1]][-1] == "stop"
    assert chunks[-1].usage is not None


def test_openai_completions(service: Service, client: openai.OpenAI) -> None:
    service.replies(" turns")
    answer = client.completions.create(model=DECODER, prompt="the wood", echo=True, logprobs=2)
    assert answer.choices[0].text == "the wood turns"
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.tokens is not None
    assert len(logprobs.tokens) == len(logprobs.token_logprobs)
    assert logprobs.token_logprobs[0] is None
    pieces = client.completions.create(model=DECODER, prompt="the wood", stream=True)
    assert "".join(chunk.choices[0].text for chunk in pieces) == " turns"


def test_openai_embeddings(service: Service, client: openai.OpenAI) -> None:
    answer = client.embeddings.create(model=ENCODER, input=["a", "a b"])  # base64 on the wire
    as_floats = client.embeddings.create(model=ENCODER, input=["a", "a b"], encoding_format="float")
    for one, other in zip(answer.data, as_floats.data, strict=True):
        assert one.embedding == pytest.approx(other.embedding)
    assert answer.usage.total_tokens == 7


def test_openai_errors(service: Service, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model=DECODER, prompt="a", extra_body={"unknown": 1})
    assert (bad.value.code, bad.value.param) == ("unsupported_parameter", "unknown")
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(
            model=DECODER, messages=[{"role": "user", "content": "x" * 600}]
        )
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="none", prompt="a")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    service.engine.die_after = 1
    with pytest.raises(openai.APIError) as died:
        list(client.completions.create(model=DECODER, prompt="a b c", stream=True))
    assert died.value.code == "engine_dead"
