"""What the service answers, as types.

Rows of an enrichment stay an Arrow table: a million of them are read without a Python object per node.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

NodeId = str | int
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What an enrichment cost.

    Attributes:
        prompt_tokens, completion_tokens: of LLM calls made for it.
        prefix_hit_tokens: of the prompt tokens, those that the engine found computed.
        cached_tokens: what its rows would have cost without the cache.
        stopped_by: the budget that ran out first.
    """

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prefix_hit_tokens: int = 0
    embedding_tokens: int
    cached_tokens: int
    num_nodes: int
    num_by_status: dict[str, int]
    seconds: float
    stopped_by: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptRef:
    """Which prompt wrote the texts. Attributes: hash: of all that shapes an answer."""

    id: str
    version: int
    hash: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EnrichedNode:
    """One row.

    Attributes:
        label, fields: of a prompt that answers in JSON: the class in it, and all of it.
        embedding: None where the row has none.
    """

    node_id: NodeId
    status: str
    text: str | None
    label: str | None
    fields: dict[str, Any] | None
    embedding: npt.NDArray[Any] | None
    error_code: str | None
    error_message: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Enriched:
    """Rows of an enrichment.

    Attributes:
        table: all columns, as `graph/arrow_stream.py` of the service lists them.
        embedding_model: None where no embedding was asked for.
        usage: None in the batches of a stream that still goes on.
    """

    table: pa.Table
    model: str
    embedding_model: str | None
    prompt: PromptRef
    usage: Usage | None

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @property
    def node_ids(self) -> list[NodeId]:
        return list(self.table.column("node_id").to_pylist())

    @property
    def statuses(self) -> list[str]:
        return list(self.table.column("status").to_pylist())

    @property
    def error_codes(self) -> list[str | None]:
        return self._strings("error_code")

    @property
    def texts(self) -> list[str | None]:
        """All None where no text was asked for."""
        return self._strings("text")

    @property
    def labels(self) -> list[str | None]:
        """The classes that the LLM chose; all None where the prompt asks for none."""
        return self._strings("label")

    def _strings(self, name: str) -> list[str | None]:
        if name not in self.table.column_names:
            return [None] * len(self)
        return list(self.table.column(name).to_pylist())

    @property
    def dim(self) -> int | None:
        """Width of the embeddings; None where none were asked for."""
        if "embedding" not in self.table.column_names:
            return None
        return int(self.table.schema.field("embedding").type.list_size)

    @property
    def has_embedding(self) -> npt.NDArray[np.bool_]:
        if self.dim is None:
            return np.zeros(len(self), dtype=bool)
        valid = self.table.column("embedding").is_valid()
        return np.asarray(valid.to_numpy(), dtype=bool)

    @property
    def enriched_mask(self) -> npt.NDArray[np.bool_]:
        """Rows whose embedding has what the LLM wrote in it; that of an invalid output is of the node's text alone."""
        if self.dim is None:
            return np.zeros(len(self), dtype=bool)
        is_enriched = pc.equal(self.table.column("embedding_source").cast(pa.string()), "enriched")
        return np.asarray(pc.fill_null(is_enriched, False).to_numpy(), dtype=bool)

    @property
    def embeddings(self) -> npt.NDArray[Any]:
        """(rows, dim); zeros in a row without.

        Raises:
            ValueError: no embedding was asked for.
        """
        if self.dim is None:
            raise ValueError("this enrichment has no embeddings: ask for return 'embedding'")
        column = self.table.column("embedding")
        none = np.asarray(pa.array([], column.type.value_type))  # for the dtype, of no chunk
        # Behind a null a fixed-size list keeps values that mean nothing.
        parts = [
            np.asarray(chunk.values)[chunk.offset * self.dim :][: len(chunk) * self.dim]
            for chunk in column.chunks
        ]
        values = np.concatenate([none, *parts]).reshape(-1, self.dim)
        return np.where(self.has_embedding[:, None], values, values.dtype.type(0))

    def rows(self) -> Iterator[EnrichedNode]:
        embeddings = None if self.dim is None else self.embeddings
        has_embedding = self.has_embedding
        codes, messages = self.error_codes, self._strings("error_message")
        labels, fields = self.labels, self._strings("fields")
        for index, (node_id, status, text) in enumerate(
            zip(self.node_ids, self.statuses, self.texts, strict=True)
        ):
            answer = fields[index]
            yield EnrichedNode(
                node_id=node_id,
                status=status,
                text=text,
                label=labels[index],
                fields=None if answer is None else json.loads(answer),
                embedding=(
                    embeddings[index] if embeddings is not None and has_embedding[index] else None
                ),
                error_code=codes[index],
                error_message=messages[index],
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """A graph of the service."""

    id: str
    name: str
    directed: bool
    id_type: str
    num_nodes: int
    num_edges: int
    num_self_loops: int
    num_duplicate_edges: int
    has_labels: bool
    has_splits: bool
    content_hash: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Nodes worth an LLM call, best first. Attributes: raw: the whole answer."""

    graph_id: str
    strategy: str
    node_ids: list[NodeId]
    scores: list[float]
    raw: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A job, when it was asked for. Attributes: step, total: its progress."""

    id: str
    type: str
    status: str
    step: int
    total: int
    result: dict[str, Any] | None
    error: dict[str, Any] | None

    @property
    def has_ended(self) -> bool:
        return self.status in ("succeeded", "failed", "cancelled")


def known_fields(kind: type[T], body: Mapping[str, Any], **more: Any) -> T:
    """An instance from JSON; what a newer service adds is left out."""
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in {**body, **more}.items() if name in names})


