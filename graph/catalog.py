"""The prompt catalog: what a prompt file holds, and how node texts get into it.

`prompts/<id>.v<version>.yaml` is one version of one prompt; a published file is never edited, a change is a new
version. A request names prompts and cannot bring one. Node and neighbour texts are not trusted: they are put in by
one pass of plain substitution, after the marks that end a text are taken out of them, and each node is a request of
its own, so that what is written in one node can mislead that node's answer only.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Any, Literal

import yaml

InputField = Literal["text", "neighbors"]
INPUT_FIELDS: tuple[InputField, ...] = ("text", "neighbors")
Message = dict[str, str]

_FIELDS = {
    "id", "version", "kind", "description", "inputs", "max_tokens", "max_text_tokens",
    "max_neighbors", "max_neighbor_tokens", "output", "messages",
}  # fmt: skip
_PLACE = re.compile(r"\{(text|neighbors)\}")
_MARK = re.compile(r"<(?=\s*/?\s*(?:text|neighbors)\b)", re.IGNORECASE)


class PromptNotFoundError(KeyError):
    """The catalog has no such prompt or version."""


class PromptFileError(ValueError):
    """A file of the catalog is not a prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One version of one prompt.

    Attributes:
        inputs: what it reads of a node; the rest of the node is not looked at.
        max_tokens: most tokens of an answer, where the request gives no number.
        max_text_tokens: the head of a text that it reads.
        max_neighbors, max_neighbor_tokens: the same for neighbours; 0 where it reads none.
        output: schema of the answer; only {"type": "text"} today.
        hash: sha256 of all that shapes an answer: everything but the description.
    """

    id: str
    version: int
    kind: str
    description: str
    inputs: tuple[InputField, ...]
    max_tokens: int
    max_text_tokens: int
    max_neighbors: int
    max_neighbor_tokens: int
    output: dict[str, Any]
    messages: tuple[Message, ...]
    hash: str

    @property
    def ref(self) -> str:
        return f"{self.id}@{self.version}"

    def fill(self, text: str, neighbors: Sequence[str] = ()) -> list[Message]:
        """Chat messages about one node."""
        listed = "\n".join(
            f"{number}. {' '.join(_clean(neighbor).split())}"
            for number, neighbor in enumerate(neighbors, start=1)
        )
        values = {"text": _clean(text), "neighbors": listed}
        return [
            {**message, "content": _PLACE.sub(lambda m: values[m.group(1)], message["content"])}
            for message in self.messages
        ]


def read_answer(text: str) -> str:
    """An answer without the marks of its prompt: a small model may go on by closing, or opening, the text again."""
    return _MARK.split(text.strip().removeprefix("<text>"), maxsplit=1)[0].strip()


def _clean(text: str) -> str:
    """Text that cannot end the marks it stands between."""
    return _MARK.sub("‹", text)


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
    if not isinstance(data, dict) or set(data) != _FIELDS:
        odd = sorted(_FIELDS.symmetric_difference(data if isinstance(data, dict) else ()))
        raise PromptFileError(f"{file_name}: missing or unknown fields {odd}")
    if file_name != f"{data['id']}.v{data['version']}.yaml":
        raise PromptFileError(f"{file_name}: must be named {data['id']}.v{data['version']}.yaml")
    _check_messages(file_name, data)
    if data["output"] != {"type": "text"}:
        raise PromptFileError(f"{file_name}: output must be type text, got {data['output']}")
    body = {key: value for key, value in data.items() if key != "description"}
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return Prompt(
        **{**data, "inputs": tuple(data["inputs"]), "messages": tuple(data["messages"])},
        hash=hashlib.sha256(canonical.encode()).hexdigest(),
    )


def _check_messages(file_name: str, data: dict[str, Any]) -> None:
    """The places in the messages are the inputs that the file declares, each once, between its marks."""
    places: list[str] = []
    for message in data["messages"]:
        if set(message) != {"role", "content"} or message["role"] not in ("system", "user"):
            raise PromptFileError(f"{file_name}: a message has a role (system, user) and content")
        places += _PLACE.findall(message["content"])
        for name in _PLACE.findall(message["content"]):
            if not re.search(rf"<{name}>\s*\{{{name}\}}\s*</{name}>", message["content"]):
                raise PromptFileError(f"{file_name}: {{{name}}} must stand between its marks")
    if sorted(places) != sorted(data["inputs"]):
        raise PromptFileError(f"{file_name}: inputs {data['inputs']}, places {places}")
    limits = (data["max_neighbors"], data["max_neighbor_tokens"])
    if {"neighbors" in places} != {limit > 0 for limit in limits}:
        raise PromptFileError(f"{file_name}: neighbour limits are for prompts that read neighbours")
