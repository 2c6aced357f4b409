"""On-demand enrichment of node texts by an LLM (E-LLaGNN, Jaiswal et al. 2024, arXiv:2407.14996).

For each node: render the prompt, look the text up in the cache, have the LLM write it, then encode
`phi(text + separator + LLM text)`, so that raw and enriched vectors live in one space. Decoding is greedy.

What costs nothing is settled first: equal nodes of a request are one unit of work, cached units need no engine, and a
unit that another request is working on right now is waited for, not repeated. The work that is left runs with as many
requests at once as the engine has slots, longest texts first, so that no long one is left over at the end; where tokens
or time are limited, in the order of the request. A request has one prompt, so the prompts share their beginning, which
the engine's prefix cache then holds. A failing unit fails its own rows. Rows are told as they finish.

Keys hold everything that shapes a value: tenant, texts, prompt body, checkpoint, decoding; nothing cached goes stale.
Knows engines only by their protocol, and text by `TextModel`; no torch, no HTTP.
"""

import asyncio
import hashlib
import logging
import secrets
import struct
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import msgspec

from engines.protocol import (
    AsyncEngine,
    Constraint,
    EngineError,
    FinishReason,
    GenerateRequest,
    SamplingParams,
)
from graph.cache import EnrichmentCache, Layer
from graph.catalog import Message
from graph.enrich_budget import BudgetLedger
from graph.enrich_types import (
    ITEM_STATUSES,
    PRIORITIES,
    EnrichEstimate,
    EnrichNode,
    EnrichObserver,
    EnrichRequest,
    EnrichResult,
    EnrichRow,
    EnrichUsage,
    ItemError,
    ItemStatus,
    UnsuitableModelError,
)
from graph.generation import Answer, Written, answer_prompt, most_repair_tokens, most_tokens
from graph.model_calls import EMBED_BATCH, EmbedBatcher, generate_tokens
from graph.node_text import (
    Rendered,
    TextError,
    TextModel,
    TextTooLongError,
    encoder_windows,
    has_text,
    mean_vector,
    normalise,
    off_loop,
    render,
)
from graph.single_flight import SingleFlight

KEY_VERSION = 4
"""Raise it when the way from a key's parts to its value changes."""
ESTIMATED_CHARS = 200_000
"""Of prompts that an estimate renders at a time; between them it can be left."""

logger = logging.getLogger("lathe.enrich")


class Generation(msgspec.Struct, frozen=True, array_like=True):
    """What the text layer of the cache holds. Attributes: fault: why there is no valid answer."""

    text: str
    tokens_in: int
    tokens_out: int
    finish_reason: FinishReason
    truncated_tokens: int
    neighbors_used: int
    fields: dict[str, Any] | None = None
    label: str | None = None
    num_calls: int = 1
    fault: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedding:
    """What the embedding layer of the cache holds: two uint32, then the vector."""

    num_tokens: int
    truncated_tokens: int
    vector: bytes

    def pack(self) -> bytes:
        return struct.pack("<II", self.num_tokens, self.truncated_tokens) + self.vector

    @classmethod
    def unpack(cls, value: bytes) -> "Embedding":
        num_tokens, truncated = struct.unpack_from("<II", value)
        return cls(num_tokens=num_tokens, truncated_tokens=truncated, vector=value[8:])


@dataclass(slots=True, kw_only=True)
class _Unit:
    """The work that equal nodes of a request share."""

    key: bytes
    node: EnrichNode
    text_hash: bytes
    content_hash: str
    generation: Generation | None = None
    embedding: Embedding | None = None
    llm_ran: bool = False
    encoder_ran: bool = False
    skipped: bool = True  # until an engine or the cache has been asked
    error: ItemError | None = None


@dataclass(slots=True, kw_only=True)
class _Run:
    """One request while it is worked on."""

    request: EnrichRequest
    engine: AsyncEngine
    text: TextModel
    encoder: AsyncEngine | None
    encoder_text: TextModel | None
    batcher: EmbedBatcher | None
    max_tokens: int
    ledger: BudgetLedger
    started: float
    hashes: list[str] = field(default_factory=list)
    units: dict[bytes, _Unit] = field(default_factory=dict)
    places: dict[bytes, list[int]] = field(default_factory=dict)
    finished: "asyncio.Queue[FinishedRows | None]" = field(default_factory=asyncio.Queue)
    num_by_status: Counter[ItemStatus] = field(default_factory=Counter)
    row_tokens: int = 0
    prefix_hit_tokens: int = 0

    def render(self, node: EnrichNode) -> Rendered:
        """Raises: TextError: the prompt does not fit."""
        return render(
            self.request,
            node,
            self.text,
            max_model_len=self.engine.info.max_model_len,
            max_tokens=self.max_tokens,
        )


