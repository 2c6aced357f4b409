"""Enrichment as HTTP sees it: request options, JSON rows, content negotiation, and which engines it uses."""

import asyncio
import io
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict, replace
from typing import Annotated, Any, Literal

import msgspec
from fastapi import Request
from fastapi.responses import Response
from pydantic import Field, PlainValidator, WithJsonSchema

from engines.protocol import AsyncEngine
from graph import arrow_stream, user_prompts
from graph.arrow_stream import EmbeddingDtype
from graph.cache import EnrichmentCache
from graph.catalog import Prompt, PromptNotFoundError
from graph.enrich import Enricher, EnrichStream
from graph.enrich_types import (
    EnrichBudget,
    EnrichNode,
    EnrichRequest,
    EnrichResult,
    EnrichRow,
    ItemStatus,
    LongText,
    Priority,
    UnsuitableModelError,
)
from graph.generation import PromptInputError
from graph.json_rows import json_row, json_usage
from graph.node_text import TextModel
from graph.nodes import MAX_CLASSES, NodeInputError, classes_of_graph, nodes_of_graph
from graph.served_text import ServedText
from graph.store import MAX_ID_BYTES, Graph, GraphNotFoundError, NodeId, UnknownNodeError
from graph.text_vectors import TextVectors
from graph.user_prompts import UserPrompts
from jobs.usage import UsageStore, seconds_per_token
from service.auth import Identity
from service.deps import AppState, RequestModel, ResponseModel
from service.engine_pool import EnginePool
from service.errors import ApiError
from service.metrics import Metrics
from service.middleware import cancel_on_disconnect
from service.settings import DEFAULT_MODEL
from service.sse import ChunkedResponse
from service.tokenizers import TokenizerCache

MAX_NODES_PER_REQUEST = 1024
MAX_ANSWER_TOKENS = 1024
JSON = "application/json"
NDJSON = "application/x-ndjson"


def _string_or_integer(value: object, *, min_chars: int) -> str | int:
    """Strict, and one error instead of one per member of a union."""
    if isinstance(value, str):
        if not min_chars <= len(value) <= MAX_ID_BYTES:
            raise ValueError(f"must have {min_chars} to {MAX_ID_BYTES} characters")
        if any("\ud800" <= char <= "\udfff" for char in value):
            raise ValueError("must be valid Unicode")
        return value
    if type(value) is int:
        if not -(2**63) <= value < 2**63:
            raise ValueError("an integer must fit in 64 bits with a sign")
        return value
    raise ValueError("must be a string or an integer")


def _node_id(value: object) -> str | int:
    return _string_or_integer(value, min_chars=1)


def _label(value: object) -> str | int:
    return _string_or_integer(value, min_chars=0)


def _either(min_chars: int) -> WithJsonSchema:
    text = {"type": "string", "minLength": min_chars, "maxLength": MAX_ID_BYTES}
    number = {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}
    return WithJsonSchema({"anyOf": [text, number]})


NodeIdField = Annotated[str | int, PlainValidator(_node_id), _either(1)]
LabelField = Annotated[str | int, PlainValidator(_label), _either(0)]
Outputs = list[Literal["text", "embedding"]]


ClassName = Annotated[str, Field(min_length=1, max_length=MAX_ID_BYTES)]
VariableName = Annotated[str, Field(max_length=32)]
VariableText = Annotated[str, Field(max_length=20_000)]


class BudgetBody(RequestModel):
    """The first limit that is reached stops the run; what was not done is `skipped_budget`."""

    max_nodes: int | None = Field(default=None, ge=1, description="The first so many nodes.")
    max_tokens: int | None = Field(
        default=None, ge=1, description="Prompt and generated tokens of LLM calls made now."
    )
    max_seconds: float | None = Field(
        default=None, gt=0, description="At most, and by default, the server's time-out."
    )


