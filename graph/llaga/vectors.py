"""Vectors of nodes: the graph's own features, or an encoder's, kept in the embedding layer of the enrichment cache.

A key holds tenant, encoder and text, so that nothing kept is ever stale, and a job and a query share what either made.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from engines.text import TextTokenizer
from graph.cache import EnrichmentCache
from graph.llaga.filling import Float32s
from graph.store import Graph, Int64s

ENCODE_BATCH = 64
_KEYS_AT_ONCE = 1024


class NodeVectors:
    """What an encoder made of the texts of one tenant's nodes.

    Args:
        encoder_hash: the encoder's `checkpoint_hash`.
        dim: of its vectors.
    """

    def __init__(self, cache: EnrichmentCache, *, tenant: str, encoder_hash: str, dim: int) -> None:
        self._cache = cache
        self._prefix = f"node-vector:{len(tenant)}:{tenant}:{encoder_hash}:{dim}:".encode()
        self._dim = dim

    def load(self, graph: Graph, nodes: Int64s, features: Float32s) -> Int64s:
        """Fill the rows of `features` (nodes of the graph, dim) that are kept; returns the nodes that are not."""
        missing = []
        for first in range(0, len(nodes), _KEYS_AT_ONCE):
            some = nodes[first : first + _KEYS_AT_ONCE]
            keys = self._keys(graph.texts(some))
            found = self._cache.get_many("embedding", keys)
            for node, key in zip(some, keys, strict=True):
                value = found.get(key)
                if value is None:
                    missing.append(node)
                else:
                    features[node] = np.frombuffer(value, dtype="<f4")
        return np.array(missing, dtype=np.int64)

    def keep(self, texts: Sequence[str], vectors: Float32s) -> None:
        assert vectors.shape == (len(texts), self._dim)
        rows = vectors.astype("<f4")
        keys = self._keys(texts)
        self._cache.put_many(
            "embedding", {key: row.tobytes() for key, row in zip(keys, rows, strict=True)}
        )

    def _keys(self, texts: Sequence[str]) -> list[bytes]:
        return [
            hashlib.sha256(self._prefix + text.encode("utf-8", "surrogatepass")).digest()
            for text in texts
        ]


def cut_text(text: str, tokenizer: TextTokenizer, limit: int) -> str:
    """A beginning of a text that no less than the tokens that the encoder takes are made of."""
    return text[: limit * tokenizer.max_token_chars]


def frame_tokens(ids: Sequence[int], tokenizer: TextTokenizer, limit: int) -> tuple[int, ...]:
    """As many of a text's tokens as the encoder takes, with what goes around them."""
    before, after = tokenizer.special_prefix, tokenizer.special_suffix
    return (*before, *ids[: limit - len(before) - len(after)], *after)
