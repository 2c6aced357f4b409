"""What is sent again, and when: a scripted network and a clock that only waiting moves."""

import email.utils
import io
import time
from collections.abc import Callable
from typing import Any

import anyio
import httpx
import pyarrow as pa
import pytest
from lathe_client import (
    ApiStatusError,
    AsyncEnrichmentClient,
    ConnectionFailedError,
    EnrichmentClient,
    RetryPolicy,
    UnexpectedAnswerError,
)

ERROR = {"error": {"message": "no", "type": "t", "param": None, "code": "some_code"}}


class Network:
    """Answers in turn; the last one for ever.

    Attributes:
        waits: seconds of every wait.
    """

    def __init__(self, *answers: httpx.Response | type[httpx.TransportError]) -> None:
        self._answers = list(answers)
        self.requests: list[httpx.Request] = []
        self.waits: list[float] = []
        self.now = 1000.0

    def answer(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, httpx.Response):
            return httpx.Response(
                answer.status_code, headers=answer.headers, content=answer.content
            )
        raise answer("scripted", request=request)

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds

    async def asleep(self, seconds: float) -> None:
        self.sleep(seconds)


def refusal(status: int, **headers: str) -> httpx.Response:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.Response(status, json=ERROR, headers=names)


PROMPTS = httpx.Response(200, json={"object": "list", "data": [{"id": "summary"}]})
GRAPH = httpx.Response(
    201,
    json={
        "id": "graph-1", "name": "g", "directed": False, "id_type": "int64", "num_nodes": 1,
        "num_edges": 0, "num_self_loops": 0, "num_duplicate_edges": 0, "has_labels": False,
        "has_splits": False, "content_hash": "h", "told_by_a_newer_service": 1,
    },
)  # fmt: skip


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    def ask(network: Network, **policy: Any) -> Any:
        monkeypatch.setattr("lathe_client.api.time.sleep", network.sleep)
        monkeypatch.setattr("lathe_client.api.time.monotonic", lambda: network.now)
        transport = httpx.MockTransport(network.answer)
        with EnrichmentClient(retry=RetryPolicy(**policy), transport=transport) as client:
            return client.prompts()

    return ask


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 507])
def test_what_may_pass_is_tried_again(status: int, ask: Callable[..., Any]) -> None:
    network = Network(refusal(status), refusal(status), PROMPTS)
    assert ask(network) == [{"id": "summary"}]
    assert len(network.requests) == 3
    first, second = network.waits
    assert 0.25 <= first <= 0.5
    assert 0.5 <= second <= 1.0


@pytest.mark.parametrize("status", [400, 401, 403, 404, 406, 409, 413, 415])
@pytest.mark.parametrize("headers", [{}, {"x_should_retry": "true", "retry_after": "1"}])
def test_what_stays_wrong_is_not(
    status: int, headers: dict[str, str], ask: Callable[..., Any]
) -> None:
    network = Network(refusal(status, **headers))
    with pytest.raises(ApiStatusError) as caught:
        ask(network)
    assert (caught.value.status, caught.value.code) == (status, "some_code")
    assert len(network.requests) == 1


def test_the_service_may_forbid_it(ask: Callable[..., Any]) -> None:
    network = Network(refusal(507, x_should_retry="false"))
    with pytest.raises(ApiStatusError):
        ask(network)
    assert network.waits == []


def test_retry_after_is_obeyed_as_seconds_and_as_a_date(ask: Callable[..., Any]) -> None:
    date = email.utils.formatdate(time.time() + 30, usegmt=True)
    network = Network(refusal(429, retry_after="7.5"), refusal(503, retry_after=date), PROMPTS)
    ask(network)
    assert network.waits[0] == 7.5
    assert 25 < network.waits[1] <= 30


@pytest.mark.parametrize("value", ["soon", "-3", "nan", ""])
def test_a_retry_after_that_says_nothing_leaves_the_back_off(
    value: str, ask: Callable[..., Any]
) -> None:
    network = Network(refusal(429, retry_after=value), PROMPTS)
    ask(network)
    assert 0.25 <= network.waits[0] <= 0.5


def test_attempts_are_capped(ask: Callable[..., Any]) -> None:
    network = Network(refusal(503))
    with pytest.raises(ApiStatusError):
        ask(network, max_attempts=4)
    assert len(network.requests) == 4


def test_a_wait_beyond_the_total_time_is_not_begun(ask: Callable[..., Any]) -> None:
    network = Network(refusal(503, retry_after="40"))
    with pytest.raises(ApiStatusError):
        ask(network, max_attempts=100, max_seconds=100)
    assert network.waits == [40, 40]