FinishedRows = list[tuple[int, EnrichRow]]
"""Rows, each with its node's place in the request."""


class EnrichStream:
    """A request that has begun. Iterate `batches` once; closing them early aborts what no other request waits for.

    Attributes:
        request: what was asked.
        dim: of the embeddings; None without.
    """

    def __init__(
        self,
        run: _Run,
        work: Callable[[], Awaitable[None]],
        ended: "Callable[[EnrichRequest, EnrichUsage], None] | None",
    ) -> None:
        self._ended = ended
        self.request = run.request
        self.dim = None if run.encoder is None else run.encoder.info.hidden_size
        self._run = run
        self._work = work
        self._usage: EnrichUsage | None = None

    @property
    def usage(self) -> EnrichUsage:
        """What it cost; there once all batches have been read."""
        assert self._usage is not None, "the stream has not ended"
        return self._usage

    async def batches(self) -> AsyncGenerator[FinishedRows, None]:
        """Every row once, as they finish: those that finish together come together."""
        finished = self._run.finished
        task = asyncio.ensure_future(self._work())
        task.add_done_callback(lambda _: finished.put_nowait(None))
        try:
            while (batch := await finished.get()) is not None:
                while not finished.empty():
                    more = finished.get_nowait()
                    if more is None:
                        finished.put_nowait(None)
                        break
                    batch += more
                yield batch
            await task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            self._usage = _usage(self._run)
            if self._ended is not None:
                self._ended(self.request, self._usage)


