"""Graphs: upload, look at, select nodes, enrich nodes."""

import asyncio
import hashlib
import json
from collections.abc import Callable, Coroutine
from functools import partial
from typing import IO, Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Depends, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.routing import APIRoute
from pydantic import AllowInfNan, FailFast, Field, ValidationError, WrapValidator
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException

from engines.protocol import EngineError
from graph.catalog import MAX_NEIGHBORS_READ, Prompt
from graph.enrich_types import EnrichNode
from graph.selection.quotas import GroupShare
from graph.selection.request import (
    BudgetName,
    Order,
    SelectError,
    SelectRequest,
    Strategy,
    with_price,
)
from graph.selection.select import (
    Selection,
    check_selection,
    needs_text_vectors,
    select_nodes,
)
from graph.store import (
    MAX_FEATURE_DIM,
    MAX_NAME_CHARS,
    Graph,
    GraphColumns,
    GraphConflictError,
    GraphInfo,
    GraphInputError,
    GraphNotFoundError,
)
from graph.upload import columns_from_lists, read_columns, release_memory
from service.auth import Identity
from service.deps import (
    AppState,
    IdempotencyKey,
    IdentityDep,
    RequestModel,
    ResponseModel,
    StateDep,
    require,
    standalone_schema,
)
from service.enrichment import (
    ENRICH_RESPONSES,
    MAX_NODES_PER_REQUEST,
    EnrichOptions,
    EnrichResponse,
    LabelField,
    NodeIdField,
    VariableName,
    VariableText,
    answer_enrich,
    find_nodes,
    find_prompt,
    graph_not_found,
    open_graph,
    read_nodes,
)
from service.errors import ApiError, error_responses, from_engine_error
from service.generation import json_response
from service.idempotency import request_hash, resource_id
from service.middleware import answer_in_time, cancel_on_disconnect


class _JsonInThread(Request):
    async def json(self) -> Any:
        return await asyncio.to_thread(json.loads, await self.body())


class _LargeBodyRoute(APIRoute):
    """Predictions of all nodes are megabytes: while they are parsed, others are served."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handler(request: Request) -> Response:
            return await handle(_JsonInThread(request.scope, request.receive))

        return handler


router = APIRouter(
    prefix="/v1/graphs",
    route_class=_LargeBodyRoute,
    tags=["graphs"],
    dependencies=[Depends(require("inference"))],
    responses=error_responses(409),
)
_PARTS = ("nodes", "edges", "name", "directed")


class GraphNodeBody(RequestModel):
    """An empty text is allowed: a node need not have one. Features: as many for every node, or for none."""

    id: NodeIdField
    text: str
    label: LabelField | None = None
    split: Literal["train", "val", "test"] | None = None
    # NaN passes here, so that the store refuses it with the node's id, as it does in files.
    features: list[Annotated[float, AllowInfNan(True)]] | None = Field(
        default=None, min_length=1, max_length=MAX_FEATURE_DIM
    )


class GraphBody(RequestModel):
    """Ids and labels are all strings or all integers. Self-loops and repeated edges are dropped, and counted."""

    name: str = Field(min_length=1, max_length=MAX_NAME_CHARS)
    directed: bool = False
    nodes: Annotated[list[GraphNodeBody], FailFast(), Field(min_length=1)]
    edges: Annotated[list[tuple[NodeIdField, NodeIdField]], FailFast()] = Field(default=[])


class GraphUpload(RequestModel):
    """Parquet or Arrow IPC files: nodes (id, text, label?, split?, features?) and edges (source, target)."""

    name: str = Field(min_length=1, max_length=MAX_NAME_CHARS)
    directed: Literal["true", "false"] = "false"
    nodes: Annotated[str, Field(json_schema_extra={"format": "binary"})]
    edges: Annotated[str, Field(json_schema_extra={"format": "binary"})]


class GraphObject(ResponseModel):
    """`num_edges` counts distinct edges without self-loops; in an undirected graph a,b and b,a are one."""

    id: str
    object: Literal["graph"] = "graph"
    name: str
    created_at: int
    directed: bool
    id_type: Literal["string", "int64"]
    num_nodes: int
    num_edges: int
    num_self_loops: int = Field(description="Dropped from the upload.")
    num_duplicate_edges: int = Field(description="Dropped from the upload.")
    has_labels: bool
    has_splits: bool
    feature_dim: int | None = Field(description="Numbers of a node's features; null without.")
    content_hash: str
    num_bytes: int


class GraphList(ResponseModel):
    object: Literal["list"] = "list"
    data: list[GraphObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class GraphDeleted(ResponseModel):
    id: str
    object: Literal["graph"] = "graph"
    deleted: Literal[True] = True


class SelectionEstimate(ResponseModel):
    """Of calls about all selected nodes, by the request's `rates`; null where it has no rate."""

    tokens: int
    seconds: float | None
    cost: float | None


