"""The decoder of the Llama family, built from any Lathe checkpoint.

Pre-norm blocks of rotary grouped-query attention and SwiGLU (Touvron et al. 2023, arXiv:2302.13971), with Qwen2's
projection biases, Qwen3's query and key norms, Mistral's sliding window, and blocks of differing shape where a
checkpoint was pruned.

Plain objects over the ops of `engines/kernels`; logits equal transformers' for the same weights. What a configuration
asks for and the decoder does not have is an `UnsupportedModelError`, never left out.

Shapes: T rows of all requests of a pass, R selected rows, S requests, P positions, H hidden, N query heads, K key/value
heads, A = N + 2 K, D head dim, F feed-forward width, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compression.checkpoint import (
    Checkpoint,
    Matrix,
    open_checkpoint,
)
from compression.encoding import decode
from compression.safetensors_header import CheckpointError
from engines.ffn_skip import FfnSkip, LayerSubstitute, SkipPass, load_ffn_skip
from engines.kernels.attention import PassFacts
from engines.kernels.huge_pages import map_memory
from engines.kernels.linear import Embedding, Linear, build_linear, tie_head
from engines.kernels.metadata import BLOCK_SIZE, BatchMetadata
from engines.kernels.ops import TORCH_OPS, choose_ops
from engines.kernels.paged_attention import LayerCache
from engines.kernels.rotary import SUPPORTED_SCALINGS, rotary_tables
from engines.kernels.swiglu import swiglu
from engines.kernels.weights import LinearWeight, LowRankWeight

SUPPORTED_MODELS = ("llama", "mistral", "qwen2", "qwen3")
"""transformers' model types; SmolLM and SmolLM2 are of type llama."""


class UnsupportedModelError(Exception):
    """A model that this decoder does not compute; the message says what it has that the decoder has not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """Facts of the architecture; sizes that may differ between layers are on `DecoderLayer`.

    Attributes:
        windows: sliding window of each layer, None for full attention.
        eos_token_ids: what ends a generation.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    head_dim: int
    rms_norm_epsilon: float
    max_position_embeddings: int
    ties_embeddings: bool
    windows: tuple[int | None, ...]
    eos_token_ids: tuple[int, ...]

    @property
    def num_layers(self) -> int:
        return len(self.windows)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderLayer:
    """One block. `qkv` gives the rows' queries, keys and values, `gate_up` both halves of SwiGLU.

    Attributes:
        query_norm_D, key_norm_D: RMSNorm weights over each head (Qwen3), or None.
        window: sliding window, None for full attention.
    """

    num_heads: int
    num_kv_heads: int
    input_norm_H: Tensor
    post_norm_H: Tensor
    qkv: Linear
    o: Linear
    gate_up: Linear
    down: Linear
    query_norm_D: Tensor | None
    key_norm_D: Tensor | None
    window: int | None

    def feed_forward(self, normed_TH: Tensor, gate: Callable[[Tensor], Tensor] = swiglu) -> Tensor:
        return self.down(gate(self.gate_up(normed_TH)))


