"""Vectors of node texts: in order, each text once, cut to the window, kept per tenant and checkpoint."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from engines.protocol import AsyncEngine, EngineError
from graph.cache import EnrichmentCache
from graph.node_text import TextError, TextModel
from graph.store import Graph, GraphStore
from graph.text_vectors import BATCH, TextVectors, VectorUsage
from tests.graph.fakes import CLS, SEP, CodePointText, ScriptedEngine
from tests.graph.graphs import OWNER, columns, create

pytestmark = pytest.mark.anyio


class Encoder:
    """A `TextVectors` over a scripted encoder, whose vector is (tokens, sum of tokens, 0.5)."""

    def __init__(self, folder: Path, *, marks: bool = True, max_model_len: int = 100) -> None:
        self.engine = ScriptedEngine(model="encoder", kind="encoder", max_model_len=max_model_len)
        self._marks = marks
        self.vectors = TextVectors(
            engine_for=self._engine_for,
            text_for=self._text_for,
            cache=EnrichmentCache(folder / "cache.db"),
        )

    async def _engine_for(self, model: str, param: str) -> AsyncEngine:
        assert (model, param) == ("encoder", "embedding_model")
        return self.engine

    async def _text_for(self, model: str, param: str) -> TextModel:
        return CodePointText(marks=self._marks)

    async def encode(self, graph: Graph, nodes: list[int], tenant: str = "t") -> list[list[float]]:
        found = await self.vectors.encode(graph, np.array(nodes), model="encoder", tenant=tenant)
        assert found.dtype == np.float32
        rows: list[list[float]] = found.tolist()
        return rows


def graph_of(folder: Path, texts: list[str]) -> Graph:
    store = GraphStore(folder)
    create(store, columns(list(range(len(texts))), [], texts=texts))
    return store.get("graph-1", OWNER)


def vector(text: str, around: tuple[int, ...] = (CLS, SEP)) -> list[float]:
    codes = [*map(ord, text), *around]
    return [float(len(codes)), float(sum(codes)), 0.5]


async def test_vectors_in_order_and_each_text_once(tmp_path: Path) -> None:
    encoder = Encoder(tmp_path)
    graph = graph_of(tmp_path, ["ab", "c", " ab ", "", "é", "é"])
    expected = [vector(t) for t in ("c", "ab", "ab", "", "é", "é")]
    assert await encoder.encode(graph, [1, 0, 2, 3, 4, 5]) == expected
    assert len(encoder.engine.embedded) == 4
    assert await encoder.encode(graph, [1, 0, 2, 3, 4, 5]) == expected
    assert len(encoder.engine.embedded) == 4  # all from the cache


async def test_what_raises_between_batches_leaves_what_was_done(tmp_path: Path) -> None:
    encoder = Encoder(tmp_path)
    graph = graph_of(tmp_path, [f"text {i}" for i in range(2 * BATCH + 3)])
    told = []

    def stop(done: int, total: int) -> None:
        told.append((done, total))
        raise InterruptedError

    nodes = np.arange(2 * BATCH + 3)
    usage = VectorUsage()
    with pytest.raises(InterruptedError):
        await encoder.vectors.encode(graph, nodes, model="encoder", tenant="t", on_batch=stop)
    await encoder.vectors.encode(graph, nodes, model="encoder", tenant="t", usage=usage)
    assert told == [(BATCH, len(nodes))]
    assert (usage.num_cached, usage.num_encoded) == (BATCH, BATCH + 3)


async def test_a_text_that_cannot_become_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: CodePointText, text: str) -> list[int]:
        raise TextError("a control token")

    encoder = Encoder(tmp_path)
    monkeypatch.setattr(CodePointText, "encode_text", refuse)
    with pytest.raises(EngineError, match="a control token") as caught:
        await encoder.encode(graph_of(tmp_path, ["ab"]), [0])
    assert caught.value.code == "invalid_value"


async def test_more_nodes_than_a_batch(tmp_path: Path) -> None:
    encoder = Encoder(tmp_path)
    texts = [f"text {i}" for i in range(2 * BATCH + 3)]
    graph = graph_of(tmp_path, texts)
    nodes = list(reversed(range(len(texts))))
    assert await encoder.encode(graph, nodes) == [vector(texts[i]) for i in nodes]
    assert encoder.engine.batches == [BATCH, BATCH, 3]


async def test_long_texts_are_cut_to_their_heads(tmp_path: Path) -> None:
    encoder = Encoder(tmp_path, max_model_len=8)
    graph = graph_of(tmp_path, ["abcdefghij", "x" * 2**20])
    assert await encoder.encode(graph, [0, 1]) == [vector("abcdef"), vector("xxxxxx")]


async def test_nothing_to_encode_is_the_zero_vector(tmp_path: Path) -> None:
    encoder = Encoder(tmp_path, marks=False)
    graph = graph_of(tmp_path, ["", "ab"])
    assert await encoder.encode(graph, [0, 1]) == [[0, 0, 0], vector("ab", ())]
    assert await encoder.encode(graph, [0]) == [[0, 0, 0]]
    assert await encoder.encode(graph, []) == []
    assert encoder.engine.batches == [1]


async def test_nothing_is_shared_between_tenants_and_checkpoints(tmp_path: Path) -> None:
    encoder = Encoder(tmp_path)
    graph = graph_of(tmp_path, ["ab"])
    for tenant in ("t", "u", "t"):
        await encoder.encode(graph, [0], tenant)
    assert len(encoder.engine.embedded) == 2
    encoder.engine.info = dataclasses.replace(encoder.engine.info, checkpoint_hash="hash-2")
    await encoder.encode(graph, [0])
    assert len(encoder.engine.embedded) == 3
