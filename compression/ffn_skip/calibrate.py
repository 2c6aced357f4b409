"""Finds a skip profile on calibration text: cold layers, substitutes, and a threshold for each share of rows.

FFN-SkipLLM (Jaiswal et al. 2024, arXiv:2404.03865) sets its threshold by hand and names no rule for the cold layers.
Here the cold ones are the smallest prefix and suffix outside which every layer is similar enough and does bearable
damage when it alone is left out, and tau is bisected until a wanted share of rows skips. Every token behind the warm-up
counts as a decode step (`teacher_forced.py`).

Shapes: N samples, B of them at once, S tokens each, H hidden channels.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from compression.ffn_skip.baselines import ShareSkip, block_inputs_watched
from compression.ffn_skip.rule import FeedForward, SkipRule, similarity
from compression.ffn_skip.substitute import Fitted, Moments, choose_substitute
from compression.ffn_skip.teacher_forced import (
    AdaptiveSkip,
    Policy,
    feed_forwards_replaced,
)

JsonObject = dict[str, Any]
MIN_P10_SIMILARITY = 0.9
MAX_DAMAGE = 2.0
RATIO_TOLERANCE = 0.004
MAX_BISECTIONS = 12
TOKENS_PER_BATCH = 2048
MAX_MOMENT_BYTES = 2**30
NUM_BINS = 20
HISTOGRAM_START = 0.8
"""Bins are of equal width from here to 1; what is less falls into the first."""


class SkipCalibrationError(Exception):
    """A model that cannot skip as asked; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What one pass of the dense model over calibration text showed, rows behind the warm-up only.

    Attributes:
        similarity: per layer {"mean", "p10", "p90", "histogram"}.
        block_influence: per block, ShortGPT's 1 - mean cos(input, output).
        lowest, highest: similarity in any layer but the first and last.
    """

    similarity: list[JsonObject]
    block_influence: list[float]
    lowest: float
    highest: float

    @property
    def means(self) -> list[float]:
        return [row["mean"] for row in self.similarity]


class _Observe:
    """A dense pass that keeps every row's similarity."""

    def __init__(self, num_layers: int, warm_up: int) -> None:
        self.similarities: list[list[Tensor]] = [[] for _ in range(num_layers)]
        self._warm_up = warm_up

    def feed_forward(
        self, layer: int, hidden_BSH: Tensor, normed_BSH: Tensor, mlp: FeedForward
    ) -> Tensor:
        output_BSH = mlp(normed_BSH)
        similarity_BS = similarity(hidden_BSH, output_BSH)[:, self._warm_up :]
        self.similarities[layer].append(similarity_BS.flatten().cpu())
        return output_BSH


class _Collect:
    """A dense pass that keeps moments of some layers' feed-forwards, of every other batch in `fit` and of the others in
    `held_out`."""

    def __init__(self, layers: Sequence[int], hidden_size: int, warm_up: int) -> None:
        self.fit = {layer: Moments(hidden_size) for layer in layers}
        self.held_out = {layer: Moments(hidden_size) for layer in layers}
        self._warm_up = warm_up
        self._num_batches = 0

    def feed_forward(
        self, layer: int, hidden_BSH: Tensor, normed_BSH: Tensor, mlp: FeedForward
    ) -> Tensor:
        if layer == 0:
            self._num_batches += 1
        output_BSH = mlp(normed_BSH)
        if layer in self.fit:
            moments = self.fit if self._num_batches % 2 else self.held_out
            rows = (tensor[:, self._warm_up :].flatten(0, 1) for tensor in (normed_BSH, output_BSH))
            moments[layer].add(*(tensor.cpu() for tensor in rows))
        return output_BSH


