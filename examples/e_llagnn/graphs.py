"""Graphs with node texts and labels: Cora from files, and Debian's packages from this machine's apt.

Cora is research data that Lathe does not ship: `--path` names a folder with nodes.jsonl.gz (id, title, text, label,
label_name, split, split_60_20_20) and edges.csv.gz (src, dst). Edges are undirected here, whatever they were.
"""

import csv
import gzip
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from graph.debian import load_graph

Indices = npt.NDArray[np.int64]
FEW_PER_CLASS = 20
FEW_SHARE = 0.4
"""Most of a small class that may be for training in the split with few labels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Node indices; the three do not overlap."""

    train: Indices
    val: Indices
    test: Indices


@dataclass(frozen=True, slots=True, kw_only=True)
class TextGraph:
    """Attributes: labels: a number per node, of `classes`. edges: (num_edges, 2), each once. splits: by name."""

    name: str
    ids: list[str | int]
    texts: list[str]
    labels: Indices
    classes: list[str]
    edges: Indices
    splits: dict[str, Split]

    def __len__(self) -> int:
        return len(self.ids)

    def digest(self) -> str:
        """Of texts, edges, labels and splits: graphs of one name may differ in all of them."""
        content = json.dumps(asdict(self), default=lambda array: array.tolist(), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


def load_cora(folder: Path) -> TextGraph:
    """The Planetoid public split, and the folder's own 60/20/20."""
    with gzip.open(folder / "nodes.jsonl.gz", "rt") as file:
        nodes = [json.loads(line) for line in file]
    with gzip.open(folder / "edges.csv.gz", "rt") as file:
        edges = [(int(row["src"]), int(row["dst"])) for row in csv.DictReader(file)]
    names = {node["label"]: node["label_name"].replace("_", " ") for node in nodes}
    return TextGraph(
        name="cora",
        ids=[node["id"] for node in nodes],
        texts=[f"{node['title']}. {node['text']}" for node in nodes],
        labels=np.array([node["label"] for node in nodes]),
        classes=[names[label] for label in range(len(names))],
        edges=np.array(edges),
        splits={
            "public": _named_split(nodes, "split"),
            "60/20/20": _named_split(nodes, "split_60_20_20"),
        },
    )


def _named_split(nodes: Sequence[dict[str, Any]], field: str) -> Split:
    parts = np.array([node[field] for node in nodes])
    return Split(**{part: np.flatnonzero(parts == part) for part in ("train", "val", "test")})


def load_debian(num_nodes: int) -> TextGraph:
    """A connected part of Debian's packages; the class of one is its section."""
    body, origin = load_graph(num_nodes)
    ids = [node["id"] for node in body["nodes"]]
    place = {node_id: index for index, node_id in enumerate(ids)}
    sections = [node["label"] for node in body["nodes"]]
    classes = sorted(set(sections))
    labels = np.array([classes.index(section) for section in sections])
    edges = {tuple(sorted((place[a], place[b]))) for a, b in body["edges"]}
    return TextGraph(
        name=f"debian-{len(ids)} ({origin})",
        ids=ids,
        texts=[node["text"] for node in body["nodes"]],
        labels=labels,
        classes=classes,
        edges=np.array(sorted(edges)),
        splits={"20 per class": few_labels(labels), "60/20/20": stratified(labels)},
    )


def stratified(labels: Indices, seed: int = 0) -> Split:
    """60, 20 and 20 % of every class."""
    return _by_class(labels, seed, lambda size: round(0.6 * size), val_share=0.5)


def few_labels(labels: Indices, seed: int = 0) -> Split:
    """20 nodes of every class to train with, fewer of a small class; a third of the rest is for validation."""
    return _by_class(
        labels, seed, lambda size: min(FEW_PER_CLASS, round(FEW_SHARE * size)), val_share=1 / 3
    )


def _by_class(labels: Indices, seed: int, num_train: Any, *, val_share: float) -> Split:
    random = np.random.default_rng(seed)
    parts: dict[str, list[Indices]] = {"train": [], "val": [], "test": []}
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        first = num_train(len(members))
        second = first + round(val_share * (len(members) - first))
        parts["train"].append(members[:first])
        parts["val"].append(members[first:second])
        parts["test"].append(members[second:])
    return Split(**{name: np.sort(np.concatenate(found)) for name, found in parts.items()})
