"""From logits to tokens: penalties, bias, temperature, truncation, one seeded draw.

Order: repetition penalty (arXiv:1909.05858) and OpenAI's presence and frequency penalties on the raw logits, then
`logit_bias`, then the ban on ending early; then temperature, top-k, top-p (arXiv:1904.09751), min-p
(arXiv:2407.01082), each on what the one before left, as transformers' `generate` has it. Functions of one row,
all in float32; reported log-probabilities are of the raw logits. `choose_tokens` computes the rows of a batch that are
greedy or have temperature, top-k and top-p only together; what a row gets does not depend on the others.

The draw inverts the cumulative distribution at one uniform number, so that equal seeds give equal tokens even where
two batches' logits differ in their last bits.

Shapes: S requests, V vocabulary, P rows computed together, C candidates.
"""

import math
import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engines.protocol import SamplingParams, TokenLogprob

NUM_TOP_P_CANDIDATES = 256
"""Top-p first looks among so many of the likeliest tokens; sorting the whole vocabulary takes milliseconds."""


class Matcher(Protocol):
    """What keeps a text in a language; see `structured.TokenMatcher`."""

    def allowed(self) -> NDArray[np.bool_]: ...

    def take(self, token_id: int) -> None: ...

    @property
    def is_finished(self) -> bool: ...


@dataclass(slots=True, eq=False, kw_only=True)
class SamplingState:
    """What choosing a request's next token depends on, besides its logits.

    Attributes:
        prompt_ids: as sent, without placeholders.
        output_ids: generated so far.
        end_ids: EOS and stop tokens, banned before `params.min_tokens` tokens.
        matcher: of structured output; None where any text will do.
    """

    params: SamplingParams
    prompt_ids: Sequence[int]
    end_ids: Collection[int]
    generator: torch.Generator
    output_ids: list[int] = field(default_factory=list)
    matcher: Matcher | None = None

    @property
    def is_plain(self) -> bool:
        """Greedy, or temperature with top-k and top-p and nothing else."""
        params = self.params
        return (
            self.matcher is None
            and params.repetition_penalty == 1
            and params.presence_penalty == 0
            and params.frequency_penalty == 0
            and not params.logit_bias
            and len(self.output_ids) >= params.min_tokens
            and (params.temperature == 0 or params.min_p == 0)
        )


def build_generator(seed: int | None) -> torch.Generator:
    """A CPU generator of the request's own; without a seed, one that nobody can repeat."""
    return torch.Generator().manual_seed(secrets.randbits(63) if seed is None else seed)


def choose_tokens(logits_SV: Tensor, states: Sequence[SamplingState]) -> list[int | ValueError]:
    """The next token of each request; a `ValueError` of `choose_token` where there is none.

    Args:
        logits_SV: raw logits, any floating dtype and device; not changed.
    """
    chosen: list[int | ValueError | None] = [None] * len(states)
    plain = [index for index, state in enumerate(states) if state.is_plain]
    if plain:
        logits_PV = (logits_SV if len(plain) == len(states) else logits_SV[plain]).float()
        ids_P1 = logits_PV.argmax(dim=1, keepdim=True)  # the lowest id among equals
        highest_P1 = logits_PV.gather(1, ids_P1)
        drawn: list[int] = []
        # In one transfer, since each waits for the device; float64 holds any id.
        both_P2: list[list[float]] = torch.cat([ids_P1.double(), highest_P1.double()], 1).tolist()
        for row, (token_id, highest) in enumerate(both_P2):
            if not math.isfinite(highest):
                continue
            if states[plain[row]].params.temperature == 0:
                chosen[plain[row]] = int(token_id)
            else:
                drawn.append(row)
        if drawn:
            token_ids = _draw_rows(
                logits_PV[drawn] - highest_P1[drawn], [states[plain[row]] for row in drawn]
            )
            for row, maybe_id in zip(drawn, token_ids, strict=True):
                chosen[plain[row]] = maybe_id
    return [
        _choose_alone(logits_SV[index], states[index]) if token_id is None else token_id
        for index, token_id in enumerate(chosen)
    ]


def _choose_alone(logits_V: Tensor, state: SamplingState) -> int | ValueError:
    try:
        return choose_token(
            logits_V,
            state.params,
            prompt_ids=state.prompt_ids,
            output_ids=state.output_ids,
            end_ids=state.end_ids,
            generator=state.generator,
            allowed=None if state.matcher is None else state.matcher.allowed(),
        )
    except ValueError as error:
        return error


def _draw_rows(shifted_PV: Tensor, states: Sequence[SamplingState]) -> list[int | None]:
    """One draw per row from temperature, top-k and top-p; None where more candidates must be looked at.

    Args:
        shifted_PV: logits less their row's maximum.
    """
    device = shifted_PV.device
    temperature_P1 = torch.tensor([[state.params.temperature] for state in states], device=device)
    scaled_PV = shifted_PV / temperature_P1
    vocab_size = scaled_PV.shape[1]
    is_cut = [0 < state.params.top_k < vocab_size or state.params.top_p < 1 for state in states]
    token_ids: list[int | None] = [None] * len(states)
    whole = [row for row, cut in enumerate(is_cut) if not cut]
    if whole:
        probs_PV = scaled_PV[whole].double().softmax(dim=1)
        for row, token_id in zip(whole, _invert(probs_PV, [states[r] for r in whole]), strict=True):
            token_ids[row] = token_id
    cut_rows = [row for row, cut in enumerate(is_cut) if cut]
    if cut_rows:
        cut_states = [states[row] for row in cut_rows]
        for row, maybe_id in zip(
            cut_rows, _draw_from_candidates(scaled_PV[cut_rows], cut_states), strict=True
        ):
            token_ids[row] = maybe_id
    return token_ids


