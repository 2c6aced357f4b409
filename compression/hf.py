"""Builds a transformers model from any Lathe checkpoint. Codes stay packed and low rank stays factored in memory.

transformers' modules are the truth for compression, evaluation and training, and the oracle of every engine.
Remote code is never run: `trust_remote_code` is False wherever transformers asks.

Folders that plain transformers cannot express say so in config.json (`LATHE_ONLY`): by itself `from_pretrained` refuses
them for want of a weights file of a telling name; once this module is imported its quantizer reads them.
"""

import inspect
import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from compression.checkpoint import (
    LAYER_SHAPES,
    Checkpoint,
    LayerShape,
    Matrix,
    layer_shapes,
    open_checkpoint,
)
from compression.linear import build_linear
from compression.safetensors_header import CheckpointError

LATHE_ONLY: dict[str, Any] = {
    "quantization_config": {"quant_method": "lathe"},
    # An unknown quant_method alone is a warning to transformers, after which missing weights are random.
    "transformers_weights": "only-after-import-compression.hf-or-lathe-export.safetensors",
}
MAX_REASON = 300
FINGERPRINT_TOKENS = 16
FINGERPRINT_LOGITS = 8


def is_lathe_only(config: Mapping[str, Any], kinds: Collection[str]) -> bool:
    """Whether `LATHE_ONLY` marks a checkpoint of these kinds of matrices: plain transformers cannot express it."""
    return "low_rank" in kinds or "two_four" in kinds or LAYER_SHAPES in config


def load_model(
    folder: Path, *, dtype: torch.dtype = torch.bfloat16, device: str | torch.device = "cpu"
) -> Any:
    """A model in eval mode, without gradients; encoders give `AutoModel`, decoders `AutoModelForCausalLM`.

    Raises:
        CheckpointError: the files are not what the manifest promises.
    """
    checkpoint = open_checkpoint(folder)
    device = torch.device(device)
    auto_class = AutoModel if checkpoint.manifest.kind == "encoder" else AutoModelForCausalLM
    shapes = layer_shapes(read_config(folder))
    if shapes is None and all(m.linear.kind == "dense" for m in checkpoint.manifest.matrices):
        model = auto_class.from_pretrained(
            folder, dtype=dtype, local_files_only=True, trust_remote_code=False
        )
    else:
        model = build_skeleton(checkpoint, auto_class, dtype)
        _fill(model, checkpoint, dtype, device)
    return model.to(device).eval().requires_grad_(False)


def build_skeleton(checkpoint: Checkpoint, auto_class: Any, dtype: torch.dtype) -> Any:
    """A model in the shape that config.json tells, its memory untouched: pages that nothing writes to are never
    resident."""
    folder = checkpoint.folder
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    for name in LATHE_ONLY.keys() & config.to_dict().keys():
        delattr(config, name)  # ours to read, not transformers'
    with _no_initialisation():
        model: nn.Module = auto_class.from_config(config, dtype=dtype, trust_remote_code=False)
    _fit(model, checkpoint)
    return model


def check_config(checkpoint: Checkpoint) -> None:
    """Whether config.json describes the layers that the checkpoint has. Takes no memory.

    Raises:
        CheckpointError: a layer has another shape or is in no place of the model, or there is no such model.
    """
    try:
        with torch.device("meta"):
            model = build_skeleton(checkpoint, AutoModelForCausalLM, torch.float32)
    except CheckpointError:
        raise
    except Exception as error:  # an impossible configuration breaks anywhere in transformers
        raise CheckpointError(f"config.json describes no model: {error}"[:MAX_REASON]) from error
    for matrix in checkpoint.manifest.matrices:
        module = _promised(model, matrix.name)
        if isinstance(module, nn.Linear):
            promised = (module.out_features, module.in_features)
            actual = (matrix.linear.out_features, matrix.linear.in_features)
            if actual != promised:
                raise CheckpointError(f"{matrix.name} is {actual}, config.json promises {promised}")


