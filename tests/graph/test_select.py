"""Selection: values worked by hand, PageRank against a dense solution, ties by node index."""

from pathlib import Path

import numpy as np
import pytest

from graph.select import Budget, SelectError, pagerank, select_nodes
from graph.store import Graph, GraphStore
from tests.graph.graphs import OWNER, columns, create, stored

STAR = [("hub", "a"), ("hub", "b"), ("hub", "c"), ("a", "b")]
STAR_IDS = ["a", "hub", "b", "c", "alone"]


def dense_pagerank(graph: Graph, alpha: float = 0.85) -> np.ndarray:
    """The stationary vector by solving (I - alpha P^T) x = (1 - alpha) / n, P dense with uniform dangling rows."""
    n = graph.info.num_nodes
    adjacency = np.zeros((n, n))
    for source, target in graph.edges:
        adjacency[source, target] = 1
        if not graph.info.directed:
            adjacency[target, source] = 1
    out = adjacency.sum(axis=1, keepdims=True)
    transition = np.where(out > 0, adjacency / np.maximum(out, 1), 1 / n)
    return np.linalg.solve(np.eye(n) - alpha * transition.T, np.full(n, (1 - alpha) / n))


def test_pagerank_of_a_directed_cycle_with_a_dangling_node_by_hand(tmp_path: Path) -> None:
    # a -> b -> c, c dangling. With d = 0.85 and c's mass m spread evenly:
    # a = (1 - d)/3 + d c/3, b = a + d a, c = a + d b  =>  a : b : c = 1 : 1.85 : 2.5725
    graph = stored(tmp_path, ["a", "b", "c"], [("a", "b"), ("b", "c")], directed=True)
    expected = np.array([1, 1.85, 2.5725]) / 5.4225
    assert np.abs(pagerank(graph) - expected).max() < 1e-8


def test_pagerank_of_a_star_by_hand(tmp_path: Path) -> None:
    # hub h, three leaves l: h = 0.15/4 + 0.85 * 3 l, l = 0.15/4 + 0.85 h/3, h + 3 l = 1
    graph = stored(tmp_path, ["h", "x", "y", "z"], [("h", "x"), ("h", "y"), ("h", "z")])
    hub = (0.0375 + 0.85) / 1.85
    assert np.abs(pagerank(graph) - np.array([hub, *[(1 - hub) / 3] * 3])).max() < 1e-8


@pytest.mark.parametrize("directed", [False, True])
@pytest.mark.parametrize("size", [1, 2, 23])
def test_pagerank_equals_the_dense_solution(tmp_path: Path, directed: bool, size: int) -> None:
    rng = np.random.default_rng(size)
    edges = [(int(s), int(t)) for s, t in rng.integers(0, size, (2 * size, 2))]
    graph = stored(tmp_path, list(range(size)), edges, directed=directed)
    found = pagerank(graph)
    assert np.abs(found - dense_pagerank(graph)).max() < 1e-7
    assert found.sum() == pytest.approx(1)


def test_degree_low_first_with_ties_by_index(tmp_path: Path) -> None:
    graph = stored(tmp_path, STAR_IDS, STAR)
    selection = select_nodes(graph, "degree", Budget(nodes=4))
    assert graph.ids(selection.indices) == ["alone", "c", "a", "b"]
    assert selection.scores.tolist() == [0, 1, 2, 2]
    assert selection.order == "low"


def test_degree_high_first(tmp_path: Path) -> None:
    graph = stored(tmp_path, STAR_IDS, STAR)
    selection = select_nodes(graph, "degree", Budget(nodes=3), order="high")
    assert graph.ids(selection.indices) == ["hub", "a", "b"]


def test_pagerank_order_and_symmetric_ties(tmp_path: Path) -> None:
    graph = stored(tmp_path, STAR_IDS, STAR)
    high = select_nodes(graph, "pagerank", Budget(fraction=1))
    assert graph.ids(high.indices) == ["hub", "a", "b", "c", "alone"]
    low = select_nodes(graph, "pagerank", Budget(nodes=1), order="low")
    assert graph.ids(low.indices) == ["alone"]


