"""Between text and token ids, without torch: a model's tokenizer, incremental decoding, and stop strings.

Text from a user never becomes a control token: to `encode` the spelling of one, such as `<|im_end|>`, is ordinary
characters. Only `encode_segments` makes control tokens, from what the chat template itself wrote.
"""

import codecs
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tokenizers import Tokenizer

REPLACEMENT = "\ufffd"
MIN_CHARS_PER_TOKEN = 64
"""Floor of `TextTokenizer.max_token_chars`, for tokenizers that drop or merge characters before splitting."""
CONTEXT_TOKENS = 8
_BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>\Z")
_SURROGATE = re.compile("[\ud800-\udfff]")
_MARKUP = re.compile(r"[<\[{|].*[>\]}|]\Z", re.DOTALL)


class UnsafeTextError(ValueError):
    """Text that cannot be tokenized safely."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Part of a rendered prompt. Attributes: trusted: control tokens in it were written by the template."""

    text: str
    trusted: bool


class TextTokenizer:
    """A checkpoint's tokenizer.json. Thread-safe: nothing changes after loading.

    Attributes:
        control_tokens: id of every added token that a user's text must not produce: those marked special, and those
            that look like markup (`<think>`, `[INST]`).
        special_prefix, special_suffix: what the model expects around a text ([CLS] and [SEP] for BERT).
        max_token_chars: no token stands for more characters.
    """

    def __init__(self, raw: str) -> None:
        data = json.loads(raw)
        added = data.get("added_tokens") or []
        self.control_tokens = find_control_tokens(data)
        self._special_ids = frozenset(token["id"] for token in added if token["special"])
        self._trusting = _build(data)
        # An object of its own: whether a control token's spelling is one is a setting of the whole tokenizer.
        self._plain = _build(data | {"added_tokens": [self._as_special(t) for t in added]})
        self._plain.encode_special_tokens = True
        unknown = data["model"].get("unk_token")
        self._control_ids = frozenset(self.control_tokens.values()) - {
            self._trusting.token_to_id(unknown) if isinstance(unknown, str) else None
        }
        self._control_pattern = control_pattern(self.control_tokens)
        self._decoder = _decoder_names(data.get("decoder"))
        self.vocab_size: int = self._trusting.get_vocab_size(with_added_tokens=True)
        self.max_token_chars = max(
            MIN_CHARS_PER_TOKEN, max(map(len, self._trusting.get_vocab()), default=0)
        )
        self.special_prefix, self.special_suffix = self._around()
        self._reference = self._plain.encode("a", add_special_tokens=False).ids[-1:]

    def _as_special(self, token: dict[str, Any]) -> dict[str, Any]:
        return token | {"special": token["content"] in self.control_tokens}

    def _around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids that the post-processor puts before and after a text."""
        marked = self._plain.encode("a", add_special_tokens=True)
        is_text = [not special for special in marked.special_tokens_mask]
        if not any(is_text):
            return tuple(marked.ids), ()
        start = is_text.index(True)
        end = len(is_text) - is_text[::-1].index(True)
        return tuple(marked.ids[:start]), tuple(marked.ids[end:])

    @classmethod
    def load(cls, folder: Path) -> "TextTokenizer":
        return cls((folder / "tokenizer.json").read_text(encoding="utf-8"))

    @property
    def is_byte_level(self) -> bool:
        """Whether every token stands for fixed bytes, whatever its neighbours."""
        return self._decoder == ["ByteLevel"]

    def encode(
        self, text: str, add_special_tokens: bool = False, allow_special: bool = False
    ) -> list[int]:
        """Token ids of a text.

        Args:
            add_special_tokens: put `special_prefix` and `special_suffix` around it.
            allow_special: the text is ours: spellings of control tokens become control tokens.

        Raises:
            UnsafeTextError: the text is no valid Unicode, or the tokenizer makes control tokens of plain characters.
        """
        if not text.isascii() and _SURROGATE.search(text):
            raise UnsafeTextError("the text must be valid Unicode, it has a lone surrogate")
        ids = self._encode_trusted(text) if allow_special else self._encode_plain(text)
        return [*self.special_prefix, *ids, *self.special_suffix] if add_special_tokens else ids

    def encode_segments(self, segments: Sequence[Segment]) -> list[int]:
        """Token ids of a rendered chat; control tokens only in trusted segments.

        Raises:
            UnsafeTextError: as `encode`.
        """
        ids: list[int] = []
        for segment in segments:
            ids += self.encode(segment.text, allow_special=segment.trusted)
        return ids

    def _encode_plain(self, text: str) -> list[int]:
        ids = _token_ids(self._plain, text)
        if self._control_ids.isdisjoint(ids):
            return ids
        # The vocabulary itself holds the spelling (Unigram and WordLevel may): break it after its first character.
        encoding = self._plain.encode(text, add_special_tokens=False)
        pairs = zip(ids, encoding.offsets, strict=True)
        offsets = [at for token_id, at in pairs if token_id in self._control_ids]
        if any(end - start < 2 for start, end in offsets):
            raise UnsafeTextError("the text has a character that is a control token of this model")
        ids, position = [], 0
        for cut in [*(start + 1 for start, _ in offsets), len(text)]:
            ids += self._encode_plain(text[position:cut])
            position = cut
        return ids

    def _encode_trusted(self, text: str) -> list[int]:
        ids = _token_ids(self._trusting, text)
        if self._control_pattern is None:
            return ids
        spelled = self._control_pattern.findall(text)
        unknown = len(spelled) - sum(self.control_tokens[s] in self._control_ids for s in spelled)
        found = sum(token_id in self._control_ids for token_id in ids)
        if found == len(spelled) - unknown:
            return ids
        # A normalizer made a control token of something else: take the exact spellings only.
        ids, position = [], 0
        for match in self._control_pattern.finditer(text):
            ids += self._encode_plain(text[position : match.start()])
            ids.append(self.control_tokens[match[0]])
            position = match.end()
        return ids + self._encode_plain(text[position:])

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Text of ids; unknown ids have none."""
        text: str = self._trusting.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def is_special(self, token_id: int) -> bool:
        """Whether `skip_special_tokens` leaves it out."""
        return token_id in self._special_ids

    def is_byte_piece(self, token_id: int) -> bool:
        """Whether it is one byte that only its neighbours complete (SentencePiece's byte fallback)."""
        return "ByteFallback" in self._decoder and bool(
            _BYTE_PIECE.match(self.token_string(token_id))
        )

    def token_string(self, token_id: int) -> str:
        """The vocabulary's own spelling; "" for an unknown id."""
        return self._trusting.id_to_token(token_id) or ""

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8 of one token as it stands inside a text; possibly a part of a character."""
        piece = self.token_string(token_id)
        if self.is_byte_level:
            try:
                return bytes(_BYTES[char] for char in piece)
            except KeyError:  # an added token with characters outside the byte alphabet
                return piece.encode()
        if self.is_byte_piece(token_id):
            return bytes.fromhex(piece[3:5])
        before = self.decode(self._reference)
        return self.decode([*self._reference, token_id])[len(before) :].encode()

    def token_text(self, token_id: int) -> str:
        """One token as text; bytes that are no whole character show as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")


