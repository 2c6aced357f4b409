"""Active node selection: which nodes are worth an LLM call (E-LLaGNN, Jaiswal et al. 2024, arXiv:2407.14996).

The paper names the heuristics; formulas and directions here are ours. Every strategy gives each node a score, higher
first; nodes of equal score go by node index, so a selection is the same everywhere. PageRank follows Page et al.
1999.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from graph.store import Graph

Strategy = Literal["random", "degree", "pagerank", "text_length"]
Order = Literal["low", "high"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
FUTURE_STRATEGIES = (
    "clustering_distance",
    "entropy",
    "soft_homophily",
    "mix",
    "stratified",
)
"""Named by the design and not there yet: refused by name."""

PAGERANK_ALPHA = 0.85
PAGERANK_TOLERANCE = 1e-8
_PAGERANK_MAX_STEPS = 200  # 0.85**114 < 1e-8, from any start

Floats = npt.NDArray[np.float64]


class SelectError(ValueError):
    """Attributes: param: the field at fault; unsupported: it is known, and not available."""

    def __init__(self, param: str, message: str, *, unsupported: bool = False) -> None:
        super().__init__(message)
        self.param = param
        self.message = message
        self.unsupported = unsupported


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How many nodes at most; exactly one is set. A budget above the graph's size takes every node.

    Attributes:
        fraction: in (0, 1]; rounded up to whole nodes.
    """

    nodes: int | None = None
    fraction: float | None = None

    def __post_init__(self) -> None:
        if (self.nodes is None) == (self.fraction is None):
            raise SelectError("budget", "budget needs exactly one of: nodes, fraction")
        if self.nodes is not None and self.nodes < 1:
            raise SelectError("budget.nodes", f"nodes must be at least 1, got {self.nodes}")
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise SelectError("budget.fraction", f"fraction must be in (0, 1], got {self.fraction}")

    def num_nodes(self, total: int) -> int:
        if self.nodes is not None:
            return min(self.nodes, total)
        assert self.fraction is not None
        return math.ceil(round(self.fraction * total, 9))  # 0.07 * 100 is a little above 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Nodes, best first.

    Attributes:
        indices: node indices.
        scores: of the same nodes: the draw, the degree, the PageRank (which sums to 1 over the graph), or the
            characters of the text.
        order, seed: as used; None where the strategy has none.
    """

    strategy: Strategy
    order: Order | None
    seed: int | None
    indices: npt.NDArray[np.int64]
    scores: Floats


def select_nodes(
    graph: Graph,
    strategy: str,
    budget: Budget,
    *,
    order: Order | None = None,
    seed: int | None = None,
) -> Selection:
    """Choose nodes.

    Args:
        order: for degree and text_length (default low first: nodes with few neighbours or little text gain most) and
            pagerank (default high first).
        seed: for random; default 0.

    Raises:
        SelectError: a strategy that does not exist (yet), or an option that it does not have.
    """
    chosen = _check_strategy(strategy)
    if chosen == "random":
        if order is not None:
            raise SelectError("order", "strategy 'random' has no order", unsupported=True)
        seed = 0 if seed is None else seed
        scores = np.random.default_rng(seed).random(graph.info.num_nodes)
        ranks = -scores
    else:
        if seed is not None:
            raise SelectError("seed", f"strategy {chosen!r} has no seed", unsupported=True)
        if chosen == "degree":
            order = order or "low"
            scores = graph.degrees.astype(np.float64)
            ranks = scores
        elif chosen == "text_length":
            order = order or "low"
            scores = graph.text_lengths.astype(np.float64)
            ranks = scores
        else:
            order = order or "high"
            scores = pagerank(graph)
            # Symmetric nodes differ in the last digits: they are ties.
            ranks = np.round(scores * graph.info.num_nodes, 9)
        ranks = ranks if order == "low" else -ranks
    first = np.argsort(ranks, kind="stable")[: budget.num_nodes(graph.info.num_nodes)]
    return Selection(
        strategy=chosen,
        order=order,
        seed=seed,
        indices=first,
        scores=scores[first],
    )


def _check_strategy(strategy: str) -> Strategy:
    for known in STRATEGIES:
        if strategy == known:
            return known
    exist = f"available: {', '.join(STRATEGIES)}"
    if strategy in FUTURE_STRATEGIES:
        raise SelectError(
            "strategy", f"strategy {strategy!r} is not available yet; {exist}", unsupported=True
        )
    raise SelectError("strategy", f"unknown strategy {strategy[:40]!r}; {exist}")


def pagerank(graph: Graph) -> Floats:
    """PageRank by power iteration until the L1 change is below the tolerance; sums to 1.

    A directed graph is followed along its edges, an undirected one both ways. The mass of a node without out-edges goes
    evenly to all nodes.
    """
    from scipy.sparse import csr_array

    n = graph.info.num_nodes
    if graph.info.directed:
        source, target = graph.edges[:, 0], graph.edges[:, 1]
        weights = np.ones(len(source))
        adjacency = csr_array((weights, (source, target)), shape=(n, n))
    else:
        adjacency = csr_array(
            (np.ones(len(graph.indices)), graph.indices, graph.indptr), shape=(n, n)
        )
    out_degree = np.asarray(adjacency.sum(axis=1), dtype=np.float64).ravel()
    dangling = out_degree == 0
    share = np.divide(1.0, out_degree, where=~dangling, out=np.zeros(n))
    incoming = adjacency.T.tocsr()
    rank = np.full(n, 1 / n)
    for _ in range(_PAGERANK_MAX_STEPS):
        spread = incoming @ (rank * share) + rank[dangling].sum() / n
        following = PAGERANK_ALPHA * spread + (1 - PAGERANK_ALPHA) / n
        change = np.abs(following - rank).sum()
        rank = following
        if change < PAGERANK_TOLERANCE:
            break
    else:
        raise AssertionError("PageRank contracts by 0.85 a step, so it must have converged")
    return np.asarray(rank / rank.sum(), dtype=np.float64)
