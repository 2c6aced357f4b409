"""How many of the best nodes a budget pays for, by an estimate of what a call about each of them costs."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

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


def price(tokens: int, rates: Rates) -> Cost:
    per_second, per_million = rates.tokens_per_second, rates.cost_per_million_tokens
    return Cost(
        tokens=tokens,
        seconds=None if per_second is None else tokens / per_second,
        cost=None if per_million is None else tokens * per_million / 1e6,
    )


def affordable(
    tokens_N: npt.NDArray[np.int64], budget: Budget, rates: Rates
) -> tuple[int, BudgetName | None]:
    """How many nodes from the front are paid for, and which limit stops there; None: all of them are.

    Nothing behind the first node that does not fit is looked at. Of limits that stop at one node the first in the
    order fraction, nodes, tokens, seconds, cost is named.

    Args:
        tokens_N: of all nodes, best first.
    """
    total = len(tokens_N)
    spent = np.cumsum(tokens_N)

    def within(limit: float) -> int:
        return int(np.searchsorted(spent, limit, side="right"))

    counts: dict[BudgetName, int] = {}
    if budget.fraction is not None:
        counts["fraction"] = math.ceil(
            round(budget.fraction * total, 9)
        )  # 0.07 * 100 is a little above 7
    if budget.nodes is not None:
        counts["nodes"] = budget.nodes
    if budget.tokens is not None:
        counts["tokens"] = within(budget.tokens)
    if budget.seconds is not None:
        assert rates.tokens_per_second is not None
        counts["seconds"] = within(budget.seconds * rates.tokens_per_second)
    if budget.cost is not None:
        assert rates.cost_per_million_tokens is not None
        free = rates.cost_per_million_tokens == 0
        counts["cost"] = (
            total if free else within(budget.cost * 1e6 / rates.cost_per_million_tokens)
        )
    name = min(counts, key=lambda limit: counts[limit])
    return (total, None) if counts[name] >= total else (counts[name], name)
