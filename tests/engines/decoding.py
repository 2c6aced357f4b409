"""What the tests of decoding engines share: prompts, a loop over steps, and transformers' `generate` as oracle."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from engines.protocol import Engine, GenerateRequest, SamplingParams, TokenOutput
from tests.engines.models import EOS

PROMPTS = [[(7 * i + 3 * j) % 90 for j in range(1 + (5 * i) % 23)] for i in range(9)]
GREEDY = SamplingParams(max_tokens=12, temperature=0)

BuildEngine = Callable[..., Engine]
"""Called with an architecture of `tests.engines.models` and fields of `EngineLimits`."""


def build_request(
    request_id: str, token_ids: Sequence[int], params: SamplingParams = GREEDY, **fields: Any
) -> GenerateRequest:
    return GenerateRequest(
        request_id=request_id, token_ids=tuple(token_ids), params=params, **fields
    )


def run(engine: Engine, requests: Sequence[GenerateRequest]) -> dict[str, list[TokenOutput]]:
    for request in requests:
        engine.submit(request)
    outputs: dict[str, list[TokenOutput]] = {request.request_id: [] for request in requests}
    while engine.has_work():
        step = engine.step()
        assert len({output.request_id for output in step}) == len(step)
        for output in step:
            outputs[output.request_id].append(output)
    assert all(part[-1].finish_reason is not None for part in outputs.values())
    assert engine.stats().kv_cache_usage_ratio == 0
    return outputs


def token_ids_of(outputs: Sequence[TokenOutput]) -> list[int]:
    return [token_id for output in outputs for token_id in output.token_ids]


def run_one(engine: Engine, request: GenerateRequest) -> list[TokenOutput]:
    return run(engine, [request])[request.request_id]


def generate(
    model: Any, prompt: Sequence[int], max_tokens: int, eos: int | None = EOS, **arguments: Any
) -> list[int]:
    """transformers' own loop: the oracle."""
    ids = torch.tensor([list(prompt)])
    arguments = {"do_sample": False, "pad_token_id": 0, "use_cache": True} | arguments
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_tokens,
        eos_token_id=eos,
        **arguments,
    )
    result: list[int] = output[0, len(prompt) :].tolist()
    return result


def logits(model: Any, ids: Sequence[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([list(ids)])).logits[0]
    return logits