def read_graph(body: Mapping[str, Any]) -> Graph:
    return known_fields(Graph, body)


def read_selection(body: Mapping[str, Any]) -> Selection:
    return known_fields(Selection, body, raw=dict(body))


def read_job(body: Mapping[str, Any]) -> Job:
    progress = body["progress"]
    return known_fields(Job, body, step=progress["step"], total=progress["total"])


def read_usage(body: Mapping[str, Any]) -> Usage:
    return known_fields(Usage, body)


def join(parts: Sequence[Enriched]) -> Enriched:
    """Rows of several enrichments by one prompt and one model, in order; usages are added up."""
    first = parts[0]
    usages = [part.usage for part in parts if part.usage is not None]
    return Enriched(
        table=pa.concat_tables([part.table for part in parts]),
        model=first.model,
        embedding_model=first.embedding_model,
        prompt=first.prompt,
        usage=_add(usages) if usages else None,
    )


def _add(usages: Sequence[Usage]) -> Usage:
    def total(name: str) -> Any:
        return sum(getattr(usage, name) for usage in usages)

    names = [f.name for f in fields(Usage) if f.name not in ("num_by_status", "stopped_by")]
    statuses = list(dict.fromkeys(name for usage in usages for name in usage.num_by_status))
    return Usage(
        **{name: total(name) for name in names},
        num_by_status={
            status: sum(usage.num_by_status.get(status, 0) for usage in usages)
            for status in statuses
        },
        stopped_by=next((u.stopped_by for u in usages if u.stopped_by is not None), None),
    )


def from_batches(
    schema: pa.Schema, batches: Sequence[pa.RecordBatch], usage: Usage | None
) -> Enriched:
    """Raises: KeyError, ValueError: the schema's metadata is not a Lathe service's."""
    metadata = {key.decode(): value for key, value in (schema.metadata or {}).items()}
    if usage is None and "lathe.usage" in metadata:
        usage = read_usage(json.loads(metadata["lathe.usage"]))
    encoder = metadata.get("lathe.embedding_model")
    return Enriched(
        table=pa.Table.from_batches(batches, schema).replace_schema_metadata(None),
        model=metadata["lathe.model"].decode(),
        embedding_model=None if encoder is None else encoder.decode(),
        prompt=known_fields(PromptRef, json.loads(metadata["lathe.prompt"])),
        usage=usage,
    )
