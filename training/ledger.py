"""The memory ledger: what a finetuning run will hold, by part, told before it starts. Imports no torch.

Weights, gradients, moments and bases are counted tensor by tensor from the manifest. Activations are counted
operation by operation as transformers' Llama family keeps them for the backward pass (seen in 5.24), for rows that
are full; other decoders are near.
"""

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

from compression.checkpoint import LinearKind, LowRankLinear, Manifest
from training.q_galore.sizes import basis_bytes, code_bytes, moment_bytes, num_coordinates
from training.spec import (
    FinetuneSettings,
    Full,
    Lora,
    LrcOnly,
    LrcOnlyQGaLore,
    QGaLore,
    QLora,
)

JsonObject = dict[str, Any]
_BLOCK = re.compile(r"\.(\d+)\.")
# Layers of a block that see the same; the output projection sees what attention keeps anyway.
_SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("down_proj",))


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryLedger:
    """Bytes by part, at the moment when all are largest.

    Attributes:
        weights: the model's, with masks of pruned ones.
        gradients: whole gradients, and those accumulated in a subspace.
        optimizer: both moments of Adam.
        projections: bases of the subspaces.
        activations: what autograd keeps for the backward pass.
        temporary: what lives for a moment: logits and their gradient. Measured on a GPU only, 0 elsewhere.
    """

    weights: int
    gradients: int
    optimizer: int
    projections: int
    activations: int
    temporary: int

    @property
    def peak(self) -> int:
        return sum(dataclasses.astuple(self))

    def to_json(self) -> JsonObject:
        return {**dataclasses.asdict(self), "peak": self.peak}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tensor:
    """A weight of the model as it will be held.

    Attributes:
        weight_bytes: with its mask or scales.
        trained, projected: as of `methods.prepare`; itemsize: of its gradient.
    """

    name: str
    shape: tuple[int, ...]
    weight_bytes: int
    trained: bool
    projected: bool = False
    itemsize: int = 4

    @property
    def num_elements(self) -> int:
        return prod(self.shape)


def predict_memory(
    manifest: Manifest, config: JsonObject, settings: FinetuneSettings
) -> MemoryLedger:
    """What a run of these settings will hold.

    Args:
        manifest, config: the source's `lathe.json` and `config.json`.
    """
    method = settings.method
    tensors = list(_tensors(manifest, settings))
    trained = [tensor for tensor in tensors if tensor.trained]
    optimizer = projections = 0
    for tensor in trained:
        size = tensor.num_elements
        if tensor.projected:
            assert not isinstance(method, Full | Lora | LrcOnly)
            rank = min(method.rank, *tensor.shape)
            size = num_coordinates(tensor.shape, rank)
            projections += basis_bytes(tensor.shape, rank, 4 if isinstance(method, QGaLore) else 32)
        optimizer += moment_bytes(size, 32 if isinstance(method, Lora) else method.state_bits)
    activations, temporary = _activations(manifest, config, settings)
    return MemoryLedger(
        weights=sum(tensor.weight_bytes for tensor in tensors),
        gradients=_gradients(trained, settings),
        optimizer=optimizer,
        projections=projections,
        activations=activations,
        temporary=temporary,
    )


def _itemsize(settings: FinetuneSettings) -> int:
    return 4 if settings.dtype == "float32" else 2


def _tensors(manifest: Manifest, settings: FinetuneSettings) -> Iterator[_Tensor]:
    method, itemsize = settings.method, _itemsize(settings)
    low_rank_only = isinstance(method, LrcOnly | LrcOnlyQGaLore)
    adapters = isinstance(method, Lora)
    for name, (_, shape) in manifest.other_tensors.items():
        frozen = adapters or (low_rank_only and "norm" not in name)
        size = prod(shape) * itemsize
        yield _Tensor(
            name=name, shape=shape, weight_bytes=size, trained=not frozen, itemsize=itemsize
        )
    for row in manifest.matrices:
        in_block = _BLOCK.search(row.name) is not None
        low_rank = isinstance(row.linear, LowRankLinear)
        chosen = in_block and (low_rank or not low_rank_only)
        for factor in _factors(row.linear):
            shape = (factor.out_features, factor.in_features)
            size = prod(shape)
            held = size * itemsize
            if chosen and isinstance(method, QGaLore):
                held = code_bytes(size, 8)
            elif chosen and isinstance(method, QLora):
                # one byte per 64 for NF4's doubly quantized scales; one float32 per row for INT8
                held = size // 2 + size // 64 if method.bits == 4 else size + 4 * shape[0]
            mask = size if chosen and row.sparsity > 0 else 0
            whole = (chosen or not (in_block or low_rank_only)) and not adapters
            yield _Tensor(
                name=row.name,
                shape=shape,
                weight_bytes=held + mask,
                trained=whole,
                projected=chosen and not isinstance(method, Full | Lora | LrcOnly),
                itemsize=itemsize,
            )
            if chosen and isinstance(method, Lora):
                for adapter in ((method.rank, shape[1]), (shape[0], method.rank)):
                    yield _Tensor(
                        name=row.name, shape=adapter, weight_bytes=4 * prod(adapter), trained=True
                    )
        if row.linear.bias:
            size = row.linear.out_features
            yield _Tensor(
                name=row.name,
                shape=(size,),
                weight_bytes=size * itemsize,
                trained=not (adapters or low_rank_only),
                itemsize=itemsize,
            )


