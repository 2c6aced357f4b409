"""The prompt catalog: what a prompt is, and how node texts get into it.

`prompts/<id>.v<version>.yaml` is one version of one shipped prompt; a published file is never edited, a change is a new
version. Users register their own (`user_prompts.py`) by the same rules. A template is text with places: `{name}` is
replaced by the input of that name, in one pass of plain substitution, and there is nothing else to write in it; what a
prompt does not declare as an input it cannot read. Inputs are not trusted: each stands between marks (`<text>` and
`</text>`), which are taken out of what is put there, and each node is a request of its own, so that what is written in
one node can mislead that node's answer only.

A prompt asks for text, or for JSON by a schema (`output_schema.py`); `generation.py` has the LLM answer it.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import resources
from typing import Any

import yaml

from graph.output_schema import SchemaError, check_schema, uses_classes

NODE_INPUTS = ("text", "neighbors", "neighbor_labels", "classes")
"""Inputs that come from the node, its graph or the request; every other name is a variable of the request."""
PROMPT_ID_PATTERN = r"^[a-z][a-z0-9_]{0,63}$"
_PROMPT_ID = re.compile(r"[a-z][a-z0-9_]{0,63}\Z")
_VARIABLE = re.compile(r"[a-z][a-z0-9_]{0,31}\Z")
MAX_PROMPT_TOKENS = 8192
MAX_NEIGHBORS_READ = 64
MAX_ANSWER_TOKENS = 1024
Message = dict[str, str]

_FIELDS = {
    "id", "version", "kind", "description", "inputs", "max_tokens", "max_text_tokens",
    "max_neighbors", "max_neighbor_tokens", "output", "messages",
}  # fmt: skip
_PLACE = re.compile(r"\{([a-z][a-z0-9_]{0,31})\}")


class PromptNotFoundError(KeyError):
    """The catalog has no such prompt or version."""


class PromptError(ValueError):
    """Not a prompt. Attributes: param: the field at fault."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(f"{param}: {message}")
        self.param = param
        self.message = message


class PromptFileError(ValueError):
    """A file of the catalog is not a prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One version of one prompt.

    Attributes:
        inputs: what it reads; nothing else of the node or the request is looked at. `neighbor_labels` has no place of
            its own: it puts the label, where there is one, before each neighbour's text.
        defaults: of variables that a request need not give.
        max_tokens: most tokens of an answer, where the request gives no number.
        max_text_tokens: how much of a text it reads.
        max_neighbors, max_neighbor_tokens: the same for neighbours; 0 where it reads none.
        output: {"type": "text"}, or {"type": "json", "schema", "text", "label"?}: `text` names the fields that are
            encoded, `label` the one that holds the chosen class or classes, best first.
        hash: sha256 of all that shapes an answer: everything but the description.
    """

    id: str
    version: int
    kind: str
    description: str
    inputs: tuple[str, ...]
    max_tokens: int
    max_text_tokens: int
    max_neighbors: int
    max_neighbor_tokens: int
    output: dict[str, Any]
    messages: tuple[Message, ...]
    hash: str
    defaults: dict[str, str] = field(default_factory=dict)

    @property
    def ref(self) -> str:
        return f"{self.id}@{self.version}"

    @property
    def variables(self) -> tuple[str, ...]:
        """Inputs that the request gives by name."""
        return tuple(name for name in self.inputs if name not in NODE_INPUTS)

    def fill(
        self,
        text: str,
        neighbors: Sequence[str] = (),
        *,
        neighbor_labels: Sequence[str | None] = (),
        classes: Sequence[str] = (),
        variables: Mapping[str, str] | None = None,
    ) -> list[Message]:
        """Chat messages about one node. Every variable without a default must be given."""
        mark = _mark(self.inputs)
        if "neighbor_labels" not in self.inputs:
            neighbor_labels = ()
        values = {
            "text": mark.sub("‹", text),
            "neighbors": _listed(neighbors, neighbor_labels, mark),
            "classes": "\n".join(_one_line(name, mark) for name in classes),
        }
        given = {**self.defaults, **(variables or {})}
        values |= {name: mark.sub("‹", given[name]) for name in self.variables}
        return [
            {**message, "content": _PLACE.sub(lambda m: values[m.group(1)], message["content"])}
            for message in self.messages
        ]


