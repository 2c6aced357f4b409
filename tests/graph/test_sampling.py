"""Sampling neighbours: scores against naive references and transformers, draws against exact probabilities."""

import asyncio
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers import LlamaForCausalLM

from engines.protocol import (
    AsyncEngine,
    ContinuationScore,
    EngineError,
    ScoreRequest,
    ScoreResult,
)
from engines.transformers_engine import TransformersEngine
from graph import nodes, sampling
from graph.cache import EnrichmentCache
from graph.catalog import build_prompt, default_catalog
from graph.enrich_types import EnrichRequest, EnrichResult, UnsuitableModelError
from graph.node_text import TextModel
from graph.sampling import (
    PAIR_PROMPT,
    EmbedScorer,
    Judged,
    Neighborhood,
    PairScorer,
    RankScorer,
    SampleOptions,
    Scorer,
    ScorerName,
    ScorerUsage,
    choose,
    homophily,
    rank_prompt,
    sample_neighbors,
)
from graph.store import Graph, GraphStore
from graph.text_vectors import TextVectors
from tests.graph.fakes import CodePointText, ScriptedEngine
from tests.graph.graphs import OWNER, columns, create
from tests.graph.test_enrich import House

pytestmark = pytest.mark.anyio


def graph_of(folder: Path, ids: Sequence[Any], edges: Any, **parts: Any) -> Graph:
    store = GraphStore(folder / "graphs")
    return store.get(create(store, columns(ids, edges, **parts)).id, OWNER)


def star(folder: Path, texts: Sequence[str], **parts: Any) -> Graph:
    """Node 0 with all others as neighbours."""
    ids = list(range(len(texts)))
    return graph_of(folder, ids, [(0, i) for i in ids[1:]], texts=texts, **parts)


class GivenScorer:
    """A `Scorer` that looks scores up; None cannot be judged."""

    name: ScorerName = "embed"

    def __init__(self, scores: Mapping[tuple[int, int], float], broken: Sequence[int] = ()) -> None:
        self._scores = scores
        self._broken = broken
        self.usage = ScorerUsage()
        self.asked: list[Neighborhood] = []

    async def score(self, neighborhoods: Sequence[Neighborhood]) -> list[Judged]:
        self.asked += neighborhoods
        return [
            Judged(scores=None, fault="broken")
            if n.centre in self._broken
            else Judged(scores=tuple(self._scores[n.centre, i] for i in n.neighbors))
            for n in neighborhoods
        ]


def random_graph(folder: Path, num_nodes: int = 30, seed: int = 0) -> Graph:
    rng = np.random.default_rng(seed)
    edges = [(a, b) for a in range(num_nodes) for b in range(a) if rng.random() < 0.3]
    return graph_of(
        folder,
        list(range(num_nodes)),
        edges,
        labels=rng.choice(["x", "y"], num_nodes).tolist(),
        splits=rng.choice(["train", "val", "test"], num_nodes).tolist(),
    )


# Draws


async def test_without_noise_the_best_are_kept(tmp_path: Path) -> None:
    """Against the naive rule, node by node; equal scores go by node index."""
    graph = random_graph(tmp_path)
    rng = np.random.default_rng(1)
    scores = {(a, b): round(rng.random(), 1) for a in range(30) for b in range(30)}
    scorer: Scorer = GivenScorer(scores)
    samples = await sample_neighbors(graph, range(30), scorer, SampleOptions(fanout=4, noise=0))
    for centre, sample in enumerate(samples):
        neighbors = graph.neighbors(centre).tolist()
        assert (sample.centre, sample.num_neighbors) == (centre, len(neighbors))
        kept = [kept.index for kept in sample.kept]
        if len(neighbors) <= 4:
            assert kept == neighbors
            assert {(k.chosen_by, k.score) for k in sample.kept} <= {("all", None)}
            continue
        expected = sorted(neighbors, key=lambda i: -scores[centre, i])[:4]
        assert kept == expected
        assert all(k.score == scores[centre, k.index] for k in sample.kept)
        assert {k.chosen_by for k in sample.kept} == {"score"}
        assert dict(sample.dropped) == {i: scores[centre, i] for i in neighbors if i not in kept}