class Enricher:
    """Enriches nodes for all requests of a process. Belongs to one event loop.

    Args:
        engine_for: the engine that serves a model, given its id and the field that named it; raises what the caller
            of `enrich` is to see where there is none.
        text_for: the same for its tokenizer.
        observer: told of every row and every cache hit.
        ended: told what a request cost, or what one that was left had cost by then.
    """

    def __init__(
        self,
        *,
        engine_for: Callable[[str, str], Awaitable[AsyncEngine]],
        text_for: Callable[[str, str], Awaitable[TextModel]],
        cache: EnrichmentCache,
        observer: EnrichObserver | None = None,
        ended: Callable[[EnrichRequest, EnrichUsage], None] | None = None,
    ) -> None:
        self._ended = ended
        self._engine_for = engine_for
        self._text_for = text_for
        self._cache = cache
        self._observer = observer
        self._generations: SingleFlight[tuple[Generation, bool]] = SingleFlight()
        self._embeddings: SingleFlight[Embedding] = SingleFlight()
        self._pace = _Pace()

    async def model(self, model_id: str, param: str) -> tuple[AsyncEngine, TextModel]:
        """What serves a model; for sampling, which shares the engines with enrichment."""
        return await self._engine_for(model_id, param), await self._text_for(model_id, param)

    async def enrich(self, request: EnrichRequest) -> EnrichResult:
        """Enrich every node that the budget allows. Cancelling it aborts what no other request waits for.

        Raises:
            UnsuitableModelError: a model cannot generate, chat or hold the answer.
        """
        stream = await self.stream(request)
        rows: dict[int, EnrichRow] = {}
        async with aclosing(stream.batches()) as batches:
            async for batch in batches:
                rows.update(batch)
        return EnrichResult(
            rows=tuple(rows[index] for index in range(len(request.nodes))),
            usage=stream.usage,
            dim=stream.dim,
        )

    async def stream(self, request: EnrichRequest) -> EnrichStream:
        """The same, row by row. What cannot begin raises here; the work begins with the first read.

        Raises:
            UnsuitableModelError
        """
        run = await self._prepare(request)
        return EnrichStream(run, lambda: self._complete(run), self._ended)

    async def estimate(self, request: EnrichRequest) -> EnrichEstimate:
        """What it would cost. Tokenizes, and asks no engine for anything but what it is.

        Raises:
            UnsuitableModelError
        """
        run = await self._prepare(request)
        await self._find_units(run)
        units = [unit for unit in run.units.values() if _has_text(unit)]
        cached = await self._cached_generations([unit.key for unit in units])
        for unit in units:
            unit.generation = cached.get(unit.key)
        known = [unit for unit in units if unit.generation is not None]
        vectors = {}
        if run.encoder is not None:
            vectors = await self._cached_embeddings(run, [_embedding_key(run, u) for u in known])
        missing = [unit for unit in units if unit.generation is None]
        lengths = await _prompt_lengths(run, missing)
        outs = [unit.generation.tokens_out for unit in known if unit.generation is not None]
        length = sum(outs) / len(outs) if outs else self._pace.answer_tokens(run)
        prompt_tokens, completion = sum(lengths), round(len(lengths) * length)
        return EnrichEstimate(
            num_nodes=sum(map(len, run.places.values())),
            num_distinct=len(run.units),
            num_empty=len(run.units) - len(units),
            num_cached=len(known),
            num_embeddings_cached=len(vectors),
            num_calls=len(lengths),
            num_failing=len(missing) - len(lengths),
            prompt_tokens=prompt_tokens,
            completion_tokens=completion,
            max_completion_tokens=len(lengths) * run.max_tokens,
            seconds=self._pace.seconds(run, prompt_tokens + completion) if lengths else 0.0,
        )

    async def _prepare(self, request: EnrichRequest) -> _Run:
        engine = await self._engine_for(request.model, "model")
        text = await self._text_for(request.model, "model")
        max_tokens = request.max_tokens or request.prompt.max_tokens
        if engine.info.kind != "decoder":
            raise UnsuitableModelError("model", f"{request.model} is an encoder: it writes no text")
        if max_tokens >= engine.info.max_model_len:
            raise UnsuitableModelError(
                "max_tokens",
                f"max_tokens must leave room for a prompt: {request.model} holds "
                f"{engine.info.max_model_len} tokens, got {max_tokens}",
            )
        if request.prompt.output["type"] == "json" and "response_format" in engine.info.unsupported:
            raise UnsuitableModelError(
                "model",
                f"{request.model} cannot keep an answer to the schema of {request.prompt.ref}",
            )
        try:
            text.encode_chat(
                request.prompt.fill("", variables=dict.fromkeys(request.prompt.variables, ""))
            )
        except TextError as error:
            raise UnsuitableModelError("model", f"{request.model}: {error}") from None
        encoder = encoder_text = batcher = None
        if "embedding" in request.outputs:
            encoder = await self._engine_for(request.embedding_model, "embedding_model")
            encoder_text = await self._text_for(request.embedding_model, "embedding_model")
            batcher = EmbedBatcher(encoder, request.tenant)
        return _Run(
            request=request,
            engine=engine,
            text=text,
            encoder=encoder,
            encoder_text=encoder_text,
            batcher=batcher,
            max_tokens=max_tokens,
            ledger=BudgetLedger(request.budget),
            started=asyncio.get_running_loop().time(),
        )

    async def _find_units(self, run: _Run) -> None:
        """Equal nodes as one unit each, of the nodes that the budget looks at."""
        nodes = run.request.nodes[: run.request.budget.nodes]
        keys = await asyncio.to_thread(_keys, run)
        run.hashes = [content_hash for _, content_hash, _ in keys]
        for index, (node, (key, content_hash, text_hash)) in enumerate(
            zip(nodes, keys, strict=False)
        ):
            unit = _Unit(key=key, node=node, text_hash=text_hash, content_hash=content_hash)
            run.units.setdefault(key, unit)
            run.places.setdefault(key, []).append(index)

    async def _complete(self, run: _Run) -> None:
        await self._find_units(run)
        await self._work(run)
        left = [u for u in run.units.values() if u.skipped]
        places = [index for unit in left for index in run.places[unit.key]]
        places += range(sum(map(len, run.places.values())), len(run.request.nodes))
        self._tell(run, [(index, _skipped_row(run, index)) for index in sorted(places)])
        self._pace.saw(run)

    async def _work(self, run: _Run) -> None:
        units = []
        for unit in run.units.values():
            if _has_text(unit):
                units.append(unit)
            else:
                self._finish(run, [unit])
        cached = await self._cached_generations([unit.key for unit in units])
        for unit in units:
            unit.generation = cached.get(unit.key)
        known = [unit for unit in units if unit.generation is not None]
        left = [unit for unit in units if unit.generation is None]
        if run.request.budget.token_limit()[0] is None and run.request.budget.seconds is None:
            left.sort(key=lambda unit: len(unit.node.text), reverse=True)
        missing = iter(left)
        for unit in known:
            unit.skipped = False
            self._hit("text")
        async with asyncio.TaskGroup() as group:
            group.create_task(self._embed_units(run, known))
            for _ in range(max(1, run.engine.info.max_num_seqs)):
                group.create_task(self._generate_units(run, missing, group))

    async def _generate_units(
        self, run: _Run, units: Iterator[_Unit], group: asyncio.TaskGroup
    ) -> None:
        """One of several workers that share an iterator; ends when it or the budget is exhausted."""
        for unit in units:
            try:
                async with asyncio.timeout_at(run.ledger.deadline):
                    await asyncio.sleep(0)  # a deadline that is over is seen here
                    await self._generate_unit(run, unit)
            except TimeoutError:
                run.ledger.stop("max_seconds")
            if unit.generation is not None:
                group.create_task(self._embed_units(run, [unit]))
            elif not unit.skipped:
                self._finish(run, [unit])
            if run.ledger.exhausted:
                return

    async def _generate_unit(self, run: _Run, unit: _Unit) -> None:
        try:
            num_chars = _num_chars(run.request, unit.node)
            prompt = await off_loop(num_chars, lambda: run.render(unit.node))
            reserved = most_tokens(run.request.prompt, len(prompt.token_ids), run.max_tokens)
            if not await run.ledger.reserve(reserved):
                return
            used = 0
            try:
                (generation, ran), led = await self._generations.run(
                    unit.key, lambda: self._generate(run, unit, prompt)
                )
                ran = ran and led
                used = generation.tokens_in + generation.tokens_out if ran else 0
            finally:
                run.ledger.settle(reserved, used)
            unit.skipped = False
            unit.generation, unit.llm_ran = generation, ran
        except (EngineError, TextError) as error:
            unit.skipped = False
            unit.error = _item_error(error)

    async def _generate(self, run: _Run, unit: _Unit, prompt: Rendered) -> tuple[Generation, bool]:
        """Have the LLM write one text, for all requests that wait for it; keeps it in the cache.

        Returns:
            The text, and whether the LLM ran.
        """
        again = await self._cached_generations([unit.key])
        if unit.key in again:  # another request finished it after we had looked
            return again[unit.key], False
        shown_labels = filter(None, unit.node.neighbor_labels[: prompt.neighbors_used])
        answered = await answer_prompt(
            run.request.prompt,
            prompt.messages,
            run.request.classes,
            run.max_tokens,
            lambda messages, constraint: self._ask(run, prompt, messages, constraint),
            shown_labels=tuple(dict.fromkeys(shown_labels)),
        )
        answer = answered.answer or Answer(text="")
        generation = Generation(
            text=answer.text,
            tokens_in=sum(call.tokens_in for call in answered.calls),
            tokens_out=sum(call.tokens_out for call in answered.calls),
            finish_reason=answered.calls[-1].finish_reason,
            truncated_tokens=prompt.truncated_tokens,
            neighbors_used=prompt.neighbors_used,
            fields=answer.fields,
            label=answer.label,
            num_calls=len(answered.calls),
            fault=answered.fault,
        )
        await self._store("text", unit.key, msgspec.msgpack.encode(generation))
        return generation, True

    async def _ask(
        self,
        run: _Run,
        prompt: Rendered,
        messages: Sequence[Message],
        constraint: Constraint | None,
    ) -> Written | None:
        """One call of the LLM; None if the request to repair an answer does not fit."""
        token_ids = prompt.token_ids
        if messages is not prompt.messages:
            token_ids = await asyncio.to_thread(run.text.encode_chat, messages)
            room = most_repair_tokens(len(prompt.token_ids), run.max_tokens)
            if len(token_ids) + run.max_tokens > min(run.engine.info.max_model_len, room):
                return None
        written, finish_reason, num_hits = await generate_tokens(
            run.engine,
            GenerateRequest(
                request_id=f"enrich-{secrets.token_hex(12)}",
                token_ids=tuple(token_ids),
                params=_params(run.max_tokens),
                priority=PRIORITIES[run.request.priority],
                tenant=run.request.tenant,
                constraint=constraint,
            ),
        )
        run.prefix_hit_tokens += num_hits
        return Written(
            text=run.text.decode(written),
            tokens_in=len(token_ids),
            tokens_out=len(written),
            finish_reason=finish_reason,
        )

    async def _embed_units(self, run: _Run, units: Sequence[_Unit]) -> None:
        if run.encoder is None:
            self._finish(run, units)
            return
        keys = [_embedding_key(run, unit) for unit in units]
        cached = await self._cached_embeddings(run, keys)
        missing, done = [], []
        for unit, key in zip(units, keys, strict=True):
            unit.embedding = cached.get(key)
            if unit.embedding is None:
                missing.append(self._embed_unit(run, unit, key))
            else:
                self._hit("embedding")
                done.append(unit)
        self._finish(run, done)
        await asyncio.gather(*missing)

    async def _embed_unit(self, run: _Run, unit: _Unit, key: bytes) -> None:
        try:
            unit.embedding, unit.encoder_ran = await self._embeddings.run(
                key, lambda: self._embed(run, unit, key)
            )
        except (EngineError, TextError) as error:
            unit.error = _item_error(error)
        self._finish(run, [unit])

    async def _embed(self, run: _Run, unit: _Unit, key: bytes) -> Embedding:
        assert run.encoder is not None
        assert run.encoder_text is not None
        assert run.batcher is not None
        assert unit.generation is not None
        text, written = unit.node.text, unit.generation.text
        encoder_text, limit = run.encoder_text, run.encoder.info.max_model_len
        windows, truncated = await off_loop(
            len(text),
            lambda: encoder_windows(
                encoder_text, normalise(text), written, limit, run.request.long_text
            ),
        )
        batcher = run.batcher
        vectors = []
        for first in range(0, len(windows), EMBED_BATCH):
            some = windows[first : first + EMBED_BATCH]
            vectors += await asyncio.gather(*(batcher.embed(tuple(window)) for window in some))
        lengths = [len(window) for window in windows]
        embedding = Embedding(
            num_tokens=sum(lengths),
            truncated_tokens=truncated,
            vector=mean_vector(vectors, lengths),
        )
        await self._store("embedding", key, embedding.pack())
        return embedding

    async def _cached_generations(self, keys: Sequence[bytes]) -> dict[bytes, Generation]:
        values = await asyncio.to_thread(self._cache.get_many, "text", keys)
        found = {}
        for key, value in values.items():
            try:
                found[key] = msgspec.msgpack.decode(value, type=Generation)
            except msgspec.DecodeError as error:
                logger.warning("unreadable cached text: %s", error)
        return found

    async def _cached_embeddings(self, run: _Run, keys: Sequence[bytes]) -> dict[bytes, Embedding]:
        assert run.encoder is not None
        values = await asyncio.to_thread(self._cache.get_many, "embedding", keys)
        num_bytes = 8 + 4 * run.encoder.info.hidden_size
        found = {}
        for key, value in values.items():
            if len(value) == num_bytes:
                found[key] = Embedding.unpack(value)
            else:
                logger.warning("unreadable cached vector: %d bytes, not %d", len(value), num_bytes)
        return found

    async def _store(self, layer: Layer, key: bytes, value: bytes) -> None:
        await asyncio.to_thread(self._cache.put_many, layer, {key: value})

    def _hit(self, layer: Layer) -> None:
        if self._observer is not None:
            self._observer.enrich_cache_hit(layer)

    def _finish(self, run: _Run, units: Sequence[_Unit]) -> None:
        """Tell the rows of units that are done."""
        rows = []
        for unit in units:
            for number, index in enumerate(run.places[unit.key]):
                rows.append((index, _row(run, index, unit, first=number == 0)))
        self._tell(run, rows)

    def _tell(self, run: _Run, rows: FinishedRows) -> None:
        for _, row in rows:
            run.num_by_status[row.status] += 1
            run.row_tokens += row.tokens_in + row.tokens_out
            if self._observer is not None:
                self._observer.enrich_item(row.status)
        if rows:
            run.finished.put_nowait(rows)


