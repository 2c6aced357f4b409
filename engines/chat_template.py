"""Renders a model's own chat template in a sandbox, and keeps apart what the template wrote and what a user did.

Conventions are transformers' (5.23, `apply_chat_template`): trimmed blocks, loop controls, `raise_exception`,
`strftime_now`, `tojson`, the `generation` tag. A request cannot bring a template. A control token spelled in a message
is marked, before rendering, with a character that occurs nowhere else; so the template sees contents as they are but
for that, and what comes out marked stays text.
"""

import functools
import itertools
import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from engines.text import Segment, control_pattern, find_control_tokens, read_json

MAX_OUTPUT_CHARS = 8 * 2**20
MAX_STEPS = 500_000
"""Loop iterations, calls, look-ups and operations of one rendering."""
MAX_SECONDS = 5.0
MAX_WIDTH = 10_000
"""Largest number that a template may give to `range`, and to filters and methods that pad, repeat or split."""
SPECIAL_TOKEN_NAMES = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip
# Without private-use characters, one of which is the mark.
_MARKUP = re.compile(r"<[^<>\s\U000f0000-\U0010ffff]{1,64}>|\[[A-Z_/]{1,32}\]")
_BEGUN_MARKUP = re.compile(r"(?:<[^<>\s]{0,64}|\[[A-Z_/]{0,32})\Z")
_WIDTH_METHODS = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs"})
_WIDTH_FILTERS = ("center", "indent", "batch", "slice", "wordwrap", "round")


class ChatTemplateError(Exception):
    """The template refused the messages, broke, or does too much. The message is safe to show."""


class ChatTemplate:
    """A checkpoint's template. Thread-safe; compiled when first used.

    Args:
        source: the template's text.
        special_tokens: variables such as `bos_token`.
        control_tokens: spellings that must not come out of a message as control tokens; None, where they are not
            known, takes whatever looks like one (`<|end|>`, `[INST]`).
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str] | None = None,
        control_tokens: Iterable[str] | None = None,
    ) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens or {})
        self._control_tokens = None if control_tokens is None else tuple(control_tokens)
        self._pattern = (
            _MARKUP if self._control_tokens is None else control_pattern(self._control_tokens)
        )

    @functools.cached_property
    def _template(self) -> Any:
        try:
            return _environment().from_string(self.source)
        except (TemplateError, RecursionError) as error:
            raise ChatTemplateError(
                f"the model's chat template does not compile: {type(error).__name__}"
            ) from error

    def render(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True
    ) -> list[Segment]:
        """Render messages of {"role", "content"}; roles must be ours, contents may be anybody's.

        Joined, the segments are what transformers renders.

        Raises:
            ChatTemplateError
        """
        mark = _unused_character([self.source, *(message["content"] for message in messages)])
        marked = [{**m, "content": self._mark(m["content"], mark)} for m in messages]
        text = self._render(marked, add_generation_prompt)
        if mark not in text or self._pattern is None:
            return [Segment(text.replace(mark, ""), trusted=True)]
        segments: list[Segment] = []
        position = 0
        for match in self._pattern.finditer(text):
            _append(segments, text[position : match.start()].replace(mark, ""), trusted=False)
            _append(segments, match[0], trusted=True)
            position = match.end()
        _append(segments, text[position:].replace(mark, ""), trusted=False)
        return segments

    def _mark(self, content: str, mark: str) -> str:
        """Break every control token's spelling, and one that only begins at the end, where the template goes on."""
        if self._pattern is None:
            return content
        content = self._pattern.sub(lambda match: match[0][0] + mark + match[0][1:], content)
        body = content.rstrip()
        if self._control_tokens is None:
            begins = bool(_BEGUN_MARKUP.search(body))
        else:
            begins = any(
                body.endswith(token[:length])
                for token in self._control_tokens
                for length in range(1, len(token))
            )
        return body + mark + content[len(body) :] if begins else content

    def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        pieces: list[str] = []
        length = 0
        template = self._template
        _budget.begin()
        try:
            for piece in template.generate(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            ):
                length += len(piece)
                _check_size(length)
                pieces.append(piece)
        except ChatTemplateError:
            raise
        except SecurityError as error:
            raise ChatTemplateError(f"the model's chat template was stopped: {error}") from error
        except (
            TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError,
            RecursionError, MemoryError,
        ) as error:  # fmt: skip
            reason = type(error).__name__
            raise ChatTemplateError(f"the model's chat template failed: {reason}") from error
        return "".join(pieces)