def plackett_luce(weights: Sequence[float], order: Sequence[int]) -> float:
    """Probability of drawing just this order without replacement."""
    left, probability = sum(weights), 1.0
    for index in order:
        probability *= weights[index] / left
        left -= weights[index]
    return probability


@pytest.mark.parametrize("noise", [0.1, 0.5, 3.0])
def test_gumbel_draws_have_exact_probabilities(noise: float) -> None:
    scores = np.array([0.9, 0.75, 0.7, 0.3, 0.1])
    weights = np.exp(scores / noise).tolist()
    options = SampleOptions(fanout=2, noise=noise)
    rng = np.random.default_rng(3)
    num_draws = 20_000
    drawn = Counter(tuple(choose(scores, options, rng)[0]) for _ in range(num_draws))
    orders = list(itertools.permutations(range(5), 2))
    expected = np.array([plackett_luce(weights, order) for order in orders]) * num_draws
    assert expected.sum() == pytest.approx(num_draws)
    found = np.array([drawn[order] for order in orders])
    rare = expected < 5  # too few for the test's approximation: together
    observed = [*found[~rare], found[rare].sum()] if rare.any() else found
    wanted = [*expected[~rare], expected[rare].sum()] if rare.any() else expected
    assert chisquare(observed, wanted).pvalue > 1e-3


def test_the_floor_is_drawn_evenly_from_the_rest() -> None:
    scores = np.array([0.9, 0.8, 0.7, 0.2, 0.1, 0.0])
    options = SampleOptions(fanout=4, num_random=2, noise=0)
    rng = np.random.default_rng(0)
    pairs: Counter[frozenset[int]] = Counter()
    for _ in range(6000):
        best, drawn = choose(scores, options, rng)
        assert best == [0, 1]
        assert len(drawn) == 2
        pairs[frozenset(drawn)] += 1
    assert len(pairs) == 6  # of the four that are left
    assert chisquare(list(pairs.values())).pvalue > 1e-3
    assert choose(scores, SampleOptions(fanout=3, num_random=3), rng)[0] == []


async def test_a_draw_depends_on_seed_and_node_alone(tmp_path: Path) -> None:
    graph = random_graph(tmp_path)
    scorer = GivenScorer({(a, b): 0.5 for a in range(30) for b in range(30)})
    options = SampleOptions(fanout=3, num_random=1, noise=1.0, seed=7)
    alone = [(await sample_neighbors(graph, [i], scorer, options))[0] for i in range(30)]
    together = await sample_neighbors(graph, range(29, -1, -1), scorer, options)
    assert alone == together[::-1]
    other = SampleOptions(fanout=3, num_random=1, noise=1.0, seed=8)
    assert await sample_neighbors(graph, range(30), scorer, other) != alone


async def test_nothing_is_judged_where_nothing_is_to_choose(tmp_path: Path) -> None:
    graph = graph_of(tmp_path, [0, 1, 2, 3], [(0, 1), (0, 2)])
    scorer = GivenScorer({})
    samples = await sample_neighbors(graph, [0, 1, 3], scorer, SampleOptions(fanout=2))
    assert scorer.asked == []
    assert [[kept.index for kept in sample.kept] for sample in samples] == [[1, 2], [0], []]
    assert samples[2].num_neighbors == 0


async def test_a_node_that_cannot_be_judged_fails_alone(tmp_path: Path) -> None:
    graph = graph_of(tmp_path, [0, 1, 2], [(0, 1), (0, 2), (1, 2)])
    scorer = GivenScorer({(1, 0): 0.1, (1, 2): 0.9}, broken=[0])
    broken, fine = await sample_neighbors(graph, [0, 1], scorer, SampleOptions(fanout=1, noise=0))
    assert (broken.fault, broken.kept, broken.dropped) == ("broken", (), ())
    assert [kept.index for kept in fine.kept] == [2]


