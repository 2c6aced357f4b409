"""Trees against the rule by hand and a naive walk; the Laplacian against its definition; the partner is in no tree."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from graph.llaga.templates import PAD, laplacian_embedding, neighborhood_trees, tree_length
from graph.store import Graph
from tests.graph.graphs import stored


def random_graph(folder: Path, num_nodes: int = 60, num_edges: int = 200) -> Graph:
    generator = np.random.default_rng(0)
    pairs = generator.integers(0, num_nodes - 1, (num_edges, 2)).tolist()  # the last is isolated
    return stored(folder, list(range(num_nodes)), [(a, b) for a, b in pairs])


def everyone(graph: Graph) -> np.ndarray:
    return np.arange(graph.info.num_nodes, dtype=np.int64)


@pytest.mark.parametrize(("fanout", "length"), [(5, 31), (10, 111), (20, 421)])
def test_lengths(fanout: int, length: int) -> None:
    assert tree_length(2, fanout) == length


def test_a_tree_by_hand(tmp_path: Path) -> None:
    graph = stored(tmp_path, ["a", "b", "c", "lone"], [("a", "b"), ("b", "c")])
    trees = neighborhood_trees(graph, np.array([0, 3]), hops=2, fanout=2)
    # a: its neighbour b and PAD; b's children are a and c
    assert trees.tolist() == [[0, 1, PAD, 0, 2, PAD, PAD], [3, *[PAD] * 6]]


@pytest.mark.parametrize("fanout", [1, 3, 10])
def test_children_are_distinct_neighbours_or_pad(tmp_path: Path, fanout: int) -> None:
    graph = random_graph(tmp_path)
    for tree in neighborhood_trees(graph, everyone(graph), hops=3, fanout=fanout):
        for place, node in enumerate(tree):
            children = tree[place * fanout + 1 : (place + 1) * fanout + 1].tolist()
            if not children:
                continue
            neighbors = [] if node == PAD else graph.neighbors(node).tolist()
            if len(neighbors) <= fanout:
                assert children == neighbors + [PAD] * (fanout - len(neighbors))
            else:
                assert len(set(children)) == fanout
                assert set(children) <= set(neighbors)


def test_a_tree_does_not_depend_on_its_company(tmp_path: Path) -> None:
    graph = random_graph(tmp_path)
    together = neighborhood_trees(graph, everyone(graph), hops=2, fanout=2)
    for node in everyone(graph):
        alone = neighborhood_trees(graph, np.array([node]), hops=2, fanout=2)
        assert np.array_equal(alone[0], together[node])


def test_draws_are_uniform(tmp_path: Path) -> None:
    """Each of 8 neighbours is among 2 drawn in a quarter of many draws: within 5 standard deviations."""
    hubs = list(range(8, 2008))
    graph = stored(tmp_path, list(range(2008)), [(hub, leaf) for hub in hubs for leaf in range(8)])
    trees = neighborhood_trees(graph, np.array(hubs), hops=1, fanout=2)
    counts = Counter(trees[:, 1:].ravel().tolist())
    deviation = (2000 * 0.25 * 0.75) ** 0.5
    assert all(abs(counts[leaf] - 500) < 5 * deviation for leaf in range(8))


def test_the_hidden_node_is_at_no_hop(tmp_path: Path) -> None:
    graph = random_graph(tmp_path)
    plain = neighborhood_trees(graph, graph.edges[:, 0].astype(np.int64), hops=3, fanout=5)
    partners = graph.edges[:, 1].astype(np.int64)
    assert (plain == partners[:, None]).any()  # it leaks where nothing hides it
    trees = neighborhood_trees(
        graph, graph.edges[:, 0].astype(np.int64), hops=3, fanout=5, hidden=partners
    )
    assert not (trees == partners[:, None]).any()


@pytest.mark.parametrize(("hops", "fanout"), [(1, 2), (2, 3), (2, 10), (3, 1)])
def test_laplacian_embedding(hops: int, fanout: int) -> None:
    num_nodes = tree_length(hops, fanout)
    laplacian = np.eye(num_nodes)
    links = [(child, (child - 1) // fanout) for child in range(1, num_nodes)]
    degrees = Counter(end for link in links for end in link)
    for child, parent in links:
        entry = -1 / np.sqrt(degrees[child] * degrees[parent])
        laplacian[child, parent] = laplacian[parent, child] = entry
    vectors = laplacian_embedding(hops, fanout).astype(np.float64)
    values = np.diag(vectors.T @ laplacian @ vectors)
    assert np.allclose(laplacian @ vectors, vectors * values, atol=1e-6)
    assert np.allclose(vectors.T @ vectors, np.eye(num_nodes), atol=1e-6)
    assert np.all(np.diff(values) > -1e-6)
    sizes = np.abs(vectors)
    largest = (sizes > sizes.max(axis=0) - 1e-6).argmax(axis=0)
    assert np.all(vectors[largest, np.arange(num_nodes)] > 0)
