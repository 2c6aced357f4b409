"""What a projector is trained and judged on: the questions of a graph, their right answers, and the graph they may see.

After LLaGA's tasks (Chen et al. 2024, arXiv:2402.08170). Node classification and description ask about nodes, divided
by the graph's own splits or, where it has none, 60/20/20 by the seed.

Link prediction asks about edges and as many pairs that are none, 60/20/20 by the seed. Departure: an edge that is held
out is in no template at all, so that neither a prompt of training nor another held-out question shows it; what remains
is that each node of a pair is hidden from the other (`graph.llaga.filling`). Hiding alone would tell: in a full graph,
a node that is suddenly alone has just lost its edge.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from graph.llaga.prompts import LINK_ANSWERS, Task, description
from graph.store import SPLITS, Graph, Int64s

SHARES = (0.6, 0.2, 0.2)
MAX_CLASSES = 256


class QuestionError(ValueError):
    """A graph that has no questions of a task; the message says what it lacks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskQuestions:
    """The questions of one task.

    Attributes:
        graph: what their templates are made of.
        questions: of each split, node indices (Q, C).
        answers: of each split, the right ones (Q,).
        choices: all answers that may be given; empty where the answer is written freely.
    """

    task: Task
    graph: Graph
    questions: dict[str, Int64s]
    answers: dict[str, list[str]]
    choices: tuple[str, ...]


def make_all_questions(
    graph: Graph, tasks: Sequence[Task], *, seed: int, max_questions: int | None = None
) -> list[TaskQuestions]:
    """The questions of several tasks, all asked of one graph: links that are held out are in no task's templates.

    Raises:
        QuestionError
    """
    made = [make_questions(graph, task, seed=seed, max_questions=max_questions) for task in tasks]
    seen = next((one.graph for one in made if one.task == "link_prediction"), graph)
    return [replace(one, graph=seen) for one in made]


def make_questions(
    graph: Graph, task: Task, *, seed: int, max_questions: int | None = None
) -> TaskQuestions:
    """The questions of a task, the same for the same seed.

    Args:
        max_questions: of each split.

    Raises:
        QuestionError
    """
    if task == "link_prediction":
        return _link_questions(graph, seed, max_questions)
    labels = _labels(graph)
    if task == "node_classification":
        answers = labels
    else:
        texts = graph.texts(np.arange(graph.info.num_nodes))
        answers = [description(t, label) or None for t, label in zip(texts, labels, strict=True)]
    known = np.array([i for i, answer in enumerate(answers) if answer is not None], dtype=np.int64)
    if len(known) == 0:
        lacking = "a label" if task == "node_classification" else "a text or a label"
        raise QuestionError(f"no node has {lacking}")
    parts = _split_nodes(graph, known, seed, max_questions)
    if len(parts["train"]) == 0:
        raise QuestionError("no node to train on is in the split train")
    choices: tuple[str, ...] = ()
    if task == "node_classification":
        choices = _classes(graph, parts["train"])
    return TaskQuestions(
        task=task,
        graph=graph,
        questions={name: nodes[:, None] for name, nodes in parts.items()},
        answers={name: [answers[node] or "" for node in nodes] for name, nodes in parts.items()},
        choices=choices,
    )


def _labels(graph: Graph) -> list[str | None]:
    values: list[Any] = graph.nodes.column("label").to_pylist()
    return [None if value is None else str(value) for value in values]


def _classes(graph: Graph, nodes: Int64s) -> tuple[str, ...]:
    """The labels that training shows, in the order of their type."""
    values = set(graph.nodes.column("label").take(nodes).to_pylist())
    if not 2 <= len(values) <= MAX_CLASSES:
        raise QuestionError(
            f"node classification needs 2 to {MAX_CLASSES} labels in training, got {len(values)}"
        )
    return tuple(str(value) for value in sorted(values))


