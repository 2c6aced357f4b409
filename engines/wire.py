"""How Engine protocol messages become bytes: length-prefixed msgpack frames over a Unix stream socket.

A frame is a 4-byte big-endian length and one message, typed by a tag. Each end decodes only what the other may
send. Whoever reads bytes that are no frame gets a `WireError` and closes the connection.
"""

import asyncio
from typing import Literal

import msgspec

from engines.origin import Origin
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

PROTOCOL_VERSION = 1
MAX_FRAME_BYTES = 64 * 2**20
"""The largest honest frames are embedding rows (8,192 rows of 2,048 floats) and embedding results."""
_LENGTH_BYTES = 4


class WireError(Exception):
    """Bytes that are no frame of this protocol, or a message too large to become one."""


class Generate(msgspec.Struct, frozen=True, array_like=True, tag="generate"):
    """Answered by `Done` (accepted; `Outputs` follow) or `Refused`."""

    call_id: int
    request: GenerateRequest
    origin: Origin = Origin()


class Embed(msgspec.Struct, frozen=True, array_like=True, tag="embed"):
    call_id: int
    request: EmbedRequest
    origin: Origin = Origin()


class Score(msgspec.Struct, frozen=True, array_like=True, tag="score"):
    call_id: int
    request: ScoreRequest
    origin: Origin = Origin()


class Control(msgspec.Struct, frozen=True, array_like=True, tag="control"):
    call_id: int
    operation: Literal["stats", "sleep", "wake"]


class Abort(msgspec.Struct, frozen=True, array_like=True, tag="abort"):
    """Ends a generate, embed or score request of this connection; not answered."""

    request_id: str


class Hello(msgspec.Struct, frozen=True, array_like=True, tag="hello"):
    """The host's first message on every connection."""

    version: int
    info: EngineInfo


class Done(msgspec.Struct, frozen=True, array_like=True, tag="done"):
    call_id: int


class Refused(msgspec.Struct, frozen=True, array_like=True, tag="refused"):
    call_id: int
    code: ErrorCode
    message: str
    param: str | None


class Embedded(msgspec.Struct, frozen=True, array_like=True, tag="embedded"):
    call_id: int
    result: EmbedResult


class Scored(msgspec.Struct, frozen=True, array_like=True, tag="scored"):
    call_id: int
    result: ScoreResult


class Statistics(msgspec.Struct, frozen=True, array_like=True, tag="statistics"):
    call_id: int
    result: EngineStats


class Outputs(msgspec.Struct, frozen=True, array_like=True, tag="outputs"):
    """Everything that one step gave this connection's requests."""

    outputs: tuple[TokenOutput, ...]


ClientMessage = Generate | Embed | Score | Control | Abort
Answer = Done | Refused | Embedded | Scored | Statistics
HostMessage = Hello | Answer | Outputs

_encoder = msgspec.msgpack.Encoder()
_client_decoder: msgspec.msgpack.Decoder[ClientMessage] = msgspec.msgpack.Decoder(ClientMessage)
_host_decoder: msgspec.msgpack.Decoder[HostMessage] = msgspec.msgpack.Decoder(HostMessage)


def encode_frame(message: ClientMessage | HostMessage) -> bytes:
    """Raises: WireError: larger than `MAX_FRAME_BYTES`."""
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise WireError(f"a message of {len(body)} bytes, at most {MAX_FRAME_BYTES} fit a frame")
    return len(body).to_bytes(_LENGTH_BYTES, "big") + body


def decode_client(body: bytes) -> ClientMessage:
    """Raises: WireError."""
    try:
        return _client_decoder.decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise WireError(f"not a client's message: {error}") from None


def decode_host(body: bytes) -> HostMessage:
    """Raises: WireError."""
    try:
        return _host_decoder.decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise WireError(f"not a host's message: {error}") from None


async def read_frame(reader: asyncio.StreamReader) -> bytes | None:
    """The body of the next frame; None at a clean end of the stream.

    Raises:
        WireError: too large, or cut short.
    """
    try:
        length = int.from_bytes(await reader.readexactly(_LENGTH_BYTES), "big")
        if length > MAX_FRAME_BYTES:
            raise WireError(f"a frame of {length} bytes, at most {MAX_FRAME_BYTES} are allowed")
        return await reader.readexactly(length)
    except asyncio.IncompleteReadError as error:
        if error.partial or error.expected != _LENGTH_BYTES:
            raise WireError("the stream ended inside a frame") from None
        return None
