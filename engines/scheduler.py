"""Who runs next: continuous batching (Orca, Yu et al. 2022) with chunked prefill (Sarathi-Serve, arXiv:2403.02310).

A step computes one token of every decoding request, and as much of the others' prompts as `max_num_batched_tokens`
leaves. Requests run in the order of their rank: arrival time plus `AGEING_SECONDS` per level of priority, so that a
request of low priority is overtaken only by those that come within its handicap, and waits for ever behind nobody.

A request gets the blocks of all its known tokens when it is admitted, and one more each time decoding fills its last.
Where none is left, the running request of the worst rank is preempted: its blocks are released and it waits, to compute
prompt and output anew. The best-ranked request is never preempted, so that everybody finishes.
"""

import heapq
from dataclasses import dataclass, field

from engines.kv_cache import BlockManager, block_key, root_key
from engines.protocol import ROW_PLACEHOLDER, EngineError

AGEING_SECONDS = 10.0


@dataclass(slots=True, eq=False, kw_only=True)
class ScheduledRequest:
    """What the scheduler knows of a request.

    Attributes:
        token_ids: prompt and output so far.
        rank: lower runs first; `rank` makes it.
        embedding_rows: the rows of all placeholders, `row_bytes` each.
        num_dense_tokens: tokens before it are computed as the model is; those behind it may skip parts of the model,
            so their blocks are found under `skip_key` only. None where all are.
        finds_prefix: may take computed blocks; false where every prompt position's logits are wanted.
        num_computed_tokens: tokens whose keys and values are in `block_table`.
        num_cached_tokens: prompt tokens that were found computed when the request was first admitted; None before.
        block_keys: of the full blocks of `token_ids`.
    """

    request_id: str
    token_ids: list[int]
    rank: tuple[float, int]
    tenant: str = ""
    embedding_rows: bytes = b""
    row_bytes: int = 0
    num_dense_tokens: int | None = None
    skip_key: bytes = b""
    finds_prefix: bool = True
    num_computed_tokens: int = 0
    num_cached_tokens: int | None = None
    block_table: list[int] = field(default_factory=list)
    block_keys: list[bytes] = field(default_factory=list)

    @property
    def num_left(self) -> int:
        """Known tokens to compute; 1 in decode."""
        return len(self.token_ids) - self.num_computed_tokens

    def rows_between(self, start: int, end: int) -> bytes:
        """Embedding rows of the placeholders among `token_ids[start:end]`."""
        if not self.embedding_rows:
            return b""
        first = self.token_ids[:start].count(ROW_PLACEHOLDER)
        num_rows = self.token_ids[start:end].count(ROW_PLACEHOLDER)
        return self.embedding_rows[first * self.row_bytes : (first + num_rows) * self.row_bytes]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens of one request that a step computes: the next `num_tokens`."""

    request: ScheduledRequest
    num_tokens: int

    @property
    def is_last(self) -> bool:
        """Whether the step's logits choose the request's next token."""
        return self.num_tokens == self.request.num_left


def rank(priority: int, arrived_at: float, number: int) -> tuple[float, int]:
    """Args: arrived_at: seconds on any one clock; number: breaks ties."""
    return (arrived_at + priority * AGEING_SECONDS, number)


class Scheduler:
    """Decides steps; owned by the engine thread.

    Attributes:
        num_preemptions: since the start.
        num_queried_tokens, num_hit_tokens: prompt tokens looked up in the prefix cache, and found.
    """

    def __init__(
        self,
        blocks: BlockManager,
        *,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_num_waiting: int,
    ) -> None:
        if max_num_batched_tokens < max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens is {max_num_batched_tokens}, less than one for each of"
                f" max_num_seqs {max_num_seqs}"
            )
        self.blocks = blocks
        self.num_preemptions = 0
        self.num_queried_tokens = 0
        self.num_hit_tokens = 0
        self._block_size = block_size
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_num_waiting = max_num_waiting
        self._waiting: list[tuple[tuple[float, int], ScheduledRequest]] = []
        self._running: list[ScheduledRequest] = []

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def reset(self, blocks: BlockManager) -> None:
        """Forget every request, and go on with an empty cache."""
        self.blocks = blocks
        self._waiting = []
        self._running = []

    def add(self, request: ScheduledRequest) -> None:
        """Let a request wait. The whole of it must fit an otherwise empty cache."""
        self.extend_keys(request)
        heapq.heappush(self._waiting, (request.rank, request))

    def check_queue(self, num_others: int = 0) -> None:
        """See whether one more may wait.

        Args:
            num_others: requests that will wait here later.

        Raises:
            EngineError: "queue_full".
        """
        num_waiting = len(self._waiting) + num_others
        if num_waiting >= self._max_num_waiting:
            raise EngineError(
                "queue_full", f"{num_waiting} requests wait already, no more are taken"
            )

    def remove(self, request_id: str) -> None:
        """Forget a request that waits or runs; its blocks are free at once."""
        for request in self._running:
            if request.request_id == request_id:
                self._running.remove(request)
                self.close(request)
                return
        self._waiting = [entry for entry in self._waiting if entry[1].request_id != request_id]
        heapq.heapify(self._waiting)

    def schedule(self) -> list[Chunk]:
        """The next step's chunks, decoding requests first; empty where nothing can run. May preempt."""
        for request in sorted(self._running, key=lambda running: running.rank):
            if request in self._running:  # not preempted meanwhile
                self._reserve(request)
        self._admit()
        return self._share_budget()

    def _reserve(self, request: ScheduledRequest) -> None:
        """Give a request the block that its next token needs, or preempt it."""
        while len(request.block_table) * self._block_size < len(request.token_ids):
            if self.blocks.num_free:
                request.block_table += self.blocks.allocate(1)
            elif self._preempt_worst() is request:
                return

    def make_room(self, num_blocks: int) -> None:
        """Preempt until so many blocks are free; at most `blocks.num_usable` can be asked for."""
        while self.blocks.num_free < num_blocks:
            self._preempt_worst()

    def _preempt_worst(self) -> ScheduledRequest:
        worst = max(self._running, key=lambda running: running.rank)
        self._running.remove(worst)
        self.close(worst)
        heapq.heappush(self._waiting, (worst.rank, worst))
        self.num_preemptions += 1
        return worst

    def open(self, request: ScheduledRequest, num_tokens: int) -> None:
        """Give a request the blocks of its first `num_tokens` tokens, those that are computed already first."""
        found = self._find_prefix(request, num_tokens)
        self.blocks.hold(found)
        num_needed = -(-num_tokens // self._block_size) - len(found)
        request.block_table = found + self.blocks.allocate(num_needed)
        request.num_computed_tokens = len(found) * self._block_size
        if request.num_cached_tokens is None:
            request.num_cached_tokens = request.num_computed_tokens
            self.num_queried_tokens += num_tokens
            self.num_hit_tokens += request.num_cached_tokens

    def close(self, request: ScheduledRequest) -> None:
        """Take a request's blocks back."""
        self.blocks.release(request.block_table)
        request.block_table = []
        request.num_computed_tokens = 0

    def _find_prefix(self, request: ScheduledRequest, num_tokens: int) -> list[int]:
        """Computed blocks that the request can start from; its last token is always left to compute."""
        if not request.finds_prefix:
            return []
        num_findable = min(num_tokens, len(request.token_ids) - 1) // self._block_size
        return self.blocks.find(request.block_keys[:num_findable])

    def _admit(self) -> None:
        """Start waiting requests, best rank first, while seats and blocks last.

        One block per running request is kept for the tokens to come, lest the newcomer be preempted at once.
        """
        while self._waiting and len(self._running) < self._max_num_seqs:
            request = self._waiting[0][1]
            num_tokens = len(request.token_ids)
            found = self._find_prefix(request, num_tokens)
            num_taken = -(-num_tokens // self._block_size) - len(found)
            num_taken += self.blocks.num_unheld(found)
            if self._running and num_taken + len(self._running) > self.blocks.num_free:
                return
            heapq.heappop(self._waiting)
            self.open(request, num_tokens)
            self._running.append(request)

    def _share_budget(self) -> list[Chunk]:
        """Every decoding request's token; then prompts, shortest remainder first, so that a long one holds up nobody.

        The best-ranked prompt has half of what is left at least, so that short ones cannot hold it up for ever.
        """
        ordered = sorted(self._running, key=lambda request: request.rank)
        chunks = [Chunk(request, 1) for request in ordered if request.num_left == 1]
        prompts = [request for request in ordered if request.num_left > 1]
        if not prompts:
            return chunks
        budget = self._max_num_batched_tokens - len(chunks)
        first = prompts[0]
        num_first = min(first.num_left, -(-budget // 2))
        budget -= num_first
        others: list[Chunk] = []
        for request in sorted(prompts[1:], key=lambda request: request.num_left):
            num_tokens = min(request.num_left, budget)
            budget -= num_tokens
            if num_tokens:
                others.append(Chunk(request, num_tokens))
        num_first = min(first.num_left, num_first + budget)
        return [*chunks, *([Chunk(first, num_first)] if num_first else []), *others]

    def advance(self, chunk: Chunk) -> None:
        """Note that a chunk is computed; blocks that it filled can be found from now on."""
        request = chunk.request
        num_full_before = request.num_computed_tokens // self._block_size
        request.num_computed_tokens += chunk.num_tokens
        for index in range(num_full_before, request.num_computed_tokens // self._block_size):
            self.blocks.set_key(request.block_table[index], request.block_keys[index])

    def append(self, request: ScheduledRequest, token_id: int) -> None:
        """Add a generated token, to be computed by the next step."""
        request.token_ids.append(token_id)
        self.extend_keys(request)

    def extend_keys(self, request: ScheduledRequest) -> None:
        """Hash the blocks that the request's tokens fill."""
        size = self._block_size
        for index in range(len(request.block_keys), len(request.token_ids) // size):
            start, end = index * size, (index + 1) * size
            previous = request.block_keys[-1] if index else root_key(request.tenant)
            rows = request.rows_between(start, end)
            if request.num_dense_tokens is not None and end > request.num_dense_tokens:
                rows += request.skip_key
            request.block_keys.append(block_key(previous, request.token_ids[start:end], rows))