def find_control_tokens(tokenizer_json: dict[str, Any]) -> dict[str, int]:
    """Spelling to id of the control tokens, see `TextTokenizer.control_tokens`."""
    return {
        token["content"]: token["id"]
        for token in tokenizer_json.get("added_tokens") or []
        if token["special"] or _MARKUP.match(token["content"])
    }


def control_pattern(tokens: Sequence[str] | dict[str, int]) -> re.Pattern[str] | None:
    """Matches any of the spellings, the longest first; None if there are none."""
    spellings = sorted((t for t in tokens if t), key=len, reverse=True)
    return re.compile("|".join(re.escape(t) for t in spellings)) if spellings else None


def _build(data: dict[str, Any]) -> Tokenizer:
    tokenizer = Tokenizer.from_str(json.dumps(data))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _token_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Without offsets, and with other threads going on meanwhile: of tokenizers' methods only those for batches release
    the interpreter's lock."""
    encoding = tokenizer.encode_batch_fast([text], add_special_tokens=False)[0]
    ids: list[int] = encoding.ids
    return ids


def _decoder_names(decoder: dict[str, Any] | None) -> list[str]:
    if decoder is None:
        return []
    parts = decoder.get("decoders", []) if decoder["type"] == "Sequence" else [decoder]
    return [part["type"] for part in parts]


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable character for every byte, reversed (Radford et al. 2019)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + index): byte for index, byte in enumerate(others)
    }


_BYTES = _byte_alphabet()


class Detokenizer(Protocol):
    """Decodes one growing sequence. All that it gives out, joined, is the decoding of the whole."""

    def add(self, token_id: int) -> str:
        """The text that is certain with this token; may be empty."""

    def finish(self) -> str:
        """What was held back, incomplete characters as U+FFFD."""


