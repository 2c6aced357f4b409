"""From logits to a token, for one request: penalties, bias, temperature, truncation, one seeded draw.

Order: repetition penalty (arXiv:1909.05858) and OpenAI's presence and frequency penalties on the raw logits, then
`logit_bias`, then the ban on ending early; then temperature, top-k, top-p (arXiv:1904.09751), min-p
(arXiv:2407.01082), each on what the one before left, as transformers' `generate` has it. Pure functions of one row,
all in float32; reported log-probabilities are of the raw logits.

The draw inverts the cumulative distribution at one uniform number, so that equal seeds give equal tokens even where
two batches' logits differ in their last bits.

Shapes: V vocabulary.
"""

import math
import secrets
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from engines.protocol import SamplingParams, TokenLogprob

NUM_TOP_P_CANDIDATES = 256
"""Top-p first looks among so many of the likeliest tokens; sorting the whole vocabulary takes milliseconds."""


def build_generator(seed: int | None) -> torch.Generator:
    """A CPU generator of the request's own; without a seed, one that nobody can repeat."""
    return torch.Generator().manual_seed(secrets.randbits(63) if seed is None else seed)


def choose_token(
    logits_V: Tensor,
    params: SamplingParams,
    *,
    prompt_ids: Sequence[int],
    output_ids: Sequence[int],
    end_ids: Collection[int],
    generator: torch.Generator,
) -> int:
    """The next token of a request.

    Args:
        logits_V: raw logits, any floating dtype and device; not changed.
        prompt_ids: as sent, without placeholders.
        output_ids: generated so far.
        end_ids: EOS and stop tokens, banned before `params.min_tokens` tokens.

    Raises:
        ValueError: the logits leave no token to choose: not a number, or all ruled out.
    """
    logits_V = apply_penalties(
        logits_V.float(), params, prompt_ids=prompt_ids, output_ids=output_ids
    )
    logits_V = apply_logit_bias(logits_V, params.logit_bias)
    if len(output_ids) < params.min_tokens:
        logits_V = ban_tokens(logits_V, end_ids)
    highest = float(logits_V.max())
    if math.isnan(highest):
        raise ValueError("the model's logits are not numbers")
    if highest == -math.inf:
        raise ValueError("logit_bias and min_tokens together rule out every token")
    if params.temperature == 0:
        return int(logits_V.argmax())  # the lowest id among equals
    ids: Tensor | None = None
    if 0 < params.top_k < len(logits_V):
        ids = top_k_ids(logits_V, params.top_k)
        logits_V = logits_V[ids]  # what follows has less to do
    logits_V = (logits_V - highest) / params.temperature
    if params.top_p < 1:
        logits_V = keep_top_p(logits_V, params.top_p)
    if params.min_p > 0:
        logits_V = keep_min_p(logits_V, params.min_p)
    index = draw(logits_V, generator)
    return index if ids is None else int(ids[index])


