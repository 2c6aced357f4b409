"""Where the nodes of an enrichment come from: what a prompt reads of a graph's nodes."""

from collections.abc import Sequence

from graph.catalog import Prompt
from graph.enrich import EnrichNode
from graph.store import Graph


def nodes_of_graph(graph: Graph, indices: Sequence[int], prompt: Prompt) -> tuple[EnrichNode, ...]:
    """Nodes with as many neighbours as the prompt reads: the first in the order of the upload, direction aside."""
    ids, texts = graph.ids(indices), graph.texts(indices)
    return tuple(
        EnrichNode(
            id=node_id,
            text=text,
            neighbors=tuple(graph.texts(graph.neighbors(index)[: prompt.max_neighbors])),
        )
        for node_id, index, text in zip(ids, indices, texts, strict=True)
    )