class _ByteDetokenizer:
    """Every token is fixed bytes, so a UTF-8 decoder that remembers a part of a character is all it takes."""

    def __init__(self, tokenizer: TextTokenizer, *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token_id: int) -> str:
        if self._skip and self._tokenizer.is_special(token_id):
            return ""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class _WindowDetokenizer:
    """Decodes a window twice, without and with the new tokens; the difference is new.

    A window starts where earlier tokens gave visible text, so that what a decoder does to the start of a text (dropping
    a space) does not happen in the middle. Byte pieces wait for the end of their run: it is valid or not as a whole.
    """

    def __init__(
        self, tokenizer: TextTokenizer, *, skip_special_tokens: bool, context: Sequence[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids = list(context)[-CONTEXT_TOKENS:]
        self._start = 0
        self._read = len(self._ids)

    def add(self, token_id: int) -> str:
        self._ids.append(token_id)
        if self._tokenizer.is_byte_piece(token_id) or self._is_left_out(token_id):
            return ""  # a run of bytes goes on, also across what is left out
        return self._take(final=False)

    def _is_left_out(self, token_id: int) -> bool:
        is_skipped = self._skip and self._tokenizer.is_special(token_id)
        return is_skipped or not self._tokenizer.token_string(token_id)

    def finish(self) -> str:
        return self._take(final=True)

    def _take(self, *, final: bool) -> str:
        before = self._decode(self._ids[self._start : self._read])
        now = self._decode(self._ids[self._start :])
        if len(now) <= len(before) or (now.endswith(REPLACEMENT) and not final):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return now[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)


def build_detokenizer(
    tokenizer: TextTokenizer, *, skip_special_tokens: bool = True, context: Sequence[int] = ()
) -> Detokenizer:
    """A detokenizer for what follows `context`, whose own text is not given out."""
    if tokenizer.is_byte_level:
        return _ByteDetokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
    return _WindowDetokenizer(tokenizer, skip_special_tokens=skip_special_tokens, context=context)


class TextStream:
    """One request's text: incremental, and cut before the first stop string.

    Attributes:
        stopped: a stop string was found; its text is not given out and nothing follows.
        num_tokens: tokens taken in, up to the one that completed a stop string.
        offsets: for each of them, how many characters of the text come before its own.
        num_released: how many of them have their text (at least its beginning) given out. At the end this is all of
            them, or after a stop string those that begin before it.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        stop: Sequence[str] = (),
        min_tokens: int = 0,
        *,
        skip_special_tokens: bool = True,
        context: Sequence[int] = (),
    ) -> None:
        self._detokenizer = build_detokenizer(
            tokenizer, skip_special_tokens=skip_special_tokens, context=context
        )
        self._stop = tuple(stop)
        self._hold = max((len(s) for s in self._stop), default=1) - 1
        self._min_tokens = min_tokens
        self._pending = ""
        self._num_exempt = 0  # characters at the start of `_pending` that came before `min_tokens`
        self._num_released_chars = 0
        self.num_tokens = 0
        self.offsets: list[int] = []
        self.num_released = 0
        self.stopped = False

    def add(self, token_ids: Sequence[int], *, ends_with_stop_token: bool = False) -> str:
        """Text that is certain now; a possible beginning of a stop string is held back.

        Args:
            ends_with_stop_token: the last id ended the request and has no text of its own.
        """
        for index, token_id in enumerate(token_ids):
            if self.stopped:
                break
            self.num_tokens += 1
            self.offsets.append(self._num_released_chars + len(self._pending))
            if ends_with_stop_token and index == len(token_ids) - 1:
                break
            self._append(self._detokenizer.add(token_id))
        held = 0 if self.stopped else self._held()
        return self._release(len(self._pending) - held)

    def finish(self) -> str:
        """All text that is left; call once the request has ended."""
        if not self.stopped:
            self._append(self._detokenizer.finish())
        text = self._release(len(self._pending))
        if not self.stopped:
            self.num_released = self.num_tokens
        return text

    def _append(self, text: str) -> None:
        self._pending += text
        if self.num_tokens < self._min_tokens:
            self._num_exempt = len(self._pending)
            return
        starts = (self._pending.find(s, max(0, self._num_exempt - len(s) + 1)) for s in self._stop)
        found = [at for at in starts if at >= 0]
        if found:
            self._pending = self._pending[: min(found)]
            self.stopped = True

    def _held(self) -> int:
        """Length of the longest end of the text that a stop string begins with."""
        for length in range(min(self._hold, len(self._pending)), 0, -1):
            tail = self._pending[-length:]
            if any(s.startswith(tail) for s in self._stop):
                return length
        return 0

    def _release(self, length: int) -> str:
        text, self._pending = self._pending[:length], self._pending[length:]
        self._num_exempt = max(0, self._num_exempt - length)
        self._num_released_chars += len(text)
        while (
            self.num_released < self.num_tokens
            and self.offsets[self.num_released] < self._num_released_chars
        ):
            self.num_released += 1
        return text


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; {} where there is no such file."""
    if not path.is_file():
        return {}
    data = json.loads(path.read_text(encoding="utf-8"))
    return data if isinstance(data, dict) else {}
