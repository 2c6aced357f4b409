"""Entropy and soft homophily: by hand, against a loop, and every prediction that is none."""

import math
from pathlib import Path

import numpy as np
import pytest

from graph.selection.predictions import entropy, probabilities, soft_homophily
from graph.selection.request import SelectError
from graph.store import Graph
from tests.graph.graphs import stored
from tests.graph.selection.test_select import pick


def naive_homophily(graph: Graph, p_NC: np.ndarray) -> list[float]:
    """The definition, node by node."""
    scores = []
    for node in range(graph.info.num_nodes):
        neighbors = graph.neighbors(node).tolist()
        agreements = [
            sum(float(a) * float(b) for a, b in zip(p_NC[node], p_NC[other], strict=True))
            for other in neighbors
        ]
        scores.append(sum(agreements) / len(agreements) if agreements else 0.0)
    return scores


def test_entropy_by_hand() -> None:
    rows = np.array([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [1 / 3, 1 / 3, 1 / 3], [0.7, 0.2, 0.1]])
    by_hand = [0.0, math.log(2), math.log(3), 0.801818552543]
    assert entropy(rows).tolist() == pytest.approx(by_hand)
    assert str(entropy(rows)[0]) == "0.0"  # not -0.0


def test_soft_homophily_by_hand(tmp_path: Path) -> None:
    # a - b, a - c, d alone. a: (1,0).((0.5,0.5)+(0,1))/2 = 0.25; b: 0.5; c: 0
    graph = stored(tmp_path, list("abcd"), [("a", "b"), ("a", "c")])
    p_NC = np.array([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0], [1.0, 0.0]])
    assert soft_homophily(graph, p_NC).tolist() == [0.25, 0.5, 0.0, 0.0]


@pytest.mark.parametrize("directed", [False, True])
def test_soft_homophily_equals_the_loop(tmp_path: Path, directed: bool) -> None:
    rng = np.random.default_rng(4)
    edges = [(int(s), int(t)) for s, t in rng.integers(0, 31, (60, 2))]
    graph = stored(tmp_path, list(range(31)), edges, directed=directed)
    p_NC = rng.dirichlet(np.ones(5), 31)
    assert soft_homophily(graph, p_NC).tolist() == pytest.approx(naive_homophily(graph, p_NC))


def test_last_digits_break_no_tie(tmp_path: Path) -> None:
    """The same probabilities in another order sum to an entropy that differs in the last digit."""
    rng = np.random.default_rng(0)
    graph = stored(tmp_path, list(range(40)), [])
    base = rng.dirichlet(np.ones(9))
    predictions = {str(i): rng.permutation(base).tolist() for i in range(40)}
    p_NC = np.array(list(predictions.values()))
    assert len(set(entropy(p_NC).tolist())) > 1
    found = pick(graph, "entropy", {"nodes": 40}, predictions=predictions)
    assert found.indices.tolist() == list(range(40))


def test_uncertain_and_heterophilous_nodes_come_first(tmp_path: Path) -> None:
    graph = stored(tmp_path, list("abc"), [("a", "b"), ("b", "c")])
    predictions = {"c": [0.5, 0.5], "a": [0.9, 0.1], "b": [0.99, 0.01]}
    uncertain = pick(graph, "entropy", {"nodes": 2}, predictions=predictions)
    assert graph.ids(uncertain.indices) == ["c", "a"]
    assert (uncertain.order, uncertain.stopped_by) == ("high", "nodes")
    certain = pick(graph, "entropy", {"nodes": 1}, predictions=predictions, order="low")
    assert graph.ids(certain.indices) == ["b"]
    # a: 0.9*0.99 + 0.1*0.01 = 0.892; b: 0.99*0.7 + 0.01*0.3 = 0.696; c: 0.5
    lonely = pick(graph, "soft_homophily", {"nodes": 3}, predictions=predictions)
    assert graph.ids(lonely.indices) == ["c", "b", "a"]
    assert lonely.scores.tolist() == pytest.approx([0.5, 0.696, 0.892])
    assert lonely.order == "low"


def test_integer_ids_are_written_as_digits(tmp_path: Path) -> None:
    graph = stored(tmp_path, [-3, 2**62], [])
    rows = probabilities(graph, {str(2**62): [0.25, 0.75], "-3": [1.0, 0.0]})
    assert rows.tolist() == [[1.0, 0.0], [0.25, 0.75]]
    with pytest.raises(SelectError) as caught:
        probabilities(graph, {"-3": [1.0], "+4611686018427387904": [1.0]})
    assert caught.value.param == "predictions.+4611686018427387904"


def test_sums_may_be_rounded(tmp_path: Path) -> None:
    graph = stored(tmp_path, ["a"], [])
    assert probabilities(graph, {"a": [0.3333, 0.3333, 0.3333]}).shape == (1, 3)


@pytest.mark.parametrize(
    ("row", "param", "words"),
    [
        ({"b": [0.5, 0.4]}, "predictions.b", "sum 0.9"),
        ({"b": [0.5, 0.5, 0.0]}, "predictions.b", "'b' has 3, the first has 2"),
        ({"b": []}, "predictions.b", "has 0"),
        ({"b": [1.5, -0.5]}, "predictions.b", "negative"),
        ({"b": [float("nan"), 1.0]}, "predictions.b", "nan"),
        ({"b": [float("inf"), 0.0]}, "predictions.b", "inf"),
        ({"b": [float("inf"), float("-inf")]}, "predictions.b", "nan"),
        ({"b": [1e308, 1e308]}, "predictions.b", "inf"),
        ({"b": [0.5, 0.5], "q": [0.5, 0.5]}, "predictions.q", "no node 'q'"),
        ({}, "predictions", "'b' has no prediction"),
    ],
)
def test_what_is_no_prediction(
    tmp_path: Path, row: dict[str, list[float]], param: str, words: str
) -> None:
    graph = stored(tmp_path, ["a", "b"], [])
    with pytest.raises(SelectError) as caught:
        probabilities(graph, {"a": [0.5, 0.5], **row})
    assert caught.value.param == param
    assert words in caught.value.message