def test_ring_is_all_ties(tmp_path: Path) -> None:
    size = 101
    graph = stored(tmp_path, list(range(size)), [(i, (i + 1) % size) for i in range(size)])
    for strategy in ("degree", "pagerank"):
        selection = select_nodes(graph, strategy, Budget(nodes=10))
        assert selection.indices.tolist() == list(range(10))


def test_text_length_counts_characters_of_any_script(tmp_path: Path) -> None:
    store = GraphStore(tmp_path)
    texts = ["four", "", "日本語", "a longer text", "🙂🙂🙂"]
    create(store, columns(list("abcde"), [], texts=texts))
    graph = store.get("graph-1", OWNER)
    short = select_nodes(graph, "text_length", Budget(nodes=4))
    assert graph.ids(short.indices) == ["b", "c", "e", "a"]
    assert short.scores.tolist() == [0, 3, 3, 4]
    assert short.order == "low"
    long = select_nodes(graph, "text_length", Budget(nodes=1), order="high")
    assert graph.ids(long.indices) == ["d"]


def test_random_is_seeded(tmp_path: Path) -> None:
    graph = stored(tmp_path, list(range(50)), [])
    draws = [
        select_nodes(graph, "random", Budget(nodes=10), seed=s).indices.tolist() for s in (0, 0, 1)
    ]
    assert draws[0] == draws[1] != draws[2]
    assert len(set(draws[0])) == 10
    assert select_nodes(graph, "random", Budget(nodes=10)).seed == 0


@pytest.mark.parametrize(
    ("budget", "total", "expected"),
    [
        (Budget(fraction=0.07), 100, 7),  # 0.07 * 100 > 7 in binary
        (Budget(fraction=0.1), 30, 3),
        (Budget(fraction=0.1), 31, 4),
        (Budget(fraction=1), 5, 5),
        (Budget(fraction=1e-6), 5, 1),
        (Budget(nodes=9), 5, 5),
    ],
)
def test_budget(budget: Budget, total: int, expected: int) -> None:
    assert budget.num_nodes(total) == expected


@pytest.mark.parametrize(
    ("nodes", "fraction", "param"),
    [(None, None, "budget"), (1, 0.5, "budget"), (0, None, "budget.nodes"), (None, 0.0, "budget.fraction"),
     (None, 1.1, "budget.fraction"), (None, float("nan"), "budget.fraction")],
)  # fmt: skip
def test_bad_budget(nodes: int | None, fraction: float | None, param: str) -> None:
    with pytest.raises(SelectError) as caught:
        Budget(nodes=nodes, fraction=fraction)
    assert caught.value.param == param


def test_options_a_strategy_does_not_have(tmp_path: Path) -> None:
    graph = stored(tmp_path, ["a"], [])
    for strategy, options, param in [
        ("random", {"order": "low"}, "order"),
        ("degree", {"seed": 1}, "seed"),
        ("pagerank", {"seed": 1}, "seed"),
        ("text_length", {"seed": 1}, "seed"),
    ]:
        with pytest.raises(SelectError) as caught:
            select_nodes(graph, strategy, Budget(nodes=1), **options)  # type: ignore[arg-type]
        assert (caught.value.param, caught.value.unsupported) == (param, True)


@pytest.mark.parametrize(("strategy", "unsupported"), [("entropy", True), ("guess", False)])
def test_other_strategies_are_refused_by_name(
    tmp_path: Path, strategy: str, unsupported: bool
) -> None:
    graph = stored(tmp_path, ["a"], [])
    with pytest.raises(SelectError, match="random, degree, pagerank, text_length") as caught:
        select_nodes(graph, strategy, Budget(nodes=1))
    assert (caught.value.param, caught.value.unsupported) == ("strategy", unsupported)
