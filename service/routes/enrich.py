"""Stateless enrichment: node texts in, LLM texts and embeddings out."""

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response
from pydantic import Field

from graph.enrich import EnrichNode
from service.deps import IdentityDep, RequestModel, StateDep, require
from service.enrichment import (
    ENRICH_RESPONSES,
    MAX_NODES_PER_REQUEST,
    EnrichOptions,
    EnrichResponse,
    NodeIdField,
    answer_enrich,
    find_prompt,
)
from service.errors import ApiError, error_responses

router = APIRouter(
    prefix="/v1",
    tags=["graphs"],
    dependencies=[Depends(require("inference"))],
    responses=error_responses(406, 408, 409),
)
MAX_TEXT_CHARS = 2**20
MAX_NEIGHBORS = 1000


class NodeBody(RequestModel):
    """Neighbours are texts, best first; a prompt that reads none does not look at them."""

    id: NodeIdField
    text: str = Field(max_length=MAX_TEXT_CHARS)
    neighbors: list[str] = Field(default=[], max_length=MAX_NEIGHBORS)


class EnrichBody(EnrichOptions):
    nodes: list[NodeBody] = Field(min_length=1, max_length=MAX_NODES_PER_REQUEST)


@router.post("/enrich", response_model=EnrichResponse, responses=ENRICH_RESPONSES)
async def enrich(
    body: EnrichBody, request: Request, state: StateDep, identity: IdentityDep
) -> Response:
    """Have an LLM write about each node, and encode the node's text together with what it wrote.

    One failing node fails its own row only. The answer is JSON, or with `Accept: application/vnd.apache.arrow.stream`
    one Arrow record batch: node_id, status, text, embedding (fixed-size list), tokens_in, tokens_out, ..., with the
    usage in the schema's metadata (`lathe.usage`).
    """
    _check_ids(body.nodes)
    nodes = tuple(
        EnrichNode(id=node.id, text=node.text, neighbors=tuple(node.neighbors))
        for node in body.nodes
    )
    return await answer_enrich(request, state, identity, body, find_prompt(body.prompt), nodes)


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
