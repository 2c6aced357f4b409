"""The enrich job: any number of nodes through the engines that serve, in pieces, with a ledger of what is finished.

The process has no model of its own: it is one more client of the engine hosts, at `run/<model>.sock` of the home, so
that enrichment shares the loaded models with everybody else, and its cache with the API process. A row whose engine
went away is no result: it is asked for again when the engine is back.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Protocol, TypeVar

import msgspec
import numpy as np

from compression.registry import ModelNotFoundError, ModelRegistry
from engines.client import EngineClient
from engines.metering import DeviceClock, EngineUse, MeteredEngine
from engines.protocol import AsyncEngine, EngineError
from graph.arrow_stream import ArrowWriter
from graph.cache import EnrichmentCache
from graph.catalog import Prompt, PromptNotFoundError
from graph.enrich import Enricher
from graph.enrich_types import (
    ITEM_STATUSES,
    BudgetName,
    EnrichBudget,
    EnrichNode,
    EnrichRequest,
    EnrichRow,
    EnrichUsage,
    ItemStatus,
    UnsuitableModelError,
)
from graph.generation import PromptInputError
from graph.json_rows import json_row, json_usage
from graph.node_text import TextModel
from graph.nodes import classes_of_graph, nodes_of_graph, num_at_once
from graph.selection.request import SelectError, SelectRequest
from graph.selection.select import needs_text_vectors, select_nodes
from graph.served_text import ServedText
from graph.store import Float32s, Graph, GraphNotFoundError, GraphStore, NodeId
from graph.text_vectors import TextVectors
from graph.user_prompts import UserPrompts, find_prompt
from jobs.context import JobFailedError, RunnerContext
from jobs.file_check import FileContentError, read_nodes
from jobs.files import FileStore, UploadNotFoundError
from jobs.runners.enrich_ledger import Ledger
from jobs.store import JsonObject
from jobs.usage import UsageStore

ARTIFACTS = ["enriched.arrow", "enriched.jsonl"]
PIECE = 2048
"""Nodes that are worked on together: enough for the longest to come first and no engine to run dry."""
WATCH_SECONDS = 0.5
ENGINE_SECONDS = 120.0
"""How long an engine may be away, or asleep, before the job fails."""
_RETRY_SECONDS = 1.0
TRANSIENT = frozenset({"engine_dead", "sleeping", "queue_full"})
"""Codes of rows, and of vectors for a selection, that are asked for again."""
T = TypeVar("T")

logger = logging.getLogger("lathe.enrich.job")


def run(context: RunnerContext) -> JsonObject:
    """Run one attempt; returns the job's result.

    Raises:
        JobFailedError: graph, file, model, prompt or node is gone; a model changed or stayed away.
        JobCancelledError
    """
    return asyncio.run(_watched(context))


async def _watched(context: RunnerContext) -> JsonObject:
    """The work, given up when the job is cancelled or its graph deleted."""
    work = asyncio.ensure_future(_Job(context).run())
    try:
        while not work.done():
            await asyncio.wait({work}, timeout=WATCH_SECONDS)
            if not work.done():
                context.check_cancelled()
                await asyncio.to_thread(_check_graph, context)
        return work.result()
    finally:
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)


def _check_graph(context: RunnerContext) -> None:
    """Raises: JobFailedError: the job has a graph, which was deleted."""
    graph_id = context.spec.get("graph")
    if graph_id is not None:
        with _graph_not_found(graph_id):
            GraphStore(context.home / "graphs").info(graph_id, context.owner)


def _find_graph(context: RunnerContext) -> Graph | None:
    """The job's graph, where it has one. Raises: JobFailedError: it was deleted."""
    graph_id = context.spec.get("graph")
    if graph_id is None:
        return None
    with _graph_not_found(graph_id):
        return GraphStore(context.home / "graphs").get(graph_id, context.owner)


