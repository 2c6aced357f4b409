"""Questions of a graph: splits, answers, and that no template of link prediction shows what is asked."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graph.llaga.filling import Template, needed_nodes, nodes_within, plan_questions
from graph.llaga.prompts import MAX_DESCRIPTION_CHARS, Task, description
from graph.llaga.questions import (
    QuestionError,
    make_all_questions,
    make_questions,
    without_edges,
)
from graph.store import Graph, GraphStore
from tests.graph.graphs import OWNER, columns, create, stored
from tests.graph.llaga.test_templates import everyone, random_graph


def labelled(folder: Path, *, labels: Any, splits: Any = None, texts: Any = None) -> Graph:
    ids = list(range(len(labels)))
    parts = columns(ids, [(0, 1)], labels=labels, splits=splits, texts=texts)
    store = GraphStore(folder)
    return store.get(create(store, parts).id, OWNER)


def test_own_splits_are_kept_and_nodes_without_label_left_out(tmp_path: Path) -> None:
    labels = ["b", "a", None, "b", "a", "c", "a"]
    splits = ["train", "train", "train", "val", "test", "test", None]
    made = make_questions(
        labelled(tmp_path, labels=labels, splits=splits), "node_classification", seed=3
    )
    assert sorted(made.questions["train"].ravel()) == [0, 1]
    assert made.questions["val"].tolist() == [[3]]
    assert sorted(made.questions["test"].ravel()) == [4, 5]
    assert made.choices == ("a", "b")  # c is in no training node: its questions cannot be answered
    for split, nodes in made.questions.items():
        assert made.answers[split] == [labels[node] for node in nodes.ravel()]


def test_without_splits_the_seed_divides(tmp_path: Path) -> None:
    graph = labelled(tmp_path, labels=[index % 3 for index in range(50)])
    made = make_questions(graph, "node_classification", seed=0)
    assert [len(made.questions[split]) for split in ("train", "val", "test")] == [30, 10, 10]
    assert sorted(np.concatenate([q.ravel() for q in made.questions.values()])) == list(range(50))
    assert made.choices == ("0", "1", "2")
    again, other = (make_questions(graph, "node_classification", seed=seed) for seed in (0, 1))
    assert np.array_equal(made.questions["test"], again.questions["test"])
    assert not np.array_equal(made.questions["test"], other.questions["test"])
    few = make_questions(graph, "node_classification", seed=0, max_questions=4)
    for split, questions in few.questions.items():
        assert np.array_equal(questions, made.questions[split][:4])
        assert len(few.answers[split]) == 4


@pytest.mark.parametrize(
    ("text", "label", "expected"),
    [
        ("Deep nets. They learn.", "AI", "AI: Deep nets."),
        ("A title\nand more", None, "A title"),
        ("  two   spaces?  yes", "x", "x: two spaces?"),
        ("v1.2 of pi.3", None, "v1.2 of pi.3"),
        ("", "only", "only"),
        (" \n ", None, ""),
        ("word " * 100, None, " ".join(["word"] * (MAX_DESCRIPTION_CHARS // 5))),
    ],
)
def test_descriptions(text: str, label: str | None, expected: str) -> None:
    assert description(text, label) == expected


def test_nodes_with_neither_text_nor_label_are_not_described(tmp_path: Path) -> None:
    graph = labelled(tmp_path, labels=["a", None, None], texts=["", "Words.", ""])
    made = make_questions(graph, "node_description", seed=0)
    found = {
        int(node): answer
        for split in made.questions
        for node, answer in zip(made.questions[split].ravel(), made.answers[split], strict=True)
    }
    assert found == {0: "a", 1: "Words."}
    assert made.choices == ()


def test_link_questions(tmp_path: Path) -> None:
    graph = random_graph(tmp_path)
    made = make_questions(graph, "link_prediction", seed=0)
    edges = {tuple(sorted(pair)) for pair in graph.edges.tolist()}
    asked = [tuple(sorted(pair)) for q in made.questions.values() for pair in q.tolist()]
    answers = [answer for split in made.questions for answer in made.answers[split]]
    assert len(set(asked)) == len(asked) == 2 * len(edges)
    assert {pair for pair, answer in zip(asked, answers, strict=True) if answer == "yes"} == edges
    assert all(a != b for a, b in asked)
    sizes = [len(made.questions[split]) for split in ("train", "val", "test")]
    assert sizes == [
        int(0.6 * len(asked)),
        int(0.8 * len(asked)) - int(0.6 * len(asked)),
        len(asked) - int(0.8 * len(asked)),
    ]


@pytest.mark.parametrize(
    "template",
    [
        Template(kind="ho", hops=3, operator="sym"),
        Template(kind="nd", hops=3, fanout=3),
    ],
)
def test_no_template_shows_a_held_out_edge(tmp_path: Path, template: Template) -> None:
    """With all else taken out, what is left of a held-out edge would be the only way from one end to the other."""
    graph = random_graph(tmp_path)
    made = make_questions(graph, "link_prediction", seed=0)
    held_out = {
        tuple(sorted(pair))
        for split in ("val", "test")
        for pair, answer in zip(made.questions[split].tolist(), made.answers[split], strict=True)
        if answer == "yes"
    }
    assert held_out
    left = {
        tuple(sorted((node, int(other))))
        for node in everyone(graph)
        for other in made.graph.neighbors(node)
    }
    assert left == {tuple(sorted(pair)) for pair in graph.edges.tolist()} - held_out
    for questions in made.questions.values():
        fillings = plan_questions(template, made.graph, "link_prediction", questions)
        for (first, second), of_first, of_second in zip(
            questions, fillings[0].nodes, fillings[1].nodes, strict=True
        ):
            assert second not in of_first
            assert first not in of_second
            reach = nodes_within(made.graph, np.array([first]), template.hops)
            assert set(of_first) <= set(reach)


def test_another_task_does_not_show_a_held_out_edge_either(tmp_path: Path) -> None:
    ids = list(range(30))
    parts = columns(ids, [(i, i + 1) for i in range(29)], labels=[i % 2 for i in ids])
    store = GraphStore(tmp_path)
    graph = store.get(create(store, parts).id, OWNER)
    nodes, links = make_all_questions(graph, ("node_classification", "link_prediction"), seed=0)
    alone = make_questions(graph, "link_prediction", seed=0)
    assert [nodes.task, links.task] == ["node_classification", "link_prediction"]
    assert links.answers == alone.answers
    for node in ids:
        seen = nodes.graph.neighbors(node).tolist()
        assert seen == alone.graph.neighbors(node).tolist()
    assert nodes.graph.degrees.sum() < graph.degrees.sum()
    (only,) = make_all_questions(graph, ("node_classification",), seed=0)
    assert only.graph is graph


def test_a_directed_graph_is_asked_once_for_both_ways(tmp_path: Path) -> None:
    ids = list(range(12))
    edges = [(0, 1), (1, 0), (2, 3), (4, 5), (6, 7), (8, 9), (10, 11)]
    graph = stored(tmp_path, ids, edges, directed=True)
    made = make_questions(graph, "link_prediction", seed=0)
    assert sum(map(len, made.questions.values())) == 12
    gone = without_edges(graph, np.array([[1, 0], [5, 4]]))
    assert gone.degrees.tolist() == [0, 0, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1]
    assert gone.neighbors(2).tolist() == [3]


@pytest.mark.parametrize(
    ("task", "labels", "splits", "message"),
    [
        ("node_classification", [None] * 4, None, "no node has a label"),
        ("node_classification", ["a"] * 4, None, "2 to 256 labels in training, got 1"),
        ("node_classification", ["a", "b", "a", "b"], ["val"] * 4, "in the split train"),
        ("node_description", [None] * 4, None, "no node has a text or a label"),
    ],
)
def test_graphs_without_questions(
    tmp_path: Path, task: Task, labels: Any, splits: Any, message: str
) -> None:
    graph = labelled(tmp_path, labels=labels, splits=splits, texts=[""] * 4)
    with pytest.raises(QuestionError, match=message):
        make_questions(graph, task, seed=0)


def test_graphs_without_links_to_ask_about(tmp_path: Path) -> None:
    with pytest.raises(QuestionError, match="more edges"):
        make_questions(stored(tmp_path / "a", [0, 1, 2], []), "link_prediction", seed=0)
    full = [(a, b) for a in range(4) for b in range(a)]
    with pytest.raises(QuestionError, match="too few that are none"):
        make_questions(stored(tmp_path / "b", [0, 1, 2, 3], full), "link_prediction", seed=0)


def test_nodes_within_holds_all_that_templates_read(tmp_path: Path) -> None:
    graph = random_graph(tmp_path)
    centres = np.array([3, 59])
    for template in (
        Template(kind="ho", hops=2, operator="mean"),
        Template(kind="nd", hops=2, fanout=30),
    ):
        fillings = plan_questions(template, graph, "node_classification", centres[:, None])
        # every neighbour fits into the tree; of the hops' operator, all within reach have a weight
        assert nodes_within(graph, centres, 2).tolist() == needed_nodes(fillings).tolist()