def read_answer(text: str) -> str:
    """An answer without the marks of its prompt: a small model may go on by closing, or opening, the text again."""
    return _mark(()).split(text.strip().removeprefix("<text>"), maxsplit=1)[0].strip()


@lru_cache(maxsize=256)
def _mark(inputs: tuple[str, ...]) -> re.Pattern[str]:
    """The beginning of a mark of one of these inputs; `text` and `neighbors` are always among them."""
    names = "|".join(sorted({"text", "neighbors", *inputs}))
    return re.compile(rf"<(?=\s*/?\s*(?:{names})\b)", re.IGNORECASE)


def _one_line(text: str, mark: re.Pattern[str]) -> str:
    return " ".join(mark.sub("‹", text).split())


def _listed(texts: Sequence[str], labels: Sequence[str | None], mark: re.Pattern[str]) -> str:
    """Numbered lines; a line break in a text cannot fake an entry."""
    lines = []
    for index, text in enumerate(texts):
        label = labels[index] if index < len(labels) else None
        shown = "" if label is None else f"({_one_line(label, mark)}) "
        lines.append(f"{index + 1}. {shown}{_one_line(text, mark)}")
    return "\n".join(lines)


class Catalog:
    """Prompts by id and version."""

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self._by_ref = {prompt.ref: prompt for prompt in prompts}
        if len(self._by_ref) < len(prompts):
            raise PromptFileError("two prompts have one id and version")
        self._newest: dict[str, Prompt] = {}
        for prompt in sorted(prompts, key=lambda prompt: prompt.version):
            self._newest[prompt.id] = prompt

    def prompts(self) -> list[Prompt]:
        """The newest version of every prompt, by id."""
        return [self._newest[name] for name in sorted(self._newest)]

    def versions(self, prompt_id: str) -> list[int]:
        return sorted(p.version for p in self._by_ref.values() if p.id == prompt_id)

    def get(self, ref: str) -> Prompt:
        """The prompt "id@version", or the newest version of "id".

        Raises:
            PromptNotFoundError
        """
        prompt = self._by_ref.get(ref) or self._newest.get(ref)
        if prompt is None:
            raise PromptNotFoundError(ref)
        return prompt


@lru_cache(maxsize=1)
def default_catalog() -> Catalog:
    """The catalog that is shipped, read once."""
    folder = resources.files("graph") / "prompts"
    files = sorted(
        (item for item in folder.iterdir() if item.name.endswith(".yaml")),
        key=lambda item: item.name,
    )
    return Catalog([parse_prompt(item.name, item.read_text(encoding="utf-8")) for item in files])


def parse_prompt(file_name: str, source: str) -> Prompt:
    """Raises: PromptFileError: not a prompt, or not the one that its name says."""
    data = yaml.safe_load(source)
    if not isinstance(data, dict) or set(data) - {"defaults"} != _FIELDS:
        odd = sorted(_FIELDS.symmetric_difference(data if isinstance(data, dict) else ()))
        raise PromptFileError(f"{file_name}: missing or unknown fields {odd}")
    if file_name != f"{data['id']}.v{data['version']}.yaml":
        raise PromptFileError(f"{file_name}: must be named {data['id']}.v{data['version']}.yaml")
    try:
        return build_prompt(data)
    except PromptError as error:
        raise PromptFileError(f"{file_name}: {error}") from error


