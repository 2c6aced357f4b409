"""The graph store: hand-worked CSR, every refusal by its place, and creation that is whole or not at all."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from graph.selection.structure import pagerank
from graph.store import (
    GraphConflictError,
    GraphInputError,
    GraphNotFoundError,
    GraphStore,
    NodeId,
    UnknownNodeError,
)
from tests.graph.graphs import OWNER, columns, create, stored

LETTERS = ["a", "b", "c", "d"]


def test_csr_by_hand(tmp_path: Path) -> None:
    # b - a - c, b - c twice (once backwards), a loop on c, d alone
    edges = [("b", "a"), ("a", "c"), ("b", "c"), ("c", "b"), ("c", "c")]
    graph = stored(tmp_path, LETTERS, edges)
    assert graph.indptr.tolist() == [0, 2, 4, 6, 6]
    assert graph.indices.tolist() == [1, 2, 0, 2, 0, 1]
    assert graph.edges.tolist() == [[0, 1], [0, 2], [1, 2]]
    assert graph.degrees.tolist() == [2, 2, 2, 0]
    assert graph.neighbors(1).tolist() == [0, 2]
    info = graph.info
    assert (info.num_nodes, info.num_edges) == (4, 3)
    assert (info.num_self_loops, info.num_duplicate_edges) == (1, 1)


def test_directed_graph_keeps_both_directions(tmp_path: Path) -> None:
    graph = stored(
        tmp_path, LETTERS, [("b", "a"), ("a", "b"), ("b", "a"), ("c", "a")], directed=True
    )
    assert graph.edges.tolist() == [[0, 1], [1, 0], [2, 0]]
    assert graph.info.num_duplicate_edges == 1
    assert graph.indices.tolist() == [1, 2, 0, 0]  # the undirected view has a-b once


def test_csr_equals_a_naive_one_on_random_edges(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    ids = [f"n{i}" for i in rng.permutation(37)]
    edges = [(ids[s], ids[t]) for s, t in rng.integers(0, 37, (200, 2))]
    graph = stored(tmp_path, ids, edges)
    for index, node_id in enumerate(ids):
        expected = {t for s, t in edges if s == node_id} | {s for s, t in edges if t == node_id}
        found = graph.ids(graph.neighbors(index))
        assert set(found) == expected - {node_id}
        assert len(found) == len(set(found))


def test_without_edges(tmp_path: Path) -> None:
    graph = stored(tmp_path, ["only"], [])
    assert graph.info.num_edges == 0
    assert graph.indptr.tolist() == [0, 0]


@pytest.mark.parametrize("ids", [["é", "a", "z", "\U0001f600", "ab", "\uffff"], [5, -3, 2**62, 0]])
def test_nodes_are_found_by_id(tmp_path: Path, ids: list[NodeId]) -> None:
    graph = stored(tmp_path, ids, [])
    assert graph.indices_of(ids) == list(range(len(ids)))
    assert graph.ids([2, 0]) == [ids[2], ids[0]]
    assert graph.texts([1]) == [f"text of {ids[1]}"]


@pytest.mark.parametrize("unknown", ["5", "zz", True, 6, 2**70])
def test_unknown_node(tmp_path: Path, unknown: NodeId) -> None:
    graph = stored(tmp_path, [5, 7], [])
    with pytest.raises(UnknownNodeError) as caught:
        graph.indices_of([7, unknown])
    assert caught.value.position == 1


@pytest.mark.parametrize("labels", [["x", "y", None, "x", "z"], [3, 1, None, 3, 2]])
def test_training_labels_are_those_of_the_training_split(
    tmp_path: Path, labels: list[NodeId | None]
) -> None:
    store = GraphStore(tmp_path)
    splits = ["train", "val", "train", None, "test"]
    create(store, columns(list("abcde"), [], labels=labels, splits=splits))
    graph = store.get("graph-1", OWNER)
    assert graph.training_labels().to_pylist() == [labels[0], None, None, None, None]
    assert graph.training_labels([4, 0, 0]).to_pylist() == [None, labels[0], labels[0]]
    assert graph.training_labels([]).to_pylist() == []
    unlabelled = stored(tmp_path, ["a"], [], graph_id="graph-2")
    assert unlabelled.training_labels().to_pylist() == [None]


def test_labels_splits_and_empty_texts_are_kept(tmp_path: Path) -> None:
    store = GraphStore(tmp_path)
    parts = columns(
        LETTERS,
        [],
        texts=["", "x", "y", "z"],
        labels=[3, None, 1, 1],
        splits=["train", None, "val", "test"],
    )
    info = create(store, parts)
    nodes = store.get(info.id, OWNER).nodes
    assert nodes.column("label").to_pylist() == [3, None, 1, 1]
    assert nodes.column("split").to_pylist() == ["train", None, "val", "test"]
    assert nodes.column("text").to_pylist() == ["", "x", "y", "z"]
    assert (info.has_labels, info.has_splits) == (True, True)


BAD = [
    (columns([], []), "nodes", "at least one node"),
    (columns(["a", "b", "c", "b"], []), "nodes[3].id", "nodes[1] and nodes[3]"),
    (columns([7, 8, 7], []), "nodes[2].id", "node id 7"),
    (columns(["a", ""], []), "nodes[1].id", "1 to 256 bytes, got 0"),
    (columns(["a", "b" * 257], []), "nodes[1].id", "got 257"),
    (columns(["a", None], []), "nodes[1].id", "no id"),  # type: ignore[list-item]
    (columns([1.5, 2.5], []), "nodes", "double"),  # type: ignore[list-item]
    (columns(["a"], [], texts=["x" * (2**20 + 1)]), "nodes[0].text", "1048576 bytes, got 1048577"),
    (columns(["a"], [], splits=["validation"]), "nodes[0].split", "train, val, test"),
    (columns(["a"], [], labels=[1.5]), "nodes", "labels"),
    (columns(["a", "b"], [], labels=[None, "x" * 257]), "nodes[1].label", "256 characters, got 257"),
    (columns(LETTERS, [("a", "b"), ("a", "zz")]), "edges[1]", "'zz'"),
    (columns(LETTERS, [("zz", "b")]), "edges[0]", "'zz'"),
    (columns(LETTERS, [("a", "b"), ("a", None)]), "edges[1]", "nothing"),  # type: ignore[list-item]
    (columns(LETTERS, [(1, 2)]), "edges", "integers"),
    (columns(["a", "b"], [], features=[[1.0, 2.0], [1.0]]), "nodes[1].features", "node 'b' are 1 numbers"),
    (columns([7, 8], [], features=[[1.0], [float("nan")]]), "nodes[1].features", "node 8 must be finite"),
    (columns(["a", "b"], [], features=[[1.0, float("-inf")], [1.0, 2.0]]), "nodes[0].features", "number at 1"),
    (columns(["a"], [], features=[[1e39]]), "nodes[0].features", "finite in float32"),
    (columns(["a", "b"], [], features=[None, [1.0]]), "nodes[0].features", "missing"),
    (columns(["a"], [], features=[[None, 1.0]]), "nodes[0].features", "number at 0"),
    (columns(["a"], [], features=pa.array([[]], pa.list_(pa.float32()))), "nodes[0].features", "got 0"),
    (columns(["a"], [], features=[[0.5] * 16_385]), "nodes[0].features", "got 16385"),
    (columns(["a"], [], features=[["1.0"]]), "nodes", "lists of numbers, got list<"),
    (columns(["a"], [], features=[[True]]), "nodes", "lists of numbers"),
    (columns(["a"], [], features=[1.0]), "nodes", "lists of numbers, got double"),
]  # fmt: skip


@pytest.mark.parametrize(("parts", "param", "words"), BAD)
def test_what_is_no_graph(tmp_path: Path, parts: object, param: str, words: str) -> None:
    with pytest.raises(GraphInputError) as caught:
        create(GraphStore(tmp_path), parts)  # type: ignore[arg-type]
    assert caught.value.param == param
    assert words in caught.value.message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", "x" * 201, "a\nb"])
def test_bad_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(GraphInputError, match="name"):
        create(GraphStore(tmp_path), columns(["a"], []), name=name)


def test_content_hash_is_of_the_content(tmp_path: Path) -> None:
    store = GraphStore(tmp_path)
    edges = [("a", "b"), ("b", "c")]

    def content_hash(number: int, parts: object, **options: object) -> str:
        return create(store, parts, graph_id=f"graph-{number}", **options).content_hash  # type: ignore[arg-type]

    first = content_hash(1, columns(LETTERS, edges))
    assert first == content_hash(2, columns(LETTERS, [*reversed(edges), ("b", "a")]), name="other")
    different = [
        content_hash(3, columns(LETTERS, edges), directed=True),
        content_hash(4, columns(LETTERS, edges[:1])),
        content_hash(5, columns(LETTERS, edges, texts=["ab", "c", "", ""])),
        content_hash(6, columns(LETTERS, edges, texts=["a", "bc", "", ""])),
        content_hash(7, columns(LETTERS, edges, labels=["x", None, None, None])),
        content_hash(8, columns(LETTERS, edges, labels=["x", "", None, None])),
    ]
    assert len({first, *different}) == 7


def test_content_hash_does_not_depend_on_slices(tmp_path: Path) -> None:
    store = GraphStore(tmp_path)
    whole = columns(["x", *LETTERS], [])
    sliced = columns(LETTERS, [])
    sliced = type(sliced)(
        ids=whole.ids[1:], texts=whole.texts[1:], sources=sliced.sources, targets=sliced.targets
    )
    assert (
        create(store, sliced).content_hash
        == create(store, columns(LETTERS, []), graph_id="graph-2").content_hash
    )


FEATURES = [[0.5, -1.0, 3.0], [0.0, 1e-30, 65504.0], [1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]


def test_features_are_kept_in_float32_and_memory_mapped(tmp_path: Path) -> None:
    store = GraphStore(tmp_path)
    info = create(store, columns(LETTERS, [("a", "b")], features=FEATURES))
    assert info.feature_dim == 3
    features = store.get(info.id, OWNER).features
    assert isinstance(features, np.memmap)
    assert features.dtype == np.float32
    assert features.tolist() == np.array(FEATURES, dtype=np.float32).tolist()
    size = sum(p.stat().st_size for p in (tmp_path / "graph-1").iterdir() if p.suffix != ".json")
    assert info.num_bytes == size


def test_without_features(tmp_path: Path) -> None:
    graph = stored(tmp_path, LETTERS, [], graph_id="graph-2")
    assert (graph.info.feature_dim, graph.features) == (None, None)


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.float32()),
        pa.list_(pa.float64(), 3),
        pa.large_list(pa.float32()),
        pa.list_(pa.float16(), 3),
        pa.list_(pa.int8()),
        pa.list_(pa.uint64(), 3),
    ],
)
def test_any_list_of_numbers_is_features(tmp_path: Path, kind: pa.DataType) -> None:
    rows = [[i, i + 1, i + 2] for i in range(5)]
    numbers = np.array(rows, dtype=kind.value_type.to_pandas_dtype())
    whole = pa.array([list(row) for row in numbers], kind)
    parts = columns(LETTERS, [], features=whole[1:])  # a slice has an offset
    store = GraphStore(tmp_path)
    create(store, parts)
    features = store.get("graph-1", OWNER).features
    assert features is not None
    assert features.tolist() == rows[1:]


def test_content_hash_is_of_features_too(tmp_path: Path) -> None:
    store = GraphStore(tmp_path)
    kinds = [
        None,
        FEATURES,
        [row[:2] for row in FEATURES],
        [*FEATURES[1:], FEATURES[0]],
        [[0.0] * 3] * 4,
    ]
    hashes = [
        create(store, columns(LETTERS, [], features=f), graph_id=f"graph-{number}").content_hash
        for number, f in enumerate(kinds)
    ]
    assert len(set(hashes)) == 5
    fixed = pa.array(FEATURES, pa.list_(pa.float64(), 3))
    again = create(store, columns(LETTERS, [], features=fixed), graph_id="graph-9")
    assert again.content_hash == hashes[1]


def test_a_text_of_a_megabyte_is_kept(tmp_path: Path) -> None:
    store = GraphStore(tmp_path)
    text = "é" * 2**19  # two bytes each: 1 MiB
    create(store, columns(["a"], [], texts=[text]))
    assert store.get("graph-1", OWNER).texts([0]) == [text]
    with pytest.raises(GraphInputError, match="1048577"):
        create(store, columns(["a"], [], texts=[text + "x"]), graph_id="graph-2")


def test_creating_twice(tmp_path: Path) -> None:
    store = GraphStore(tmp_path)
    first = create(store, columns(["a"], []))
    again, created = store.create(
        "graph-1", columns(["a"], []), name="g", owner=OWNER, request_hash="hash"
    )
    assert (again, created) == (first, False)
    with pytest.raises(GraphConflictError):
        create(store, columns(["a"], []), request_hash="other")
    with pytest.raises(GraphConflictError):
        create(store, columns(["a"], []), owner="tenant-b")


def test_a_race_for_one_id_has_one_winner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = GraphStore(tmp_path)
    first = create(store, columns(["a"], []))
    looks = iter([None, first])  # as if the other had come between look and rename
    monkeypatch.setattr(GraphStore, "_existing", lambda *_: next(looks))
    assert create(store, columns(["a"], [])) == first
    assert [path.name for path in tmp_path.iterdir()] == ["graph-1"]


@pytest.mark.parametrize(
    "graph_id",
    ["..", "graph-../x", "graph-", "Graph-1", "graph-1\n", "graph-a/b", "graph-" + "a" * 65],
)
def test_no_id_becomes_a_path_unchecked(tmp_path: Path, graph_id: str) -> None:
    store = GraphStore(tmp_path / "graphs")
    with pytest.raises(GraphNotFoundError):
        store.get(graph_id, OWNER)
    with pytest.raises(GraphNotFoundError):
        store.delete(graph_id, OWNER)
    with pytest.raises(ValueError, match="graph id"):
        create(store, columns(["a"], []), graph_id=graph_id)


def test_graphs_belong_to_their_owner(tmp_path: Path) -> None:
    store = GraphStore(tmp_path)
    create(store, columns(["a"], []))
    assert store.list_graphs("tenant-b") == []
    with pytest.raises(GraphNotFoundError):
        store.get("graph-1", "tenant-b")
    with pytest.raises(GraphNotFoundError):
        store.delete("graph-1", "tenant-b")
    assert store.info("graph-1", OWNER).id == "graph-1"


def test_list_pages_newest_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = GraphStore(tmp_path)
    assert store.list_graphs(OWNER) == []
    for number in range(5):
        monkeypatch.setattr("time.time", lambda number=number: 1000.0 + number)
        create(store, columns(["a"], []), graph_id=f"graph-{number}")
    first = store.list_graphs(OWNER, limit=2)
    assert [info.id for info in first] == ["graph-4", "graph-3"]
    rest = store.list_graphs(OWNER, after=first[-1].id)
    assert [info.id for info in rest] == ["graph-2", "graph-1", "graph-0"]
    with pytest.raises(GraphNotFoundError):
        store.list_graphs(OWNER, after="graph-9")


def test_a_deleted_graph_stays_readable_to_its_reader(tmp_path: Path) -> None:
    store = GraphStore(tmp_path)
    create(store, columns(LETTERS, [("a", "b")], features=FEATURES))
    graph = store.get("graph-1", OWNER)
    GraphStore(tmp_path).delete("graph-1", OWNER)
    assert list(tmp_path.iterdir()) == []
    assert graph.features is not None
    assert graph.features.tolist() == np.array(FEATURES, dtype=np.float32).tolist()
    assert pagerank(graph).sum() == pytest.approx(1)
    assert graph.texts([0]) == ["text of a"]
    assert graph.neighbors(0).tolist() == [1]


def test_leftovers_of_a_killed_process_go_after_a_day(tmp_path: Path) -> None:
    for name in (".new-1", ".deleted-2", ".new-young"):
        (tmp_path / name).mkdir()
    for name in (".new-1", ".deleted-2"):
        os.utime(tmp_path / name, (0, 0))
    create(GraphStore(tmp_path), columns(["a"], []))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".new-young", "graph-1"]


def test_a_failing_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match="No space"):
        create(GraphStore(tmp_path), columns(["a"], []))
    assert list(tmp_path.iterdir()) == []


def test_a_graph_has_its_id_once_it_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file and the folder's names before the rename, the rename itself before anybody is told."""
    done: list[object] = []
    fsync, rename = os.fsync, Path.rename

    def watched_fsync(descriptor: int) -> None:
        done.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def watched_rename(self: Path, target: Path) -> Path:
        done.append("rename")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "rename", watched_rename)
    create(GraphStore(tmp_path), columns(["a"], []))
    folder = tmp_path / "graph-1"
    before, after = done[: done.index("rename")], done[done.index("rename") + 1 :]
    files = {path.stat().st_ino for path in folder.iterdir()}
    assert (folder / "graph.json").stat().st_ino in before
    assert set(before) == files | {folder.stat().st_ino}
    assert before[-1] == folder.stat().st_ino
    assert after == [tmp_path.stat().st_ino]