class EnrichChoices(RequestModel):
    """How to enrich, whatever is enriched and whenever."""

    prompt: str = Field(max_length=100, description="An id of the catalog, or id@version.")
    model: str = Field(default=DEFAULT_MODEL, max_length=100)
    embedding_model: str | None = Field(
        default=None, max_length=100, description="The server's default encoder."
    )
    return_: Outputs = Field(
        default=["text"], alias="return", min_length=1, max_length=2, description="Parts of a row."
    )
    max_tokens: int | None = Field(
        default=None, ge=1, le=MAX_ANSWER_TOKENS, description="Of an answer; the prompt's own."
    )
    long_text: LongText = Field(
        default="head",
        description="Of a text that is too long: its beginning; its beginning and its end; or, for the embedding, "
        "the mean of all its pieces (the LLM is shown the beginning).",
    )
    classes: list[ClassName] | None = Field(
        default=None,
        min_length=1,
        max_length=MAX_CLASSES,
        description="For a prompt that chooses among classes; of a graph by default its training nodes' labels.",
    )
    variables: dict[VariableName, VariableText] = Field(
        default={}, description="Of the prompt, for every node that does not give its own."
    )
    priority: Priority = Field(
        default="training", description="Among requests to one model; age makes up for it."
    )
    budget: BudgetBody = BudgetBody()


class EnrichOptions(EnrichChoices):
    """What the two enrich routes have in common."""

    encoding_format: Literal["float", "base64"] = Field(
        default="float", description="Of embeddings in JSON; base64 is of little-endian values."
    )
    embedding_dtype: EmbeddingDtype = "float32"
    stream: bool = Field(default=False, description="Rows as they finish: NDJSON or Arrow.")


class ItemErrorBody(ResponseModel):
    code: str
    message: str


class EnrichItem(ResponseModel):
    """One node's result. `cached`: no engine worked for this row."""

    node_id: str | int
    status: ItemStatus
    text: str | None
    fields: dict[str, Any] | None = Field(description="A JSON answer as it was written.")
    label: str | None = Field(
        description="The class that a JSON answer chooses; never part of text."
    )
    repaired: bool = Field(description="The first answer was not valid, the second was.")
    embedding: list[float] | str | None
    embedding_source: Literal["enriched", "raw"] | None = Field(
        description="raw: of the node's own text alone, because the LLM wrote nothing usable."
    )
    tokens_in: int
    tokens_out: int
    finish_reason: str | None
    truncated_tokens: int = Field(description="Cut from the node's and neighbours' texts.")
    embedding_truncated_tokens: int = Field(description="Cut to fit the encoder.")
    neighbors_used: int
    content_hash: str
    model: str
    embedding_model: str | None
    prompt_id: str
    prompt_version: int
    prompt_hash: str
    error: ItemErrorBody | None


class EnrichUsageBody(ResponseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prefix_hit_tokens: int = Field(
        description="Of the prompt tokens, those that the engine had computed before."
    )
    embedding_tokens: int
    cached_tokens: int = Field(description="What rows would have cost without the cache.")
    num_nodes: int
    num_by_status: dict[ItemStatus, int]
    seconds: float
    stopped_by: Literal["max_nodes", "max_tokens", "max_seconds", "max_cost"] | None


class EnrichResponse(ResponseModel):
    object: Literal["list"] = "list"
    data: list[EnrichItem]
    usage: EnrichUsageBody


class EnrichEstimateBody(ResponseModel):
    """What an enrichment would cost now."""

    object: Literal["enrich.estimate"] = "enrich.estimate"
    num_nodes: int = Field(description="Those that max_nodes lets through.")
    num_distinct: int = Field(description="Nodes that differ in what the prompt reads of them.")
    dedupe_ratio: float = Field(description="Share of nodes that are equal to another one.")
    num_empty: int = Field(description="Distinct nodes without text, which fail.")
    num_cached: int = Field(description="Distinct nodes whose text is in the cache.")
    num_embeddings_cached: int = Field(description="Distinct nodes whose vector is, too.")
    num_calls: int = Field(description="Of the LLM.")
    num_failing: int = Field(description="Distinct nodes whose prompt does not fit.")
    prompt_tokens: int = Field(description="Of all calls; exact.")
    completion_tokens: int = Field(
        description="Expected: by the cached answers, by what this prompt was answered lately, or the most."
    )
    max_completion_tokens: int
    total_tokens: int
    seconds: float | None = Field(
        description="At the speed last seen of this model, or by the device time of all its tokens so far; null where "
        "there were none."
    )
    cost: float | None = Field(
        description="By the server's cost_per_million_tokens; null where it names none."
    )


ENRICH_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "One row per node, in their order.",
        "content": {
            arrow_stream.MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}},
            NDJSON: {"schema": {"type": "string"}},
        },
    }
}


