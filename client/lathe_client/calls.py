"""What is sent for each question to the service, and how its answer is read; no network here.

`api.py` and `aio.py` send these, so that the sync and the async client ask the same.
"""

import base64
import io
import json
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypedDict, TypeVar

import httpx
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from lathe_client import arrow
from lathe_client.errors import ApiStatusError, UnexpectedAnswerError
from lathe_client.results import (
    Enriched,
    Graph,
    Job,
    NodeId,
    Selection,
    read_graph,
    read_job,
    read_selection,
)
from lathe_client.store import Vectors

MAX_NODES_PER_REQUEST = 1024
"""The service takes no more in one request; `enrich` sends several, a job takes any number."""
RESULT_NAME = "enriched.arrow"
T = TypeVar("T")
NodeIds = Sequence[NodeId] | npt.NDArray[Any]
"""Also a tensor, of which this package need not know."""
Priority = Literal["interactive", "training", "bulk"]
Part = Literal["text", "embedding"]
LongText = Literal["head", "head_tail", "chunk_mean"]


class EnrichOptions(TypedDict, total=False):
    """How to enrich; what is left out is the service's own choice.

    Keys:
        prompt: an id of the catalog, or id@version. Needed.
        returns: parts of a row; the text alone by default.
        embedding_dtype: on the wire; float16 halves it and is the default here.
        budget: max_nodes, max_tokens, max_seconds, and of jobs max_cost.
        long_text: which part of a text that is too long the prompt shows.
        classes: what a prompt that classifies may answer; by default the labels of a graph's training nodes.
        variables: what a prompt of one's own asks for beside the text.
    """

    prompt: str
    model: str
    embedding_model: str
    returns: Sequence[Part]
    max_tokens: int
    budget: Mapping[str, float]
    long_text: LongText
    classes: Sequence[str]
    variables: Mapping[str, str]
    priority: Priority
    embedding_dtype: Literal["float16", "float32"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Call(Generic[T]):
    """One question. Attributes: read: its answer, of an HTTP status below 400."""

    method: str
    path: str
    read: Callable[[httpx.Response], T]
    json: Any = None
    params: Mapping[str, str | int] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, tuple[str, bytes]] | None = None
    data: Mapping[str, str] | None = None

    def arguments(self) -> dict[str, Any]:
        """For httpx."""
        given = {
            "json": self.json,
            "params": self.params or None,
            "headers": self.headers or None,
            "files": self.files,
            "data": self.data,
        }
        return {name: value for name, value in given.items() if value is not None}


def answer(call: Call[T], response: httpx.Response, *, is_repeated: bool) -> T:
    """What the service says. Raises: ApiStatusError; UnexpectedAnswerError. The body has been read."""
    check(response, is_repeated=is_repeated)
    try:
        return call.read(response)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UnexpectedAnswerError(
            f"{call.method} {call.path} has another answer than a Lathe service's: {error!r}"
        ) from error


