"""What an upload of each purpose must hold, and how texts for calibration and nodes are read from one.

JSON lines or, for calibration, Parquet. Read line by line or in pieces: a hostile file costs bounded memory.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec

from graph.enrich_types import EnrichNode
from graph.store import MAX_ID_BYTES, MAX_NODES, NodeId
from jobs.files import UploadPurpose
from training.data import DataError, read_examples

MAX_CALIBRATION_BYTES = 64 * 2**20
"""Of a calibration file, and of the text in it. A job reads at most a few million tokens of it."""
MAX_LINE_BYTES = 16 * 2**20
_ROWS_PER_PIECE = 1024


class _NodeLine(msgspec.Struct, forbid_unknown_fields=True):
    """Limits as in POST /v1/enrich."""

    id: (
        Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_ID_BYTES)]
        | Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
    )
    text: Annotated[str, msgspec.Meta(max_length=2**20)]
    neighbors: Annotated[list[str], msgspec.Meta(max_length=1000)] = []
    variables: dict[
        Annotated[str, msgspec.Meta(max_length=32)], Annotated[str, msgspec.Meta(max_length=20_000)]
    ] = {}


class FileContentError(ValueError):
    """Content that its purpose cannot use.

    Attributes:
        line: 1, 2, ...; None where no single line is at fault.
    """

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message if line is None else f"line {line}: {message}")
        self.line = line


def check_file(path: Path, purpose: UploadPurpose) -> None:
    """Raises: FileContentError."""
    if path.stat().st_size == 0:
        raise FileContentError("the file is empty")
    _CHECKS[purpose](path)


def read_texts(path: Path) -> Iterator[str]:
    """The texts of a calibration file: the `text` of every JSON line or Parquet row; other fields are not read.

    Raises:
        FileContentError
    """
    with path.open("rb") as file:
        is_parquet = file.read(4) == b"PAR1"
    num_bytes = 0
    for line, text in _parquet_texts(path) if is_parquet else _line_texts(path):
        if not isinstance(text, str):
            raise FileContentError('needs "text", a string', line)
        _check_writable({"text": text}, line)
        num_bytes += len(text.encode())
        if num_bytes > MAX_CALIBRATION_BYTES:
            raise FileContentError(
                f"the text of a calibration file has at most {MAX_CALIBRATION_BYTES} bytes"
            )
        yield text


def read_nodes(path: Path) -> Iterator[EnrichNode]:
    """The nodes of a file for enrichment: per line `id`, `text` and optionally `neighbors`, texts, best first, and
    `variables` of the prompt.

    Raises:
        FileContentError: also for a node with another field, or an id that was there before.
    """
    seen: set[NodeId] = set()
    kind: type | None = None
    for number, row in _json_lines(path):
        _check_writable(row, number)
        try:
            node = msgspec.convert(row, _NodeLine)
        except msgspec.ValidationError as error:
            raise FileContentError(str(error), number) from None
        kind = kind or type(node.id)
        if type(node.id) is not kind:
            raise FileContentError("ids must all be strings or all be integers", number)
        if node.id in seen:
            raise FileContentError("its id was on a line before", number)
        if len(seen) == MAX_NODES:
            raise FileContentError(f"a file has at most {MAX_NODES} nodes", number)
        seen.add(node.id)
        yield EnrichNode(
            id=node.id,
            text=node.text,
            neighbors=tuple(node.neighbors),
            variables=node.variables,
        )


def _line_texts(path: Path) -> Iterator[tuple[int, Any]]:
    return ((number, row.get("text")) for number, row in _json_lines(path))


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and object of each line that is not blank."""
    with path.open("rb") as file:
        number = 0
        while raw := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(raw) > MAX_LINE_BYTES:
                raise FileContentError(f"longer than {MAX_LINE_BYTES} bytes", number)
            if raw.isspace():
                continue
            try:
                row = json.loads(raw.decode())
            except UnicodeDecodeError:
                raise FileContentError("not UTF-8", number) from None
            except (ValueError, RecursionError) as error:
                reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deep"
                raise FileContentError(f"not valid JSON: {reason}", number) from None
            if not isinstance(row, dict):
                raise FileContentError("not a JSON object", number)
            yield number, row


