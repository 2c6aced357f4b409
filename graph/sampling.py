"""Neighbourhoods that an LLM has judged: which neighbours a GNN aggregates (E-LLaGNN, Jaiswal et al. 2024,
arXiv:2407.14996; the paper's own rule is not published, this one is ours).

A scorer gives every candidate a number in [0, 1]; of `fanout` neighbours all but `num_random` are the best by
score + noise * Gumbel, the others are drawn evenly from the rest, so that neighbours of another kind are not lost. The
Gumbel-top-k trick (Kool et al. 2019, arXiv:1903.06059) makes this the same as drawing without replacement with weights
exp(score / noise); noise 0 takes the best. Nothing is judged where there is nothing to choose.

Scorers: `embed` is the cosine between the centre's vector, raw or enriched, and the neighbour's raw one, moved to
[0, 1]; `llm_rank` has the LLM give several neighbours at a time an integer from 0 to 10; `llm_pair` is the LLM's own
probability of "yes" against "no" to one neighbour. All are cached by content. An empty text scores 0: there is nothing
to judge it by.

A draw depends on the seed and the node alone, so that a node has the same sample whatever else is asked for.
"""

import asyncio
import hashlib
import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from engines.protocol import (
    AsyncEngine,
    Constraint,
    EngineError,
    GenerateRequest,
    SamplingParams,
    ScoreRequest,
)
from graph.cache import EnrichmentCache
from graph.catalog import Message, Prompt, build_prompt
from graph.enrich import Enricher
from graph.enrich_types import PRIORITIES, EnrichRequest, UnsuitableModelError
from graph.generation import Written, answer_prompt, training_labels
from graph.model_calls import generate_tokens
from graph.node_text import TextError, TextModel, has_text, normalise
from graph.nodes import classes_of_graph, nodes_of_graph, num_at_once
from graph.store import Graph, Int64s
from graph.text_vectors import TextVectors, VectorUsage

ScorerName = Literal["embed", "llm_rank", "llm_pair"]
ChosenBy = Literal["score", "random", "all"]
MAX_CANDIDATES = 256
"""Of a node with more neighbours so many are drawn evenly, and only they are judged."""
RANK_CHUNK = 16
"""Neighbours in one call of `llm_rank`, halved until the prompt fits the context."""
MAX_JUDGED_TOKENS = 384
"""Of a text in a prompt."""
TEXTS_AT_ONCE = 64
"""That are read of a graph together."""
KEY_VERSION = 1

Float64s = npt.NDArray[np.float64]

PAIR_PROMPT = build_prompt(
    {
        "id": "sampling_pair",
        "version": 1,
        "kind": "scorer",
        "description": "Whether a neighbour is about the same topic; the answer is not written but weighed.",
        "inputs": ["text", "other"],
        "max_tokens": 1,
        "max_text_tokens": MAX_JUDGED_TOKENS,
        "max_neighbors": 0,
        "max_neighbor_tokens": 0,
        "output": {"type": "text"},
        "messages": [
            {"role": "system", "content": "You compare texts. You answer yes or no."},
            {
                "role": "user",
                "content": "<text>\n{text}\n</text>\n<other>\n{other}\n</other>\n"
                "Are the two texts about the same topic? Answer yes or no.",
            },
        ],
    }
)
PAIR_ANSWERS = ("yes", "no")