class DecoderModel:
    """A decoder ready to run; `load_decoder` makes it.

    Attributes:
        cos_PR, sin_PR: float32 rotary tables for every position up to `max_position_embeddings`.
        lm_head: holds `embedding` itself where the two are tied and not quantized.
        ops: what its passes over a cache run on, beside the products.
        ffn_skip: how feed-forwards may be skipped; None where the checkpoint has no skip profile.
    """

    def __init__(
        self,
        *,
        config: DecoderConfig,
        embedding: Embedding,
        layers: Sequence[DecoderLayer],
        final_norm_H: Tensor,
        lm_head: Linear,
        cos_PR: Tensor,
        sin_PR: Tensor,
        ffn_skip: FfnSkip | None = None,
    ) -> None:
        self.config = config
        self.embedding = embedding
        self.layers = layers
        self.final_norm_H = final_norm_H
        self.lm_head = lm_head
        self.cos_PR = cos_PR
        self.sin_PR = sin_PR
        self.ops = choose_ops(self.device, self.dtype, config.head_dim)
        self.ffn_skip = ffn_skip
        self._windows = frozenset(config.windows)

    @property
    def dtype(self) -> torch.dtype:
        return self.final_norm_H.dtype

    @property
    def device(self) -> torch.device:
        return self.final_norm_H.device

    def embed(self, token_ids_T: Tensor) -> Tensor:
        """Embeddings (T, H) of token ids."""
        if isinstance(self.embedding, Tensor):
            return self.embedding[token_ids_T]
        return self.embedding.rows(token_ids_T)

    def forward(
        self,
        hidden_TH: Tensor,
        metadata: BatchMetadata,
        kv_cache: Sequence[LayerCache] | None,
        skip: SkipPass | None = None,
    ) -> Tensor:
        """Run every layer and the final norm over a pass's rows; their keys and values go into the cache.

        Args:
            hidden_TH: embeddings of the rows.
            kv_cache: one pair per layer. Without it each request must be whole in this pass, and
                slots and block tables are not read.
            skip: which rows may skip feed-forwards; counts those that do.
        """
        ops = TORCH_OPS if kv_cache is None else self.ops
        epsilon = self.config.rms_norm_epsilon
        attention = ops.attention(
            PassFacts(
                metadata=metadata,
                cos_TR=self.cos_PR[metadata.positions_T],
                sin_TR=self.sin_PR[metadata.positions_T],
                epsilon=epsilon,
                windows=self._windows,
                max_context_len=self.config.max_position_embeddings,
            )
        )
        residual_TH = hidden_TH
        normed_TH = ops.rms_norm(hidden_TH, self.layers[0].input_norm_H, epsilon)
        for index, layer in enumerate(self.layers):
            cache = None if kv_cache is None else kv_cache[index]
            heads_TAD = layer.qkv(normed_TH).view(len(normed_TH), -1, self.config.head_dim)
            attended_TND = attention(heads_TAD, layer, cache)
            normed_TH, residual_TH = ops.add_rms_norm(
                layer.o(attended_TND.flatten(1)), residual_TH, layer.post_norm_H, epsilon
            )
            is_last = index + 1 == len(self.layers)
            next_norm_H = self.final_norm_H if is_last else self.layers[index + 1].input_norm_H
            output_TH = (
                layer.feed_forward(normed_TH, ops.swiglu)
                if skip is None
                else skip.feed_forward(index, residual_TH, normed_TH, layer.feed_forward)
            )
            normed_TH, residual_TH = ops.add_rms_norm(output_TH, residual_TH, next_norm_H, epsilon)
        return normed_TH

    def logits(self, hidden_RH: Tensor) -> Tensor:
        """float32 (R, V) of rows that `forward` returned."""
        return self.lm_head(hidden_RH, torch.float32)

    def linears(self) -> list[Linear]:
        blocks = [(layer.qkv, layer.o, layer.gate_up, layer.down) for layer in self.layers]
        return [*(linear for block in blocks for linear in block), self.lm_head]

    def _substitutes(self) -> tuple[LayerSubstitute, ...]:
        return () if self.ffn_skip is None else self.ffn_skip.substitutes

    def tensors(self) -> list[Tensor]:
        """Everything it holds; a tied head names the embedding twice."""
        norms = [
            norm
            for layer in self.layers
            for norm in (
                layer.input_norm_H,
                layer.post_norm_H,
                layer.query_norm_D,
                layer.key_norm_D,
            )
            if norm is not None
        ]
        embedding = self.embedding
        return [
            embedding if isinstance(embedding, Tensor) else embedding.tiles_BPL2,
            *(self.final_norm_H, self.cos_PR, self.sin_PR),
            *norms,
            *(tensor for linear in self.linears() for tensor in linear.tensors()),
            *(t for substitute in self._substitutes() for t in substitute.tensors()),
        ]


def bytes_per_block(model: DecoderModel) -> int:
    """Cache memory of one block of `BLOCK_SIZE` tokens in all layers."""
    heads = sum(layer.num_kv_heads for layer in model.layers)
    return 2 * heads * model.config.head_dim * BLOCK_SIZE * model.dtype.itemsize


