"""Which nodes fill a node's template, and the vectors that it then has (LLaGA, arXiv:2402.08170).

Two steps, so that a question's nodes are known before any of them is encoded: `plan_questions` looks at edges alone,
`Filling.vectors` at features alone. Of a pair, each node is taken out of the graph before the other's template is made.

Shapes: Q questions, C centres of a question, N places of a template, D width of a vector.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from graph.llaga.hops import OPERATORS, Float64s, HopOperator, hop_weights
from graph.llaga.prompts import NUM_CENTRES, Task
from graph.llaga.templates import MAX_TREE_NODES, PAD, expand, neighborhood_trees, tree_length
from graph.store import Graph, Int64s

MAX_HOPS = 8

Float32s = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]


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
    weights: list[Float64s] | None = None
    trees: Int64s | None = None

    def vectors(self, features: Float32s, laplacian: Float32s | None) -> tuple[Float32s, Bools]:
        """Vectors (Q, N, D), ready to be projected, and which of them are PAD (Q, N).

        Args:
            features: (nodes of the graph, encoder_dim); only rows of `nodes` are read.
            laplacian: the projector's own, for "nd".
        """
        if self.trees is None:
            assert self.weights is not None
            rows = [
                weights.astype(np.float32) @ features[nodes]
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
    template: Template, graph: Graph, centres: Int64s, *, hidden: Int64s | None = None
) -> Filling:
    """Args: hidden: for each centre (Q,) a node that is not to be seen, or PAD."""
    if template.kind == "ho":
        assert template.operator is not None
        pairs = [
            hop_weights(
                graph,
                int(centre),
                hops=template.hops,
                operator=template.operator,
                hidden=PAD if hidden is None else int(hidden[index]),
            )
            for index, centre in enumerate(centres)
        ]
        return Filling(nodes=[nodes for nodes, _ in pairs], weights=[w for _, w in pairs])
    assert template.fanout is not None
    trees = neighborhood_trees(
        graph, centres, hops=template.hops, fanout=template.fanout, hidden=hidden
    )
    return Filling(nodes=[np.unique(tree[tree != PAD]) for tree in trees], trees=trees)


def plan_questions(
    template: Template, graph: Graph, task: Task, questions: Int64s
) -> list[Filling]:
    """Args: questions: node indices (Q, C). Returns one filling per centre."""
    pairs = NUM_CENTRES[task] == 2
    return [
        plan_filling(
            template,
            graph,
            questions[:, centre],
            hidden=questions[:, 1 - centre] if pairs else None,
        )
        for centre in range(NUM_CENTRES[task])
    ]


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
