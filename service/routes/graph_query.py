"""LLaGA over HTTP: POST /v1/graphs/{id}/query, and the projectors that it may name.

A first question about a part of a graph costs the encoding of every node in reach, so their number is limited; vectors
are kept in the enrichment cache, and later questions read them there.
"""

import asyncio
import threading
import time
from typing import Annotated, Literal

import numpy as np
from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response
from pydantic import ConfigDict, Field, model_validator

from engines.protocol import AsyncEngine, EngineError
from graph.llaga.filling import Filling, Float32s, TooManyNodesError, plan_within
from graph.llaga.hops import HopOperator
from graph.llaga.projector import (
    PROJECTOR_ID_PATTERN,
    LoadedProjector,
    ProjectorError,
    ProjectorManifest,
    ProjectorNotFoundError,
    ProjectorRegistry,
    load_projector,
)
from graph.llaga.prompts import NUM_CENTRES, Task
from graph.llaga.query import Answer, answer_questions
from graph.store import Graph, Int64s
from graph.text_vectors import VectorUsage
from service.auth import Identity
from service.deps import AppState, IdentityDep, RequestModel, ResponseModel, StateDep, require
from service.enrichment import NodeIdField, node_indices, open_graph
from service.errors import ApiError, error_responses, from_engine_error
from service.generation import json_response
from service.generation_body import absent, present
from service.middleware import answer_in_time

router = APIRouter(
    prefix="/v1",
    tags=["graphs"],
    dependencies=[Depends(require("inference"))],
    responses=error_responses(408, 409),
)
MAX_QUESTIONS = 256
MAX_TEMPLATE_NODES = 8192


Pair = Annotated[list[NodeIdField], Field(min_length=2, max_length=2)]


