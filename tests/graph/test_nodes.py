"""What is read of a graph for an enrichment, and how much of it at once."""

from pathlib import Path
from typing import Any

import pytest

from graph import nodes
from graph.catalog import default_catalog
from graph.generation import PromptInputError
from graph.nodes import NodeInputError, classes_of_graph, nodes_of_graph, num_at_once
from graph.store import Graph, GraphStore
from tests.graph.graphs import OWNER, columns, create

TEXTS = ["", "abc", "äöü", "x" * 10]
DIGEST = default_catalog().get("digest@1")
SUMMARY = default_catalog().get("summary@1")


def graph_of(folder: Path, **parts: Any) -> Graph:
    store = GraphStore(folder / "graphs")
    edges = [(0, 1), (1, 2), (2, 3)]
    info = create(store, columns(range(4), edges, texts=TEXTS, **parts))
    return store.get(info.id, OWNER)


def test_bytes_of_texts(tmp_path: Path) -> None:
    graph = graph_of(tmp_path)
    assert graph.text_bytes([3, 0, 2, 2]).tolist() == [10, 0, 6, 6]
    assert graph.text_bytes([]).tolist() == []


def test_more_text_than_is_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = graph_of(tmp_path)
    monkeypatch.setattr(nodes, "MAX_TEXT_BYTES_AT_ONCE", 19)
    assert len(nodes_of_graph(graph, range(4), SUMMARY)) == 4
    assert len(nodes_of_graph(graph, [0, 1], DIGEST)) == 2  # 0 + 3, 3 + 0 + 6
    with pytest.raises(NodeInputError, match="are 28 bytes, at most 19") as caught:
        nodes_of_graph(graph, [0, 1, 3], DIGEST)
    assert caught.value.param == "node_ids"
    with pytest.raises(NodeInputError, match="are 25 bytes"):
        nodes_of_graph(graph, [3, 1], DIGEST, neighbors=[[2], [0, 2]])
    assert len(nodes_of_graph(graph, [3, 1], DIGEST, neighbors=[[2], [0]])) == 2


def test_how_many_are_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = graph_of(tmp_path)
    assert num_at_once(graph, range(4), DIGEST) == 4
    for limit, number in ((0, 1), (11, 1), (12, 2), (30, 2), (31, 3), (47, 4)):
        monkeypatch.setattr(nodes, "MAX_TEXT_BYTES_AT_ONCE", limit)
        assert num_at_once(graph, range(4), DIGEST) == number, limit


def test_a_graph_of_too_many_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = graph_of(tmp_path, labels=list("abcd"), splits=["train", "train", "train", "test"])
    prompt = default_catalog().get("pseudo_label@1")
    assert classes_of_graph(graph, prompt) == ("a", "b", "c")
    monkeypatch.setattr(nodes, "MAX_CLASSES", 2)
    with pytest.raises(PromptInputError, match="have 3 labels, a prompt reads at most 2") as caught:
        classes_of_graph(graph, prompt)
    assert caught.value.param == "classes"
    assert classes_of_graph(graph, SUMMARY) == ()
