"""POST /v1/graphs/{id}/sample: which neighbours of a node a GNN is to aggregate, judged by an encoder or an LLM."""

import asyncio
import time
from typing import Literal

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response
from pydantic import Field, model_validator

from engines.protocol import EngineError
from graph.enrich_types import UnsuitableModelError
from graph.generation import PromptInputError
from graph.sampling import (
    EmbedScorer,
    NodeSample,
    PairScorer,
    RankScorer,
    SampleOptions,
    Scorer,
    ScorerName,
    homophily,
    sample_neighbors,
)
from graph.store import Graph
from service.auth import Identity
from service.deps import AppState, IdentityDep, RequestModel, ResponseModel, StateDep, require
from service.enrichment import (
    MAX_NODES_PER_REQUEST,
    NodeIdField,
    find_nodes,
    find_prompt,
    open_graph,
)
from service.errors import ApiError, error_responses, from_engine_error
from service.generation import json_response
from service.middleware import answer_in_time
from service.settings import DEFAULT_MODEL

router = APIRouter(
    prefix="/v1",
    tags=["graphs"],
    dependencies=[Depends(require("inference"))],
    responses=error_responses(408, 409),
)
MAX_FANOUT = 256


class SampleBody(RequestModel):
    """Of every node at most `fanout` neighbours: the best by score + noise * Gumbel, and `num_random` drawn evenly
    from the rest."""

    node_ids: list[NodeIdField] = Field(min_length=1, max_length=MAX_NODES_PER_REQUEST)
    fanout: int = Field(ge=1, le=MAX_FANOUT)
    scorer: ScorerName = "embed"
    num_random: int = Field(default=0, ge=0, le=MAX_FANOUT, description="Of the fanout.")
    noise: float = Field(
        default=0.1,
        ge=0,
        le=100,
        description="Scale of the Gumbel noise: draws without replacement, by exp(score / noise). 0 takes the best.",
    )
    seed: int = Field(default=0, ge=0, lt=2**63)
    model: str | None = Field(
        default=None,
        max_length=100,
        description="The LLM: of llm_rank, llm_pair and centre_prompt.",
    )
    embedding_model: str | None = Field(
        default=None, max_length=100, description="Of embed; the server's default encoder."
    )
    centre_prompt: str | None = Field(
        default=None,
        max_length=100,
        description="Of embed: judge by the node's vector enriched with this prompt, not by its raw one.",
    )

    @model_validator(mode="after")
    def _check(self) -> "SampleBody":
        if self.num_random > self.fanout:
            raise ApiError("invalid_value", "num_random must be at most fanout", "num_random")
        if self.scorer != "embed":
            for name in ("embedding_model", "centre_prompt"):
                if getattr(self, name) is not None:
                    raise ApiError("unsupported_parameter", f"{self.scorer} has no {name}", name)
        elif self.model is not None and self.centre_prompt is None:
            raise ApiError(
                "unsupported_parameter", "embed asks an LLM only for centre_prompt", "model"
            )
        return self


class KeptNeighbor(ResponseModel):
    node_id: str | int
    score: float | None = Field(description="In [0, 1]; null where there was nothing to choose.")
    chosen_by: Literal["score", "random", "all"]


class DroppedNeighbor(ResponseModel):
    node_id: str | int
    score: float


class SampleErrorBody(ResponseModel):
    code: str
    message: str


class NodeSampleItem(ResponseModel):
    """`kept`: best first, then those drawn at random. `dropped`: judged and not kept."""

    node_id: str | int
    status: Literal["ok", "failed"]
    num_neighbors: int
    kept: list[KeptNeighbor]
    dropped: list[DroppedNeighbor]
    error: SampleErrorBody | None


class HomophilyBody(ResponseModel):
    """Share of edges between nodes of one label, counted where both ends are training nodes with a label."""

    kept: float | None
    num_kept_edges: int
    all: float | None = Field(description="Of all edges of the nodes asked for.")
    num_all_edges: int


class SampleUsage(ResponseModel):
    prompt_tokens: int
    completion_tokens: int
    embedding_tokens: int
    num_calls: int
    num_cached: int = Field(description="Judgements, or vectors, that needed no call.")
    seconds: float


class SampleResponse(ResponseModel):
    object: Literal["graph.sample"] = "graph.sample"
    graph_id: str
    content_hash: str
    scorer: ScorerName
    fanout: int
    num_random: int
    noise: float
    seed: int
    model: str | None
    embedding_model: str | None
    centre_prompt: str | None
    data: list[NodeSampleItem]
    homophily: HomophilyBody
    usage: SampleUsage