def build_enricher(
    engines: EnginePool,
    tokenizers: TokenizerCache,
    cache: EnrichmentCache,
    metrics: Metrics,
    usage: UsageStore,
) -> Enricher:
    """The enricher of one application."""
    engine_for, text_for = _lookups(engines, tokenizers)
    return Enricher(
        engine_for=engine_for,
        text_for=text_for,
        cache=cache,
        observer=metrics,
        ended=usage.enriched,
    )


def build_text_vectors(
    engines: EnginePool, tokenizers: TokenizerCache, cache: EnrichmentCache
) -> TextVectors:
    """Vectors of nodes, kept in the cache that enrichment uses too."""
    engine_for, text_for = _lookups(engines, tokenizers)
    return TextVectors(engine_for=engine_for, text_for=text_for, cache=cache)


def _lookups(
    engines: EnginePool, tokenizers: TokenizerCache
) -> tuple[
    Callable[[str, str], Awaitable[AsyncEngine]], Callable[[str, str], Awaitable[TextModel]]
]:
    """Engine and text of a model, given its id and the field that named it."""

    async def engine_for(model_id: str, param: str) -> AsyncEngine:
        try:
            return await engines.get(model_id)
        except ApiError as error:
            raise ApiError(error.code, error.message, param) from error

    async def text_for(model_id: str, param: str) -> TextModel:
        text = await tokenizers.get(engines.entry(model_id))
        return ServedText(text.tokenizer, text.chat_template)

    return engine_for, text_for


def find_prompt(ref: str, state: AppState, identity: Identity, param: str = "prompt") -> Prompt:
    """A prompt of Lathe, or one of the caller's own.

    Raises:
        ApiError: prompt_not_found.
    """
    try:
        return user_prompts.find_prompt(
            UserPrompts(state.settings.prompts_dir), identity.tenant, ref
        )
    except PromptNotFoundError as error:
        raise ApiError("prompt_not_found", error.args[0], param) from None


def open_graph(
    state: AppState, identity: Identity, graph_id: str, param: str | None = None
) -> Graph:
    """Raises: ApiError: graph_not_found."""
    try:
        return state.graphs.get(graph_id, identity.tenant)
    except GraphNotFoundError:
        raise graph_not_found(graph_id, param) from None


def graph_not_found(graph_id: str, param: str | None = None) -> ApiError:
    return ApiError("graph_not_found", f"the graph {graph_id[:100]!r} does not exist", param)


def node_indices(graph: Graph, node_ids: list[NodeId], place: str = "node_ids[{}]") -> list[int]:
    """Args: place: of an id in the request, given its position.

    Raises:
        ApiError: the graph has no such node.
    """
    try:
        return graph.indices_of(node_ids)
    except UnknownNodeError as error:
        raise ApiError(
            "invalid_value",
            f"the graph has no node {error.node_id!r:.80}",
            place.format(error.position),
        ) from None


def find_nodes(graph: Graph, node_ids: list[NodeId]) -> list[int]:
    """Raises: ApiError: the graph has no such node, or it is named twice."""
    indices = node_indices(graph, node_ids)
    seen: set[int] = set()
    for position, index in enumerate(indices):
        if index in seen:
            raise ApiError(
                "invalid_value",
                f"node {node_ids[position]!r:.80} is named twice",
                f"node_ids[{position}]",
            )
        seen.add(index)
    return indices