def check(response: httpx.Response, *, is_repeated: bool) -> None:
    """Raises: ApiStatusError; UnexpectedAnswerError. The body has been read."""
    if response.is_success:
        return
    try:
        error = response.json()["error"]
        raise ApiStatusError(
            str(error["message"]),
            status=response.status_code,
            code=str(error["code"]),
            param=error.get("param"),
            request_id=response.headers.get("x-request-id"),
            is_repeated=is_repeated,
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UnexpectedAnswerError(
            f"status {response.status_code} without an error object; is this a Lathe service?"
        ) from None


def _json(response: httpx.Response) -> dict[str, Any]:
    try:
        body = response.json()
    except ValueError:
        raise UnexpectedAnswerError("the answer is no JSON; is this a Lathe service?") from None
    if not isinstance(body, dict):
        raise UnexpectedAnswerError("the answer is no JSON object; is this a Lathe service?")
    return body


def _items(response: httpx.Response) -> list[dict[str, Any]]:
    items = _json(response)["data"]
    if not isinstance(items, list):
        raise UnexpectedAnswerError("data of the answer is no list; is this a Lathe service?")
    return items


def _options(options: EnrichOptions) -> dict[str, Any]:
    body: dict[str, Any] = {"embedding_dtype": "float16", **options}
    if "returns" in body:
        body["return"] = list(body.pop("returns"))
    return body


def enrich(nodes: Sequence[Mapping[str, Any]], options: EnrichOptions) -> Call[Enriched]:
    return _enrich("/v1/enrich", {"nodes": list(nodes)}, options)


def enrich_graph(
    graph_id: str, node_ids: Sequence[NodeId], options: EnrichOptions
) -> Call[Enriched]:
    return _enrich(f"/v1/graphs/{graph_id}/enrich", {"node_ids": list(node_ids)}, options)


def _enrich(path: str, body: dict[str, Any], options: EnrichOptions) -> Call[Enriched]:
    return Call(
        method="POST",
        path=path,
        json=body | _options(options),
        headers={"Accept": arrow.MEDIA_TYPE},
        read=lambda response: arrow.read_all(response.content),
    )


def streamed(call: Call[Enriched]) -> Call[Enriched]:
    """The same, answered in batches as they finish."""
    return Call(
        method=call.method,
        path=call.path,
        json={**call.json, "stream": True},
        headers=call.headers,
        read=call.read,
    )


def pieces(items: Sequence[T], options: EnrichOptions) -> Iterator[Sequence[T]]:
    """What one request each may hold.

    Raises:
        ValueError: there are none; or a budget is for one request and there would be several.
    """
    if not items:
        raise ValueError("there is no node to enrich")
    if len(items) > MAX_NODES_PER_REQUEST and options.get("budget"):
        raise ValueError(
            f"a budget is for one request of at most {MAX_NODES_PER_REQUEST} nodes, got {len(items)};"
            " submit_job takes a budget for any number"
        )
    for start in range(0, len(items), MAX_NODES_PER_REQUEST):
        yield items[start : start + MAX_NODES_PER_REQUEST]


def plain_ids(node_ids: NodeIds) -> list[NodeId]:
    """Ids as JSON has them, of a list, an array or a tensor, or of a list of their numbers."""
    if hasattr(node_ids, "tolist"):
        return list(node_ids.tolist())
    return [node_id.item() if hasattr(node_id, "item") else node_id for node_id in node_ids]


def embeddings(texts: Sequence[str], model: str, truncate: bool) -> Iterator[Call[Vectors]]:
    """Vectors (num_texts, dim) float32 of as many texts as a request each may hold.

    Raises:
        ValueError: there are none.
    """
    if not texts:
        raise ValueError("there is no text to encode")
    for start in range(0, len(texts), MAX_NODES_PER_REQUEST):
        body = {
            "model": model,
            "input": list(texts[start : start + MAX_NODES_PER_REQUEST]),
            "truncate": truncate,
            "encoding_format": "base64",
        }
        yield Call(method="POST", path="/v1/embeddings", json=body, read=_vectors)


def _vectors(response: httpx.Response) -> Vectors:
    rows = [base64.b64decode(item["embedding"]) for item in _items(response)]
    return np.stack([np.frombuffer(row, dtype="<f4") for row in rows])


def estimate(body: Mapping[str, Any], options: EnrichOptions) -> Call[dict[str, Any]]:
    given = _options(options)
    del given["embedding_dtype"]  # nothing is sent back
    return Call(method="POST", path="/v1/enrich/estimate", json=dict(body) | given, read=_json)


def create_graph(
    name: str,
    nodes: "pa.Table | Sequence[Mapping[str, Any]]",
    edges: "pa.Table | Sequence[tuple[NodeId, NodeId]]",
    directed: bool,
    idempotency_key: str | None,
) -> Call[Graph]:
    node_table = nodes if isinstance(nodes, pa.Table) else pa.Table.from_pylist(_alike(nodes))
    if isinstance(edges, pa.Table):
        edge_table = edges
    else:
        ids = node_table.schema.field("id").type  # also of an empty list
        ends = [pa.array([pair[i] for pair in edges], ids) for i in (0, 1)]
        edge_table = pa.table(ends, names=["source", "target"])
    return Call(
        method="POST",
        path="/v1/graphs",
        files={
            "nodes": ("nodes.parquet", _parquet(node_table)),
            "edges": ("edges.parquet", _parquet(edge_table)),
        },
        data={"name": name, "directed": "true" if directed else "false"},
        headers=_idempotent(idempotency_key),
        read=lambda response: read_graph(_json(response)),
    )


def _alike(nodes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows with the same columns, as pyarrow takes those of the first row only."""
    names = list(dict.fromkeys(name for node in nodes for name in node))
    return [{name: node.get(name) for name in names} for node in nodes]


def _parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def _idempotent(key: str | None) -> dict[str, str]:
    """One key per call, so that a retry creates nothing twice."""
    return {"Idempotency-Key": key or secrets.token_hex(16)}


def list_graphs(after: str | None, limit: int) -> Call[list[Graph]]:
    params: dict[str, str | int] = {"limit": limit} | ({"after": after} if after else {})
    return Call(
        method="GET",
        path="/v1/graphs",
        params=params,
        read=lambda response: [read_graph(item) for item in _items(response)],
    )


def get_graph(graph_id: str) -> Call[Graph]:
    return Call(
        method="GET",
        path=f"/v1/graphs/{graph_id}",
        read=lambda response: read_graph(_json(response)),
    )


def delete_graph(graph_id: str) -> Call[None]:
    return Call(method="DELETE", path=f"/v1/graphs/{graph_id}", read=lambda response: None)


def select(graph_id: str, body: Mapping[str, Any]) -> Call[Selection]:
    return Call(
        method="POST",
        path=f"/v1/graphs/{graph_id}/select",
        json=dict(body),
        read=lambda response: read_selection(_json(response)),
    )


def ask_graph(graph_id: str, what: str, body: Mapping[str, Any]) -> Call[dict[str, Any]]:
    """`sample` or `query`."""
    return Call(method="POST", path=f"/v1/graphs/{graph_id}/{what}", json=dict(body), read=_json)


def list_prompts() -> Call[list[dict[str, Any]]]:
    return Call(method="GET", path="/v1/prompts", read=_items)


def get_prompt(ref: str) -> Call[dict[str, Any]]:
    return Call(method="GET", path=f"/v1/prompts/{ref}", read=_json)


def submit_job(
    body: Mapping[str, Any], options: EnrichOptions, idempotency_key: str | None
) -> Call[Job]:
    return Call(
        method="POST",
        path="/v1/jobs",
        json={"type": "enrich", **body, **_options(options)},
        headers=_idempotent(idempotency_key),
        read=lambda response: read_job(_json(response)),
    )


def get_job(job_id: str) -> Call[Job]:
    return Call(
        method="GET", path=f"/v1/jobs/{job_id}", read=lambda response: read_job(_json(response))
    )


def cancel_job(job_id: str) -> Call[Job]:
    return Call(
        method="POST",
        path=f"/v1/jobs/{job_id}/cancel",
        read=lambda response: read_job(_json(response)),
    )


def job_result(job_id: str) -> Call[Enriched]:
    return Call(
        method="GET",
        path=f"/v1/jobs/{job_id}/artifacts/{RESULT_NAME}",
        read=lambda response: arrow.read_all(response.content),
    )


def upload_nodes(name: str, nodes: Sequence[Mapping[str, Any]]) -> Call[str]:
    lines = "".join(json.dumps(dict(node)) + "\n" for node in nodes)
    return Call(
        method="POST",
        path="/v1/files",
        files={"file": (name, lines.encode())},
        data={"purpose": "enrich"},
        headers=_idempotent(None),
        read=lambda response: str(_json(response)["id"]),
    )


def usage() -> Call[dict[str, Any]]:
    return Call(method="GET", path="/v1/usage", read=_json)
