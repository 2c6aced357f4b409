"""From a prompt's messages to a checked answer: constrain, parse, repair once, and keep labels out of the text.

A prompt with a JSON schema is generated under that schema, so an answer can hardly be anything but JSON that was cut by
max_tokens. Then the LLM is shown what it wrote and asked again, under the same schema with strings of half the length;
if that does not validate either, the answer is invalid, and the node keeps its raw feature. A request that allows fewer
tokens than the prompt does gets shorter strings from the start.

Labels. An explanation often begins with the label that it explains, and encoding that would mostly encode the label:
so sentences that state one are taken out of the text, and the chosen label travels in a field of its own. Labels of
validation and test nodes are never given to an LLM: what a graph lends to a prompt goes through `training_labels` and
`training_classes`, which read no others, and no prompt has an input for a node's own label.
"""

import json
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy.typing as npt

from engines.protocol import Constraint, FinishReason
from graph.catalog import Message, Prompt, read_answer
from graph.output_schema import find_fault, shorten, with_classes
from graph.store import Graph

MAX_SHOWN_CHARS = 2000
"""Of an invalid answer, in the request to repair it."""
MAX_REPAIR_TOKENS = 256
"""Of that request, besides the answer."""
_REPAIR = (
    "This is no valid answer: {fault}. "
    "Answer again, with the same fields and much shorter, so that the JSON is complete."
)