async def test_a_hub_has_candidates(tmp_path: Path) -> None:
    graph = star(tmp_path, ["t"] * 400)
    scorer = GivenScorer({(0, i): i / 400 for i in range(400)})
    options = SampleOptions(fanout=5, noise=0)
    (sample,) = await sample_neighbors(graph, [0], scorer, options)
    assert (sample.num_neighbors, len(sample.dropped)) == (399, 256 - 5)
    candidates = scorer.asked[0].neighbors
    assert list(candidates) == sorted(set(candidates))
    assert [kept.index for kept in sample.kept] == sorted(candidates)[:-6:-1]
    # every neighbour is a candidate for some seed
    everyone: set[int] = set()
    for seed in range(20):
        await sample_neighbors(graph, [0], scorer, SampleOptions(fanout=5, noise=0, seed=seed))
        everyone |= set(scorer.asked[-1].neighbors)
    assert everyone == set(range(1, 400))


async def test_homophily_is_of_training_nodes(tmp_path: Path) -> None:
    """Against a loop over edges; labels of other nodes must not matter."""
    graph = random_graph(tmp_path)
    scorer = GivenScorer({(a, b): 0.5 for a in range(30) for b in range(30)})
    samples = await sample_neighbors(graph, range(30), scorer, SampleOptions(fanout=2))
    labels = graph.nodes.column("label").to_pylist()
    splits = graph.nodes.column("split").to_pylist()

    def share(edges: list[tuple[int, int]]) -> tuple[float | None, int]:
        known = [(a, b) for a, b in edges if splits[a] == splits[b] == "train"]
        return sum(labels[a] == labels[b] for a, b in known) / len(known), len(known)

    kept = [(s.centre, k.index) for s in samples for k in s.kept]
    every = [(a, int(b)) for a in range(30) for b in graph.neighbors(a)]
    found = homophily(graph, samples)
    assert (found.kept, found.num_kept_edges) == share(kept)
    assert (found.all, found.num_all_edges) == share(every)
    bare = graph_of(tmp_path / "bare", [0, 1], [(0, 1)])
    samples = await sample_neighbors(bare, [0, 1], scorer, SampleOptions(fanout=1))
    nothing = homophily(bare, samples)
    assert (nothing.kept, nothing.num_kept_edges, nothing.all) == (None, 0, None)


# Scorers


@pytest.fixture
def cache(tmp_path: Path) -> EnrichmentCache:
    return EnrichmentCache(tmp_path / "cache.db")


def vector_of(text: str) -> list[float]:
    """What `ScriptedEngine` embeds a text as."""
    ids = [1, *map(ord, text), 2]
    return [float(len(ids)), float(sum(ids)), 0.5]


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


NEAR = Neighborhood(centre=0, neighbors=(1, 2, 3))


def vectors(engine: ScriptedEngine, cache: EnrichmentCache) -> TextVectors:
    async def engine_for(model: str, param: str) -> AsyncEngine:
        return engine

    async def text_for(model: str, param: str) -> TextModel:
        return CodePointText(marks=True)

    return TextVectors(engine_for=engine_for, text_for=text_for, cache=cache)


async def test_embed_is_the_cosine(tmp_path: Path, cache: EnrichmentCache) -> None:
    graph = star(tmp_path, ["zz", "\uffff", " zz\n", ""])
    engine = ScriptedEngine(kind="encoder", max_model_len=1000)
    scorer = EmbedScorer(graph, vectors(engine, cache), "encoder")
    (judged,) = await scorer.score([NEAR])
    far = (1 + cosine(vector_of("zz"), vector_of("\uffff"))) / 2
    assert judged.scores == pytest.approx((far, 1.0, 0.0))
    assert len(engine.embedded) == 2  # equal texts once, an empty one not at all
    again = EmbedScorer(graph, vectors(engine, cache), "encoder")
    assert await again.score([NEAR]) == [judged]
    assert len(engine.embedded) == 2
    assert (again.usage.num_calls, again.usage.num_cached) == (0, 2)
    other = EmbedScorer(graph, vectors(engine, cache), "encoder", tenant="b")
    await other.score([NEAR])
    assert len(engine.embedded) == 4


