"""What FFN-SkipLLM is compared with: skipping at random, always the same feed-forwards, or whole blocks.

- `random` and `static` are the ablations of FFN-SkipLLM (Jaiswal et al. 2024, arXiv:2404.03865): every middle
  feed-forward with one probability, or those whose similarity is highest on average.
- ShortGPT removes the blocks that change their input least (Men et al. 2024, arXiv:2403.03853).
- Unified Layer Skipping keeps the first and last block and evenly spaced others (Liu et al. 2024, arXiv:2404.06954).

Shapes: B texts, S tokens, H hidden channels.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compression.ffn_skip.rule import FeedForward, SkipRule, apply_skipped


class ShareSkip:
    """Skips a fixed share of the rows of each layer, whatever is in them.

    Args:
        shares: layer to share in [0, 1].
        seed: of the choice of rows.

    Attributes:
        num_skipped, num_rows: as of `AdaptiveSkip`.
    """

    def __init__(self, rule: SkipRule, shares: Mapping[int, float], *, seed: int = 0) -> None:
        self.rule = rule
        self.num_skipped = [0] * rule.num_layers
        self.num_rows = 0
        self._shares = shares
        self._generator = torch.Generator().manual_seed(seed)

    @property
    def skip_ratio(self) -> float:
        return sum(self.num_skipped) / (self.num_rows * self.rule.num_layers)

    def feed_forward(
        self, layer: int, hidden_BSH: Tensor, normed_BSH: Tensor, mlp: FeedForward
    ) -> Tensor:
        num_texts, num_tokens = hidden_BSH.shape[:2]
        if layer == 0:
            self.num_rows += num_texts * max(num_tokens - self.rule.warm_up, 0)
        share = self._shares.get(layer, 0.0)
        if share == 0:
            return mlp(normed_BSH)
        draws_BS = torch.rand((num_texts, num_tokens), generator=self._generator)
        is_skipped_BS = (draws_BS < share).to(hidden_BSH.device)
        is_skipped_BS[:, : self.rule.warm_up] = False
        self.num_skipped[layer] += int(is_skipped_BS.sum())
        return apply_skipped(is_skipped_BS, normed_BSH, mlp, None)


def random_shares(rule: SkipRule, skip_ratio: float) -> dict[int, float]:
    """One share for every middle layer, so that `skip_ratio` of all rows skip.

    Raises:
        ValueError: the middle layers are too few.
    """
    share = skip_ratio * rule.num_layers / len(rule.middle)
    if share > 1:
        raise ValueError(f"skip_ratio {skip_ratio}: only {len(rule.middle)} layers may skip")
    return dict.fromkeys(rule.middle, share)


def ranked_shares(ranking: Sequence[int], amount: float) -> dict[int, float]:
    """The first `amount` layers of a ranking: whole ones, and a share of the next for what remains."""
    whole = int(amount)
    shares = dict.fromkeys(ranking[:whole], 1.0)
    if amount > whole:
        shares[ranking[whole]] = amount - whole
    return shares


def static_shares(
    rule: SkipRule, mean_similarity: Sequence[float], skip_ratio: float
) -> dict[int, float]:
    """The middle layers of highest mean similarity, for every row."""
    ranking = sorted(rule.middle, key=lambda layer: -mean_similarity[layer])
    return ranked_shares(ranking, skip_ratio * rule.num_layers)


def unified_layers(num_layers: int, num_dropped: int) -> list[int]:
    """Blocks that Unified Layer Skipping drops: all but the first, the last, and those at even intervals between.

    Raises:
        ValueError: fewer than two blocks would stay.
    """
    num_kept = num_layers - num_dropped
    if num_kept < 2:
        raise ValueError(f"{num_kept} of {num_layers} blocks would stay, at least 2 must")
    interval = num_layers // (num_kept - 1)
    kept = [0, num_layers - 1]
    for layer in range(1, num_layers - 1):
        if len(kept) < num_kept and layer % interval == 0:
            kept.append(layer)
    return sorted(set(range(num_layers)) - set(kept))


@contextmanager
def block_inputs_watched(model: Any) -> Iterator[list[float]]:
    """Sums ShortGPT's block influence: while entered, each pass adds every block's sum of 1 - cos(input, output) over
    its tokens to the list, which has one entry per block. A low influence makes a block removable."""
    influence = [0.0] * len(model.model.layers)

    def hook(index: int) -> Any:
        def watch(
            module: nn.Module,
            arguments: tuple[Tensor, ...],
            keywords: dict[str, Any],
            output: Tensor,
        ) -> None:
            hidden_BSH = arguments[0] if arguments else keywords["hidden_states"]
            cosine_BS = nn.functional.cosine_similarity(hidden_BSH.float(), output.float(), dim=-1)
            influence[index] += float((1 - cosine_BS).double().sum())

        return watch

    handles = [
        layer.register_forward_hook(hook(index), with_kwargs=True)
        for index, layer in enumerate(model.model.layers)
    ]
    try:
        yield influence
    finally:
        for handle in handles:
            handle.remove()
