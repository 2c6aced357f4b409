"""The client for scripts and training loops that do not run an event loop. Thread-safe."""

import re
import time
from collections.abc import Generator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import httpx
import numpy as np
import pyarrow as pa

from lathe_client import calls
from lathe_client.arrow import ArrowDecoder
from lathe_client.calls import Call, EnrichOptions, NodeIds
from lathe_client.errors import (
    ApiStatusError,
    ConnectionFailedError,
    JobEndedError,
    UnexpectedAnswerError,
)
from lathe_client.results import Enriched, Graph, Job, NodeId, Selection, join
from lathe_client.retry import RetryPolicy
from lathe_client.store import Vectors

DEFAULT_URL = "http://127.0.0.1:8000"
CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 660.0
"""A little more than the service gives itself."""
FIRST_POLL_SECONDS = 0.1
LONGEST_POLL_SECONDS = 2.0
UNSENDABLE = (httpx.UnsupportedProtocol, httpx.LocalProtocolError)
"""Failures that another attempt does not mend."""
NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
T = TypeVar("T")


class EnrichmentClient:
    """A connection to one service. Every method raises `LatheError`; use as a context manager.

    Args:
        url: of the service, http or https.
        api_key: where the service has keys.
        retry: when a request is sent again.
        transport: of httpx, for tests and proxies; the environment's proxies are not used.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        api_key: str | None = None,
        *,
        retry: RetryPolicy | None = None,
        timeout_seconds: float = ANSWER_SECONDS,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._retry = retry or RetryPolicy()
        self._http = httpx.Client(**http_arguments(url, api_key, timeout_seconds, transport))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def enrich(
        self, nodes: Sequence[Mapping[str, Any]], **options: Unpack[EnrichOptions]
    ) -> Enriched:
        """Enrich node texts: mappings with id, text and, for prompts that read them, neighbors (texts).

        More nodes than one request takes are sent in several, one after the other.

        Raises:
            ValueError: no node; or a budget for more nodes than one request takes.
        """
        parts = [self._send(calls.enrich(piece, options)) for piece in calls.pieces(nodes, options)]
        return join(parts)

    def enrich_graph(
        self, graph_id: str, node_ids: NodeIds, **options: Unpack[EnrichOptions]
    ) -> Enriched:
        """Enrich nodes of a graph of the service, otherwise as `enrich`."""
        parts = [
            self._send(calls.enrich_graph(graph_id, piece, options))
            for piece in calls.pieces(calls.plain_ids(node_ids), options)
        ]
        return join(parts)

    def stream(
        self, nodes: Sequence[Mapping[str, Any]], **options: Unpack[EnrichOptions]
    ) -> Generator[Enriched, None, None]:
        """Rows as they finish, in batches; the last has no rows and the usage. Closing it early ends the work.

        It is retried until the first byte. After that a broken connection is an error: ask again, what was finished is
        in the service's cache.
        """
        for piece in calls.pieces(nodes, options):
            yield from self._stream(calls.streamed(calls.enrich(piece, options)))

    def stream_graph(
        self, graph_id: str, node_ids: NodeIds, **options: Unpack[EnrichOptions]
    ) -> Generator[Enriched, None, None]:
        """As `stream`, of a graph of the service."""
        for piece in calls.pieces(calls.plain_ids(node_ids), options):
            yield from self._stream(calls.streamed(calls.enrich_graph(graph_id, piece, options)))

    def estimate(
        self, nodes: Sequence[Mapping[str, Any]], **options: Unpack[EnrichOptions]
    ) -> dict[str, Any]:
        """What `enrich` would cost: cache hits, tokens, seconds. Asks no model."""
        return self._send(calls.estimate({"nodes": list(nodes)}, options))

    def estimate_graph(
        self, graph_id: str, node_ids: NodeIds, **options: Unpack[EnrichOptions]
    ) -> dict[str, Any]:
        """As `estimate`, of a graph of the service."""
        body = {"graph": graph_id, "node_ids": calls.plain_ids(node_ids)}
        return self._send(calls.estimate(body, options))

    def create_graph(
        self,
        name: str,
        nodes: "pa.Table | Sequence[Mapping[str, Any]]",
        edges: "pa.Table | Sequence[tuple[NodeId, NodeId]]",
        *,
        directed: bool = False,
        idempotency_key: str | None = None,
    ) -> Graph:
        """Upload a graph, as Parquet.

        Args:
            nodes: columns id, text and optionally label and split.
            edges: pairs of ids; as a table, columns source and target.
            idempotency_key: the same key and graph twice is one graph.
        """
        return self._send(calls.create_graph(name, nodes, edges, directed, idempotency_key))

    def graphs(self, *, after: str | None = None, limit: int = 20) -> list[Graph]:
        """Newest first."""
        return self._send(calls.list_graphs(after, limit))

    def graph(self, graph_id: str) -> Graph:
        return self._send(calls.get_graph(graph_id))

    def delete_graph(self, graph_id: str) -> None:
        try:
            self._send(calls.delete_graph(graph_id))
        except ApiStatusError as error:
            if not (error.is_repeated and error.code == "graph_not_found"):
                raise

    def select(
        self, graph_id: str, strategy: str, *, budget: Mapping[str, float], **options: Any
    ) -> Selection:
        """Choose nodes. Args: budget: such as {"nodes": 100} or {"fraction": 0.1}; options: the strategy's own."""
        body = {"strategy": strategy, "budget": dict(budget), **options}
        return self._send(calls.select(graph_id, body))

    def sample(self, graph_id: str, **body: Any) -> dict[str, Any]:
        """Sample neighbourhoods; the body is the service's."""
        return self._send(calls.ask_graph(graph_id, "sample", body))

    def query(self, graph_id: str, **body: Any) -> dict[str, Any]:
        """Ask an LLM about nodes (LLaGA); the body is the service's."""
        return self._send(calls.ask_graph(graph_id, "query", body))

    def prompts(self) -> list[dict[str, Any]]:
        """The catalog: the newest version of each."""
        return self._send(calls.list_prompts())

    def prompt(self, ref: str) -> dict[str, Any]:
        return self._send(calls.get_prompt(ref))

    def embeddings(self, texts: Sequence[str], *, model: str, truncate: bool = False) -> Vectors:
        """Vectors (num_texts, dim) float32, of length 1.

        Args:
            truncate: cut texts that are too long for the model, which are refused otherwise.

        Raises:
            ValueError: no text.
        """
        parts = [self._send(call) for call in calls.embeddings(texts, model, truncate)]
        return np.concatenate(parts)

    def upload_nodes(self, nodes: Sequence[Mapping[str, Any]], name: str = "nodes.jsonl") -> str:
        """The id of a file of nodes, for `submit_job`."""
        return self._send(calls.upload_nodes(name, nodes))

    def submit_job(
        self,
        *,
        graph_id: str | None = None,
        node_ids: NodeIds | None = None,
        select: Mapping[str, Any] | None = None,
        file_id: str | None = None,
        idempotency_key: str | None = None,
        **options: Unpack[EnrichOptions],
    ) -> Job:
        """Enrich any number of nodes in the background: of a graph by ids or by selection, or of a file."""
        body = job_body(graph_id, node_ids, select, file_id)
        return self._send(calls.submit_job(body, options, idempotency_key))

    def job(self, job_id: str) -> Job:
        return self._send(calls.get_job(job_id))

    def cancel_job(self, job_id: str) -> Job:
        try:
            return self._send(calls.cancel_job(job_id))
        except ApiStatusError as error:
            if error.is_repeated and error.code == "job_not_cancellable":
                job = self.job(job_id)
                if job.status == "cancelled":
                    return job
            raise

    def wait(self, job_id: str, *, timeout_seconds: float | None = None) -> Job:
        """Wait until a job has succeeded.

        Raises:
            JobEndedError: it failed or was cancelled.
            TimeoutError: it goes on.
        """
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        pause = FIRST_POLL_SECONDS
        while True:
            job = self.job(job_id)
            if job.has_ended:
                return succeeded(job)
            if deadline is not None and time.monotonic() + pause > deadline:
                raise TimeoutError(f"job {job_id} is {job.status} after {timeout_seconds} s")
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_POLL_SECONDS)

    def job_result(self, job_id: str) -> Enriched:
        """Rows of an enrich job that succeeded, in the order of its nodes."""
        return self._send(calls.job_result(job_id))

    def usage(self) -> dict[str, Any]:
        """What this key has used and saved."""
        return self._send(calls.usage())

    def _send(self, call: Call[T]) -> T:
        response, is_repeated = self._request(call, stream=False)
        return calls.answer(call, response, is_repeated=is_repeated)

    def _stream(self, call: Call[Enriched]) -> Generator[Enriched, None, None]:
        response, is_repeated = self._request(call, stream=True)
        decoder = ArrowDecoder()
        try:
            if not response.is_success:
                response.read()
                calls.check(response, is_repeated=is_repeated)
            for chunk in response.iter_bytes():
                yield from decoder.feed(chunk)
            decoder.close()
        except httpx.TransportError as error:
            raise failed(self._http, error) from error
        except httpx.DecodingError as error:
            raise undecodable(self._http, error) from error
        finally:
            response.close()

    def _request(self, call: Call[Any], *, stream: bool) -> tuple[httpx.Response, bool]:
        """The answer, or the last one of those that are retried; and whether an earlier one was lost.

        Raises:
            ConnectionFailedError, UnexpectedAnswerError.
        """
        started = time.monotonic()
        num_sent, is_repeated = 0, False
        while True:
            num_sent += 1
            response: httpx.Response | None = None
            failure: httpx.TransportError | None = None
            try:
                request = self._http.build_request(call.method, call.path, **call.arguments())
                response = self._http.send(request, stream=stream)
                if response.is_success:
                    return response, is_repeated
            except UNSENDABLE as error:
                raise failed(self._http, error) from error
            except httpx.TransportError as error:
                failure = error
            except httpx.DecodingError as error:
                raise undecodable(self._http, error) from error
            wait = self._retry.wait_seconds(
                num_sent,
                time.monotonic() - started,
                None if response is None else response.status_code,
                {} if response is None else response.headers,
            )
            if wait is None:
                if response is not None:
                    return response, is_repeated
                assert failure is not None
                raise failed(self._http, failure) from failure
            is_repeated |= failure is not None and not isinstance(failure, NOT_SENT)
            if response is not None:
                response.close()
            time.sleep(wait)