@lru_cache(maxsize=RANK_CHUNK)
def rank_prompt(num_neighbors: int) -> Prompt:
    """The prompt of `llm_rank` about so many neighbours."""
    rating = {"type": "integer", "minimum": 0, "maximum": 10}
    names = [str(number) for number in range(1, num_neighbors + 1)]
    return build_prompt(
        {
            "id": "sampling_rank",
            "version": 1,
            "kind": "scorer",
            "description": "How relevant each of several neighbours is, from 0 to 10.",
            "inputs": ["text", "neighbors"],
            "max_tokens": 16 + 12 * num_neighbors,
            "max_text_tokens": MAX_JUDGED_TOKENS,
            "max_neighbors": num_neighbors,
            "max_neighbor_tokens": 96,
            "output": {
                "type": "json",
                "schema": {"type": "object", "properties": dict.fromkeys(names, rating)},
                "text": [],
            },
            "messages": [
                {"role": "system", "content": "You rate texts. You answer in JSON."},
                {
                    "role": "user",
                    "content": "<text>\n{text}\n</text>\nOther texts:\n<neighbors>\n{neighbors}\n</neighbors>\n"
                    "How relevant is each of the other texts to the first one? Answer with a JSON object that gives "
                    "the number of each an integer from 0 (another topic) to 10 (the same topic).",
                },
            ],
        }
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighborhood:
    """Attributes: neighbors: the candidates, node indices."""

    centre: int
    neighbors: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """Scores of a neighbourhood's candidates, in order; or None, and why there are none."""

    scores: tuple[float, ...] | None
    fault: str | None = None


@dataclass(slots=True, kw_only=True)
class ScorerUsage:
    """What scoring cost so far. Attributes: num_cached: judgements that needed no call."""

    num_calls: int = 0
    num_cached: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    embedding_tokens: int = 0


class Scorer(Protocol):
    """Judges neighbours; belongs to one request."""

    name: ScorerName
    usage: ScorerUsage

    async def score(self, neighborhoods: Sequence[Neighborhood]) -> list[Judged]:
        """Scores in [0, 1].

        Raises:
            EngineError: the engine fails, whatever the node.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleOptions:
    """How to choose.

    Attributes:
        fanout: most neighbours of a node.
        num_random: of these, so many whatever their score.
        noise: scale of the Gumbel noise; 0 takes the best.
    """

    fanout: int
    num_random: int = 0
    noise: float = 0.1
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """Attributes: score: None where nothing was judged."""

    index: int
    score: float | None
    chosen_by: ChosenBy


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSample:
    """One node's neighbourhood.

    Attributes:
        num_neighbors: in the graph.
        kept: best first, then those drawn at random.
        dropped: judged and not kept, with their scores.
        fault: why the node could not be judged; then nothing is kept.
    """

    centre: int
    num_neighbors: int
    kept: tuple[Kept, ...] = ()
    dropped: tuple[tuple[int, float], ...] = ()
    fault: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Homophily:
    """Share of edges whose ends have one label, among those whose ends are both training nodes with a label.

    Attributes:
        kept, all: None where there is no such edge.
    """

    kept: float | None
    num_kept_edges: int
    all: float | None
    num_all_edges: int


async def sample_neighbors(
    graph: Graph, centres: Sequence[int], scorer: Scorer, options: SampleOptions
) -> list[NodeSample]:
    """Choose neighbours of every centre, in order.

    Raises:
        EngineError
    """
    draws = [np.random.default_rng([options.seed, centre]) for centre in centres]
    neighborhoods = [
        _candidates(graph, centre, rng) for centre, rng in zip(centres, draws, strict=True)
    ]
    crowded = [n for n in neighborhoods if len(n.neighbors) > options.fanout]
    judged = dict(zip((n.centre for n in crowded), await scorer.score(crowded), strict=True))
    samples = []
    for neighborhood, rng in zip(neighborhoods, draws, strict=True):
        centre = neighborhood.centre
        number = len(graph.neighbors(centre))
        if centre not in judged:
            kept = tuple(Kept(index=i, score=None, chosen_by="all") for i in neighborhood.neighbors)
            samples.append(NodeSample(centre=centre, num_neighbors=number, kept=kept))
        else:
            samples.append(_sample(neighborhood, number, judged[centre], options, rng))
    return samples


def _candidates(graph: Graph, centre: int, rng: np.random.Generator) -> Neighborhood:
    neighbors = np.asarray(graph.neighbors(centre))
    if len(neighbors) > MAX_CANDIDATES:
        neighbors = np.sort(rng.choice(neighbors, MAX_CANDIDATES, replace=False))
    return Neighborhood(centre=centre, neighbors=tuple(neighbors.tolist()))


def _sample(
    neighborhood: Neighborhood,
    number: int,
    judged: Judged,
    options: SampleOptions,
    rng: np.random.Generator,
) -> NodeSample:
    centre, neighbors = neighborhood.centre, neighborhood.neighbors
    if judged.scores is None:
        return NodeSample(centre=centre, num_neighbors=number, fault=judged.fault)
    scores = judged.scores
    best, drawn = choose(np.array(scores), options, rng)
    kept = [Kept(index=neighbors[i], score=scores[i], chosen_by="score") for i in best]
    kept += [Kept(index=neighbors[i], score=scores[i], chosen_by="random") for i in drawn]
    taken = {*best, *drawn}
    return NodeSample(
        centre=centre,
        num_neighbors=number,
        kept=tuple(kept),
        dropped=tuple((neighbors[i], scores[i]) for i in range(len(scores)) if i not in taken),
    )


def choose(
    scores: Float64s, options: SampleOptions, rng: np.random.Generator
) -> tuple[list[int], list[int]]:
    """Positions chosen by score, best first, and positions drawn evenly from the rest. Equal ones go by position."""
    num_best = options.fanout - options.num_random
    keys = scores + options.noise * rng.gumbel(size=len(scores))
    order = np.argsort(-keys, kind="stable")
    rest = order[num_best:]
    drawn = rng.choice(rest, min(options.num_random, len(rest)), replace=False)
    return order[:num_best].tolist(), drawn.tolist()


def homophily(graph: Graph, samples: Sequence[NodeSample]) -> Homophily:
    """Of the kept edges and of all edges of the sampled nodes. Other labels than the training nodes' are not read."""
    kept = [np.array([edge.index for edge in sample.kept], dtype=np.int64) for sample in samples]
    every = [np.asarray(graph.neighbors(sample.centre), dtype=np.int64) for sample in samples]
    centres = [sample.centre for sample in samples]
    kept_share, num_kept = _share_equal(graph, centres, kept)
    all_share, num_all = _share_equal(graph, centres, every)
    return Homophily(kept=kept_share, num_kept_edges=num_kept, all=all_share, num_all_edges=num_all)


def _share_equal(
    graph: Graph, centres: Sequence[int], neighbors: Sequence[Int64s]
) -> tuple[float | None, int]:
    sources = np.repeat(np.array(centres, dtype=np.int64), list(map(len, neighbors)))
    targets = np.concatenate(neighbors)
    nodes, places = np.unique(np.concatenate([sources, targets]), return_inverse=True)
    numbers: dict[str, int] = {}
    codes = np.array(
        [
            -1 if label is None else numbers.setdefault(label, len(numbers))
            for label in training_labels(graph, nodes)
        ],
        dtype=np.int64,
    )
    ends_2E = codes[places].reshape(2, -1)
    known = (ends_2E >= 0).all(axis=0)
    num_known = int(known.sum())
    equal = int((ends_2E[0] == ends_2E[1])[known].sum())
    return (equal / num_known if num_known else None), num_known


class EmbedScorer:
    """Cosine of vectors, as (1 + cosine) / 2; of the centres' raw ones, or of those that `enrich_centres` made."""

    name: ScorerName = "embed"

    def __init__(
        self, graph: Graph, text_vectors: TextVectors, encoder: str, *, tenant: str = ""
    ) -> None:
        self._graph = graph
        self._text_vectors = text_vectors
        self._encoder = encoder
        self._tenant = tenant
        self._enriched: dict[int, Float64s | None] = {}
        self.usage = ScorerUsage()

    async def enrich_centres(
        self, enricher: Enricher, centres: Sequence[int], prompt: Prompt, model: str
    ) -> None:
        """Have centres judged by their enriched vectors. One that cannot be enriched is not judged.

        Raises:
            UnsuitableModelError
            PromptInputError: the prompt needs more than the graph has.
        """
        while centres:
            number = await asyncio.to_thread(num_at_once, self._graph, centres, prompt)
            await self._enrich_some(enricher, centres[:number], prompt, model)
            centres = centres[number:]

    async def _enrich_some(
        self, enricher: Enricher, centres: Sequence[int], prompt: Prompt, model: str
    ) -> None:
        result = await enricher.enrich(
            EnrichRequest(
                nodes=await asyncio.to_thread(nodes_of_graph, self._graph, centres, prompt),
                prompt=prompt,
                model=model,
                embedding_model=self._encoder,
                outputs=frozenset({"embedding"}),
                tenant=self._tenant,
                classes=classes_of_graph(self._graph, prompt),
            )
        )
        for centre, row in zip(centres, result.rows, strict=True):
            vector = None if row.embedding is None else np.frombuffer(row.embedding, "<f4")
            self._enriched[centre] = None if vector is None else _unit(vector)
        self.usage.prompt_tokens += result.usage.prompt_tokens
        self.usage.completion_tokens += result.usage.completion_tokens
        self.usage.embedding_tokens += result.usage.embedding_tokens
        self.usage.num_calls += sum(row.tokens_spent > 0 for row in result.rows)

    async def score(self, neighborhoods: Sequence[Neighborhood]) -> list[Judged]:
        wanted = {index for n in neighborhoods for index in n.neighbors}
        wanted |= {n.centre for n in neighborhoods if n.centre not in self._enriched}
        vectors = await self._raw_vectors(sorted(wanted))
        judged = []
        for n in neighborhoods:
            centre = self._enriched.get(n.centre, vectors.get(n.centre))
            if centre is None and n.centre in self._enriched:
                judged.append(Judged(scores=None, fault="the node could not be enriched"))
                continue
            scores = [
                0.0
                if centre is None or (vector := vectors[index]) is None
                else (1 + max(-1.0, min(1.0, float(centre @ vector)))) / 2
                for index in n.neighbors
            ]
            judged.append(Judged(scores=tuple(scores)))
        return judged

    async def _raw_vectors(self, indices: Sequence[int]) -> dict[int, Float64s | None]:
        """Unit vectors of the nodes' own texts; None of an empty text."""
        nodes = await asyncio.to_thread(_with_text, self._graph, indices)
        usage = VectorUsage()
        vectors = await self._text_vectors.encode(
            self._graph,
            np.array(nodes, dtype=np.int64),
            model=self._encoder,
            tenant=self._tenant,
            usage=usage,
        )
        self.usage.num_calls += usage.num_calls
        self.usage.num_cached += usage.num_cached
        self.usage.embedding_tokens += usage.num_tokens
        found: dict[int, Float64s | None] = dict.fromkeys(indices)
        found.update((node, _unit(vector)) for node, vector in zip(nodes, vectors, strict=True))
        return found


class _LlmScorer:
    """What the two scorers that ask an LLM have in common."""

    name: ScorerName
    needs_schema = False

    def __init__(
        self,
        graph: Graph,
        engine: AsyncEngine,
        text: TextModel,
        cache: EnrichmentCache,
        *,
        tenant: str = "",
    ) -> None:
        self._graph = graph
        self._engine = engine
        self._text = text
        self._cache = cache
        self._tenant = tenant
        num_calls = self._num_calls_at_once(engine)
        self._slots = asyncio.Semaphore(num_calls)
        self._in_memory = asyncio.Semaphore(2 * num_calls)
        self.usage = ScorerUsage()

    def _num_calls_at_once(self, engine: AsyncEngine) -> int:
        return max(1, engine.info.max_num_seqs)

    def check_model(self, model: str) -> None:
        """Raises: UnsuitableModelError: it cannot chat, or not be kept to a schema where that is needed."""
        if self._engine.info.kind != "decoder":
            raise UnsuitableModelError("model", f"{model} is an encoder: it judges no texts")
        if self.needs_schema and "response_format" in self._engine.info.unsupported:
            raise UnsuitableModelError("model", f"{model} cannot keep an answer to a schema")
        try:
            self._text.encode_chat(PAIR_PROMPT.fill("", variables={"other": ""}))
        except TextError as error:
            raise UnsuitableModelError("model", f"{model}: {error}") from None

    async def score(self, neighborhoods: Sequence[Neighborhood]) -> list[Judged]:
        tasks = []
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._judge(n)) for n in neighborhoods]
        except* EngineError as errors:
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _judge(self, neighborhood: Neighborhood) -> Judged:
        async with self._in_memory:
            return await self._judge_in_memory(neighborhood)

    async def _judge_in_memory(self, neighborhood: Neighborhood) -> Judged:
        """Scores of the candidates with a text, zero for the others."""
        centre, *neighbors = await asyncio.to_thread(self._heads, neighborhood)
        places = [i for i, text in enumerate(neighbors) if text] if centre else []
        try:
            scores = await self._scores(centre, [neighbors[i] for i in places])
        except _JudgementError as error:
            return Judged(scores=None, fault=str(error))
        found = dict(zip(places, scores, strict=True))
        return Judged(scores=tuple(found.get(i, 0.0) for i in range(len(neighbors))))

    def _heads(self, neighborhood: Neighborhood) -> list[str]:
        """Of the centre's and the candidates' texts, what a prompt may read."""
        longest = MAX_JUDGED_TOKENS * self._text.max_token_chars
        indices = [neighborhood.centre, *neighborhood.neighbors]
        return [
            normalise(text)[:longest].rstrip()
            for first in range(0, len(indices), TEXTS_AT_ONCE)
            for text in self._graph.texts(indices[first : first + TEXTS_AT_ONCE])
        ]

    async def _scores(self, centre: str, neighbors: Sequence[str]) -> list[float]:
        """Raises: _JudgementError, EngineError."""
        raise NotImplementedError

    async def _cached(self, key: bytes) -> list[float] | None:
        value = (await asyncio.to_thread(self._cache.get_many, "text", [key])).get(key)
        return None if value is None else msgspec.msgpack.decode(value, type=list[float])

    async def _store(self, key: bytes, scores: Sequence[float]) -> None:
        value = msgspec.msgpack.encode(list(scores))
        await asyncio.to_thread(self._cache.put_many, "text", {key: value})

    def _head(self, text: str, max_tokens: int) -> str:
        """The beginning of a text that a prompt reads."""
        ids = self._text.encode_text(text)
        if len(ids) <= max_tokens:
            return text
        return self._text.decode(ids[:max_tokens]).rstrip("\ufffd")

    def _fits(self, prompt: Prompt, messages: Sequence[Message]) -> list[int] | None:
        """Token ids of the messages if the model holds them and an answer."""
        ids = self._text.encode_chat(messages)
        return ids if len(ids) + prompt.max_tokens <= self._engine.info.max_model_len else None


