"""Communities of a graph by label propagation (Raghavan et al. 2007, arXiv:0709.2938).

Every node starts as a community of its own and joins the one that most of its neighbours are in. In the paper nodes
move one after the other in random order; here about half of those that want to move do so at once, drawn anew each
step, which settles too and is a few array operations a step. Ties: a node stays where it is if that is among the best,
else a seeded order of communities decides. An isolated node stays alone.
"""

import numpy as np

from graph.store import Graph, Int64s

MAX_STEPS = 100


def find_communities(graph: Graph, seed: int) -> Int64s:
    """Community of every node, named by its first node. Stops when no node wants to move, or after `MAX_STEPS`."""
    rng = np.random.default_rng(seed)
    n = graph.info.num_nodes
    own_N = np.arange(n, dtype=np.int64)
    best_N = own_N.copy()
    preference_N = rng.permutation(n)  # of communities, the higher wins a tie
    sources_E = np.repeat(np.arange(n, dtype=np.int64), graph.degrees)
    targets_E = np.asarray(graph.indices, dtype=np.int64)
    stale_N = np.ones(n, dtype=bool)  # whose best community may have changed
    for _ in range(MAX_STEPS):
        edges = np.flatnonzero(stale_N[sources_E])
        find_best(best_N, sources_E[edges], targets_E[edges], own_N, preference_N)
        wants = np.flatnonzero(best_N != own_N)
        if len(wants) == 0:
            break
        moves = wants[rng.random(len(wants)) < 0.5]
        own_N[moves] = best_N[moves]
        moved_N = np.zeros(n, dtype=bool)
        moved_N[moves] = True
        stale_N = moved_N.copy()
        stale_N[targets_E[moved_N[sources_E]]] = True
    _, first, inverse = np.unique(own_N, return_index=True, return_inverse=True)
    return np.asarray(first[inverse], dtype=np.int64)


def find_best(
    best_N: Int64s, sources_E: Int64s, targets_E: Int64s, own_N: Int64s, preference_N: Int64s
) -> None:
    """Of every source the community that most of its targets are in; into `best_N`, others are left as they are."""
    n = len(own_N)
    if len(sources_E) == 0:
        return
    # Not `np.unique`, which hashes integers and takes far longer.
    pairs = np.sort(sources_E * n + own_N[targets_E])
    firsts = np.flatnonzero(np.r_[True, pairs[1:] != pairs[:-1]])
    counts = np.diff(np.r_[firsts, len(pairs)])
    node, community = np.divmod(pairs[firsts], n)
    rank = counts * (2 * n) + (community == own_N[node]) * n + preference_N[community]
    starts = np.flatnonzero(np.r_[True, node[1:] != node[:-1]])
    highest = np.repeat(np.maximum.reduceat(rank, starts), np.diff(np.r_[starts, len(node)]))
    winners = rank == highest  # preferences are distinct, so one a node
    best_N[node[winners]] = community[winners]
