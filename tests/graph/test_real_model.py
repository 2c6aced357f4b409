"""JSON prompts on SmolLM2-135M-Instruct: whatever it writes is an answer, and one that is cut is repaired."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest

from compression.registry import ModelRegistry
from engines.engine import NativeEngine
from engines.protocol import AsyncEngine, GenerateRequest, TokenOutput
from graph.cache import EnrichmentCache
from graph.catalog import Prompt, default_catalog
from graph.enrich import Enricher
from graph.enrich_types import EnrichNode, EnrichRequest, EnrichRow
from graph.node_text import TextModel
from graph.sampling import Neighborhood, RankScorer
from graph.served_text import ServedText
from tests.engines.decoding import run_one
from tests.graph.test_sampling import star

pytestmark = [pytest.mark.real_model, pytest.mark.anyio]
TEXT = "Backpropagation trains a multilayer perceptron to tell handwritten digits apart."
CLASSES = ("Neural_Networks", "Theory", "Case_Based")


class Stepped:
    """A native engine as its users see it, stepped to a request's end when it comes."""

    def __init__(self, engine: NativeEngine) -> None:
        self._engine = engine
        self.info = engine.info
        self.requests: list[GenerateRequest] = []

    async def generate(self, request: GenerateRequest) -> Any:
        self.requests.append(request)

        async def stream() -> AsyncIterator[TokenOutput]:
            for output in run_one(self._engine, request):
                yield output

        return stream()


class Served:
    def __init__(self, folder: Path, cache: EnrichmentCache) -> None:
        self.engine = Stepped(NativeEngine.load("smollm2-135m", folder))
        self.text = ServedText.load(folder)
        self.cache = cache

    async def _engine_for(self, model: str, param: str) -> AsyncEngine:
        return cast(AsyncEngine, self.engine)

    async def _text_for(self, model: str, param: str) -> TextModel:
        return self.text

    async def row(self, prompt: Prompt, **options: Any) -> EnrichRow:
        enricher = Enricher(engine_for=self._engine_for, text_for=self._text_for, cache=self.cache)
        request = EnrichRequest(
            nodes=(EnrichNode(id=1, text=TEXT),),
            prompt=prompt,
            model="smollm2-135m",
            embedding_model="",
            outputs=frozenset({"text"}),
            **options,
        )
        return (await enricher.enrich(request)).rows[0]


@pytest.fixture(scope="module")
def served(real_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Served:
    cache = EnrichmentCache(tmp_path_factory.mktemp("cache") / "cache.db")
    return Served(ModelRegistry(real_home / "models").get("smollm2-135m").path, cache)


async def test_a_class_is_chosen(served: Served) -> None:
    row = await served.row(default_catalog().get("pseudo_label@1"), classes=CLASSES)
    assert (row.status, row.text, row.repaired) == ("ok", None, False)
    assert row.label in CLASSES
    assert row.fields is not None
    assert row.fields["label"] == row.label
    assert row.fields["confidence"] in [i / 10 for i in range(11)]


async def test_fewer_tokens_give_shorter_answers(served: Served) -> None:
    row = await served.row(default_catalog().get("summary@2"), max_tokens=24)
    assert row.status == "ok"
    assert row.text
    assert row.fields == {"summary": row.text}
    assert len(row.text) <= 480 * 24 // 160


async def test_an_answer_without_room_is_repaired_or_refused(served: Served) -> None:
    """Eight tokens hold the field's name and little more."""
    before = len(served.engine.requests)
    row = await served.row(default_catalog().get("summary@2"), max_tokens=8)
    calls = served.engine.requests[before:]
    assert len(calls) == 2
    assert (row.status, row.repaired) in (("ok", True), ("invalid_output", False))
    assert row.tokens_in == sum(len(call.token_ids) for call in calls)


async def test_neighbours_are_ranked(served: Served, tmp_path: Path) -> None:
    graph = star(tmp_path, [TEXT, "Gradient descent for deep networks.", "Cooking rice.", "Sorting."])  # fmt: skip
    engine = cast(AsyncEngine, served.engine)
    scorer = RankScorer(graph, engine, served.text, served.cache)
    scorer.check_model("smollm2-135m")
    (judged,) = await scorer.score([Neighborhood(centre=0, neighbors=(1, 2, 3))])
    assert judged.scores is not None
    assert set(judged.scores) <= {i / 10 for i in range(11)}
    assert scorer.usage.num_calls == 1