def _has_text(unit: _Unit) -> bool:
    if has_text(unit.node.text):
        return True
    unit.skipped = False
    unit.error = ItemError(code="empty_text", message="the node's text is empty")
    return False


def _keys(run: _Run) -> list[tuple[bytes, str, bytes]]:
    """Text key, content hash and hash of the text alone, of every node."""
    request, info = run.request, run.engine.info
    shared = (
        KEY_VERSION,
        request.tenant,
        request.prompt.ref,
        request.prompt.hash,
        info.checkpoint_hash,
        info.dtype,
        info.max_model_len,  # decides what is cut from a long text
        request.long_text == "head_tail",  # the other two show the LLM the same
        msgspec.to_builtins(_params(run.max_tokens)),  # greedy: no seed
    )
    keys = []
    for node in request.nodes:
        neighbors = node.neighbors[: request.prompt.max_neighbors]
        text_hash = _text_hash(node.text)
        content = (text_hash, [_text_hash(text) for text in neighbors])
        content_hash = _digest((*content, *_other_inputs(request, node))).hex()
        keys.append((_digest(("text", content_hash, shared)), content_hash, text_hash))
    return keys


def _other_inputs(request: EnrichRequest, node: EnrichNode) -> list[Any]:
    """What the prompt reads besides texts; nothing where it reads nothing else."""
    read: dict[str, Any] = dict(request.variables_of(node))
    if "neighbor_labels" in request.prompt.inputs:
        read["neighbor_labels"] = node.neighbor_labels[: request.prompt.max_neighbors]
    if "classes" in request.prompt.inputs:
        read["classes"] = request.classes
    return [read] if read else []