def build_kv_cache(model: DecoderModel, num_blocks: int) -> list[LayerCache]:
    """A cache for `num_blocks` blocks. On a CPU its memory is not resident until it is written."""

    def part(layer: DecoderLayer) -> Tensor:
        shape = (num_blocks, BLOCK_SIZE, layer.num_kv_heads, model.config.head_dim)
        # Zeros, because what is masked is still multiplied by zero, and a NaN would stay one.
        if model.device.type != "cpu":
            return torch.zeros(shape, dtype=model.dtype, device=model.device)
        memory = map_memory(math.prod(shape) * model.dtype.itemsize)
        return memory.view(model.dtype).view(shape)

    return [(part(layer), part(layer)) for layer in model.layers]


def read_decoder_config(folder: Path) -> DecoderConfig:
    """Raises: UnsupportedModelError: the configuration asks for something that the decoder does not have."""
    return _decoder_config(folder, _transformers_config(folder))


def _transformers_config(folder: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except ValueError as error:  # a model type that transformers does not know
        raise UnsupportedModelError(str(error)) from None


def _decoder_config(folder: Path, config: Any) -> DecoderConfig:
    def need(condition: bool, message: str) -> None:
        if not condition:
            raise UnsupportedModelError(message)

    known = ", ".join(SUPPORTED_MODELS)
    need(config.model_type in SUPPORTED_MODELS, f"model type {config.model_type}, known: {known}")
    need(config.hidden_act == "silu", f"activation {config.hidden_act}, known: silu")
    rope = config.rope_parameters
    known = ", ".join(SUPPORTED_SCALINGS)
    rope_type = rope.get("rope_type")
    need(rope_type in SUPPORTED_SCALINGS, f"rope scaling {rope_type}, known: {known}")
    rotated_share = rope.get("partial_rotary_factor", 1.0)
    need(rotated_share == 1.0, f"partial_rotary_factor {rotated_share}, known: 1")
    head_dim = getattr(config, "head_dim", None)
    return DecoderConfig(
        model_type=config.model_type,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        head_dim=head_dim or config.hidden_size // config.num_attention_heads,
        rms_norm_epsilon=config.rms_norm_eps,
        max_position_embeddings=config.max_position_embeddings,
        ties_embeddings=config.tie_word_embeddings,
        windows=_windows(config),
        eos_token_ids=_eos_token_ids(folder, config),
    )


def _windows(config: Any) -> tuple[int | None, ...]:
    """Mistral's window is every layer's; the Qwens say it by layer; a Llama has none."""
    num_layers: int = config.num_hidden_layers
    if config.model_type == "llama":
        return (None,) * num_layers
    window: int | None = config.sliding_window
    if config.model_type == "mistral":
        return (window,) * num_layers
    return tuple(window if kind == "sliding_attention" else None for kind in config.layer_types)


def _eos_token_ids(folder: Path, config: Any) -> tuple[int, ...]:
    """generation_config.json's, else config.json's."""
    from transformers import GenerationConfig

    eos = None
    if (folder / "generation_config.json").is_file():
        eos = GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id
    if eos is None:
        eos = config.eos_token_id
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list | tuple) else (int(eos),)


def load_decoder(
    folder: Path, *, dtype: torch.dtype = torch.bfloat16, device: str | torch.device = "cpu"
) -> DecoderModel:
    """Build the decoder of a checkpoint, layer by layer: no more of the files than one layer is held beside it.

    Raises:
        CheckpointError: the files are not what the manifest promises, or lack or have a tensor that the
            architecture does not.
        UnsupportedModelError: see `read_decoder_config`.
    """
    transformers_config = _transformers_config(folder)
    config = _decoder_config(folder, transformers_config)
    checkpoint = open_checkpoint(folder)
    weights = _Weights(checkpoint, dtype, torch.device(device))
    embedding_VH = weights.other("model.embed_tokens.weight")
    embedding: Embedding = embedding_VH
    layers = [_load_layer(weights, index, config) for index in range(config.num_layers)]
    if weights.has_linear("lm_head"):
        lm_head = weights.linear("lm_head")
    elif config.ties_embeddings:
        lm_head, embedding = tie_head(embedding_VH, is_int4=weights.has_int4)
    else:
        raise CheckpointError(f"{folder.name}: no lm_head, and embeddings are not tied")
    final_norm_H = weights.other("model.norm.weight")
    weights.check_all_used(folder)
    cos_PR, sin_PR = rotary_tables(
        transformers_config, config.head_dim, config.max_position_embeddings
    )
    return DecoderModel(
        config=config,
        embedding=embedding,
        layers=layers,
        final_norm_H=final_norm_H,
        lm_head=lm_head,
        cos_PR=cos_PR.to(device),
        sin_PR=sin_PR.to(device),
        ffn_skip=load_ffn_skip(
            checkpoint,
            num_layers=config.num_layers,
            hidden_size=config.hidden_size,
            dtype=dtype,
            device=torch.device(device),
        ),
    )