async def test_embed_by_the_enriched_vector(tmp_path: Path) -> None:
    """The centre's vector is of its own text and of what the LLM wrote; the neighbours' stay raw."""
    house = House(tmp_path)
    graph = star(tmp_path, ["abc", "x" * 90, "q", "r"])
    scorer = EmbedScorer(graph, vectors(house.encoder, house.cache), "encoder")
    prompt = default_catalog().get("summary@1")
    await scorer.enrich_centres(house.enricher, [0], prompt, "writer")
    (judged,) = await scorer.score([NEAR])
    enriched = vector_of("abc\nABC")
    expected = [(1 + cosine(enriched, vector_of(t))) / 2 for t in ("x" * 90, "q", "r")]
    assert judged.scores == pytest.approx(expected)
    assert (scorer.usage.num_calls, scorer.usage.completion_tokens) == (2, 3)
    empty = star(tmp_path / "empty", ["", "a", "b", "c"])
    scorer = EmbedScorer(empty, vectors(house.encoder, house.cache), "encoder")
    await scorer.enrich_centres(house.enricher, [0], prompt, "writer")
    (judged,) = await scorer.score([NEAR])
    assert (judged.scores, judged.fault) == (None, "the node could not be enriched")


def listed(prompt: str) -> list[str]:
    """The neighbours in a prompt of `llm_rank`."""
    lines = prompt.split("<neighbors>\n", 1)[1].split("\n</neighbors>", 1)[0].splitlines()
    return [re.sub(r"^\d+\. ", "", line) for line in lines]


def rating_of(text: str) -> int:
    return sum(text.encode()) % 11


def rate(prompt: str) -> str:
    return json.dumps({str(i): rating_of(text) for i, text in enumerate(listed(prompt), 1)})


async def test_rank_rates_every_neighbour(tmp_path: Path, cache: EnrichmentCache) -> None:
    texts = ["centre", *(f"neighbour {i}" for i in range(20)), "", "neighbour 3"]
    graph = star(tmp_path, texts)
    engine = ScriptedEngine(rate)
    scorer = RankScorer(graph, engine, CodePointText(), cache)
    scorer.check_model("writer")
    everyone = Neighborhood(centre=0, neighbors=tuple(range(1, len(texts))))
    (judged,) = await scorer.score([everyone])
    assert judged.scores == pytest.approx([rating_of(text) / 10 if text else 0.0 for text in texts[1:]])  # fmt: skip
    assert sorted(len(listed(prompt)) for prompt in engine.prompts) == [5, 16]
    for request, prompt in zip(engine.requests, engine.prompts, strict=True):
        assert request.constraint is not None
        schema = json.loads(request.constraint.text)
        names = [str(i) for i in range(1, len(listed(prompt)) + 1)]
        assert schema["required"] == names
        assert schema["properties"]["1"] == {"type": "integer", "minimum": 0, "maximum": 10}
        assert request.params.temperature == 0
    usage = scorer.usage
    assert (usage.num_calls, usage.num_cached) == (2, 0)
    assert usage.prompt_tokens == sum(map(len, engine.prompts))
    again = RankScorer(graph, engine, CodePointText(), cache)
    assert await again.score([everyone]) == [judged]
    assert (again.usage.num_calls, again.usage.num_cached, len(engine.prompts)) == (0, 21, 2)


async def test_rank_does_not_go_by_the_nodes_order(tmp_path: Path, cache: EnrichmentCache) -> None:
    """A model that counts upwards must not favour the last nodes of the graph."""
    engine = ScriptedEngine(
        lambda prompt: json.dumps({str(i): i for i in range(1, len(listed(prompt)) + 1)})
    )
    texts = ["a", "b", "c", *(f"centre {i}" for i in range(200))]
    ids = list(range(len(texts)))
    graph = graph_of(tmp_path, ids, [(i, j) for i in ids[3:] for j in range(3)], texts=texts)
    centres = [Neighborhood(centre=i, neighbors=(0, 1, 2)) for i in ids[3:]]
    judged = await RankScorer(graph, engine, CodePointText(), cache).score(centres)
    places = Counter(judgement.scores[2] for judgement in judged if judgement.scores)
    assert chisquare([places[0.1], places[0.2], places[0.3]]).pvalue > 1e-3