def _embedding_key(run: _Run, unit: _Unit) -> bytes:
    assert run.encoder is not None
    assert unit.generation is not None
    info = run.encoder.info
    joined = (unit.text_hash, _text_hash(unit.generation.text))
    return _digest(
        (
            "embedding",
            KEY_VERSION,
            run.request.tenant,
            joined,
            run.request.long_text,
            info.checkpoint_hash,
            info.dtype,
            info.max_model_len,
        )
    )


def _text_hash(text: str) -> bytes:
    return hashlib.sha256(normalise(text).encode()).digest()


def _digest(parts: Any) -> bytes:
    return hashlib.sha256(msgspec.msgpack.encode(parts)).digest()


def _params(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0)


def _num_chars(request: EnrichRequest, node: EnrichNode) -> int:
    """That are looked at to render a node's prompt."""
    texts = [node.text, *node.neighbors[: request.prompt.max_neighbors]]
    return sum(map(len, [*texts, *request.variables_of(node).values(), *request.classes]))


async def _prompt_lengths(run: _Run, units: Sequence[_Unit]) -> list[int]:
    """Tokens of each prompt; those that do not fit are left out. Ends soon where it is cancelled."""
    lengths: list[int] = []
    first = num_chars = 0
    for number, unit in enumerate(units, start=1):
        num_chars += _num_chars(run.request, unit.node)
        if num_chars > ESTIMATED_CHARS or number == len(units):
            some = units[first:number]
            lengths += await off_loop(num_chars, partial(_lengths, run, some))
            first, num_chars = number, 0
    return lengths