class SkipCalibration:
    """One model and one calibration text.

    Args:
        model: a transformers causal model of the Llama family.
        check: called before every batch; may raise to stop.

    Raises:
        SkipCalibrationError: samples have no token behind the warm-up.
    """

    def __init__(
        self,
        model: Any,
        ids_NS: Tensor,
        *,
        k: int,
        warm_up: int,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        if ids_NS.shape[1] <= warm_up + 1:
            raise SkipCalibrationError(
                f"samples of {ids_NS.shape[1]} tokens have none behind a warm-up of {warm_up}"
            )
        self._model = model
        self._ids_NS = ids_NS
        self._k = k
        self._warm_up = warm_up
        self._check = check
        self.num_layers = len(model.model.layers)

    def rule(self, cold: tuple[int, int]) -> SkipRule:
        return SkipRule(
            num_layers=self.num_layers,
            cold_start=cold[0],
            cold_end=cold[1],
            k=self._k,
            warm_up=self._warm_up,
        )

    @torch.inference_mode()
    def _pass(self, policy: Policy, ids_NS: Tensor) -> None:
        with feed_forwards_replaced(self._model, policy):
            batch = max(TOKENS_PER_BATCH // ids_NS.shape[1], 1)
            for ids_BS in torch.split(ids_NS, batch):
                self._check()
                self._model.model(ids_BS.to(self._model.device), use_cache=False)

    def observe(self) -> Observation:
        observe = _Observe(self.num_layers, self._warm_up)
        with block_inputs_watched(self._model) as influence:
            self._pass(observe, self._ids_NS)
        rows = [torch.cat(parts) for parts in observe.similarities]
        middle = torch.cat(rows[1:-1]) if len(rows) > 2 else torch.cat(rows)
        return Observation(
            similarity=[summarise(row) for row in rows],
            block_influence=[total / self._ids_NS.numel() for total in influence],
            lowest=float(middle.min()),
            highest=float(middle.max()),
        )

    def damage(self, *, num_tokens: int) -> list[float]:
        """Perplexity ratio to the dense model when one layer's feed-forward alone is left out, for each layer."""
        ids_NS = self._ids_NS[: max(num_tokens // self._ids_NS.shape[1], 1)]
        dense = self._loss(None, ids_NS)
        ratios = []
        for layer in range(self.num_layers):
            policy = ShareSkip(self.rule((0, 0)), {layer: 1.0})
            ratios.append(math.exp(min(self._loss(policy, ids_NS) - dense, 700.0)))
        return ratios

    @torch.inference_mode()
    def _loss(self, policy: Policy | None, ids_NS: Tensor) -> float:
        """Mean negative log-likelihood of the tokens behind the warm-up."""
        policy = policy or ShareSkip(self.rule((0, 0)), {})
        total, num_tokens = 0.0, 0
        with feed_forwards_replaced(self._model, policy):
            for ids_S in ids_NS.to(self._model.device):
                self._check()
                hidden_SH = self._model.model(ids_S[None], use_cache=False).last_hidden_state[0]
                logits_TV = self._model.lm_head(hidden_SH[self._warm_up : -1]).float()
                targets_T = ids_S[self._warm_up + 1 :]
                total += float(F.cross_entropy(logits_TV, targets_T, reduction="sum"))
                num_tokens += len(targets_T)
        return total / num_tokens

    def fit_substitutes(self, rule: SkipRule, *, rank: int) -> dict[int, tuple[Fitted, float]]:
        """The best substitute of every middle layer, as of `choose_substitute`: fitted on one half of the batches,
        chosen on the other.

        Raises:
            SkipCalibrationError: there is only one batch.
        """
        if self._ids_NS.numel() <= TOKENS_PER_BATCH:
            raise SkipCalibrationError(
                f"{self._ids_NS.numel()} calibration tokens are too few to fit substitutes and choose among"
                f" them; more than {TOKENS_PER_BATCH} are needed"
            )
        hidden_size = self._model.config.hidden_size
        # Two halves, two squares of float64 each. Wide models are walked several times, some layers at a time.
        at_once = max(MAX_MOMENT_BYTES // (2 * 2 * 8 * hidden_size**2), 1)
        chosen = {}
        for start in range(rule.middle.start, rule.middle.stop, at_once):
            layers = range(start, min(start + at_once, rule.middle.stop))
            collect = _Collect(layers, hidden_size, self._warm_up)
            self._pass(collect, self._ids_NS)
            for layer in layers:
                fit, held_out = collect.fit[layer], collect.held_out[layer]
                chosen[layer] = choose_substitute(fit, held_out, rank=rank)
        return chosen

    def find_tau(
        self,
        rule: SkipRule,
        target_ratio: float,
        substitutes: Mapping[int, FeedForward],
        *,
        low: float,
        high: float,
        num_tokens: int,
    ) -> tuple[float, AdaptiveSkip]:
        """The threshold at which `target_ratio` of all rows skip, over `num_tokens` tokens, and that pass's counts.

        Raises:
            SkipCalibrationError: so many never do.
        """
        policies: dict[float, AdaptiveSkip] = {}
        num_samples = max(num_tokens // self._ids_NS.shape[1], 1)

        def measure(tau: float) -> float:
            policies[tau] = AdaptiveSkip(rule, tau, substitutes)
            self._pass(policies[tau], self._ids_NS[:num_samples])
            return policies[tau].skip_ratio

        tau, _ = bisect_tau(measure, target_ratio, low=low, high=high)
        return tau, policies[tau]


def summarise(similarity_T: Tensor) -> JsonObject:
    """Mean, tenths and histogram of a layer's similarities."""
    width = (1 - HISTOGRAM_START) / NUM_BINS
    bins_T = ((similarity_T - HISTOGRAM_START) / width).floor().clamp(0, NUM_BINS - 1).long()
    p10, p90 = similarity_T.quantile(torch.tensor([0.1, 0.9])).tolist()
    return {
        "mean": round(float(similarity_T.double().mean()), 5),
        "p10": round(p10, 5),
        "p90": round(p90, 5),
        "histogram": torch.bincount(bins_T, minlength=NUM_BINS).tolist(),
    }


def choose_cold(p10: Sequence[float], damage: Sequence[float]) -> tuple[int, int]:
    """Numbers of first and last layers that must always run: all but the longest run of layers that may skip.

    Raises:
        SkipCalibrationError: no layer may.
    """
    best, start = range(0), 0
    for layer in range(len(p10) + 1):
        may_skip = layer < len(p10) and (
            p10[layer] >= MIN_P10_SIMILARITY and damage[layer] < MAX_DAMAGE
        )
        if not may_skip:
            if layer - start > len(best):
                best = range(start, layer)
            start = layer + 1
    if not best:
        raise SkipCalibrationError(
            f"no layer may skip: none has nine similarities in ten above {MIN_P10_SIMILARITY}"
            f" and a perplexity ratio below {MAX_DAMAGE} without its feed-forward"
        )
    return best.start, len(p10) - best.stop


def bisect_tau(
    measure: Callable[[float], float],
    target: float,
    *,
    low: float,
    high: float,
    tolerance: float = RATIO_TOLERANCE,
) -> tuple[float, float]:
    """The threshold at which `measure` gives a wanted share, and the share that it gave.

    Args:
        measure: share of rows that skip at a threshold; falls as it rises.
        low, high: thresholds with at least and at most the wanted share.

    Raises:
        SkipCalibrationError: the share at `low` is less than wanted.
    """
    best = (low, measure(low))
    if best[1] < target - tolerance:
        raise SkipCalibrationError(
            f"a skip ratio of {target} cannot be reached: at most {best[1]:.3f} of all rows skip"
        )
    for _ in range(MAX_BISECTIONS):
        if abs(best[1] - target) <= tolerance:
            break
        tau = (low + high) / 2
        share = measure(tau)
        if abs(share - target) < abs(best[1] - target):
            best = (tau, share)
        low, high = (tau, high) if share > target else (low, tau)
    return best
