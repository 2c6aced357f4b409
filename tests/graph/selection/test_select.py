"""Selection: values worked by hand, PageRank against a dense solution, ties by node index."""

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from graph.selection.request import SelectError, SelectRequest, Strategy
from graph.selection.select import Selection, select_nodes
from graph.selection.structure import pagerank
from graph.store import Graph, GraphStore, NodeId
from tests.graph.graphs import OWNER, columns, create, stored

STAR = [("hub", "a"), ("hub", "b"), ("hub", "c"), ("a", "b")]
STAR_IDS = ["a", "hub", "b", "c", "alone"]


def pick(graph: Graph, strategy: str, budget: dict[str, float], **options: Any) -> Selection:
    """A selection as a client asks for it."""
    body = {"strategy": strategy, "budget": budget, **options}
    return select_nodes(graph, SelectRequest.model_validate(body))


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
    selection = pick(graph, "degree", {"nodes": 4})
    assert graph.ids(selection.indices) == ["alone", "c", "a", "b"]
    assert selection.scores.tolist() == [0, 1, 2, 2]
    assert selection.order == "low"


def test_degree_high_first(tmp_path: Path) -> None:
    graph = stored(tmp_path, STAR_IDS, STAR)
    selection = pick(graph, "degree", {"nodes": 3}, order="high")
    assert graph.ids(selection.indices) == ["hub", "a", "b"]


def test_pagerank_order_and_symmetric_ties(tmp_path: Path) -> None:
    graph = stored(tmp_path, STAR_IDS, STAR)
    high = pick(graph, "pagerank", {"fraction": 1})
    assert graph.ids(high.indices) == ["hub", "a", "b", "c", "alone"]
    low = pick(graph, "pagerank", {"nodes": 1}, order="low")
    assert graph.ids(low.indices) == ["alone"]


def test_ring_is_all_ties(tmp_path: Path) -> None:
    size = 101
    graph = stored(tmp_path, list(range(size)), [(i, (i + 1) % size) for i in range(size)])
    for strategy in ("degree", "pagerank"):
        selection = pick(graph, strategy, {"nodes": 10})
        assert selection.indices.tolist() == list(range(10))


def test_text_length_counts_characters_of_any_script(tmp_path: Path) -> None:
    store = GraphStore(tmp_path)
    texts = ["four", "", "日本語", "a longer text", "🙂🙂🙂"]
    create(store, columns(list("abcde"), [], texts=texts))
    graph = store.get("graph-1", OWNER)
    short = pick(graph, "text_length", {"nodes": 4})
    assert graph.ids(short.indices) == ["b", "c", "e", "a"]
    assert short.scores.tolist() == [0, 3, 3, 4]
    assert short.order == "low"
    long = pick(graph, "text_length", {"nodes": 1}, order="high")
    assert graph.ids(long.indices) == ["d"]


def test_random_is_seeded(tmp_path: Path) -> None:
    graph = stored(tmp_path, list(range(50)), [])
    draws = [pick(graph, "random", {"nodes": 10}, seed=s).indices.tolist() for s in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert len(set(draws[0])) == 10
    assert pick(graph, "random", {"nodes": 10}).seed == 0


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"strategy": "random", "order": "low"}, "order"),
        ({"strategy": "degree", "seed": 1}, "seed"),
        ({"strategy": "pagerank", "seed": 1}, "seed"),
        ({"strategy": "text_length", "seed": 1, "quotas": {"per": "class"}}, "seed"),
        ({"strategy": "degree", "num_clusters": 2}, "num_clusters"),
        ({"strategy": "random", "embedding_model": "m"}, "embedding_model"),
        ({"strategy": "pagerank", "predictions": {"a": [1.0]}}, "predictions"),
        ({"strategy": "degree", "mix": [{"strategy": "random", "weight": 1}]}, "mix"),
        ({"strategy": "mix", "mix": [{"strategy": "degree", "weight": 1}], "order": "low"}, "order"),
        ({"strategy": "mix", "mix": [{"strategy": "degree", "weight": 1}], "seed": 1}, "seed"),
        ({"strategy": "mix", "mix": [{"strategy": "random", "weight": 1, "order": "low"}]}, "mix[0].order"),
    ],
)  # fmt: skip
def test_options_that_nothing_would_read(
    tmp_path: Path, options: dict[str, Any], param: str
) -> None:
    graph = stored(tmp_path, ["a"], [])
    with pytest.raises(SelectError) as caught:
        pick(graph, budget={"nodes": 1}, **options)
    assert (caught.value.param, caught.value.unsupported) == (param, True)


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"strategy": "mix"}, "mix"),
        ({"strategy": "entropy"}, "predictions"),
        ({"strategy": "mix", "mix": [{"strategy": "soft_homophily", "weight": 1}]}, "predictions"),
        ({"strategy": "degree", "budget": {"seconds": 1.0}}, "rates.tokens_per_second"),
        ({"strategy": "degree", "budget": {"cost": 1.0}}, "rates.cost_per_million_tokens"),
        ({"strategy": "degree", "quotas": {"per": "class"}}, "quotas.per"),
    ],
)
def test_options_that_are_missing(tmp_path: Path, options: dict[str, Any], param: str) -> None:
    graph = stored(tmp_path, ["a"], [])
    with pytest.raises(SelectError) as caught:
        pick(graph, **{"budget": {"nodes": 1}, **options})
    assert (caught.value.param, caught.value.unsupported) == (param, False)


