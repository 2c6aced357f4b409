"""Distance to the cluster's centre: by hand, against a loop, and a k-means whose objective never rises."""

from pathlib import Path

import numpy as np
import pytest
from scipy.cluster.vq import kmeans2
from scipy.spatial.distance import cdist

from graph.selection.clustering import (
    assign,
    cluster_distances,
    mean_centres,
    mini_batch_centres,
    start_centres,
)
from graph.selection.request import MAX_CLUSTERS, SelectError
from graph.store import Graph, GraphStore
from tests.graph.graphs import OWNER, columns, create
from tests.graph.selection.test_select import pick


def blobs(
    num_nodes: int, num_clusters: int, dim: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Points around far-apart centres, and which centre each is of."""
    rng = np.random.default_rng(seed)
    own = rng.integers(num_clusters, size=num_nodes)
    centres = 20 * rng.standard_normal((num_clusters, dim))
    return (centres[own] + rng.standard_normal((num_nodes, dim))).astype(np.float32), own


def naive_assign(vectors: np.ndarray, centres: np.ndarray) -> tuple[list[int], list[float]]:
    own, squares = [], []
    for vector in vectors:
        distances = [
            sum((float(a) - float(b)) ** 2 for a, b in zip(vector, centre, strict=True))
            for centre in centres
        ]
        own.append(distances.index(min(distances)))
        squares.append(min(distances))
    return own, squares


def with_features(folder: Path, features: np.ndarray, **options: object) -> Graph:
    store = GraphStore(folder)
    ids = list(range(len(features)))
    create(store, columns(ids, [], features=features.tolist(), **options))  # type: ignore[arg-type]
    return store.get("graph-1", OWNER)


@pytest.mark.parametrize(("num_nodes", "num_clusters", "dim"), [(1, 1, 1), (17, 3, 5), (9, 9, 2)])
def test_assignment_equals_the_loop(num_nodes: int, num_clusters: int, dim: int) -> None:
    rng = np.random.default_rng(1)
    vectors = rng.standard_normal((num_nodes, dim)).astype(np.float32)
    centres = rng.standard_normal((num_clusters, dim))
    own, squares = assign(vectors, centres)
    naive_own, naive_squares = naive_assign(vectors, centres)
    assert own.tolist() == naive_own
    assert squares.tolist() == pytest.approx(naive_squares)


def test_rows_are_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, _ = blobs(101, 4, 3)
    centres = start_centres(vectors, 4, np.random.default_rng(0))
    whole = assign(vectors, centres)
    means = mean_centres(vectors, whole[0], centres)
    monkeypatch.setattr("graph.selection.clustering._ROWS", 7)
    assert [part.tolist() for part in assign(vectors, centres)] == [p.tolist() for p in whole]
    assert np.abs(mean_centres(vectors, whole[0], centres) - means).max() < 1e-12


def test_the_objective_never_rises() -> None:
    rng = np.random.default_rng(5)
    vectors = rng.standard_normal((400, 6)).astype(np.float32)  # no clusters: many steps
    centres = start_centres(vectors, 12, rng)
    own, squares = assign(vectors, centres)
    objectives = [squares.sum()]
    for _ in range(25):
        centres = mean_centres(vectors, own, centres)
        own, squares = assign(vectors, centres)
        objectives.append(squares.sum())
    steps = np.diff(objectives)
    assert (steps <= 1e-9).all()
    assert (steps < -0.1).sum() > 5


def test_mini_batches_lower_it_too() -> None:
    vectors = np.random.default_rng(6).standard_normal((3000, 8)).astype(np.float32)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        centres = start_centres(vectors, 10, rng)
        settled = mini_batch_centres(vectors, centres, rng)
        before, after = (assign(vectors, c)[1].sum() for c in (centres, settled))
        assert after < 0.9 * before


@pytest.mark.parametrize("seed", range(3))
def test_as_good_as_scipys(seed: int) -> None:
    """Sum of squared distances, on data without clear clusters, beside the best of ten runs of scipy's."""
    vectors = np.random.default_rng(9).standard_normal((600, 4)).astype(np.float32)
    ours = (cluster_distances(vectors, 6, seed) ** 2).sum()
    theirs = min(
        (cdist(vectors, kmeans2(vectors, 6, minit="++", rng=s)[0]).min(axis=1) ** 2).sum()
        for s in range(10)
    )
    assert ours < 1.05 * theirs


def test_one_cluster_is_the_distance_to_the_mean() -> None:
    vectors = np.array([[0, 0], [4, 0], [0, 4], [4, 4], [2, 2]], dtype=np.float32)
    assert cluster_distances(vectors, 1, seed=3).tolist() == pytest.approx([8**0.5] * 4 + [0])


def test_mini_batches_make_the_mean_of_what_they_drew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graph.selection.clustering.NUM_BATCHES", 3)
    monkeypatch.setattr("graph.selection.clustering.BATCH", 5)
    vectors = np.random.default_rng(2).standard_normal((20, 3)).astype(np.float32)
    centre = mini_batch_centres(vectors, np.full((1, 3), 9.0), np.random.default_rng(7))
    rng = np.random.default_rng(7)
    drawn = np.concatenate([vectors[rng.integers(20, size=5)] for _ in range(3)])
    assert np.abs(centre[0] - drawn.astype(np.float64).mean(axis=0)).max() < 1e-12


def test_planted_clusters_are_found() -> None:
    vectors, own = blobs(500, 5, 16)
    found = cluster_distances(vectors, 5, seed=0)
    means = np.stack([vectors[own == k].astype(np.float64).mean(axis=0) for k in range(5)])
    expected = np.sqrt(((vectors - means[own]) ** 2).sum(axis=1))
    assert np.abs(found - expected).max() < 1e-9


def test_an_empty_cluster_keeps_its_centre() -> None:
    vectors = np.zeros((4, 2), dtype=np.float32)
    centres = np.array([[0.0, 0.0], [9.0, 9.0]])
    own, _ = assign(vectors, centres)
    assert mean_centres(vectors, own, centres).tolist() == centres.tolist()


def test_points_that_are_all_alike() -> None:
    vectors = np.ones((6, 3), dtype=np.float32)
    assert cluster_distances(vectors, 4, seed=0).tolist() == [0.0] * 6


def test_as_many_clusters_as_nodes() -> None:
    vectors = np.arange(5, dtype=np.float32)[:, None] * 10
    assert cluster_distances(vectors, 5, seed=0).tolist() == [0.0] * 5


def test_outliers_first_and_seeded(tmp_path: Path) -> None:
    vectors, _ = blobs(60, 3, 4)
    vectors[41] += 8
    graph = with_features(tmp_path, vectors)
    found = pick(graph, "clustering_distance", {"nodes": 3}, num_clusters=3)
    assert found.indices[0] == 41
    assert (found.order, found.seed, found.num_clusters) == ("high", 0, 3)
    assert (np.diff(found.scores) <= 0).all()
    again = pick(graph, "clustering_distance", {"nodes": 3}, num_clusters=3, seed=0)
    assert again.indices.tolist() == found.indices.tolist()
    middle = pick(graph, "clustering_distance", {"nodes": 1}, num_clusters=3, order="low")
    assert middle.scores[0] < found.scores[-1]


def test_as_many_clusters_as_classes_of_training_nodes(tmp_path: Path) -> None:
    vectors, _ = blobs(6, 2, 2)
    labels = ["x", "x", "y", "z", "w", None]
    splits = ["train", "train", "train", "val", "test", None]
    graph = with_features(tmp_path, vectors, labels=labels, splits=splits)
    assert pick(graph, "clustering_distance", {"nodes": 1}).num_clusters == 2


def test_more_classes_than_clusters_may_be(tmp_path: Path) -> None:
    size = MAX_CLUSTERS + 1
    labels = [f"class {i}" for i in range(size)]
    graph = with_features(tmp_path, np.ones((size, 1)), labels=labels, splits=["train"] * size)
    with pytest.raises(SelectError, match="at most 512, got 513") as caught:
        pick(graph, "clustering_distance", {"nodes": 1})
    assert caught.value.param == "num_clusters"


@pytest.mark.parametrize("num_clusters", [None, 7])
def test_numbers_of_clusters_that_cannot_be(tmp_path: Path, num_clusters: int | None) -> None:
    graph = with_features(tmp_path, np.ones((6, 2)), labels=["x"] * 6)  # labels without splits
    with pytest.raises(SelectError) as caught:
        pick(graph, "clustering_distance", {"nodes": 1}, num_clusters=num_clusters)
    assert caught.value.param == "num_clusters"
