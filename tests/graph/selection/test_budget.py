"""Budgets: every unit by hand, the first that is exhausted stops and is named."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from graph.selection.budget import affordable, estimate_cost, estimate_tokens
from graph.selection.request import Budget, Rates
from graph.store import GraphStore
from tests.graph.graphs import OWNER, columns, create, stored
from tests.graph.selection.test_select import pick

RATES = Rates(tokens_per_second=50.0, cost_per_million_tokens=2.0)
TENS = np.full(10, 10, dtype=np.int64)


@pytest.mark.parametrize(
    ("budget", "total", "expected"),
    [
        (Budget(fraction=0.07), 100, (7, "fraction")),  # 0.07 * 100 > 7 in binary
        (Budget(fraction=0.1), 30, (3, "fraction")),
        (Budget(fraction=0.1), 31, (4, "fraction")),
        (Budget(fraction=1e-6), 5, (1, "fraction")),
        (Budget(fraction=1e-12), 12, (1, "fraction")),
        (Budget(fraction=0.29), 100, (29, "fraction")),
        (Budget(fraction=1.0), 5, (5, None)),
        (Budget(nodes=9), 5, (5, None)),
        (Budget(nodes=5), 5, (5, None)),
        (Budget(nodes=4), 5, (4, "nodes")),
        (Budget(tokens=50), 10, (5, "tokens")),  # 5 * 10 = 50
        (Budget(tokens=49), 10, (4, "tokens")),
        (Budget(tokens=9), 10, (0, "tokens")),
        (Budget(tokens=100), 10, (10, None)),
        (Budget(seconds=1.0), 10, (5, "seconds")),  # 50 tokens in a second
        (Budget(seconds=0.19), 10, (0, "seconds")),
        (Budget(cost=6e-5), 10, (3, "cost")),  # 30 tokens for 6e-5
    ],
)
def test_one_limit(budget: Budget, total: int, expected: tuple[int, str | None]) -> None:
    tokens = np.full(total, 10, dtype=np.int64)
    assert affordable(tokens, budget, RATES) == expected


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"fraction": 0.5, "nodes": 3, "tokens": 70}, (3, "nodes")),
        ({"fraction": 0.2, "nodes": 3, "tokens": 70}, (2, "fraction")),
        ({"nodes": 9, "tokens": 29, "seconds": 1.0, "cost": 1.0}, (2, "tokens")),
        ({"nodes": 9, "tokens": 90, "seconds": 0.2, "cost": 1.0}, (1, "seconds")),
        ({"nodes": 9, "tokens": 90, "seconds": 1.0, "cost": 8e-5}, (4, "cost")),
        ({"cost": 1e-4, "nodes": 5}, (5, "nodes")),  # of equals the first in the stated order
        ({"fraction": 1.0, "nodes": 10, "tokens": 100, "seconds": 2.0, "cost": 1.0}, (10, None)),
    ],
)
def test_the_first_that_is_exhausted_stops(
    limits: dict[str, Any], expected: tuple[int, str | None]
) -> None:
    assert affordable(TENS, Budget.model_validate(limits), RATES) == expected


def test_it_stops_at_the_first_node_that_does_not_fit() -> None:
    tokens = np.array([10, 100, 10], dtype=np.int64)  # the third would fit
    assert affordable(tokens, Budget(tokens=30), RATES) == (1, "tokens")


def test_a_limit_that_falls_a_digit_short_in_binary_is_whole() -> None:
    ones = np.ones(100, dtype=np.int64)
    assert 0.29 * 100 < 29
    assert affordable(ones, Budget(seconds=0.29), Rates(tokens_per_second=100.0)) == (29, "seconds")


def test_a_price_of_nothing_never_stops() -> None:
    free = Rates(cost_per_million_tokens=0.0)
    assert affordable(TENS, Budget(cost=1e-9), free) == (10, None)


def test_tokens_of_a_call_by_hand(tmp_path: Path) -> None:
    store = GraphStore(tmp_path)
    texts = ["", "abcd", "abcde", "日本語", "x" * 2**20]  # bytes 0, 4, 5, 9, a million
    create(store, columns(list("abcde"), [], texts=texts))
    graph = store.get("graph-1", OWNER)
    assert estimate_tokens(graph, Rates()).tolist() == [256, 257, 258, 259, 1280]
    rates = Rates(tokens_per_node=0, max_text_tokens=2)
    assert estimate_tokens(graph, rates).tolist() == [0, 1, 2, 2, 2]


def test_time_and_money_follow_from_tokens() -> None:
    both = estimate_cost(1_000, Rates(tokens_per_second=400.0, cost_per_million_tokens=0.5))
    assert (both.tokens, both.seconds, both.cost) == (1_000, 2.5, 0.0005)
    none = estimate_cost(1_000, Rates())
    assert (none.tokens, none.seconds, none.cost) == (1_000, None, None)


def test_a_selection_stops_by_tokens_and_says_so(tmp_path: Path) -> None:
    graph = stored(tmp_path, ["a", "b", "c"], [("a", "b")])  # texts of 9 bytes: 3 tokens
    rates = {"tokens_per_node": 7, "tokens_per_second": 4.0}
    selection = pick(graph, "degree", {"fraction": 1.0, "tokens": 29}, order="high", rates=rates)
    assert graph.ids(selection.indices) == ["a", "b"]
    assert selection.stopped_by == "tokens"
    assert (selection.estimate.tokens, selection.estimate.seconds) == (20, 5.0)
    nothing = pick(graph, "degree", {"tokens": 9}, rates=rates)
    assert (len(nothing.indices), nothing.stopped_by) == (0, "tokens")
    assert nothing.estimate.tokens == 0


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"nodes": None},
        {"nodes": 0},
        {"nodes": True},
        {"nodes": 1.5},
        {"fraction": 0.0},
        {"fraction": 1.1},
        {"fraction": float("nan")},
        {"tokens": -1},
        {"seconds": 0.0},
        {"seconds": float("inf")},
        {"cost": 0.0},
        {"euros": 1},
    ],
)
def test_bad_budget(limits: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Budget.model_validate(limits)