# Mixes


def test_a_mix_is_the_weighted_mean_of_ranks_by_hand(tmp_path: Path) -> None:
    # degrees a 2, hub 3, b 2, c 1, alone 0; high first: ranks 1 hub, 5/8 a and b (they share 1/2 and 3/4), 1/4 c, 0
    # texts of 4, 3, 2, 1 and 0 characters; low first: ranks 0, 1/4, 1/2, 3/4, 1
    store = GraphStore(tmp_path)
    create(store, columns(STAR_IDS, STAR, texts=["aaaa", "aaa", "aa", "a", ""]))
    graph = store.get("graph-1", OWNER)
    mix = [
        {"strategy": "degree", "weight": 3.0, "order": "high"},
        {"strategy": "text_length", "weight": 1.0},
    ]
    selection = pick(graph, "mix", {"fraction": 1}, mix=mix)
    expected = {
        "a": 3 / 4 * 5 / 8,
        "hub": 3 / 4 + 1 / 16,
        "b": 3 / 4 * 5 / 8 + 1 / 8,
        "c": 3 / 16 + 3 / 16,
        "alone": 1 / 4,
    }
    assert graph.ids(selection.indices) == sorted(expected, key=lambda i: -expected[i])
    assert selection.scores.tolist() == pytest.approx(sorted(expected.values(), reverse=True))
    assert (selection.order, selection.seed) == (None, None)


def test_a_mix_of_one_is_that_strategy(tmp_path: Path) -> None:
    graph = stored(tmp_path, STAR_IDS, STAR)
    for order in ("low", "high"):
        alone = pick(graph, "pagerank", {"fraction": 1}, order=order)
        mix = [{"strategy": "pagerank", "weight": 0.1, "order": order}]
        assert (
            pick(graph, "mix", {"fraction": 1}, mix=mix).indices.tolist() == alone.indices.tolist()
        )


def test_scale_of_weights_does_not_matter_and_seed_does(tmp_path: Path) -> None:
    graph = stored(tmp_path, STAR_IDS, STAR)

    def ids(scale: float, seed: int) -> list[NodeId]:
        mix = [
            {"strategy": "degree", "weight": scale},
            {"strategy": "random", "weight": 3 * scale},
        ]
        selection = pick(graph, "mix", {"fraction": 1}, mix=mix, seed=seed)
        assert selection.seed == seed
        return graph.ids(selection.indices)

    assert ids(1.0, 0) == ids(100.0, 0)
    assert len({tuple(ids(1.0, seed)) for seed in range(8)}) > 1


def test_a_graph_of_one_node(tmp_path: Path) -> None:
    store = GraphStore(tmp_path)
    create(
        store,
        columns(["a"], [], labels=["x"], splits=["train"], features=[[1.0, 2.0]]),
    )
    graph = store.get("graph-1", OWNER)
    mix = [{"strategy": name, "weight": 1.0} for name in get_args(Strategy) if name != "mix"]
    options = {"predictions": {"a": [0.5, 0.5]}, "quotas": {"per": "class"}}
    selection = pick(graph, "mix", {"nodes": 1}, mix=mix, **options)
    assert (selection.indices.tolist(), selection.scores.tolist()) == ([0], [1.0])
    assert selection.stopped_by is None


# Isolated nodes and empty texts have a score in every strategy


def test_an_isolated_node_has_a_score_everywhere(tmp_path: Path) -> None:
    store = GraphStore(tmp_path)
    features = [[0.0], [0.1], [5.0]]
    create(
        store, columns(["a", "b", "alone"], [("a", "b")], texts=["x", "y", ""], features=features)
    )
    graph = store.get("graph-1", OWNER)
    predictions = {"a": [1.0, 0.0], "b": [0.5, 0.5], "alone": [0.25, 0.75]}
    expected = {
        "degree": 0.0,
        "text_length": 0.0,
        "soft_homophily": 0.0,
        "clustering_distance": 0.0,
        "entropy": -0.25 * np.log(0.25) - 0.75 * np.log(0.75),
        # its own mass goes to all: x = 0.05 + 0.85 x / 3
        "pagerank": 0.05 / (1 - 0.85 / 3),
    }
    for strategy, score in expected.items():
        options: dict[str, Any] = {}
        if strategy in ("entropy", "soft_homophily"):
            options["predictions"] = predictions
        if strategy == "clustering_distance":
            options["num_clusters"] = 2
        found = pick(graph, strategy, {"fraction": 1}, **options)
        place = found.indices.tolist().index(2)
        assert found.scores[place] == pytest.approx(score), strategy
        assert found.stopped_by is None