def test_the_golden_graph_loads(tmp_path: Path) -> None:
    """A graph that was stored by the first release."""
    golden = Path(__file__).parent / "golden"
    shutil.copytree(golden, tmp_path / "graphs")
    graph = GraphStore(tmp_path / "graphs").get("graph-golden", OWNER)
    assert graph.ids([0, 1, 2, 3]) == LETTERS
    assert graph.neighbors(0).tolist() == [1, 2]
    assert graph.indices_of(["d"]) == [3]
    manifest = json.loads((golden / "graph-golden" / "graph.json").read_text())
    again = create(
        GraphStore(tmp_path / "new"),
        columns(LETTERS, [("a", "b"), ("c", "a")], labels=["x", None, "y", "y"]),
    )
    assert again.content_hash == manifest["content_hash"]


def test_arrow_types_of_an_upload_do_not_matter(tmp_path: Path) -> None:
    store = GraphStore(tmp_path)
    plain = create(store, columns(["a", "b"], [("a", "b")]))
    parts = columns(["a", "b"], [("a", "b")])
    odd = type(parts)(
        ids=parts.ids.dictionary_encode(),
        texts=parts.texts.cast(pa.large_string()),
        sources=parts.sources.cast(pa.large_string()),
        targets=parts.targets.dictionary_encode(),
    )
    assert create(store, odd, graph_id="graph-2").content_hash == plain.content_hash


def test_a_damaged_manifest_is_no_graph(tmp_path: Path) -> None:
    store = GraphStore(tmp_path)
    create(store, columns(["a"], []))
    create(store, columns(["a"], []), graph_id="graph-2")
    (tmp_path / "graph-1" / "graph.json").write_text('{"id": "graph-1"')
    assert [info.id for info in store.list_graphs(OWNER)] == ["graph-2"]
    with pytest.raises(GraphNotFoundError):
        store.get("graph-1", OWNER)
