"""How a transformers decoder runs many requests at once: the KV caches, and the forward pass over them.

`SlotDecoder` decodes all requests in one forward pass. Each request owns a row of one preallocated cache, tokens of a
row stand at their own positions from 0, and an explicit mask hides what a row has not filled. Rows of running
requests are kept together at the front, so a pass reads views and copies nothing.

`SoloDecoder` gives each request a `DynamicCache` and a forward pass of its own. It suits every causal model
(sliding windows, recurrent states, position biases that do not read `position_ids`), and is what `SlotDecoder` is
compared with: `build_decoder` runs both on the loaded model, and takes slots only where the logits agree.

Why neither `generate` nor transformers' continuous batching: docs/decisions/0005.

Shapes: B rows, S positions of a pass, L cached positions, N KV heads, D head dim, H hidden, V vocabulary.
"""

import copy
import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from compression.hf import cache_argument

CAPACITY_STEP = 128
"""Rows grow by at least so many positions."""
BATCHABLE_ROPE = frozenset({"default", "linear", "llama3", "yarn"})
"""Rope types whose angles do not depend on the longest row of a batch."""
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.06, torch.float16: 0.02}
"""Largest difference of two ways to compute the same logits, as a share of the largest logit."""

logger = logging.getLogger("lathe.engine")


class Decoder(Protocol):
    """Runs requests, by key, on one model. Not thread-safe.

    Attributes:
        name: for `EngineInfo.kernels`.
        bytes_per_token: of KV cache.
    """

    name: str
    bytes_per_token: int

    def open(self, key: str, max_length: int) -> None:
        """Begin a request that will hold at most `max_length` tokens."""

    def close(self, key: str) -> None:
        """Give its memory back; an unknown key is ignored."""

    def prefill(self, key: str, inputs: Tensor, num_logits: int) -> Tensor:
        """Add positions to a request.

        Args:
            inputs: token ids (S,), or embeddings (S, H).
            num_logits: so many of the last positions' logits are wanted, at least 1.

        Returns:
            (num_logits, V)
        """

    def decode(self, keys: Sequence[str], token_ids: Sequence[int]) -> Tensor:
        """Add one token to each request; logits (B, V) in the order of `keys`."""

    def num_tokens(self) -> int:
        """Cached positions of all open requests."""

    def bytes_with(self, max_length: int) -> int:
        """Cache memory at most needed, once one more request of so many tokens is open."""


@dataclass(slots=True)
class _Row:
    """Attributes: touched: positions ever written to, also by passes that failed."""

    key: str
    max_length: int
    length: int = 0
    touched: int = 0


