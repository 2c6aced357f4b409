"""Which FFN neurons and attention heads stay, as index sets to slice q, k, v, o, gate, up and down with.

A neuron is a row of gate_proj and up_proj and a column of down_proj. Under grouped-query attention a key-value head
and the query heads that read it are a group; every group keeps the same number of query heads, so that the config can
say it (num_attention_heads, num_key_value_heads, head_dim).
Importance is FLAP's (`flap.fluctuation_score`) or Minitron's (Muralidharan et al. 2024, arXiv:2407.14679):
`InputStatistics.activation` of the input of down_proj and, in L2 norm over a head's channels, of o_proj.

Departure: Minitron ranks query heads within their group only; where groups go too they are ranked by the importance
of the query heads they would keep.

Shapes: F neurons of an FFN, K of them that stay, H query heads, G key-value heads (groups), Q query heads of a group,
D channels of a head.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

WIDTH_MULTIPLE = 64


def ffn_width(width: int, sparsity: float, *, multiple: int = WIDTH_MULTIPLE) -> int:
    """The width nearest to (1 - sparsity) * width that kernels like: a multiple, at least one, never above `width`.

    Raises:
        ValueError: sparsity is out of range.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be in [0, 1), got {sparsity}")
    if sparsity == 0:
        return width
    return min(max(round((1 - sparsity) * width / multiple), 1) * multiple, width)


def select_neurons(importance_F: Tensor, num_keep: int) -> Tensor:
    """Indices (K,), sorted: rows of gate_proj and up_proj, columns of down_proj. Of equal neurons the later stay.

    Raises:
        ValueError: there are not so many, or an importance is not finite.
    """
    return _top(importance_F, num_keep, "neurons")


def head_importance(
    importance_I: Tensor, num_heads: int, *, reduction: Literal["norm", "mean"]
) -> Tensor:
    """Importance of each query head from that of o_proj's input channels: (H,).

    Args:
        num_heads: query heads; with the number of key-value heads it scores whole groups, which lie side by side.
        reduction: "norm" for Minitron's activations, "mean" for FLAP's fluctuation.
    """
    importance_HD = importance_I.float().reshape(num_heads, -1)
    return importance_HD.norm(dim=1) if reduction == "norm" else importance_HD.mean(dim=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSlice:
    """What stays of one attention layer.

    Attributes:
        query_rows: rows (outputs) of q_proj and columns (inputs) of o_proj.
        key_value_rows: rows of k_proj and v_proj.
    """

    query_rows: Tensor
    key_value_rows: Tensor
    num_heads: int
    num_key_value_heads: int


def select_heads(
    importance_H: Tensor,
    *,
    num_key_value_heads: int,
    head_dim: int,
    keep_groups: int,
    keep_heads_per_group: int,
) -> AttentionSlice:
    """Choose groups and, in each, query heads.

    Raises:
        ValueError: there are not so many, heads do not divide into groups, or an importance is not finite.
    """
    num_heads = importance_H.shape[0]
    if num_heads % num_key_value_heads:
        raise ValueError(
            f"{num_heads} heads do not divide into {num_key_value_heads} key-value heads"
        )
    importance_GQ = importance_H.float().reshape(num_key_value_heads, -1)
    kept_GQ = torch.stack(
        [
            _top(importance_Q, keep_heads_per_group, "heads of a group")
            for importance_Q in importance_GQ
        ]
    )
    groups = _top(importance_GQ.gather(1, kept_GQ).sum(dim=1), keep_groups, "key-value heads")
    heads = (groups[:, None] * importance_GQ.shape[1] + kept_GQ[groups]).flatten()
    return AttentionSlice(
        query_rows=_channels(heads, head_dim),
        key_value_rows=_channels(groups, head_dim),
        num_heads=heads.numel(),
        num_key_value_heads=groups.numel(),
    )


def _channels(heads: Tensor, head_dim: int) -> Tensor:
    return (heads[:, None] * head_dim + torch.arange(head_dim, device=heads.device)).flatten()


def _top(importance: Tensor, num_keep: int, what: str) -> Tensor:
    if not 1 <= num_keep <= importance.numel():
        raise ValueError(f"cannot keep {num_keep} of {importance.numel()} {what}")
    if not torch.isfinite(importance).all():
        raise ValueError(f"importance of {what} is not finite")
    return importance.argsort(stable=True)[importance.numel() - num_keep :].sort().values
