"""Tokenizers and chat templates of the registered models, loaded once each; long texts are tokenized on threads."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from compression.checkpoint import checkpoint_hash
from compression.registry import ModelEntry
from engines.chat_template import ChatTemplate, ChatTemplateError, load_chat_template
from engines.text import TextTokenizer, UnsafeTextError
from service.errors import ApiError

MAX_CACHED = 16
INLINE_CHARS = 4_000
"""Longer texts are tokenized on a thread, so that the event loop goes on."""
NUM_THREADS = 2

T = TypeVar("T")
_threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="tokenizer")


@dataclass(frozen=True, slots=True)
class ModelText:
    """A model's tokenizer and, where it has one, its chat template."""

    tokenizer: TextTokenizer
    chat_template: ChatTemplate | None

    async def encode(
        self,
        text: str,
        max_tokens: int | None,
        param: str | None,
        *,
        add_special_tokens: bool = False,
    ) -> list[int]:
        """Token ids of a user's text.

        Args:
            max_tokens: refuse, before any work, a text that cannot fit whatever its tokens are.

        Raises:
            ApiError: context_length_exceeded, invalid_value; both name `param`.
        """
        if max_tokens is not None:
            self._check_length(len(text), max_tokens, param)
        try:
            if len(text) <= INLINE_CHARS:
                await asyncio.sleep(0)  # many short texts must not hold the event loop either
                return self.tokenizer.encode(text, add_special_tokens)
            return await _on_thread(lambda: self.tokenizer.encode(text, add_special_tokens))
        except UnsafeTextError as error:
            raise ApiError("invalid_value", str(error), param) from error

    async def encode_chat(
        self,
        messages: Sequence[Mapping[str, str]],
        max_tokens: int | None,
        *,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Token ids of a rendered chat.

        Raises:
            ApiError: context_length_exceeded; invalid_value, the model has no template or it refuses the messages.
        """
        template = self.chat_template
        if template is None:
            raise ApiError("invalid_value", "this model has no chat template", "messages")
        if max_tokens is not None:
            self._check_length(sum(len(m["content"]) for m in messages), max_tokens, "messages")
        try:
            return await _on_thread(
                lambda: self.tokenizer.encode_segments(
                    template.render(messages, add_generation_prompt=add_generation_prompt)
                )
            )
        except (ChatTemplateError, UnsafeTextError) as error:
            raise ApiError("invalid_value", str(error), "messages") from error

    async def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        if len(ids) <= INLINE_CHARS:
            return self.tokenizer.decode(ids, skip_special_tokens)
        return await _on_thread(lambda: self.tokenizer.decode(ids, skip_special_tokens))

    def _check_length(self, num_chars: int, max_tokens: int, param: str | None) -> None:
        if num_chars > max_tokens * self.tokenizer.max_token_chars:
            raise ApiError(
                "context_length_exceeded",
                f"This model's maximum context length is {max_tokens} tokens. However, your input has {num_chars} "
                "characters, which cannot fit. Please reduce its length.",
                param,
            )


async def _on_thread(work: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(_threads, work)


class TokenizerCache:
    """The most recently used models' texts. Belongs to one event loop."""

    def __init__(self) -> None:
        self._cache: OrderedDict[str, ModelText] = OrderedDict()
        self._loading: dict[str, asyncio.Lock] = {}

    async def get(self, entry: ModelEntry) -> ModelText:
        """Raises: ApiError: model_load_failed, its tokenizer cannot be read."""
        key = f"{entry.id}:{checkpoint_hash(entry.manifest)}"
        async with self._loading.setdefault(key, asyncio.Lock()):
            if key not in self._cache:
                self._cache[key] = await _on_thread(lambda: load_text(entry))
        self._cache.move_to_end(key)
        while len(self._cache) > MAX_CACHED:
            oldest, _ = self._cache.popitem(last=False)
            self._loading.pop(oldest, None)
        return self._cache[key]


def load_text(entry: ModelEntry) -> ModelText:
    """Raises: ApiError: model_load_failed."""
    try:
        tokenizer = TextTokenizer.load(entry.path)
        return ModelText(tokenizer, load_chat_template(entry.path, tokenizer.control_tokens))
    except (
        Exception
    ) as error:  # tokenizers raises bare Exception on a file that it does not understand
        raise ApiError(
            "model_load_failed", f"the tokenizer of {entry.id!r} cannot be read", "model"
        ) from error
