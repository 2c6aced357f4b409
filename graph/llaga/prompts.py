"""What a projector's LLM is asked: the task and the classes first, then the rows, then the cue to answer.

Chen et al. 2024, arXiv:2402.08170 puts the graph's rows before the list of classes; here they come last, so that all
questions of a task share their beginning and its KV cache. An answer ends with the model's end of turn, so that no
answer begins another one and the log-probabilities of complete answers can be compared.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

PROMPT_VERSION = 1
MAX_DESCRIPTION_CHARS = 160
MAX_DESCRIPTION_TOKENS = 64
Task = Literal["node_classification", "link_prediction", "node_description"]
TASKS: tuple[Task, ...] = ("node_classification", "link_prediction", "node_description")
LINK_ANSWERS = ("yes", "no")
NUM_CENTRES: dict[Task, int] = {
    "node_classification": 1,
    "link_prediction": 2,
    "node_description": 1,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """Text around the rows: before the first centre's, after each centre's."""

    before: str
    after: tuple[str, ...]


def build_prompt(task: Task, classes: Sequence[str] = ()) -> Prompt:
    """Args: classes: what the answer may be; for node classification only."""
    if task == "node_classification":
        listed = ", ".join(classes)
        return Prompt(
            before=f"A node of a graph and its surroundings belong to one of {len(classes)} classes:"
            f" {listed}.\nNode:",
            after=("\nClass:",),
        )
    if task == "link_prediction":
        return Prompt(
            before="Two nodes of a graph, each with its surroundings. Should the two be connected,"
            " yes or no?\nFirst node:",
            after=("\nSecond node:", "\nConnected:"),
        )
    return Prompt(
        before="Describe a node of a graph in brief from its surroundings.\nNode:",
        after=("\nDescription:",),
    )


def answer_text(answer: str) -> str:
    """An answer as it follows the prompt."""
    return f" {answer}"


def description(text: str, label: str | None) -> str:
    """What the projector learns to say of a node: its label and how its text begins; empty where it has neither.

    The beginning is the first sentence of the first line, which is the title where a text has one.
    """
    first_line = text.strip().split("\n", maxsplit=1)[0]
    sentence = " ".join(re.split(r"(?<=[.!?])\s", first_line, maxsplit=1)[0].split())
    if len(sentence) > MAX_DESCRIPTION_CHARS:
        sentence = sentence[:MAX_DESCRIPTION_CHARS].rsplit(" ", maxsplit=1)[0]
    return ": ".join(part for part in (label, sentence) if part)