def http_arguments(
    url: str, api_key: str | None, timeout_seconds: float, transport: Any
) -> dict[str, Any]:
    """How both clients make theirs of httpx. Raises: ValueError: the URL or the key cannot be one."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ValueError(f"url {url!r}: {error}") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ValueError(f"url must be http:// or https:// and a host, got {url!r}")
    if api_key and not re.fullmatch("[!-~]+", api_key):  # which httpx would show in its error
        raise ValueError("api_key must be visible ASCII characters, without a space or line end")
    return {
        "base_url": url.rstrip("/"),
        "headers": {"Authorization": f"Bearer {api_key}"} if api_key else {},
        "timeout": httpx.Timeout(timeout_seconds, connect=CONNECT_SECONDS),
        "transport": transport,
        "trust_env": False,
    }


def failed(
    http: httpx.Client | httpx.AsyncClient, error: httpx.TransportError
) -> ConnectionFailedError:
    return ConnectionFailedError(f"{http.base_url}: {type(error).__name__} {error}".strip())


def undecodable(
    http: httpx.Client | httpx.AsyncClient, error: httpx.DecodingError
) -> UnexpectedAnswerError:
    return UnexpectedAnswerError(f"{http.base_url}: the answer cannot be decoded: {error}")


def job_body(
    graph_id: str | None,
    node_ids: NodeIds | None,
    select: Mapping[str, Any] | None,
    file_id: str | None,
) -> dict[str, Any]:
    given = {
        "graph": graph_id,
        "node_ids": None if node_ids is None else calls.plain_ids(node_ids),
        "select": None if select is None else dict(select),
        "file": file_id,
    }
    return {name: value for name, value in given.items() if value is not None}


def succeeded(job: Job) -> Job:
    """Raises: JobEndedError."""
    if job.status == "succeeded":
        return job
    error = job.error or {}
    raise JobEndedError(job.id, job.status, error.get("code"), error.get("message", "no message"))
