"""A thread that fills a local store from the service while a training loop goes on.

The loop says which nodes it will want and never waits: what is not there in time is used without enrichment, and is
there the next time. The first error ends the fetching, not the training; `close` raises it.
"""

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self, Unpack

import numpy as np

from lathe_client.api import EnrichmentClient
from lathe_client.calls import MAX_NODES_PER_REQUEST, EnrichOptions
from lathe_client.results import NodeId
from lathe_client.store import EnrichmentStore, Indices, Mask, Vectors

Fetch = Callable[[Indices], tuple[Vectors, Mask]]
"""Vectors of some nodes (num_indices, dim), and which of them there are."""

logger = logging.getLogger("lathe_client.prefetch")


def graph_fetch(
    client: EnrichmentClient,
    graph_id: str,
    node_ids: Sequence[NodeId] | None = None,
    **options: Unpack[EnrichOptions],
) -> Fetch:
    """Fetch from a graph of the service.

    Args:
        node_ids: the service's id of each node index; None where they are the indices themselves.
    """

    embeddings: EnrichOptions = {**options, "returns": ["embedding"]}

    def fetch(indices: Indices) -> tuple[Vectors, Mask]:
        wanted = [int(i) if node_ids is None else node_ids[i] for i in indices]
        enriched = client.enrich_graph(graph_id, wanted, **embeddings)
        return enriched.embeddings, enriched.has_embedding

    return fetch


class Prefetcher:
    """Fills `store` by `fetch` with what is wanted, in a thread of its own. Use as a context manager.

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
        self._stop()
        if error is None and self.failure is not None:
            raise self.failure

    def want(self, indices: Indices) -> None:
        """Have nodes fetched that are neither there nor asked for; returns at once.

        Does nothing in a forked process, which has no such thread.
        """
        if os.getpid() != self._pid:
            return
        indices = indices[self._may[indices] & ~self._store.has(indices)]
        if not indices.size:  # of a warm store: nobody need be woken
            return
        with self._changed:
            if self._closed or self.failure is not None:
                return
            new = np.unique(indices[self._may[indices]])
            new = new[~self._store.has(new)]
            self._may[new] = False  # each is asked for once, even if the service cannot enrich it
            self._waiting.extend(new.tolist())
            self._changed.notify_all()

    def drain(self) -> None:
        """Wait until everything wanted has been fetched; for before a training. Raises: what ended the fetching."""
        with self._changed:
            self._changed.wait_for(lambda: self.failure or not (self._waiting or self._busy))
        if self.failure is not None:
            raise self.failure

    def close(self) -> None:
        """End the thread after the fetch under way. Raises: what ended the fetching."""
        self._stop()
        if self.failure is not None:
            raise self.failure

    def _stop(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while (batch := self._next()) is not None:
            try:
                vectors, there = self._fetch(batch)
                self._store.write(batch[there], vectors[there])
            except Exception as error:  # kept for the thread that can raise it
                logger.warning("prefetching ends: %s", error)
                with self._changed:
                    self.failure = error
                    self._busy = False
                    self._changed.notify_all()
                return

    def _next(self) -> Indices | None:
        """The next nodes to fetch; None when closed."""
        with self._changed:
            self._busy = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._closed or self._waiting)
            if self._closed:
                return None
            count = min(len(self._waiting), self._batch_size)
            self._busy = True
            return np.array([self._waiting.popleft() for _ in range(count)], dtype=np.int64)
