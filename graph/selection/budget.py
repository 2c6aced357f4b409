"""How many of the best nodes a budget pays for, by an estimate of what a call about each of them costs."""

import math
from dataclasses import dataclass

import numpy as np

from graph.selection.request import Budget, BudgetName, Rates
from graph.store import Graph, Int64s

BYTES_PER_TOKEN = 4
"""Of English in a byte-pair vocabulary. Three-byte scripts come out near one token a character, as they should."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """An estimate. Attributes: seconds, cost: None where no rate was given."""

    tokens: int
    seconds: float | None
    cost: float | None


def estimate_tokens(graph: Graph, rates: Rates) -> Int64s:
    """Of a call about each node, prompt and answer."""
    import pyarrow.compute as pc

    lengths = pc.binary_length(graph.nodes.column("text")).to_numpy(zero_copy_only=False)
    text = -(-np.asarray(lengths, dtype=np.int64) // BYTES_PER_TOKEN)
    return np.minimum(text, rates.max_text_tokens) + rates.tokens_per_node


def estimate_cost(tokens: int, rates: Rates) -> Cost:
    per_second, per_million = rates.tokens_per_second, rates.cost_per_million_tokens
    return Cost(
        tokens=tokens,
        seconds=None if per_second is None else tokens / per_second,
        cost=None if per_million is None else tokens * per_million / 1e6,
    )


def affordable(tokens_N: Int64s, budget: Budget, rates: Rates) -> tuple[int, BudgetName | None]:
    """How many nodes from the front are paid for, and which limit stops there; None: all of them are.

    Nothing behind the first node that does not fit is looked at. Of limits that stop at one node the first in the
    order fraction, nodes, tokens, seconds, cost is named.

    Args:
        tokens_N: of all nodes, best first.
    """
    total = len(tokens_N)
    counts: dict[BudgetName, int] = {}
    if budget.fraction is not None:
        # Rounded first, because 0.07 * 100 is a little above 7.
        counts["fraction"] = max(1, math.ceil(round(budget.fraction * total, 9)))
    if budget.nodes is not None:
        counts["nodes"] = budget.nodes
    spent_N = np.cumsum(tokens_N)
    for name, limit in _token_limits(budget, rates).items():
        counts[name] = int(np.searchsorted(spent_N, limit, side="right"))
    first = min(counts, key=lambda name: counts[name])
    return (total, None) if counts[first] >= total else (counts[first], first)


def _token_limits(budget: Budget, rates: Rates) -> dict[BudgetName, float]:
    """What tokens, time and money each pay for, in tokens; rounded, because 0.29 * 100 is a little below 29."""
    limits: dict[BudgetName, float] = {}
    if budget.tokens is not None:
        limits["tokens"] = budget.tokens
    if budget.seconds is not None:
        assert rates.tokens_per_second is not None
        limits["seconds"] = round(budget.seconds * rates.tokens_per_second, 6)
    if budget.cost is not None:
        price = rates.cost_per_million_tokens
        assert price is not None
        limits["cost"] = round(budget.cost * 1e6 / price, 6) if price > 0 else math.inf
    return limits
