"""Vectors of the nodes' own texts, from an encoder or the cache: what clustering reads where a graph has no features.

A text longer than the encoder's window is cut to its head. An empty text is encoded as any other; where the model puts
nothing around a text, so that no token is left, its vector is zero. Keys hold everything that shapes a vector.
"""

import asyncio
import hashlib
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import msgspec
import numpy as np

from engines.protocol import AsyncEngine, EmbedRequest, EngineInfo
from graph.cache import EnrichmentCache
from graph.enrich import TextModel, normalise
from graph.store import Float32s, Graph, Int64s

KEY_VERSION = 1
"""Raise it when the way from a key's parts to its vector changes."""
BATCH = 64


@dataclass(slots=True)
class VectorUsage:
    """What encoding cost. Attributes: num_cached: vectors that needed no call; equal texts of a call count once."""

    num_calls: int = 0
    num_cached: int = 0
    num_tokens: int = 0


class TextVectors:
    """Encodes nodes for all requests of a process. Belongs to one event loop.

    Args:
        engine_for, text_for: as for `graph.enrich.Enricher`.
    """

    def __init__(
        self,
        *,
        engine_for: Callable[[str, str], Awaitable[AsyncEngine]],
        text_for: Callable[[str, str], Awaitable[TextModel]],
        cache: EnrichmentCache,
    ) -> None:
        self._engine_for = engine_for
        self._text_for = text_for
        self._cache = cache

    async def encode(
        self,
        graph: Graph,
        nodes: Int64s,
        *,
        model: str,
        tenant: str,
        usage: VectorUsage | None = None,
    ) -> Float32s:
        """Vectors (len(nodes), dim) of nodes, in their order. What is done stays in the cache if it is cancelled.

        Args:
            usage: counts on.

        Raises:
            EngineError
        """
        usage = usage or VectorUsage()
        engine = await self._engine_for(model, "embedding_model")
        text = await self._text_for(model, "embedding_model")
        vectors = np.zeros((len(nodes), engine.info.hidden_size), dtype=np.float32)
        for first in range(0, len(nodes), BATCH):
            some = nodes[first : first + BATCH]
            texts = [normalise(t) for t in await asyncio.to_thread(graph.texts, some)]
            rows = await self._encode_some(engine, text, texts, tenant, usage)
            vectors[first : first + len(some)] = rows
        return vectors

    async def _encode_some(
        self,
        engine: AsyncEngine,
        text: TextModel,
        texts: list[str],
        tenant: str,
        usage: VectorUsage,
    ) -> Float32s:
        keys = [_key(engine.info, given, tenant) for given in texts]
        known = await asyncio.to_thread(self._cache.get_many, "embedding", keys)
        missing = {
            key: given for key, given in zip(keys, texts, strict=True) if key not in known
        }  # equal texts once
        usage.num_cached += len(known)
        tokens = await asyncio.to_thread(_tokens, text, list(missing.values()), engine.info)
        asked = {key: ids for key, ids in zip(missing, tokens, strict=True) if ids}
        dim = engine.info.hidden_size
        found = dict.fromkeys(missing, bytes(4 * dim))
        if asked:
            result = await engine.embed(
                EmbedRequest(
                    request_id=f"vectors-{secrets.token_hex(12)}",
                    token_ids=tuple(asked.values()),
                    tenant=tenant,
                )
            )
            usage.num_calls += 1
            usage.num_tokens += result.num_tokens
            size = 4 * result.dim
            for place, key in enumerate(asked):
                found[key] = result.vectors[place * size : (place + 1) * size]
            await asyncio.to_thread(
                self._cache.put_many, "embedding", {key: found[key] for key in asked}
            )
        found |= known
        joined = b"".join(found[key] for key in keys)
        return np.frombuffer(joined, dtype="<f4").reshape(len(texts), dim)


def _key(info: EngineInfo, text: str, tenant: str) -> bytes:
    parts = (
        "text_vector",
        KEY_VERSION,
        tenant,
        hashlib.sha256(text.encode()).digest(),
        info.checkpoint_hash,
        info.dtype,
        info.max_model_len,
    )
    return hashlib.sha256(msgspec.msgpack.encode(parts)).digest()


def _tokens(text: TextModel, texts: list[str], info: EngineInfo) -> list[tuple[int, ...]]:
    room = info.max_model_len - len(text.add_special_tokens([]))
    return [tuple(text.add_special_tokens(text.encode_text(given)[:room])) for given in texts]