def _append(segments: list[Segment], text: str, *, trusted: bool) -> None:
    if text:
        segments.append(Segment(text, trusted))


def _unused_character(texts: Sequence[str]) -> str:
    """A private-use character that is in none of the texts."""
    used = {char for text in texts if not text.isascii() for char in text if char >= "\U000f0000"}
    return next(c for c in map(chr, itertools.count(0xF0000)) if c not in used)


class _Budget(threading.local):
    """What the rendering on this thread may still do."""

    steps = 0
    deadline = 0.0

    def begin(self) -> None:
        self.steps = 0
        self.deadline = time.monotonic() + MAX_SECONDS

    def spend(self) -> None:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise SecurityError(f"more than {MAX_STEPS} steps")
        if self.steps % 256 == 0 and time.monotonic() > self.deadline:
            raise SecurityError(f"more than {MAX_SECONDS:g} seconds")


_budget = _Budget()


class _GenerationTag(Extension):
    """`{% generation %}` marks an assistant's turn for training; here its body is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(Namespace):
    """Refuses the attributes that lead to Python's insides, as transformers does."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _check_attribute(name)
        Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError("a namespace attribute begins with an underscore")


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, and every loop iteration, look-up, call and operation counted, every growth of a string bounded."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
        )
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": lambda form: datetime.now().strftime(str(form)[:MAX_WIDTH]),
            "range": _small_range,
            "dict": lambda *args, **kwargs: dict(*args, **kwargs),
            "namespace": _Namespace,
        }
        del self.globals["lipsum"]  # as much text as it is asked for, in one call
        self.filters |= {
            "tojson": _tojson,
            "_counted": _counted,
            "_sized": _sized,
            **{name: _with_small_numbers(self.filters[name]) for name in _WIDTH_FILTERS},
            "format": _format,
            "replace": _with_small_product(self.filters["replace"]),
            "join": _with_small_product(self.filters["join"]),
        }

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = super()._parse(source, name, filename)
        for loop in list(template.find_all(nodes.For)):
            loop.iter = _filtered(loop.iter, "_counted")
        for parent in list(template.find_all(nodes.Node)):
            _wrap_concatenations(parent)
        return template

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        _budget.spend()
        owner = getattr(obj, "__self__", None)
        if isinstance(owner, str):
            method = getattr(obj, "__name__", "")
            if method in _WIDTH_METHODS:
                _check_numbers(args, kwargs)
            elif method in ("format", "format_map"):
                _check_format(owner)
            elif method in ("replace", "join", "translate"):
                _check_product(owner, args, kwargs)
        return super().call(context, obj, *args, **kwargs)

    def getattr(self, obj: Any, attribute: str) -> Any:
        _budget.spend()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        _budget.spend()
        return super().getitem(obj, argument)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _budget.spend()
        if operator in ("*", "**"):
            _check_growth(left, right)
        if operator == "%" and isinstance(left, str):
            return _format(left, *(right if isinstance(right, tuple) else (right,)))
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, str | list | tuple):
            _check_size(len(result))
        return result