def build_prompt(data: dict[str, Any]) -> Prompt:
    """A prompt from its fields, which are all there and of their types.

    Raises:
        PromptError: names the field at fault.
    """
    if not _PROMPT_ID.match(data["id"]):
        raise PromptError("id", f"must match {PROMPT_ID_PATTERN}")
    _check_numbers(data)
    _check_inputs(data)
    _check_places(data)
    _check_output(data)
    body = {key: value for key, value in data.items() if key != "description"}
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return Prompt(
        **{**data, "inputs": tuple(data["inputs"]), "messages": tuple(data["messages"])},
        hash=hashlib.sha256(canonical.encode()).hexdigest(),
    )


def _check_numbers(data: dict[str, Any]) -> None:
    limits = {
        "version": (1, 10**6),
        "max_tokens": (1, MAX_ANSWER_TOKENS),
        "max_text_tokens": (1, MAX_PROMPT_TOKENS),
        "max_neighbors": (0, MAX_NEIGHBORS_READ),
        "max_neighbor_tokens": (0, MAX_PROMPT_TOKENS),
    }
    for name, (low, high) in limits.items():
        if type(data[name]) is not int or not low <= data[name] <= high:
            raise PromptError(name, f"must be an integer from {low} to {high}, got {data[name]!r}")


def _check_inputs(data: dict[str, Any]) -> None:
    inputs: list[str] = data["inputs"]
    for name in inputs:
        if not _VARIABLE.match(name):
            raise PromptError("inputs", f"a name matches {_VARIABLE.pattern}, got {name[:40]!r}")
    if len(set(inputs)) < len(inputs) or "text" not in inputs:
        raise PromptError("inputs", "must name text, and nothing twice")
    if "neighbor_labels" in inputs and "neighbors" not in inputs:
        raise PromptError("inputs", "neighbor_labels needs neighbors")
    for limit in ("max_neighbors", "max_neighbor_tokens"):
        if ("neighbors" in inputs) != (data[limit] > 0):
            raise PromptError(limit, "is above 0 exactly where neighbors are read")
    unknown = set(data.get("defaults", ())) - (set(inputs) - set(NODE_INPUTS))
    if unknown:
        raise PromptError("defaults", f"are of variables among the inputs, got {sorted(unknown)}")


def _check_places(data: dict[str, Any]) -> None:
    """The places in the messages are the inputs, each once, between its marks."""
    places: list[str] = []
    for index, message in enumerate(data["messages"]):
        if set(message) != {"role", "content"} or message["role"] not in ("system", "user"):
            raise PromptError(f"messages[{index}]", "has a role (system, user) and a content")
        names = _PLACE.findall(message["content"])
        places += names
        for name in names:
            if not re.search(rf"<{name}>\s*\{{{name}\}}\s*</{name}>", message["content"]):
                raise PromptError(
                    f"messages[{index}]", f"{{{name}}} must stand between <{name}> and </{name}>"
                )
    wanted = [name for name in data["inputs"] if name != "neighbor_labels"]
    if sorted(places) != sorted(wanted):
        raise PromptError("messages", f"the places are {places}, the inputs {wanted}")
    if data["messages"][-1]["role"] != "user":
        raise PromptError("messages", "the last one is the user's")


def _check_output(data: dict[str, Any]) -> None:
    output = data["output"]
    if output == {"type": "text"}:
        return
    if output.get("type") != "json" or set(output) - {"label"} != {"type", "schema", "text"}:
        raise PromptError("output", "must be type text, or type json with schema, text and label?")
    try:
        check_schema(output["schema"])
    except SchemaError as error:
        raise PromptError("output.schema", str(error)) from error
    properties = output["schema"]["properties"]
    if not isinstance(output["text"], list) or not set(output["text"]) <= set(properties):
        raise PromptError("output.text", f"must list properties of the schema: {list(properties)}")
    if "label" in output and output["label"] not in properties:
        raise PromptError("output.label", f"must be a property of the schema: {list(properties)}")
    if output.get("label") in output["text"]:
        raise PromptError("output.text", "the label is a field of its own: it is never encoded")
    if uses_classes(output["schema"]) and "classes" not in data["inputs"]:
        raise PromptError("output.schema", "$classes needs classes among the inputs")