class QueryBody(RequestModel):
    """`node_ids` for node classification and description, `pairs` for link prediction. `operator` is refused where it
    is not the one that the projector was trained with."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {"allOf": [present("node_ids"), absent("pairs")]},
                {"allOf": [present("pairs"), absent("node_ids")]},
            ]
        }
    )

    projector: str = Field(max_length=96)
    task: Task
    node_ids: Annotated[list[NodeIdField], Field(min_length=1, max_length=MAX_QUESTIONS)] | None = (
        None
    )
    pairs: Annotated[list[Pair], Field(min_length=1, max_length=MAX_QUESTIONS)] | None = None
    operator: HopOperator | None = None

    @model_validator(mode="after")
    def _check(self) -> "QueryBody":
        wanted, other = ("pairs", "node_ids")
        if NUM_CENTRES[self.task] == 1:
            wanted, other = other, wanted
        if getattr(self, wanted) is None:
            raise ApiError("invalid_value", f"{self.task} needs {wanted}", wanted)
        if getattr(self, other) is not None:
            raise ApiError("invalid_value", f"{self.task} takes no {other}", other)
        return self


class QueryAnswer(ResponseModel):
    """`text` is the likeliest answer, or the description; `template_nodes` has a list for each of `node_ids`."""

    index: int
    node_ids: list[str | int]
    text: str
    probabilities: dict[str, float] | None = Field(
        description="Of all answers; they sum to 1. Null for a description, which is written freely."
    )
    logprobs: dict[str, float] | None = Field(
        description="Sum over the answer's tokens and the end mark, natural logarithm."
    )
    template_nodes: list[list[str | int]]


class QueryResponse(ResponseModel):
    object: Literal["graph.query"] = "graph.query"
    graph_id: str
    content_hash: str
    projector: str
    model: str
    task: Task
    data: list[QueryAnswer]
    num_encoded_nodes: int = Field(
        description="Nodes whose text was encoded now; the vectors of the others were there."
    )


class ProjectorObject(ResponseModel):
    id: str
    object: Literal["projector"] = "projector"
    created_at: int
    model: str
    embedding_model: str | None = Field(description="Null: the graph's own features.")
    template: Literal["nd", "ho"]
    hops: int
    fanout: int | None
    operator: HopOperator | None
    num_layers: int
    tasks: list[Task]
    classes: list[str]


class ProjectorList(ResponseModel):
    object: Literal["list"] = "list"
    data: list[ProjectorObject]


class ProjectorDeleted(ResponseModel):
    id: str
    object: Literal["projector"] = "projector"
    deleted: Literal[True] = True


@router.post("/graphs/{graph_id}/query", response_model=QueryResponse)
async def query_graph(
    graph_id: str, body: QueryBody, request: Request, state: StateDep, identity: IdentityDep
) -> Response:
    """Ask a projector's LLM for the class or a description of nodes, or whether pairs of nodes are linked.

    Of a pair, each node is taken out of the graph before the other's surroundings are looked at.
    """
    work = _query(graph_id, body, state, identity)
    seconds = state.settings.request_timeout_seconds
    return await answer_in_time(request, work, seconds, "the query")


@router.get("/projectors")
async def list_projectors(state: StateDep, identity: IdentityDep) -> ProjectorList:
    """Your projectors, by id."""
    found = await asyncio.to_thread(_registry(state).list_projectors, identity.tenant)
    return ProjectorList(data=[_projector_object(name, manifest) for name, manifest in found])


@router.delete("/projectors/{projector_id}")
async def delete_projector(
    projector_id: str, state: StateDep, identity: IdentityDep
) -> ProjectorDeleted:
    try:
        await asyncio.to_thread(_registry(state).delete, projector_id, identity.tenant)
    except ProjectorNotFoundError:
        raise _no_projector(projector_id, "projector_id") from None
    except ProjectorError as error:
        raise ApiError("invalid_value", error.message, "projector_id") from error
    return ProjectorDeleted(id=projector_id)


async def _query(graph_id: str, body: QueryBody, state: AppState, identity: Identity) -> Response:
    started_at = time.monotonic()
    projector = await asyncio.to_thread(_load, body, state, identity)
    manifest = projector.manifest
    graph, questions = await asyncio.to_thread(_open, graph_id, body, state, identity)
    engine = await state.engines.get(manifest.model)
    encoder = None if manifest.encoder is None else await state.engines.get(manifest.encoder)
    try:
        manifest.check_use(
            task=body.task,
            model_hash=engine.info.checkpoint_hash,
            encoder_hash=None if encoder is None else encoder.info.checkpoint_hash,
            operator=body.operator,
        )
    except ProjectorError as error:
        param = error.param if error.param in ("task", "operator") else "projector"
        raise ApiError("invalid_value", error.message, param) from error
    fillings, nodes = await _plan(manifest, graph, body, questions)
    text = await state.tokenizers.get(state.engines.entry(manifest.model))
    try:
        features, num_encoded = await _features(state, manifest, encoder, graph, nodes, identity)
        answers = await answer_questions(
            engine,
            text.tokenizer,
            projector,
            body.task,
            fillings,
            features,
            end_token_id=engine.info.eos_token_ids[0],
            tenant=identity.tenant,
        )
    except EngineError as error:
        raise from_engine_error(error) from error
    state.metrics.request_finished(
        manifest.model,
        "query",
        finish_reason="stop",
        prompt_tokens=sum(answer.num_tokens for answer in answers),
        generation_tokens=sum(answer.num_generated for answer in answers),
        e2e_seconds=time.monotonic() - started_at,
    )

    def respond() -> Response:
        return json_response(
            QueryResponse(
                graph_id=graph_id,
                content_hash=graph.info.content_hash,
                projector=body.projector,
                model=manifest.model,
                task=body.task,
                data=[
                    _answer(index, graph, question, answer)
                    for index, (question, answer) in enumerate(zip(questions, answers, strict=True))
                ],
                num_encoded_nodes=num_encoded,
            )
        )

    return await asyncio.to_thread(respond)


async def _plan(
    manifest: ProjectorManifest, graph: Graph, body: QueryBody, questions: Int64s
) -> tuple[list[Filling], Int64s]:
    """What fills the questions' templates, and all nodes that are read for them."""
    left = threading.Event()
    try:
        return await asyncio.to_thread(
            plan_within,
            manifest.template,
            graph,
            body.task,
            questions,
            max_nodes=MAX_TEMPLATE_NODES,
            is_stopped=left.is_set,
        )
    except TooManyNodesError as error:
        name, most = "pairs" if body.node_ids is None else "node_ids", MAX_TEMPLATE_NODES
        if error.is_alone:
            raise ApiError(
                "invalid_value",
                f"the projector's template reads more than {most} nodes for this one question,"
                f" at most {most} are read",
                f"{name}[{error.question}]",
            ) from None
        raise ApiError(
            "invalid_value",
            f"the first {error.question + 1} questions read more than {most} nodes,"
            f" at most {most} are read at once; ask fewer",
            name,
        ) from None
    finally:
        left.set()  # the thread goes on alone where the client left or took too long