@router.post("/graphs/{graph_id}/sample", response_model=SampleResponse)
async def sample_graph(
    graph_id: str, body: SampleBody, request: Request, state: StateDep, identity: IdentityDep
) -> Response:
    """Choose the neighbours that a GNN is to aggregate.

    `embed` compares vectors, `llm_rank` has the LLM rate several neighbours at a time, `llm_pair` weighs its yes
    against its no for each. Judgements are cached. A node that cannot be judged fails alone.
    """
    work = _sample(graph_id, body, state, identity)
    seconds = state.settings.request_timeout_seconds
    return await answer_in_time(request, work, seconds, "sampling")


async def _sample(graph_id: str, body: SampleBody, state: AppState, identity: Identity) -> Response:
    started_at = time.monotonic()
    graph = await asyncio.to_thread(open_graph, state, identity, graph_id)
    centres = await asyncio.to_thread(find_nodes, graph, body.node_ids)
    options = SampleOptions(
        fanout=body.fanout, num_random=body.num_random, noise=body.noise, seed=body.seed
    )
    try:
        scorer, used = await _scorer(body, graph, centres, state, identity)
        samples = await sample_neighbors(graph, centres, scorer, options)
    except UnsuitableModelError as error:
        raise ApiError("invalid_value", error.message, error.param) from error
    except PromptInputError as error:
        raise ApiError("invalid_value", error.message, "centre_prompt") from error
    except EngineError as error:
        raise from_engine_error(error) from error
    share = await asyncio.to_thread(homophily, graph, samples)
    usage = scorer.usage
    if used["model"] is not None:
        state.metrics.request_finished(
            used["model"],
            "sample",
            finish_reason="stop",
            prompt_tokens=usage.prompt_tokens,
            generation_tokens=usage.completion_tokens,
            e2e_seconds=time.monotonic() - started_at,
        )
    return json_response(
        SampleResponse(
            graph_id=graph_id,
            content_hash=graph.info.content_hash,
            scorer=scorer.name,
            fanout=body.fanout,
            num_random=body.num_random,
            noise=body.noise,
            seed=body.seed,
            **used,
            data=[_item(graph, sample) for sample in samples],
            homophily=HomophilyBody(
                kept=share.kept,
                num_kept_edges=share.num_kept_edges,
                all=share.all,
                num_all_edges=share.num_all_edges,
            ),
            usage=SampleUsage(
                prompt_tokens=usage.prompt_tokens,
                completion_tokens=usage.completion_tokens,
                embedding_tokens=usage.embedding_tokens,
                num_calls=usage.num_calls,
                num_cached=usage.num_cached,
                seconds=round(time.monotonic() - started_at, 6),
            ),
        )
    )


async def _scorer(
    body: SampleBody, graph: Graph, centres: list[int], state: AppState, identity: Identity
) -> tuple[Scorer, dict[str, str | None]]:
    """The scorer, and which models and prompt it uses."""
    enricher, tenant = state.enricher, identity.tenant
    if body.scorer == "embed":
        encoder = body.embedding_model or state.settings.embedding_model
        scorer = EmbedScorer(graph, state.text_vectors, encoder, tenant=tenant)
        used: dict[str, str | None] = {"model": None, "embedding_model": encoder}
        if body.centre_prompt is None:
            return scorer, {**used, "centre_prompt": None}
        prompt = find_prompt(body.centre_prompt, state, identity, "centre_prompt")
        model = body.model or DEFAULT_MODEL
        crowded = [index for index in centres if len(graph.neighbors(index)) > body.fanout]
        await scorer.enrich_centres(enricher, crowded, prompt, model)
        return scorer, {**used, "model": model, "centre_prompt": prompt.ref}
    model = body.model or DEFAULT_MODEL
    engine, text = await enricher.model(model, "model")
    kind = RankScorer if body.scorer == "llm_rank" else PairScorer
    judge = kind(graph, engine, text, state.cache, tenant=tenant)
    judge.check_model(model)
    return judge, {"model": model, "embedding_model": None, "centre_prompt": None}


def _item(graph: Graph, sample: NodeSample) -> NodeSampleItem:
    indices = [sample.centre, *(kept.index for kept in sample.kept)]
    centre, *kept_ids = graph.ids([*indices, *(index for index, _ in sample.dropped)])
    dropped_ids = kept_ids[len(sample.kept) :]
    return NodeSampleItem(
        node_id=centre,
        status="ok" if sample.fault is None else "failed",
        num_neighbors=sample.num_neighbors,
        kept=[
            KeptNeighbor(node_id=node_id, score=kept.score, chosen_by=kept.chosen_by)
            for node_id, kept in zip(kept_ids, sample.kept, strict=False)
        ],
        dropped=[
            DroppedNeighbor(node_id=node_id, score=score)
            for node_id, (_, score) in zip(dropped_ids, sample.dropped, strict=True)
        ],
        error=None
        if sample.fault is None
        else SampleErrorBody(code="not_judged", message=sample.fault),
    )