def apply_penalties(
    logits_V: Tensor,
    params: SamplingParams,
    *,
    prompt_ids: Sequence[int],
    output_ids: Sequence[int],
) -> Tensor:
    """Repetition over prompt and output; presence and frequency over output only."""
    penalty = params.repetition_penalty
    if penalty != 1:
        seen = torch.tensor(sorted({*prompt_ids, *output_ids}), device=logits_V.device)
        values = logits_V[seen]
        logits_V = logits_V.clone()
        logits_V[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if output_ids and (params.presence_penalty or params.frequency_penalty):
        ids = torch.tensor(output_ids, device=logits_V.device)
        ids, counts = torch.unique(ids, return_counts=True)
        logits_V = logits_V.clone()
        logits_V[ids] -= params.presence_penalty + params.frequency_penalty * counts
    return logits_V


def apply_logit_bias(logits_V: Tensor, logit_bias: dict[int, float]) -> Tensor:
    if not logit_bias:
        return logits_V
    ids = torch.tensor(list(logit_bias), device=logits_V.device)
    logits_V = logits_V.clone()
    logits_V[ids] += torch.tensor(list(logit_bias.values()), device=logits_V.device)
    return logits_V


def ban_tokens(logits_V: Tensor, token_ids: Collection[int]) -> Tensor:
    """Ids outside the vocabulary can not be drawn anyway."""
    ids = [token_id for token_id in token_ids if 0 <= token_id < len(logits_V)]
    logits_V = logits_V.clone()
    logits_V[torch.tensor(ids, dtype=torch.long, device=logits_V.device)] = -torch.inf
    return logits_V


def top_k_ids(logits_V: Tensor, top_k: int) -> Tensor:
    """Ids of the `top_k` highest, ascending; those that tie with the last of them are in too."""
    threshold = logits_V.topk(top_k).values[-1]
    return (logits_V >= threshold).nonzero()[:, 0]


def keep_top_p(logits_V: Tensor, top_p: float) -> Tensor:
    """The smallest set of likeliest tokens with at least `top_p` of the mass; lower ids first among equals."""
    probs_V = logits_V.softmax(dim=-1)
    ids = _likeliest(probs_V, top_p)
    top_probs = probs_V[ids]
    mass_before = top_probs.cumsum(dim=0) - top_probs
    kept = ids[: max(int((mass_before < top_p).sum()), 1)]
    return torch.full_like(logits_V, -torch.inf).scatter(0, kept, logits_V[kept])


def _likeliest(probs_V: Tensor, mass: float) -> Tensor:
    """Ids by falling probability, lower ids first among equals, until at least `mass` is covered."""
    num_candidates = NUM_TOP_P_CANDIDATES
    if len(probs_V) > num_candidates:
        threshold = probs_V.topk(num_candidates).values[-1]
        ids = (probs_V >= threshold).nonzero()[:, 0]
        if float(probs_V[ids].sum()) > mass:
            return ids[probs_V[ids].sort(descending=True, stable=True).indices]
    return probs_V.sort(descending=True, stable=True).indices


def keep_min_p(logits_V: Tensor, min_p: float) -> Tensor:
    """Those at least `min_p` times as likely as the likeliest."""
    probs_V = logits_V.softmax(dim=-1)
    return logits_V.masked_fill(probs_V < min_p * probs_V.max(), -torch.inf)


def draw(logits_V: Tensor, generator: torch.Generator) -> int:
    """One token from the softmax of the logits."""
    probs_V = logits_V.cpu().double().softmax(dim=-1)
    cumulative_V = probs_V.cumsum(dim=0)
    target = torch.rand((), dtype=torch.float64, generator=generator) * cumulative_V[-1]
    token_id = int(torch.searchsorted(cumulative_V, target, right=True))
    if token_id >= len(probs_V):  # rounding at the very end
        token_id = int(probs_V.nonzero()[-1])
    return token_id


def token_logprobs(logits_SV: Tensor, token_ids: Sequence[int], num_top: int) -> list[TokenLogprob]:
    """Log-probability of the token at each position, and of the likeliest `num_top` there.

    Args:
        logits_SV: raw logits of S positions.
        token_ids: S ids that stand there.
        num_top: 0 reports no alternatives.
    """
    logprobs_SV = logits_SV.float().log_softmax(dim=-1)
    ids_S1 = torch.tensor(token_ids, device=logprobs_SV.device)[:, None]
    chosen = logprobs_SV.gather(1, ids_S1)[:, 0].tolist()
    top = logprobs_SV.topk(min(num_top, logprobs_SV.shape[1]), dim=1)
    rows = zip(token_ids, chosen, top.indices.tolist(), top.values.tolist(), strict=True)
    return [
        TokenLogprob(token_id=token_id, logprob=logprob, top=tuple(zip(ids, values, strict=True)))
        for token_id, logprob, ids, values in rows
    ]