def _split_nodes(
    graph: Graph, known: Int64s, seed: int, max_questions: int | None
) -> dict[str, Int64s]:
    order = known[np.random.default_rng(seed).permutation(len(known))]
    if graph.info.has_splits:
        splits = np.array(graph.nodes.column("split").to_pylist(), dtype=object)[order]
        return {name: order[splits == name][:max_questions] for name in SPLITS}
    return {name: order[span][:max_questions] for name, span in _spans(len(order)).items()}


def _spans(size: int) -> dict[str, slice]:
    first, second = int(SHARES[0] * size), int((SHARES[0] + SHARES[1]) * size)
    return {"train": slice(first), "val": slice(first, second), "test": slice(second, size)}


def _link_questions(graph: Graph, seed: int, max_questions: int | None) -> TaskQuestions:
    generator = np.random.default_rng(seed)
    edges = np.unique(
        np.sort(graph.edges.astype(np.int64), axis=1), axis=0
    )  # a directed one may have both ways
    others = _pairs_without_edge(edges, graph.info.num_nodes, generator)
    pairs = np.concatenate([edges, others])
    is_edge = np.repeat([True, False], len(edges))
    order = generator.permutation(len(pairs))
    pairs, is_edge = pairs[order], is_edge[order]
    flipped = generator.random(len(pairs)) < 0.5
    pairs[flipped] = pairs[flipped, ::-1]
    spans = _spans(len(pairs))
    questions = {name: pairs[span][:max_questions] for name, span in spans.items()}
    truth = {name: is_edge[span][:max_questions] for name, span in spans.items()}
    if not truth["train"].any():
        raise QuestionError("link prediction needs more edges")
    held_out = np.concatenate([questions[name][truth[name]] for name in ("val", "test")])
    return TaskQuestions(
        task="link_prediction",
        graph=without_edges(graph, held_out),
        questions=questions,
        answers={
            name: [LINK_ANSWERS[0] if yes else LINK_ANSWERS[1] for yes in values]
            for name, values in truth.items()
        },
        choices=LINK_ANSWERS,
    )


def _pairs_without_edge(edges: Int64s, num_nodes: int, generator: np.random.Generator) -> Int64s:
    """As many distinct pairs of two nodes, smaller index first, that are no edge."""
    taken = edges[:, 0] * num_nodes + edges[:, 1]
    if num_nodes * (num_nodes - 1) // 2 < 2 * len(edges):
        raise QuestionError(
            "more than half of all pairs are edges: there are too few that are none"
        )
    found = np.empty(0, dtype=np.int64)
    while len(found) < len(edges):
        drawn = np.sort(generator.integers(0, num_nodes, (2 * len(edges), 2)), axis=1)
        drawn = drawn[drawn[:, 0] != drawn[:, 1]]
        keys = drawn[:, 0] * num_nodes + drawn[:, 1]
        keys = keys[~np.isin(keys, taken)]
        both = np.concatenate([found, keys])
        _, first = np.unique(both, return_index=True)
        found = both[np.sort(first)]  # in the order of the draws, so that what is cut off is random
    found = found[: len(edges)]
    return np.stack([found // num_nodes, found % num_nodes], axis=1)


def without_edges(graph: Graph, pairs: Int64s) -> Graph:
    """The graph without some of its edges (E, 2), whichever way they point; only its neighbourhoods are changed."""
    size = graph.info.num_nodes
    rows = np.repeat(np.arange(size, dtype=np.int64), graph.degrees)
    gone = np.concatenate([pairs[:, 0] * size + pairs[:, 1], pairs[:, 1] * size + pairs[:, 0]])
    kept = ~np.isin(rows * size + graph.indices, gone)
    indptr = np.zeros(size + 1, dtype=np.int64)
    np.cumsum(np.bincount(rows[kept], minlength=size), out=indptr[1:])
    return replace(graph, indptr=indptr, indices=graph.indices[kept])