@pytest.mark.parametrize(
    "failure", [httpx.ConnectError, httpx.ReadError, httpx.RemoteProtocolError, httpx.ReadTimeout]
)
def test_a_failed_connection_is_tried_again_and_then_told(
    failure: type[httpx.TransportError], ask: Callable[..., Any]
) -> None:
    assert ask(Network(failure, PROMPTS)) == [{"id": "summary"}]
    network = Network(failure)
    with pytest.raises(ConnectionFailedError, match=failure.__name__):
        ask(network, max_attempts=3)
    assert len(network.requests) == 3


def test_the_waits_grow_to_a_limit() -> None:
    policy = RetryPolicy(first_seconds=1, longest_seconds=8, max_attempts=10, max_seconds=1e9)
    for num_sent in range(1, 10):
        wait = policy.wait_seconds(num_sent, 0, 503, {})
        assert wait is not None
        assert min(2 ** (num_sent - 1), 8) / 2 <= wait <= min(2 ** (num_sent - 1), 8)
    assert len({policy.wait_seconds(1, 0, 503, {}) for _ in range(20)}) > 1


@pytest.mark.parametrize(
    "wrong", [{"max_attempts": 0}, {"max_seconds": -1.0}, {"first_seconds": float("nan")}]
)
def test_a_policy_that_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RetryPolicy(**wrong)