def _filtered(node: nodes.Node, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _wrap_concatenations(parent: nodes.Node) -> None:
    """Check the size of every `a ~ b`; the sandbox cannot intercept it."""
    for field, value in parent.iter_fields():
        if isinstance(value, nodes.Concat):
            setattr(parent, field, _filtered(value, "_sized"))
        elif isinstance(value, list):
            value[:] = [
                _filtered(item, "_sized") if isinstance(item, nodes.Concat) else item
                for item in value
            ]


@pass_context
def _counted(_: Any, items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        _budget.spend()
        yield item


@pass_context
def _sized(_: Any, value: Any) -> Any:
    _budget.spend()
    _check_size(len(value))
    return value


def _check_size(length: int) -> None:
    if length > MAX_OUTPUT_CHARS:
        raise SecurityError(f"a text of more than {MAX_OUTPUT_CHARS} characters")


def _check_numbers(args: Iterable[Any], kwargs: Mapping[str, Any]) -> None:
    for value in [*args, *kwargs.values()]:
        if isinstance(value, int) and abs(value) > MAX_WIDTH:
            raise SecurityError(f"a number above {MAX_WIDTH}")


def _check_product(owner: Any, args: Iterable[Any], kwargs: Mapping[str, Any]) -> None:
    """The result of replacing or joining is at most about this long."""
    sizes = [len(v) for v in [*args, *kwargs.values()] if isinstance(v, str | list | tuple)]
    _check_size((len(owner) + 1) * max(sizes, default=0))


def _check_growth(left: Any, right: Any) -> None:
    """Bound `text * n`, `n ** m` and their like."""
    if isinstance(left, float) or isinstance(right, float):
        return
    sizes = [abs(v) if isinstance(v, int) else len(v) for v in (left, right)]
    if sizes[0] * sizes[1] > MAX_WIDTH * MAX_WIDTH or (
        not all(isinstance(v, int) for v in (left, right)) and sizes[0] * sizes[1] > MAX_WIDTH
    ):
        raise SecurityError("a value that is too large")


def _with_small_numbers(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        _check_numbers(args, kwargs)
        return function(*args, **kwargs)

    return checked


def _with_small_product(function: Callable[..., Any]) -> Callable[..., Any]:
    """For filters that jinja2 passes an evaluation context first."""

    @functools.wraps(function)
    def checked(context: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(value, Iterator):
            value = list(value)
        if isinstance(value, str | list | tuple):
            _check_product(value, args, kwargs)
        return function(context, value, *args, **kwargs)

    return checked


def _format(value: str, *args: Any, **kwargs: Any) -> str:
    _check_format(value)
    return value % (kwargs or (args[0] if len(args) == 1 and isinstance(args[0], dict) else args))


def _check_format(value: str) -> None:
    """Refuse widths and precisions of four digits, and those that come as arguments."""
    if re.search(r"\d{4}|\*|\{[^}]*\{", value):
        raise SecurityError("a format with a large width")


def _small_range(*args: int) -> range:
    numbers = range(*args)
    if len(numbers) > MAX_WIDTH:
        raise SecurityError(f"a range of more than {MAX_WIDTH}")
    return numbers


def _raise_exception(message: object) -> NoReturn:
    raise ChatTemplateError(str(message)[:300])


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    _check_numbers((indent,), {})
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@functools.cache
def _environment() -> _Environment:
    """One for all templates and threads; it holds no state of a rendering."""
    return _Environment()


def load_chat_template(
    folder: Path, control_tokens: Iterable[str] | None = None
) -> ChatTemplate | None:
    """The chat template of a checkpoint; None where it has none (a base model, an encoder).

    Args:
        control_tokens: those of the checkpoint's tokenizer, read from its file if not given.
    """
    if control_tokens is None and (folder / "tokenizer.json").is_file():
        control_tokens = find_control_tokens(read_json(folder / "tokenizer.json"))
    config = read_json(folder / "tokenizer_config.json")
    path = folder / "chat_template.jinja"
    source = path.read_text(encoding="utf-8") if path.is_file() else config.get("chat_template")
    if isinstance(source, list):  # named templates; chat uses the one named "default"
        named = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}
        source = named.get("default")
    if not isinstance(source, str):
        return None
    tokens = {}
    for name in SPECIAL_TOKEN_NAMES:
        value = config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            tokens[name] = value
    return ChatTemplate(source, tokens, control_tokens)
