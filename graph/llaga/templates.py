"""LLaGA's Neighborhood Detail template: a tree of fixed shape around a node, and where each place of it lies.

Chen et al. 2024, "LLaGA: Large Language and Graph Assistant", arXiv:2402.08170. Level 0 is the centre; every node of a
level has exactly `fanout` children: its neighbours where it has at most so many, else as many distinct ones drawn
uniformly; PAD fills up, and the children of PAD are PAD. The tree is read level by level.

Departures: draws come from a hash of (graph, template, centre, place, neighbour) and not from a generator, so that a
tree is the same whenever and beside whichever others it is drawn; for link prediction the other endpoint is in no
level, where the authors' code leaves it in all but the first.

The Laplacian of that tree has few distinct eigenvalues, so its eigenvectors are only known up to rotations:
they are computed once, for a projector, and kept with it.

Shapes: C centres, N places of a tree, R places of one level times C, E candidates.
"""

import hashlib
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from graph.store import Graph, Int32s, Int64s

PAD = -1
MAX_TREE_NODES = 1024
EDGES_AT_ONCE = 2**20
"""That are looked at in one piece, unless one node has more: bounds the memory beside a hub."""

Check = Callable[[int], None]
"""Told, while a plan grows, how many nodes it reads at least; raises where those are too many, or nobody waits."""

_UInt64s = npt.NDArray[np.uint64]


def tree_length(hops: int, fanout: int) -> int:
    """Number of places: 31, 111 and 421 for two hops of 5, 10 and 20."""
    return sum(fanout**hop for hop in range(hops + 1))


def neighborhood_trees(
    graph: Graph,
    centres: Int64s,
    *,
    hops: int,
    fanout: int,
    hidden: Int64s | None = None,
    check: Check = lambda _: None,
) -> Int64s:
    """Trees of several centres.

    Args:
        centres: node indices (C,).
        hidden: for each centre a node that must not be in its tree, or PAD for none (C,).
        check: asked before each piece; a tree is small, so only whether anybody waits.

    Returns:
        Node indices (C, N), `PAD` where there is no node.
    """
    if hidden is None:
        hidden = np.full(len(centres), PAD, dtype=np.int64)
    assert not np.any(centres == hidden), "a centre cannot be hidden from its own tree"
    seeds_C = _mix(
        centres.astype(np.uint64) ^ _template_seed(graph.info.content_hash, hops, fanout)
    )
    level = centres.astype(np.int64)[:, None]
    levels = [level]
    first_place = 0
    for _ in range(hops):
        width = level.shape[1]
        places = np.arange(first_place, first_place + width, dtype=np.uint64)
        seeds_R = _mix(seeds_C[:, None] + places[None]).ravel()
        nodes_R, hidden_R = level.ravel(), np.repeat(hidden, width)
        children = np.full((len(nodes_R), fanout), PAD, dtype=np.int64)
        real = np.flatnonzero(nodes_R != PAD)
        for piece in pieces(graph.indptr, nodes_R[real]):
            check(1)
            drawn = real[piece]
            children[drawn] = _draw(graph, nodes_R[drawn], seeds_R[drawn], hidden_R[drawn], fanout)
        first_place += width
        level = children.reshape(len(centres), width * fanout)
        levels.append(level)
    return np.concatenate(levels, axis=1)


def laplacian_embedding(hops: int, fanout: int) -> npt.NDArray[np.float32]:
    """Eigenvectors of I - D^-1/2 A D^-1/2 of the undirected tree, one row per place (N, N).

    Columns by ascending eigenvalue; the largest entry of each, in magnitude, is positive; of equal
    ones the first.
    """
    num_nodes = tree_length(hops, fanout)
    adjacency = np.zeros((num_nodes, num_nodes))
    children = np.arange(1, num_nodes)
    parents = (children - 1) // fanout
    adjacency[children, parents] = adjacency[parents, children] = 1
    scale = 1 / np.sqrt(adjacency.sum(axis=1))
    _, vectors = np.linalg.eigh(np.eye(num_nodes) - scale[:, None] * adjacency * scale)
    sizes = np.abs(vectors)
    largest = (sizes > sizes.max(axis=0) - 1e-6).argmax(axis=0)  # the first of equal ones
    signs = np.sign(vectors[largest, np.arange(num_nodes)])
    embedding: npt.NDArray[np.float32] = (vectors * signs).astype(np.float32)
    return embedding


def expand(indptr: Int64s, indices: Int32s, nodes: Int64s) -> tuple[Int64s, Int64s]:
    """All neighbours of several nodes: for each, its row in `nodes`, and the neighbour; rows ascending."""
    starts, degrees = indptr[nodes], indptr[nodes + 1] - indptr[nodes]
    rows = np.repeat(np.arange(len(nodes)), degrees)
    offsets = np.arange(len(rows)) - np.repeat(np.cumsum(degrees) - degrees, degrees)
    return rows, indices[starts[rows] + offsets].astype(np.int64)


def pieces(indptr: Int64s, nodes: Int64s) -> Iterator[slice]:
    """Slices of `nodes`, in order, of at most `EDGES_AT_ONCE` edges each, or of one node."""
    ends = np.cumsum(indptr[nodes + 1] - indptr[nodes])
    start = 0
    while start < len(nodes):
        before = ends[start - 1] if start else 0
        stop = int(np.searchsorted(ends, before + EDGES_AT_ONCE, side="right"))
        yield slice(start, max(start + 1, stop))
        start = max(start + 1, stop)


def _draw(graph: Graph, nodes_R: Int64s, seeds_R: _UInt64s, hidden_R: Int64s, s: int) -> Int64s:
    """Children (R, s) of every node; none of them is PAD."""
    rows_E, neighbors_E = expand(graph.indptr, graph.indices, nodes_R)
    seen = neighbors_E != hidden_R[rows_E]
    rows_E, neighbors_E = rows_E[seen], neighbors_E[seen]
    degrees_R = np.bincount(rows_E, minlength=len(nodes_R))
    # Where there is nothing to choose, equal keys keep the order of the store.
    keys_E = _mix(seeds_R[rows_E] ^ _mix(neighbors_E.astype(np.uint64)))
    keys_E[degrees_R[rows_E] <= s] = 0
    order = np.lexsort((keys_E, rows_E))
    rows_E, neighbors_E = rows_E[order], neighbors_E[order]
    ranks_E = np.arange(len(rows_E)) - (np.cumsum(degrees_R) - degrees_R)[rows_E]
    kept = ranks_E < s
    children = np.full((len(nodes_R), s), PAD, dtype=np.int64)
    children[rows_E[kept], ranks_E[kept]] = neighbors_E[kept]
    return children


def _template_seed(content_hash: str, hops: int, fanout: int) -> np.uint64:
    digest = hashlib.sha256(f"nd:{content_hash}:{hops}:{fanout}".encode()).digest()
    return np.uint64(int.from_bytes(digest[:8], "little"))


def _mix(values: _UInt64s) -> _UInt64s:
    """SplitMix64's step (Steele et al. 2014): a bijection whose output bits look independent."""
    with np.errstate(over="ignore"):
        z = values + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