@contextmanager
def _graph_not_found(graph_id: str) -> Iterator[None]:
    try:
        yield
    except GraphNotFoundError:
        raise JobFailedError("graph_not_found", f"the graph {graph_id!r} was deleted") from None


class _Nodes(Protocol):
    """Where the nodes come from."""

    def __len__(self) -> int: ...

    @property
    def any_id(self) -> NodeId:
        """One of their type, also where there are none."""
        ...

    def num_at_once(self, places: Sequence[int]) -> int:
        """How many of the first of them memory is given for."""
        ...

    def part(self, places: Sequence[int]) -> tuple[EnrichNode, ...]: ...


@dataclass(frozen=True, slots=True)
class _GraphNodes:
    graph: Graph
    indices: Sequence[int]
    prompt: Prompt

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def any_id(self) -> NodeId:
        return "" if self.graph.info.id_type == "string" else 0

    def num_at_once(self, places: Sequence[int]) -> int:
        return num_at_once(self.graph, [self.indices[place] for place in places], self.prompt)

    def part(self, places: Sequence[int]) -> tuple[EnrichNode, ...]:
        return nodes_of_graph(self.graph, [self.indices[place] for place in places], self.prompt)


@dataclass(frozen=True, slots=True)
class _FileNodes:
    nodes: list[EnrichNode]

    def __len__(self) -> int:
        return len(self.nodes)

    @property
    def any_id(self) -> NodeId:
        return self.nodes[0].id

    def num_at_once(self, places: Sequence[int]) -> int:
        return len(places)

    def part(self, places: Sequence[int]) -> tuple[EnrichNode, ...]:
        return tuple(self.nodes[place] for place in places)


class _Engines:
    """The engine hosts of the home, connected when they are needed and again when they were restarted."""

    def __init__(self, context: RunnerContext, meter: Callable[[EngineUse], None]) -> None:
        self._meter = meter
        self._run_dir = context.home / "run"
        self._registry = ModelRegistry(context.home / "models")
        self._clients: dict[str, EngineClient] = {}
        self._metered: dict[str, AsyncEngine] = {}
        self._texts: dict[str, TextModel] = {}

    async def engine(self, model: str, param: str) -> AsyncEngine:
        """Raises: EngineError: nobody serves it at the moment."""
        client = self._clients.get(model)
        if client is None or client.is_dead:
            client = await EngineClient.connect(self._run_dir / f"{model}.sock")
            self._clients[model] = client
            self._metered[model] = MeteredEngine(client, model, self._meter, DeviceClock())
        return self._metered[model]

    async def text(self, model: str, param: str) -> TextModel:
        """Raises: JobFailedError: the model was deleted."""
        if model not in self._texts:
            try:
                folder = self._registry.get(model).path
            except ModelNotFoundError:
                raise JobFailedError("model_not_found", f"model {model!r} is gone") from None
            self._texts[model] = await asyncio.to_thread(ServedText.load, folder)
        return self._texts[model]

    async def aclose(self) -> None:
        for client in self._clients.values():
            await client.aclose()


@dataclass(slots=True)
class _Totals:
    """What the pieces of all attempts add up to, beside what the rows say themselves.

    A killed attempt leaves out the hits and encoded tokens of the piece that it was at.
    """

    prefix_hit_tokens: int = 0
    embedding_tokens: int = 0
    seconds: float = 0.0
    stopped_by: BudgetName | None = None

    def add(self, usage: EnrichUsage) -> None:
        self.prefix_hit_tokens += usage.prefix_hit_tokens
        self.embedding_tokens += usage.embedding_tokens
        self.stopped_by = self.stopped_by or usage.stopped_by


