"""From the texts of a node to what a model reads: spelling, cuts, the filled prompt, windows for the encoder.

Of a text that is too long, `head` keeps the beginning, `head_tail` the two ends around a mark. `chunk_mean` shows the
LLM the head, and encodes all of the text: in windows, whose vectors are averaged by their tokens and normalised.
"""

import asyncio
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from graph.catalog import Message
from graph.enrich_types import EnrichNode, EnrichRequest, LongText

GAP = "\n[…]\n"
"""Stands in a prompt for the middle that `head_tail` left out."""
SEPARATOR = "\n"
INLINE_CHARS = 20_000
"""What is longer is tokenized on a thread, so that the event loop goes on."""
T = TypeVar("T")
_threads = ThreadPoolExecutor(2, thread_name_prefix="node-text")


class TextError(Exception):
    """A model's template or tokenizer refused a text; the message may be shown to a client."""


class TextTooLongError(TextError):
    """A prompt does not fit a model."""


class TextModel(Protocol):
    """Between text and one model's token ids. Thread-safe.

    Attributes:
        max_token_chars: no token stands for more characters.
    """

    max_token_chars: int

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """A prompt for the next assistant message. Contents never become control tokens.

        Raises:
            TextError: the model has no chat template, or it refuses these messages.
        """

    def encode_text(self, text: str) -> list[int]:
        """Tokens of the bare text.

        Raises:
            TextError: the tokenizer would make control tokens of it.
        """

    def add_special_tokens(self, token_ids: Sequence[int]) -> list[int]:
        """What the model expects around a text that it is to embed ([CLS] ... [SEP] for BERT)."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text without special tokens."""


def normalise(text: str) -> str:
    """Equal texts in one spelling: Unicode NFC, line feeds, no white space at the ends."""
    return unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n")).strip()


def has_text(text: str) -> bool:
    """Whether anything is left of a text that is normalised."""
    return bool(text) and not text.isspace()


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """A prompt about one node, and what of its texts is in it."""

    messages: list[Message]
    token_ids: list[int]
    truncated_tokens: int
    neighbors_used: int


def render(
    request: EnrichRequest,
    node: EnrichNode,
    text: TextModel,
    *,
    max_model_len: int,
    max_tokens: int,
) -> Rendered:
    """The prompt about one node; long texts are cut, first to the prompt's limits, then to the context.

    Of neighbours' texts and of variables the head is kept, and only what may be in it is looked at. Where a context is
    too small for all neighbours, the last ones go.

    Args:
        max_model_len: tokens of prompt and answer.
        max_tokens: of the answer.

    Raises:
        TextTooLongError: it does not fit whatever is cut from the node's text.
        TextError
    """
    prompt = request.prompt
    neighbors, truncated = [], 0
    for neighbor in node.neighbors[: prompt.max_neighbors]:
        head, cut = text_head(text, neighbor, prompt.max_neighbor_tokens)
        neighbors.append(head)
        truncated += cut
    variables = {}
    for name, value in request.variables_of(node).items():
        variables[name], cut = text_head(text, value, prompt.max_text_tokens)
        truncated += cut
    whole = normalise(node.text)
    ids = text.encode_text(whole)
    keep = min(len(ids), prompt.max_text_tokens)
    room = max_model_len - max_tokens
    while True:
        shown = whole if keep == len(ids) else _shown(text, ids, keep, request.long_text)
        messages = prompt.fill(
            shown,
            neighbors,
            neighbor_labels=node.neighbor_labels,
            classes=request.classes,
            variables=variables,
        )
        token_ids = text.encode_chat(messages)
        excess = len(token_ids) - room
        if excess <= 0:
            return Rendered(
                messages=messages,
                token_ids=token_ids,
                truncated_tokens=truncated + len(ids) - keep,
                neighbors_used=len(neighbors),
            )
        if keep <= excess and neighbors:
            neighbors.pop()
            keep = min(len(ids), prompt.max_text_tokens)
            continue
        if keep <= excess:
            raise TextTooLongError(
                f"prompt and answer need {len(token_ids) - keep + max_tokens} tokens without the "
                f"node's text, the model holds {max_model_len}"
            )
        keep -= excess


def text_head(text: TextModel, given: str, max_tokens: int) -> tuple[str, int]:
    """The first tokens of a text, normalised, and how many were cut: of a very long one, at least so many."""
    whole = normalise(given)
    seen = whole[: max_tokens * text.max_token_chars]
    head, cut = _head(text, text.encode_text(seen), max_tokens)
    return (whole if cut == 0 and seen == whole else head), cut


def _head(text: TextModel, token_ids: Sequence[int], max_tokens: int) -> tuple[str, int]:
    """The first tokens as text, and how many were cut."""
    cut = max(0, len(token_ids) - max_tokens)
    return text.decode(token_ids[:max_tokens]).rstrip("\ufffd"), cut


def _shown(text: TextModel, token_ids: Sequence[int], keep: int, policy: LongText) -> str:
    """What a prompt shows of a text that it must cut to `keep` tokens."""
    if policy != "head_tail" or keep < 2:
        return _head(text, token_ids, keep)[0]
    tail = text.decode(token_ids[len(token_ids) - keep // 2 :]).lstrip("\ufffd")
    return _head(text, token_ids, keep - keep // 2)[0] + GAP + tail


def encoder_windows(
    encoder_text: TextModel, text: str, written: str, max_tokens: int, policy: LongText
) -> tuple[list[list[int]], int]:
    """Tokens of `text + separator + written` for the encoder, and how many were cut.

    One window; with `chunk_mean` as many as it takes. The LLM's text is kept whole up to half of the window, of the
    node's own what fits beside it: cutting the end of the joined text would cut what the LLM added.
    """
    room = max_tokens - len(encoder_text.add_special_tokens([]))
    own = encoder_text.encode_text(text + SEPARATOR if written else text)
    added = encoder_text.encode_text(written) if written else []
    if policy == "chunk_mean":
        joined = own + added
        parts = [joined[start : start + room] for start in range(0, len(joined), room)]
        # Of what has no tokens, such as a zero-width space, the marks alone.
        return [encoder_text.add_special_tokens(part) for part in parts or [[]]], 0
    num_added = min(max(min(len(added), room // 2), room - len(own)), len(added))
    num_own = min(room - num_added, len(own))
    num_tail = num_own // 2 if policy == "head_tail" and num_own < len(own) else 0
    kept = own[: num_own - num_tail] + own[len(own) - num_tail :] + added[:num_added]
    return [encoder_text.add_special_tokens(kept)], len(own) + len(added) - len(kept)


def mean_vector(vectors: Sequence[bytes], lengths: Sequence[int]) -> bytes:
    """Of several vectors the mean by length, of unit norm; one stays as it is."""
    if len(vectors) == 1:
        return vectors[0]
    rows = np.stack([np.frombuffer(vector, "<f4") for vector in vectors]).astype(np.float64)
    mean = np.average(rows, axis=0, weights=lengths)
    norm = float(np.linalg.norm(mean))
    return (mean / norm if norm > 0 else mean).astype("<f4").tobytes()


async def off_loop(num_chars: int, work: Callable[[], T]) -> T:
    """Do the work of tokenizing so many characters: here if they are few, else on one of two threads."""
    if num_chars <= INLINE_CHARS:
        await asyncio.sleep(0)  # many short texts must not hold the event loop either
        return work()
    return await asyncio.get_running_loop().run_in_executor(_threads, work)
