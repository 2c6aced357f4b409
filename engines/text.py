"""Between text and token ids, without torch: a model's tokenizer, incremental decoding, and stop strings.

Text from a user never becomes a control token: in `encode` the spelling of one, such as `<|im_end|>`, is ordinary characters.
Only `encode_segments` makes control tokens, from the parts that the chat template itself wrote.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

REPLACEMENT = "\ufffd"
MAX_CHARS_PER_TOKEN = 512
"""Longer texts than max_model_len times this cannot fit, whatever the tokenizer; refused before tokenizing."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Part of a rendered prompt. Attributes: trusted: written by the template, may hold control tokens."""

    text: str
    trusted: bool


class TextTokenizer:
    """A checkpoint's tokenizer.json. Thread-safe: nothing changes after loading."""

    def __init__(self, raw: str) -> None:
        self._plain = Tokenizer.from_str(raw)
        self._plain.no_truncation()
        self._plain.no_padding()
        # Its own object: whether the spelling of a special token is one is a setting of the whole tokenizer.
        self._plain.encode_special_tokens = True
        self._trusting = Tokenizer.from_str(raw)
        self._trusting.no_truncation()
        self._trusting.no_padding()
        self.vocab_size: int = self._plain.get_vocab_size(with_added_tokens=True)

    @classmethod
    def load(cls, folder: Path) -> "TextTokenizer":
        return cls((folder / "tokenizer.json").read_text(encoding="utf-8"))

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of text that is not trusted.

        Args:
            add_special_tokens: add what the model expects around a text ([CLS] … [SEP] for BERT).
        """
        ids: list[int] = self._plain.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def encode_segments(self, segments: Sequence[Segment]) -> list[int]:
        """Token ids of a rendered chat; control tokens only in trusted segments."""
        ids: list[int] = []
        for segment in segments:
            tokenizer = self._trusting if segment.trusted else self._plain
            ids += tokenizer.encode(segment.text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        text: str = self._plain.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_text(self, token_id: int) -> str:
        """One token as text; bytes that are no whole character show as U+FFFD."""
        return self.decode([token_id])

    def token_strings(self, ids: Sequence[int]) -> list[str]:
        """Vocabulary entries, as the tokenizer's own file spells them."""
        return [self._plain.id_to_token(token_id) or "" for token_id in ids]


class Detokenizer:
    """Decodes one growing sequence; holds back bytes that are not yet a whole character."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._prefix = 0  # ids before it no longer influence how later ones decode
        self._read = 0  # ids before it have been given out

    def add(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete; may be empty."""
        self._ids += token_ids
        before = self._tokenizer.decode(
            self._ids[self._prefix : self._read], skip_special_tokens=True
        )
        now = self._tokenizer.decode(self._ids[self._prefix :], skip_special_tokens=True)
        if now.endswith(REPLACEMENT) or len(now) < len(before):
            return ""
        self._prefix, self._read = self._read, len(self._ids)
        return now[len(before) :]

    def finish(self) -> str:
        """What is left, incomplete characters as U+FFFD."""
        before = self._tokenizer.decode(
            self._ids[self._prefix : self._read], skip_special_tokens=True
        )
        now = self._tokenizer.decode(self._ids[self._prefix :], skip_special_tokens=True)
        self._prefix, self._read = self._read, len(self._ids)
        return now[len(before) :]


class TextStream:
    """One request's text: incremental, and cut before the first stop string.

    Attributes:
        stopped: a stop string was found; its text is not given out and nothing follows.
    """

    def __init__(
        self, tokenizer: TextTokenizer, stop: Sequence[str] = (), min_tokens: int = 0
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._stop = tuple(stop)
        self._hold = max((len(s) for s in self._stop), default=1) - 1
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._pending = ""
        self.stopped = False

    def add(self, token_ids: Sequence[int]) -> str:
        """Text that is certain now; a possible beginning of a stop string is held back."""
        for token_id in token_ids:
            self._num_tokens += 1
            self._pending += self._detokenizer.add([token_id])
            if self._cut():
                return self._take(len(self._pending))
        return self._take(len(self._pending) - self._held())

    def finish(self) -> str:
        """All text that is left; call once the request has ended."""
        if not self.stopped:
            self._pending += self._detokenizer.finish()
            self._cut()
        return self._take(len(self._pending))

    def _cut(self) -> bool:
        if self._num_tokens < self._min_tokens:
            return False
        found = [at for at in (self._pending.find(s) for s in self._stop) if at >= 0]
        if found:
            self._pending = self._pending[: min(found)]
            self.stopped = True
        return self.stopped

    def _held(self) -> int:
        """Length of the longest end of the text that a stop string begins with."""
        for length in range(min(self._hold, len(self._pending)), 0, -1):
            tail = self._pending[-length:]
            if any(s.startswith(tail) for s in self._stop):
                return length
        return 0

    def _take(self, length: int) -> str:
        text, self._pending = self._pending[:length], self._pending[length:]
        return text


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; {} where there is no such file."""
    if not path.is_file():
        return {}
    data = json.loads(path.read_text(encoding="utf-8"))
    return data if isinstance(data, dict) else {}