async def test_rank_halves_what_does_not_fit(tmp_path: Path, cache: EnrichmentCache) -> None:
    texts = ["centre", *(f"{i}" * 50 for i in range(8))]
    graph = star(tmp_path, texts)
    prompt = rank_prompt(8)
    filled = prompt.fill(texts[0], texts[1:5])
    room = sum(len(f"[{m['role']}]{m['content']}") for m in filled) + prompt.max_tokens
    engine = ScriptedEngine(rate, max_model_len=room)
    scorer = RankScorer(graph, engine, CodePointText(), cache)
    everyone = Neighborhood(centre=0, neighbors=tuple(range(1, 9)))
    (judged,) = await scorer.score([everyone])
    assert judged.scores == pytest.approx([rating_of(text) / 10 for text in texts[1:]])
    assert [len(listed(prompt)) for prompt in engine.prompts] == [4, 4]
    tiny = ScriptedEngine(rate, max_model_len=200)
    (judged,) = await RankScorer(graph, tiny, CodePointText(), cache).score([everyone])
    assert judged.scores is None
    assert "does not fit the 200 tokens" in str(judged.fault)
    assert tiny.prompts == []


async def test_rank_repairs_once_and_then_fails_the_node(
    tmp_path: Path, cache: EnrichmentCache
) -> None:
    graph = star(tmp_path, ["centre", "a", "b", "c"])
    answers = iter(["{", '{"1": 1, "2": 2, "3": 11}', "{", '{"1": 1, "2": 2, "3": 3}'])
    engine = ScriptedEngine(lambda prompt: next(answers))
    scorer = RankScorer(graph, engine, CodePointText(), cache)
    (judged,) = await scorer.score([NEAR])
    assert judged.scores is None
    assert "answer.3 is 11" in str(judged.fault)
    (judged,) = await scorer.score([NEAR])  # a failure is not cached
    assert sorted(judged.scores or ()) == [0.1, 0.2, 0.3]
    assert scorer.usage.num_calls == 4


async def test_long_texts_are_cut(tmp_path: Path, cache: EnrichmentCache) -> None:
    graph = star(tmp_path, ["c" * 1000, "n" * 1000, "b", "a"])
    engine = ScriptedEngine(rate)
    await RankScorer(graph, engine, CodePointText(), cache).score([NEAR])
    assert "c" * 384 in engine.prompts[0]
    assert "c" * 385 not in engine.prompts[0]
    assert "n" * 96 in listed(engine.prompts[0])


class Weighing(ScriptedEngine):
    """Scores continuations by a rule of the prompt."""

    def __init__(self, logprobs: Callable[[str], tuple[float, float]], **options: Any) -> None:
        super().__init__(**options)
        self._logprobs = logprobs
        self.scored: list[str] = []

    async def score(self, request: ScoreRequest) -> ScoreResult:
        context = "".join(map(chr, request.context_ids))
        self.scored.append(context)
        assert ["".join(map(chr, ids)) for ids in request.continuation_ids] == ["yes", "no"]
        scores = tuple(
            ContinuationScore(logprob=value, is_greedy=False, token_logprobs=(value,))
            for value in self._logprobs(context)
        )
        return ScoreResult(scores=scores, num_tokens=len(context))


async def test_pair_weighs_yes_against_no(tmp_path: Path, cache: EnrichmentCache) -> None:
    graph = star(tmp_path, ["centre", "good", "bad", ""])
    engine = Weighing(lambda context: (-1.0, -3.0) if "good" in context else (-900.0, -1.0))
    scorer = PairScorer(graph, engine, CodePointText(), cache)
    (judged,) = await scorer.score([NEAR])
    p_yes, p_no = math.exp(-1), math.exp(-3)
    assert judged.scores == pytest.approx((p_yes / (p_yes + p_no), 0.0, 0.0))
    assert (scorer.usage.num_calls, len(engine.scored)) == (2, 2)
    assert await PairScorer(graph, engine, CodePointText(), cache).score([NEAR]) == [judged]
    assert len(engine.scored) == 2
    assert engine.prompts == []  # nothing is written


