"""Arrow IPC streams as they arrive from a network: any cut into chunks, one record batch at a time.

pyarrow's own reader blocks on a file; this one is fed, so that the sync and the async client share it. The service
sends every dictionary once, before the first batch, and in the metadata of the last message, which has no rows, what
the enrichment cost (`lathe.usage`).
"""

import json

import pyarrow as pa

from lathe_client.errors import UnexpectedAnswerError
from lathe_client.results import Enriched, Usage, from_batches, read_usage

MEDIA_TYPE = "application/vnd.apache.arrow.stream"
_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"
_UNREADABLE = (pa.ArrowException, OSError, KeyError, ValueError, TypeError, AttributeError)


def read_all(data: bytes) -> Enriched:
    """A whole stream at once. Raises: UnexpectedAnswerError."""
    try:
        with pa.ipc.open_stream(data) as reader:
            return from_batches(reader.schema, list(reader), None)
    except _UNREADABLE as error:
        raise UnexpectedAnswerError(f"the answer is no Arrow stream of Lathe: {error}") from error


class ArrowDecoder:
    """Batches out of chunks."""

    def __init__(self) -> None:
        self._buffer = b""
        self._head = b""  # schema and dictionaries, which every batch needs to be read
        self._ended = False

    def feed(self, chunk: bytes) -> list[Enriched]:
        """The batches that this chunk completes; the last of the stream has no rows and the usage.

        Raises:
            UnexpectedAnswerError: this is no such stream.
        """
        self._buffer += chunk
        found = []
        while (enriched := self._next()) is not None:
            found.append(enriched)
        return found

    def close(self) -> None:
        """Raises: UnexpectedAnswerError: the stream broke off."""
        if not self._ended or self._buffer:
            raise UnexpectedAnswerError("the stream ended before its last message")

    def _next(self) -> Enriched | None:
        while not self._ended and self._buffer:
            if self._buffer.startswith(_END):
                self._buffer = self._buffer[len(_END) :]
                self._ended = True
                return None
            if len(self._buffer) >= 4 and self._buffer[:4] != _END[:4]:
                raise UnexpectedAnswerError("the answer is no Arrow stream")
            reader = pa.BufferReader(self._buffer)
            try:
                message = pa.ipc.read_message(reader)
            except (pa.ArrowInvalid, OSError, EOFError):
                return None  # not all of it is there yet; `close` tells whether it ever came
            raw, self._buffer = self._buffer[: reader.tell()], self._buffer[reader.tell() :]
            if message.type != "record batch":
                self._head += raw
                continue
            return self._read(raw)
        return None

    def _read(self, raw: bytes) -> Enriched:
        try:
            with pa.ipc.open_stream(self._head + raw + _END) as reader:
                batch, metadata = reader.read_next_batch_with_custom_metadata()
                usage = _usage(metadata)
                return from_batches(reader.schema, [batch], usage)
        except _UNREADABLE as error:
            raise UnexpectedAnswerError(f"a message cannot be read: {error}") from error


def _usage(metadata: "pa.KeyValueMetadata | None") -> Usage | None:
    value = None if metadata is None else metadata.get(b"lathe.usage")
    return None if value is None else read_usage(json.loads(value))
