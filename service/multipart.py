"""Multipart uploads of one file, handed on as it arrives: its bytes are never in memory whole, nor in a second file.

Starlette's own form parser first spools a file to the system's temporary folder, which may be small or in memory.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import anyio
from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect

from service.errors import ApiError

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

MAX_FIELDS = 16
MAX_FIELD_BYTES = 1024
MAX_FILENAME_CHARS = 255
_WRITE_BYTES = 2**20


@dataclass(slots=True, kw_only=True)
class Form:
    """Attributes: filename: None where no file came."""

    filename: str | None = None
    fields: dict[str, str] = field(default_factory=dict)


async def receive_form(request: Request, file_part: str, write: Callable[[bytes], None]) -> Form:
    """Read the whole body: the one file into `write`, called in a worker thread, the other parts into the form.

    Raises:
        ApiError
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind != b"multipart/form-data" or b"boundary" not in options:
        raise ApiError(
            "unsupported_media_type", "the body must be multipart/form-data with a boundary"
        )
    reader = _Reader(file_part)
    try:
        parser = MultipartParser(options[b"boundary"], reader.callbacks)
        async for chunk in request.stream():
            parser.write(chunk)
            if reader.num_waiting >= _WRITE_BYTES:
                await anyio.to_thread.run_sync(write, reader.take())
    except (FormParserError, ValueError) as error:
        raise ApiError("invalid_value", f"the multipart body is not valid: {error}") from None
    except ClientDisconnect:
        raise ApiError(
            "request_timeout", "the client left before its upload was complete"
        ) from None
    await anyio.to_thread.run_sync(write, reader.take())
    if not reader.ended:
        raise ApiError("invalid_value", "the multipart body is not complete")
    return reader.form


class _Reader:
    """What the parser calls. A part with a file name is the file, any other a field."""

    def __init__(self, file_part: str) -> None:
        self._file_part = file_part
        self._file_bytes = bytearray()
        self._header = bytearray()
        self._value = bytearray()
        self._headers: dict[str, str] = {}
        self._name = ""
        self._is_file = False
        self._text = bytearray()
        self.form = Form()
        self.ended = False
        self.callbacks: MultipartCallbacks = {
            "on_part_begin": self._begin,
            "on_header_field": self._add_to_header,
            "on_header_value": self._add_to_value,
            "on_header_end": self._end_header,
            "on_headers_finished": self._start_part,
            "on_part_data": self._data,
            "on_part_end": self._end_part,
            "on_end": self._end,
        }

    @property
    def num_waiting(self) -> int:
        return len(self._file_bytes)

    def take(self) -> bytes:
        taken = bytes(self._file_bytes)
        self._file_bytes.clear()
        return taken

    def _begin(self) -> None:
        self._headers.clear()
        self._text.clear()

    def _add_to_header(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _add_to_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        self._headers[self._header.decode("latin-1").lower()] = self._value.decode("latin-1")
        self._header.clear()
        self._value.clear()

    def _start_part(self) -> None:
        _, options = parse_options_header(self._headers.get("content-disposition", ""))
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        self._is_file = b"filename" in options
        if self._is_file:
            if self._name != self._file_part:
                raise ApiError("invalid_value", f"the file must be part {self._file_part!r}")
            if self.form.filename is not None:
                raise ApiError("invalid_value", "there must be one file", self._file_part)
            self.form.filename = _file_name(options[b"filename"].decode("utf-8", "replace"))
        elif self._name in self.form.fields:
            raise ApiError("invalid_value", "this part is there twice", self._name)
        elif len(self.form.fields) >= MAX_FIELDS:
            raise ApiError("invalid_value", f"at most {MAX_FIELDS} parts besides the file")

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._is_file:
            self._file_bytes += data[start:end]
            return
        self._text += data[start:end]
        if len(self._text) > MAX_FIELD_BYTES:
            raise ApiError("invalid_value", f"at most {MAX_FIELD_BYTES} bytes here", self._name)

    def _end_part(self) -> None:
        if self._is_file:
            return
        try:
            self.form.fields[self._name] = self._text.decode()
        except UnicodeDecodeError:
            raise ApiError("invalid_value", "not UTF-8", self._name) from None

    def _end(self) -> None:
        self.ended = True


def _file_name(name: str) -> str:
    """What is shown for the file: the last part of a path, if the client sent one, without control characters."""
    last = name.replace("\\", "/").rpartition("/")[2]
    return "".join(c if c.isprintable() else "�" for c in last)[:MAX_FILENAME_CHARS] or "upload"