def read_nodes(
    graph: Graph,
    indices: Sequence[int],
    prompt: Prompt,
    *,
    neighbors: Sequence[Sequence[NodeId]] | None = None,
    variables: Sequence[Mapping[str, str]] | None = None,
) -> tuple[tuple[EnrichNode, ...], tuple[str, ...]]:
    """What a prompt reads of nodes of a graph, and the graph's classes. Args: as of `nodes_of_graph`.

    Raises:
        ApiError
    """
    try:
        nodes = nodes_of_graph(graph, indices, prompt, neighbors=neighbors, variables=variables)
        return nodes, classes_of_graph(graph, prompt)
    except (NodeInputError, PromptInputError) as error:
        raise ApiError("invalid_value", error.message, error.param) from error


async def answer_enrich(
    request: Request,
    state: AppState,
    identity: Identity,
    body: EnrichOptions,
    prompt: Prompt,
    nodes: tuple[EnrichNode, ...],
    classes: tuple[str, ...] = (),
) -> Response:
    """Enrich nodes for a request, and answer in the form that it accepts.

    Raises:
        ApiError: not_acceptable, a model that cannot serve, the client has gone.
    """
    media_type = negotiate(request.headers.get("accept"), stream=body.stream)
    enrich = enrich_request(state, identity, body, prompt, nodes, classes)
    try:
        if media_type == NDJSON or body.stream:
            stream = await state.enricher.stream(enrich)
            encode = _ndjson if media_type == NDJSON else _arrow_batches
            return ChunkedResponse(encode(stream, body), _nothing, media_type=media_type)
        result = await cancel_on_disconnect(request, state.enricher.enrich(enrich))
    except UnsuitableModelError as error:
        raise ApiError("invalid_value", error.message, error.param) from error
    content = await asyncio.to_thread(_encode, media_type, enrich, result, body)
    return Response(content, media_type=media_type)


async def estimate_enrich(
    state: AppState,
    identity: Identity,
    body: EnrichChoices,
    prompt: Prompt,
    nodes: tuple[EnrichNode, ...],
    classes: tuple[str, ...] = (),
) -> EnrichEstimateBody:
    """Raises: ApiError."""
    request = enrich_request(state, identity, body, prompt, nodes, classes)
    try:
        estimate = await state.enricher.estimate(request)
    except UnsuitableModelError as error:
        raise ApiError("invalid_value", error.message, error.param) from error
    total = estimate.prompt_tokens + estimate.completion_tokens
    if (
        estimate.seconds is None and state.usage is not None
    ):  # other processes, or an earlier one, may have seen some
        pace = seconds_per_token(await asyncio.to_thread(state.usage.read, None), body.model)
        estimate = replace(estimate, seconds=None if pace is None else total * pace)
    price = state.settings.cost_per_million_tokens
    return EnrichEstimateBody(
        **asdict(estimate),
        dedupe_ratio=1 - estimate.num_distinct / estimate.num_nodes,
        total_tokens=total,
        cost=None if price is None else total * price / 1e6,
    )


def enrich_request(
    state: AppState,
    identity: Identity,
    body: EnrichChoices,
    prompt: Prompt,
    nodes: tuple[EnrichNode, ...],
    classes: tuple[str, ...] = (),
) -> EnrichRequest:
    """The request of a body.

    Args:
        classes: of the graph, where the body names none.

    Raises:
        ApiError: return names a part twice, or the prompt reads other inputs.
    """
    if len(set(body.return_)) < len(body.return_):
        raise ApiError("invalid_value", "return names a part twice", "return")
    limit = state.settings.request_timeout_seconds
    try:
        return EnrichRequest(
            nodes=nodes,
            prompt=prompt,
            model=body.model,
            embedding_model=body.embedding_model or state.settings.embedding_model,
            outputs=frozenset(body.return_),
            max_tokens=body.max_tokens,
            budget=EnrichBudget(
                nodes=body.budget.max_nodes,
                tokens=body.budget.max_tokens,
                seconds=min(body.budget.max_seconds or limit, limit),
            ),
            tenant=identity.tenant,
            priority=body.priority,
            long_text=body.long_text,
            classes=classes if body.classes is None else tuple(body.classes),
            variables=body.variables,
        )
    except PromptInputError as error:
        param = error.param
        if error.node is not None:
            by_node = getattr(body, "node_variables", None) is not None
            param = f"node_variables[{error.node}]" if by_node else f"nodes[{error.node}].variables"
        raise ApiError("invalid_value", error.message, param) from error


