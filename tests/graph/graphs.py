"""Small graphs for the tests, written as one would write them down."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from graph.store import Graph, GraphColumns, GraphInfo, GraphStore, NodeId

OWNER = "tenant-a"


def columns(
    ids: Sequence[NodeId],
    edges: Sequence[tuple[NodeId, NodeId]],
    *,
    texts: Sequence[str] | None = None,
    labels: Sequence[Any] | None = None,
    splits: Sequence[str | None] | None = None,
    features: Any = None,
) -> GraphColumns:
    return GraphColumns(
        ids=pa.array(ids),
        texts=pa.array(texts if texts is not None else [f"text of {i}" for i in ids], pa.string()),
        sources=pa.array([source for source, _ in edges]),
        targets=pa.array([target for _, target in edges]),
        labels=None if labels is None else pa.array(labels),
        splits=None if splits is None else pa.array(splits, pa.string()),
        features=None if features is None else pa.array(features),
    )


def create(store: GraphStore, parts: GraphColumns, **options: Any) -> GraphInfo:
    settings = {"name": "g", "owner": OWNER, "request_hash": "hash", **options}
    graph_id = settings.pop("graph_id", "graph-1")
    return store.create(graph_id, parts, **settings)[0]


def stored(
    folder: Path,
    ids: Sequence[NodeId],
    edges: Sequence[tuple[NodeId, NodeId]],
    **options: Any,
) -> Graph:
    store = GraphStore(folder)
    info = create(store, columns(ids, edges), **options)
    return store.get(info.id, OWNER)