class PromptInputError(ValueError):
    """What was given is not what a prompt reads.

    Attributes:
        param: the place at fault.
        node: the place of the node whose own `variables` are at fault; None where it is no single node's.
    """

    def __init__(self, param: str, message: str, node: int | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.message = message
        self.node = node


class InvalidAnswerError(ValueError):
    """What an LLM wrote is no answer to its prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What an LLM answered.

    Attributes:
        text: to encode beside the node's own; empty where the prompt asks for none, or nothing but labels is left.
        label: the chosen class, or the likeliest of several.
        fields: all of a JSON answer, as it was written.
    """

    text: str
    label: str | None = None
    fields: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """One call of the LLM."""

    text: str
    tokens_in: int
    tokens_out: int
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """One or two calls.

    Attributes:
        answer: None if there is no valid one; then `fault` says what is wrong with the last.
        calls: the second is the repair.
    """

    answer: Answer | None
    fault: str | None
    calls: tuple[Written, ...]


Ask = Callable[[Sequence[Message], Constraint | None], Awaitable[Written | None]]
"""Has the LLM answer messages; None if they leave no room for an answer."""


async def answer_prompt(
    prompt: Prompt,
    messages: Sequence[Message],
    classes: Sequence[str],
    max_tokens: int,
    ask: Ask,
    *,
    shown_labels: Sequence[str] = (),
) -> Answered:
    """Have a filled prompt answered. An empty text is for the caller to judge; JSON is repaired once.

    Args:
        shown_labels: of the neighbours in the messages.
    """
    share = min(1.0, max_tokens / prompt.max_tokens)
    first = await ask(messages, constraint_of(prompt, classes, share))
    assert first is not None, "the prompt was fitted to the context"
    try:
        answer = parse_answer(prompt, first.text, classes, shown_labels=shown_labels)
        return Answered(answer=answer, fault=None, calls=(first,))
    except InvalidAnswerError as error:
        fault = str(error)
    again = await ask(
        repair_messages(messages, first.text, fault),
        constraint_of(prompt, classes, share / 2),
    )
    if again is None:
        return Answered(answer=None, fault=fault, calls=(first,))
    try:
        answer = parse_answer(prompt, again.text, classes, shown_labels=shown_labels)
        return Answered(answer=answer, fault=None, calls=(first, again))
    except InvalidAnswerError as error:
        return Answered(answer=None, fault=str(error), calls=(first, again))


def check_inputs(
    prompt: Prompt,
    classes: Sequence[str],
    variables: Mapping[str, str],
    own: Sequence[Mapping[str, str]],
) -> None:
    """Nothing is missing, and nothing is given in vain.

    Args:
        variables: for all nodes; own: of each node.

    Raises:
        PromptInputError
    """
    if "classes" in prompt.inputs and not classes:
        raise PromptInputError("classes", f"{prompt.ref} chooses among classes: name them")
    if "classes" not in prompt.inputs and classes:
        raise PromptInputError("classes", f"{prompt.ref} reads no classes")
    if len(set(classes)) < len(classes):
        raise PromptInputError("classes", "a class is named twice")
    known = set(prompt.variables)
    needed = known - set(prompt.defaults) - set(variables)
    for node, given in ((None, variables), *enumerate(own)):
        if unknown := sorted(set(given) - known):
            message = f"{prompt.ref} has no variable {unknown[0]!r:.40}"
            raise PromptInputError("variables", message, node)
    for node, given in enumerate(own):
        if missing := sorted(needed - set(given)):
            message = f"{prompt.ref} needs the variable {missing[0]!r}"
            raise PromptInputError("variables", message, node if any(own) else None)


def most_repair_tokens(num_prompt_tokens: int, max_tokens: int) -> int:
    """Of a repairing call: prompt, broken answer, request, answer. One that takes more is not made."""
    return num_prompt_tokens + 2 * max_tokens + MAX_REPAIR_TOKENS


def most_tokens(prompt: Prompt, num_prompt_tokens: int, max_tokens: int) -> int:
    """That the calls for one answer may take."""
    first = num_prompt_tokens + max_tokens
    if prompt.output["type"] == "text":
        return first
    return first + most_repair_tokens(num_prompt_tokens, max_tokens)


def constraint_of(prompt: Prompt, classes: Sequence[str], share: float = 1.0) -> Constraint | None:
    """What the engine is to keep the answer to, with a share of the strings' lengths; None for text."""
    if prompt.output["type"] == "text":
        return None
    schema = shorten(with_classes(prompt.output["schema"], classes), share)
    return Constraint(kind="json_schema", text=json.dumps(schema))


def parse_answer(
    prompt: Prompt, written: str, classes: Sequence[str], *, shown_labels: Sequence[str] = ()
) -> Answer:
    """Raises: InvalidAnswerError: no JSON, or not of the prompt's schema."""
    names = (*classes, *shown_labels)
    if prompt.output["type"] == "text":
        return Answer(text=_without_labels(prompt, read_answer(written), names))
    try:
        fields = json.loads(written)
    except ValueError:
        raise InvalidAnswerError("it is not complete JSON") from None
    fault = find_fault(fields, with_classes(prompt.output["schema"], classes))
    if fault is not None:
        raise InvalidAnswerError(fault)
    parts = [_as_text(fields[name]) for name in prompt.output["text"]]
    text = "\n".join(part for part in parts if part)
    text = _without_labels(prompt, text, names)
    return Answer(text=text, label=_label(fields, prompt.output.get("label")), fields=fields)


def repair_messages(messages: Sequence[Message], written: str, fault: str) -> list[Message]:
    return [
        *messages,
        {"role": "assistant", "content": written[:MAX_SHOWN_CHARS]},
        {"role": "user", "content": _REPAIR.format(fault=fault)},
    ]


def _without_labels(prompt: Prompt, text: str, names: Sequence[str]) -> str:
    """What is encoded: an LLM that knows the classes, or labels of neighbours, may have stated one."""
    reads_labels = {"classes", "neighbor_labels"} & set(prompt.inputs)
    return strip_label_statements(text, names) if reads_labels else text


def _as_text(value: Any) -> str:
    """A list one line per item, each once; an object its values after one another: "term: meaning"."""
    if isinstance(value, list):
        return "\n".join(dict.fromkeys(map(_as_text, value)))
    if isinstance(value, dict):
        return ": ".join(map(_as_text, value.values()))
    return value.strip() if isinstance(value, str) else json.dumps(value)


def _label(fields: dict[str, Any], name: str | None) -> str | None:
    if name is None:
        return None
    value = fields[name]
    if isinstance(value, list):
        return str(value[0]) if value else None
    return str(value)


_SENTENCE_END = re.compile(r"(?<=[.!?;])\s+|\n+")
_ABBREVIATION = re.compile(r"\b(?:e\.g|i\.e|cf|vs|et al)\.\Z", re.IGNORECASE)
"""Ends no sentence."""
_NUMBER = re.compile(r"\W*(?:\d{1,2}|[a-z])[.):]\W*", re.IGNORECASE)
"""Of a list's item, alone."""
_ITEM = r"[\W_]*(?:(?:\d{1,2}|[a-z])[.):][\W_]*)?"
"""What may stand before a sentence: markup, and such a number."""
_HEAD = re.compile(
    rf"{_ITEM}(?:(?:the|my|final|best|predicted|likeliest|most likely|correct)\s+)*"
    r"(?:answer|label|category|class|classification|prediction)(?:s|es)?\s*(?:[:=–—-]|is\b|are\b|would\b)",
    re.IGNORECASE,
)
"""Begins a sentence that states a label, whatever follows."""
_FRAME = re.compile(
    r"\b(?:labels?|labell?ed|categor\w+|class(?:es|if\w+)?|belongs?|falls?|fit(?:s|ted|ting)?|answer|choice|"
    r"predict(?:ed|ion)|assign(?:s|ed)?)\b",
    re.IGNORECASE,
)
"""Makes a sentence that names a class a statement of it."""
_FILLER = {
    "a",
    "also",
    "an",
    "and",
    "are",
    "is",
    "it",
    "likely",
    "most",
    "or",
    "possibly",
    "the",
    "this",
}
_HEDGE = (
    r"(?:(?:most|more|very|quite)[\W_]+)?(?:likel(?:y|iest)|probably|possibly|presumably)[\W_]+"
)
_SHORT = r"\((?-i:[A-Z]{2,6}s?)\)"
_VERDICT = rf"""(?:\s*{_SHORT})?[*_`~"'”’)\]]*(?:
    \s*(?:$ | [.,:;!?=/—] | (?!{_SHORT})\()
  | \s+[-–] | [-–]\s
  | \s+(?:\d | since\b | because\b)
  | \s+(?:is|are|was|were)\s+(?:chosen|picked|selected)\b
  | \s+(?:is|are|was|were|seems?|appears?|would\s+be)\s+(?:to\s+be\s+)?(?:clearly\s+)?(?:the|my|a|an)\s+
    (?:\w+\s+)?(?:right|best|better|correct|likel\w+|closest|appropriate|suitable|obvious|natural|choice|answer)\b
)"""
"""Behind a class's name that begins a sentence, and maybe its abbreviation: that it states a label."""
_CHOICE = r"""(?:
    choos\w+ | chosen? | pick(?:s|ed)? | select(?:s|ed)?
  | (?:go(?:es)?|put|filed?|sort(?:ed)?)[\W_]+(?:(?:it|this|that)[\W_]+)?(?:under|into|in|with)
)[\W_]+(?:(?:the|this|that|it|paper|text|node|is|be|as|for|to)[\W_]+)*"""
"""Before a class's name: that it is chosen."""


def strip_label_statements(text: str, classes: Sequence[str]) -> str:
    """The text without the sentences that state a label; rather one too many than one too few.

    A sentence goes if it begins as a statement of the label ("Answer: ..."), or with a class as a verdict ("Theory:
    ...", "Most likely theory", "Theory is the best ..."), if it names a class as what is chosen, or names one and
    speaks of classes or belonging, or if it is nothing but names of classes. One that only uses a class's words for
    its topic stays.
    """
    names = [name for name in dict.fromkeys(map(_words, classes)) if name]
    kept: list[str] = []
    for sentence in _sentences(text):
        if not _states_label(sentence, names):
            kept.append(sentence)
        elif kept and _NUMBER.fullmatch(kept[-1]):
            kept.pop()  # its own
    return " ".join(kept)


def _sentences(text: str) -> list[str]:
    sentences: list[str] = []
    for piece in filter(None, map(str.strip, _SENTENCE_END.split(text))):
        if sentences and _ABBREVIATION.search(sentences[-1]):
            sentences[-1] += f" {piece}"
        else:
            sentences.append(piece)
    return sentences


def _states_label(sentence: str, names: Sequence[str]) -> bool:
    if _HEAD.match(sentence):
        return True
    words = f" {_words(sentence)} "
    named = [name for name in names if f" {name} " in words]
    if not named:
        return False
    if _FRAME.search(sentence) or _verdict(tuple(named)).search(sentence):
        return True
    for name in sorted(named, key=len, reverse=True):
        words = words.replace(f" {name} ", "  ")
    return all(word in _FILLER or word.isdigit() for word in words.split())


@lru_cache(maxsize=64)
def _verdict(names: tuple[str, ...]) -> re.Pattern[str]:
    """Finds in a sentence one of these names, as `_words` makes them, as what begins a verdict or what is chosen."""
    spelled = (r"[\W_]+".join(map(re.escape, name.split())) for name in names)
    name = rf"(?:{'|'.join(spelled)})"
    listed = rf"{name}(?:\s*(?:\band\b|\bor\b|/|&)\s*{name})*"
    begins = rf"\A{_ITEM}(?:{_HEDGE}{name}(?![^\W_])|{listed}{_VERDICT})"
    chosen = rf"(?<![^\W_]){_CHOICE}{name}(?![^\W_])"
    return re.compile(rf"{begins}|{chosen}", re.IGNORECASE | re.VERBOSE)


def _words(text: str) -> str:
    """Lower-case words with single spaces: "Neural_Networks" and "neural networks" are the same name."""
    return " ".join(re.split(r"[\W_]+", text.lower())).strip()


def training_labels(
    graph: Graph, indices: Sequence[int] | npt.NDArray[Any]
) -> tuple[str | None, ...]:
    """Labels of those nodes that are in the training split; None for all others."""
    labels = graph.training_labels(indices).to_pylist()
    return tuple(None if label is None else str(label) for label in labels)


def training_classes(graph: Graph) -> tuple[str, ...]:
    """The distinct labels of the training split, sorted; a class that only others have is not among them."""
    labels = graph.training_labels().drop_null().unique().to_pylist()
    return tuple(str(label) for label in sorted(labels))