class _JudgementError(Exception):
    """A neighbourhood cannot be judged; the message may be shown to a client."""


class RankScorer(_LlmScorer):
    """An integer from 0 to 10 for each of up to `RANK_CHUNK` neighbours at once, a tenth of it as score.

    Texts are cut to the prompt's limits. More neighbours than one call takes are judged in several; if they do not fit
    the context, in smaller ones. A small LLM also goes by the place in the list, so neighbours are listed in the order
    of a hash, which favours none.
    """

    name: ScorerName = "llm_rank"
    needs_schema = True

    async def _scores(self, centre: str, neighbors: Sequence[str]) -> list[float]:
        order = sorted(range(len(neighbors)), key=lambda i: _hash(f"{centre}\n{neighbors[i]}"))
        scores = [0.0] * len(neighbors)
        for start in range(0, len(order), RANK_CHUNK):
            places = order[start : start + RANK_CHUNK]
            ratings = await self._rank(centre, [neighbors[i] for i in places])
            for place, rating in zip(places, ratings, strict=True):
                scores[place] = rating
        return scores

    async def _rank(self, centre: str, neighbors: Sequence[str]) -> list[float]:
        prompt = rank_prompt(len(neighbors))
        key = _digest(prompt.hash, self._tenant, self._engine, [centre, *neighbors])
        cached = await self._cached(key)
        if cached is not None:
            self.usage.num_cached += len(neighbors)
            return cached
        messages = await asyncio.to_thread(self._fill, prompt, centre, neighbors)
        if await asyncio.to_thread(self._fits, prompt, messages) is None:
            if len(neighbors) == 1:
                raise _JudgementError(
                    f"a neighbour does not fit the {self._engine.info.max_model_len} tokens of the model"
                )
            half = len(neighbors) // 2
            return [
                *await self._rank(centre, neighbors[:half]),
                *await self._rank(centre, neighbors[half:]),
            ]
        answered = await answer_prompt(
            prompt,
            messages,
            (),
            prompt.max_tokens,
            lambda given, constraint: self._ask(prompt, given, constraint),
        )
        if answered.answer is None or answered.answer.fields is None:
            raise _JudgementError(f"the LLM's ratings are not valid: {answered.fault}")
        scores = [value / 10 for value in answered.answer.fields.values()]
        await self._store(key, scores)
        return scores

    def _fill(self, prompt: Prompt, centre: str, neighbors: Sequence[str]) -> list[Message]:
        shown = [self._head(text, prompt.max_neighbor_tokens) for text in neighbors]
        return prompt.fill(self._head(centre, prompt.max_text_tokens), shown)

    async def _ask(
        self, prompt: Prompt, messages: Sequence[Message], constraint: Constraint | None
    ) -> Written | None:
        ids = await asyncio.to_thread(self._fits, prompt, messages)
        if ids is None:
            return None
        async with self._slots:
            written, finish_reason, _ = await generate_tokens(
                self._engine,
                GenerateRequest(
                    request_id=_request_id(),
                    token_ids=tuple(ids),
                    params=SamplingParams(max_tokens=prompt.max_tokens, temperature=0.0),
                    priority=PRIORITIES["training"],
                    tenant=self._tenant,
                    constraint=constraint,
                ),
            )
        self.usage.num_calls += 1
        self.usage.prompt_tokens += len(ids)
        self.usage.completion_tokens += len(written)
        return Written(
            text=self._text.decode(written),
            tokens_in=len(ids),
            tokens_out=len(written),
            finish_reason=finish_reason,
        )


