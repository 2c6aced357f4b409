"""Quotas: seats against the sequential rule, communities that were planted, labels that must not steer."""

from collections import Counter
from fractions import Fraction
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graph.selection.communities import find_best, find_communities
from graph.selection.quotas import Groups, divide
from graph.store import Graph, GraphStore, NodeId
from tests.graph.graphs import OWNER, columns, create, stored
from tests.graph.selection.test_select import pick


def naive_seats(order: list[int], groups: list[int], shares: str) -> list[int]:
    """Seat by seat: the group with the greatest weight / (2 taken + 1) sends its best node; ties to the better node."""
    weights = Counter(groups) if shares == "proportional" else Counter(set(groups))
    waiting = {g: [node for node in order if groups[node] == g] for g in set(groups)}
    taken = dict.fromkeys(waiting, 0)
    seated: list[int] = []
    while any(waiting.values()):
        group = max(
            (g for g in waiting if waiting[g]),
            key=lambda g: (
                Fraction(weights[g], 2 * taken[g] + 1),
                -order.index(waiting[g][0]),
            ),
        )
        seated.append(waiting[group].pop(0))
        taken[group] += 1
    return seated


@pytest.mark.parametrize("shares", ["proportional", "equal"])
@pytest.mark.parametrize("num_nodes", [1, 2, 13, 60])
def test_seats_equal_the_sequential_rule(num_nodes: int, shares: str) -> None:
    rng = np.random.default_rng(num_nodes)
    _, groups = np.unique(
        rng.choice(5, num_nodes, p=[0.5, 0.3, 0.1, 0.06, 0.04]), return_inverse=True
    )
    order = rng.permutation(num_nodes)
    names: list[NodeId | None] = list(range(int(groups.max()) + 1))
    found = divide(order, Groups(of_N=groups, names=names), shares)
    assert found.tolist() == naive_seats(order.tolist(), groups.tolist(), shares)


def labelled(folder: Path, labels: list[Any], splits: list[Any], **options: Any) -> Graph:
    store = GraphStore(folder)
    create(store, columns(list(range(len(labels))), [], labels=labels, splits=splits), **options)
    return store.get(options.get("graph_id", "graph-1"), OWNER)


def shares(graph: Graph, nodes: int, **options: Any) -> dict[NodeId | None, tuple[int, int]]:
    selection = pick(graph, "degree", {"nodes": nodes}, **options)
    assert selection.quotas is not None
    assert sum(share.num_selected for share in selection.quotas) == len(selection.indices)
    return {share.name: (share.num_selected, share.num_nodes) for share in selection.quotas}


def test_quotas_per_class_by_hand(tmp_path: Path) -> None:
    graph = labelled(tmp_path, ["x"] * 60 + ["y"] * 30 + ["z"] * 10, ["train"] * 100)
    proportional = shares(graph, 20, quotas={"per": "class"})
    assert proportional == {"x": (12, 60), "y": (6, 30), "z": (2, 10)}
    equal = shares(graph, 21, quotas={"per": "class", "shares": "equal"})
    assert equal == {"x": (7, 60), "y": (7, 30), "z": (7, 10)}
    # z has no more than 10: the rest goes to the others
    assert shares(graph, 40, quotas={"per": "class", "shares": "equal"})["z"] == (10, 10)
    assert sum(taken for taken, _ in shares(graph, 100, quotas={"per": "class"}).values()) == 100


def test_within_a_class_the_strategy_decides(tmp_path: Path) -> None:
    store = GraphStore(tmp_path)
    texts = ["xxxx", "xxx", "yy", "y"]
    create(store, columns(list("abcd"), [], texts=texts, labels=list("xxyy"), splits=["train"] * 4))
    graph = store.get("graph-1", OWNER)
    quotas = {"per": "class"}
    assert graph.ids(pick(graph, "text_length", {"nodes": 2}, quotas=quotas).indices) == ["d", "b"]
    high = pick(graph, "text_length", {"nodes": 2}, quotas=quotas, order="high")
    assert graph.ids(high.indices) == ["a", "c"]


def test_nodes_without_a_training_label_are_one_group(tmp_path: Path) -> None:
    labels = ["x", "y", "x", "y", None, "x"]
    splits = ["train", "train", "val", "test", "train", None]
    graph = labelled(tmp_path, labels, splits)
    found = shares(graph, 6, quotas={"per": "class"})
    assert found == {"x": (1, 1), "y": (1, 1), None: (4, 4)}


