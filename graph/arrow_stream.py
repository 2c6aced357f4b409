"""Enrichment results as an Arrow IPC stream: its schema, its batches, and what the metadata say.

Columns, `text` and the two of the embedding only where they were asked for:

    node_id                     string or int64, as in the request
    status                      dictionary<int8, string>: ok, cached, skipped_budget, invalid_output, failed
    text                        string, nullable
    fields, label               string, nullable: a JSON answer as it was written, and the class in it; these and
    repaired                    bool: whether the LLM was asked twice; of prompts that ask for JSON only
    embedding                   fixed_size_list<float32 or float16>[dim], nullable
    embedding_source            dictionary<int8, string>, nullable: enriched, raw
    tokens_in, tokens_out       int32
    finish_reason               dictionary<int8, string>, nullable: stop, length
    truncated_tokens            int32
    embedding_truncated_tokens  int32
    neighbors_used              int32
    content_hash                fixed_size_binary[32]
    error_code, error_message   string, nullable

Metadata of the schema (UTF-8): `lathe.model`, `lathe.embedding_model`, `lathe.prompt` (JSON: id, version, hash), and
`lathe.usage` (JSON, as in the JSON answer) where all is known before the first byte. Else rows come as they finish, in
any order, and the last batch has no rows and `lathe.usage` in its own metadata. Dictionaries are complete from the
start and are sent once.
"""

import io
from collections.abc import Sequence
from typing import Any, Literal

import msgspec
import numpy as np

from graph.enrich_types import ITEM_STATUSES, EnrichRequest, EnrichResult, EnrichRow
from graph.store import NodeId

MEDIA_TYPE = "application/vnd.apache.arrow.stream"
EmbeddingDtype = Literal["float32", "float16"]
_SOURCES = ("enriched", "raw")
_FINISH_REASONS = ("stop", "length")


def vector(row_embedding: bytes, dtype: EmbeddingDtype) -> Any:
    """A row's embedding as a NumPy vector."""
    return np.frombuffer(row_embedding, "<f4").astype(np.dtype(dtype))


def encode_stream(
    request: EnrichRequest, result: EnrichResult, usage: dict[str, Any], dtype: EmbeddingDtype
) -> bytes:
    """A whole stream: all rows in one batch."""
    sink = io.BytesIO()
    writer = ArrowWriter(
        sink, request, node_id=result.rows[0].node_id, dim=result.dim, dtype=dtype, usage=usage
    )
    writer.write(result.rows)
    writer.close()
    return sink.getvalue()


class ArrowWriter:
    """Writes rows as they come.

    Args:
        sink: a binary file.
        node_id: any id of their type.
        dim: of the embeddings, where they are asked for.
        usage: for the schema's metadata, if it is known.
    """

    def __init__(
        self,
        sink: Any,
        request: EnrichRequest,
        *,
        node_id: NodeId,
        dim: int | None,
        dtype: EmbeddingDtype,
        usage: dict[str, Any] | None = None,
    ) -> None:
        import pyarrow as pa

        self._outputs = request.outputs
        self._has_fields = _has_fields(request)
        self._dim = dim
        self._dtype: EmbeddingDtype = dtype
        self._schema = _schema(request, node_id, dim, dtype, usage)
        self._writer = pa.ipc.new_stream(sink, self._schema)

    def write(self, rows: Sequence[EnrichRow], usage: dict[str, Any] | None = None) -> None:
        """One batch. Args: usage: for its metadata."""
        metadata = None if usage is None else {"lathe.usage": msgspec.json.encode(usage)}
        self._writer.write_batch(self._batch(rows), custom_metadata=metadata)

    def close(self) -> None:
        """Write the end of the stream."""
        self._writer.close()

    def _batch(self, rows: Sequence[EnrichRow]) -> Any:
        import pyarrow as pa

        columns = [
            pa.array([row.node_id for row in rows], self._schema.field("node_id").type),
            _dictionary([row.status for row in rows], ITEM_STATUSES),
        ]
        if "text" in self._outputs:
            columns.append(pa.array([row.text for row in rows], pa.string()))
        if self._has_fields:
            columns += [
                pa.array([_json(row.fields) for row in rows], pa.string()),
                pa.array([row.label for row in rows], pa.string()),
                pa.array([row.repaired for row in rows], pa.bool_()),
            ]
        if "embedding" in self._outputs:
            assert self._dim is not None
            columns.append(_embeddings(rows, self._dim, self._dtype))
            columns.append(_dictionary([row.embedding_source for row in rows], _SOURCES))
        columns += [
            pa.array([row.tokens_in for row in rows], pa.int32()),
            pa.array([row.tokens_out for row in rows], pa.int32()),
            _dictionary([row.finish_reason for row in rows], _FINISH_REASONS),
            pa.array([row.truncated_tokens for row in rows], pa.int32()),
            pa.array([row.embedding_truncated_tokens for row in rows], pa.int32()),
            pa.array([row.neighbors_used for row in rows], pa.int32()),
            pa.array([bytes.fromhex(row.content_hash) for row in rows], pa.binary(32)),
            pa.array([row.error and row.error.code for row in rows], pa.string()),
            pa.array([row.error and row.error.message for row in rows], pa.string()),
        ]
        return pa.RecordBatch.from_arrays(columns, schema=self._schema)


