"""The configuration of NVIDIA's Nemotron-NAS models ("DeciLM"): Llama blocks of different widths and key-value heads
(Puzzle, Bercovich et al. 2024, arXiv:2411.19146), as `config.json` of those models, vLLM and llama.cpp read it.

Each entry of `block_configs` has `attention.n_heads_in_group`, from which the number of key-value heads follows, and
`ffn.ffn_mult`, from which the width follows: 2 / 3 * ffn_mult * hidden size, rounded up to a multiple of 256.
Query heads are equally many in all blocks, and of hidden size / number each. What does not fit is padded with zeros,
which cost memory and time and change no logit. One flag stands for the biases of all layers of a kind.

Shapes: O output channels, I input channels, G key-value heads, Q query heads of each, D channels of a head.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from compression.checkpoint import LAYER_SHAPES, LayerShape, Matrix, head_dim, layer_shapes
from compression.safetensors_header import CheckpointError

JsonObject = dict[str, Any]
WIDTH_MULTIPLE = 256
MODEL_TYPES = ("llama", "mistral", "qwen2")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_FFN = ("gate_proj", "up_proj", "down_proj")
# Fields of config.json that the format says in its own way, or must not say.
_REPLACED = (
    LAYER_SHAPES, "model_type", "architectures", "intermediate_size", "num_key_value_heads", "head_dim",
    "attention_bias", "mlp_bias", "layer_types", "sliding_window", "use_sliding_window", "max_window_layers",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Attributes:
    config: the whole config.json.
    before, after: shapes of the blocks as they are, and as they are written.
    attention_bias, mlp_bias: whether all layers of the kind have one.
    """

    config: JsonObject
    before: list[LayerShape]
    after: list[LayerShape]
    head_dim: int
    attention_bias: bool
    mlp_bias: bool

    def pad(self, name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """A layer's weight and bias with zeros where the format needs them."""
        _, _, path = name.partition(".layers.")
        if not path:
            return tensors
        index, _, layer = path.partition(".")
        before, after = self.before[int(index)], self.after[int(index)]
        weight_OI, bias_O = tensors["weight"], tensors.get("bias")
        kind = layer.rpartition(".")[2]
        wants_bias = self.attention_bias if kind in _ATTENTION else self.mlp_bias
        if bias_O is None and wants_bias:
            bias_O = weight_OI.new_zeros(len(weight_OI))
        match kind:
            case "q_proj":
                weight_OI = _pad_queries(weight_OI, before, after)
                bias_O = None if bias_O is None else _pad_queries(bias_O, before, after)
            case "o_proj":
                weight_OI = _pad_queries(weight_OI.T, before, after).T.contiguous()
            case "k_proj" | "v_proj":
                more = (after.num_key_value_heads - before.num_key_value_heads) * self.head_dim
                weight_OI, bias_O = _pad_rows(weight_OI, bias_O, more)
            case "gate_proj" | "up_proj":
                more = after.intermediate_size - before.intermediate_size
                weight_OI, bias_O = _pad_rows(weight_OI, bias_O, more)
            case "down_proj":
                more = after.intermediate_size - before.intermediate_size
                weight_OI = F.pad(weight_OI, (0, more))
        return {"weight": weight_OI} | ({} if bias_O is None else {"bias": bias_O})


def plan_layout(config: JsonObject, matrices: Sequence[Matrix]) -> Layout:
    """How a checkpoint looks in this format.

    Args:
        config: config.json of the checkpoint.

    Raises:
        CheckpointError: the format has no place for what the model is.
    """
    _check(config)
    size = head_dim(config)
    before = layer_shapes(config) or [_uniform_shape(config)] * config["num_hidden_layers"]
    num_heads = config["hidden_size"] // size
    after = [_padded(shape, num_heads) for shape in before]

    def has_bias(kinds: tuple[str, ...]) -> bool:
        return any(m.linear.bias for m in matrices if m.name.rpartition(".")[2] in kinds)

    kept = {name: value for name, value in config.items() if name not in _REPLACED}
    attention_bias, mlp_bias = has_bias(_ATTENTION), has_bias(_FFN)
    return Layout(
        config=kept
        | {
            "model_type": "nemotron-nas",
            "architectures": ["DeciLMForCausalLM"],
            "num_attention_heads": num_heads,
            "num_key_value_heads": None,
            "intermediate_size": None,
            "attention_bias": attention_bias,
            "mlp_bias": mlp_bias,
            "block_configs": [_block_config(shape, config["hidden_size"]) for shape in after],
        },
        before=before,
        after=after,
        head_dim=size,
        attention_bias=attention_bias,
        mlp_bias=mlp_bias,
    )


def _check(config: JsonObject) -> None:
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        raise CheckpointError(
            f"nemotron-nas has Llama's blocks ({', '.join(MODEL_TYPES)}), this model is {model_type!r}"
        )
    windowed = config.get("sliding_window") and config.get("use_sliding_window", True)
    if model_type != "llama" and windowed:
        raise CheckpointError("nemotron-nas has no sliding window, this model has one")
    if config["hidden_size"] % head_dim(config):
        raise CheckpointError(
            f"nemotron-nas derives the size of a head from hidden_size {config['hidden_size']}, which heads of"
            f" {head_dim(config)} do not divide"
        )


def _uniform_shape(config: JsonObject) -> LayerShape:
    heads = config["num_attention_heads"]
    return LayerShape(
        intermediate_size=config["intermediate_size"],
        num_attention_heads=heads,
        num_key_value_heads=config.get("num_key_value_heads") or heads,
    )


def _padded(shape: LayerShape, num_heads: int) -> LayerShape:
    """The fewest key-value heads that the block's groups fit into."""
    fitting = [
        groups
        for groups in range(shape.num_key_value_heads, num_heads + 1)
        if num_heads % groups == 0 and num_heads // groups >= shape.heads_per_group
    ]
    if not fitting:
        raise CheckpointError(f"nemotron-nas: {shape} does not fit into {num_heads} heads")
    return replace(
        shape,
        intermediate_size=-(-shape.intermediate_size // WIDTH_MULTIPLE) * WIDTH_MULTIPLE,
        num_attention_heads=num_heads,
        num_key_value_heads=min(fitting),
    )


def _block_config(shape: LayerShape, hidden_size: int) -> JsonObject:
    return {
        "attention": {
            "n_heads_in_group": shape.heads_per_group,
            "no_op": False,
            "replace_with_linear": False,
        },
        "ffn": {
            # Rounding errors are below one channel, and rounding up to the multiple swallows one that is missing.
            "ffn_mult": 3 * (shape.intermediate_size - 0.5) / (2 * hidden_size),
            "no_op": False,
            "replace_with_linear": False,
        },
    }


def _pad_queries(rows: Tensor, before: LayerShape, after: LayerShape) -> Tensor:
    """Zeros for query heads that are not there: rows (G * Q * D, ...) in both shapes' own order."""
    groups, per_group = before.num_key_value_heads, before.heads_per_group
    split = rows.reshape(groups, per_group, -1, *rows.shape[1:])
    padded = split.new_zeros(after.num_key_value_heads, after.heads_per_group, *split.shape[2:])
    padded[:groups, :per_group] = split
    return padded.reshape(-1, *rows.shape[1:])


def _pad_rows(weight_OI: Tensor, bias_O: Tensor | None, more: int) -> tuple[Tensor, Tensor | None]:
    padded_OI = torch.cat([weight_OI, weight_OI.new_zeros(more, weight_OI.shape[1])])
    return padded_OI, None if bias_O is None else F.pad(bias_O, (0, more))
