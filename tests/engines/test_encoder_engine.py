"""The encoder engine against sentence-transformers' published recipe, computed one text at a time."""

import dataclasses

import pytest
import torch

from engines.encoder_engine import EncoderEngine
from engines.protocol import (
    EmbedRequest,
    EngineError,
    GenerateRequest,
    SamplingParams,
    ScoreRequest,
)
from tests.engines.models import VOCAB_SIZE, build_encoder

pytestmark = pytest.mark.usefixtures("single_thread")

TEXTS = tuple(tuple((i + 3 * j) % VOCAB_SIZE for j in range(1 + (7 * i) % 31)) for i in range(70))


@pytest.fixture(scope="module")
def engine() -> EncoderEngine:
    return EncoderEngine(build_encoder, model_id="tiny", max_length=40)


def _vectors(engine: EncoderEngine, request: EmbedRequest) -> torch.Tensor:
    result = engine.embed(request)
    return torch.frombuffer(bytearray(result.vectors), dtype=torch.float32).view(-1, result.dim)


def test_vectors_equal_the_published_recipe(engine: EncoderEngine) -> None:
    model = build_encoder()
    vectors_BH = _vectors(engine, EmbedRequest(request_id="e", token_ids=TEXTS))
    for row, ids in zip(vectors_BH, TEXTS, strict=True):
        with torch.inference_mode():
            mask = torch.ones(1, len(ids), dtype=torch.long)
            hidden = model(torch.tensor([ids]), attention_mask=mask).last_hidden_state
        expanded = mask.unsqueeze(-1).expand(hidden.size()).float()
        mean = (hidden * expanded).sum(1) / expanded.sum(1).clamp(min=1e-9)
        expected = torch.nn.functional.normalize(mean, p=2, dim=1)[0]
        assert torch.allclose(row, expected, atol=1e-6)


def test_normalisation_is_optional(engine: EncoderEngine) -> None:
    request = EmbedRequest(request_id="e", token_ids=TEXTS[:3], normalize=False)
    raw_BH = _vectors(engine, request)
    unit_BH = _vectors(engine, dataclasses.replace(request, normalize=True))
    assert torch.allclose(torch.nn.functional.normalize(raw_BH, dim=1), unit_BH, atol=1e-6)
    assert not torch.allclose(raw_BH.norm(dim=1), torch.ones(3))


def test_what_does_not_fit_is_refused(engine: EncoderEngine) -> None:
    assert engine.info.max_model_len == 40
    cases: list[tuple[EmbedRequest, str, str]] = [
        (
            EmbedRequest(request_id="e", token_ids=((1,), (1,) * 41)),
            "context_length_exceeded",
            "input[1]",
        ),
        (EmbedRequest(request_id="e", token_ids=((),)), "invalid_value", "input[0]"),
        (EmbedRequest(request_id="e", token_ids=((VOCAB_SIZE,),)), "invalid_value", "input[0]"),
        (
            EmbedRequest(request_id="e", token_ids=((1,),), pooling="last"),
            "invalid_value",
            "pooling",
        ),
    ]
    for request, code, param in cases:
        with pytest.raises(EngineError) as caught:
            engine.embed(request)
        assert (caught.value.code, caught.value.param) == (code, param)


def test_an_encoder_neither_generates_nor_scores(engine: EncoderEngine) -> None:
    params = SamplingParams(max_tokens=1)
    with pytest.raises(EngineError, match="is an encoder"):
        engine.submit(GenerateRequest(request_id="r", token_ids=(1,), params=params))
    with pytest.raises(EngineError, match="is an encoder"):
        engine.score(ScoreRequest(request_id="s", context_ids=(1,), continuation_ids=((1,),)))
    assert engine.info.kind == "encoder"
    assert engine.info.dtype == "float32"


def test_sleep_and_wake(engine: EncoderEngine) -> None:
    request = EmbedRequest(request_id="e", token_ids=TEXTS[:3])
    before = _vectors(engine, request)
    engine.sleep()
    assert engine.stats().sleeping
    with pytest.raises(EngineError) as caught:
        engine.embed(request)
    assert caught.value.code == "sleeping"
    engine.wake()
    assert torch.equal(_vectors(engine, request), before)