def _lengths(run: _Run, units: Sequence[_Unit]) -> list[int]:
    lengths = []
    for unit in units:
        try:
            lengths.append(len(run.render(unit.node).token_ids))
        except TextError:
            continue
    return lengths


class _Pace:
    """What this process has seen of how fast models are and how long answers get; the newest runs count most."""

    KEEPS = 0.8
    """Share that what was seen before keeps when a run ends."""

    def __init__(self) -> None:
        self._speeds: dict[str, tuple[float, float]] = {}
        self._answers: dict[tuple[str, str], tuple[float, float]] = {}

    def saw(self, run: _Run) -> None:
        """A run has ended; one that called no LLM says nothing."""
        ran = [u.generation for u in run.units.values() if u.generation is not None and u.llm_ran]
        if not ran:
            return
        num_out = sum(generation.tokens_out for generation in ran)
        num_all = num_out + sum(generation.tokens_in for generation in ran)
        seconds = asyncio.get_running_loop().time() - run.started
        checkpoint = run.engine.info.checkpoint_hash
        prompt = (checkpoint, run.request.prompt.hash)
        self._add(self._speeds, checkpoint, num_all, seconds)
        self._add(self._answers, prompt, num_out, len(ran))

    def answer_tokens(self, run: _Run) -> float:
        seen = self._answers.get((run.engine.info.checkpoint_hash, run.request.prompt.hash))
        return run.max_tokens if seen is None else min(seen[0] / seen[1], run.max_tokens)

    def seconds(self, run: _Run, num_tokens: int) -> float | None:
        seen = self._speeds.get(run.engine.info.checkpoint_hash)
        return None if seen is None else num_tokens * seen[1] / seen[0]

    def _add(self, seen: dict[Any, tuple[float, float]], key: Any, a: float, b: float) -> None:
        old_a, old_b = seen.get(key, (0.0, 0.0))
        seen[key] = (self.KEEPS * old_a + a, self.KEEPS * old_b + b)


