"""Renders a model's own chat template in a sandbox, and keeps apart what the template wrote and what a user did.

Conventions are transformers': trimmed blocks, `raise_exception`, `strftime_now`, `tojson`, loop controls. A request cannot
bring a template. Contents are rendered as unguessable placeholders and put back afterwards as untrusted segments, so a message
that spells `<|im_end|>` stays text. A template that transforms contents (other than trimming) would lose a placeholder;
that is noticed and refused.
"""

import json
import re
import secrets
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.exceptions import SecurityError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engines.text import Segment, read_json

MAX_OUTPUT_CHARS = 4 * 2**20
MAX_CALLS = 200_000
MAX_SECONDS = 5.0


class ChatTemplateError(Exception):
    """The template refused the messages, or is not one that can be rendered safely."""


class _Environment(ImmutableSandboxedEnvironment):
    """Stops templates that loop: every attribute look-up and call of a rendering is counted."""

    intercepted_binops = frozenset({"*", "**", "+", "%", "//", "/", "-"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        self._local = threading.local()
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": lambda form: datetime.now().strftime(str(form)),
        }
        self.filters["tojson"] = _tojson

    def begin(self) -> None:
        self._local.calls = 0

    def _count(self) -> None:
        self._local.calls = getattr(self._local, "calls", 0) + 1
        if self._local.calls > MAX_CALLS:
            raise SecurityError("the template does too much")

    def call(self, *args: Any, **kwargs: Any) -> Any:
        self._count()
        return super().call(*args, **kwargs)

    def getattr(self, obj: Any, attribute: str) -> Any:
        self._count()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        self._count()
        return super().getitem(obj, argument)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self._count()
        if operator in ("*", "**") and not _is_small(left, right):
            raise SecurityError("the template makes a value that is too large")
        return super().call_binop(context, operator, left, right)


def _is_small(left: Any, right: Any) -> bool:
    sizes = [abs(v) if isinstance(v, int | float) else len(v) for v in (left, right)]
    return sizes[0] * sizes[1] <= 10_000 or all(isinstance(v, float) for v in (left, right))


def _raise_exception(message: str) -> NoReturn:
    raise ChatTemplateError(str(message)[:300])


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatTemplate:
    """A template, compiled, and the special tokens that it may name.

    Attributes:
        source: the template's text.
    """

    source: str
    special_tokens: Mapping[str, str]

    def render(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True
    ) -> list[Segment]:
        """Render messages of {"role", "content"} into segments.

        Raises:
            ChatTemplateError: the template refuses them, breaks, does too much, or changes contents.
        """
        mark = secrets.token_hex(16)
        contents: list[str] = []
        marked = []
        for message in messages:
            marked.append({**message, "content": f"{mark}:{len(contents)}:"})
            contents.append(message["content"])
        environment = _environment()
        environment.begin()
        try:
            text = ""
            stream = environment.from_string(self.source).generate(
                messages=marked,
                add_generation_prompt=add_generation_prompt,
                **self.special_tokens,
            )
            for piece in stream:
                text += piece
                if len(text) > MAX_OUTPUT_CHARS:
                    raise ChatTemplateError("the rendered chat is too long")
        except ChatTemplateError:
            raise
        except (TemplateError, TypeError, ValueError, LookupError, OverflowError) as error:
            raise ChatTemplateError(f"the chat template failed: {type(error).__name__}") from error
        return _segments(text, mark, contents)


_lock = threading.Lock()
_shared: _Environment | None = None


def _environment() -> _Environment:
    """One environment for all threads: it caches compiled templates and keeps its count per thread."""
    global _shared
    with _lock:
        if _shared is None:
            _shared = _Environment()
        return _shared


def _segments(text: str, mark: str, contents: list[str]) -> list[Segment]:
    segments: list[Segment] = []
    seen: set[int] = set()
    position = 0
    for match in re.finditer(rf"{mark}:(\d+):", text):
        _append(segments, text[position : match.start()], trusted=True)
        index = int(match.group(1))
        seen.add(index)
        _append(segments, contents[index], trusted=False)
        position = match.end()
    _append(segments, text[position:], trusted=True)
    if mark in "".join(s.text for s in segments if s.trusted) or len(seen) != len(contents):
        raise ChatTemplateError("the model's chat template does not use every message as it is")
    return segments


def _append(segments: list[Segment], text: str, *, trusted: bool) -> None:
    if text:
        segments.append(Segment(text, trusted))


def load_chat_template(folder: Path) -> ChatTemplate | None:
    """The chat template of a checkpoint; None where it has none (a base model, an encoder)."""
    config = read_json(folder / "tokenizer_config.json")
    path = folder / "chat_template.jinja"
    source = path.read_text(encoding="utf-8") if path.is_file() else config.get("chat_template")
    if not isinstance(source, str):
        return None
    tokens = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            tokens[name] = value
    return ChatTemplate(source=source, special_tokens=tokens)