class PairScorer(_LlmScorer):
    """P(yes) / (P(yes) + P(no)) as the answer to "are they about the same topic", from log-probabilities.

    Texts are cut to the prompt's limit, and if a pair does not fit the context, both to half as much until it does.
    """

    name: ScorerName = "llm_pair"

    def _num_calls_at_once(self, engine: AsyncEngine) -> int:
        return 2  # an engine scores one after the other: one that runs and one that is ready

    async def _scores(self, centre: str, neighbors: Sequence[str]) -> list[float]:
        return [await self._pair(centre, neighbor) for neighbor in neighbors]

    async def _pair(self, centre: str, neighbor: str) -> float:
        key = _digest(PAIR_PROMPT.hash, self._tenant, self._engine, [centre, neighbor])
        cached = await self._cached(key)
        if cached is not None:
            self.usage.num_cached += 1
            return cached[0]
        context, answers = await asyncio.to_thread(self._ids, centre, neighbor)
        async with self._slots:
            result = await self._engine.score(
                ScoreRequest(
                    request_id=_request_id(),
                    context_ids=tuple(context),
                    continuation_ids=answers,
                    tenant=self._tenant,
                )
            )
        self.usage.num_calls += 1
        self.usage.prompt_tokens += result.num_tokens
        yes, no = (score.logprob for score in result.scores)
        score = 1 / (1 + math.exp(min(700.0, no - yes)))
        await self._store(key, [score])
        return score

    def _ids(self, centre: str, neighbor: str) -> tuple[list[int], tuple[tuple[int, ...], ...]]:
        answers = tuple(tuple(self._text.encode_text(answer)) for answer in PAIR_ANSWERS)
        room = self._engine.info.max_model_len - max(map(len, answers))
        limit = PAIR_PROMPT.max_text_tokens
        while limit > 0:
            other = {"other": self._head(neighbor, limit)}
            messages = PAIR_PROMPT.fill(self._head(centre, limit), variables=other)
            ids = self._text.encode_chat(messages)
            if len(ids) <= room:
                return ids, answers
            limit //= 2
        raise _JudgementError(
            f"a pair does not fit the {self._engine.info.max_model_len} tokens of the model"
        )


def _with_text(graph: Graph, indices: Sequence[int]) -> list[int]:
    """Those whose text is not empty."""
    found: list[int] = []
    for first in range(0, len(indices), TEXTS_AT_ONCE):
        some = indices[first : first + TEXTS_AT_ONCE]
        texts = graph.texts(some)
        found += [i for i, text in zip(some, texts, strict=True) if has_text(text)]
    return found


def _unit(vector: npt.NDArray[Any]) -> Float64s:
    wide = np.asarray(vector, dtype=np.float64)
    norm = float(np.linalg.norm(wide))
    return wide / norm if norm > 0 else wide


def _digest(what: str, tenant: str, engine: AsyncEngine, texts: Sequence[str]) -> bytes:
    """A cache key: all that shapes a judgement."""
    info = engine.info
    hashes = list(map(_hash, texts))
    parts = ("sampling", KEY_VERSION, what, tenant, info.checkpoint_hash, info.dtype, info.max_model_len)  # fmt: skip
    return hashlib.sha256(msgspec.msgpack.encode((*parts, hashes))).digest()


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _request_id() -> str:
    return f"sample-{secrets.token_hex(12)}"