class _SlotLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's keys and values, (rows, N, capacity, D) each."""

    is_sliding = False

    def __init__(self, cache: "_SlotCache") -> None:
        super().__init__()
        self._cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        shape = (self._cache.num_rows, self._cache.capacity)
        # Zeros, not empty: see `clear`.
        self.keys = _zeros_like(key_states, *shape)
        self.values = _zeros_like(value_states, *shape)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self._cache.write(self.keys, key_states), self._cache.write(
            self.values, value_states
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cache.end, 0

    def get_seq_length(self) -> int:
        return self._cache.start

    def get_max_length(self) -> int:
        return -1

    def resize(self, num_rows: int, capacity: int) -> None:
        if self.is_initialized:
            self.keys = _resized(self.keys, num_rows, capacity)
            self.values = _resized(self.values, num_rows, capacity)

    def swap(self, first: int, second: int, length: int) -> None:
        for tensor in (self.keys, self.values) if self.is_initialized else ():
            rows = tensor[[first, second], :, :length]
            tensor[[second, first], :, :length] = rows

    def clear(self, row: int, length: int) -> None:
        """A masked position must hold a number: hidden or not, a NaN would spread."""
        for tensor in (self.keys, self.values) if self.is_initialized else ():
            tensor[row, :, :length] = 0


def _zeros_like(states_BNSD: Tensor, num_rows: int, capacity: int) -> Tensor:
    _, num_heads, _, head_dim = states_BNSD.shape
    return states_BNSD.new_zeros(num_rows, num_heads, capacity, head_dim)


def _resized(old: Tensor, num_rows: int, capacity: int) -> Tensor:
    new = _zeros_like(old, num_rows, capacity)
    rows, length = min(num_rows, old.shape[0]), min(capacity, old.shape[2])
    new[:rows, :, :length] = old[:rows, :, :length]
    return new


class _SlotCache(Cache):  # type: ignore[misc]
    """What a forward pass sees of `SlotDecoder`'s rows: those of this pass, up to their longest.

    Attributes:
        num_rows, capacity: allocated.
        first_row, lengths_B: rows of this pass, and how many positions each held before it.
        start, end: the longest row's length before and after this pass.
    """

    def __init__(self, num_layers: int) -> None:
        self.num_rows = 0
        self.capacity = 0
        self.first_row = 0
        self.lengths_B = torch.zeros(0, dtype=torch.long)
        self.start = 0
        self.end = 0
        super().__init__(layers=[_SlotLayer(self) for _ in range(num_layers)])

    def write(self, stored: Tensor, states_BNSD: Tensor) -> Tensor:
        """Put new states behind each row's last position; a view of this pass's rows."""
        num_rows, _, num_positions, _ = states_BNSD.shape
        rows = stored[self.first_row : self.first_row + num_rows]
        if num_rows == 1:
            rows[:, :, self.end - num_positions : self.end] = states_BNSD
        else:
            rows[torch.arange(num_rows), :, self.lengths_B] = states_BNSD[:, :, 0]
        return rows[:, :, : self.end]


class SlotDecoder:
    """All running requests in one pass. See the module's docstring."""

    name = "one pass for all requests, slot cache"

    def __init__(self, model: Any) -> None:
        config = model.config.get_text_config(decoder=True)
        self._model = model
        self._forward = Forward(model)
        self._cache = _SlotCache(len(DynamicCache(config=config).layers))
        self._rows: list[_Row] = []
        self.bytes_per_token = 0

    def open(self, key: str, max_length: int) -> None:
        self._rows.append(_Row(key, max_length))

    def close(self, key: str) -> None:
        index = self._find(key)
        if index is None:
            return
        last = len(self._rows) - 1
        self._swap(index, last)
        row = self._rows.pop()
        if not self._rows:
            self._resize(0, 0)
        else:
            for layer in self._cache.layers:
                layer.clear(last, row.touched)

    def prefill(self, key: str, inputs: Tensor, num_logits: int) -> Tensor:
        index = self._find(key)
        assert index is not None, "opened before"
        row = self._rows[index]
        num_positions = inputs.shape[0]
        self._begin(index, [row], num_positions)
        positions_S = torch.arange(row.length, row.length + num_positions)
        logits_BSV = self._forward(inputs[None], positions_S[None], self._cache, num_logits)
        row.length += num_positions
        return logits_BSV[0]

    def decode(self, keys: Sequence[str], token_ids: Sequence[int]) -> Tensor:
        id_of = dict(zip(keys, token_ids, strict=True))
        self._bring_to_front(id_of)
        rows = self._rows[: len(keys)]
        self._begin(0, rows, 1)
        positions_B = self._cache.lengths_B
        inputs_B1 = torch.tensor([[id_of[row.key]] for row in rows])
        mask_B11L: Tensor | None = (
            None  # one row is plainly causal: the model's own mask, as in `generate`
        )
        if len(rows) > 1:
            is_filled_BL = torch.arange(self._cache.end)[None, :] <= positions_B[:, None]
            mask_B11L = is_filled_BL[:, None, None]
        logits_BSV = self._forward(inputs_B1, positions_B[:, None], self._cache, 1, mask_B11L)
        for row in rows:
            row.length += 1
        place = {row.key: index for index, row in enumerate(rows)}
        return logits_BSV[[place[key] for key in keys], 0]

    def num_tokens(self) -> int:
        return sum(row.length for row in self._rows)

    def bytes_with(self, max_length: int) -> int:
        longest = max([max_length, self._cache.capacity, *(row.max_length for row in self._rows)])
        return _num_rows(len(self._rows) + 1) * longest * self.bytes_per_token

    def _find(self, key: str) -> int | None:
        return next((i for i, row in enumerate(self._rows) if row.key == key), None)

    def _begin(self, first_row: int, rows: list[_Row], num_positions: int) -> None:
        """Make room, and tell the cache which rows the next pass is about."""
        end = max(row.length for row in rows) + num_positions
        assert all(row.length + num_positions <= row.max_length for row in rows)
        if end > self._cache.capacity or len(self._rows) > self._cache.num_rows:
            longest = max(row.max_length for row in self._rows)
            wanted = max(end, min(end + max(end // 2, CAPACITY_STEP), longest))
            num_rows = max(self._cache.num_rows, _num_rows(len(self._rows)))
            self._resize(num_rows, max(self._cache.capacity, wanted))
        for row in rows:
            row.touched = max(row.touched, row.length + num_positions)
        self._cache.first_row = first_row
        self._cache.lengths_B = torch.tensor([row.length for row in rows])
        self._cache.start, self._cache.end = end - num_positions, end

    def _resize(self, num_rows: int, capacity: int) -> None:
        """Raises OutOfMemoryError with every row as it was."""
        before = (self._cache.num_rows, self._cache.capacity)
        try:
            for layer in self._cache.layers:
                layer.resize(num_rows, capacity)
        except (RuntimeError, MemoryError):
            for layer in self._cache.layers:
                layer.resize(*before)
            raise
        self._cache.num_rows, self._cache.capacity = num_rows, capacity

    def _bring_to_front(self, keys: dict[str, int]) -> None:
        """Swap rows until those of `keys` are the first."""
        num_rows = len(keys)
        misplaced = [i for i, row in enumerate(self._rows) if i >= num_rows and row.key in keys]
        for index, row in enumerate(self._rows[:num_rows]):
            if row.key not in keys:
                self._swap(index, misplaced.pop())

    def _swap(self, first: int, second: int) -> None:
        if first == second:
            return
        rows = self._rows
        length = max(rows[first].touched, rows[second].touched)
        for layer in self._cache.layers:
            layer.swap(first, second, length)
        rows[first], rows[second] = rows[second], rows[first]


def _num_rows(num_requests: int) -> int:
    """Rows come in powers of two, so that they are moved seldom."""
    return 1 << (num_requests - 1).bit_length()


class SoloDecoder:
    """One pass per request. See the module's docstring."""

    name = "one pass per request"

    def __init__(self, model: Any) -> None:
        self._forward = Forward(model)
        self._config = model.config
        self._caches: dict[str, Any] = {}
        self._lengths: dict[str, int] = {}
        self._max_lengths: dict[str, int] = {}
        self.bytes_per_token = 0

    def open(self, key: str, max_length: int) -> None:
        self._caches[key] = DynamicCache(config=self._config)
        self._lengths[key] = 0
        self._max_lengths[key] = max_length

    def close(self, key: str) -> None:
        self._caches.pop(key, None)
        self._lengths.pop(key, None)
        self._max_lengths.pop(key, None)

    def prefill(self, key: str, inputs: Tensor, num_logits: int) -> Tensor:
        start = self._lengths[key]
        positions_1S = torch.arange(start, start + inputs.shape[0])[None]
        logits_1SV = self._forward(inputs[None], positions_1S, self._caches[key], num_logits)
        self._lengths[key] += inputs.shape[0]
        return logits_1SV[0]

    def decode(self, keys: Sequence[str], token_ids: Sequence[int]) -> Tensor:
        rows = [
            self.prefill(key, torch.tensor([token_id]), 1)
            for key, token_id in zip(keys, token_ids, strict=True)
        ]
        return torch.cat(rows)

    def num_tokens(self) -> int:
        return sum(self._lengths.values())

    def bytes_with(self, max_length: int) -> int:
        return (sum(self._max_lengths.values()) + max_length) * self.bytes_per_token


class Forward:
    """Calls a model's forward pass, with only those arguments that this model knows."""

    def __init__(self, model: Any) -> None:
        self._model = model
        known = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in known
        self._takes_logits_to_keep = "logits_to_keep" in known
        self._cache_argument = cache_argument(model)
        self._is_eager = getattr(model.config, "_attn_implementation", None) != "sdpa"

    def __call__(
        self,
        inputs: Tensor,
        positions_BS: Tensor,
        cache: Any,
        num_logits: int,
        mask_B1SL: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, num_logits, V) of the last positions; `inputs` are ids (B, S) or embeddings (B, S, H)."""
        device = self._model.device
        name = "inputs_embeds" if inputs.is_floating_point() else "input_ids"
        arguments: dict[str, Any] = {name: inputs.to(device), self._cache_argument: cache}
        if self._takes_positions:
            arguments["position_ids"] = positions_BS.to(device)
        if self._takes_logits_to_keep:
            arguments["logits_to_keep"] = num_logits
        if mask_B1SL is not None:
            arguments["attention_mask"] = self._additive(mask_B1SL.to(device))
        output = self._model(use_cache=True, **arguments)
        logits_BSV: Tensor = output.logits[:, -num_logits:]
        return logits_BSV

    def _additive(self, mask: Tensor) -> Tensor:
        """Eager attention adds its mask to the scores."""
        if not self._is_eager:
            return mask
        dtype = self._model.dtype
        hidden = torch.finfo(dtype).min
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, hidden)


def build_decoder(model: Any) -> Decoder:
    """The fastest decoder that is right for this model, warmed up and with `bytes_per_token` known."""
    solo = SoloDecoder(model)
    probe = [(7919 * (index + 1)) % _vocab_size(model) for index in range(12)]
    expected = _probe(solo, probe)
    solo.bytes_per_token = _dynamic_bytes_per_token(model, probe)
    reason = _why_not_slots(model)
    if reason is None:
        slots = SlotDecoder(model)
        slots.bytes_per_token = solo.bytes_per_token
        try:
            difference = _difference(_probe(slots, probe), expected)
        except Exception as error:
            logger.warning("the slot cache does not suit this model", exc_info=True)
            reason = f"the slot cache failed with {type(error).__name__}"
        else:
            if difference <= TOLERANCE.get(model.dtype, 0.06):
                return slots
            reason = f"the slot cache's logits differ by {difference:.3f} of the largest"
    logger.warning("requests decode one by one: %s", reason)
    solo.name = f"{SoloDecoder.name}: {reason}"
    return solo


def _why_not_slots(model: Any) -> str | None:
    """What a short probe would not show."""
    config = model.config.get_text_config(decoder=True)
    layers = DynamicCache(config=config).layers
    if not layers or any(type(layer) is not DynamicLayer for layer in layers):
        return "its cache is not plain attention throughout"
    rope = getattr(config, "rope_parameters", None) or {}
    rope_type = rope.get("rope_type", "default")
    if rope_type not in BATCHABLE_ROPE:
        return f"rope type {rope_type} depends on the batch"
    return None


@torch.inference_mode()
def _probe(decoder: Decoder, ids: list[int]) -> Tensor:
    """Logits of three requests of unlike length, in two chunks and two steps, in changing company."""
    prompts = {"a": ids[:5], "b": ids[5:7], "c": ids[3:]}
    logits = []
    for key, prompt in prompts.items():
        decoder.open(key, len(prompt) + 2)
        decoder.prefill(key, torch.tensor(prompt[:1]), 1)
        logits.append(decoder.prefill(key, torch.tensor(prompt[1:]), 1))
    logits.append(decoder.decode(["a", "c"], ids[:2]))
    decoder.close("a")
    logits.append(decoder.decode(["b", "c"], ids[2:4]))
    decoder.close("b")
    decoder.close("c")
    return torch.cat(logits).float()


def _difference(logits: Tensor, expected: Tensor) -> float:
    return float((logits - expected).abs().max() / expected.abs().max().clamp(min=1e-6))


@torch.inference_mode()
def _dynamic_bytes_per_token(model: Any, ids: list[int]) -> int:
    """Growth of a request's cache per token, from two prompts of unlike length."""
    sizes = []
    for length in (4, 12):
        cache = DynamicCache(config=model.config)
        ids_1S = torch.tensor([ids[:length]], device=model.device)
        model(ids_1S, use_cache=True, **{cache_argument(model): cache})
        sizes.append(cache_bytes(cache))
    return max((sizes[1] - sizes[0]) // 8, 1)


def cache_bytes(cache: Any) -> int:
    tensors = [
        tensor
        for layer in cache.layers
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None))
        if tensor is not None
    ]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _vocab_size(model: Any) -> int:
    return int(model.config.get_text_config(decoder=True).vocab_size)


def repeated(cache: Any, times: int) -> Any:
    """A copy of a one-row `DynamicCache` for a batch of `times` rows; the original stays as it is."""
    result = copy.deepcopy(cache)
    if times > 1:
        result.batch_repeat_interleave(times)
    return result
