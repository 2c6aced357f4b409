"""How many bytes of weights a decode step reads, and how many of them skipping saves.

At batch size 1 decoding is bound by this, so methods are compared at equal bytes: a share of skipped feed-forwards
says little beside a share of dropped blocks. Imports no torch.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from compression.checkpoint import Manifest
from compression.ffn_skip.profile import Substitute

_BLOCK = re.compile(r"model\.layers\.(\d+)\.(mlp\.)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightTraffic:
    """Bytes of linear layers read per decoded token; norms and the embedding's one row are left out.

    Attributes:
        total: of all blocks and the output head.
        blocks, feed_forwards: per layer; a block's includes its feed-forward.
    """

    total: int
    blocks: tuple[int, ...]
    feed_forwards: tuple[int, ...]

    def saved_by_rows(
        self,
        num_skipped: Sequence[int],
        num_rows: int,
        substitutes: Mapping[int, Substitute],
        *,
        hidden_size: int,
        dtype: str,
    ) -> float:
        """Share of all bytes that a row saves on average.

        Args:
            num_skipped: rows of `num_rows` that skipped, per layer.
        """
        saved = 0.0
        for layer, count in enumerate(num_skipped):
            instead = substitutes.get(layer, Substitute()).tensors(hidden_size, dtype)
            cost = sum(info.num_bytes for info in instead.values())
            saved += count / num_rows * (self.feed_forwards[layer] - cost)
        return saved / self.total

    def blocks_of(self, saved: float) -> float:
        """How many average blocks make up this share of all bytes."""
        return saved * self.total * len(self.blocks) / sum(self.blocks)

    def feed_forwards_of(self, saved: float) -> float:
        """Which share of all feed-forwards makes up this share of all bytes."""
        return saved * self.total / sum(self.feed_forwards)


def weight_traffic(manifest: Manifest, num_layers: int) -> WeightTraffic:
    blocks, feed_forwards, head = [0] * num_layers, [0] * num_layers, 0
    for matrix in manifest.matrices:
        found = _BLOCK.match(matrix.name)
        if found is None:
            head += matrix.num_bytes
            continue
        blocks[int(found[1])] += matrix.num_bytes
        if found[2]:
            feed_forwards[int(found[1])] += matrix.num_bytes
    promised = manifest.promised_tensors()
    if "lm_head" not in {matrix.name for matrix in manifest.matrices}:  # tied
        head += promised["model.embed_tokens.weight"].num_bytes
    return WeightTraffic(
        total=sum(blocks) + head, blocks=tuple(blocks), feed_forwards=tuple(feed_forwards)
    )
