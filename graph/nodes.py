"""Where the nodes of an enrichment come from: what a prompt reads of a graph's nodes."""

from collections.abc import Mapping, Sequence

import numpy as np

from graph.catalog import Prompt
from graph.enrich_types import EnrichNode
from graph.generation import PromptInputError, training_classes, training_labels
from graph.store import Graph, Int64s, NodeId, UnknownNodeError

MAX_TEXT_BYTES_AT_ONCE = 128 * 2**20
"""Of nodes and neighbours that are in memory together; more than one node can have."""
MAX_CLASSES = 256


class NodeInputError(ValueError):
    """What was given for nodes does not suit the graph. Attributes: param: the place at fault."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param
        self.message = message


def nodes_of_graph(
    graph: Graph,
    indices: Sequence[int],
    prompt: Prompt,
    *,
    neighbors: Sequence[Sequence[NodeId]] | None = None,
    variables: Sequence[Mapping[str, str]] | None = None,
) -> tuple[EnrichNode, ...]:
    """Nodes with as many neighbours as the prompt reads, and the labels of those that are training nodes.

    Args:
        neighbors: of each node, best first; by default the first in the order of the upload, direction aside.
        variables: of each node.

    Raises:
        NodeInputError: a list is not of the nodes' number, or names a node that is no neighbour; or the texts are more
            than are read at once.
    """
    for name, given in (("neighbors", neighbors), ("node_variables", variables)):
        if given is not None and len(given) != len(indices):
            raise NodeInputError(name, f"needs one item per node, got {len(given)}")
    read = [
        _first_neighbors(graph, index, prompt)
        if neighbors is None
        else _named(graph, set(graph.neighbors(index).tolist()), neighbors[place], place)[
            : prompt.max_neighbors
        ]
        for place, index in enumerate(indices)
    ]
    num_bytes = int(_text_bytes(graph, indices, read).sum())
    if num_bytes > MAX_TEXT_BYTES_AT_ONCE:
        raise NodeInputError(
            "node_ids",
            f"the texts of the nodes and of the neighbours that the prompt reads are {num_bytes} bytes, at most "
            f"{MAX_TEXT_BYTES_AT_ONCE} are read at once: name fewer nodes",
        )
    nodes = []
    for place, (node_id, text, near) in enumerate(
        zip(graph.ids(indices), graph.texts(indices), read, strict=True)
    ):
        labels = training_labels(graph, near) if "neighbor_labels" in prompt.inputs else ()
        nodes.append(
            EnrichNode(
                id=node_id,
                text=text,
                neighbors=tuple(graph.texts(near)) if near else (),
                neighbor_labels=labels,
                variables={} if variables is None else variables[place],
            )
        )
    return tuple(nodes)


def num_at_once(graph: Graph, indices: Sequence[int], prompt: Prompt) -> int:
    """How many of the first nodes `nodes_of_graph` reads together; at least one."""
    read = [_first_neighbors(graph, index, prompt) for index in indices]
    total = np.cumsum(_text_bytes(graph, indices, read))
    return max(1, int(np.searchsorted(total, MAX_TEXT_BYTES_AT_ONCE, side="right")))


def classes_of_graph(graph: Graph, prompt: Prompt) -> tuple[str, ...]:
    """The labels of its training nodes, if the prompt reads classes.

    Raises:
        PromptInputError: they are too many.
    """
    if "classes" not in prompt.inputs:
        return ()
    classes = training_classes(graph)
    if len(classes) > MAX_CLASSES:
        raise PromptInputError(
            "classes",
            f"the graph's training nodes have {len(classes)} labels, a prompt reads at most {MAX_CLASSES}: name them",
        )
    return classes


def _first_neighbors(graph: Graph, index: int, prompt: Prompt) -> list[int]:
    neighbors: list[int] = graph.neighbors(index)[: prompt.max_neighbors].tolist()
    return neighbors


def _text_bytes(graph: Graph, indices: Sequence[int], read: Sequence[Sequence[int]]) -> Int64s:
    """Of every node and the neighbours that are read of it."""
    sizes = graph.text_bytes(indices)
    near = np.array([neighbor for some in read for neighbor in some], dtype=np.int64)
    of = np.repeat(np.arange(len(read)), [len(some) for some in read])
    np.add.at(sizes, of, graph.text_bytes(near))
    return sizes


def _named(graph: Graph, allowed: set[int], named: Sequence[NodeId], place: int) -> list[int]:
    try:
        chosen = graph.indices_of(named)
    except UnknownNodeError as error:
        raise NodeInputError(
            f"neighbors[{place}][{error.position}]", f"the graph has no node {error.node_id!r:.80}"
        ) from None
    for position, index in enumerate(chosen):
        if index not in allowed:
            raise NodeInputError(
                f"neighbors[{place}][{position}]",
                f"{named[position]!r:.80} is no neighbour of this node, or is named twice",
            )
        allowed.remove(index)
    return chosen
