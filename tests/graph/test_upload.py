"""Parquet and Arrow uploads: every container gives the same columns; hostile files are refused by their part."""

import contextlib
import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from graph import upload
from graph.store import GraphInputError, GraphStore
from graph.upload import read_columns
from tests.graph.graphs import OWNER, create

NODES = pa.table(
    {"id": ["a", "b"], "text": ["x", None], "label": ["l", None], "split": ["train", "test"]}
)
EDGES = pa.table({"source": ["a"], "target": ["b"]})


def parquet(table: pa.Table, **options: Any) -> io.BytesIO:
    file = io.BytesIO()
    pq.write_table(table, file, **options)
    return file


def arrow_file(table: pa.Table) -> io.BytesIO:
    file = io.BytesIO()
    with pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=1)
    return file


def arrow_stream(table: pa.Table) -> io.BytesIO:
    file = io.BytesIO()
    with pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=1)
    return file


def arrow_stream_of_one_batch(table: pa.Table) -> io.BytesIO:
    file = io.BytesIO()
    with pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    return file


WRITERS = [parquet, arrow_file, arrow_stream]


@pytest.mark.parametrize("write", WRITERS)
def test_every_container_reads_the_same(write: Callable[[pa.Table], io.BytesIO]) -> None:
    columns = read_columns(write(NODES), write(EDGES))
    assert columns.ids.to_pylist() == ["a", "b"]
    assert columns.texts.to_pylist() == ["x", None]
    assert columns.labels.to_pylist() == ["l", None]
    assert columns.splits.to_pylist() == ["train", "test"]
    assert columns.sources.to_pylist() == ["a"]
    assert columns.targets.to_pylist() == ["b"]


FIXED = pa.list_(pa.float32(), 2)


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("kind", [FIXED, pa.list_(pa.float64()), pa.large_list(pa.float16())])
def test_features_read_the_same(write: Callable[[pa.Table], io.BytesIO], kind: pa.DataType) -> None:
    rows = pa.array([[0.5, 1.0], [2.0, -3.0]]).cast(kind)
    columns = read_columns(write(NODES.append_column("features", rows)), write(EDGES))
    assert columns.features.to_pylist() == [[0.5, 1.0], [2.0, -3.0]]
    assert read_columns(write(NODES), write(EDGES)).features is None


@pytest.mark.parametrize("write", WRITERS)
def test_features_that_are_no_numbers_are_left_to_the_store(
    write: Callable[[pa.Table], io.BytesIO],
) -> None:
    rows = pa.array([[{"x": 1}], [{"x": 2}]])
    parts = read_columns(write(NODES.append_column("features", rows)), write(EDGES))
    with pytest.raises(GraphInputError, match="lists of numbers"):
        create(GraphStore(Path("unused")), parts)


@pytest.mark.parametrize("write", WRITERS)
def test_no_rows_and_no_optional_columns(write: Callable[[pa.Table], io.BytesIO]) -> None:
    columns = read_columns(write(NODES.select(["id", "text"])), write(EDGES.slice(0, 0)))
    assert columns.labels is None
    assert columns.splits is None
    assert len(columns.sources) == 0


def test_columns_in_another_order_and_dictionary() -> None:
    nodes = pa.table({"text": ["x"], "id": pa.array(["a"]).dictionary_encode()})
    assert read_columns(arrow_file(nodes), parquet(EDGES)).ids.to_pylist() == ["a"]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize(
    ("table", "param"),
    [
        (NODES.drop_columns(["text"]), "nodes.text"),
        (NODES.append_column("extra", pa.array([1, 2])), "nodes.extra"),
        (NODES.set_column(1, "text", pa.array([["x"], ["y"]])), "nodes"),
    ],
)
def test_wrong_columns(
    write: Callable[[pa.Table], io.BytesIO], table: pa.Table, param: str
) -> None:
    with pytest.raises(GraphInputError) as caught:
        read_columns(write(table), write(EDGES))
    assert caught.value.param == param


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("name", ["text", "id"])
def test_two_columns_of_one_name(write: Callable[[pa.Table], io.BytesIO], name: str) -> None:
    nodes = pa.Table.from_arrays([pa.array(["a"])] * 3, names=["id", "text", name])
    with pytest.raises(GraphInputError, match="nodes has two columns of one name") as caught:
        read_columns(write(nodes), parquet(EDGES))
    assert caught.value.param == "nodes"
    edges = pa.Table.from_arrays([pa.array(["a"])] * 3, names=["source", "target", "source"])
    with pytest.raises(GraphInputError, match="edges has two columns of one name") as caught:
        read_columns(parquet(NODES), write(edges))
    assert caught.value.param == "edges"


