"""Enrichment results as JSON: one row, and what all of them cost; the same in answers, streams and files."""

import base64
from dataclasses import asdict
from typing import Any

from graph.arrow_stream import EmbeddingDtype, vector
from graph.enrich_types import EnrichRequest, EnrichRow, EnrichUsage


def json_row(
    request: EnrichRequest, row: EnrichRow, *, dtype: EmbeddingDtype, as_base64: bool
) -> dict[str, Any]:
    """Args: as_base64: the vector's little-endian bytes, rather than a list of numbers."""
    embedding: list[float] | str | None = None
    if row.embedding is not None:
        numbers = vector(row.embedding, dtype)
        embedding = base64.b64encode(numbers.tobytes()).decode() if as_base64 else numbers.tolist()
    return {
        "node_id": row.node_id,
        "status": row.status,
        "text": row.text,
        "fields": row.fields,
        "label": row.label,
        "repaired": row.repaired,
        "embedding": embedding,
        "embedding_source": row.embedding_source,
        "tokens_in": row.tokens_in,
        "tokens_out": row.tokens_out,
        "finish_reason": row.finish_reason,
        "truncated_tokens": row.truncated_tokens,
        "embedding_truncated_tokens": row.embedding_truncated_tokens,
        "neighbors_used": row.neighbors_used,
        "content_hash": row.content_hash,
        "model": request.model,
        "embedding_model": request.embedding_model if "embedding" in request.outputs else None,
        "prompt_id": request.prompt.id,
        "prompt_version": request.prompt.version,
        "prompt_hash": request.prompt.hash,
        "error": row.error and {"code": row.error.code, "message": row.error.message},
    }


def json_usage(usage: EnrichUsage) -> dict[str, Any]:
    return {
        **asdict(usage),
        "total_tokens": usage.total_tokens,
        "seconds": round(usage.seconds, 6),
    }
