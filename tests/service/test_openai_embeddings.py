"""POST /v1/embeddings: bodies, both encodings, lengths, refusals."""

import base64
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engines.protocol import EngineError
from tests.fakes.echo_engine import echo_vector
from tests.service.openai_app import DECODER, ENCODER, Service, error_of

CLS, SEP, A, B = 2, 3, 4, 5


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with Service(tmp_path) as service:
        yield service


def embed(service: Service, given: Any, **extra: Any) -> Any:
    return service.post("embeddings", **({"model": ENCODER, "input": given} | extra))


def test_the_whole_body(service: Service) -> None:
    assert embed(service, ["a b", "a"], normalize=False).json() == {
        "object": "list",
        "data": [
            {"index": 0, "object": "embedding", "embedding": [4.0, 14.0, 2.0, 3.0]},
            {"index": 1, "object": "embedding", "embedding": [3.0, 9.0, 2.0, 3.0]},
        ],
        "model": ENCODER,
        "usage": {"prompt_tokens": 7, "total_tokens": 7},
    }


@pytest.mark.parametrize("given", ["a b", ["a b"], [CLS, A, B, SEP], [[CLS, A, B, SEP]]])
def test_every_kind_of_input(service: Service, given: Any) -> None:
    data = embed(service, given, encoding_format="base64", dimensions=4, user="u").json()["data"]
    vector = struct.unpack("<4f", base64.b64decode(data[0]["embedding"]))
    assert vector == pytest.approx(echo_vector([CLS, A, B, SEP], normalize=True))
    assert service.encoder.embed_requests[0].token_ids == ((CLS, A, B, SEP),)


def test_a_decoder_gives_pooled_states(service: Service) -> None:
    assert embed(service, "the wood", model=DECODER, pooling="last").status_code == 200
    request = service.engine.embed_requests[0]
    assert (request.pooling, request.normalize, request.tenant) == ("last", True, "local")
    assert request.token_ids == (tuple(service.text.encode("the wood")),)


def test_long_inputs(service: Service) -> None:
    long = " ".join("a" * 7)
    assert error_of(embed(service, ["a", long])) == ("context_length_exceeded", "input[1]")
    assert embed(service, long, truncate=True).status_code == 200
    assert service.encoder.embed_requests[0].token_ids == ((CLS, *[A] * 6, SEP),)
    assert error_of(embed(service, [A] * 9)) == ("context_length_exceeded", "input")
    assert embed(service, [A] * 9, truncate=True).json()["usage"]["prompt_tokens"] == 8
    huge = "a " * 10_000
    assert error_of(embed(service, huge)) == ("context_length_exceeded", "input")
    assert embed(service, huge, truncate=True).status_code == 200


@pytest.mark.parametrize(
    ("extra", "code", "param"),
    [
        ({"input": ""}, "invalid_value", "input"),
        ({"input": []}, "invalid_value", "input"),
        ({"input": ["a"] * 2049}, "invalid_value", "input"),
        ({"input": [7]}, "invalid_value", "input"),
        ({"input": ["a", 1]}, "invalid_value", "input"),
        ({"dimensions": 3}, "unsupported_parameter", "dimensions"),
        ({"encoding_format": "hex"}, "invalid_value", "encoding_format"),
        ({"pooling": "max"}, "invalid_value", "pooling"),
        ({"unknown": 1}, "unsupported_parameter", "unknown"),
    ],
)
def test_refusals(service: Service, extra: dict[str, Any], code: str, param: str) -> None:
    assert error_of(service.post("embeddings", **({"model": ENCODER, "input": "a"} | extra))) == (
        code,
        param,
    )


def test_what_the_engine_refuses(service: Service) -> None:
    service.encoder.refuse = EngineError("sleeping", "the model sleeps")
    assert error_of(embed(service, "a"), 409) == ("model_sleeping", None)
    service.encoder.info = replace(service.encoder.info, unsupported=("pooling",))
    assert error_of(embed(service, "a", pooling="last")) == ("unsupported_parameter", "pooling")
    assert error_of(embed(service, "a", model="none"), 404) == ("model_not_found", "model")


def test_metrics_move(service: Service) -> None:
    embed(service, "a")
    labels = {"model_name": ENCODER, "engine": "0", "finished_reason": "stop"}
    assert service.metric("vllm:request_success_total", **labels) == 1