@pytest.mark.parametrize(
    "data", [b"", b"PAR1", b"PAR1PAR1", b"ARROW1", b"ARROW1\0\0" * 4, b"{}" * 40, b"\xff" * 64]
)
def test_what_is_no_table(data: bytes) -> None:
    with pytest.raises(GraphInputError) as caught:
        read_columns(io.BytesIO(data), parquet(EDGES))
    assert caught.value.param == "nodes"


@pytest.mark.parametrize("write", WRITERS)
def test_every_truncated_file_is_refused(write: Callable[[pa.Table], io.BytesIO]) -> None:
    data = write(EDGES).getvalue()
    for length in range(len(data)):
        with pytest.raises(GraphInputError):
            read_columns(parquet(NODES), io.BytesIO(data[:length]))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("num_batches", [0, 1, 3])
def test_a_stream_that_was_cut_between_batches(legacy: bool, num_batches: int) -> None:
    """Of zeros at the end of a batch none is taken for the marker."""
    options = pa.ipc.IpcWriteOptions(use_legacy_format=legacy)
    table = pa.table({"source": pa.array([0, 0, 0]), "target": pa.array([0, 0, 0])})
    file = io.BytesIO()
    with pa.ipc.new_stream(file, table.schema, options=options) as writer:
        cuts = []
        for batch in table.to_batches(max_chunksize=1):
            writer.write_batch(batch)
            cuts.append(file.tell())
    whole = file.getvalue()
    messages = pa.BufferReader(whole)
    pa.ipc.read_message(messages)
    cuts.insert(0, messages.tell())  # behind the schema
    marker = b"\0\0\0\0" if legacy else b"\xff\xff\xff\xff\0\0\0\0"
    assert whole[cuts[-1] :] == marker
    assert len(read_columns(parquet(NODES), io.BytesIO(whole)).sources) == 3
    with pytest.raises(GraphInputError, match="edges is an Arrow stream without its end marker"):
        read_columns(parquet(NODES), io.BytesIO(whole[: cuts[num_batches]]))


def test_a_stream_that_was_cut_behind_a_dictionary() -> None:
    options = pa.ipc.IpcWriteOptions(emit_dictionary_deltas=True)
    sources = [
        pa.DictionaryArray.from_arrays(pa.array([0], pa.int32()), names)
        for names in (["a"], ["a", "b"])
    ]
    batches = [pa.record_batch({"source": s, "target": pa.array(["a"])}) for s in sources]
    file = io.BytesIO()
    with pa.ipc.new_stream(file, batches[0].schema, options=options) as writer:
        writer.write_batch(batches[0])
        first = file.tell()
        writer.write_batch(batches[1])
    messages = pa.BufferReader(file.getvalue()[first:])
    pa.ipc.read_message(messages)
    cut = first + messages.tell()  # behind the second dictionary, before its batch
    assert read_columns(parquet(NODES), file).sources.to_pylist() == ["a", "a"]
    with pytest.raises(GraphInputError, match="end marker"):
        read_columns(parquet(NODES), io.BytesIO(file.getvalue()[:cut]))


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("is_dictionary", [False, True])
def test_texts_that_are_all_null_are_empty(
    write: Callable[[pa.Table], io.BytesIO], is_dictionary: bool, tmp_path: Path
) -> None:
    texts = pa.nulls(2)
    if is_dictionary and write is not parquet:  # Parquet has no dictionary of nulls
        texts = texts.dictionary_encode()
    nodes = pa.table({"id": ["a", "b"], "text": texts})
    store = GraphStore(tmp_path)
    info = create(store, read_columns(write(nodes), write(EDGES)))
    assert store.get(info.id, OWNER).texts([0, 1]) == ["", ""]


