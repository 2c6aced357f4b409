"""The transformers engine: how it runs a model, and what becomes of a pass that fails."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from engines.decoder_caches import SlotDecoder, SoloDecoder, build_decoder
from engines.protocol import Constraint, EngineError
from engines.requests import EngineLimits
from engines.transformers_engine import TransformersEngine
from tests.engines.decoding import GREEDY, PROMPTS, build_request, generate, run_one, token_ids_of
from tests.engines.models import CONFIGS, build_causal_lm

pytestmark = pytest.mark.usefixtures("single_thread")


def _engine(architecture: str, **limits: Any) -> TransformersEngine:
    return TransformersEngine(
        lambda: build_causal_lm(architecture),
        model_id=architecture,
        limits=EngineLimits(**limits),
    )


def test_each_architecture_gets_the_decoder_that_suits_it() -> None:
    names = {name: build_decoder(build_causal_lm(name)) for name in CONFIGS}
    assert {name for name, decoder in names.items() if isinstance(decoder, SlotDecoder)} == {
        "llama",
        "gpt2",
    }
    solo = names["bloom"], names["mistral"]
    assert all(isinstance(decoder, SoloDecoder) for decoder in solo)
    assert "differ" in solo[0].name or "failed" in solo[0].name
    assert "plain attention" in solo[1].name
    assert names["llama"].bytes_per_token == 2 * 2 * 2 * 8 * 4
    assert _engine("llama").info.kernels["decode"].startswith("one pass for all")


def test_the_cache_budget_limits_who_runs() -> None:
    per_token = build_decoder(build_causal_lm("llama")).bytes_per_token
    engine = _engine("llama", kv_cache_bytes=100 * per_token)
    assert engine.info.max_model_len == 100
    with pytest.raises(EngineError) as caught:
        engine.submit(build_request("big", [1] * 95))
    assert caught.value.code == "context_length_exceeded"
    assert "107" in caught.value.message
    params = dataclasses.replace(GREEDY, max_tokens=30, ignore_eos=True)
    requests = [build_request(f"r{i}", [i, i + 1], params) for i in range(5)]
    for request in requests:
        engine.submit(request)
    most = 0
    while engine.has_work():
        engine.step()
        most = max(most, engine.stats().num_requests_running)
    assert most == 2


def test_eos_ids_come_from_the_generation_config() -> None:
    def load() -> Any:
        model = build_causal_lm("llama")
        model.generation_config.eos_token_id = [4, 5]
        return model

    engine = TransformersEngine(load, model_id="m")
    assert engine.info.eos_token_ids == (4, 5)
    bias = dataclasses.replace(GREEDY, logit_bias={5: 1000.0})
    outputs = run_one(engine, build_request("r", [1, 2], bias))
    assert (token_ids_of(outputs), outputs[-1].stop_token_id) == ([5], 5)
    outputs = run_one(
        engine, build_request("r", [1, 2], dataclasses.replace(bias, ignore_eos=True))
    )
    assert token_ids_of(outputs) == [5] * 12


def test_out_of_memory_costs_the_youngest_only(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = _engine("llama")
    model = build_causal_lm("llama")
    for index in range(3):
        engine.submit(build_request(f"r{index}", PROMPTS[index + 1]))
    outputs = engine.step()
    decode = engine._decoder.decode

    def fail_once(keys: Sequence[str], token_ids: Sequence[int]) -> torch.Tensor:
        monkeypatch.setattr(engine._decoder, "decode", decode)
        raise torch.OutOfMemoryError("told to")

    monkeypatch.setattr(engine._decoder, "decode", fail_once)
    while engine.has_work():
        outputs += engine.step()
    for index in range(2):
        mine = [output for output in outputs if output.request_id == f"r{index}"]
        assert token_ids_of(mine) == generate(model, PROMPTS[index + 1], 12)
    lost = [output for output in outputs if output.request_id == "r2"][-1]
    assert (lost.finish_reason, lost.error_code) == ("error", "out_of_memory")


def test_a_failing_pass_ends_its_requests_and_the_engine_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = _engine("llama")
    expected = token_ids_of(run_one(engine, build_request("r", PROMPTS[3])))

    def fail(*_: object) -> torch.Tensor:
        raise RuntimeError("told to fail")

    for method in ("prefill", "decode"):
        with monkeypatch.context() as patch:
            patch.setattr(engine._decoder, method, fail)
            outputs = run_one(engine, build_request("r", PROMPTS[3]))
        assert (outputs[-1].finish_reason, outputs[-1].error_code) == ("error", "internal_error")
        assert "told to fail" not in (outputs[-1].error or "")
    assert token_ids_of(run_one(engine, build_request("r", PROMPTS[3]))) == expected


@pytest.mark.parametrize(
    ("constraint", "param"),
    [
        (Constraint(kind="json_object"), "response_format"),
        (Constraint(kind="regex", text="a"), "regex"),
    ],
)
def test_structured_output_is_refused_by_name(constraint: Constraint, param: str) -> None:
    engine = _engine("llama")
    with pytest.raises(EngineError) as caught:
        engine.submit(build_request("r", [1, 2], constraint=constraint))
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", param)
    assert param in engine.info.unsupported