async def test_pair_halves_what_does_not_fit(tmp_path: Path, cache: EnrichmentCache) -> None:
    graph = star(tmp_path, ["c" * 500, "n" * 500, "", ""])
    engine = Weighing(lambda context: (-1.0, -1.0), max_model_len=400)
    (judged,) = await PairScorer(graph, engine, CodePointText(), cache).score([NEAR])
    assert judged.scores == (0.5, 0.0, 0.0)
    assert f"\n{'c' * 96}\n" in engine.scored[0]
    assert f"\n{'n' * 96}\n" in engine.scored[0]
    tiny = Weighing(lambda context: (0.0, 0.0), max_model_len=20)
    (judged,) = await PairScorer(graph, tiny, CodePointText(), cache).score([NEAR])
    assert "a pair does not fit" in str(judged.fault)


class WordText(CodePointText):
    """A token per word, so that prompts fit the tiny model."""

    def encode_text(self, text: str) -> list[int]:
        return [3 + sum(word.encode()) % 60 for word in text.split()]

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        return [1, *self.encode_text(" ".join(message["content"] for message in messages))]


class Awaited:
    """An engine as its users see it, without a host in between."""

    def __init__(self, engine: TransformersEngine) -> None:
        self._engine = engine
        self.info = engine.info

    async def score(self, request: ScoreRequest) -> ScoreResult:
        return self._engine.score(request)


async def test_pair_is_transformers_log_probability(
    tmp_path: Path, tiny_llama: Path, cache: EnrichmentCache
) -> None:
    model = LlamaForCausalLM.from_pretrained(tiny_llama).eval().requires_grad_(False)
    engine = Awaited(TransformersEngine(lambda: model, model_id="tiny"))
    texts = ["one text", "another", "a third text here", "and a last one"]
    graph = star(tmp_path, texts)
    text = WordText()
    scorer = PairScorer(graph, cast(AsyncEngine, engine), text, cache)
    (judged,) = await scorer.score([NEAR])
    assert judged.scores is not None
    (yes,), (no,) = text.encode_text("yes"), text.encode_text("no")
    for score, other in zip(judged.scores, texts[1:], strict=True):
        ids = text.encode_chat(PAIR_PROMPT.fill(texts[0], variables={"other": other}))
        logprobs = model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
        assert score == pytest.approx(float(torch.sigmoid(logprobs[yes] - logprobs[no])), abs=1e-6)
    assert len(set(judged.scores)) == 3


@pytest.mark.parametrize("kind", [RankScorer, PairScorer])
async def test_failures_of_the_engine_are_raised(
    tmp_path: Path, cache: EnrichmentCache, kind: Any
) -> None:
    graph = star(tmp_path, ["centre", "a", "b", "c"])

    def dead(_: str) -> Any:
        raise EngineError("engine_dead", "it died")

    engine = ScriptedEngine(dead) if kind is RankScorer else Weighing(dead)
    with pytest.raises(EngineError, match="it died"):
        await kind(graph, engine, CodePointText(), cache).score([NEAR, NEAR])


async def test_unsuitable_models(tmp_path: Path, cache: EnrichmentCache) -> None:
    graph = star(tmp_path, ["a", "b"])
    encoder = ScriptedEngine(kind="encoder")
    with pytest.raises(UnsuitableModelError, match="is an encoder"):
        PairScorer(graph, encoder, CodePointText(), cache).check_model("encoder")
    with pytest.raises(UnsuitableModelError, match="no chat template"):
        PairScorer(graph, ScriptedEngine(), CodePointText(chats=False), cache).check_model("writer")
    free = ScriptedEngine()
    free.info = type(free.info)(**{**_fields(free.info), "unsupported": ("response_format",)})
    PairScorer(graph, free, CodePointText(), cache).check_model("writer")
    with pytest.raises(UnsuitableModelError, match="cannot keep an answer to a schema"):
        RankScorer(graph, free, CodePointText(), cache).check_model("writer")


def _fields(info: Any) -> dict[str, Any]:
    return {name: getattr(info, name) for name in info.__dataclass_fields__}


