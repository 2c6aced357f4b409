"""An enrich job before it is accepted: what it leaves to the server is filled in, and what it names is looked at."""

import asyncio

from graph.enrich import EnrichRequest, UnsuitableModelError
from jobs.spec import EnrichSpec
from service.auth import Identity
from service.deps import AppState
from service.enrichment import find_nodes, find_prompt, open_graph
from service.errors import ApiError
from service.settings import DEFAULT_MODEL


async def complete_enrich(spec: EnrichSpec, state: AppState, identity: Identity) -> EnrichSpec:
    """The job with its prompt's version and its models named.

    Raises:
        ApiError: no such prompt, graph or node; a model cannot do it or is not served.
    """
    prompt = find_prompt(spec.prompt, state, identity)
    if spec.graph is not None:
        graph = await asyncio.to_thread(open_graph, state, identity, spec.graph, "graph")
        if spec.node_ids is not None:
            await asyncio.to_thread(find_nodes, graph, spec.node_ids)
    model = spec.model or DEFAULT_MODEL
    embedding_model = spec.embedding_model or state.settings.embedding_model
    request = EnrichRequest(
        nodes=(),
        prompt=prompt,
        model=model,
        embedding_model=embedding_model,
        outputs=frozenset(spec.return_),
        max_tokens=spec.max_tokens,
    )
    try:
        await state.enricher.stream(
            request
        )  # refuses what cannot begin; nothing is asked of a model
    except UnsuitableModelError as error:
        raise ApiError("invalid_value", error.message, error.param) from error
    return spec.model_copy(
        update={"prompt": prompt.ref, "model": model, "embedding_model": embedding_model}
    )
