"""Graphs from uploads: JSON lists, and Parquet and Arrow files, of which hostile ones are refused.

Nodes have columns id, text and optionally label, split and features (a list of numbers); edges have source and target.
Other columns are refused by name. A file is recognised by its first bytes. It is read in pieces and given up once it
holds more rows or more bytes than a graph may: a small file can expand to a very large table.
"""

from collections.abc import Iterator, Sequence
from typing import IO, Any

from graph.store import MAX_EDGES, MAX_NODES, GraphColumns, GraphInputError, NodeId

MAX_TABLE_BYTES = 4 * 2**30
"""Decoded size of one file. Files are decoded one after the other."""
MAX_PIECE_BYTES = 2**30
"""Size that a row group may declare, and that a piece of it may decode to."""
_ROWS_PER_PIECE = 16_384

_NODE_COLUMNS = {"id": True, "text": True, "label": False, "split": False, "features": False}
_EDGE_COLUMNS = {"source": True, "target": True}


def read_columns(nodes: IO[bytes], edges: IO[bytes]) -> GraphColumns:
    """Columns of the two files of an upload; both seekable.

    Raises:
        GraphInputError: not a readable Parquet or Arrow file, a missing or unknown column, or too large.
    """
    node_table = _read_table(nodes, "nodes", _NODE_COLUMNS, MAX_NODES)
    edge_table = _read_table(edges, "edges", _EDGE_COLUMNS, MAX_EDGES)
    return GraphColumns(
        ids=node_table["id"],
        texts=node_table["text"],
        labels=node_table.get("label"),
        splits=node_table.get("split"),
        features=node_table.get("features"),
        sources=edge_table["source"],
        targets=edge_table["target"],
    )


def release_memory() -> None:
    """Arrow keeps what an upload has freed, which is several times its size, for the next one; this gives it back."""
    import pyarrow as pa

    pa.default_memory_pool().release_unused()


def _read_table(
    file: IO[bytes], part: str, columns: dict[str, bool], max_rows: int
) -> dict[str, Any]:
    """One contiguous array per column."""
    import pyarrow as pa

    try:
        schema, pieces = _open(file, part, max_rows)
        _check_columns(schema.names, part, columns)
        batches: list[Any] = []
        num_rows = num_bytes = 0
        for batch in pieces:
            batch.validate(full=True)
            num_rows += batch.num_rows
            num_bytes += sum(map(_decoded_bytes, batch.columns))
            if num_rows > max_rows:
                raise GraphInputError(part, f"at most {max_rows} rows in {part}")
            if num_bytes > MAX_TABLE_BYTES:
                raise GraphInputError(
                    part, f"{part} is larger than {MAX_TABLE_BYTES} bytes decoded"
                )
            batches.append(batch)
        table = pa.Table.from_batches(batches, schema)
        return {
            name: _one_array(table.column(name), part, is_features=name == "features")
            for name in schema.names
        }
    except (
        pa.ArrowException,
        OSError,
        EOFError,
        MemoryError,
        OverflowError,
        UnicodeDecodeError,  # of a column name
    ) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise GraphInputError(
            part, f"{part} is not a readable Parquet or Arrow file: {reason}"
        ) from None


def _open(file: IO[bytes], part: str, max_rows: int) -> tuple[Any, Iterator[Any]]:
    """Schema and record batches of a Parquet file, an Arrow file or an Arrow stream.

    Batches are looked at once they are asked for, so that the columns can be checked first.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    file.seek(0)
    magic = file.read(6)
    file.seek(0)
    if magic[:4] == b"PAR1":
        reader = pq.ParquetFile(file)
        return reader.schema_arrow, _parquet_batches(reader, file, part, max_rows)
    if magic == b"ARROW1":
        reader = pa.ipc.open_file(file)
        return reader.schema, (reader.get_batch(i) for i in range(reader.num_record_batches))
    watched = _WatchedFile(file)
    stream = pa.ipc.open_stream(watched)
    return stream.schema, _stream_batches(stream, watched, part)


class _WatchedFile:
    """What pyarrow reads of a stream. Attributes: is_at_end: the last read found nothing more."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.is_at_end = False

    @property
    def closed(self) -> bool:
        return self._file.closed

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self.is_at_end = not data and size != 0
        return data


def _stream_batches(stream: Any, file: _WatchedFile, part: str) -> Iterator[Any]:
    """Where a file ends between two messages, pyarrow takes it for the stream's end as well."""
    yield from stream
    if file.is_at_end:
        raise GraphInputError(
            part, f"{part} is an Arrow stream without its end marker: it was cut, or never closed"
        )