class _Weights:
    """Takes tensors out of a checkpoint, once each."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        self._checkpoint = checkpoint
        self._matrices = {matrix.name: matrix for matrix in checkpoint.manifest.matrices}
        self._others = set(checkpoint.manifest.other_tensors)
        self.has_int4 = any(matrix.linear.bits == 4 for matrix in checkpoint.manifest.matrices)
        self._dtype = dtype
        self._device = device

    def has_linear(self, name: str) -> bool:
        return name in self._matrices

    def has_other(self, name: str) -> bool:
        return name in self._others

    def other(self, name: str) -> Tensor:
        if name not in self._others:
            raise CheckpointError(f"{self._checkpoint.folder.name}: no tensor {name}")
        self._others.remove(name)
        # A copy of its own: a view would keep the whole file mapped.
        return self._checkpoint.tensor(name).to(self._device, self._dtype, copy=True)

    def linear(self, *names: str) -> Linear:
        """One product for layers that share their input."""
        parts = [self._linear_weight(self._take(name)) for name in names]
        return build_linear(parts, dtype=self._dtype, device=self._device)

    def out_features(self, name: str) -> int:
        return self._matrix(name).linear.out_features

    def _matrix(self, name: str) -> Matrix:
        if name not in self._matrices:
            raise CheckpointError(f"{self._checkpoint.folder.name}: no linear layer {name}")
        return self._matrices[name]

    def _take(self, name: str) -> Matrix:
        matrix = self._matrix(name)
        del self._matrices[name]
        return matrix

    def _linear_weight(self, matrix: Matrix) -> LinearWeight:
        stored = self._checkpoint.linear_tensors(matrix)
        bias_O = stored.get("bias")
        factors = decode(matrix.linear, stored)
        if len(factors) == 1:
            return LinearWeight(weight=factors[0], bias_O=bias_O)
        weight_u, weight_v = factors
        return LinearWeight(
            weight=LowRankWeight(weight_u=weight_u, weight_v=weight_v), bias_O=bias_O
        )

    def check_all_used(self, folder: Path) -> None:
        for name in [*self._matrices, *self._others]:
            raise CheckpointError(f"{folder.name}: {name} has no place in the architecture")


def _load_layer(weights: _Weights, index: int, config: DecoderConfig) -> DecoderLayer:
    prefix = f"model.layers.{index}"
    attention = f"{prefix}.self_attn"
    num_heads = weights.out_features(f"{attention}.q_proj") // config.head_dim
    num_kv_heads = weights.out_features(f"{attention}.k_proj") // config.head_dim
    query_norm_D: Tensor | None = None
    key_norm_D: Tensor | None = None
    if weights.has_other(f"{attention}.q_norm.weight"):
        query_norm_D = weights.other(f"{attention}.q_norm.weight")
        key_norm_D = weights.other(f"{attention}.k_norm.weight")
    return DecoderLayer(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        input_norm_H=weights.other(f"{prefix}.input_layernorm.weight"),
        post_norm_H=weights.other(f"{prefix}.post_attention_layernorm.weight"),
        qkv=weights.linear(*(f"{attention}.{name}_proj" for name in "qkv")),
        o=weights.linear(f"{attention}.o_proj"),
        gate_up=weights.linear(f"{prefix}.mlp.gate_proj", f"{prefix}.mlp.up_proj"),
        down=weights.linear(f"{prefix}.mlp.down_proj"),
        query_norm_D=query_norm_D,
        key_norm_D=key_norm_D,
        window=config.windows[index],
    )
