"""How well a trained projector answers held-out questions, and the page that tells it."""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from graph.llaga.filling import Float32s
from graph.llaga.prompts import LINK_ANSWERS, MAX_DESCRIPTION_TOKENS
from graph.llaga.questions import TaskQuestions
from jobs.runners.projector_examples import AnswerText, TextEncoder
from jobs.store import JsonObject
from training.projector import (
    Examples,
    FrozenReader,
    Projector,
    mean_loss,
    score_examples,
    write_answers,
)

MAX_WRITTEN = 64
"""Descriptions of a split that are written out, to be compared with the right ones."""


def judge(
    reader: FrozenReader,
    projector: Projector,
    task: TaskQuestions,
    split: str,
    examples: Examples,
    text: AnswerText,
    encoder: TextEncoder | None,
    on_batch: Callable[[int], None],
) -> JsonObject | None:
    """What the projector makes of a split's questions; None where it has none.

    Chosen answers: `accuracy`, `most_frequent` (the accuracy of always giving the answer that is most frequent here),
    for link prediction `auc`. Descriptions: `loss` per token and, where there is an encoder, the mean cosine between a
    written description and the right one (`similarity`), and those of other nodes (`similarity_to_others`).

    Args:
        on_batch: told how many questions are done.
    """
    if not examples.answers:
        return None
    answers = task.answers[split]
    if task.choices:
        scores = score_examples(
            reader,
            projector,
            examples,
            [text.encode(task.task, choice) for choice in task.choices],
            on_batch=on_batch,
        )
        return _accuracy(task.choices, answers, scores)
    found: JsonObject = {"loss": mean_loss(reader, projector, examples, on_batch=on_batch)}
    if encoder is None:
        return found
    ids = write_answers(
        reader,
        projector,
        dataclasses.replace(examples, answers=examples.answers[:MAX_WRITTEN]),
        max_tokens=MAX_DESCRIPTION_TOKENS,
        end_token_id=text.end_token_id,
    )
    written = encoder.vectors([text.decode(one) for one in ids])
    cosines = written @ encoder.vectors(answers[:MAX_WRITTEN]).T
    others = cosines[~np.eye(len(cosines), dtype=bool)]
    return found | {
        "similarity": float(np.mean(np.diag(cosines))),
        "similarity_to_others": float(others.mean()) if len(others) else None,
    }


def _accuracy(choices: Sequence[str], answers: Sequence[str], scores: Float32s) -> JsonObject:
    chosen = [choices[index] for index in scores.argmax(1)]
    found: JsonObject = {
        "accuracy": float(np.mean([a == b for a, b in zip(chosen, answers, strict=True)])),
        "most_frequent": max(Counter(answers).values()) / len(answers),
    }
    if choices == LINK_ANSWERS:
        is_edge = np.array([answer == LINK_ANSWERS[0] for answer in answers])
        found["auc"] = area_under_curve(scores[:, 0] - scores[:, 1], is_edge)
    return found


def area_under_curve(scores: Float32s, is_true: npt.NDArray[np.bool_]) -> float | None:
    """How often a true one scores higher than a false one, a tie counting half; None where one kind is missing."""
    true, false = scores[is_true], np.sort(scores[~is_true])
    if len(true) == 0 or len(false) == 0:
        return None
    below = np.searchsorted(false, true, side="left") + np.searchsorted(false, true, side="right")
    return float(below.sum() / 2 / (len(true) * len(false)))


_COLUMNS = {
    "accuracy": "accuracy",
    "most_frequent": "most frequent answer",
    "auc": "AUC",
    "loss": "loss",
    "similarity": "similarity",
    "similarity_to_others": "to others",
}


def to_markdown(title: str, report: JsonObject) -> str:
    """A page for people."""
    head = ["task", "split", "questions", *_COLUMNS.values()]
    lines = [
        f"# {title}",
        "",
        f"Template `{json.dumps(report['template'])}`, settings `{json.dumps(report['settings'])}`.",
        "",
        f"{report['num_parameters']:,} parameters, {report['steps']:,} steps on {report['device']} in"
        f" {report['seconds']['training']:,} s; mean loss of the last 20 steps {report['last_loss']:.4f}.",
        "",
        f"| {' | '.join(head)} |",
        "|---" * len(head) + "|",
    ]
    for task, splits in report["results"].items():
        for split, found in splits.items():
            values = [(found or {}).get(key) for key in _COLUMNS]
            cells = ["" if value is None else f"{value:.4f}" for value in values]
            count = f"{report['num_examples'][task][split]:,}"
            lines.append(f"| {' | '.join([task, split, count, *cells])} |")
    return "\n".join(lines) + "\n"
