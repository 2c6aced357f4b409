"""How Engine protocol messages become bytes: length-prefixed msgpack frames over a Unix stream socket. Only
this file knows.

A frame is a 4-byte big-endian length and one message. Payloads are typed by method name; a frame that does
not decode is a
`WireError`, and whoever reads it closes the connection.
"""

import asyncio
from typing import Any, TypeVar

import msgspec

from engines.protocol import (
    EmbedRequest,
    EmbedResult,
    EngineInfo,
    EngineStats,
    ErrorCode,
    GenerateRequest,
    ScoreRequest,
    ScoreResult,
    TokenOutput,
)

MAX_FRAME_BYTES = 256 * 2**20
T = TypeVar("T")


class WireError(Exception):
    """Bytes that are no frame of this protocol."""


class ErrorInfo(msgspec.Struct, frozen=True):
    code: ErrorCode
    message: str
    param: str | None = None


class Call(msgspec.Struct, frozen=True, tag="call"):
    """Client to host; answered by the `Reply` of the same id."""

    id: int
    method: str
    payload: msgspec.Raw = msgspec.Raw(b"\xc0")


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """Client to host; not answered."""

    request_id: str


class Reply(msgspec.Struct, frozen=True, tag="reply"):
    id: int
    payload: msgspec.Raw = msgspec.Raw(b"\xc0")
    error: ErrorInfo | None = None


class Outputs(msgspec.Struct, frozen=True, tag="outputs"):
    """Host to client: everything that one step gave this connection's requests."""

    outputs: list[TokenOutput]


Message = Call | Abort | Reply | Outputs

# method: (type of the call's payload, type of the reply's payload)
METHODS: dict[str, tuple[Any, Any]] = {
    "info": (None, EngineInfo),
    "stats": (None, EngineStats),
    "generate": (GenerateRequest, None),
    "embed": (EmbedRequest, EmbedResult),
    "score": (ScoreRequest, ScoreResult),
    "sleep": (None, None),
    "wake": (None, None),
}

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Message)


def encode_payload(value: object) -> msgspec.Raw:
    return msgspec.Raw(_encoder.encode(value))


def decode_payload(raw: msgspec.Raw, expected: type[T] | None) -> T:
    """Raises: WireError."""
    try:
        return msgspec.msgpack.decode(raw, type=expected)
    except msgspec.DecodeError as error:
        raise WireError(f"payload: {error}") from None


def encode_frame(message: Message) -> bytes:
    body = _encoder.encode(message)
    return len(body).to_bytes(4, "big") + body


async def read_frame(reader: asyncio.StreamReader) -> Message | None:
    """The next message; None at a clean end of the stream.

    Raises:
        WireError: too large, cut short, or not a message.
    """
    try:
        length = int.from_bytes(await reader.readexactly(4), "big")
        if length > MAX_FRAME_BYTES:
            raise WireError(f"frame of {length} bytes, at most {MAX_FRAME_BYTES}")
        body = await reader.readexactly(length)
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise WireError("the stream ended inside a frame") from None
        return None
    try:
        message: Message = _decoder.decode(body)
        return message
    except msgspec.DecodeError as error:
        raise WireError(f"frame: {error}") from None
