"""Active node selection: which nodes are worth an LLM call (E-LLaGNN, Jaiswal et al. 2024, arXiv:2407.14996).

The paper names the heuristics; formulas and directions here are ours. Every strategy gives each node a score; nodes of
equal score go by node index, so a selection is the same everywhere. Labels of validation and test nodes are read by
none of them.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from graph.selection.budget import Cost, affordable, estimate_cost, estimate_tokens
from graph.selection.clustering import cluster_distances
from graph.selection.predictions import entropy, probabilities, soft_homophily
from graph.selection.quotas import GroupShare, divide, find_groups, shares_of
from graph.selection.request import (
    CLUSTERED,
    DEFAULT_ORDERS,
    MAX_CLUSTERS,
    SEEDED,
    BudgetName,
    Order,
    SelectError,
    SelectRequest,
    Strategy,
    check_request,
)
from graph.selection.structure import pagerank
from graph.store import Float32s, Graph

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Nodes, best first.

    Attributes:
        indices: node indices.
        scores: of the same nodes: the draw, the degree, the PageRank (which sums to 1 over the graph), the distance
            to the cluster's centre, the characters of the text, the entropy in nats, the soft homophily, or of a mix
            the weighted mean of ranks, 1 for a node that is best in everything.
        order, seed, num_clusters: as used; None where the request has no use for them.
        stopped_by: the limit that was exhausted first; None: every node is selected.
        estimate: of calls about all these nodes.
        quotas: of the groups that got anything; None without quotas.
    """

    order: Order | None
    seed: int | None
    num_clusters: int | None
    indices: npt.NDArray[np.int64]
    scores: Floats
    stopped_by: BudgetName | None
    estimate: Cost
    quotas: list[GroupShare] | None


def check_selection(graph: Graph, request: SelectRequest) -> None:
    """What `select_nodes` would refuse, short of what it has to compute; so that no text is encoded for nothing.

    Raises:
        SelectError
    """
    check_request(request)
    _read_inputs(graph, request, None)


def needs_text_vectors(graph: Graph, request: SelectRequest) -> bool:
    """Whether `select_nodes` must be given vectors of the nodes' texts."""
    wanted = request.embedding_model is not None or graph.features is None
    return bool(request.strategies & CLUSTERED) and wanted


def select_nodes(
    graph: Graph, request: SelectRequest, *, text_vectors: Float32s | None = None
) -> Selection:
    """Choose nodes.

    Args:
        text_vectors: (num_nodes, dim), of the texts; where `needs_text_vectors`.

    Raises:
        SelectError: options that do not fit together or do not fit the graph.
    """
    check_request(request)
    inputs = _read_inputs(graph, request, text_vectors)
    scores, claims, order = _score(graph, request, inputs)
    best_first = np.argsort(-claims, kind="stable")
    groups = None
    if request.quotas is not None:
        groups = find_groups(graph, request.quotas.per, inputs.seed)
        best_first = divide(best_first, groups, request.quotas.shares)
    tokens = estimate_tokens(graph, request.rates)[best_first]
    num_selected, stopped_by = affordable(tokens, request.budget, request.rates)
    indices = best_first[:num_selected]
    by_community = request.quotas is not None and request.quotas.per == "community"
    return Selection(
        order=order,
        seed=inputs.seed if request.strategies & SEEDED or by_community else None,
        num_clusters=inputs.num_clusters,
        indices=indices,
        scores=scores[indices],
        stopped_by=stopped_by,
        estimate=estimate_cost(int(tokens[:num_selected].sum()), request.rates),
        quotas=None if groups is None else shares_of(indices, groups),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Inputs:
    """What strategies read besides the graph, checked. Attributes: vectors, predictions: None where none is read."""

    seed: int
    num_clusters: int | None
    vectors: Float32s | None
    predictions: Floats | None


def _read_inputs(graph: Graph, request: SelectRequest, text_vectors: Float32s | None) -> _Inputs:
    clusters = bool(request.strategies & CLUSTERED)
    predictions = request.predictions
    return _Inputs(
        seed=request.seed or 0,
        num_clusters=_num_clusters(graph, request.num_clusters) if clusters else None,
        vectors=graph.features if text_vectors is None else text_vectors,
        predictions=None if predictions is None else probabilities(graph, predictions),
    )


def _num_clusters(graph: Graph, wanted: int | None) -> int:
    if wanted is None:
        wanted = len(graph.training_labels().drop_null().unique())
        if wanted == 0:
            raise SelectError(
                "num_clusters", "num_clusters is needed: no node of split 'train' has a label"
            )
    most = min(graph.info.num_nodes, MAX_CLUSTERS)  # classes may be more
    if wanted > most:
        raise SelectError("num_clusters", f"num_clusters must be at most {most}, got {wanted}")
    return wanted


def _score(
    graph: Graph, request: SelectRequest, inputs: _Inputs
) -> tuple[Floats, Floats, Order | None]:
    """Scores in their own unit, the same as claims (the highest is selected first), and the order that was used."""
    if request.strategy != "mix":
        order = request.order or DEFAULT_ORDERS.get(request.strategy)
        scores = _scores(graph, request.strategy, inputs)
        return scores, _claims(scores, request.strategy, order), order
    assert request.mix is not None
    mixed = np.zeros(graph.info.num_nodes)
    for part in request.mix:
        order = part.order or DEFAULT_ORDERS.get(part.strategy)
        claims = _claims(_scores(graph, part.strategy, inputs), part.strategy, order)
        mixed += part.weight * normalised_ranks(claims)
    mixed /= sum(part.weight for part in request.mix)
    return mixed, _claims(mixed, "mix", None), None


def normalised_ranks(claims: Floats) -> Floats:
    """1 for the highest, 0 for the lowest, evenly between; equal claims share the mean of their ranks."""
    from scipy.stats import rankdata

    if len(claims) == 1:
        return np.ones(1)
    return np.asarray((rankdata(claims) - 1) / (len(claims) - 1), dtype=np.float64)


def _claims(scores: Floats, strategy: Strategy, order: Order | None) -> Floats:
    # Scores that differ in the last digits, as of symmetric nodes, are ties. A PageRank is about 1 / num_nodes.
    digits = scores * len(scores) if strategy == "pagerank" else scores
    return np.round(-digits if order == "low" else digits, 9)


def _scores(graph: Graph, strategy: Strategy, inputs: _Inputs) -> Floats:
    match strategy:
        case "random":
            return np.random.default_rng(inputs.seed).random(graph.info.num_nodes)
        case "degree":
            return graph.degrees.astype(np.float64)
        case "pagerank":
            return pagerank(graph)
        case "clustering_distance":
            assert inputs.vectors is not None, "needs_text_vectors"
            assert inputs.num_clusters is not None
            return cluster_distances(inputs.vectors, inputs.num_clusters, inputs.seed)
        case "text_length":
            return graph.text_lengths.astype(np.float64)
        case "entropy":
            assert inputs.predictions is not None
            return entropy(inputs.predictions)
        case "soft_homophily":
            assert inputs.predictions is not None
            return soft_homophily(graph, inputs.predictions)
        case "mix":
            raise AssertionError("a mix is made of its parts")
