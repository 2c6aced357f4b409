"""Vectors of the nodes' own texts, from an encoder or the cache: what clustering and LLaGA's templates are made of.

A text is encoded as enrichment does it: normalised, and of one that is longer than the encoder's window the head. An
empty text is encoded as any other; where the model puts nothing around a text, so that no token is left, its vector is
zero. Keys hold everything that shapes a vector.
"""

import asyncio
import hashlib
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec
import numpy as np

from engines.protocol import EmbedRequest, EmbedResult, EngineError, EngineInfo
from graph.cache import EnrichmentCache
from graph.node_text import TextError, TextModel, normalise
from graph.store import Float32s, Graph, Int64s

VECTOR_VERSION = 2
"""Raise it when the way from a text to its vector changes: what is cached is made again, and projectors are refused."""
BATCH = 64


@dataclass(slots=True)
class VectorUsage:
    """What encoding cost.

    Attributes:
        num_cached: vectors that needed no call; equal texts of a call count once.
        num_encoded: nodes whose vector was not there.
    """

    num_calls: int = 0
    num_cached: int = 0
    num_encoded: int = 0
    num_tokens: int = 0


class Embedder(Protocol):
    """As much of an `AsyncEngine` as encoding needs."""

    @property
    def info(self) -> EngineInfo: ...

    async def embed(self, request: EmbedRequest) -> EmbedResult: ...


class TextVectors:
    """Encodes nodes for all requests of a process. Belongs to one event loop.

    Args:
        engine_for, text_for: as for `graph.enrich.Enricher`.
    """

    def __init__(
        self,
        *,
        engine_for: Callable[[str, str], Awaitable[Embedder]],
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
        on_batch: Callable[[int, int], None] = lambda done, total: None,
    ) -> Float32s:
        """Vectors (len(nodes), dim) of nodes, in their order. What is done stays in the cache if it is cancelled.

        Args:
            usage: counts on.
            on_batch: told of nodes done and to do; what it raises ends the work.

        Raises:
            EngineError: also where a text cannot become tokens.
        """
        usage = usage or VectorUsage()
        engine = await self._engine_for(model, "embedding_model")
        text = await self._text_for(model, "embedding_model")
        vectors = np.zeros((len(nodes), engine.info.hidden_size), dtype=np.float32)
        for first in range(0, len(nodes), BATCH):
            some = nodes[first : first + BATCH]
            texts = await asyncio.to_thread(_texts, graph, some)
            rows = await self._encode_some(engine, text, texts, tenant, usage)
            vectors[first : first + len(some)] = rows
            on_batch(first + len(some), len(nodes))
        return vectors

    async def _encode_some(
        self,
        engine: Embedder,
        text: TextModel,
        texts: Sequence[str],
        tenant: str,
        usage: VectorUsage,
    ) -> Float32s:
        keys = await asyncio.to_thread(lambda: [_key(engine.info, t, tenant) for t in texts])
        known = await asyncio.to_thread(self._cache.get_many, "embedding", keys)
        missing = {
            key: given for key, given in zip(keys, texts, strict=True) if key not in known
        }  # equal texts once
        usage.num_cached += len(known)
        usage.num_encoded += sum(key in missing for key in keys)
        try:
            tokens = await asyncio.to_thread(text_tokens, text, list(missing.values()), engine.info)
        except TextError as error:
            raise EngineError("invalid_value", str(error)) from error
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


def _texts(graph: Graph, nodes: Int64s) -> list[str]:
    return [normalise(given) for given in graph.texts(nodes)]


def _key(info: EngineInfo, text: str, tenant: str) -> bytes:
    parts = (
        "text_vector",
        VECTOR_VERSION,
        tenant,
        hashlib.sha256(text.encode()).digest(),
        info.checkpoint_hash,
        info.dtype,
        info.max_model_len,
    )
    return hashlib.sha256(msgspec.msgpack.encode(parts)).digest()


def text_tokens(text: TextModel, texts: Sequence[str], info: EngineInfo) -> list[tuple[int, ...]]:
    """What an encoder reads of normalised texts: as many tokens as it takes, with what goes around them."""
    room = info.max_model_len - len(text.add_special_tokens([]))
    longest = room * text.max_token_chars  # of a long text, only the head is tokenized
    return [
        tuple(text.add_special_tokens(text.encode_text(given[:longest])[:room])) for given in texts
    ]
