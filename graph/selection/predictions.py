"""Scores of class probabilities that a caller's own model gave: entropy and soft homophily.

Soft homophily is p_v . mean of p_u over the neighbours u, direction aside, as later work (GLANCE) uses it to find the
nodes that a graph network gets wrong. An isolated node has 0: no neighbour agrees with it.

Shapes: N nodes, C classes.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from graph.selection.request import SelectError
from graph.store import Graph, NodeId

SUM_TOLERANCE = 1e-3
"""Probabilities are often sent as four decimals, or computed in half precision."""

Floats = npt.NDArray[np.float64]


def probabilities(graph: Graph, predictions: Mapping[str, Sequence[float]]) -> Floats:
    """The posted predictions as (N, C).

    Raises:
        SelectError: naming the node whose prediction is missing, unknown or no distribution.
    """
    ids: list[NodeId] = graph.nodes.column("id").to_pylist()
    places = {str(node_id): index for index, node_id in enumerate(ids)}
    num_classes: int | None = None
    rows: list[Sequence[float] | None] = [None] * len(ids)
    for name, row in predictions.items():
        param = f"predictions.{name}"
        if name not in places:
            raise SelectError(param, f"the graph has no node {name!r:.80}")
        num_classes = len(row) if num_classes is None else num_classes
        if len(row) != num_classes or not row:
            raise SelectError(
                param,
                f"every node needs as many probabilities, at least one: {name!r:.80} has {len(row)}, "
                f"the first has {num_classes}",
            )
        rows[places[name]] = row
    missing = next((index for index, row in enumerate(rows) if row is None), None)
    if missing is not None:
        raise SelectError("predictions", f"node {ids[missing]!r:.80} has no prediction")
    p_NC = np.array(rows, dtype=np.float64)
    with np.errstate(over="ignore", invalid="ignore"):  # inf and NaN are refused below
        sums = p_NC.sum(axis=1)
    wrong = ~((np.abs(sums - 1) <= SUM_TOLERANCE) & (p_NC >= 0).all(axis=1))  # NaN is wrong too
    if wrong.any():
        index = int(wrong.argmax())
        raise SelectError(
            f"predictions.{ids[index]}",
            f"probabilities must not be negative and must sum to 1 within {SUM_TOLERANCE}, got "
            f"{[round(float(p), 6) for p in p_NC[index, :8]]} with sum {sums[index]:.6g}",
        )
    return p_NC


def entropy(p_NC: Floats) -> Floats:
    """Of every row, in nats; 0 ln 0 is 0."""
    logs = np.log(p_NC, where=p_NC > 0, out=np.zeros_like(p_NC))
    return np.asarray(-(p_NC * logs).sum(axis=1) + 0.0)  # not -0


def soft_homophily(graph: Graph, p_NC: Floats) -> Floats:
    from scipy.sparse import csr_array

    n = graph.info.num_nodes
    adjacency = csr_array((np.ones(len(graph.indices)), graph.indices, graph.indptr), shape=(n, n))
    degrees = np.maximum(graph.degrees, 1)[:, None]
    return np.asarray((p_NC * (adjacency @ p_NC) / degrees).sum(axis=1), dtype=np.float64)
