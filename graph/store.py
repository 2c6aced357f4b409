"""The graph store: what makes an upload a graph, and where its parts lie on disk.

A graph is a folder `<graphs_dir>/<id>`, made under a hidden name, written through to the disk and renamed into place,
never changed afterwards:

- `graph.json`: the manifest (`GraphInfo`).
- `nodes.arrow`: one Arrow IPC record batch of id (string or int64), text, label (string or int64), split; node index
  = row.
- `id_order.npy`: int32 permutation that sorts the ids, to find a node by binary search.
- `edges.npy`: int32 (num_edges, 2), the kept edges as source and target index, sorted.
- `indptr.npy` int64 (num_nodes + 1,), `indices.npy` int32: CSR of the undirected view, neighbours ascending.
- `features.npy`: float32 (num_nodes, feature_dim), where the upload had them.

All but the manifest are read memory-mapped. Edges are kept once: in an undirected graph `a,b` and `b,a` are one edge,
in a directed one they are two. Self-loops are dropped (graph layers add their own). Both are counted in the manifest.
A graph that is deleted while someone reads it stays readable to them.
"""

import bisect
import errno
import hashlib
import json
import logging
import re
import secrets
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from compression.disk import sync

GRAPH_ID_PATTERN = r"^graph-[a-z0-9]{1,64}$"
_GRAPH_ID = re.compile(r"graph-[a-z0-9]{1,64}\Z")
MAX_NODES = 5_000_000
MAX_EDGES = 50_000_000
MAX_ID_BYTES = 256
MAX_LABEL_CHARS = 256
MAX_TEXT_BYTES = 2**20
MAX_NAME_CHARS = 200
MAX_FEATURE_DIM = 16_384
SPLITS = ("train", "val", "test")
MANIFEST_NAME = "graph.json"
FORMAT_VERSION = 1
_LEFTOVER_SECONDS = 24 * 3600

logger = logging.getLogger("lathe.graphs")

NodeId = str | int
IdType = Literal["string", "int64"]
Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]
Float32s = npt.NDArray[np.float32]


class GraphNotFoundError(Exception):
    """No graph has this id, or none of this owner."""


class GraphConflictError(Exception):
    """A graph with this id was made from another request."""


class GraphInputError(ValueError):
    """Nodes and edges that are no graph.

    Attributes:
        param: the place at fault, as "edges[17]" or "nodes[3].id".
    """

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param
        self.message = message