class _Job:
    """One attempt. Belongs to the event loop that runs it."""

    def __init__(self, context: RunnerContext) -> None:
        self._context = context
        self._ledger = Ledger(context.folder / "ledger.db")
        self._totals = _Totals(**self._ledger.fact("totals", {}))
        self._used = UsageStore(context.home / "usage.db")
        self._engines = _Engines(context, self._used.used)
        self._cache = EnrichmentCache(context.home / "cache.db")
        self._enricher = Enricher(
            engine_for=self._engines.engine,
            text_for=self._engines.text,
            cache=self._cache,
            ended=self._used.enriched,
        )
        self._vectors = TextVectors(
            engine_for=self._engines.engine,
            text_for=self._engines.text,
            cache=self._cache,
        )
        self._away_since: float | None = None

    async def run(self) -> JsonObject:
        context = self._context
        try:
            request = _request(context)
            nodes = await self._find_nodes(request)
            if self._ledger.num_rows:
                context.event(f"going on behind {self._ledger.num_rows} finished nodes")
            for start in range(0, len(nodes), PIECE):
                piece = range(start, min(start + PIECE, len(nodes)))
                while left := sorted(set(piece) - self._ledger.places(piece.start, piece.stop)):
                    number = await asyncio.to_thread(nodes.num_at_once, left)
                    await self._work(request, nodes, left[:number])
                context.progress(piece.stop, len(nodes))
            return self._finish(request, nodes, await self._dim(request))
        finally:
            self._cache.close()
            await self._engines.aclose()
            self._used.close()
            self._ledger.close()

    async def _find_nodes(self, request: EnrichRequest) -> _Nodes:
        """Raises: JobFailedError: graph or file is gone, or the selection cannot be made."""
        graph = await asyncio.to_thread(_find_graph, self._context)
        if graph is None:
            return await asyncio.to_thread(_read_file, self._context)
        spec = self._context.spec
        if "select" in spec:
            return _GraphNodes(graph, await self._select(graph, request), request.prompt)
        if "node_ids" in spec:
            indices = await asyncio.to_thread(graph.indices_of, spec["node_ids"])
            return _GraphNodes(graph, indices, request.prompt)
        return _GraphNodes(graph, range(graph.info.num_nodes), request.prompt)

    async def _select(self, graph: Graph, request: EnrichRequest) -> Sequence[int]:
        """Indices of the nodes that the first attempt chose; what follows keeps to them."""
        path = self._context.folder / "selected.json"
        if path.is_file():
            kept: list[int] = msgspec.json.decode(path.read_bytes())
            return kept
        select = SelectRequest.model_validate(self._context.spec["select"])
        try:
            vectors = None
            if needs_text_vectors(graph, select):
                model = select.embedding_model or request.embedding_model
                vectors = await self._encode(graph, model)
            chosen = await asyncio.to_thread(select_nodes, graph, select, text_vectors=vectors)
        except SelectError as error:
            message = f"select.{error.param}: {error.message}"
            raise JobFailedError("invalid_value", message) from None
        indices: list[int] = chosen.indices.tolist()
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(msgspec.json.encode(indices))
        temporary.replace(path)
        return indices

    async def _encode(self, graph: Graph, model: str) -> Float32s:
        """Vectors of all texts. Raises: JobFailedError: an engine stayed away, or refused."""
        most = 0

        def went_on(done: int, total: int) -> None:
            nonlocal most
            if done > most:  # else only what is cached already
                most, self._away_since = done, None

        return await self._once_there(
            lambda: self._vectors.encode(
                graph,
                np.arange(graph.info.num_nodes),
                model=model,
                tenant=self._context.owner,
                on_batch=went_on,
            )
        )

    async def _once_there(self, ask: Callable[[], Awaitable[T]]) -> T:
        """What asking engines gives, asked again while one is away. Raises: JobFailedError."""
        while True:
            try:
                found = await ask()
            except EngineError as error:
                if error.code not in TRANSIENT:
                    raise JobFailedError("engine_unavailable", error.message) from None
                await self._wait(error.message)
            else:
                self._away_since = None
                return found

    async def _work(self, request: EnrichRequest, nodes: _Nodes, places: Sequence[int]) -> None:
        """Once through some nodes of a piece. What an engine lost stays out of the ledger, and is waited for."""
        ledger, totals = self._ledger, self._totals
        began, before, num_before = time.monotonic(), totals.seconds, ledger.num_rows
        part = await asyncio.to_thread(nodes.part, places)
        lost: str | None = None
        try:
            await self._check_models(request)
            budget = self._budget(places)
            stream = await self._enricher.stream(replace(request, nodes=part, budget=budget))
            async with aclosing(stream.batches()) as batches:
                async for batch in batches:
                    kept = [(places[i], row) for i, row in batch if not _is_lost(row)]
                    lost = next((_message(row) for _, row in batch if _is_lost(row)), lost)
                    totals.seconds = before + time.monotonic() - began
                    ledger.add(kept, {"totals": asdict(totals), "dim": stream.dim})
                    self._used.flush()  # with the ledger, so that a kill loses of both the same
                    self._context.progress(ledger.num_rows, len(nodes))
            totals.add(stream.usage)
            ledger.add([], {"totals": asdict(totals)})
        except PromptInputError as error:
            place = "" if error.node is None else f" of node {part[error.node].id!r:.80}"
            message = f"{error.param}{place}: {error.message}"
            raise JobFailedError("invalid_value", message) from None
        except UnsuitableModelError as error:
            raise JobFailedError("invalid_value", f"{error.param}: {error.message}") from None
        except EngineError as error:
            lost = error.message
        if lost is None or ledger.num_rows > num_before:
            self._away_since = None
        if lost is not None:
            await self._wait(lost)

    async def _wait(self, message: str) -> None:
        """Raises: JobFailedError: an engine has been away for too long."""
        now = time.monotonic()
        self._away_since = self._away_since or now
        if now - self._away_since > ENGINE_SECONDS:
            raise JobFailedError("engine_unavailable", f"an engine stayed away: {message}")
        logger.warning("an engine is away: %s", message)
        await asyncio.sleep(_RETRY_SECONDS)

    async def _check_models(self, request: EnrichRequest) -> None:
        """All rows of a job are of the same weights. Raises: JobFailedError; EngineError."""
        models = {"model": request.model}
        if "embedding" in request.outputs:
            models["embedding_model"] = request.embedding_model
        for param, model in models.items():
            found = (await self._engines.engine(model, param)).info.checkpoint_hash
            if self._ledger.fact(f"{param} checkpoint", found) != found:
                raise JobFailedError("model_changed", f"{param} {model!r} has other weights now")
            self._ledger.add([], {f"{param} checkpoint": found})

    def _budget(self, places: Sequence[int]) -> EnrichBudget:
        """What is left of the job's for these nodes."""
        given = self._context.spec["budget"]
        nodes, tokens, seconds, cost = (
            given.get(name) for name in ("max_nodes", "max_tokens", "max_seconds", "max_cost")
        )
        paid = None
        if cost is not None:  # rounded, because 0.29 * 100 is a little below 29
            paid = int(round(cost * 1e6 / given["cost_per_million_tokens"], 6))
        spent = self._ledger.tokens_spent
        return EnrichBudget(
            nodes=None if nodes is None else sum(place < nodes for place in places),
            tokens=None if tokens is None else max(0, tokens - spent),
            cost_tokens=None if paid is None else max(0, paid - spent),
            seconds=None if seconds is None else max(0.0, seconds - self._totals.seconds),
        )

    async def _dim(self, request: EnrichRequest) -> int | None:
        """Of the embeddings; the encoder's own where no row has told it. Raises: JobFailedError."""
        if "embedding" not in request.outputs:
            return None
        told: int | None = self._ledger.fact("dim", None)
        if told is not None:
            return told
        model = request.embedding_model
        encoder = await self._once_there(lambda: self._engines.engine(model, "embedding_model"))
        return encoder.info.hidden_size

    def _finish(self, request: EnrichRequest, nodes: _Nodes, dim: int | None) -> JsonObject:
        """Write the artefacts, in the order of the nodes; returns the job's result."""
        usage = self._usage(len(nodes))
        cost = json_usage(usage)
        dtype = self._context.spec["embedding_dtype"]
        arrow_path, lines_path = (self._context.artifacts / f".{name}.tmp" for name in ARTIFACTS)
        with arrow_path.open("wb") as arrow_file, lines_path.open("wb") as lines_file:
            writer = ArrowWriter(
                arrow_file,
                request,
                node_id=nodes.any_id,
                dim=dim,
                dtype=dtype,
                usage=cost,
            )
            for rows in self._ledger.batches():
                self._context.check_cancelled()
                writer.write(rows)
                for row in rows:
                    line = json_row(request, row, dtype=dtype, as_base64=True)
                    lines_file.write(msgspec.json.encode(line) + b"\n")
            writer.close()
        for path, name in zip((arrow_path, lines_path), ARTIFACTS, strict=True):
            path.replace(self._context.artifacts / name)
        return {
            "model": request.model,
            "embedding_model": request.embedding_model if "embedding" in request.outputs else None,
            "prompt": {
                "id": request.prompt.id,
                "version": request.prompt.version,
                "hash": request.prompt.hash,
            },
            "usage": cost,
            "artifacts": ARTIFACTS,
        }

    def _usage(self, num_nodes: int) -> EnrichUsage:
        num_by_status: Counter[ItemStatus] = Counter()
        prompt_tokens = completion_tokens = row_tokens = 0
        for rows in self._ledger.batches():
            for row in rows:
                num_by_status[row.status] += 1
                row_tokens += row.tokens_in + row.tokens_out
                if row.tokens_spent:
                    prompt_tokens += row.tokens_in
                    completion_tokens += row.tokens_out
        return EnrichUsage(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            prefix_hit_tokens=self._totals.prefix_hit_tokens,
            embedding_tokens=self._totals.embedding_tokens,
            cached_tokens=row_tokens - prompt_tokens - completion_tokens,
            num_nodes=num_nodes,
            num_by_status={status: num_by_status[status] for status in ITEM_STATUSES},
            seconds=self._totals.seconds,
            stopped_by=self._totals.stopped_by,
        )


