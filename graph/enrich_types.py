"""What is asked of enrichment, and what comes back; `graph/enrich.py` works on it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from engines.protocol import FinishReason
from graph.catalog import Prompt
from graph.generation import check_inputs
from graph.store import NodeId

ItemStatus = Literal["ok", "cached", "skipped_budget", "invalid_output", "failed"]
ITEM_STATUSES: tuple[ItemStatus, ...] = (
    "ok",
    "cached",
    "skipped_budget",
    "invalid_output",
    "failed",
)
Output = Literal["text", "embedding"]
BudgetName = Literal["max_nodes", "max_tokens", "max_seconds", "max_cost"]
Priority = Literal["interactive", "training", "bulk"]
PRIORITIES: dict[Priority, int] = {"interactive": 0, "training": 1, "bulk": 2}
"""The engine's numbers; 0 is what chat has. Its scheduler lets age make up for them, so that nothing starves."""
LongText = Literal["head", "head_tail", "chunk_mean"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EnrichNode:
    """What a prompt may read of a node.

    Attributes:
        neighbors: their texts, best first.
        neighbor_labels: of training nodes only (`generation.training_labels`).
        variables: by name, all that the prompt has no default for.
    """

    id: NodeId
    text: str
    neighbors: tuple[str, ...] = ()
    neighbor_labels: tuple[str | None, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class EnrichBudget:
    """The first limit that is reached stops the run; None is no limit.

    Attributes:
        nodes: the first so many nodes, cached or not, so that the same request gives the same rows.
        tokens: prompt and generated tokens of LLM calls. Reserved before a call (prompt and most answer tokens),
            settled after it; never exceeded. Cached texts and embeddings cost nothing.
        cost_tokens: as `tokens`, of what money pays for.
        seconds: wall-clock time for LLM calls; a call that is running then is aborted.
    """

    nodes: int | None = None
    tokens: int | None = None
    cost_tokens: int | None = None
    seconds: float | None = None

    def token_limit(self) -> tuple[int | None, BudgetName]:
        """The tighter limit in tokens, and its name."""
        if self.cost_tokens is None or (
            self.tokens is not None and self.tokens <= self.cost_tokens
        ):
            return self.tokens, "max_tokens"
        return self.cost_tokens, "max_cost"


@dataclass(frozen=True, slots=True, kw_only=True)
class EnrichRequest:
    """Nodes to enrich.

    Attributes:
        outputs: what the rows are to hold; a text is written in any case.
        max_tokens: of an answer; None is the prompt's own number.
        classes: to choose from, for a prompt that has them among its inputs.
        variables: of the prompt, for every node that has none of its own.
        tenant: nothing is shared between tenants.
    """

    nodes: tuple[EnrichNode, ...]
    prompt: Prompt
    model: str
    embedding_model: str
    outputs: frozenset[Output]
    max_tokens: int | None = None
    budget: EnrichBudget = EnrichBudget()
    tenant: str = ""
    priority: Priority = "training"
    long_text: LongText = "head"
    classes: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises: PromptInputError: it does not give what the prompt reads, or gives what it does not."""
        own = [node.variables for node in self.nodes]
        check_inputs(self.prompt, self.classes, self.variables, own)

    def variables_of(self, node: EnrichNode) -> dict[str, str]:
        """What the prompt's variables are for one node, by name."""
        given = {**self.prompt.defaults, **self.variables, **node.variables}
        return {name: given[name] for name in self.prompt.variables}


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemError:
    """Attributes: code: an engine's code, or "empty_text", "empty_output", "invalid_output",
    "budget_exhausted"."""

    code: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EnrichRow:
    """One node's result.

    Attributes:
        status: "cached" means that no engine worked for this row: cache, an equal node of the request, or a request
            that was working on it already. "invalid_output": the LLM wrote nothing usable, nor when asked again.
        text: what is encoded beside the node's own, free of statements of a label; None where not asked for or not
            there.
        fields: a JSON answer as it was written; label: the class in it. None for prompts that ask for text.
        repaired: the LLM was asked twice.
        embedding: float32 little-endian.
        embedding_source: "enriched"; "raw" is the node's own text alone, for an invalid output.
        tokens_in, tokens_out: of the LLM calls that wrote the text, now or when it was cached.
        finish_reason: "length": the answer was cut at max_tokens.
        tokens_spent: of LLM calls made now for this row; equal rows of a request have them once.
        truncated_tokens: tokens cut from the node's and its neighbours' texts to fit the prompt.
        embedding_truncated_tokens: the same, to fit the encoder.
        neighbors_used: how many neighbours the prompt read.
        content_hash: sha256 of what the row was made from: text, and neighbours if read.
    """

    node_id: NodeId
    status: ItemStatus
    text: str | None = None
    fields: dict[str, Any] | None = None
    label: str | None = None
    repaired: bool = False
    embedding: bytes | None = None
    embedding_source: Literal["enriched", "raw"] | None = None
    tokens_in: int = 0
    tokens_out: int = 0
    tokens_spent: int = 0
    finish_reason: FinishReason | None = None
    truncated_tokens: int = 0
    embedding_truncated_tokens: int = 0
    neighbors_used: int = 0
    content_hash: str
    error: ItemError | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EnrichUsage:
    """What a request cost.

    Attributes:
        prompt_tokens, completion_tokens: of LLM calls made now.
        prefix_hit_tokens: of the prompt tokens, those that the engine found computed.
        embedding_tokens: encoded now.
        cached_tokens: prompt and completion tokens that rows would have cost without cache and deduplication.
        stopped_by: the budget that ran out first.
    """

    prompt_tokens: int
    completion_tokens: int
    prefix_hit_tokens: int
    embedding_tokens: int
    cached_tokens: int
    num_nodes: int
    num_by_status: dict[ItemStatus, int]
    seconds: float
    stopped_by: BudgetName | None

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class EnrichResult:
    """Rows in the order of the request's nodes. Attributes: dim: of the embeddings; None without."""

    rows: tuple[EnrichRow, ...]
    usage: EnrichUsage
    dim: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class EnrichEstimate:
    """What a request would cost now, without asking a model.

    Attributes:
        num_distinct: nodes that differ in what the prompt reads of them; the others come for nothing.
        num_empty: distinct nodes without text.
        num_cached: distinct nodes whose text is in the cache; num_embeddings_cached: their vector too.
        num_calls: of the LLM.
        num_failing: distinct nodes whose prompt does not fit.
        prompt_tokens: exact, of all calls.
        completion_tokens: expected: as long as the cached answers are, or as those that this process saw by this
            prompt; where there are none, as long as an answer may be.
        seconds: at the speed that this process saw of the model; None where it saw none.
    """

    num_nodes: int
    num_distinct: int
    num_empty: int
    num_cached: int
    num_embeddings_cached: int
    num_calls: int
    num_failing: int
    prompt_tokens: int
    completion_tokens: int
    max_completion_tokens: int
    seconds: float | None


class EnrichObserver(Protocol):
    """Counts what happens; the service's metrics."""

    def enrich_item(self, outcome: str) -> None: ...

    def enrich_cache_hit(self, layer: str) -> None: ...


class UnsuitableModelError(ValueError):
    """A model that cannot do what it was named for. Attributes: param: "model" or "embedding_model"."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param
        self.message = message