class UnknownNodeError(KeyError):
    """Attributes: position: index, in the list that was asked for, of the first id that the graph does not have."""

    def __init__(self, position: int, node_id: NodeId) -> None:
        super().__init__(node_id)
        self.position = position
        self.node_id = node_id


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphColumns:
    """Nodes and edges as Arrow arrays (`pyarrow.Array`), one row per node or edge, not yet checked.

    Attributes:
        ids, sources, targets: all strings or all integers.
        texts: strings; null is an empty text.
        labels: strings or integers with nulls, or None.
        splits: strings with nulls, or None.
        features: lists of numbers, of fixed size or not, or None.
    """

    ids: Any
    texts: Any
    sources: Any
    targets: Any
    labels: Any = None
    splits: Any = None
    features: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphInfo:
    """What `graph.json` says. Times are Unix seconds.

    Attributes:
        num_edges: distinct edges without self-loops.
        num_self_loops, num_duplicate_edges: dropped from the upload.
        content_hash: sha256 of nodes, edges, direction and features; not of the name.
        request_hash: of the request that made it; guards an idempotency key against another body.
        feature_dim: None without features.
    """

    id: str
    name: str
    owner: str
    created_at: float
    request_hash: str
    directed: bool
    id_type: IdType
    num_nodes: int
    num_edges: int
    num_self_loops: int
    num_duplicate_edges: int
    has_labels: bool
    has_splits: bool
    content_hash: str
    num_bytes: int
    feature_dim: int | None = None
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """An open graph; everything but `info` is memory-mapped.

    Attributes:
        nodes: `pyarrow.RecordBatch` of id, text, label, split.
        indptr, indices: CSR of the undirected view.
        edges: (num_edges, 2) source and target, as uploaded.
        features: (num_nodes, feature_dim), finite; None where the upload had none.
    """

    info: GraphInfo
    nodes: Any
    id_order: Int32s
    edges: Int32s
    indptr: Int64s
    indices: Int32s
    features: Float32s | None = None

    @property
    def degrees(self) -> Int64s:
        """Number of distinct neighbours of every node, direction aside."""
        return np.diff(self.indptr)

    @property
    def text_lengths(self) -> Int64s:
        """Characters of every node's text."""
        import pyarrow.compute as pc

        lengths = pc.utf8_length(self.nodes.column("text"))
        return np.asarray(lengths.to_numpy(zero_copy_only=False), dtype=np.int64)

    def text_bytes(self, indices: Sequence[int] | npt.NDArray[Any]) -> Int64s:
        """Bytes of some nodes' texts in UTF-8, without reading them."""
        column = self.nodes.column("text")
        offsets = np.frombuffer(column.buffers()[1], np.int64)[column.offset :]
        rows = np.asarray(indices, dtype=np.int64)
        lengths: Int64s = offsets[rows + 1] - offsets[rows]
        return lengths

    def neighbors(self, index: int) -> Int32s:
        """Indices of the neighbours, direction aside, ascending."""
        return self.indices[self.indptr[index] : self.indptr[index + 1]]

    def ids(self, indices: Sequence[int] | npt.NDArray[Any]) -> list[NodeId]:
        return self._take("id", indices)

    def texts(self, indices: Sequence[int] | npt.NDArray[Any]) -> list[str]:
        return self._take("text", indices)

    def training_labels(self, indices: Sequence[int] | npt.NDArray[Any] | None = None) -> Any:
        """Labels of those nodes (None: of all) whose split is `train`, as an Arrow array; null for the others.

        Whoever lets labels reach a prompt or a selection reads them here.
        """
        import pyarrow.compute as pc

        labels, splits = self.nodes.column("label"), self.nodes.column("split")
        if indices is not None:
            rows = np.asarray(indices, dtype=np.int64)
            labels, splits = labels.take(rows), splits.take(rows)
        return pc.if_else(pc.fill_null(pc.equal(splits, "train"), False), labels, None)

    def indices_of(self, node_ids: Sequence[NodeId]) -> list[int]:
        """Node index of each id.

        Raises:
            UnknownNodeError: at the first id that the graph does not have.
        """
        order = np.asarray(self.id_order)  # a map itself is slow to index one by one
        column = self.nodes.column("id")
        return [self._index_of(n, node_id, order, column) for n, node_id in enumerate(node_ids)]

    def _index_of(self, position: int, node_id: NodeId, order: Int32s, column: Any) -> int:
        kind = str if self.info.id_type == "string" else int
        if type(node_id) is kind:
            # Strings are sorted by UTF-8 bytes, which is the order of Python's strings.
            place = bisect.bisect_left(order, node_id, key=lambda index: column[int(index)].as_py())
            if place < len(order):
                index = int(order[place])
                if column[index].as_py() == node_id:
                    return index
        raise UnknownNodeError(position, node_id)

    def _take(self, column: str, indices: Sequence[int] | npt.NDArray[Any]) -> list[Any]:
        rows = np.asarray(indices, dtype=np.int64)
        values: list[Any] = self.nodes.column(column).take(rows).to_pylist()
        return values