def test_one_idempotency_key_per_call(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network(refusal(503), GRAPH)
    monkeypatch.setattr("lathe_client.api.time.sleep", network.sleep)
    with EnrichmentClient(transport=httpx.MockTransport(network.answer)) as client:
        assert client.create_graph("g", [{"id": 1, "text": "t"}], []).id == "graph-1"
        client.create_graph("g", [{"id": 1, "text": "t"}], [])
    first, again, other = [request.headers["idempotency-key"] for request in network.requests]
    assert first == again != other


def client_of(network: Network, monkeypatch: pytest.MonkeyPatch) -> EnrichmentClient:
    monkeypatch.setattr("lathe_client.api.time.sleep", network.sleep)
    return EnrichmentClient(transport=httpx.MockTransport(network.answer))


def test_a_file_is_uploaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network(httpx.ReadError, httpx.Response(201, json={"id": "file-1"}))
    with client_of(network, monkeypatch) as client:
        assert client.upload_nodes([{"id": 1, "text": "t"}]) == "file-1"
    first, again = [request.headers["idempotency-key"] for request in network.requests]
    assert first == again


GONE = httpx.Response(404, json={"error": {**ERROR["error"], "code": "graph_not_found"}})
ENDED = httpx.Response(409, json={"error": {**ERROR["error"], "code": "job_not_cancellable"}})


def job(status: str) -> httpx.Response:
    body = {"id": "job-1", "type": "enrich", "status": status, "result": None, "error": None}
    return httpx.Response(200, json={**body, "progress": {"step": 0, "total": 1}})


def test_what_was_deleted_when_the_answer_was_lost_counts_as_deleted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with client_of(Network(httpx.ReadError, GONE), monkeypatch) as client:
        client.delete_graph("graph-1")
    for first in (refusal(503), httpx.ConnectError):  # which were not carried out
        with client_of(Network(first, GONE), monkeypatch) as client:
            with pytest.raises(ApiStatusError, match="graph_not_found"):
                client.delete_graph("graph-1")
            with pytest.raises(ApiStatusError, match="graph_not_found"):
                client.delete_graph("graph-1")


def test_a_job_that_was_cancelled_when_the_answer_was_lost_counts_as_cancelled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with client_of(Network(httpx.ReadError, ENDED, job("cancelled")), monkeypatch) as client:
        assert client.cancel_job("job-1").status == "cancelled"
    for answers in ([httpx.ReadError, ENDED, job("succeeded")], [ENDED]):
        with (
            client_of(Network(*answers), monkeypatch) as client,
            pytest.raises(ApiStatusError, match="job_not_cancellable"),
        ):
            client.cancel_job("job-1")


@pytest.mark.anyio
async def test_the_async_client_takes_them_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network(httpx.ReadError, GONE, httpx.ReadError, ENDED, job("cancelled"))
    monkeypatch.setattr("lathe_client.aio.asyncio.sleep", network.asleep)
    async with AsyncEnrichmentClient(transport=httpx.MockTransport(network.answer)) as client:
        await client.delete_graph("graph-1")
        assert (await client.cancel_job("job-1")).status == "cancelled"


def arrow_with(metadata: dict[str, str]) -> httpx.Response:
    schema = pa.schema([("node_id", pa.int64())], metadata=metadata)
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(pa.record_batch([pa.array([1])], schema=schema))
    return httpx.Response(200, content=sink.getvalue())


OTHERS = {
    "no JSON": httpx.Response(200, text="hello"),
    "no route": httpx.Response(404, text="nothing here"),
    "another's error": httpx.Response(404, json={"error": "no"}),
    "an empty object": httpx.Response(200, json={}),
    "a list": httpx.Response(200, json=[]),
    "null": httpx.Response(200, content=b"null"),
    "no list": httpx.Response(200, json={"data": None}),
    "a prompt that is none": arrow_with({"lathe.model": "m", "lathe.prompt": "[]"}),
    "a usage that is none": arrow_with({"lathe.model": "m", "lathe.usage": "3"}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_service_is_recognised(name: str) -> None:
    network = Network(OTHERS[name])
    nodes = [{"id": 1, "text": "t"}]
    with EnrichmentClient(transport=httpx.MockTransport(network.answer)) as client:
        asks: list[Callable[[], Any]] = [
            client.prompts,
            client.graphs,
            lambda: client.graph("graph-1"),
            lambda: client.job("job-1"),
            lambda: client.select("graph-1", "degree", budget={"nodes": 1}),
            lambda: client.upload_nodes(nodes),
            lambda: client.embeddings(["t"], model="m"),
            lambda: client.enrich(nodes, prompt="summary"),
            lambda: list(client.stream(nodes, prompt="summary")),
        ]
        for ask in asks:
            with pytest.raises(UnexpectedAnswerError):
                ask()
    assert len(network.requests) == len(asks)


def test_an_answer_that_cannot_be_unpacked_is_no_mystery() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        junk = httpx.ByteStream(b"\x1f\x8bjunk")
        return httpx.Response(200, headers={"content-encoding": "gzip"}, stream=junk)

    with EnrichmentClient(transport=httpx.MockTransport(answer)) as client:
        with pytest.raises(UnexpectedAnswerError, match="decoded"):
            client.prompts()
        with pytest.raises(UnexpectedAnswerError, match="decoded"):
            list(client.stream([{"id": 1, "text": "t"}], prompt="summary"))


@pytest.mark.parametrize("failure", [httpx.LocalProtocolError, httpx.UnsupportedProtocol])
def test_what_cannot_be_sent_is_not_tried_again(
    failure: type[httpx.TransportError], ask: Callable[..., Any]
) -> None:
    network = Network(failure)
    with pytest.raises(ConnectionFailedError, match=failure.__name__):
        ask(network)
    assert (len(network.requests), network.waits) == (1, [])


@pytest.mark.parametrize("make", [EnrichmentClient, AsyncEnrichmentClient])
def test_an_address_and_a_key_that_can_be_none_are_refused(make: Callable[..., Any]) -> None:
    for url in ("127.0.0.1:8000", "localhost:8000", "", "ftp://host", "http://", "http://h:port"):
        with pytest.raises(ValueError, match="url"):
            make(url)
    for key in ("lk-hidden\n", "lk hidden", "lk-hiddén"):
        with pytest.raises(ValueError, match="api_key") as caught:
            make("http://host", key)
        assert "hidd" not in str(caught.value)
        assert caught.value.__cause__ is caught.value.__context__ is None


@pytest.mark.anyio
async def test_the_async_client_retries_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network(httpx.ConnectError, refusal(503), PROMPTS)
    monkeypatch.setattr("lathe_client.aio.asyncio.sleep", network.asleep)
    async with AsyncEnrichmentClient(transport=httpx.MockTransport(network.answer)) as client:
        assert await client.prompts() == [{"id": "summary"}]
        assert len(network.waits) == 2
    refusing = Network(refusal(404))
    async with AsyncEnrichmentClient(transport=httpx.MockTransport(refusing.answer)) as client:
        with pytest.raises(ApiStatusError):
            await client.prompts()
    await anyio.lowlevel.checkpoint()


def test_the_key_is_sent() -> None:
    network = Network(PROMPTS)
    transport = httpx.MockTransport(network.answer)
    with EnrichmentClient("http://host/", "secret", transport=transport) as client:
        client.prompts()
    request = network.requests[0]
    assert request.headers["authorization"] == "Bearer secret"
    assert str(request.url) == "http://host/v1/prompts"