class SelectionQuota(ResponseModel):
    name: str | int | None = Field(
        description="A class, null for nodes without a training label, or a community's first node."
    )
    num_nodes: int
    num_selected: int


class SelectionObject(ResponseModel):
    """Node ids, best first; nodes of equal score in the order of the upload."""

    object: Literal["graph.selection"] = "graph.selection"
    graph_id: str
    content_hash: str
    strategy: Strategy
    order: Order | None
    seed: int | None
    num_clusters: int | None
    vectors_from: Literal["features", "texts"] | None = Field(description="What was clustered.")
    embedding_model: str | None = Field(description="That encoded the texts that were clustered.")
    node_ids: list[str | int]
    scores: list[float]
    stopped_by: BudgetName | None = Field(
        description="The limit that was exhausted first; null: every node is selected."
    )
    estimate: SelectionEstimate
    quotas: list[SelectionQuota] | None = Field(description="Groups that got any.")


UnreadSelection = Annotated[SelectRequest, WrapValidator(lambda data, _: data)]
"""What is a `SelectRequest` by the API's description, and is read in a thread."""

NeighborIds = Annotated[list[NodeIdField], Field(max_length=MAX_NEIGHBORS_READ)]


class GraphEnrichBody(EnrichOptions):
    """`neighbors` and `node_variables` have an item per node."""

    node_ids: list[NodeIdField] = Field(min_length=1, max_length=MAX_NODES_PER_REQUEST)
    neighbors: list[NeighborIds] | None = Field(
        default=None,
        max_length=MAX_NODES_PER_REQUEST,
        description="Which neighbours the prompt reads, best first; by default the first in the order of the upload.",
    )
    node_variables: list[dict[VariableName, VariableText]] | None = Field(
        default=None, max_length=MAX_NODES_PER_REQUEST
    )


_CREATE_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": standalone_schema(GraphBody)},
            "multipart/form-data": {"schema": standalone_schema(GraphUpload)},
        },
    }
}


@router.post("", status_code=201, response_model=GraphObject, openapi_extra=_CREATE_BODY)
async def create_graph(
    request: Request,
    response: Response,
    state: StateDep,
    identity: IdentityDep,
    key: IdempotencyKey = None,
) -> GraphObject:
    """Upload a graph: JSON, or multipart with `nodes` and `edges` as Parquet or Arrow IPC files.

    Nodes have `id`, `text` and optionally `label`, `split` and `features`; edges name two of them.
    """
    graph_id = resource_id("graph", identity, key)
    content_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if content_type == "multipart/form-data":
        info, created = await _create_from_files(request, state, identity, graph_id)
    else:
        body = await request.body()
        create = partial(_create_from_json, body, state, identity, graph_id)
        info, created = await _in_turn(request, state, create)
    if not created:
        response.headers["Idempotent-Replayed"] = "true"
    return _graph_object(info)


async def _in_turn(
    request: Request, state: AppState, create: Callable[[], tuple[GraphInfo, bool]]
) -> tuple[GraphInfo, bool]:
    """Create a graph in a thread, few at once. Who leaves gives up their turn; what has begun is finished."""

    def work() -> tuple[GraphInfo, bool]:
        try:
            return create()
        finally:
            release_memory()

    await cancel_on_disconnect(request, state.uploads.acquire())
    try:
        return await asyncio.to_thread(work)
    finally:
        state.uploads.release()


def _create_from_json(
    body: bytes, state: AppState, identity: Identity, graph_id: str
) -> tuple[GraphInfo, bool]:
    try:
        graph = GraphBody.model_validate_json(body)
    except ValidationError as error:
        if error.errors()[0]["type"] == "json_invalid":
            raise ApiError("invalid_json", "the body is not valid JSON") from None
        raise _in_body(error) from None
    try:
        columns = columns_from_lists(
            ids=[node.id for node in graph.nodes],
            texts=[node.text for node in graph.nodes],
            labels=[node.label for node in graph.nodes],
            splits=[node.split for node in graph.nodes],
            features=[node.features for node in graph.nodes],
            edges=graph.edges,
        )
    except GraphInputError as error:
        raise ApiError("invalid_value", error.message, error.param) from error
    digest = request_hash(json.loads(body))
    return _create(state, identity, graph_id, columns, graph.name, graph.directed, digest)


