"""Quotas: an order of nodes of which every beginning is divided fairly over groups.

The seats of a divisor method (Sainte-Laguë): the j-th best node of a group with weight w has the claim w / (2j - 1),
and nodes go by their claims. So any budget, whatever its unit, may cut the order anywhere.

Classes are labels of nodes whose split is `train`: what is known of validation and test nodes never steers. All nodes
without such a label are one group.
"""

from dataclasses import dataclass

import numpy as np

from graph.selection.communities import find_communities
from graph.selection.request import Grouping, SelectError
from graph.store import Graph, Int64s, NodeId


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """Attributes: of_N: group of every node; names: of the groups: a label, None for nodes without one, or the id of a
    community's first node."""

    of_N: Int64s
    names: list[NodeId | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupShare:
    """What one group got."""

    name: NodeId | None
    num_nodes: int
    num_selected: int


def find_groups(graph: Graph, per: Grouping, seed: int) -> Groups:
    """Raises: SelectError: the graph has no training labels."""
    if per == "community":
        firsts, of_N = np.unique(find_communities(graph, seed), return_inverse=True)
        return Groups(of_N=of_N, names=list(graph.ids(firsts)))
    labels = graph.training_labels()
    if labels.null_count == len(labels):
        raise SelectError(
            "quotas.per", "the graph has no class: no node of split 'train' has a label"
        )
    classes = labels.dictionary_encode(null_encoding="encode")
    of_N = classes.indices.to_numpy().astype(np.int64)
    return Groups(of_N=of_N, names=classes.dictionary.to_pylist())


def divide(order_N: Int64s, groups: Groups, shares: str) -> Int64s:
    """Reorder nodes, best first, by the claims of their groups; equal claims keep their order."""
    group_N = groups.of_N[order_N]
    sizes_G = np.bincount(groups.of_N, minlength=len(groups.names))
    weights_G = sizes_G if shares == "proportional" else np.ones_like(sizes_G)
    # Place of every node within its group, from 0.
    by_group = np.argsort(group_N, kind="stable")
    starts_G = np.cumsum(sizes_G) - sizes_G
    place_N = np.empty_like(order_N)
    place_N[by_group] = np.arange(len(order_N)) - starts_G[group_N[by_group]]
    claims_N = weights_G[group_N] / (2 * place_N + 1)
    return order_N[np.argsort(-claims_N, kind="stable")]


def shares_of(selected: Int64s, groups: Groups) -> list[GroupShare]:
    """Of the groups that got anything, in the order of their first nodes."""
    sizes_G = np.bincount(groups.of_N, minlength=len(groups.names))
    taken_G = np.bincount(groups.of_N[selected], minlength=len(groups.names))
    return [
        GroupShare(
            name=groups.names[group],
            num_nodes=int(sizes_G[group]),
            num_selected=int(taken_G[group]),
        )
        for group in np.flatnonzero(taken_G)
    ]