def _promised(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise CheckpointError(f"{name} is in no layer that config.json promises") from None


def _fit(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Give the model the shapes of blocks and the biases that its architecture's own configuration cannot tell."""
    shapes = layer_shapes(read_config(checkpoint.folder))
    if shapes is not None:
        _reshape_blocks(model, shapes)
    for matrix in checkpoint.manifest.matrices:
        if matrix.linear.bias:
            linear = _promised(model, matrix.name)
            if isinstance(linear, nn.Linear) and linear.bias is None:
                model.set_submodule(matrix.name, _resized(linear, bias=True))


def _reshape_blocks(model: Any, shapes: list[LayerShape]) -> None:
    """Give every block the width and heads of its own. Modules of transformers' Llama family take their head counts
    from the projections, and the ratio of the two from `num_key_value_groups`."""
    for layer, shape in zip(model.model.layers, shapes, strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        heads = shape.num_attention_heads * attention.head_dim
        key_value_heads = shape.num_key_value_heads * attention.head_dim
        attention.q_proj = _resized(attention.q_proj, out_features=heads)
        attention.k_proj = _resized(attention.k_proj, out_features=key_value_heads)
        attention.v_proj = _resized(attention.v_proj, out_features=key_value_heads)
        attention.o_proj = _resized(attention.o_proj, in_features=heads)
        attention.num_key_value_groups = shape.num_attention_heads // shape.num_key_value_heads
        mlp.gate_proj = _resized(mlp.gate_proj, out_features=shape.intermediate_size)
        mlp.up_proj = _resized(mlp.up_proj, out_features=shape.intermediate_size)
        mlp.down_proj = _resized(mlp.down_proj, in_features=shape.intermediate_size)


def _resized(
    linear: nn.Linear,
    *,
    in_features: int | None = None,
    out_features: int | None = None,
    bias: bool = False,
) -> nn.Linear:
    return nn.Linear(
        in_features or linear.in_features,
        out_features or linear.out_features,
        bias=bias or linear.bias is not None,
        device="meta",
        dtype=linear.weight.dtype,
    )


def _no_initialisation() -> Any:
    from transformers.initialization import no_init_weights

    return no_init_weights()


def _fill(
    model: nn.Module, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device
) -> None:
    """Put the checkpoint's tensors in, replacing each compressed layer by a module that keeps it so."""
    manifest = checkpoint.manifest
    remaining = manifest.promised_tensors().keys() - manifest.skip_tensors().keys()
    replaced = _compressed(checkpoint)
    _fill_compressed(model, checkpoint, dtype, device)
    for matrix in replaced:
        remaining -= {f"{matrix.name}.{suffix}" for suffix in matrix.linear.tensors()}
    dense: dict[str, Tensor] = {n: t.to(dtype) for n, t in checkpoint.tensors(sorted(remaining))}
    result = model.load_state_dict(dense, strict=False, assign=True)
    model.tie_weights()  # type: ignore[operator]
    inside = tuple(f"{matrix.name}." for matrix in replaced)
    expected = {name for name, _ in model.named_parameters() if not name.startswith(inside)}
    missing = expected - dense.keys() - _tied(model)
    if result.unexpected_keys or missing:
        raise RuntimeError(f"unexpected {result.unexpected_keys}, missing {sorted(missing)}")


def _compressed(checkpoint: Checkpoint) -> list[Matrix]:
    """Layers that transformers' own modules do not hold."""
    return [matrix for matrix in checkpoint.manifest.matrices if matrix.linear.kind != "dense"]


def _fill_compressed(
    model: nn.Module, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device
) -> None:
    for matrix in _compressed(checkpoint):
        stored = checkpoint.linear_tensors(matrix)
        module = build_linear(matrix.linear, stored, dtype=dtype, device=device)
        model.set_submodule(matrix.name, module)


class _LatheConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The `quantization_config` of `LATHE_ONLY`."""

    def __init__(self, **_: Any) -> None:
        self.quant_method = "lathe"


class _LatheQuantizer(HfQuantizer):  # type: ignore[misc]
    """Lets `from_pretrained` read what `LATHE_ONLY` marks: its modules are those of `load_model`."""

    _checkpoint: Checkpoint

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        if isinstance(device_map, dict) and len(set(device_map.values())) > 1:
            raise ValueError("a Lathe checkpoint loads on one device, device_map names several")

    def update_attn_implementation(self, config: Any) -> Any:
        """Called before files are looked for: here the name of a file that is not there goes."""
        config.transformers_weights = None
        return config

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self._checkpoint = open_checkpoint(Path(kwargs["checkpoint_files"][0]).parent)
        _fit(model, self._checkpoint)
        ignored = set(model._keys_to_ignore_on_load_unexpected or ())
        for matrix in _compressed(self._checkpoint):
            model.set_submodule(matrix.name, nn.Identity())  # until `_fill_compressed`
            ignored.add(rf"^{re.escape(matrix.name)}\.")
        model._keys_to_ignore_on_load_unexpected = ignored
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        _fill_compressed(model, self._checkpoint, model.dtype, model.device)
        return model

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False


# Without this hook (transformers 5.17 has none) nothing can take the telling name away: refused, imported or not.
if hasattr(HfQuantizer, "update_attn_implementation"):
    register_quantization_config("lathe")(_LatheConfig)
    register_quantizer("lathe")(_LatheQuantizer)


def _tied(model: nn.Module) -> set[str]:
    keys = getattr(model, "all_tied_weights_keys", None) or {}
    return set(keys)


def kernels(model: nn.Module) -> dict[str, str]:
    """Kernel name to the number of layers that use it."""
    counts: dict[str, int] = {}
    for module in model.modules():
        name = getattr(module, "kernel", None)
        if isinstance(name, str):
            counts[name] = counts.get(name, 0) + 1
        elif isinstance(module, nn.Linear):
            key = f"linear: torch {str(module.weight.dtype).removeprefix('torch.')}"
            counts[key] = counts.get(key, 0) + 1
    return {name: f"{count} layers" for name, count in counts.items()}


def cache_argument(model: nn.Module) -> str:
    """What this model's forward pass calls its KV cache: transformers 5.24 renamed it."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def resident_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers as held, shared storage counted once."""
    storages = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@torch.inference_mode()
def fingerprint(model: Any) -> dict[str, Any]:
    """Fixed token ids and the float32 logits that they give at the last position.

    Kept in the manifest and compared within a tolerance, so that a load that silently went wrong shows.
    """
    vocab_size = int(model.get_input_embeddings().weight.shape[0])
    token_ids = [(7919 * (i + 1)) % vocab_size for i in range(FINGERPRINT_TOKENS)]
    output = model(torch.tensor([token_ids], device=model.device))
    logits = getattr(output, "logits", None)
    if logits is None:
        logits = output.last_hidden_state
    values = logits[0, -1, :FINGERPRINT_LOGITS].float()
    scale = float(logits[0, -1].float().std())
    return {"token_ids": token_ids, "logits": [round(float(v), 4) for v in values], "scale": scale}


def check_fingerprint(model: Any, expected: dict[str, Any], *, tolerance: float = 0.05) -> float:
    """Largest difference of the fingerprint's logits, in units of the logits' spread.

    Raises:
        CheckpointError: it exceeds the tolerance.
    """
    actual = fingerprint(model)
    difference: float = max(
        abs(a - b) for a, b in zip(actual["logits"], expected["logits"], strict=True)
    ) / max(expected["scale"], 1e-6)
    if actual["token_ids"] != expected["token_ids"] or difference > tolerance:
        raise CheckpointError(
            f"logits differ from the manifest's by {difference:.3f} of their spread"
        )
    return difference


def read_config(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text())
    assert isinstance(config, dict)
    return config
