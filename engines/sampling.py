"""From logits to a token, for one request: penalties, bias, temperature, truncation, and a seeded draw.

The order is the one OpenAI's parameters imply and vLLM uses: penalties and bias on the raw logits, then
temperature, then
top-k, top-p and min-p on the resulting distribution. Reported log-probabilities are of the raw logits in float32.

Shapes: V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engines.protocol import SamplingParams, TokenLogprob


@dataclass(slots=True)
class SamplerState:
    """What sampling remembers of one request.

    Attributes:
        blocked_ids: ids that may not be drawn before `params.min_tokens` tokens: EOS and stop tokens.
        prompt_ids: distinct prompt ids, for the repetition penalty.
        output_counts: generated id to how often.
    """

    params: SamplingParams
    blocked_ids: tuple[int, ...]
    prompt_ids: frozenset[int]
    generator: torch.Generator
    output_counts: dict[int, int] = field(default_factory=dict)
    num_generated: int = 0

    @classmethod
    def create(
        cls, params: SamplingParams, prompt_ids: Sequence[int], eos_token_ids: Sequence[int]
    ) -> "SamplerState":
        generator = torch.Generator()
        if params.seed is None:
            generator.seed()
        else:
            generator.manual_seed(params.seed)
        eos = () if params.ignore_eos else tuple(eos_token_ids)
        return cls(
            params=params,
            blocked_ids=eos + params.stop_token_ids,
            prompt_ids=frozenset(token_id for token_id in prompt_ids if token_id >= 0),
            generator=generator,
        )


def sample(logits_V: Tensor, state: SamplerState) -> tuple[int, TokenLogprob | None]:
    """Choose the next token of a request and update its state.

    Args:
        logits_V: raw logits of the last position, any floating dtype and device.

    Returns:
        The id, and its log-probability where the request asked for it.
    """
    params = state.params
    raw_V = logits_V.float()
    adjusted_V = adjust_logits(raw_V, state)
    if params.temperature == 0:
        token_id = int(adjusted_V.argmax())
    else:
        probs_V = truncate(torch.softmax(adjusted_V / params.temperature, dim=-1), params)
        token_id = int(torch.multinomial(probs_V.cpu(), 1, generator=state.generator))
    state.num_generated += 1
    state.output_counts[token_id] = state.output_counts.get(token_id, 0) + 1
    if params.logprobs is None:
        return token_id, None
    return token_id, token_logprob(torch.log_softmax(raw_V, dim=-1), token_id, params.logprobs)


def adjust_logits(raw_V: Tensor, state: SamplerState) -> Tensor:
    """Penalties, bias and the ban on ending early; a new float32 tensor where anything changes."""
    params = state.params
    logits_V = raw_V.clone()
    if params.repetition_penalty != 1:
        seen = torch.tensor(sorted(state.prompt_ids | state.output_counts.keys()), dtype=torch.long)
        values = logits_V[seen]
        penalty = params.repetition_penalty
        logits_V[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if state.output_counts and (params.presence_penalty or params.frequency_penalty):
        ids = torch.tensor(list(state.output_counts), dtype=torch.long)
        counts = torch.tensor(list(state.output_counts.values()), dtype=torch.float32)
        logits_V[ids] -= params.presence_penalty + params.frequency_penalty * counts
    for token_id, bias in params.logit_bias.items():
        logits_V[token_id] += bias
    if state.num_generated < params.min_tokens and state.blocked_ids:
        logits_V[list(state.blocked_ids)] = -torch.inf
    return logits_V


def truncate(probs_V: Tensor, params: SamplingParams) -> Tensor:
    """Zero what top-k, top-p and min-p exclude. At least the likeliest token stays. Not renormalised."""
    if not (params.top_k or params.top_p < 1 or params.min_p):
        return probs_V
    sorted_V, order_V = probs_V.sort(descending=True, stable=True)
    keep_V = torch.ones_like(sorted_V, dtype=torch.bool)
    if params.top_k:
        keep_V[params.top_k :] = False
    if params.top_p < 1:
        kept_V = torch.where(keep_V, sorted_V, 0)
        mass_before_V = (kept_V / kept_V.sum()).cumsum(0) - kept_V / kept_V.sum()
        keep_V &= mass_before_V < params.top_p
    if params.min_p:
        keep_V &= sorted_V >= params.min_p * sorted_V[0]
    keep_V[0] = True
    return torch.zeros_like(probs_V).scatter(0, order_V, torch.where(keep_V, sorted_V, 0))


def token_logprob(logprobs_V: Tensor, token_id: int, num_top: int) -> TokenLogprob:
    """Log-probability of one token and of the likeliest `num_top`."""
    top: tuple[tuple[int, float], ...] = ()
    if num_top:
        values, ids = logprobs_V.topk(min(num_top, logprobs_V.numel()))
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprob(token_id=token_id, logprob=float(logprobs_V[token_id]), top=top)
