"""Hop features against dense powers of the operator's matrix; a hidden node against the graph that never had it."""

from pathlib import Path

import numpy as np
import pytest

from graph.llaga.filling import Template, plan_filling
from graph.llaga.hops import OPERATORS, HopOperator, hop_weights
from graph.llaga.templates import PAD
from graph.store import Graph
from tests.graph.graphs import stored
from tests.graph.llaga.test_templates import everyone, random_graph


def dense_operator(graph: Graph, operator: HopOperator, hidden: int = PAD) -> np.ndarray:
    """P written with loops."""
    size = graph.info.num_nodes
    adjacency = np.zeros((size, size))
    for a, b in graph.edges:
        if hidden not in (a, b):
            adjacency[a, b] = adjacency[b, a] = 1
    if operator == "sym_selfloop":
        adjacency += np.eye(size)
    degrees = adjacency.sum(axis=1)
    matrix = np.zeros((size, size))
    for a in range(size):
        for b in range(size):
            if adjacency[a, b]:
                scale = degrees[a] if operator == "mean" else np.sqrt(degrees[a] * degrees[b])
                matrix[a, b] = 1 / scale
    return matrix


@pytest.mark.parametrize("operator", OPERATORS)
def test_against_dense_powers(tmp_path: Path, operator: HopOperator) -> None:
    graph = random_graph(tmp_path)
    features = np.random.default_rng(1).normal(size=(60, 7)).astype(np.float32)
    template = Template(kind="ho", hops=4, operator=operator)
    rows, _ = plan_filling(template, graph, everyone(graph)).vectors(features, None)
    expected = features.astype(np.float64)
    for hop in range(5):
        assert np.allclose(rows[:, hop], expected, atol=1e-5)
        expected = dense_operator(graph, operator) @ expected


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_hidden_node_leaks_at_no_hop(tmp_path: Path, operator: HopOperator) -> None:
    graph = random_graph(tmp_path)
    features = np.random.default_rng(1).normal(size=(60, 7)).astype(np.float32)
    template = Template(kind="ho", hops=4, operator=operator)
    for centre, partner in graph.edges[:20].astype(np.int64):
        hidden = np.array([partner])
        filling = plan_filling(template, graph, np.array([centre]), hidden=hidden)
        rows = filling.vectors(features, None)[0][0]
        plain = plan_filling(template, graph, np.array([centre])).vectors(features, None)[0][0]
        matrix = dense_operator(graph, operator, partner)
        expected = np.stack(
            [(np.linalg.matrix_power(matrix, t) @ features)[centre] for t in range(5)]
        )
        assert np.allclose(rows, expected, atol=1e-5)
        assert not np.allclose(rows, plain, atol=1e-3)
        poisoned = features.copy()
        poisoned[partner] = 1e6  # whatever it says reaches no hop
        again, _ = filling.vectors(poisoned, None)
        assert np.array_equal(again[0], rows)
        assert partner not in filling.nodes[0]


@pytest.mark.parametrize("operator", OPERATORS)
def test_an_isolated_node(tmp_path: Path, operator: HopOperator) -> None:
    graph = stored(tmp_path, ["a", "b", "lone"], [("a", "b")])
    nodes, weights = hop_weights(graph, 2, hops=2, operator=operator)
    assert nodes.tolist() == [2]
    assert weights[:, 0].tolist() == ([1, 1, 1] if operator == "sym_selfloop" else [1, 0, 0])