def _check_writable(row: Mapping[str, Any], line: int) -> None:
    """What can be read need not be JSON that can be written again. Raises: FileContentError."""
    for name, value in row.items():
        try:
            json.dumps({name: value}, ensure_ascii=False, allow_nan=False).encode()
        except UnicodeEncodeError:
            message = f"{name!r:.40} must be valid Unicode, it has a lone surrogate"
            raise FileContentError(message, line) from None
        except ValueError:
            raise FileContentError(f"{name!r:.40} has a number that is not finite", line) from None
        except RecursionError:
            raise FileContentError(f"{name!r:.40} is nested too deep", line) from None


def _parquet_texts(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if "text" not in pq.read_schema(path).names:
            raise FileContentError("the Parquet file has no column 'text'")
        with pq.ParquetFile(path, read_dictionary=["text"]) as reader:
            # As a dictionary, a text that a small file repeats a million times is in memory once.
            kind = reader.schema_arrow.field("text").type
            if pa.types.is_dictionary(kind):
                kind = kind.value_type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise FileContentError(f"column 'text' has type {kind}, not string")
            place = reader.schema_arrow.names.index("text")
            for index in range(reader.metadata.num_row_groups):
                column = reader.metadata.row_group(index).column(place)
                if "DELTA_BYTE_ARRAY" in column.encodings:  # repeats text too, in no dictionary
                    raise FileContentError(
                        "column 'text' is encoded as DELTA_BYTE_ARRAY, which is not read"
                    )
                size = column.total_uncompressed_size
                if size > MAX_CALIBRATION_BYTES:
                    raise FileContentError(
                        f"a row group has {size} bytes of text, at most {MAX_CALIBRATION_BYTES}"
                    )
            row = 0
            for batch in reader.iter_batches(_ROWS_PER_PIECE, columns=["text"], use_threads=False):
                batch.validate(full=True)
                if batch.nbytes > MAX_CALIBRATION_BYTES:
                    raise FileContentError(
                        f"the text of a calibration file has at most {MAX_CALIBRATION_BYTES} bytes"
                    )
                for text in batch.column(0):
                    row += 1
                    yield row, text.as_py()
    except (pa.ArrowException, OSError, MemoryError, OverflowError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise FileContentError(f"not a readable Parquet file: {reason}") from None


def _check_calibration(path: Path) -> None:
    if path.stat().st_size > MAX_CALIBRATION_BYTES:
        raise FileContentError(f"a calibration file has at most {MAX_CALIBRATION_BYTES} bytes")
    if not any([text.strip() != "" for text in read_texts(path)]):  # every line, not the first
        raise FileContentError("no line has any text")


def read_batch(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and request of each line of a batch: `custom_id`, `method`, `url`, `body`.

    Raises:
        FileContentError
    """
    seen: set[str] = set()
    for number, row in _json_lines(path):
        custom_id = row.get("custom_id")
        if not isinstance(custom_id, str) or row.get("method") != "POST":
            raise FileContentError('needs "custom_id", a string, and "method": "POST"', number)
        if not isinstance(row.get("url"), str) or not isinstance(row.get("body"), dict):
            raise FileContentError('needs "url", a string, and "body", an object', number)
        if custom_id in seen:
            raise FileContentError("its custom_id was on a line before", number)
        _check_writable(row, number)
        seen.add(custom_id)
        yield number, row
    if not seen:
        raise FileContentError("the file has no line")


def _check_batch(path: Path) -> None:
    for _ in read_batch(path):
        pass


def _check_fine_tune(path: Path) -> None:
    try:
        for _ in read_examples(path):
            pass
    except DataError as error:
        raise FileContentError(error.message, error.line or None) from None


def _check_nodes(path: Path) -> None:
    if not any([True for _ in read_nodes(path)]):  # every line, not the first
        raise FileContentError("the file has no line")


_CHECKS: dict[UploadPurpose, Callable[[Path], None]] = {
    "fine-tune": _check_fine_tune,
    "batch": _check_batch,
    "user_data": lambda path: None,
    "calibration": _check_calibration,
    "enrich": _check_nodes,
}
