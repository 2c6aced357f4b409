"""Plans within a limit: the same as without, given up before what is too much is looked at, and when nobody waits."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graph.llaga import filling, hops, templates
from graph.llaga.filling import (
    PlanStoppedError,
    Template,
    TooManyNodesError,
    needed_nodes,
    plan_filling,
    plan_questions,
    plan_within,
)
from graph.llaga.hops import OPERATORS
from graph.llaga.prompts import Task
from tests.graph.graphs import stored
from tests.graph.llaga.test_templates import everyone, random_graph

ND = Template(kind="nd", hops=2, fanout=3)
HOPS = [Template(kind="ho", hops=3, operator=operator) for operator in OPERATORS]
HO = HOPS[0]


@pytest.mark.parametrize("template", [ND, *HOPS])
@pytest.mark.parametrize("task", ["node_classification", "link_prediction"])
def test_within_a_limit_the_plan_is_the_same(
    tmp_path: Path, template: Template, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether questions are planned one after the other, or edges looked at in pieces."""
    graph = random_graph(tmp_path)
    questions = everyone(graph)[:, None]
    if task == "link_prediction":
        questions = graph.edges[:30].astype(np.int64)
    whole = plan_questions(template, graph, task, questions)
    for edges in (templates.EDGES_AT_ONCE, 1, 7):
        monkeypatch.setattr(templates, "EDGES_AT_ONCE", edges)
        planned, needed = plan_within(template, graph, task, questions, max_nodes=60)
        assert needed.tolist() == needed_nodes(whole).tolist()
        for one, other in zip(planned, whole, strict=True):
            for got, expected in zip(one.nodes, other.nodes, strict=True):
                assert np.array_equal(got, expected)
            for weights, same in zip(one.weights or [], other.weights or [], strict=True):
                assert np.array_equal(weights, same)
            if template is ND:
                assert one.trees is not None
                assert other.trees is not None
                assert np.array_equal(one.trees, other.trees)


@pytest.mark.parametrize("operator", OPERATORS)
def test_weights_are_sums_in_the_order_of_edges(tmp_path: Path, operator: Any) -> None:
    """To the bit what one pass over all edges of a hop adds up."""
    graph = random_graph(tmp_path)
    degrees = graph.degrees.astype(np.float64)
    loop = 1.0 if operator == "sym_selfloop" else 0.0
    for centre in range(20):
        nodes, weights = hops.hop_weights(graph, centre, hops=3, operator=operator)
        expected = {centre: 1.0}
        for hop in range(1, 4):
            edges = [(a, int(b)) for a in sorted(expected) for b in graph.neighbors(a)]
            edges += [(a, a) for a in sorted(expected)] if loop else []
            sums: dict[int, float] = {}
            for a, b in edges:
                scale = np.sqrt((degrees[a] + loop) * (degrees[b] + loop))
                entry = 1 / (degrees[a] if operator == "mean" else scale)
                sums[b] = sums.get(b, 0.0) + expected[a] * entry
            expected = sums
            assert weights[hop].tolist() == [expected.get(node, 0.0) for node in nodes.tolist()]


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Edges of every look at a hop."""
    looks: list[int] = []

    def expand(*given: Any) -> Any:
        rows, neighbors = templates.expand(*given)
        looks.append(len(rows))
        return rows, neighbors

    monkeypatch.setattr(hops, "expand", expand)
    return looks


@pytest.mark.parametrize("template", HOPS)
def test_a_hub_is_not_looked_at(
    tmp_path: Path, template: Template, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its degree alone tells that too many are in reach, also of one question."""
    graph = stored(tmp_path, list(range(101)), [(0, leaf) for leaf in range(1, 101)])
    looks = counted(monkeypatch)
    with pytest.raises(TooManyNodesError) as caught:
        plan_within(template, graph, "node_classification", np.array([[3], [4]]), max_nodes=50)
    assert (caught.value.question, caught.value.is_alone) == (0, True)
    assert looks == [1]
    looks.clear()
    # without the hub, a leaf is alone
    _, needed = plan_within(template, graph, "link_prediction", np.array([[0, 3]]), max_nodes=101)
    assert needed.tolist() == list(range(101))
    with pytest.raises(TooManyNodesError):
        plan_within(template, graph, "link_prediction", np.array([[3, 0]]), max_nodes=99)


def test_many_small_neighbourhoods_are_given_up_on_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node of 20 neighbours with 20 of their own each: no degree tells, a few pieces do."""
    edges = [(0, 1 + i) for i in range(20)]
    edges += [(1 + i, 21 + 20 * i + j) for i in range(20) for j in range(20)]
    graph = stored(tmp_path, list(range(421)), edges)
    looks = counted(monkeypatch)
    monkeypatch.setattr(templates, "EDGES_AT_ONCE", 42)  # two of them
    with pytest.raises(TooManyNodesError):
        plan_within(HO, graph, "node_classification", np.array([[0]]), max_nodes=60)
    assert looks == [20, 42, 42]


@pytest.mark.parametrize("template", [ND, HO])
def test_questions_behind_the_limit_are_not_planned(
    tmp_path: Path, template: Template, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = stored(tmp_path, list(range(300)), [(3 * i, 3 * i + 1) for i in range(100)])
    planned: list[int] = []

    def plan(*given: Any, **options: Any) -> Any:
        planned.append(int(given[2][0]))
        return plan_filling(*given, **options)

    monkeypatch.setattr(filling, "plan_filling", plan)
    with pytest.raises(TooManyNodesError) as caught:
        plan_within(template, graph, "node_classification", everyone(graph)[:, None], max_nodes=5)
    assert (caught.value.question, caught.value.is_alone) == (5, False)
    assert planned == list(range(6))  # they read 0 and 1, 2, 3 and 4, 5


@pytest.mark.parametrize("template", [ND, HO])
def test_a_plan_ends_when_nobody_waits(tmp_path: Path, template: Template) -> None:
    graph = random_graph(tmp_path)
    for num_asked in range(6):
        asked = iter([False] * num_asked + [True])
        with pytest.raises(PlanStoppedError):
            plan_within(
                template,
                graph,
                "node_classification",
                everyone(graph)[:, None],
                max_nodes=60,
                is_stopped=lambda asked=asked: next(asked),  # type: ignore[misc]
            )
        assert next(asked, None) is None, "not asked again"