class GraphStore:
    """Graphs under one folder, each of one owner. Safe from several threads and processes."""

    def __init__(self, graphs_dir: Path) -> None:
        self._dir = graphs_dir

    def create(
        self,
        graph_id: str,
        columns: GraphColumns,
        *,
        name: str,
        owner: str,
        request_hash: str,
        directed: bool = False,
    ) -> tuple[GraphInfo, bool]:
        """Check and store a graph; an id that exists with the same `request_hash` returns (existing, False).

        Raises:
            GraphInputError: the columns are no graph.
            GraphConflictError: the id exists, made from another request or by another owner.
        """
        if not _GRAPH_ID.match(graph_id):
            raise ValueError(f"graph id must match {GRAPH_ID_PATTERN}, got {graph_id!r}")
        _check_name(name)
        existing = self._existing(graph_id, owner, request_hash)
        if existing is not None:
            return existing, False
        parts = _build(columns, directed=directed)
        self._remove_leftovers()
        folder = self._dir / f".new-{secrets.token_hex(8)}"
        folder.mkdir(parents=True)
        try:
            num_bytes = _write_parts(folder, parts)
            info = GraphInfo(
                id=graph_id,
                name=name,
                owner=owner,
                created_at=time.time(),
                request_hash=request_hash,
                directed=directed,
                id_type=parts.id_type,
                num_nodes=parts.nodes.num_rows,
                num_edges=len(parts.edges),
                num_self_loops=parts.num_self_loops,
                num_duplicate_edges=parts.num_duplicate_edges,
                has_labels=columns.labels is not None,
                has_splits=columns.splits is not None,
                content_hash=_content_hash(parts, directed),
                num_bytes=num_bytes,
                feature_dim=None if parts.features is None else parts.features.shape[1],
            )
            (folder / MANIFEST_NAME).write_text(json.dumps(asdict(info), indent=1))
            sync(folder / MANIFEST_NAME)
            sync(folder)  # its names, before it has its own
            try:
                folder.rename(self._dir / graph_id)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                raced = self._existing(graph_id, owner, request_hash)
                if raced is None:
                    raise GraphConflictError(graph_id) from None
                return raced, False
            sync(self._dir)
        finally:
            shutil.rmtree(folder, ignore_errors=True)  # gone already where the rename worked
        return info, True

    def info(self, graph_id: str, owner: str) -> GraphInfo:
        """Raises: GraphNotFoundError: unknown or malformed id, or another owner's."""
        if not _GRAPH_ID.match(graph_id):
            raise GraphNotFoundError(graph_id)
        info = self._read_info(graph_id)
        if info is None or info.owner != owner:
            raise GraphNotFoundError(graph_id)
        return info

    def get(self, graph_id: str, owner: str) -> Graph:
        """Raises: GraphNotFoundError."""
        info = self.info(graph_id, owner)
        try:
            return _open(self._dir / graph_id, info)
        except FileNotFoundError:  # deleted between the two reads
            raise GraphNotFoundError(graph_id) from None

    def list_graphs(
        self, owner: str, *, after: str | None = None, limit: int = 20
    ) -> list[GraphInfo]:
        """Newest first; `after` is the id of the last graph of the previous page.

        Raises:
            GraphNotFoundError: `after` is unknown.
        """
        names = [path.name for path in self._dir.iterdir()] if self._dir.is_dir() else []
        infos = [self._read_info(name) for name in names if _GRAPH_ID.match(name)]
        mine = [info for info in infos if info is not None and info.owner == owner]
        mine.sort(key=lambda info: (-info.created_at, info.id))
        if after is not None:
            position = next((i for i, info in enumerate(mine) if info.id == after), None)
            if position is None:
                raise GraphNotFoundError(after)
            mine = mine[position + 1 :]
        return mine[:limit]

    def delete(self, graph_id: str, owner: str) -> None:
        """Raises: GraphNotFoundError."""
        self.info(graph_id, owner)
        hidden = self._dir / f".deleted-{secrets.token_hex(8)}"
        try:
            (self._dir / graph_id).rename(hidden)
        except FileNotFoundError:
            raise GraphNotFoundError(graph_id) from None
        shutil.rmtree(hidden, ignore_errors=True)  # what stays is removed as a leftover

    def _existing(self, graph_id: str, owner: str, request_hash: str) -> GraphInfo | None:
        info = self._read_info(graph_id)
        if info is not None and (info.owner, info.request_hash) != (owner, request_hash):
            raise GraphConflictError(graph_id)
        return info

    def _read_info(self, graph_id: str) -> GraphInfo | None:
        try:
            return GraphInfo(**json.loads((self._dir / graph_id / MANIFEST_NAME).read_text()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:  # damaged, or of another version: no graph
            logger.error("unreadable manifest of %s: %s", graph_id, error)
            return None

    def _remove_leftovers(self) -> None:
        """Remove what a killed process left under hidden names a day ago or earlier."""
        if not self._dir.is_dir():
            return
        for path in self._dir.glob(".*-*"):
            try:
                old = time.time() - path.stat().st_mtime > _LEFTOVER_SECONDS
            except FileNotFoundError:
                continue
            if old:
                shutil.rmtree(path, ignore_errors=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parts:
    """A checked graph in memory."""

    id_type: IdType
    nodes: Any
    id_order: Int32s
    edges: Int32s
    indptr: Int64s
    indices: Int32s
    num_self_loops: int
    num_duplicate_edges: int
    features: Float32s | None


def _build(columns: GraphColumns, *, directed: bool) -> _Parts:
    import pyarrow as pa
    import pyarrow.compute as pc

    ids = _check_ids(columns.ids)
    num_nodes = len(ids)
    texts = _check_texts(columns.texts, num_nodes)
    nodes = pa.record_batch(
        {
            "id": ids,
            "text": texts,
            "label": _check_labels(columns.labels, num_nodes),
            "split": _check_splits(columns.splits, num_nodes),
        }
    )
    ends_E2 = _check_edges(columns.sources, columns.targets, ids)
    edges, num_self_loops, num_duplicates = _distinct_edges(ends_E2, num_nodes, directed)
    indptr, indices = _undirected_csr(edges, num_nodes)
    return _Parts(
        id_type="string" if pa.types.is_large_string(ids.type) else "int64",
        nodes=nodes,
        id_order=pc.sort_indices(ids).to_numpy().astype(np.int32),
        edges=edges,
        indptr=indptr,
        indices=indices,
        num_self_loops=num_self_loops,
        num_duplicate_edges=num_duplicates,
        features=_check_features(columns.features, ids),
    )


def _check_name(name: str) -> None:
    if not 1 <= len(name) <= MAX_NAME_CHARS or not name.isprintable():
        raise GraphInputError(
            "name", f"name must be 1 to {MAX_NAME_CHARS} printable characters, got {name[:40]!r}"
        )


def _check_ids(ids: Any) -> Any:
    """Ids as large_string or int64: present, distinct and not too many."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if len(ids) == 0:
        raise GraphInputError("nodes", "a graph must have at least one node")
    if len(ids) > MAX_NODES:
        raise GraphInputError("nodes", f"at most {MAX_NODES} nodes, got {len(ids)}")
    ids = _as_ids(ids, "nodes")
    missing = _first(ids.is_null())
    if missing is not None:
        raise GraphInputError(f"nodes[{missing}].id", "a node has no id")
    if pa.types.is_large_string(ids.type):
        lengths = pc.binary_length(ids)
        bad = _first(pc.or_(pc.equal(lengths, 0), pc.greater(lengths, MAX_ID_BYTES)))
        if bad is not None:
            got = lengths[bad].as_py()
            raise GraphInputError(
                f"nodes[{bad}].id", f"a node id must be 1 to {MAX_ID_BYTES} bytes, got {got}"
            )
    distinct = ids.unique()  # in order of first appearance
    if len(distinct) < len(ids):
        places = pc.index_in(ids, value_set=distinct).to_numpy()
        second = int(np.argmax(places != np.arange(len(ids))))
        raise GraphInputError(
            f"nodes[{second}].id",
            f"node id {ids[second].as_py()!r} appears at nodes[{places[second]}] and nodes[{second}]",
        )
    return ids


def _as_ids(array: Any, what: str) -> Any:
    """Strings as large_string, integers as int64.

    Raises:
        GraphInputError: another type, or integers beyond int64.
    """
    import pyarrow as pa

    kind = array.type
    if pa.types.is_dictionary(kind):
        array = array.dictionary_decode()
        kind = array.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return array.cast(pa.large_string())
    if pa.types.is_integer(kind):
        try:
            return array.cast(pa.int64())
        except pa.ArrowInvalid:
            raise GraphInputError(what, "integer ids must fit in 64 bits with a sign") from None
    raise GraphInputError(what, f"ids must all be strings or all be integers, got {kind}")


def _check_texts(texts: Any, num_nodes: int) -> Any:
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = texts.type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)):
        raise GraphInputError("nodes", f"texts must be strings, got {kind}")
    assert len(texts) == num_nodes
    texts = pc.fill_null(texts.cast(pa.large_string()), "")
    long = _first(pc.greater(pc.binary_length(texts), MAX_TEXT_BYTES))
    if long is not None:
        got = pc.binary_length(texts[long]).as_py()
        raise GraphInputError(
            f"nodes[{long}].text", f"a text has at most {MAX_TEXT_BYTES} bytes, got {got}"
        )
    return texts


def _check_labels(labels: Any, num_nodes: int) -> Any:
    import pyarrow as pa
    import pyarrow.compute as pc

    if labels is None or pa.types.is_null(labels.type):
        return pa.nulls(num_nodes, pa.large_string())
    try:
        labels = _as_ids(labels, "nodes")
    except GraphInputError:
        raise GraphInputError(
            "nodes", f"labels must all be strings or all be integers, got {labels.type}"
        ) from None
    if pa.types.is_large_string(labels.type):
        lengths = pc.utf8_length(labels)
        long = _first(pc.greater(lengths, MAX_LABEL_CHARS))
        if long is not None:
            raise GraphInputError(
                f"nodes[{long}].label",
                f"a label has at most {MAX_LABEL_CHARS} characters, got {lengths[long].as_py()}",
            )
    return labels


def _check_splits(splits: Any, num_nodes: int) -> Any:
    import pyarrow as pa
    import pyarrow.compute as pc

    if splits is None or pa.types.is_null(splits.type):
        return pa.nulls(num_nodes, pa.string())
    if pa.types.is_dictionary(splits.type):
        splits = splits.dictionary_decode()
    if not (pa.types.is_string(splits.type) or pa.types.is_large_string(splits.type)):
        raise GraphInputError("nodes", f"splits must be strings, got {splits.type}")
    splits = splits.cast(pa.string())
    known = pc.is_in(splits, value_set=pa.array([*SPLITS, None], pa.string()))
    bad = _first(pc.invert(known))
    if bad is not None:
        raise GraphInputError(
            f"nodes[{bad}].split",
            f"split must be one of {', '.join(SPLITS)}, got {str(splits[bad].as_py())[:40]!r}",
        )
    return splits


def _check_features(features: Any, ids: Any) -> Float32s | None:
    """Features (num_nodes, dim): as many finite numbers for every node."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if features is None or pa.types.is_null(features.type):
        return None
    kind = features.type
    is_list = (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )
    value = kind.value_type if is_list else None
    if value is None or not (pa.types.is_floating(value) or pa.types.is_integer(value)):
        raise GraphInputError("nodes", f"features must be lists of numbers, got {kind}")
    assert len(features) == len(ids)

    def refuse(row: int, problem: str) -> GraphInputError:
        return GraphInputError(
            f"nodes[{row}].features", f"the features of node {ids[row].as_py()!r:.80} {problem}"
        )

    missing = _first(features.is_null())
    if missing is not None:
        raise refuse(missing, "are missing: all nodes have features, or none has")
    lengths = np.asarray(pc.list_value_length(features).to_numpy(), dtype=np.int64)
    dim = int(lengths[0])
    if not 1 <= dim <= MAX_FEATURE_DIM:
        raise refuse(0, f"must be 1 to {MAX_FEATURE_DIM} numbers, got {dim}")
    ragged = np.flatnonzero(lengths != dim)
    if len(ragged):
        row = int(ragged[0])
        raise refuse(row, f"are {lengths[row]} numbers, those of the first node are {dim}")
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes inf, which is refused
        numbers = features.flatten().to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
    values: Float32s = numbers.reshape(len(ids), dim)
    finite = np.isfinite(values)  # a null within a list reads as NaN
    if not finite.all():
        row, column = (int(place) for place in np.argwhere(~finite)[0])
        raise refuse(row, f"must be finite in float32, the number at {column} is not")
    return values


def _check_edges(sources: Any, targets: Any, ids: Any) -> Int64s:
    """Edges (num_edges, 2) as node indices."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if len(sources) > MAX_EDGES:
        raise GraphInputError("edges", f"at most {MAX_EDGES} edges, got {len(sources)}")
    assert len(sources) == len(targets)
    if len(sources) == 0:
        return np.empty((0, 2), dtype=np.int64)
    places = []
    for ends in (sources, targets):
        ends = _as_ids(ends, "edges")
        if ends.type != ids.type:
            names = {pa.int64(): "integers", pa.large_string(): "strings"}
            raise GraphInputError(
                "edges", f"edges are of {names[ends.type]}, node ids are {names[ids.type]}"
            )
        places.append(pc.index_in(ends, value_set=ids))
    unknown = _first(pc.or_(places[0].is_null(), places[1].is_null()))
    if unknown is not None:
        end = sources if not places[0][unknown].is_valid else targets
        got = end[unknown].as_py()
        shown = repr(got)[:80] if got is not None else "nothing"
        raise GraphInputError(f"edges[{unknown}]", f"edge names {shown}, which is no node's id")
    return np.stack([place.to_numpy().astype(np.int64) for place in places], axis=1)


def _first(mask: Any) -> int | None:
    """Row of the first true value of a boolean Arrow array; nulls are false."""
    import pyarrow.compute as pc

    row: int = pc.index(mask, True).as_py()
    return None if row < 0 else row


def _distinct_edges(ends_E2: Int64s, num_nodes: int, directed: bool) -> tuple[Int32s, int, int]:
    """Edges without self-loops and duplicates, sorted, and how many of each were dropped."""
    loops = ends_E2[:, 0] == ends_E2[:, 1]
    num_loops = int(loops.sum())
    ends_E2 = ends_E2[~loops] if num_loops else ends_E2
    if not directed:
        ends_E2 = np.sort(ends_E2, axis=1)
    # num_nodes < 2**31, so that a pair is one int64.
    pairs = _sorted_distinct(ends_E2[:, 0] * num_nodes + ends_E2[:, 1])
    edges = np.empty((len(pairs), 2), dtype=np.int32)
    np.floor_divide(pairs, num_nodes, out=edges[:, 0], casting="unsafe")
    np.remainder(pairs, num_nodes, out=edges[:, 1], casting="unsafe")
    return edges, num_loops, len(ends_E2) - len(pairs)


def _undirected_csr(edges: Int32s, num_nodes: int) -> tuple[Int64s, Int32s]:
    source = edges[:, 0].astype(np.int64)
    target = edges[:, 1].astype(np.int64)
    # distinct, because a directed graph may hold both directions of a pair
    pairs = _sorted_distinct(
        np.concatenate([source * num_nodes + target, target * num_nodes + source])
    )
    indptr = np.zeros(num_nodes + 1, dtype=np.int64)
    np.cumsum(np.bincount(pairs // num_nodes, minlength=num_nodes), out=indptr[1:])
    return indptr, (pairs % num_nodes).astype(np.int32)


def _sorted_distinct(values: Int64s) -> Int64s:
    """Sorts in place. `np.unique` hashes integers, which takes 15 times as long at 10 M values."""
    values.sort()
    first = np.ones(len(values), dtype=bool)
    np.not_equal(values[1:], values[:-1], out=first[1:])
    return values[first]


def _content_hash(parts: _Parts, directed: bool) -> str:
    digest = hashlib.sha256(b"directed" if directed else b"undirected")
    for column in parts.nodes.columns:
        _hash_column(digest, column)
    digest.update(np.ascontiguousarray(parts.edges, dtype="<i4").data)
    if parts.features is not None:  # else the hash is that of a graph from before features
        digest.update(f"features:{parts.features.shape[1]}:".encode())
        digest.update(np.ascontiguousarray(parts.features, dtype="<f4").data)
    return digest.hexdigest()


def _hash_column(digest: Any, column: Any) -> None:
    """Types, lengths and bytes; not Arrow's padding, slicing or the bytes behind a null."""
    import pyarrow as pa
    import pyarrow.compute as pc

    digest.update(f"{column.type}:{len(column)}:".encode())
    if pa.types.is_integer(column.type):
        digest.update(column.is_null().to_numpy(zero_copy_only=False).data)
        digest.update(pc.fill_null(column, 0).to_numpy().astype("<i8").data)
        return
    filled = pc.fill_null(column, "").cast(pa.large_string())
    digest.update(pc.fill_null(pc.binary_length(column), -1).to_numpy().astype("<i8").data)
    offsets = np.frombuffer(filled.buffers()[1], np.int64)[filled.offset :][: len(filled) + 1]
    data = filled.buffers()[2]
    if data is not None:
        digest.update(memoryview(data)[offsets[0] : offsets[-1]])


def _write_parts(folder: Path, parts: _Parts) -> int:
    """Write all but the manifest, through to the disk; bytes written."""
    import pyarrow as pa

    with pa.ipc.new_file(str(folder / "nodes.arrow"), parts.nodes.schema) as writer:
        writer.write_batch(parts.nodes)
    for name in ("id_order", "edges", "indptr", "indices"):
        np.save(folder / f"{name}.npy", getattr(parts, name), allow_pickle=False)
    if parts.features is not None:
        np.save(folder / "features.npy", parts.features, allow_pickle=False)
    total = 0
    for path in folder.iterdir():
        sync(path)
        total += path.stat().st_size
    return total


def _open(folder: Path, info: GraphInfo) -> Graph:
    import pyarrow as pa

    with pa.memory_map(str(folder / "nodes.arrow")) as source:
        nodes = pa.ipc.open_file(source).get_batch(0)
    names = ["id_order", "edges", "indptr", "indices"]
    if info.feature_dim is not None:
        names.append("features")
    arrays = {
        name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in names
    }
    return Graph(info=info, nodes=nodes, **arrays)
