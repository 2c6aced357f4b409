"""Stateless enrichment: node texts in, LLM texts and embeddings out; and what an enrichment would cost."""

import asyncio

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response
from pydantic import ConfigDict, Field

from graph.catalog import Prompt
from graph.enrich_types import EnrichNode
from service.auth import Identity
from service.deps import AppState, IdentityDep, RequestModel, StateDep, require
from service.enrichment import (
    ENRICH_RESPONSES,
    MAX_NODES_PER_REQUEST,
    EnrichChoices,
    EnrichEstimateBody,
    EnrichOptions,
    EnrichResponse,
    NodeIdField,
    VariableName,
    VariableText,
    answer_enrich,
    estimate_enrich,
    find_nodes,
    find_prompt,
    open_graph,
    read_nodes,
)
from service.errors import ApiError, error_responses
from service.generation_body import present
from service.middleware import answer_in_time

router = APIRouter(
    prefix="/v1",
    tags=["graphs"],
    dependencies=[Depends(require("inference"))],
    responses=error_responses(406, 408, 409),
)
MAX_TEXT_CHARS = 2**20
MAX_NEIGHBORS = 1000
MAX_ESTIMATED_NODES = 20_000
"""Their prompts are rendered and tokenized; a few seconds."""


class NodeBody(RequestModel):
    """Neighbours are texts, best first; a prompt that reads none does not look at them. `variables` of the prompt for
    this node only."""

    id: NodeIdField
    text: str = Field(max_length=MAX_TEXT_CHARS)
    neighbors: list[str] = Field(default=[], max_length=MAX_NEIGHBORS)
    variables: dict[VariableName, VariableText] = Field(default={})


class EnrichBody(EnrichOptions):
    nodes: list[NodeBody] = Field(min_length=1, max_length=MAX_NODES_PER_REQUEST)


class EstimateBody(EnrichChoices):
    """Nodes, or a graph; of a graph some nodes or all. Of the budget, `max_nodes` counts."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [present("nodes"), present("graph")]})

    nodes: list[NodeBody] | None = Field(
        default=None, min_length=1, max_length=MAX_NODES_PER_REQUEST
    )
    graph: str | None = Field(default=None, max_length=100)
    node_ids: list[NodeIdField] | None = Field(
        default=None, min_length=1, max_length=MAX_ESTIMATED_NODES
    )


@router.post("/enrich", response_model=EnrichResponse, responses=ENRICH_RESPONSES)
async def enrich(
    body: EnrichBody, request: Request, state: StateDep, identity: IdentityDep
) -> Response:
    """Have an LLM write about each node, and encode the node's text together with what it wrote.

    One failing node fails its own row only. The answer is JSON, or with `Accept: application/vnd.apache.arrow.stream`
    one Arrow record batch: node_id, status, text, embedding (fixed-size list), tokens_in, tokens_out, ..., with the
    usage in the schema's metadata (`lathe.usage`). With `stream` rows are sent as they finish, in any order: a JSON
    line each (`application/x-ndjson`) and a last one with the usage, or Arrow batches, of which the last has no rows
    and the usage in its metadata. Leaving ends the work.
    """
    prompt = find_prompt(body.prompt, state, identity)
    return await answer_enrich(request, state, identity, body, prompt, _nodes(body.nodes))


@router.post("/enrich/estimate")
async def estimate(
    body: EstimateBody, request: Request, state: StateDep, identity: IdentityDep
) -> EnrichEstimateBody:
    """What an enrichment would cost: equal nodes, cache hits, tokens, seconds, money. Asks no model."""
    work = _estimate(body, state, identity)
    return await answer_in_time(
        request, work, state.settings.request_timeout_seconds, "the estimate"
    )


async def _estimate(body: EstimateBody, state: AppState, identity: Identity) -> EnrichEstimateBody:
    prompt = find_prompt(body.prompt, state, identity)
    classes: tuple[str, ...] = ()
    if (body.nodes is None) == (body.graph is None):
        raise ApiError("invalid_value", "needs either nodes or a graph", "nodes")
    if body.nodes is not None:
        if body.node_ids is not None:
            raise ApiError("invalid_value", "node_ids are of a graph", "node_ids")
        nodes = _nodes(body.nodes)
    else:
        nodes, classes = await asyncio.to_thread(_graph_nodes, body, prompt, state, identity)
    return await estimate_enrich(state, identity, body, prompt, nodes, classes)


def _graph_nodes(
    body: EstimateBody, prompt: Prompt, state: AppState, identity: Identity
) -> tuple[tuple[EnrichNode, ...], tuple[str, ...]]:
    """Nodes, and the classes of the graph."""
    assert body.graph is not None
    graph = open_graph(state, identity, body.graph, "graph")
    if body.node_ids is not None:
        return read_nodes(graph, find_nodes(graph, body.node_ids), prompt)
    num_nodes = min(graph.info.num_nodes, body.budget.max_nodes or graph.info.num_nodes)
    if num_nodes > MAX_ESTIMATED_NODES:
        raise ApiError(
            "invalid_value",
            f"at most {MAX_ESTIMATED_NODES} nodes are estimated, the graph has {num_nodes}: name some",
            "node_ids",
        )
    return read_nodes(graph, range(num_nodes), prompt)


def _nodes(nodes: list[NodeBody]) -> tuple[EnrichNode, ...]:
    _check_ids(nodes)
    return tuple(
        EnrichNode(
            id=node.id,
            text=node.text,
            neighbors=tuple(node.neighbors),
            variables=node.variables,
        )
        for node in nodes
    )


def _check_ids(nodes: list[NodeBody]) -> None:
    seen: set[str | int] = set()
    for index, node in enumerate(nodes):
        if type(node.id) is not type(nodes[0].id):
            raise ApiError(
                "invalid_value",
                "node ids must all be strings or all be integers, got both",
                f"nodes[{index}].id",
            )
        if node.id in seen:
            raise ApiError(
                "invalid_value", f"node id {node.id!r:.80} appears twice", f"nodes[{index}].id"
            )
        seen.add(node.id)