async def _create_from_files(
    request: Request, state: AppState, identity: Identity, graph_id: str
) -> tuple[GraphInfo, bool]:
    try:
        async with request.form(max_files=2, max_fields=2) as form:
            nodes, edges, name, directed = _form_parts(form)
            create = partial(
                _create_from_tables,
                nodes.file,
                edges.file,
                name,
                directed,
                state,
                identity,
                graph_id,
            )
            return await _in_turn(request, state, create)
    except HTTPException as error:
        raise ApiError(
            "invalid_value", f"the multipart body is not valid: {error.detail}"
        ) from error


def _form_parts(form: FormData) -> tuple[UploadFile, UploadFile, str, bool]:
    for part in form:
        if part not in _PARTS:
            raise ApiError(
                "unsupported_parameter",
                f"unknown part {part[:80]!r}; known: {', '.join(_PARTS)}",
                part,
            )
        if len(form.getlist(part)) > 1:
            raise ApiError("invalid_value", f"part {part!r} is there twice", part)
    files: list[UploadFile] = []
    for part in ("nodes", "edges"):
        file = form.get(part)
        if not isinstance(file, UploadFile):
            raise ApiError("invalid_value", f"part {part!r} must be a file", part)
        files.append(file)
    name, directed = form.get("name"), form.get("directed", "false")
    if not isinstance(name, str):
        raise ApiError("invalid_value", "part 'name' must be a text", "name")
    if directed not in ("true", "false"):
        raise ApiError("invalid_value", "directed must be true or false", "directed")
    return files[0], files[1], name, directed == "true"


def _create_from_tables(
    nodes: IO[bytes],
    edges: IO[bytes],
    name: str,
    directed: bool,
    state: AppState,
    identity: Identity,
    graph_id: str,
) -> tuple[GraphInfo, bool]:
    try:
        columns = read_columns(nodes, edges)
    except GraphInputError as error:
        raise ApiError("invalid_value", error.message, error.param) from error
    digest = request_hash(
        {
            "name": name,
            "directed": directed,
            "nodes": hashlib.file_digest(_rewound(nodes), "sha256").hexdigest(),
            "edges": hashlib.file_digest(_rewound(edges), "sha256").hexdigest(),
        }
    )
    return _create(state, identity, graph_id, columns, name, directed, digest)


def _rewound(file: IO[bytes]) -> Any:
    file.seek(0)
    return file


def _create(
    state: AppState,
    identity: Identity,
    graph_id: str,
    columns: GraphColumns,
    name: str,
    directed: bool,
    digest: str,
) -> tuple[GraphInfo, bool]:
    if state.quotas is not None and not _exists(state, identity, graph_id):
        state.quotas.check_disk(identity.tenant)
    try:
        return state.graphs.create(
            graph_id,
            columns,
            name=name,
            owner=identity.tenant,
            request_hash=digest,
            directed=directed,
        )
    except GraphInputError as error:
        raise ApiError("invalid_value", error.message, error.param) from error
    except GraphConflictError as error:
        raise ApiError(
            "idempotency_conflict",
            "this Idempotency-Key made a graph from another request",
            "Idempotency-Key",
        ) from error


def _exists(state: AppState, identity: Identity, graph_id: str) -> bool:
    try:
        state.graphs.info(graph_id, identity.tenant)
    except GraphNotFoundError:
        return False
    return True


