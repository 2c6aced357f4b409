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
    preference_N = rng.permutation(n)  # of communities, the higher wins a tie
    sources_E = np.repeat(np.arange(n, dtype=np.int64), graph.degrees)
    for _ in range(MAX_STEPS):
        best_N = _best(sources_E, own_N[graph.indices], own_N, preference_N)
        wants_N = best_N != own_N
        if not wants_N.any():
            break
        moves_N = wants_N & (rng.random(n) < 0.5)
        own_N = np.where(moves_N, best_N, own_N)
    _, first, inverse = np.unique(own_N, return_index=True, return_inverse=True)
    return np.asarray(first[inverse], dtype=np.int64)


def _best(sources_E: Int64s, communities_E: Int64s, own_N: Int64s, preference_N: Int64s) -> Int64s:
    """The community that most neighbours of every node are in; its own for an isolated one."""
    n = len(own_N)
    if len(sources_E) == 0:
        return own_N
    # Not `np.unique`, which hashes integers and takes far longer.
    pairs = np.sort(sources_E * n + communities_E)
    firsts = np.flatnonzero(np.r_[True, pairs[1:] != pairs[:-1]])
    counts = np.diff(np.r_[firsts, len(pairs)])
    node, community = pairs[firsts] // n, pairs[firsts] % n
    rank = counts * (2 * n) + (community == own_N[node]) * n + preference_N[community]
    starts = np.flatnonzero(np.r_[True, node[1:] != node[:-1]])
    highest = np.repeat(np.maximum.reduceat(rank, starts), np.diff(np.r_[starts, len(node)]))
    winners = rank == highest  # preferences are distinct, so one a node
    best_N = own_N.copy()
    best_N[node[winners]] = community[winners]
    return best_N
