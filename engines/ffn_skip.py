"""Skipping feed-forwards while decoding, row by row (FFN-SkipLLM, Jaiswal et al. 2024, arXiv:2404.03865).

The rule is `compression/ffn_skip/rule.py`, its numbers are the checkpoint's skip profile. A row of a generated
token may skip once the request's warm-up is over; prompts are computed in full. Rows of one pass may have thresholds
of their own: those that still need a feed-forward are gathered, run and scattered, the others take the substitute.
A decision rests on the row's own numbers, so a request decides alike alone and in a batch, up to the rounding of
differently shaped products.

On a GPU every middle layer of a pass with a skipping row waits for the host to learn how many rows run; no GPU was at
hand to measure what that costs.

Shapes: T rows of a pass, H hidden channels, R rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compression.checkpoint import Checkpoint
from compression.ffn_skip.profile import SkipProfile, substitute_prefix
from compression.ffn_skip.rule import (
    NEVER,
    FeedForward,
    SkipRule,
    apply_skipped,
    next_remaining,
    similarity,
)
from compression.safetensors_header import CheckpointError
from engines.kernels.linear import Linear, build_linear
from engines.kernels.weights import LinearWeight, LowRankWeight
from engines.protocol import EngineError, Skip


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSubstitute:
    """What a skipped feed-forward's rows get: `linear` of their normed input, or `mean_H`, or nothing.

    Attributes:
        mean_H: in the model's dtype.
    """

    mean_H: Tensor | None = None
    linear: Linear | None = None

    def __call__(self, normed_TH: Tensor) -> Tensor:
        if self.linear is not None:
            return self.linear(normed_TH)
        return torch.zeros_like(normed_TH) if self.mean_H is None else self.mean_H

    def tensors(self) -> list[Tensor]:
        if self.linear is not None:
            return self.linear.tensors()
        return [] if self.mean_H is None else [self.mean_H]


@dataclass(frozen=True, slots=True, kw_only=True)
class FfnSkip:
    """A model's skip profile, ready to run. Attributes: substitutes: one per layer."""

    profile: SkipProfile
    rule: SkipRule
    substitutes: tuple[LayerSubstitute, ...]

    def tau(self, skip: Skip) -> float:
        """The threshold of a request.

        Raises:
            EngineError: the profile was not calibrated for the share of rows that it asks for.
        """
        try:
            return self.profile.tau(skip.target_ratio)
        except ValueError as error:
            raise EngineError("invalid_value", str(error), "skip.target_ratio") from None


def load_ffn_skip(
    checkpoint: Checkpoint,
    *,
    num_layers: int,
    hidden_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> FfnSkip | None:
    """A checkpoint's skip profile; None where it has none.

    Raises:
        CheckpointError: it is of another architecture.
    """
    profile = checkpoint.manifest.skip_profile
    if profile is None:
        return None
    if (profile.num_layers, profile.hidden_size) != (num_layers, hidden_size):
        raise CheckpointError(
            f"the skip profile is of {profile.num_layers} layers and {profile.hidden_size} channels, the model"
            f" has {num_layers} and {hidden_size}"
        )
    stored = dict(checkpoint.tensors(list(profile.tensors())))

    def substitute(layer: int) -> LayerSubstitute:
        prefix = substitute_prefix(layer)
        bias_H = stored.get(f"{prefix}.bias")
        if bias_H is None:
            return LayerSubstitute()
        if f"{prefix}.weight_u" not in stored:
            return LayerSubstitute(mean_H=bias_H.to(device, dtype, copy=True))
        weight = LowRankWeight(
            weight_u=stored[f"{prefix}.weight_u"], weight_v=stored[f"{prefix}.weight_v"]
        )
        linear = build_linear(
            [LinearWeight(weight=weight, bias_O=bias_H)], dtype=dtype, device=device
        )
        return LayerSubstitute(linear=linear)

    return FfnSkip(
        profile=profile,
        rule=SkipRule(
            num_layers=profile.num_layers,
            cold_start=profile.cold_start,
            cold_end=profile.cold_end,
            k=profile.k,
            warm_up=profile.warm_up,
        ),
        substitutes=tuple(substitute(layer) for layer in range(profile.num_layers)),
    )


class SkipPass:
    """The skipping of one pass.

    Args:
        taus: of each row; `NEVER` where it must not skip.

    Attributes:
        tau_T: the same, float32.
        num_skipped_T: int32 (T,), feed-forwards that each row has skipped.
    """

    def __init__(self, skip: FfnSkip, taus: Sequence[float], device: torch.device) -> None:
        self.skip = skip
        self.tau_T = torch.tensor(taus, dtype=torch.float32, device=device)
        self.num_skipped_T = torch.zeros(len(taus), dtype=torch.int32, device=device)
        self._may_skip_T = self.tau_T < NEVER
        self._remaining_T = torch.zeros_like(self.num_skipped_T)

    def feed_forward(
        self, layer: int, hidden_TH: Tensor, normed_TH: Tensor, feed_forward: FeedForward
    ) -> Tensor:
        """Outputs (T, H) without the residual; layers come in order.

        Args:
            hidden_TH: residual stream after attention.
        """
        rule = self.skip.rule
        if not rule.is_middle(layer):
            return feed_forward(normed_TH)
        is_skipped_T = self._may_skip_T & (self._remaining_T > 0)
        substitute = self.skip.substitutes[layer]
        output_TH = apply_skipped(is_skipped_T, normed_TH, feed_forward, substitute)
        is_hit_T = similarity(hidden_TH, output_TH) >= self.tau_T
        self._remaining_T = next_remaining(self._remaining_T, is_skipped_T, is_hit_T, rule.k)
        self.num_skipped_T += is_skipped_T
        return output_TH


def row_taus(tau: float | None, first: int, num_rows: int, first_that_may: int) -> list[float]:
    """Thresholds of the rows of one request in a pass.

    Args:
        tau: the request's; None where it skips nothing.
        first: position of its first row; the others follow.
        first_that_may: position of the first row behind the warm-up.
    """
    if tau is None:
        return [NEVER] * num_rows
    num_full = min(max(first_that_may - first, 0), num_rows)
    return [NEVER] * num_full + [tau] * (num_rows - num_full)