def test_labels_of_validation_and_test_nodes_steer_nothing(tmp_path: Path) -> None:
    """Whatever those labels are, the selection is the same; a training label changes it."""
    rng = np.random.default_rng(0)
    splits = ["train", "val", "test", None] * 20
    labels: list[Any] = [f"class-{i}" for i in rng.integers(3, size=80)]
    strategies: list[dict[str, Any]] = [
        {"strategy": "random", "quotas": {"per": "class", "shares": "equal"}},
        {"strategy": "clustering_distance", "quotas": {"per": "class"}},
        {"strategy": "mix", "mix": [{"strategy": "degree", "weight": 1.0}], "quotas": {"per": "class"}},
    ]  # fmt: skip
    features = rng.standard_normal((80, 4))

    def selected(number: int, labels: list[Any]) -> list[list[int]]:
        store = GraphStore(tmp_path)
        parts = columns(
            list(range(80)), [], labels=labels, splits=splits, features=features.tolist()
        )
        graph_id = f"graph-{number}"
        create(store, parts, graph_id=graph_id)
        graph = store.get(graph_id, OWNER)
        return [pick(graph, budget={"nodes": 12}, **s).indices.tolist() for s in strategies]

    first = selected(0, labels)
    hidden = [i for i, split in enumerate(splits) if split != "train"]
    others: list[Any] = ["class-0", "class-1", "class-2", "unseen", None]
    for number in range(1, 5):
        changed = list(labels)
        for index in hidden:
            changed[index] = others[int(rng.integers(len(others)))]
        assert selected(number, changed) == first
    changed = ["class-0" if i not in hidden else label for i, label in enumerate(labels)]
    assert selected(9, changed) != first


# Communities


def planted(sizes: list[int], seed: int, bridges: int) -> tuple[list[tuple[int, int]], list[int]]:
    """Dense groups, few edges between them, nodes shuffled; the edges and the group of every node."""
    rng = np.random.default_rng(seed)
    place = rng.permutation(sum(sizes))
    of = np.empty(sum(sizes), dtype=int)
    of[place] = np.repeat(np.arange(len(sizes)), sizes)
    edges = []
    for group in range(len(sizes)):
        members = np.flatnonzero(of == group).tolist()
        edges += [pair for pair in combinations(members, 2) if rng.random() < 0.7]
    edges += [(int(a), int(b)) for a, b in rng.integers(sum(sizes), size=(bridges, 2))]
    return edges, of.tolist()


@pytest.mark.parametrize("seed", range(5))
def test_planted_communities_are_found(tmp_path: Path, seed: int) -> None:
    edges, of = planted([20, 30, 12], seed, bridges=8)
    graph = stored(tmp_path, list(range(len(of))), edges)
    found = find_communities(graph, seed).tolist()
    assert len(set(zip(found, of, strict=True))) == 3  # one to one
    assert all(found.index(name) == name for name in set(found))  # named by the first node
    assert find_communities(graph, seed).tolist() == found


def naive_best(graph: Graph, node: int, own: list[int], preference: list[int]) -> int:
    """Most neighbours; of equals the node's own, then the most preferred."""
    counts = Counter(own[other] for other in graph.neighbors(node).tolist())
    if not counts:
        return own[node]
    best: int = max(counts, key=lambda c: (counts[c], c == own[node], preference[c]))
    return best


@pytest.mark.parametrize("seed", range(4))
def test_the_best_community_equals_the_loop(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    edges = [(int(s), int(t)) for s, t in rng.integers(0, 40, (60, 2))]
    graph = stored(tmp_path, list(range(40)), edges)
    own = rng.integers(6, size=40)  # few communities: many ties
    preference = rng.permutation(40)
    found = own.copy()
    sources = np.repeat(np.arange(40), graph.degrees)
    find_best(found, sources, graph.indices.astype(np.int64), own, preference)
    naive = [naive_best(graph, node, own.tolist(), preference.tolist()) for node in range(40)]
    assert found.tolist() == naive


def test_when_it_settles_every_node_is_with_most_of_its_neighbours(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    edges = [(int(s), int(t)) for s, t in rng.integers(0, 50, (90, 2))]
    graph = stored(tmp_path, list(range(50)), edges)
    found = find_communities(graph, 1)
    for node in range(50):
        counts = Counter(found[graph.neighbors(node)].tolist())
        assert not counts or counts[found[node]] == max(counts.values())


def test_a_pair_settles_and_an_isolated_node_stays_alone(tmp_path: Path) -> None:
    """Two nodes that swapped their communities at once would swap for ever."""
    graph = stored(tmp_path, list("abcd"), [("a", "b")])
    for seed in range(10):
        assert find_communities(graph, seed).tolist() == [0, 0, 2, 3]
    assert find_communities(stored(tmp_path / "x", ["a"], []), 0).tolist() == [0]


def test_a_bipartite_graph_settles(tmp_path: Path) -> None:
    edges = [(left, right) for left in range(6) for right in range(6, 12)]
    graph = stored(tmp_path, list(range(12)), edges)
    assert len(set(find_communities(graph, 0).tolist())) == 1


def test_quotas_per_community(tmp_path: Path) -> None:
    edges, of = planted([40, 20, 10], 0, bridges=4)
    graph = stored(tmp_path, list(range(70)), edges)
    quotas = {"per": "community"}
    selection = pick(graph, "random", {"fraction": 0.2}, quotas=quotas, seed=3)
    assert Counter(of[i] for i in selection.indices) == {0: 8, 1: 4, 2: 2}
    assert selection.quotas is not None
    assert sum(share.num_selected for share in selection.quotas) == 14
    for share in selection.quotas:
        assert share.name == of.index(of[share.name])  # type: ignore[index]
    by_degree = pick(graph, "degree", {"nodes": 1}, quotas=quotas)
    assert by_degree.seed == 0  # of the communities