def _draw_from_candidates(scaled_PV: Tensor, states: Sequence[SamplingState]) -> list[int | None]:
    """Draw among the likeliest `NUM_TOP_P_CANDIDATES`; None where they are too few to know the kept set."""
    vocab_size = scaled_PV.shape[1]
    num_candidates = min(NUM_TOP_P_CANDIDATES, vocab_size)
    top = scaled_PV.topk(num_candidates, dim=1)
    # Likeliest first, lower ids first among equals: topk promises no order of those.
    by_id = top.indices.sort(dim=1)
    values_PC, order_PC = top.values.gather(1, by_id.indices).sort(
        dim=1, descending=True, stable=True
    )
    ids_PC = by_id.values.gather(1, order_PC).cpu()
    total_P = scaled_PV.logsumexp(dim=1).cpu().double()
    values_PC = values_PC.cpu().double()
    last_P1 = values_PC[:, -1:]
    kept_PC = torch.ones_like(ids_PC, dtype=torch.bool)
    for row, state in enumerate(states):
        top_k = state.params.top_k
        if 0 < top_k < vocab_size:
            # Those that tie with the last of them are in too.
            kept_PC[row] = values_PC[row] >= values_PC[row, min(top_k, num_candidates) - 1]
            total_P[row] = values_PC[row][kept_PC[row]].logsumexp(dim=0)
    probs_PC = (values_PC - total_P[:, None]).exp() * kept_PC
    top_p_P1 = torch.tensor([[state.params.top_p] for state in states], dtype=torch.float64)
    mass_before_PC = probs_PC.cumsum(dim=1) - probs_PC
    kept_PC &= (mass_before_PC < top_p_P1) | (top_p_P1 >= 1)
    # The kept set is known if it ends before the last candidate, and not among that one's equals.
    lowest_P1 = values_PC.masked_fill(~kept_PC, torch.inf).amin(dim=1, keepdim=True)
    is_known = ((lowest_P1 > last_P1)[:, 0] | (num_candidates == vocab_size)).tolist()
    in_order = ids_PC.sort(dim=1)
    probs_PC = (probs_PC * kept_PC).gather(1, in_order.indices)
    known = [row for row, is_row_known in enumerate(is_known) if is_row_known]
    token_ids: list[int | None] = [None] * len(states)
    if known:
        places = _invert(probs_PC[known], [states[row] for row in known])
        for row, place in zip(known, places, strict=True):
            token_ids[row] = int(in_order.values[row, place])
    return token_ids


def _invert(probs_PC: Tensor, states: Sequence[SamplingState]) -> list[int]:
    """Where each row's cumulative distribution passes the request's next uniform number, as `draw` does.

    Args:
        probs_PC: float64, not necessarily of sum 1.
    """
    cumulative_PC = probs_PC.cumsum(dim=1)
    uniform_P1 = torch.stack(
        [torch.rand(1, dtype=torch.float64, generator=state.generator) for state in states]
    ).to(probs_PC.device)
    places_P = torch.searchsorted(cumulative_PC, uniform_P1 * cumulative_PC[:, -1:], right=True)
    places: list[int] = places_P[:, 0].tolist()
    for row, place in enumerate(places):
        if place >= probs_PC.shape[1]:  # rounding at the very end
            places[row] = int(probs_PC[row].nonzero()[-1])
    return places


def choose_token(
    logits_V: Tensor,
    params: SamplingParams,
    *,
    prompt_ids: Sequence[int],
    output_ids: Sequence[int],
    end_ids: Collection[int],
    generator: torch.Generator,
    allowed: NDArray[np.bool_] | None = None,
) -> int:
    """The next token of a request.

    Args:
        logits_V: raw logits, any floating dtype and device; not changed.
        prompt_ids: as sent, without placeholders.
        output_ids: generated so far.
        end_ids: EOS and stop tokens, banned before `params.min_tokens` tokens.
        allowed: (V,), what structured output leaves to choose from; None leaves all.

    Raises:
        ValueError: the logits leave no token to choose: not a number, or all ruled out.
    """
    logits_V = apply_penalties(
        logits_V.float(), params, prompt_ids=prompt_ids, output_ids=output_ids
    )
    logits_V = apply_logit_bias(logits_V, params.logit_bias)
    if len(output_ids) < params.min_tokens:
        logits_V = ban_tokens(logits_V, end_ids)
    if allowed is not None:
        allowed_V = torch.from_numpy(allowed).to(logits_V.device)
        logits_V = logits_V.masked_fill(~allowed_V, -torch.inf)
    highest = float(logits_V.max())
    if math.isnan(highest):
        raise ValueError("the model's logits are not numbers")
    if highest == -math.inf:
        raise ValueError(
            "logit_bias, min_tokens and the output's constraint together rule out every token"
        )
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
