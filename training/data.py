"""Training examples: OpenAI's chat and completion JSONL, read line by line, checked, encoded and packed.

Three forms, one object a line: `{"messages": [{"role", "content", "weight"?}, ...]}` trains the assistant's messages
(those of weight 0 excepted), `{"prompt", "completion"}` the completion, `{"text"}` everything.
Reading holds one line; a line is refused by its length before it is read whole. Imports no torch, so that a file is
checked before a job is accepted; with a tokenizer, `Encoder` also tells what is too long.
"""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer

ROLES = ("system", "user", "assistant")
Render = Callable[[list[dict[str, str]], bool], str]
"""(messages, add_generation_prompt) to the text that the model's chat template makes of them."""


class DataError(ValueError):
    """A file that cannot be trained on.

    Attributes:
        line: number of the line at fault, from 1; 0 where it is the whole file.
        code: machine-readable, such as "invalid_json".
    """

    def __init__(self, line: int, code: str, message: str) -> None:
        super().__init__(f"line {line}: {message}" if line else message)
        self.line = line
        self.code = code
        self.message = message


@dataclass(frozen=True, slots=True, kw_only=True)
class DataLimits:
    """Attributes: max_line_bytes: without the newline."""

    max_line_bytes: int = 4 * 2**20
    max_examples: int = 1_000_000
    max_messages: int = 1_000


@dataclass(frozen=True, slots=True)
class Message:
    """Attributes: trained: an assistant's message that the model learns to write."""

    role: Literal["system", "user", "assistant"]
    content: str
    trained: bool


@dataclass(frozen=True, slots=True)
class ChatExample:
    """A conversation."""

    line: int
    messages: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class CompletionExample:
    """A prompt that is given and a completion that is learnt."""

    line: int
    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class TextExample:
    """Text that is learnt as a whole, and cut where it is long."""

    line: int
    text: str


Example = ChatExample | CompletionExample | TextExample
DEFAULT_LIMITS = DataLimits()


def read_examples(path: Path, limits: DataLimits = DEFAULT_LIMITS) -> Iterator[Example]:
    """Read and check a JSONL file.

    Raises:
        DataError: at the first line at fault, or for the file: "empty_file", "too_many_examples".
    """
    count = 0
    with path.open("rb") as file:
        number = 0
        while raw := file.readline(limits.max_line_bytes + 2):
            number += 1
            content = raw.rstrip(b"\r\n")
            if len(content) > limits.max_line_bytes:
                raise DataError(
                    number, "line_too_long", f"longer than {limits.max_line_bytes:,} bytes"
                )
            if not content.strip():
                raise DataError(number, "empty_line", "an empty line; every line is one example")
            count += 1
            if count > limits.max_examples:
                raise DataError(
                    number, "too_many_examples", f"more than {limits.max_examples:,} examples"
                )
            yield parse_example(number, content, limits)
    if not count:
        raise DataError(0, "empty_file", "the file has no examples")


