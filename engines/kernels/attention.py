"""From the heads of the qkv product to attended rows: Qwen3's norms, rotation, the cache, attention; in plain torch.

The reference of every faster version, and what runs where there is none. What depends on the pass only is prepared once
for all its layers.

Shapes: T rows, N query heads, K key/value heads, A = N + 2 K, D head dim, R = D / 2.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engines.kernels.metadata import BatchMetadata
from engines.kernels.paged_attention import (
    AttentionPlan,
    LayerCache,
    paged_attention,
    plan_attention,
    write_cache,
)
from engines.kernels.rms_norm import rms_norm
from engines.kernels.rotary import rotate


class LayerHeads(Protocol):
    """What attention must know of a layer; a `DecoderLayer` says it.

    Attributes:
        query_norm_D, key_norm_D: RMSNorm weights over each head (Qwen3), or None.
        window: sliding window, None for full attention.
    """

    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def query_norm_D(self) -> Tensor | None: ...  # noqa: N802
    @property
    def key_norm_D(self) -> Tensor | None: ...  # noqa: N802
    @property
    def window(self) -> int | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PassFacts:
    """What the attention of all layers of a pass shares.

    Attributes:
        cos_TR, sin_TR: float32, the rows' angles.
        windows: every sliding window that a layer of the model has; None for full attention.
        max_context_len: of any request that the model takes.
    """

    metadata: BatchMetadata
    cos_TR: Tensor
    sin_TR: Tensor
    epsilon: float
    windows: frozenset[int | None]
    max_context_len: int


class Attention(Protocol):
    """The attention of one pass."""

    def __call__(self, heads_TAD: Tensor, layer: LayerHeads, cache: LayerCache | None) -> Tensor:
        """Write the rows' keys and values to the cache and attend.

        Args:
            heads_TAD: queries, keys and values as the fused product gives them.
            cache: None where each request is whole in this pass.

        Returns:
            (T, N, D)
        """


class TorchAttention:
    def __init__(self, facts: PassFacts) -> None:
        self._facts = facts
        self._plan: AttentionPlan = plan_attention(facts.metadata, facts.windows)

    def __call__(self, heads_TAD: Tensor, layer: LayerHeads, cache: LayerCache | None) -> Tensor:
        queries_TND, keys_TKD, values_TKD = turn_heads(heads_TAD, layer, self._facts)
        if cache is not None:
            write_cache(cache, keys_TKD, values_TKD, self._facts.metadata.slot_mapping_T)
        return paged_attention(queries_TND, keys_TKD, values_TKD, cache, self._plan, layer.window)


def turn_heads(
    heads_TAD: Tensor, layer: LayerHeads, facts: PassFacts
) -> tuple[Tensor, Tensor, Tensor]:
    """Normed and rotated queries and keys, and values."""
    num_rotated = layer.num_heads + layer.num_kv_heads
    rotated_TAD = heads_TAD[:, :num_rotated]
    if layer.query_norm_D is not None and layer.key_norm_D is not None:
        queries_TND = rotated_TAD[:, : layer.num_heads]
        keys_TKD = rotated_TAD[:, layer.num_heads :]
        rotated_TAD = torch.cat(
            [
                rms_norm(queries_TND, layer.query_norm_D, facts.epsilon),
                rms_norm(keys_TKD, layer.key_norm_D, facts.epsilon),
            ],
            dim=1,
        )
    rotated_TAD = rotate(rotated_TAD, facts.cos_TR, facts.sin_TR)
    return (
        rotated_TAD[:, : layer.num_heads],
        rotated_TAD[:, layer.num_heads :],
        heads_TAD[:, num_rotated:],
    )
