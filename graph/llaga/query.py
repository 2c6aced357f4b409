"""Asks a frozen LLM about nodes of a graph: rows of a projector inside the prompt, answers chosen or written.

A chosen answer's log-probability is the sum over its tokens and the end mark: how likely the LLM is to give exactly
this answer, which is what training raised. It is not divided by the length: the end mark makes the answers exclusive,
so their shares are the LLM's own probabilities, restricted to the choices. Nothing is sampled: the text is the
likeliest choice, and a description is written greedily.

Imports no torch; the rows are made here and cross the engine's socket as embedding rows. Questions are several calls
at once, so that the engine always has one to work on; an engine scores all choices of a question in one pass. Rows are
made in a thread, of one question at a time, once it is its turn: they are large, and the event loop serves others.
"""

import asyncio
import math
import secrets
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, TypeVar

import numpy as np

from engines.protocol import (
    ROW_PLACEHOLDER,
    AsyncEngine,
    EngineError,
    GenerateRequest,
    SamplingParams,
    ScoreRequest,
)
from graph.llaga.filling import Filling, Float32s
from graph.llaga.projector import LoadedProjector
from graph.llaga.prompts import (
    LINK_ANSWERS,
    MAX_DESCRIPTION_TOKENS,
    Task,
    answer_text,
    build_prompt,
)
from graph.store import Int64s

CALLS_AT_ONCE = 8
"""Of one query; what waits in an engine's queue is work of others as well."""

T = TypeVar("T")


class Text(Protocol):
    """The LLM's tokenizer; `engines.text.TextTokenizer` is one."""

    @property
    def special_prefix(self) -> tuple[int, ...]:
        """What the model expects before a text (a Llama's BOS)."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Attributes: text: the likeliest choice, or the description; probabilities, logprobs: of all choices, empty for a
    description; template_nodes: of each centre, indices of what filled it; num_tokens: that the LLM read;
    num_generated: that it wrote."""

    text: str
    probabilities: dict[str, float] = field(default_factory=dict)
    logprobs: dict[str, float] = field(default_factory=dict)
    template_nodes: tuple[Int64s, ...]
    num_tokens: int
    num_generated: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Question:
    token_ids: tuple[int, ...]
    rows: bytes
    template_nodes: tuple[Int64s, ...]


async def answer_questions(
    engine: AsyncEngine,
    text: Text,
    projector: LoadedProjector,
    task: Task,
    fillings: Sequence[Filling],
    features: Float32s,
    *,
    end_token_id: int,
    tenant: str = "",
) -> list[Answer]:
    """Answer several questions of one task, each as it would be alone.

    Args:
        fillings: of each centre of a question, as `plan_questions` makes them.
        features: (nodes, encoder_dim); rows of `needed_nodes` must be there.
        end_token_id: ends an answer; the one trained with.

    Raises:
        EngineError
    """
    classes = projector.manifest.classes if task == "node_classification" else ()
    prompt = build_prompt(task, classes)
    ids = [*text.special_prefix, *text.encode(prompt.before)]
    for part in prompt.after:
        ids += [ROW_PLACEHOLDER] * projector.manifest.template.num_rows + list(text.encode(part))
    if task == "node_description":
        ask = partial(_describe, engine, text, end_token_id, tenant)
    else:
        choices = classes if task == "node_classification" else LINK_ANSWERS
        continuations = {name: (*text.encode(answer_text(name)), end_token_id) for name in choices}
        ask = partial(_choose, engine, continuations, tenant)
    token_ids, making = tuple(ids), asyncio.Lock()

    async def answer(index: int) -> Answer:
        parts = [filling.one(index) for filling in fillings]
        async with making:
            rows = await asyncio.to_thread(_rows, projector, parts, features)
        nodes = tuple(part.nodes[0] for part in parts)
        return await ask(_Question(token_ids=token_ids, rows=rows, template_nodes=nodes))

    return await _together(partial(answer, index) for index in range(len(fillings[0].nodes)))


def _rows(projector: LoadedProjector, fillings: Sequence[Filling], features: Float32s) -> bytes:
    """Of one question, as an engine takes them."""
    parts = []
    for filling in fillings:
        vectors, is_pad = filling.vectors(features, projector.laplacian)
        parts.append(projector.project(vectors, is_pad)[0])
    return np.concatenate(parts).astype("<f4").tobytes()


async def _choose(
    engine: AsyncEngine, choices: dict[str, tuple[int, ...]], tenant: str, question: _Question
) -> Answer:
    result = await engine.score(
        ScoreRequest(
            request_id=_request_id(),
            context_ids=question.token_ids,
            continuation_ids=tuple(choices.values()),
            embedding_rows=question.rows,
            tenant=tenant,
        )
    )
    logprobs = [score.logprob for score in result.scores]
    highest = max(logprobs)
    weights = [math.exp(logprob - highest) for logprob in logprobs]
    total = sum(weights)
    return Answer(
        text=list(choices)[logprobs.index(highest)],
        probabilities={name: w / total for name, w in zip(choices, weights, strict=True)},
        logprobs=dict(zip(choices, logprobs, strict=True)),
        template_nodes=question.template_nodes,
        num_tokens=result.num_tokens,
    )


async def _describe(
    engine: AsyncEngine, text: Text, end_token_id: int, tenant: str, question: _Question
) -> Answer:
    stream = await engine.generate(
        GenerateRequest(
            request_id=_request_id(),
            token_ids=question.token_ids,
            params=SamplingParams(
                max_tokens=MAX_DESCRIPTION_TOKENS, temperature=0.0, stop_token_ids=(end_token_id,)
            ),
            embedding_rows=question.rows,
            tenant=tenant,
        )
    )
    written: list[int] = []
    async with aclosing(stream):  # leaving early aborts the request
        async for output in stream:
            written += output.token_ids
            if output.finish_reason in ("error", "abort"):
                raise EngineError(
                    output.error_code or "internal_error", output.error or "the request was aborted"
                )
    return Answer(
        text=text.decode(written, skip_special_tokens=True).strip(),
        template_nodes=question.template_nodes,
        num_tokens=len(question.token_ids),
        num_generated=len(written),
    )


async def _together(calls: Iterable[Callable[[], Awaitable[T]]]) -> list[T]:
    """Results in order; `CALLS_AT_ONCE` run at once, and a failure ends them all."""
    gate = asyncio.Semaphore(CALLS_AT_ONCE)

    async def one(call: Callable[[], Awaitable[T]]) -> T:
        async with gate:
            return await call()

    tasks = [asyncio.ensure_future(one(call)) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def _request_id() -> str:
    return f"query-{secrets.token_hex(12)}"
