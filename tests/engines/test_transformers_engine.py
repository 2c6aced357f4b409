"""The transformers engine against transformers' own generate and a naive log-softmax."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engines.protocol import (
    EngineError,
    GenerateRequest,
    SamplingParams,
    ScoreRequest,
    Skip,
    TokenOutput,
)
from engines.transformers_engine import TransformersEngine

PROMPTS = [(5, 6, 7), (8,), (9, 10, 11, 12, 13, 14), (20, 21)]


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()


@pytest.fixture(scope="module", params=[False, True], ids=["step loop", "continuous batching"])
def engine(request: pytest.FixtureRequest, model: Any) -> Iterator[TransformersEngine]:
    made = TransformersEngine(
        model, model_id="tiny", eos_token_ids=(2,), continuous_batching=request.param
    )
    yield made
    made.close()


def run(
    engine: TransformersEngine, requests: list[GenerateRequest]
) -> dict[str, list[TokenOutput]]:
    outputs: dict[str, list[TokenOutput]] = {request.request_id: [] for request in requests}
    for request in requests:
        engine.submit(request)
    while engine.has_work():
        for output in engine.step():
            outputs[output.request_id].append(output)
    return outputs


def request(index: int, **fields: Any) -> GenerateRequest:
    params = SamplingParams(**({"max_tokens": 8, "temperature": 0} | fields))
    return GenerateRequest(request_id=f"r{index}", token_ids=PROMPTS[index], params=params)


def tokens(outputs: list[TokenOutput]) -> list[int]:
    return [token_id for output in outputs for token_id in output.token_ids]


def test_greedy_equals_generate_alone_and_in_company(
    engine: TransformersEngine, model: Any
) -> None:
    together = run(engine, [request(index, ignore_eos=True) for index in range(len(PROMPTS))])
    for index, prompt in enumerate(PROMPTS):
        alone = run(engine, [request(index, ignore_eos=True)])
        expected = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=63,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        assert tokens(alone[f"r{index}"]) == tokens(together[f"r{index}"])
        if 63 not in expected:
            assert tokens(alone[f"r{index}"]) == expected


def test_a_seed_repeats_and_logprobs_are_log_softmax(
    engine: TransformersEngine, model: Any
) -> None:
    fields = {
        "temperature": 1.0,
        "seed": 7,
        "logprobs": 2,
        "prompt_logprobs": 1,
        "ignore_eos": True,
    }
    first = run(engine, [request(0, **fields)])["r0"]
    assert tokens(first) == tokens(run(engine, [request(0, **fields)])["r0"])
    ids = [*PROMPTS[0], *tokens(first)]
    with torch.inference_mode():
        logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), dim=-1)
    reported = [one for output in first for one in output.logprobs or ()]
    for offset, one in enumerate(reported):
        expected = float(logprobs[len(PROMPTS[0]) - 1 + offset, one.token_id])
        assert one.logprob == pytest.approx(expected, abs=1e-4)
    prompt = first[0].prompt_logprobs
    assert prompt is not None
    assert prompt[0].logprob is None
    assert prompt[1].logprob == pytest.approx(float(logprobs[0, PROMPTS[0][1]]), abs=1e-4)


def test_scores_are_sums_of_log_softmax(engine: TransformersEngine, model: Any) -> None:
    continuation = (30, 31, 32)
    asked = ScoreRequest(
        request_id="s", context_ids=PROMPTS[2], continuation_ids=(continuation, (5,))
    )
    result = engine.score(asked)
    ids = torch.tensor([[*PROMPTS[2], *continuation]])
    with torch.inference_mode():
        logprobs = torch.log_softmax(model(ids).logits[0].float(), dim=-1)
    start = len(PROMPTS[2]) - 1
    expected = sum(float(logprobs[start + i, token]) for i, token in enumerate(continuation))
    assert result.scores[0].logprob == pytest.approx(expected, abs=1e-4)
    assert len(result.scores) == 2


def test_what_it_cannot_do_is_refused_by_name(engine: TransformersEngine) -> None:
    good = request(0)
    for bad, param in (
        (GenerateRequest(request_id="a", token_ids=(999,), params=good.params), "prompt"),
        (GenerateRequest(request_id="b", token_ids=(), params=good.params), "prompt"),
        (
            GenerateRequest(
                request_id="c", token_ids=(1,), params=good.params, skip=Skip(mode="profile")
            ),
            "skip",
        ),
    ):
        with pytest.raises(EngineError) as error:
            engine.submit(bad)
        assert error.value.param == param
    assert not engine.has_work()


def test_an_aborted_request_leaves_nothing(engine: TransformersEngine) -> None:
    engine.submit(request(0, max_tokens=100, seed=1))
    engine.step()
    engine.abort("r0")
    assert not engine.has_work()
    assert engine.stats().num_requests_running == 0