def _factors(linear: LinearKind) -> list[Any]:
    if isinstance(linear, LowRankLinear):
        return [linear.weight_u, linear.weight_v]
    return [linear]


def _gradients(trained: list[_Tensor], settings: FinetuneSettings) -> int:
    """The most that is alive at once, told in the order in which a backward pass brings gradients."""
    method = settings.method
    accumulates, clips = settings.gradient_accumulation > 1, settings.max_gradient_norm is not None
    per_layer = not isinstance(method, Lora) and method.per_layer
    peak = held = 0
    for tensor in sorted(trained, key=_backward_order):
        whole = tensor.num_elements * tensor.itemsize
        peak = max(peak, held + whole)
        if not per_layer:
            held += whole
        elif tensor.projected and (accumulates or clips):
            held += _coordinates(tensor, settings)
        elif accumulates or clips:
            held += whole
    if not per_layer and accumulates:
        peak += sum(_coordinates(tensor, settings) for tensor in trained if tensor.projected)
    return max(peak, held)


def _coordinates(tensor: _Tensor, settings: FinetuneSettings) -> int:
    method = settings.method
    assert not isinstance(method, Full | Lora | LrcOnly)
    return 4 * num_coordinates(tensor.shape, min(method.rank, *tensor.shape))


def _backward_order(tensor: _Tensor) -> tuple[int, int, bool]:
    """The head, blocks from the last to the first, each feed-forward before attention, and the embedding."""
    found = _BLOCK.search(tensor.name)
    if found is None:
        return (2 if "embed" in tensor.name else 0), 0, False
    return 1, -int(found[1]), "self_attn" in tensor.name or "input_layernorm" in tensor.name


def _activations(
    manifest: Manifest, config: JsonObject, settings: FinetuneSettings
) -> tuple[int, int]:
    """What autograd keeps, and what the logits take besides."""
    method, itemsize, length = settings.method, _itemsize(settings), settings.max_length
    num_tokens = settings.batch_size * length
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    all_trained = not isinstance(method, Lora | LrcOnly | LrcOnlyQGaLore)
    # A norm keeps its input in float32 and its root, and the normed rows where its weight is trained.
    norm_input = 4 * hidden + 4
    norm = norm_input + (0 if isinstance(method, Lora) else itemsize * hidden)
    blocks: dict[int, dict[str, LinearKind]] = {}
    for row in manifest.matrices:
        found = _BLOCK.search(row.name)
        if found is not None:
            blocks.setdefault(int(found[1]), {})[row.name.rpartition(".")[2]] = row.linear
    sizes = []
    for linears in blocks.values():
        queries, width = linears["q_proj"].out_features, linears["gate_proj"].out_features
        # per token: queries, keys and values as repeated for all heads, what attention gives, its sums and its mask
        size = 4 * queries * itemsize + 4 * (queries // head_dim) + length * itemsize
        size += 3 * width * itemsize  # gate, up and silu(gate)
        size += 2 * norm
        for group in _SAME_INPUT:
            size += _input_bytes([linears[name] for name in group], settings)
        size += sum(_inside_bytes(linear, settings) for linear in linears.values())
        sizes.append(num_tokens * size)
    # per token: the last norm, rotations, a label; log-probabilities
    rest = norm + 2 * head_dim * itemsize + 9 + 4 * vocabulary
    if all_trained:  # token ids and the head's input
        rest += 8 + hidden * itemsize
    else:  # nothing before the first norm wants a gradient
        rest -= norm_input
        if isinstance(method, Lora) and method.dropout > 0:
            rest -= 3 * 4 * hidden
    kept = sum(sizes)
    if settings.gradient_checkpointing:  # inputs of all blocks, and the inside of one
        kept = len(sizes) * num_tokens * hidden * itemsize + max(sizes)
    return kept + num_tokens * rest, num_tokens * vocabulary * (itemsize + 4)


def _input_bytes(linears: list[LinearKind], settings: FinetuneSettings) -> int:
    """Per token, of what linear layers of the same input keep of it."""
    method, itemsize = settings.method, _itemsize(settings)
    width = linears[0].in_features
    if isinstance(method, Lora):
        # Adapters are float32: one without dropout keeps the input itself if that is, too.
        return width * 4 if method.dropout == 0 and itemsize == 4 else 0
    low_rank_only = isinstance(method, LrcOnly | LrcOnlyQGaLore)
    trained = any(isinstance(linear, LowRankLinear) or not low_rank_only for linear in linears)
    return width * itemsize if trained else 0


def _inside_bytes(linear: LinearKind, settings: FinetuneSettings) -> int:
    """Per token, of what a layer keeps besides its input."""
    method, itemsize = settings.method, _itemsize(settings)
    if not isinstance(method, Lora):
        return linear.rank * itemsize if isinstance(linear, LowRankLinear) else 0
    size = 0
    for factor in _factors(linear):
        size += 4 * method.rank
        if method.dropout > 0:  # noise, and what it leaves
            size += 8 * factor.in_features
        elif itemsize != 4 or factor.in_features != linear.in_features:
            size += 4 * factor.in_features
    return size
