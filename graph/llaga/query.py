"""Asks a frozen LLM about nodes of a graph: rows of a projector inside the prompt, answers by their log-probability.

An answer's log-probability is the sum over its tokens and the end mark: how likely the LLM is to give exactly this
answer, which is what training raised. It is not divided by the length: the end mark makes the answers exclusive, so
their shares are the LLM's own probabilities, restricted to the classes. Nothing is sampled, and the text is the
likeliest class.

Imports no torch; the rows are made here and cross the engine's socket as embedding rows.
"""

import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from engines.protocol import ROW_PLACEHOLDER, AsyncEngine, ScoreRequest
from graph.llaga.projector import FilledTemplate, Float32s, LoadedProjector, fill_template
from graph.llaga.prompts import LINK_ANSWERS, NUM_CENTRES, Task, answer_text, build_prompt
from graph.store import Graph, Int64s

Encode = Callable[[str], Sequence[int]]
"""Token ids of a text, without special tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Attributes: text: the likeliest of the classes; template_nodes: of each centre, indices of what filled it;
    num_tokens: that the LLM read."""

    text: str
    probabilities: dict[str, float]
    logprobs: dict[str, float]
    template_nodes: tuple[Int64s, ...]
    num_tokens: int


def partners(task: Task, questions: Int64s) -> Int64s | None:
    """Of every question's centres (Q, C) the node that is hidden from each; None where there are no pairs."""
    if NUM_CENTRES[task] == 1:
        return None
    return questions[:, ::-1]


def fill_questions(
    projector: LoadedProjector, graph: Graph, features: Float32s, task: Task, questions: Int64s
) -> list[FilledTemplate]:
    """One filled template per centre of a question, for all questions (Q, C)."""
    hidden = partners(task, questions)
    return [
        fill_template(
            projector.manifest.template,
            graph,
            features,
            questions[:, centre],
            hidden=None if hidden is None else hidden[:, centre],
            laplacian=projector.laplacian,
        )
        for centre in range(NUM_CENTRES[task])
    ]


def template_nodes(
    projector: LoadedProjector, graph: Graph, task: Task, questions: Int64s
) -> Int64s:
    """All nodes whose features the questions need, ascending."""
    nothing = np.empty((graph.info.num_nodes, 0), dtype=np.float32)
    filled = fill_questions(projector, graph, nothing, task, questions)
    return np.unique(np.concatenate([nodes for part in filled for nodes in part.nodes]))


async def answer_questions(
    engine: AsyncEngine,
    encode: Encode,
    projector: LoadedProjector,
    graph: Graph,
    features: Float32s,
    task: Task,
    questions: Int64s,
    *,
    beginning: Sequence[int] = (),
    end_token_id: int,
    tenant: str = "",
) -> list[Answer]:
    """Answer several questions of one task, each as it would be alone.

    Args:
        features: (nodes, encoder_dim); rows of `template_nodes` must be there.
        questions: node indices (Q, C).
        beginning: what the model expects before a text (a Llama's BOS).
        end_token_id: ends an answer; the one trained with.

    Raises:
        EngineError
    """
    assert task != "node_description", "its answer is generated, not chosen"
    classes = projector.manifest.classes if task == "node_classification" else LINK_ANSWERS
    prompt = build_prompt(task, classes)
    continuations = tuple((*encode(answer_text(name)), end_token_id) for name in classes)
    before, after = encode(prompt.before), [encode(text) for text in prompt.after]
    filled = fill_questions(projector, graph, features, task, questions)
    rows = [projector.project(part.vectors, part.is_pad) for part in filled]
    ids = [*beginning, *before]
    for text in after:
        ids += [ROW_PLACEHOLDER] * projector.manifest.template.num_rows + list(text)
    answers = []
    for index in range(len(questions)):
        given = np.concatenate([part[index] for part in rows]).astype("<f4")
        result = await engine.score(
            ScoreRequest(
                request_id=f"query-{secrets.token_hex(12)}",
                context_ids=tuple(ids),
                continuation_ids=continuations,
                embedding_rows=given.tobytes(),
                tenant=tenant,
            )
        )
        logprobs = [score.logprob for score in result.scores]
        highest = max(logprobs)
        weights = [math.exp(logprob - highest) for logprob in logprobs]
        total = sum(weights)
        answers.append(
            Answer(
                text=classes[logprobs.index(highest)],
                probabilities={n: w / total for n, w in zip(classes, weights, strict=True)},
                logprobs=dict(zip(classes, logprobs, strict=True)),
                template_nodes=tuple(part.nodes[index] for part in filled),
                num_tokens=result.num_tokens,
            )
        )
    return answers
