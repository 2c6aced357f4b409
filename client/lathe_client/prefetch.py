"""A thread that fills a local store from the service while a training loop goes on.

The loop says which nodes it will want and never waits: what is not there in time is used without enrichment, and is
there the next time. The first error ends the fetching, not the training; `close` raises it. Nodes that an engine lost
may be asked for again; after each fetch that lost some the thread rests, twice as long each time.
"""

import functools
import logging
import os
import threading
from collections import Counter, deque
from collections.abc import Callable
from types import TracebackType
from typing import Self, Unpack

import numpy as np

from lathe_client.api import EnrichmentClient
from lathe_client.calls import MAX_NODES_PER_REQUEST, EnrichOptions, NodeIds
from lathe_client.store import EnrichmentStore, Indices, Mask, Vectors

Fetch = Callable[[Indices], tuple[Vectors, Mask] | tuple[Vectors, Mask, Mask]]
"""Vectors of some nodes (num_indices, dim), which of them there are, and which of the others to ask for again; none
where it does not say."""

TRANSIENT = frozenset({"engine_dead", "sleeping", "queue_full", "draining", "model_loading"})
"""Codes of rows that failed by their engine and not by their node."""
FIRST_REST_SECONDS = 1.0
LONGEST_REST_SECONDS = 60.0
EXIT_SECONDS = 5.0
"""How long an exception that leaves the `with` block waits for the fetch under way."""

logger = logging.getLogger("lathe_client.prefetch")


def graph_fetch(
    client: EnrichmentClient,
    graph_id: str,
    node_ids: NodeIds | None = None,
    **options: Unpack[EnrichOptions],
) -> Fetch:
    """Fetch from a graph of the service.

    Args:
        node_ids: the service's id of each node index; None where they are the indices themselves.
    """

    embeddings: EnrichOptions = {**options, "returns": ["embedding"]}

    def fetch(indices: Indices) -> tuple[Vectors, Mask, Mask]:
        wanted = indices if node_ids is None else [node_ids[i] for i in indices]
        enriched = client.enrich_graph(graph_id, wanted, **embeddings)
        codes, there = enriched.error_codes, enriched.enriched_mask
        if not there.all():
            reasons = Counter(codes[i] for i in np.flatnonzero(~there))
            logger.warning(
                "%d of %d nodes were not enriched: %s", reasons.total(), len(there), dict(reasons)
            )
        return enriched.embeddings, there, np.array([code in TRANSIENT for code in codes])

    return fetch


class Prefetcher:
    """Fills `store` by `fetch` with what is wanted, in a thread of its own. Use as a context manager.

    Pickled, as for a loader's worker, it becomes one that has nothing fetched.

    Args:
        only: nodes that may be fetched, such as a selection; None is all.
        batch_size: nodes of one fetch.

    Attributes:
        failure: what ended the fetching; None while it goes well.
    """

    def __init__(
        self,
        store: EnrichmentStore,
        fetch: Fetch,
        *,
        only: Indices | None = None,
        batch_size: int = 256,
    ) -> None:
        if not 1 <= batch_size <= MAX_NODES_PER_REQUEST:
            raise ValueError(f"batch_size must be 1 to {MAX_NODES_PER_REQUEST}, got {batch_size}")
        self.failure: Exception | None = None
        self._store = store
        self._fetch = fetch
        self._batch_size = batch_size
        self._may = np.zeros(store.num_nodes, dtype=bool)
        self._may[slice(None) if only is None else only] = True
        self._waiting: deque[int] = deque()
        self._changed = threading.Condition()
        self._busy = False
        self._closed = False
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._run, name="lathe-prefetch", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop(None if error is None else EXIT_SECONDS)
        if error is None and self.failure is not None:
            raise self.failure

    def __reduce__(self) -> "tuple[type[_Elsewhere], tuple[()]]":
        return _Elsewhere, ()

    def want(self, indices: Indices) -> None:
        """Have nodes fetched that are neither there nor asked for; returns at once.

        Does nothing but warn in a forked process, which has no such thread.
        """
        if os.getpid() != self._pid:
            _warn_once()
            return
        indices = indices[self._may[indices] & ~self._store.has(indices)]
        if not indices.size:  # of a warm store: nobody need be woken
            return
        with self._changed:
            if self._closed or self.failure is not None:
                return
            new = np.unique(indices[self._may[indices]])
            new = new[~self._store.has(new)]
            # Once each, even if the service cannot enrich it; see `_give_back`.
            self._may[new] = False
            self._waiting.extend(new.tolist())
            self._changed.notify_all()

    def drain(self) -> None:
        """Wait until everything wanted has been asked for, or this is closed; for before a training.

        Nodes that an engine lost are not waited for: the log tells how many, and `want` asks for them again.

        Raises: what ended the fetching.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self.failure or self._closed or not (self._waiting or self._busy)
            )
        if self.failure is not None:
            raise self.failure

    def close(self) -> None:
        """End the thread after the fetch under way. Raises: what ended the fetching."""
        self._stop()
        if self.failure is not None:
            raise self.failure

    def _stop(self, timeout_seconds: float | None = None) -> None:
        """The thread is a daemon: one that outlives the time-out ends with its fetch, or with the process."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(timeout_seconds)

    def _run(self) -> None:
        num_in_vain = 0  # fetches in a row that lost nodes
        while (batch := self._next(rest_seconds(num_in_vain))) is not None:
            try:
                vectors, there, *again = self._fetch(batch)
                self._store.write(batch[there], vectors[there])
            except Exception as error:  # kept for the thread that can raise it
                logger.warning("prefetching ends: %s", error)
                with self._changed:
                    self.failure = error
                    self._busy = False
                    self._changed.notify_all()
                return
            lost = batch[again[0]] if again else batch[:0]
            num_in_vain = num_in_vain + 1 if lost.size else 0
            self._give_back(lost)

    def _next(self, pause_seconds: float) -> Indices | None:
        """The next nodes to fetch, after a pause; None when closed."""
        with self._changed:
            self._busy = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._closed, pause_seconds)
            self._changed.wait_for(lambda: self._closed or self._waiting)
            if self._closed:
                return None
            count = min(len(self._waiting), self._batch_size)
            self._busy = True
            return np.array([self._waiting.popleft() for _ in range(count)], dtype=np.int64)

    def _give_back(self, lost: Indices) -> None:
        with self._changed:
            self._may[lost] = True


class _Elsewhere:
    """A prefetcher in a process that is not its own."""

    def want(self, indices: Indices) -> None:
        _warn_once()


@functools.cache
def _warn_once() -> None:
    logger.warning(
        "nodes are wanted in a process that has no prefetcher, and are not fetched: make the loader with"
        " filter_per_worker=False"
    )


def rest_seconds(num_in_vain: int) -> float:
    """Before the next fetch, after so many in a row that lost nodes."""
    if num_in_vain == 0:
        return 0.0
    return min(FIRST_REST_SECONDS * 2.0 ** min(num_in_vain - 1, 20), LONGEST_REST_SECONDS)
