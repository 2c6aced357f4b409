"""Scores that need nothing but edges: PageRank (Page et al. 1999)."""

import numpy as np
import numpy.typing as npt

from graph.store import Graph

PAGERANK_ALPHA = 0.85
PAGERANK_TOLERANCE = 1e-8
_PAGERANK_MAX_STEPS = 200  # 0.85**114 < 1e-8, from any start


def pagerank(graph: Graph) -> npt.NDArray[np.float64]:
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
