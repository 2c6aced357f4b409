"""Enrichment results as an Arrow IPC stream: one record batch, its schema, and what the schema's metadata says.

Columns, `text` and the two of the embedding only where they were asked for:

    node_id                     string or int64, as in the request
    status                      dictionary<int8, string>: ok, cached, skipped_budget, invalid_output, failed
    text                        string, nullable
    embedding                   fixed_size_list<float32 or float16>[dim], nullable
    embedding_source            dictionary<int8, string>, nullable: enriched, raw
    tokens_in, tokens_out       int32
    finish_reason               dictionary<int8, string>, nullable: stop, length
    truncated_tokens            int32
    embedding_truncated_tokens  int32
    neighbors_used              int32
    content_hash                fixed_size_binary[32]
    error_code, error_message   string, nullable

Metadata (UTF-8): `lathe.model`, `lathe.embedding_model`, `lathe.prompt` (JSON: id, version, hash), `lathe.usage`
(JSON, as in the JSON answer).
"""

from typing import Any, Literal

import msgspec
import numpy as np

from graph.enrich import EnrichRequest, EnrichResult, EnrichRow

MEDIA_TYPE = "application/vnd.apache.arrow.stream"
EmbeddingDtype = Literal["float32", "float16"]


def vector(row_embedding: bytes, dtype: EmbeddingDtype) -> Any:
    """A row's embedding as a NumPy vector."""
    return np.frombuffer(row_embedding, "<f4").astype(np.dtype(dtype))


def encode_stream(
    request: EnrichRequest, result: EnrichResult, usage: dict[str, Any], dtype: EmbeddingDtype
) -> bytes:
    """The whole stream."""
    import pyarrow as pa

    columns = _columns(request, result, dtype)
    metadata = {
        "lathe.model": request.model,
        "lathe.prompt": msgspec.json.encode(
            {
                "id": request.prompt.id,
                "version": request.prompt.version,
                "hash": request.prompt.hash,
            }
        ),
        "lathe.usage": msgspec.json.encode(usage),
    }
    if "embedding" in request.outputs:
        metadata["lathe.embedding_model"] = request.embedding_model
    batch = pa.record_batch(columns).replace_schema_metadata(metadata)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _columns(request: EnrichRequest, result: EnrichResult, dtype: EmbeddingDtype) -> dict[str, Any]:
    import pyarrow as pa

    rows = result.rows
    columns: dict[str, Any] = {
        "node_id": pa.array([row.node_id for row in rows]),
        "status": _dictionary([row.status for row in rows]),
    }
    if "text" in request.outputs:
        columns["text"] = pa.array([row.text for row in rows], pa.string())
    if "embedding" in request.outputs:
        assert result.dim is not None
        columns["embedding"] = _embeddings(rows, result.dim, dtype)
        columns["embedding_source"] = _dictionary([row.embedding_source for row in rows])
    columns |= {
        "tokens_in": pa.array([row.tokens_in for row in rows], pa.int32()),
        "tokens_out": pa.array([row.tokens_out for row in rows], pa.int32()),
        "finish_reason": _dictionary([row.finish_reason for row in rows]),
        "truncated_tokens": pa.array([row.truncated_tokens for row in rows], pa.int32()),
        "embedding_truncated_tokens": pa.array(
            [row.embedding_truncated_tokens for row in rows], pa.int32()
        ),
        "neighbors_used": pa.array([row.neighbors_used for row in rows], pa.int32()),
        "content_hash": pa.array([bytes.fromhex(row.content_hash) for row in rows], pa.binary(32)),
        "error_code": pa.array([row.error and row.error.code for row in rows], pa.string()),
        "error_message": pa.array([row.error and row.error.message for row in rows], pa.string()),
    }
    return columns


def _dictionary(values: list[Any]) -> Any:
    import pyarrow as pa

    encoded = pa.array(values, pa.string()).dictionary_encode()
    return encoded.cast(pa.dictionary(pa.int8(), pa.string()))


def _embeddings(rows: tuple[EnrichRow, ...], dim: int, dtype: EmbeddingDtype) -> Any:
    import pyarrow as pa

    values = np.zeros((len(rows), dim), dtype=np.dtype(dtype))
    for index, row in enumerate(rows):
        if row.embedding is not None:
            values[index] = vector(row.embedding, dtype)
    missing = pa.array([row.embedding is None for row in rows])
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), dim, mask=missing)