def _item_error(error: EngineError | TextError) -> ItemError:
    if isinstance(error, EngineError):
        return ItemError(code=error.code, message=error.message)
    too_long = isinstance(error, TextTooLongError)
    return ItemError(
        code="context_length_exceeded" if too_long else "invalid_value", message=str(error)
    )


def _skipped_row(run: _Run, index: int) -> EnrichRow:
    allowed = run.request.budget.nodes
    beyond = allowed is not None and index >= allowed
    message = f"the budget ran out: {'max_nodes' if beyond else run.ledger.stopped_by}"
    return EnrichRow(
        node_id=run.request.nodes[index].id,
        status="skipped_budget",
        content_hash=run.hashes[index],
        error=ItemError(code="budget_exhausted", message=message),
    )


def _row(run: _Run, index: int, unit: _Unit, *, first: bool) -> EnrichRow:
    """Args: first: the unit's engine work, if any, was for this row."""
    node, content_hash = run.request.nodes[index], run.hashes[index]
    generation, embedding = unit.generation, unit.embedding
    if generation is None:
        return EnrichRow(
            node_id=node.id, status="failed", content_hash=content_hash, error=unit.error
        )
    status, error = _outcome(unit, first=first)
    return EnrichRow(
        node_id=node.id,
        status=status,
        text=(generation.text or None) if "text" in run.request.outputs else None,
        fields=generation.fields,
        label=generation.label,
        repaired=generation.num_calls > 1 and generation.fault is None,
        embedding=None if embedding is None else embedding.vector,
        embedding_source=(None if embedding is None else "enriched" if generation.text else "raw"),
        tokens_in=generation.tokens_in,
        tokens_out=generation.tokens_out,
        tokens_spent=(
            generation.tokens_in + generation.tokens_out if first and unit.llm_ran else 0
        ),
        finish_reason=generation.finish_reason,
        truncated_tokens=generation.truncated_tokens,
        embedding_truncated_tokens=0 if embedding is None else embedding.truncated_tokens,
        neighbors_used=generation.neighbors_used,
        content_hash=content_hash,
        error=error,
    )


def _outcome(unit: _Unit, *, first: bool) -> tuple[ItemStatus, ItemError | None]:
    if unit.error is not None:
        return "failed", unit.error
    assert unit.generation is not None
    if unit.generation.fault is not None:
        return "invalid_output", ItemError(code="invalid_output", message=unit.generation.fault)
    if not unit.generation.text and unit.generation.fields is None:
        return "invalid_output", ItemError(code="empty_output", message="the answer is empty")
    ran = first and (unit.llm_ran or unit.encoder_ran)
    return ("ok" if ran else "cached"), None


def _usage(run: _Run) -> EnrichUsage:
    units = list(run.units.values())
    ran = [u.generation for u in units if u.generation is not None and u.llm_ran]
    encoded = [u.embedding for u in units if u.embedding is not None and u.encoder_ran]
    allowed = run.request.budget.nodes
    all_allowed = allowed is None or allowed >= len(run.request.nodes)
    prompt_tokens = sum(generation.tokens_in for generation in ran)
    completion_tokens = sum(generation.tokens_out for generation in ran)
    return EnrichUsage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        prefix_hit_tokens=run.prefix_hit_tokens,
        embedding_tokens=sum(embedding.num_tokens for embedding in encoded),
        cached_tokens=run.row_tokens - prompt_tokens - completion_tokens,
        num_nodes=len(run.request.nodes),
        num_by_status={status: run.num_by_status[status] for status in ITEM_STATUSES},
        seconds=asyncio.get_running_loop().time() - run.started,
        stopped_by=run.ledger.stopped_by or (None if all_allowed else "max_nodes"),
    )
