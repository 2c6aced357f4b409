"""What is sent again, and when: a scripted network and a clock that only waiting moves."""

import email.utils
import time
from collections.abc import Callable
from typing import Any

import anyio
import httpx
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


def test_another_service_is_recognised() -> None:
    for answer in (httpx.Response(200, text="hello"), httpx.Response(404, text="nothing here")):
        network = Network(answer)
        with (
            EnrichmentClient(transport=httpx.MockTransport(network.answer)) as client,
            pytest.raises(UnexpectedAnswerError, match="Lathe"),
        ):
            client.prompts()


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
