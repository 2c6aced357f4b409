"""Where the nodes of an enrichment come from: what a prompt reads of a graph's nodes."""

from collections.abc import Mapping, Sequence

from graph.catalog import Prompt
from graph.enrich_types import EnrichNode
from graph.generation import training_classes, training_labels
from graph.store import Graph, NodeId, UnknownNodeError


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
        NodeInputError: a list is not of the nodes' number, or names a node that is no neighbour.
    """
    for name, given in (("neighbors", neighbors), ("node_variables", variables)):
        if given is not None and len(given) != len(indices):
            raise NodeInputError(name, f"needs one item per node, got {len(given)}")
    nodes = []
    for place, (index, node_id, text) in enumerate(
        zip(indices, graph.ids(indices), graph.texts(indices), strict=True)
    ):
        if neighbors is None:
            near: list[int] = graph.neighbors(index)[: prompt.max_neighbors].tolist()
        else:
            named = _named(graph, set(graph.neighbors(index).tolist()), neighbors[place], place)
            near = named[: prompt.max_neighbors]
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


def classes_of_graph(graph: Graph, prompt: Prompt) -> tuple[str, ...]:
    """The labels of its training nodes, if the prompt reads classes."""
    return training_classes(graph) if "classes" in prompt.inputs else ()


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