def negotiate(accept: str | None, *, stream: bool) -> str:
    """The media type of an answer: JSON, or NDJSON for a stream, unless the client prefers another.

    Raises:
        ApiError: not_acceptable.
    """
    offered = (
        (NDJSON, arrow_stream.MEDIA_TYPE) if stream else (JSON, arrow_stream.MEDIA_TYPE, NDJSON)
    )
    if accept is None or not accept.strip():
        return offered[0]
    weights = {media_type: _weight(accept, media_type) for media_type in offered}
    best = max(offered, key=lambda media_type: weights[media_type])  # the first of equals
    if weights[best] <= 0:
        what = "a stream is" if stream else "an enrichment is"
        raise ApiError("not_acceptable", f"{what} one of: {', '.join(offered)}", "Accept")
    return best


def _weight(accept: str, offered: str) -> float:
    """Quality that an Accept header gives a media type; the most specific range counts (RFC 9110, 12.5.1)."""
    kind = offered.split("/")[0]
    ranges = {"*/*": 0, f"{kind}/*": 1, offered: 2}
    found = (-1, 0.0)
    for part in accept.split(","):
        name, *parameters = (piece.strip().lower() for piece in part.split(";"))
        if name in ranges:
            found = max(found, (ranges[name], _quality(parameters)))
    return found[1]


def _quality(parameters: list[str]) -> float:
    for parameter in parameters:
        key, _, value = parameter.partition("=")
        if key.strip() == "q":
            try:
                return min(1.0, max(0.0, float(value)))
            except ValueError:
                return 0.0
    return 1.0


async def _nothing() -> None:
    """The generators free all there is when they are closed."""


async def _ndjson(stream: EnrichStream, body: EnrichOptions) -> AsyncGenerator[bytes, None]:
    """A line per row as it finishes, then one with the usage."""
    async with aclosing(stream.batches()) as batches:
        async for batch in batches:
            yield b"".join(
                msgspec.json.encode(_item(stream.request, row, body)) + b"\n" for _, row in batch
            )
    yield msgspec.json.encode({"usage": json_usage(stream.usage)}) + b"\n"


async def _arrow_batches(stream: EnrichStream, body: EnrichOptions) -> AsyncGenerator[bytes, None]:
    """A record batch whenever rows have finished, then an empty one with the usage."""
    sink = io.BytesIO()
    writer = arrow_stream.ArrowWriter(
        sink,
        stream.request,
        node_id=stream.request.nodes[0].id,
        dim=stream.dim,
        dtype=body.embedding_dtype,
    )
    async with aclosing(stream.batches()) as batches:
        async for batch in batches:
            writer.write([row for _, row in batch])
            yield _taken(sink)
    writer.write([], json_usage(stream.usage))
    writer.close()
    yield _taken(sink)


def _taken(sink: io.BytesIO) -> bytes:
    data = sink.getvalue()
    sink.seek(0)
    sink.truncate()
    return data


def _encode(
    media_type: str, request: EnrichRequest, result: EnrichResult, body: EnrichOptions
) -> bytes:
    usage = json_usage(result.usage)
    if media_type == arrow_stream.MEDIA_TYPE:
        return arrow_stream.encode_stream(request, result, usage, body.embedding_dtype)
    data = [_item(request, row, body) for row in result.rows]
    return msgspec.json.encode({"object": "list", "data": data, "usage": usage})


def _item(request: EnrichRequest, row: EnrichRow, body: EnrichOptions) -> dict[str, Any]:
    as_base64 = body.encoding_format == "base64"
    return json_row(request, row, dtype=body.embedding_dtype, as_base64=as_base64)