def parse_example(line: int, raw: bytes, limits: DataLimits = DEFAULT_LIMITS) -> Example:
    """Raises: DataError."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(line, "invalid_encoding", f"not UTF-8 at byte {error.start}") from None
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        raise DataError(line, "invalid_json", f"not JSON ({reason})") from None
    if not isinstance(data, dict):
        raise DataError(line, "invalid_example", "an example is a JSON object")
    if "messages" in data:
        _check_keys(line, data, {"messages"})
        return ChatExample(line, _parse_messages(line, data["messages"], limits))
    if "prompt" in data or "completion" in data:
        _check_keys(line, data, {"prompt", "completion"})
        prompt, completion = (_text(line, data, key) for key in ("prompt", "completion"))
        if not completion:
            raise DataError(line, "no_labels", "completion is empty: nothing to learn")
        return CompletionExample(line, prompt, completion)
    if "text" in data:
        _check_keys(line, data, {"text"})
        text = _text(line, data, "text")
        if not text:
            raise DataError(line, "no_labels", "text is empty: nothing to learn")
        return TextExample(line, text)
    raise DataError(
        line, "invalid_example", 'an example has "messages", "prompt" and "completion", or "text"'
    )


def _check_keys(line: int, data: dict[str, Any], allowed: set[str], where: str = "") -> None:
    for key in data:
        if key not in allowed:
            raise DataError(line, "unsupported_field", f"{where}{key!r} is not supported")


def _text(line: int, data: dict[str, Any], key: str, where: str = "") -> str:
    value = data.get(key)
    if not isinstance(value, str):
        raise DataError(line, "invalid_example", f"{where}{key!r} must be a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair
        raise DataError(line, "invalid_encoding", f"{where}{key!r} has a lone surrogate") from None
    return value


def _parse_messages(line: int, rows: object, limits: DataLimits) -> tuple[Message, ...]:
    if not isinstance(rows, list) or not rows:
        raise DataError(line, "invalid_example", '"messages" must be a list of at least one')
    if len(rows) > limits.max_messages:
        raise DataError(line, "too_many_messages", f"more than {limits.max_messages:,} messages")
    messages = []
    for index, row in enumerate(rows):
        where = f"messages[{index}]: "
        if not isinstance(row, dict):
            raise DataError(line, "invalid_example", f"{where}a message is an object")
        role = row.get("role")
        if role not in ROLES:
            raise DataError(
                line, "unknown_role", f"{where}unknown role {role!r}; known: {', '.join(ROLES)}"
            )
        assistant = role == "assistant"
        _check_keys(line, row, {"role", "content"} | ({"weight"} if assistant else set()), where)
        weight = row.get("weight", 1)
        if weight not in (0, 1) or type(weight) is bool:
            raise DataError(line, "invalid_weight", f"{where}weight must be 0 or 1, got {weight!r}")
        content = _text(line, row, "content", where)
        messages.append(Message(role, content, assistant and weight == 1))
    if not any(message.role == "assistant" for message in messages):
        raise DataError(line, "no_assistant_message", "no message of the assistant to learn")
    if not any(message.trained for message in messages):
        raise DataError(line, "no_labels", "every assistant message has weight 0: nothing to learn")
    return tuple(messages)


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of an example and, for each, whether it is learnt (as what follows the one before it)."""

    line: int
    ids: list[int]
    learnt: list[bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoder:
    """Turns examples into token ids as the served model will see them.

    Attributes:
        end_id: the token that ends a completion or a text; None to add none.
        render: None where the model has no chat template; chat is refused then.
        control_spellings: texts that the tokenizer takes for control tokens. An example that contains one is refused:
            a user's text must not become a turn's end.
    """

    tokenizer: Tokenizer
    end_id: int | None
    max_length: int
    render: Render | None = None
    control_spellings: tuple[str, ...] = field(default=())

    def __call__(self, example: Example) -> list[Encoded]:
        """One piece, but for text that is longer than `max_length`.

        Raises:
            DataError: "too_long", "no_labels", "control_token", "no_chat_template", "chat_template".
        """
        self._refuse_control_tokens(example)
        if isinstance(example, TextExample):
            return self._encode_text(example)
        if isinstance(example, CompletionExample):
            encoded = self._encode_completion(example)
        else:
            encoded = self._encode_chat(example)
        if len(encoded.ids) > self.max_length:
            raise DataError(
                example.line,
                "too_long",
                f"{len(encoded.ids):,} tokens, max_length is {self.max_length:,}",
            )
        if not any(encoded.learnt[1:]):
            raise DataError(example.line, "no_labels", "no token of it is learnt")
        return [encoded]

    def _refuse_control_tokens(self, example: Example) -> None:
        if isinstance(example, ChatExample):
            texts = [message.content for message in example.messages]
        elif isinstance(example, CompletionExample):
            texts = [example.prompt, example.completion]
        else:
            texts = [example.text]
        for spelling in self.control_spellings:
            if any(spelling in text for text in texts):
                raise DataError(
                    example.line, "control_token", f"contains the control token {spelling!r}"
                )

    def _encode_text(self, example: TextExample) -> list[Encoded]:
        ids = [*self._ids(example.text), *self._end()]
        if len(ids) < 2:
            raise DataError(example.line, "no_labels", "a single token: nothing follows it")
        pieces = [ids[i : i + self.max_length] for i in range(0, len(ids), self.max_length)]
        # A last piece of one token would have nothing to learn.
        return [
            Encoded(example.line, piece, [True] * len(piece)) for piece in pieces if len(piece) > 1
        ]

    def _encode_completion(self, example: CompletionExample) -> Encoded:
        prompt = self._ids(example.prompt)
        completion = [*self._ids(example.completion), *self._end()]
        learnt = [False] * len(prompt) + [True] * len(completion)
        return Encoded(example.line, prompt + completion, learnt)

    def _encode_chat(self, example: ChatExample) -> Encoded:
        if self.render is None:
            raise DataError(
                example.line, "no_chat_template", "this model has no chat template for messages"
            )
        rows = [{"role": m.role, "content": m.content} for m in example.messages]
        text = self.render(rows, False)
        spans = []
        for index, message in enumerate(example.messages):
            if not message.trained:
                continue
            before = self.render(rows[:index], True)
            after = self.render(rows[: index + 1], False)
            if not (text.startswith(after) and after.startswith(before)):
                raise DataError(
                    example.line,
                    "chat_template",
                    f"messages[{index}]: the chat template writes it differently when more follows",
                )
            spans.append((len(before), len(after)))
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        learnt = [
            any(low <= start and end <= high for low, high in spans)
            for start, end in encoding.offsets
        ]
        return Encoded(example.line, list(encoding.ids), learnt)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def _end(self) -> list[int]:
        return [] if self.end_id is None else [self.end_id]


Row = list[Encoded]
"""What one row of a batch holds, one after the other; they do not see each other."""


def pack_rows(examples: Sequence[Encoded], max_length: int, *, packing: bool) -> list[Row]:
    """Rows in the order of the examples: each example joins the newest row if it fits, or else begins one."""
    rows: list[Row] = []
    room = 0
    for example in examples:
        if not packing or len(example.ids) > room:
            rows.append([])
            room = max_length
        rows[-1].append(example)
        room -= len(example.ids)
    return rows


def split_evaluation(
    examples: Sequence[Encoded], share: float, seed: int
) -> tuple[list[Encoded], list[Encoded]]:
    """Training and evaluation examples; all pieces of one line fall on the same side.

    Raises:
        DataError: "too_few_examples", there is nothing left to train on.
    """
    lines = sorted({example.line for example in examples})
    num_kept_back = max(1, round(share * len(lines))) if share > 0 else 0
    if num_kept_back >= len(lines):
        raise DataError(
            0, "too_few_examples", f"{len(lines)} examples, {num_kept_back} would be kept back"
        )
    kept_back = set(random.Random(f"split-{seed}").sample(lines, num_kept_back))
    training = [example for example in examples if example.line not in kept_back]
    return training, [example for example in examples if example.line in kept_back]