def _schema(
    request: EnrichRequest,
    node_id: NodeId,
    dim: int | None,
    dtype: EmbeddingDtype,
    usage: dict[str, Any] | None,
) -> Any:
    import pyarrow as pa

    dictionary = pa.dictionary(pa.int8(), pa.string())
    fields = [
        ("node_id", pa.int64() if isinstance(node_id, int) else pa.string()),
        ("status", dictionary),
    ]
    if "text" in request.outputs:
        fields.append(("text", pa.string()))
    if _has_fields(request):
        fields += [("fields", pa.string()), ("label", pa.string()), ("repaired", pa.bool_())]
    if "embedding" in request.outputs:
        value = pa.float16() if dtype == "float16" else pa.float32()
        fields += [("embedding", pa.list_(value, dim)), ("embedding_source", dictionary)]
    fields += [
        ("tokens_in", pa.int32()),
        ("tokens_out", pa.int32()),
        ("finish_reason", dictionary),
        ("truncated_tokens", pa.int32()),
        ("embedding_truncated_tokens", pa.int32()),
        ("neighbors_used", pa.int32()),
        ("content_hash", pa.binary(32)),
        ("error_code", pa.string()),
        ("error_message", pa.string()),
    ]
    prompt = request.prompt
    metadata = {
        "lathe.model": request.model,
        "lathe.prompt": msgspec.json.encode(
            {"id": prompt.id, "version": prompt.version, "hash": prompt.hash}
        ),
    }
    if usage is not None:
        metadata["lathe.usage"] = msgspec.json.encode(usage)
    if "embedding" in request.outputs:
        metadata["lathe.embedding_model"] = request.embedding_model
    return pa.schema(fields, metadata)


def _has_fields(request: EnrichRequest) -> bool:
    return bool(request.prompt.output["type"] == "json")


def _json(fields: dict[str, Any] | None) -> str | None:
    return None if fields is None else msgspec.json.encode(fields).decode()


def _dictionary(values: Sequence[str | None], known: Sequence[str]) -> Any:
    import pyarrow as pa

    numbers = {value: number for number, value in enumerate(known)}
    indices = pa.array([None if v is None else numbers[v] for v in values], pa.int8())
    return pa.DictionaryArray.from_arrays(indices, pa.array(known, pa.string()))


def _embeddings(rows: Sequence[EnrichRow], dim: int, dtype: EmbeddingDtype) -> Any:
    import pyarrow as pa

    none = bytes(4 * dim)
    joined = b"".join(none if row.embedding is None else row.embedding for row in rows)
    values = np.frombuffer(joined, "<f4").astype(np.dtype(dtype))
    missing = pa.array([row.embedding is None for row in rows], pa.bool_())
    return pa.FixedSizeListArray.from_arrays(pa.array(values), dim, mask=missing)
