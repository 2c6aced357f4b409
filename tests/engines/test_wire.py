"""Frames: every message survives the trip, and no garbage gets further than a WireError."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines import wire
from engines.protocol import (
    Constraint,
    ContinuationScore,
    EmbedRequest,
    EmbedResult,
    GenerateRequest,
    SamplingParams,
    ScoreRequest,
    ScoreResult,
    Skip,
    TokenLogprob,
    TokenOutput,
)
from tests.fakes.echo_engine import ECHO_INFO, EMPTY_STATS

PARAMS = SamplingParams(
    max_tokens=7,
    temperature=0.5,
    logit_bias={3: -100.0, 50_000: 2.5},
    seed=2**63 - 1,
    stop_token_ids=(4, 5),
    logprobs=0,
)
REQUEST = GenerateRequest(
    request_id="r-1",
    token_ids=(1, -1, 3),
    params=PARAMS,
    embedding_rows=bytes(range(16)),
    priority=-2,
    tenant="t",
    skip=Skip(mode="target", target_ratio=0.2),
    constraint=Constraint(kind="regex", text="a+"),
)
LOGPROB = TokenLogprob(token_id=3, logprob=-0.5, top=((3, -0.5), (9, -1.5)))
OUTPUT = TokenOutput(
    request_id="r-1",
    token_ids=(3,),
    logprobs=(LOGPROB,),
    prompt_logprobs=(TokenLogprob(token_id=1, logprob=None), LOGPROB),
    finish_reason="error",
    error="é",
    error_code="out_of_memory",
)
SCORES = ScoreResult(
    scores=(ContinuationScore(logprob=-1.0, is_greedy=True, token_logprobs=(-0.5, -0.5)),),
    num_tokens=4,
)
CLIENT_MESSAGES: list[wire.ClientMessage] = [
    wire.Generate(1, REQUEST),
    wire.Embed(2, EmbedRequest(request_id="e", token_ids=((1,), (2, 3)), pooling="last")),
    wire.Score(3, ScoreRequest(request_id="s", context_ids=(1,), continuation_ids=((2, 3),))),
    wire.Control(4, "stats"),
    wire.Abort("r-1"),
]
HOST_MESSAGES: list[wire.HostMessage] = [
    wire.Hello(wire.PROTOCOL_VERSION, ECHO_INFO),
    wire.Done(1),
    wire.Refused(2, "queue_full", "full", None),
    wire.Embedded(3, EmbedResult(dim=2, vectors=b"\0" * 8, num_tokens=1)),
    wire.Scored(4, SCORES),
    wire.Statistics(5, EMPTY_STATS),
    wire.Outputs((OUTPUT, TokenOutput(request_id="r-2", token_ids=(1, 2)))),
]


def _read(data: bytes) -> list[bytes]:
    async def read() -> list[bytes]:
        reader = asyncio.StreamReader()
        reader.feed_data(data)
        reader.feed_eof()
        bodies = []
        while (body := await wire.read_frame(reader)) is not None:
            bodies.append(body)
        return bodies

    return asyncio.run(read())


def test_every_client_message_survives() -> None:
    data = b"".join(wire.encode_frame(message) for message in CLIENT_MESSAGES)
    assert [wire.decode_client(body) for body in _read(data)] == CLIENT_MESSAGES


def test_every_host_message_survives() -> None:
    data = b"".join(wire.encode_frame(message) for message in HOST_MESSAGES)
    assert [wire.decode_host(body) for body in _read(data)] == HOST_MESSAGES


@pytest.mark.parametrize("message", HOST_MESSAGES, ids=lambda m: type(m).__name__)
def test_a_client_may_not_send_what_a_host_says(message: wire.HostMessage) -> None:
    with pytest.raises(wire.WireError, match="not a client's message"):
        wire.decode_client(wire.encode_frame(message)[4:])


def test_a_field_of_the_wrong_type_is_refused() -> None:
    body = wire.encode_frame(wire.Generate(1, REQUEST))[4:]
    with pytest.raises(wire.WireError, match="kind"):
        wire.decode_client(body.replace(b"regex", b"rexeg"))


def test_oversized_frames_are_refused_at_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_FRAME_BYTES", 100)
    with pytest.raises(wire.WireError, match="at most 100"):
        wire.encode_frame(wire.Abort("x" * 100))
    with pytest.raises(wire.WireError, match="a frame of 101 bytes, at most 100"):
        _read((101).to_bytes(4, "big") + b"x" * 101)


@pytest.mark.parametrize("cut", [1, 3, 4, 6])
def test_a_cut_stream_is_not_a_clean_end(cut: int) -> None:
    data = wire.encode_frame(wire.Abort("r"))
    assert cut < len(data)
    with pytest.raises(wire.WireError, match="inside a frame"):
        _read(data[:cut])


@given(st.binary(max_size=200))
def test_garbage_bodies_only_raise_wire_errors(body: bytes) -> None:
    for decode in (wire.decode_client, wire.decode_host):
        try:
            decode(body)
        except wire.WireError:
            continue


@given(st.sampled_from(CLIENT_MESSAGES + HOST_MESSAGES), st.data())
def test_damaged_messages_only_raise_wire_errors(
    message: wire.ClientMessage | wire.HostMessage, data: st.DataObject
) -> None:
    body = bytearray(wire.encode_frame(message)[4:])
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    for decode in (wire.decode_client, wire.decode_host):
        try:
            decode(bytes(body))
        except wire.WireError:
            continue


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(wire.WireError):
        wire.decode_client(b"\x91" * 1_000_000)
    with pytest.raises(wire.WireError):
        wire.decode_client(b"\x92\xa5abort" + b"\x91" * 1_000_000)
