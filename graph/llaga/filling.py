"""Which nodes fill a node's template, and the vectors that it then has (LLaGA, arXiv:2402.08170).

Two steps, so that a question's nodes are known before any of them is encoded: `plan_questions` looks at edges alone,
`Filling.vectors` at features alone. Of a pair, each node is taken out of the graph before the other's template is made.
Whoever cannot read any number of nodes plans with `plan_within`, which ends as soon as they are too many.

Shapes: Q questions, C centres of a question, N places of a template, D width of a vector.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from graph.llaga.hops import OPERATORS, HopOperator, hop_weights
from graph.llaga.prompts import NUM_CENTRES, Task
from graph.llaga.templates import (
    MAX_TREE_NODES,
    PAD,
    Check,
    expand,
    neighborhood_trees,
    tree_length,
)
from graph.store import Graph, Int64s

MAX_HOPS = 8

Float32s = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]


class TooManyNodesError(Exception):
    """Attributes: question: index of the one that reads too many; is_alone: it does so by itself, and not together
    with those before it."""

    def __init__(self, question: int, *, is_alone: bool) -> None:
        super().__init__(f"question {question} reads too many nodes")
        self.question = question
        self.is_alone = is_alone


class PlanStoppedError(Exception):
    """Nobody waits for the plan any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """How a node's surroundings become vectors.

    Attributes:
        kind: "nd" is the tree, "ho" the hops.
        fanout: children of a tree's node; of "nd" alone.
        operator: of "ho" alone.
    """

    kind: Literal["nd", "ho"]
    hops: int
    fanout: int | None = None
    operator: HopOperator | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("nd", "ho"):
            raise ValueError(f"template kind must be nd or ho, got {self.kind!r}")
        if not 1 <= self.hops <= MAX_HOPS:
            raise ValueError(f"hops must be 1 to {MAX_HOPS}, got {self.hops}")
        if self.kind == "ho":
            if self.operator not in OPERATORS:
                raise ValueError(
                    f"operator must be one of {', '.join(OPERATORS)}, got {self.operator!r}"
                )
            if self.fanout is not None:
                raise ValueError("fanout is for the nd template only")
            return
        if self.operator is not None:
            raise ValueError("operator is for the ho template only")
        if self.fanout is None or self.fanout < 1:
            raise ValueError(f"fanout must be at least 1, got {self.fanout}")
        if tree_length(self.hops, self.fanout) > MAX_TREE_NODES:
            raise ValueError(f"a tree has at most {MAX_TREE_NODES} places")

    @property
    def num_rows(self) -> int:
        if self.fanout is None:
            return self.hops + 1
        return tree_length(self.hops, self.fanout)

    def width(self, encoder_dim: int) -> int:
        """Width of one vector."""
        return encoder_dim + (self.num_rows if self.kind == "nd" else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Filling:
    """The nodes that fill the templates of several centres (Q,).

    Attributes:
        nodes: of each centre those that reach it, ascending.
        weights: of "ho": how much each of them adds to each hop (hops + 1, nodes).
        trees: of "nd": the node at each place (Q, N), or PAD.
    """

    nodes: list[Int64s]
    weights: list[Float32s] | None = None
    trees: Int64s | None = None

    def one(self, index: int) -> "Filling":
        """That of one centre."""
        at = slice(index, index + 1)
        return Filling(
            nodes=self.nodes[at],
            weights=None if self.weights is None else self.weights[at],
            trees=None if self.trees is None else self.trees[at],
        )

    def vectors(self, features: Float32s, laplacian: Float32s | None) -> tuple[Float32s, Bools]:
        """Vectors (Q, N, D), ready to be projected, and which of them are PAD (Q, N).

        Args:
            features: (nodes of the graph, encoder_dim); only rows of `nodes` are read.
            laplacian: the projector's own, for "nd".
        """
        if self.trees is None:
            assert self.weights is not None
            rows = [
                weights @ features[nodes]
                for nodes, weights in zip(self.nodes, self.weights, strict=True)
            ]
            hops = np.stack(rows)
            return hops, np.zeros(hops.shape[:2], dtype=bool)
        assert laplacian is not None
        is_pad = self.trees == PAD
        text = np.where(is_pad[..., None], np.float32(0), features[self.trees])
        places = np.broadcast_to(laplacian, (len(self.trees), *laplacian.shape))
        return np.concatenate([text, places], axis=2), is_pad


def plan_filling(
    template: Template,
    graph: Graph,
    centres: Int64s,
    *,
    hidden: Int64s | None = None,
    check: Check = lambda _: None,
) -> Filling:
    """Args: hidden: for each centre (Q,) a node that is not to be seen, or PAD; check: of each centre."""
    if template.kind == "ho":
        assert template.operator is not None
        pairs = [
            hop_weights(
                graph,
                int(centre),
                hops=template.hops,
                operator=template.operator,
                hidden=PAD if hidden is None else int(hidden[index]),
                check=check,
            )
            for index, centre in enumerate(centres)
        ]
        return Filling(
            nodes=[nodes for nodes, _ in pairs],
            weights=[weights.astype(np.float32) for _, weights in pairs],
        )
    assert template.fanout is not None
    trees = neighborhood_trees(
        graph, centres, hops=template.hops, fanout=template.fanout, hidden=hidden, check=check
    )
    return Filling(nodes=[np.unique(tree[tree != PAD]) for tree in trees], trees=trees)


def plan_questions(
    template: Template,
    graph: Graph,
    task: Task,
    questions: Int64s,
    *,
    check: Check = lambda _: None,
) -> list[Filling]:
    """Args: questions: node indices (Q, C). Returns one filling per centre."""
    pairs = NUM_CENTRES[task] == 2
    return [
        plan_filling(
            template,
            graph,
            questions[:, centre],
            hidden=questions[:, 1 - centre] if pairs else None,
            check=check,
        )
        for centre in range(NUM_CENTRES[task])
    ]


def plan_within(
    template: Template,
    graph: Graph,
    task: Task,
    questions: Int64s,
    *,
    max_nodes: int,
    is_stopped: Callable[[], bool] = lambda: False,
) -> tuple[list[Filling], Int64s]:
    """As `plan_questions`, one question after the other, and `needed_nodes`.

    Args:
        max_nodes: that all questions may read together; no more are looked at than tells that they are too many.
        is_stopped: asked all the while.

    Raises:
        TooManyNodesError
        PlanStoppedError
    """
    planned: list[list[Filling]] = []
    needed = np.empty(0, dtype=np.int64)

    def check(num_nodes: int) -> None:
        if is_stopped():
            raise PlanStoppedError
        if num_nodes > max_nodes:
            raise TooManyNodesError(len(planned), is_alone=True)

    for index in range(len(questions)):
        check(1)
        one = plan_questions(template, graph, task, questions[index : index + 1], check=check)
        own = needed_nodes(one)
        check(len(own))
        needed = np.union1d(needed, own)
        if len(needed) > max_nodes:
            raise TooManyNodesError(index, is_alone=False)
        planned.append(one)
    return [_joined(parts) for parts in zip(*planned, strict=True)], needed


def _joined(parts: Sequence[Filling]) -> Filling:
    weights = [one for part in parts if part.weights is not None for one in part.weights]
    trees = [part.trees for part in parts if part.trees is not None]
    return Filling(
        nodes=[nodes for part in parts for nodes in part.nodes],
        weights=weights or None,
        trees=np.concatenate(trees) if trees else None,
    )


def needed_nodes(fillings: Sequence[Filling]) -> Int64s:
    """All nodes whose features are read, ascending."""
    return np.unique(np.concatenate([nodes for filling in fillings for nodes in filling.nodes]))


def nodes_within(graph: Graph, centres: Int64s, hops: int) -> Int64s:
    """All nodes that some template of these centres may read, ascending."""
    reached = np.zeros(graph.info.num_nodes, dtype=bool)
    front = np.unique(centres)
    reached[front] = True
    for _ in range(hops):
        _, neighbors = expand(graph.indptr, graph.indices, front)
        front = np.unique(neighbors)
        front = front[~reached[front]]
        reached[front] = True
    return np.flatnonzero(reached)


def question_vectors(
    fillings: Sequence[Filling], features: Float32s, laplacian: Float32s | None
) -> tuple[Float32s, Bools]:
    """Vectors (Q, C, N, D) and which of them are PAD (Q, C, N)."""
    parts = [filling.vectors(features, laplacian) for filling in fillings]
    return np.stack([vectors for vectors, _ in parts], 1), np.stack([pad for _, pad in parts], 1)
