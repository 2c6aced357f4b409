"""What a selection may ask for: the JSON of POST /v1/graphs/{id}/select, and of a job that selects its own nodes.

`check_request` knows which option belongs to which strategy; an option that nothing would read is refused by name.
"""

from typing import Annotated, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, FailFast, Field, model_validator

Strategy = Literal[
    "random",
    "degree",
    "pagerank",
    "clustering_distance",
    "text_length",
    "entropy",
    "soft_homophily",
    "mix",
]
Order = Literal["low", "high"]
Grouping = Literal["class", "community"]
BudgetName = Literal["fraction", "nodes", "tokens", "seconds", "cost"]

DEFAULT_ORDERS: dict[Strategy, Order] = {
    "degree": "low",
    "pagerank": "high",
    "clustering_distance": "high",
    "text_length": "low",
    "entropy": "high",
    "soft_homophily": "low",
}
"""Of the strategies that have an order. Low first: nodes with few neighbours, little text or neighbours of another
class gain most from an LLM."""

SEEDED = frozenset({"random", "clustering_distance"})
PREDICTED = frozenset({"entropy", "soft_homophily"})
CLUSTERED = frozenset({"clustering_distance"})
MAX_CLUSTERS = 512
MAX_PARTS = 16


class SelectError(ValueError):
    """Attributes: param: the field at fault; unsupported: nothing would read that field."""

    def __init__(self, param: str, message: str, *, unsupported: bool = False) -> None:
        super().__init__(message)
        self.param = param
        self.message = message
        self.unsupported = unsupported


class _Json(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=()
    )


class Budget(_Json):
    """At least one limit; the first that is exhausted stops. Tokens, seconds and cost are estimated by `rates`."""

    model_config = ConfigDict(json_schema_extra={"minProperties": 1})

    fraction: float | None = Field(
        default=None, gt=0, le=1, description="Of the graph's nodes, rounded up."
    )
    nodes: int | None = Field(default=None, ge=1)
    tokens: int | None = Field(default=None, ge=1, description="Of prompts and answers.")
    seconds: float | None = Field(
        default=None, gt=0, description="Needs `rates.tokens_per_second`."
    )
    cost: float | None = Field(
        default=None, gt=0, description="By `rates.cost_per_million_tokens`."
    )

    @model_validator(mode="after")
    def _any(self) -> Self:
        if all(getattr(self, name) is None for name in get_args(BudgetName)):
            raise ValueError(f"needs at least one of: {', '.join(get_args(BudgetName))}")
        return self


class Rates(_Json):
    """How a node's cost is estimated before any prompt is rendered: a token for every four bytes of its text, at most
    `max_text_tokens`, and `tokens_per_node` for the rest of the prompt and the answer. Time and money follow from the
    tokens; what your engine reaches and what you pay is yours to say."""

    tokens_per_node: int = Field(default=256, ge=0, le=2**20)
    max_text_tokens: int = Field(default=1024, ge=0, le=2**20)
    tokens_per_second: float | None = Field(default=None, ge=1e-3, le=1e9)
    cost_per_million_tokens: float | None = Field(
        default=None, ge=0, le=1e9, description="For `budget.cost` by default the server's."
    )


class MixPart(_Json):
    """One strategy of a mix."""

    strategy: Literal[
        "random",
        "degree",
        "pagerank",
        "clustering_distance",
        "text_length",
        "entropy",
        "soft_homophily",
    ]
    weight: float = Field(ge=1e-6, le=1e6)
    order: Order | None = None


class Quotas(_Json):
    """Divide the budget over groups of nodes, in proportion to their size or equally.

    `class` knows labels of nodes of split `train` only; all other nodes are one more group.
    """

    per: Grouping
    shares: Literal["proportional", "equal"] = "proportional"


class SelectRequest(_Json):
    """Nodes that are worth an LLM call.

    `order`: default low for degree, text_length and soft_homophily, high for pagerank, clustering_distance and
    entropy. `seed`: of random, clustering_distance and communities (default 0).
    """

    strategy: Strategy
    budget: Budget
    order: Order | None = None
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    mix: Annotated[list[MixPart], Field(min_length=1, max_length=MAX_PARTS)] | None = Field(
        default=None, description="Of strategy mix: a weighted mean of ranks."
    )
    num_clusters: int | None = Field(
        default=None,
        ge=1,
        le=MAX_CLUSTERS,
        description="Of clustering_distance; by default the number of classes of training nodes.",
    )
    embedding_model: str | None = Field(
        default=None,
        max_length=100,
        description="Of clustering_distance: cluster the texts as this model encodes them. By default the graph's "
        "features, or where it has none the server's encoder.",
    )
    predictions: dict[str, Annotated[list[float], FailFast()]] | None = Field(
        default=None,
        description="Of entropy and soft_homophily: class probabilities of every node, by id (integer ids as digits).",
    )
    quotas: Quotas | None = None
    rates: Rates = Rates()

    @property
    def strategies(self) -> frozenset[str]:
        """What has to be computed: the strategy, or the parts of the mix."""
        if self.strategy == "mix":
            return frozenset(part.strategy for part in self.mix or ())
        return frozenset({self.strategy})

    @property
    def is_seeded(self) -> bool:
        by_community = self.quotas is not None and self.quotas.per == "community"
        return bool(self.strategies & SEEDED) or by_community


def with_price(request: SelectRequest, price: float | None) -> SelectRequest:
    """With the server's price of a million tokens, where a budget needs one and the request names none."""
    rates = request.rates
    if request.budget.cost is None or rates.cost_per_million_tokens is not None:
        return request
    rates = rates.model_copy(update={"cost_per_million_tokens": price})
    return request.model_copy(update={"rates": rates})


def check_request(request: SelectRequest) -> None:
    """Refuse what does not fit together.

    Raises:
        SelectError: an option is missing, or nothing would read it.
    """
    used = request.strategies
    if request.strategy == "mix" and request.mix is None:
        raise SelectError("mix", "strategy 'mix' needs mix: its strategies and their weights")
    if request.strategy != "mix" and request.mix is not None:
        raise _unread("mix", request)
    if request.order is not None and request.strategy not in DEFAULT_ORDERS:
        raise _unread("order", request)
    for index, part in enumerate(request.mix or ()):
        if part.order is not None and part.strategy not in DEFAULT_ORDERS:
            raise SelectError(
                f"mix[{index}].order", f"strategy {part.strategy!r} has no order", unsupported=True
            )
    if request.seed is not None and not request.is_seeded:
        raise _unread("seed", request)
    for name in ("num_clusters", "embedding_model"):
        if getattr(request, name) is not None and not used & CLUSTERED:
            raise _unread(name, request)
    if request.predictions is not None and not used & PREDICTED:
        raise _unread("predictions", request)
    if request.predictions is None and used & PREDICTED:
        raise SelectError(
            "predictions", f"strategy {min(used & PREDICTED)!r} needs predictions of every node"
        )
    for name, rate in (("seconds", "tokens_per_second"), ("cost", "cost_per_million_tokens")):
        if getattr(request.budget, name) is not None and getattr(request.rates, rate) is None:
            raise SelectError(
                f"rates.{rate}", f"budget.{name} needs rates.{rate} to be estimated by"
            )


def _unread(name: str, request: SelectRequest) -> SelectError:
    return SelectError(name, f"strategy {request.strategy!r} has no {name}", unsupported=True)
