"""LLaGA's Hop-Field Overview: a node's surroundings as one vector per hop, h^0 = features, h^t = P h^(t-1).

Chen et al. 2024, arXiv:2402.08170. The paper's P is the mean over neighbours; the authors' code multiplies by
D^-1/2 A D^-1/2 for classification, and adds self-loops for link prediction. These are three operators with three names
here; a projector is trained with one and works with no other.

Rows are computed from the centre outwards: h^t(v) = (e_v P^t) features, where e_v P^t has an entry for each node within
t hops. So a few nodes cost their surroundings and not the graph, and a hidden node is left out exactly: the operator is
that of the graph without it.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np
import numpy.typing as npt

from graph.llaga.templates import PAD, Check, expand, pieces
from graph.store import Graph, Int64s

HopOperator = Literal["mean", "sym", "sym_selfloop"]
OPERATORS: tuple[HopOperator, ...] = ("mean", "sym", "sym_selfloop")

Float64s = npt.NDArray[np.float64]


def hop_weights(
    graph: Graph,
    centre: int,
    *,
    hops: int,
    operator: HopOperator,
    hidden: int = PAD,
    check: Check = lambda _: None,
) -> tuple[Int64s, Float64s]:
    """How much each node adds to each hop of a centre.

    Args:
        hidden: a node that is taken out of the graph with its edges, or PAD.
        check: told how many nodes are in reach, before they are looked at where a degree tells.

    Returns:
        nodes within reach, ascending, and weights (hops + 1, nodes).
    """
    assert centre != hidden
    lost = graph.neighbors(hidden).astype(np.int64) if hidden != PAD else np.empty(0, np.int64)

    def degrees(nodes: Int64s) -> Float64s:
        found = (graph.indptr[nodes + 1] - graph.indptr[nodes]).astype(np.float64)
        return found - np.isin(nodes, lost)

    nodes: Int64s = np.array([centre], dtype=np.int64)
    weights: Float64s = np.ones(1)
    reached = [(nodes, weights)]
    for _ in range(hops):
        own = degrees(nodes)
        check(int(own.max(initial=1)))
        found, sums = np.empty(0, dtype=np.int64), np.empty(0)
        for piece in pieces(graph.indptr, nodes):
            rows, neighbors = expand(graph.indptr, graph.indices, nodes[piece])
            seen = neighbors != hidden
            rows, neighbors = rows[seen] + piece.start, neighbors[seen]
            if operator == "sym_selfloop" and piece.stop == len(nodes):
                rows = np.concatenate([rows, np.arange(len(nodes))])
                neighbors = np.concatenate([neighbors, nodes])
            entries = _entries(operator, own[rows], neighbors, degrees)
            found, sums = _add(found, sums, neighbors, weights[rows] * entries)
            check(len(found))
        nodes, weights = found, sums
        reached.append((nodes, weights))
    everyone = np.unique(np.concatenate([found for found, _ in reached]))
    table = np.zeros((hops + 1, len(everyone)))
    for hop, (found, weights) in enumerate(reached):
        table[hop, np.searchsorted(everyone, found)] = weights
    return everyone, table


def _add(
    nodes: Int64s, weights: Float64s, others: Int64s, amounts: Float64s
) -> tuple[Int64s, Float64s]:
    """Weights of `nodes`, ascending, with amounts added one after the other at `others`, which may be new."""
    distinct, places = np.unique(others, return_inverse=True)
    merged = np.union1d(nodes, distinct) if len(nodes) else distinct
    sums = np.zeros(len(merged))
    sums[np.searchsorted(merged, nodes)] = weights
    np.add.at(sums, np.searchsorted(merged, distinct)[places], amounts)
    return merged, sums


def _entries(
    operator: HopOperator,
    own_degrees: Float64s,
    neighbors: Int64s,
    degrees: Callable[[Int64s], Float64s],
) -> Float64s:
    """Entries of P at (node, neighbour)."""
    if operator == "mean":
        return 1 / own_degrees
    loop = 1.0 if operator == "sym_selfloop" else 0.0
    return 1 / np.sqrt((own_degrees + loop) * (degrees(neighbors) + loop))