def _parquet_batches(reader: Any, file: IO[bytes], part: str, max_rows: int) -> Iterator[Any]:
    metadata = reader.metadata
    if metadata.num_rows > max_rows:
        raise GraphInputError(part, f"at most {max_rows} rows in {part}, got {metadata.num_rows}")
    for index in range(metadata.num_row_groups):
        declared = metadata.row_group(index).total_byte_size
        if declared > MAX_PIECE_BYTES:
            raise GraphInputError(
                part, f"a row group of {part} has {declared} bytes, at most {MAX_PIECE_BYTES}"
            )
    rows = max(1, min(_ROWS_PER_PIECE, MAX_PIECE_BYTES // _longest_repeated(file, part)))
    yield from reader.iter_batches(batch_size=rows, use_threads=False)


def _longest_repeated(file: IO[bytes], part: str) -> int:
    """Bytes of the longest text that each row of the file may repeat at hardly any cost, at least 1.

    A column's dictionary is read with its first row, so a row of a group tells. Groups that are small even if each row
    is as long as their column are not looked at.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    schema = pq.read_schema(file)
    names = [name for name in schema.names if _is_text(schema.field(name).type)]
    longest = 1
    with pq.ParquetFile(file, read_dictionary=names) as reader:
        for index in range(reader.metadata.num_row_groups):
            group = reader.metadata.row_group(index)
            for place in range(group.num_columns):
                column = group.column(place)
                if column.num_values * 8 > MAX_TABLE_BYTES:
                    raise GraphInputError(part, f"a row group of {part} has too many values")
                if "DELTA_BYTE_ARRAY" in column.encodings:  # repeats text too, in no dictionary
                    raise GraphInputError(
                        part, f"{part} is encoded as DELTA_BYTE_ARRAY, which is not read"
                    )
                name, most = column.path_in_schema, group.num_rows * column.total_uncompressed_size
                if name not in names or most <= MAX_PIECE_BYTES:
                    continue
                first = next(reader.iter_batches(1, row_groups=[index], columns=[name]), None)
                if first is None or not pa.types.is_dictionary(first.column(0).type):
                    continue
                length = pc.max(pc.binary_length(first.column(0).dictionary)).as_py()
                longest = max(longest, length or 0)
    return longest


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _decoded_bytes(column: Any) -> int:
    """Of a column of a batch, once a dictionary's values are put in their places."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not (pa.types.is_dictionary(column.type) and _is_text(column.type)):
        return int(column.nbytes)
    lengths = pc.binary_length(column.dictionary).cast(pa.int64()).take(column.indices)
    return int(column.indices.nbytes + (pc.sum(lengths).as_py() or 0))


def _check_columns(names: list[str], part: str, columns: dict[str, bool]) -> None:
    for name, required in columns.items():
        if required and name not in names:
            raise GraphInputError(f"{part}.{name}", f"{part} has no column {name!r}")
    for name in names:
        if name not in columns:
            raise GraphInputError(
                f"{part}.{name[:80]}",
                f"{part} has an unknown column {name[:80]!r}; known: {', '.join(columns)}",
            )
    if len(set(names)) < len(names):
        raise GraphInputError(part, f"{part} has two columns of one name")


def _one_array(column: Any, part: str, *, is_features: bool) -> Any:
    """One array of a chunked column; strings with 64-bit offsets, so that any total length fits."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_string(column.type):
        column = column.cast(pa.large_string())
    if pa.types.is_nested(column.type) and not is_features:
        raise GraphInputError(part, f"a column of {part} has the nested type {column.type}")
    combined = column.combine_chunks()
    if isinstance(combined, pa.ChunkedArray):
        combined = pa.concat_arrays(combined.chunks) if combined.chunks else pa.nulls(0)
    return combined


def columns_from_lists(
    *,
    ids: Sequence[NodeId],
    texts: Sequence[str],
    labels: Sequence[NodeId | None],
    splits: Sequence[str | None],
    edges: Sequence[tuple[NodeId, NodeId]],
    features: Sequence[Sequence[float] | None] = (),
) -> GraphColumns:
    """Columns of a graph that came as JSON.

    Raises:
        GraphInputError: ids, labels or ends of edges are strings here and integers there.
    """
    import pyarrow as pa

    _check_one_type(ids, "nodes[{}].id", "node ids")
    _check_one_type(labels, "nodes[{}].label", "labels")
    sources, targets = [edge[0] for edge in edges], [edge[1] for edge in edges]
    kind = type(ids[0]) if ids else str
    for index, edge in enumerate(edges):
        if type(edge[0]) is not kind or type(edge[1]) is not kind:
            raise GraphInputError(
                f"edges[{index}]", f"edge {list(edge)!r:.80} does not name nodes by {_NAMES[kind]}"
            )
    has_labels = any(label is not None for label in labels)
    has_splits = any(split is not None for split in splits)
    has_features = any(row is not None for row in features)
    return GraphColumns(
        ids=pa.array(ids),
        texts=pa.array(texts, pa.large_string()),
        labels=pa.array(labels) if has_labels else None,
        splits=pa.array(splits, pa.string()) if has_splits else None,
        features=pa.array(features, pa.list_(pa.float64())) if has_features else None,
        sources=pa.array(sources),
        targets=pa.array(targets),
    )


_NAMES: dict[type, str] = {str: "strings", int: "integers"}


def _check_one_type(values: Sequence[NodeId | None], place: str, what: str) -> None:
    kind: type | None = None
    for index, value in enumerate(values):
        if value is None:
            continue
        kind = kind or type(value)
        if type(value) is not kind:
            raise GraphInputError(
                place.format(index), f"{what} must all be strings or all be integers, got both"
            )