@pytest.mark.parametrize("write", WRITERS)
def test_labels_are_as_long_as_in_json(
    write: Callable[[pa.Table], io.BytesIO], tmp_path: Path
) -> None:
    for length in (256, 257):
        labels = pa.array([None, "\u6f22" * length])
        parts = read_columns(write(NODES.set_column(2, "label", labels)), write(EDGES))
        if length == 256:
            assert create(GraphStore(tmp_path), parts).has_labels
            continue
        with pytest.raises(GraphInputError, match="at most 256 characters, got 257") as caught:
            create(GraphStore(tmp_path), parts, graph_id="graph-2")
        assert caught.value.param == "nodes[1].label"


def test_text_that_is_not_utf8() -> None:
    bad = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")]
    )
    with pytest.raises(GraphInputError, match="UTF"):
        read_columns(arrow_stream(pa.table({"id": ["a"], "text": bad})), parquet(EDGES))


@pytest.mark.parametrize("write", WRITERS)
def test_damaged_files_are_refused_or_read(write: Callable[[pa.Table], io.BytesIO]) -> None:
    rng = random.Random(333)
    data = write(NODES).getvalue()
    for _ in range(300):
        damaged = bytearray(data)
        for _ in range(rng.choice([1, 2, 8])):
            damaged[rng.randrange(len(data))] = rng.randrange(256)
        with contextlib.suppress(GraphInputError):
            columns = read_columns(io.BytesIO(damaged), parquet(EDGES))
            assert len(columns.ids.to_pylist()) == len(columns.texts.to_pylist())


def test_a_small_file_that_expands_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = pa.table({"id": [str(i) for i in range(200_000)], "text": ["x" * 1000] * 200_000})
    file = parquet(nodes, compression="zstd")
    assert len(file.getvalue()) < 2**21
    monkeypatch.setattr(upload, "MAX_TABLE_BYTES", 50 * 2**20)
    with pytest.raises(GraphInputError, match="bytes decoded"):
        read_columns(file, parquet(EDGES))


def repeating(rows: int) -> pa.Table:
    """Few bytes in any file: one text of 2**16 bytes in all rows."""
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), ["x" * 2**16])
    return pa.table({"id": list(range(rows)), "text": texts})


def plain_parquet(table: pa.Table) -> io.BytesIO:
    """Nothing in it says that its texts were a dictionary."""
    return parquet(table, store_schema=False)


@pytest.mark.parametrize("write", [plain_parquet, arrow_stream_of_one_batch])
def test_a_text_that_all_rows_share_is_counted_in_each(
    write: Callable[[pa.Table], io.BytesIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(repeating(4000))
    assert len(file.getvalue()) < 2**18
    monkeypatch.setattr(upload, "MAX_TABLE_BYTES", 2**26)
    monkeypatch.setattr(upload, "MAX_PIECE_BYTES", 2**24)
    before, pool = pa.default_memory_pool(), pa.system_memory_pool()
    pa.set_memory_pool(pool)
    try:
        with pytest.raises(GraphInputError, match="bytes decoded"):
            read_columns(file, parquet(EDGES))
    finally:
        pa.set_memory_pool(before)
    assert pool.max_memory() < 2**27  # of 2**28 that it would decode to


def test_few_rows_may_share_a_long_text() -> None:
    assert (
        read_columns(parquet(repeating(20)), parquet(EDGES)).texts.to_pylist() == ["x" * 2**16] * 20
    )


def test_what_repeats_and_does_not_tell_is_refused() -> None:
    file = parquet(EDGES, use_dictionary=False, column_encoding={"source": "DELTA_BYTE_ARRAY"})
    with pytest.raises(GraphInputError, match="DELTA_BYTE_ARRAY"):
        read_columns(parquet(NODES), file)


def test_too_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "MAX_NODES", 1)
    for write in WRITERS:
        with pytest.raises(GraphInputError, match="at most 1 rows"):
            read_columns(write(NODES), write(EDGES))


def test_a_row_group_that_declares_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "MAX_PIECE_BYTES", 10)
    with pytest.raises(GraphInputError, match="row group"):
        read_columns(parquet(NODES), parquet(EDGES))