def _load(body: QueryBody, state: AppState, identity: Identity) -> LoadedProjector:
    try:
        return load_projector(_registry(state).path(body.projector, identity.tenant))
    except (ProjectorNotFoundError, FileNotFoundError):
        raise _no_projector(body.projector, "projector") from None
    except ProjectorError as error:
        raise ApiError("invalid_value", f"unsound: {error.message}", "projector") from error


def _open(
    graph_id: str, body: QueryBody, state: AppState, identity: Identity
) -> tuple[Graph, Int64s]:
    """The graph, and node indices of every question (Q, C)."""
    graph = open_graph(state, identity, graph_id)
    if body.pairs is None:
        assert body.node_ids is not None
        columns = [body.node_ids]
        places = ["node_ids[{}]"]
    else:
        columns = [[pair[0] for pair in body.pairs], [pair[1] for pair in body.pairs]]
        places = ["pairs[{}][0]", "pairs[{}][1]"]
    indices = [
        node_indices(graph, column, place) for column, place in zip(columns, places, strict=True)
    ]
    questions = np.array(indices, dtype=np.int64).T
    if body.pairs is not None:
        same = np.flatnonzero(questions[:, 0] == questions[:, 1])
        if len(same):
            raise ApiError(
                "invalid_value", "a pair must be of two nodes, got one twice", f"pairs[{same[0]}]"
            )
    return graph, questions


async def _features(
    state: AppState,
    manifest: ProjectorManifest,
    encoder: AsyncEngine | None,
    graph: Graph,
    nodes: Int64s,
    identity: Identity,
) -> tuple[Float32s, int]:
    """Features (num_nodes, encoder_dim), and how many texts were encoded for them.

    Of an encoder's, only the rows of `nodes` are filled, so only their pages exist; a text without a token is zero.
    """
    dim = manifest.encoder_dim
    if manifest.encoder is None or encoder is None:
        if graph.features is None or graph.features.shape[1] != dim:
            has = "none" if graph.features is None else str(graph.features.shape[1])
            raise ApiError(
                "invalid_value",
                f"the projector reads {dim} features of each node of a graph, this graph has {has}",
                "projector",
            )
        return graph.features, 0
    if encoder.info.hidden_size != dim:
        raise ApiError(
            "invalid_value",
            f"the projector takes vectors of {dim}, the encoder gives {encoder.info.hidden_size}",
            "projector",
        )
    usage = VectorUsage()
    vectors = await state.text_vectors.encode(
        graph, nodes, model=manifest.encoder, tenant=identity.tenant, usage=usage
    )

    def place() -> Float32s:
        features = np.zeros((graph.info.num_nodes, dim), dtype=np.float32)
        features[nodes] = vectors
        return features

    return await asyncio.to_thread(place), usage.num_encoded


def _answer(index: int, graph: Graph, question: Int64s, answer: Answer) -> QueryAnswer:
    return QueryAnswer(
        index=index,
        node_ids=graph.ids(question),
        text=answer.text,
        probabilities=answer.probabilities or None,
        logprobs=answer.logprobs or None,
        template_nodes=[graph.ids(nodes) for nodes in answer.template_nodes],
    )


def _registry(state: AppState) -> ProjectorRegistry:
    return ProjectorRegistry(state.settings.projectors_dir)


def _no_projector(projector_id: str, param: str) -> ApiError:
    return ApiError(
        "projector_not_found",
        f"the projector {projector_id[:100]!r} does not exist; ids match {PROJECTOR_ID_PATTERN}",
        param,
    )


def _projector_object(name: str, manifest: ProjectorManifest) -> ProjectorObject:
    return ProjectorObject(
        id=name,
        created_at=int(manifest.created_at),
        model=manifest.model,
        embedding_model=manifest.encoder,
        template=manifest.template.kind,
        hops=manifest.template.hops,
        fanout=manifest.template.fanout,
        operator=manifest.template.operator,
        num_layers=manifest.num_layers,
        tasks=list(manifest.tasks),
        classes=list(manifest.classes),
    )