@router.get("")
async def list_graphs(
    state: StateDep,
    identity: IdentityDep,
    after: Annotated[str | None, Query(max_length=100)] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> GraphList:
    """Your graphs, newest first."""
    try:
        found = await asyncio.to_thread(
            state.graphs.list_graphs, identity.tenant, after=after, limit=limit + 1
        )
    except GraphNotFoundError:
        raise ApiError("graph_not_found", "no such graph", "after") from None
    data = [_graph_object(info) for info in found[:limit]]
    return GraphList(
        data=data,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
        has_more=len(found) > limit,
    )


@router.get("/{graph_id}")
async def get_graph(graph_id: str, state: StateDep, identity: IdentityDep) -> GraphObject:
    try:
        info = await asyncio.to_thread(state.graphs.info, graph_id, identity.tenant)
    except GraphNotFoundError:
        raise graph_not_found(graph_id) from None
    return _graph_object(info)


@router.delete("/{graph_id}")
async def delete_graph(graph_id: str, state: StateDep, identity: IdentityDep) -> GraphDeleted:
    """Delete a graph. Requests that work on it finish; cached texts stay."""
    try:
        await asyncio.to_thread(state.graphs.delete, graph_id, identity.tenant)
    except GraphNotFoundError:
        raise graph_not_found(graph_id) from None
    return GraphDeleted(id=graph_id)


@router.post("/{graph_id}/select", response_model=SelectionObject, responses=error_responses(408))
async def select(
    graph_id: str, body: UnreadSelection, request: Request, state: StateDep, identity: IdentityDep
) -> Response:
    """Choose the nodes that are worth an LLM call.

    Texts that are encoded for it stay in the cache: a request that took too long goes on where it was when repeated.
    """
    selection = await asyncio.to_thread(_read_selection, body)
    work = _select(graph_id, selection, state, identity)
    seconds = state.settings.request_timeout_seconds
    return await answer_in_time(request, work, seconds, "the selection")


def _read_selection(data: object) -> SelectRequest:
    """As FastAPI validates a body."""
    try:
        return SelectRequest.model_validate(data, from_attributes=True)
    except ValidationError as error:
        raise _in_body(error) from None


def _in_body(error: ValidationError) -> RequestValidationError:
    return RequestValidationError(
        [{**detail, "loc": ("body", *detail["loc"])} for detail in error.errors()]
    )


async def _select(
    graph_id: str, body: SelectRequest, state: AppState, identity: Identity
) -> Response:
    graph = await asyncio.to_thread(open_graph, state, identity, graph_id)
    body = with_price(body, state.settings.cost_per_million_tokens)
    model, vectors = None, None
    try:
        await asyncio.to_thread(check_selection, graph, body)
        if needs_text_vectors(graph, body):
            model = body.embedding_model or state.settings.embedding_model
            vectors = await state.text_vectors.encode(
                graph, np.arange(graph.info.num_nodes), model=model, tenant=identity.tenant
            )
        selection = await asyncio.to_thread(select_nodes, graph, body, text_vectors=vectors)
    except SelectError as error:
        code = "unsupported_parameter" if error.unsupported else "invalid_value"
        raise ApiError(code, error.message, error.param) from error
    except EngineError as error:
        raise from_engine_error(error) from error
    return json_response(_selection_object(graph, body, selection, model))


def _selection_object(
    graph: Graph, body: SelectRequest, selection: Selection, model: str | None
) -> SelectionObject:
    clustered = selection.num_clusters is not None
    estimate = selection.estimate
    return SelectionObject(
        graph_id=graph.info.id,
        content_hash=graph.info.content_hash,
        strategy=body.strategy,
        order=selection.order,
        seed=selection.seed,
        num_clusters=selection.num_clusters,
        vectors_from=("features" if model is None else "texts") if clustered else None,
        embedding_model=model,
        node_ids=graph.ids(selection.indices),
        scores=selection.scores.tolist(),
        stopped_by=selection.stopped_by,
        estimate=SelectionEstimate(
            tokens=estimate.tokens, seconds=estimate.seconds, cost=estimate.cost
        ),
        quotas=None if selection.quotas is None else [_quota(share) for share in selection.quotas],
    )


def _quota(share: GroupShare) -> SelectionQuota:
    return SelectionQuota(
        name=share.name, num_nodes=share.num_nodes, num_selected=share.num_selected
    )


@router.post(
    "/{graph_id}/enrich",
    response_model=EnrichResponse,
    responses={**ENRICH_RESPONSES, **error_responses(406, 408, 409)},
)
async def enrich_graph(
    graph_id: str,
    body: GraphEnrichBody,
    request: Request,
    state: StateDep,
    identity: IdentityDep,
) -> Response:
    """Enrich nodes of a stored graph; as `POST /v1/enrich`, in JSON or as an Arrow stream.

    A prompt that reads neighbours gets those named, as `/sample` chooses them, or the first ones in the order of the
    upload, direction aside; each row says how many it read. Of labels it gets those of training nodes at most.
    """
    prompt = find_prompt(body.prompt, state, identity)
    nodes, classes = await asyncio.to_thread(_graph_nodes, graph_id, body, prompt, state, identity)
    return await answer_enrich(request, state, identity, body, prompt, nodes, classes)


def _graph_nodes(
    graph_id: str, body: GraphEnrichBody, prompt: Prompt, state: AppState, identity: Identity
) -> tuple[tuple[EnrichNode, ...], tuple[str, ...]]:
    """Nodes, and the classes of the graph."""
    graph = open_graph(state, identity, graph_id)
    indices = find_nodes(graph, body.node_ids)
    return read_nodes(
        graph, indices, prompt, neighbors=body.neighbors, variables=body.node_variables
    )


def _graph_object(info: GraphInfo) -> GraphObject:
    return GraphObject(
        id=info.id,
        name=info.name,
        created_at=int(info.created_at),
        directed=info.directed,
        id_type=info.id_type,
        num_nodes=info.num_nodes,
        num_edges=info.num_edges,
        num_self_loops=info.num_self_loops,
        num_duplicate_edges=info.num_duplicate_edges,
        has_labels=info.has_labels,
        has_splits=info.has_splits,
        feature_dim=info.feature_dim,
        content_hash=info.content_hash,
        num_bytes=info.num_bytes,
    )