async def test_a_prompt_of_another_version_is_judged_anew(
    tmp_path: Path, cache: EnrichmentCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = star(tmp_path, ["centre", "a", "b", "c"])
    engine = Weighing(lambda context: (-1.0, -1.0))
    await PairScorer(graph, engine, CodePointText(), cache).score([NEAR])
    changed = {"id": "p", "version": 2, "kind": "scorer", "description": "", "inputs": ["text", "other"],
               "max_tokens": 1, "max_text_tokens": 384, "max_neighbors": 0, "max_neighbor_tokens": 0,
               "output": {"type": "text"}, "messages": list(PAIR_PROMPT.messages)}  # fmt: skip
    monkeypatch.setattr(sampling, "PAIR_PROMPT", build_prompt(changed))
    await PairScorer(graph, engine, CodePointText(), cache).score([NEAR])
    assert len(engine.scored) == 6


async def test_scoring_runs_as_wide_as_the_engine(tmp_path: Path, cache: EnrichmentCache) -> None:
    ids = list(range(40))
    graph = graph_of(tmp_path, ids, [(a, b) for a in ids for b in ids[:3] if a > b])
    engine = ScriptedEngine(rate, max_num_seqs=3)
    engine.hold()
    scorer = RankScorer(graph, engine, CodePointText(), cache)
    centres = [Neighborhood(centre=i, neighbors=(0, 1, 2)) for i in ids[3:]]
    task = asyncio.ensure_future(scorer.score(centres))
    await engine.arrived.wait()
    engine.release()
    assert len(await task) == 37
    assert engine.most_running <= 3


async def test_few_neighbourhoods_are_in_memory_at_once(
    tmp_path: Path, cache: EnrichmentCache
) -> None:
    ids = list(range(40))
    graph = graph_of(tmp_path, ids, [(a, b) for a in ids for b in ids[:3] if a > b])
    engine = ScriptedEngine(rate, max_num_seqs=3)
    engine.hold()
    begun: list[int] = []

    class Watched(RankScorer):
        def _heads(self, neighborhood: Neighborhood) -> list[str]:
            begun.append(neighborhood.centre)
            return super()._heads(neighborhood)

    scorer = Watched(graph, engine, CodePointText(), cache)
    centres = [Neighborhood(centre=i, neighbors=(0, 1, 2)) for i in ids[3:]]
    task = asyncio.ensure_future(scorer.score(centres))
    await engine.arrived.wait()
    for _ in range(100):
        await asyncio.sleep(0)
    assert len(begun) <= 6
    engine.release()
    assert len(await task) == len(begun) == 37


async def test_of_a_judged_text_only_the_head_is_kept(
    tmp_path: Path, cache: EnrichmentCache
) -> None:
    long = "long " * 200_000
    graph = star(tmp_path, ["centre", long, " \n", "short"])
    text = CodePointText()
    text.max_token_chars = 3
    scorer = PairScorer(graph, ScriptedEngine(), text, cache)
    heads = scorer._heads(Neighborhood(centre=0, neighbors=(1, 2, 3)))
    limit = 3 * PAIR_PROMPT.max_text_tokens
    assert heads == ["centre", long[:limit].rstrip(), "", "short"]


async def test_centres_are_enriched_a_few_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = random_graph(tmp_path, 10)
    prompt = default_catalog().get("summary@1")
    monkeypatch.setattr(nodes, "MAX_TEXT_BYTES_AT_ONCE", 2 * len("text of 0"))
    house = House(tmp_path)
    vectors = TextVectors(engine_for=house._engine_for, text_for=house._text_for, cache=house.cache)
    scorer = EmbedScorer(graph, vectors, "encoder")
    asked: list[int] = []
    whole = house.enricher.enrich

    async def enrich(request: EnrichRequest) -> EnrichResult:
        asked.append(len(request.nodes))
        return await whole(request)

    monkeypatch.setattr(house.enricher, "enrich", enrich)
    await scorer.enrich_centres(house.enricher, list(range(10)), prompt, "writer")
    assert asked == [2] * 5
    assert sorted(scorer._enriched) == list(range(10))
