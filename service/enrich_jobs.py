"""An enrich job before it is accepted: what it leaves to the server is filled in, and what it names is looked at."""

import asyncio

from graph.catalog import Prompt
from graph.enrich_types import EnrichNode, EnrichRequest, UnsuitableModelError
from graph.generation import PromptInputError
from graph.nodes import classes_of_graph
from graph.selection.request import SelectError, SelectRequest, with_price
from graph.selection.select import check_selection
from graph.store import Graph
from jobs.spec import EnrichBudgetSpec, EnrichSpec
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
    classes = tuple(spec.classes or ())
    price = state.settings.cost_per_million_tokens
    if spec.graph is not None:
        graph = await asyncio.to_thread(open_graph, state, identity, spec.graph, "graph")
        if spec.node_ids is not None:
            await asyncio.to_thread(find_nodes, graph, spec.node_ids)
        if spec.select is not None:
            await _check_selection(graph, with_price(spec.select, price), state)
        classes = classes or await _classes(graph, prompt)
    model = spec.model or DEFAULT_MODEL
    embedding_model = spec.embedding_model or state.settings.embedding_model
    # A file's nodes may give variables of their own, which the job finds out; a graph's have none.
    probe = () if spec.graph is None else (EnrichNode(id=0, text=""),)
    try:
        request = EnrichRequest(
            nodes=probe,
            prompt=prompt,
            model=model,
            embedding_model=embedding_model,
            outputs=frozenset(spec.return_),
            max_tokens=spec.max_tokens,
            classes=classes,
            variables=spec.variables,
        )
        await state.enricher.stream(
            request
        )  # refuses what cannot begin; nothing is asked of a model
    except (PromptInputError, UnsuitableModelError) as error:
        raise ApiError("invalid_value", error.message, error.param) from error
    return spec.model_copy(
        update={
            "prompt": prompt.ref,
            "model": model,
            "embedding_model": embedding_model,
            "budget": _priced(spec.budget, price),
            "select": None if spec.select is None else with_price(spec.select, price),
        }
    )


async def _classes(graph: Graph, prompt: Prompt) -> tuple[str, ...]:
    """Raises: ApiError."""
    try:
        return await asyncio.to_thread(classes_of_graph, graph, prompt)
    except PromptInputError as error:
        raise ApiError("invalid_value", error.message, error.param) from error


def _priced(budget: EnrichBudgetSpec, price: float | None) -> EnrichBudgetSpec:
    """Raises: ApiError."""
    if budget.cost_per_million_tokens is not None or budget.max_cost is None:
        return budget
    if not price:
        message = "budget.max_cost needs a price above 0, and the server names none"
        raise ApiError("invalid_value", message, "budget.cost_per_million_tokens")
    return budget.model_copy(update={"cost_per_million_tokens": price})


async def _check_selection(graph: Graph, select: SelectRequest, state: AppState) -> None:
    """What can be told before the job makes the selection. Raises: ApiError."""
    try:
        await asyncio.to_thread(check_selection, graph, select)
    except SelectError as error:
        code = "unsupported_parameter" if error.unsupported else "invalid_value"
        raise ApiError(code, error.message, f"select.{error.param}") from error
    if select.embedding_model is not None:
        try:
            await state.engines.get(select.embedding_model)
        except ApiError as error:
            raise ApiError(error.code, error.message, "select.embedding_model") from error
