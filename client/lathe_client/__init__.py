"""Client of a Lathe service for graph jobs. What needs PyTorch Geometric is in `lathe_client.pyg`."""

from lathe_client.aio import AsyncEnrichmentClient
from lathe_client.api import EnrichmentClient
from lathe_client.errors import (
    ApiStatusError,
    ConnectionFailedError,
    JobEndedError,
    LatheError,
    StoreMismatchError,
    UnexpectedAnswerError,
)
from lathe_client.results import Enriched, EnrichedNode, Graph, Job, Selection, Usage
from lathe_client.retry import RetryPolicy
from lathe_client.store import EnrichmentStore

__all__ = [
    "ApiStatusError",
    "AsyncEnrichmentClient",
    "ConnectionFailedError",
    "Enriched",
    "EnrichedNode",
    "EnrichmentClient",
    "EnrichmentStore",
    "Graph",
    "Job",
    "JobEndedError",
    "LatheError",
    "RetryPolicy",
    "Selection",
    "StoreMismatchError",
    "UnexpectedAnswerError",
    "Usage",
]