def _is_lost(row: EnrichRow) -> bool:
    return row.error is not None and row.error.code in TRANSIENT


def _message(row: EnrichRow) -> str:
    assert row.error is not None
    return row.error.message


def _request(context: RunnerContext) -> EnrichRequest:
    """What is the same of all pieces; nodes and budget are each piece's own."""
    spec = context.spec
    try:
        prompt = find_prompt(UserPrompts(context.home / "prompts"), context.owner, spec["prompt"])
    except PromptNotFoundError:
        raise JobFailedError("prompt_not_found", f"the prompt {spec['prompt']!r} is gone") from None
    return EnrichRequest(
        nodes=(),
        prompt=prompt,
        model=spec["model"],
        embedding_model=spec["embedding_model"],
        outputs=frozenset(spec["return"]),
        max_tokens=spec.get("max_tokens"),
        tenant=context.owner,
        priority=spec["priority"],
        long_text=spec["long_text"],
        classes=tuple(spec.get("classes", ())) or _classes(context, prompt),
        variables=spec["variables"],
    )


def _classes(context: RunnerContext, prompt: Prompt) -> tuple[str, ...]:
    """The graph's own, as in a request about a graph."""
    graph = _find_graph(context)
    try:
        return () if graph is None else classes_of_graph(graph, prompt)
    except PromptInputError as error:
        raise JobFailedError("invalid_value", f"{error.param}: {error.message}") from None


def _read_file(context: RunnerContext) -> _FileNodes:
    """Raises: JobFailedError."""
    try:
        _, path = FileStore(context.home / "files").open_for_job(context.spec["file"])
    except UploadNotFoundError as error:
        raise JobFailedError("file_not_found", str(error)) from None
    try:
        return _FileNodes(list(read_nodes(path)))
    except FileContentError as error:
        raise JobFailedError("invalid_file", f"{context.spec['file']}: {error}") from None
