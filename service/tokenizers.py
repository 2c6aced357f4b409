"""Tokenizers and chat templates of the registered models, loaded once each."""

import asyncio
from collections import OrderedDict
from dataclasses import dataclass

from compression.checkpoint import checkpoint_hash
from compression.registry import ModelEntry
from engines.text import MAX_CHARS_PER_TOKEN, Segment, TextTokenizer
from service.chat_template import ChatTemplate, load_chat_template
from service.errors import ApiError

MAX_CACHED = 16
INLINE_CHARS = 20_000
"""Longer texts are tokenized on a thread, so that the event loop goes on."""


@dataclass(frozen=True, slots=True)
class ModelText:
    """A model's tokenizer and, where it has one, its chat template."""

    tokenizer: TextTokenizer
    chat_template: ChatTemplate | None

    async def encode(
        self, text: str, max_tokens: int, param: str, *, add_special_tokens: bool = False
    ) -> list[int]:
        """Token ids of a user's text.

        Raises:
            ApiError: context_length_exceeded, it cannot fit whatever its tokens are.
        """
        _check_length(len(text), max_tokens, param)
        if len(text) <= INLINE_CHARS:
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(
            self.tokenizer.encode, text, add_special_tokens=add_special_tokens
        )

    async def encode_segments(
        self, segments: list[Segment], max_tokens: int, param: str
    ) -> list[int]:
        length = sum(len(segment.text) for segment in segments)
        _check_length(length, max_tokens, param)
        if length <= INLINE_CHARS:
            return self.tokenizer.encode_segments(segments)
        return await asyncio.to_thread(self.tokenizer.encode_segments, segments)


def _check_length(num_chars: int, max_tokens: int, param: str) -> None:
    if num_chars > max_tokens * MAX_CHARS_PER_TOKEN:
        raise ApiError(
            "context_length_exceeded",
            f"This model's maximum context length is {max_tokens} tokens; {num_chars} characters cannot fit.",
            param,
        )


class TokenizerCache:
    """The most recently used models' texts. Belongs to one event loop."""

    def __init__(self) -> None:
        self._cache: OrderedDict[str, ModelText] = OrderedDict()

    async def get(self, entry: ModelEntry) -> ModelText:
        key = f"{entry.id}:{checkpoint_hash(entry.manifest)}"
        if key not in self._cache:
            self._cache[key] = await asyncio.to_thread(_load, entry)
            while len(self._cache) > MAX_CACHED:
                self._cache.popitem(last=False)
        self._cache.move_to_end(key)
        return self._cache[key]


def _load(entry: ModelEntry) -> ModelText:
    return ModelText(TextTokenizer.load(entry.path), load_chat_template(entry.path))
