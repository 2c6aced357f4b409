"""Runs a whole text through transformers' modules as if every token behind the warm-up were a decode step.

Attention runs in every layer and for every token, and a token's later layers see the keys and values that skipping
left, so a text run at once gives what decoding it token by token with a KV cache gives. What a feed-forward is replaced
by is a `Policy`; FFN-SkipLLM's own is `AdaptiveSkip`, the baselines are in `baselines.py`.

Shapes: B texts, S tokens, H hidden channels, R selected rows.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from compression.ffn_skip.rule import (
    FeedForward,
    SkipRule,
    apply_skipped,
    next_remaining,
    similarity,
)


class Policy(Protocol):
    """What happens at the feed-forward of each layer, layer 0 first in every pass."""

    def feed_forward(
        self, layer: int, hidden_BSH: Tensor, normed_BSH: Tensor, mlp: FeedForward
    ) -> Tensor:
        """The feed-forward's output, without the residual.

        Args:
            hidden_BSH: residual stream after attention.
            normed_BSH: its norm, what `mlp` takes.
        """


class _Replaced(nn.Module):
    """Stands where the feed-forward was."""

    def __init__(self, layer: int, norm: nn.Module, mlp: nn.Module, policy: Policy) -> None:
        super().__init__()
        self._layer = layer
        self._mlp = mlp
        self._policy = policy
        self._hidden_BSH: Tensor | None = None
        self.handle = norm.register_forward_pre_hook(self._keep)

    def _keep(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        self._hidden_BSH = arguments[0]

    def forward(self, normed_BSH: Tensor) -> Tensor:
        assert self._hidden_BSH is not None
        hidden_BSH, self._hidden_BSH = self._hidden_BSH, None
        return self._policy.feed_forward(self._layer, hidden_BSH, normed_BSH, self._mlp)


@contextmanager
def feed_forwards_replaced(model: Any, policy: Policy) -> Iterator[None]:
    """Let `policy` decide about every feed-forward of a model of the Llama family."""
    originals = [layer.mlp for layer in model.model.layers]
    try:
        for index, layer in enumerate(model.model.layers):
            norm = layer.post_attention_layernorm
            layer.mlp = _Replaced(index, norm, originals[index], policy)
        yield
    finally:
        for layer, mlp in zip(model.model.layers, originals, strict=True):
            if layer.mlp is not mlp:
                layer.mlp.handle.remove()
                layer.mlp = mlp


class AdaptiveSkip:
    """FFN-SkipLLM's rule.

    Args:
        substitutes: by layer, what a skipped feed-forward is replaced by, normed rows (R, H) to outputs (R, H);
            a layer without one adds nothing.

    Attributes:
        num_skipped: (row, layer) pairs skipped so far, by layer.
        num_rows: rows behind the warm-up so far; each could skip in every layer.
    """

    def __init__(
        self, rule: SkipRule, tau: float, substitutes: Mapping[int, FeedForward] | None = None
    ) -> None:
        self.rule = rule
        self.tau = tau
        self.num_skipped = [0] * rule.num_layers
        self.num_rows = 0
        self._substitutes = substitutes or {}
        self._remaining_BS = torch.empty(0)

    @property
    def skip_ratio(self) -> float:
        return sum(self.num_skipped) / (self.num_rows * self.rule.num_layers)

    def feed_forward(
        self, layer: int, hidden_BSH: Tensor, normed_BSH: Tensor, mlp: FeedForward
    ) -> Tensor:
        rule = self.rule
        if layer == 0:
            self._remaining_BS = hidden_BSH.new_zeros(hidden_BSH.shape[:2], dtype=torch.int64)
            num_texts, num_tokens = hidden_BSH.shape[:2]
            self.num_rows += num_texts * max(num_tokens - rule.warm_up, 0)
        if not rule.is_middle(layer):
            return mlp(normed_BSH)
        is_skipped_BS = self._remaining_BS > 0
        is_skipped_BS[:, : rule.warm_up] = False
        output_BSH = apply_skipped(is_skipped_BS, normed_BSH, mlp, self._substitutes.get(layer))
        is_hit_BS = similarity(hidden_BSH, output_BSH) >= self.tau
        self._remaining_BS = next_remaining(self._remaining_BS, is_skipped_BS, is_hit_BS, rule.k)
        self.num_skipped[layer] += int(is_skipped_BS.sum())
        return output_BSH


@contextmanager
def blocks_skipped(model: Any, shares: Mapping[int, float], warm_up: int) -> Iterator[None]:
    """Pass tokens behind the warm-up by whole blocks, attention included.

    Args:
        shares: by layer, the share of tokens that pass it by: 1, or less for the block that makes up a remainder;
            these are evenly spread.
    """

    def hook(share: float) -> Any:
        def passed_by(
            module: nn.Module, arguments: tuple[Tensor, ...], keywords: dict[str, Any], output: Any
        ) -> Tensor:
            hidden_BSH = arguments[0] if arguments else keywords["hidden_states"]
            is_skipped_S = spread(hidden_BSH.shape[1], share).to(hidden_BSH.device)
            is_skipped_S[:warm_up] = False
            return torch.where(is_skipped_S[:, None], hidden_BSH, output)

        return passed_by

    layers = model.model.layers
    handles = [
        layers[index].register_forward_hook(hook(share), with_kwargs=True)
        for index, share in shares.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def spread(num_tokens: int, share: float) -> Tensor:
    """Bool (num_tokens,), true for `share` of any run of tokens, as evenly as can be."""
    steps = torch.arange(num_tokens + 1, dtype=torch.float64) * share
    return steps[1:].floor() > steps[:-1].floor()
