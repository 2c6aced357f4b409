"""Methods behind one interface: which weights of a model are trained, in what form, and what they are in the end.

`prepare` turns a model into its trainable form: INT4 codes become dense, Q-GaLore's matrices INT8
codes, LoRA's layers get adapters. `TrainableModel.matrix` undoes it for the result.

| method | trained | projected |
|---|---|---|
| full | everything | nothing |
| galore, qgalore | everything | the matrices of the blocks, or both factors of a low-rank one |
| lrc_only, lrc_only_qgalore | factors of low-rank layers, norms | nothing; the factors |
| lora, qlora | adapters on the matrices of the blocks | nothing |
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compression.checkpoint import LowRankLinear, Manifest
from compression.hf import resident_bytes
from compression.linear import QuantizedLinear
from training.q_galore.int8_linear import Int8Linear
from training.q_galore.optimizer import Projection, SubspaceAdamW, TrainedWeight, build_optimizer
from training.spec import (
    FinetuneSettings,
    Full,
    GaLore,
    Lora,
    LrcOnly,
    LrcOnlyQGaLore,
    Method,
    QGaLore,
    QLora,
)

ADAPTER = "default"
_IN_BLOCK = re.compile(r"\.\d+\.")


class MissingDependencyError(RuntimeError):
    """A method needs a package that is not installed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainableModel:
    """A model whose trained weights are ready for the optimizer.

    Attributes:
        model: transformers' module tree.
        weights: what is trained, in the order of the model's parameters.
        dtype: of activations.
    """

    model: Any
    weights: list[TrainedWeight]
    method: Method
    dtype: torch.dtype

    def is_trained(self, path: str) -> bool:
        """Whether a tensor, or one under this module path, is trained; an adapter trains its layer."""
        return any(w.name == path or w.name.startswith(f"{path}.") for w in self.weights)

    def matrix(self, path: str) -> Tensor:
        """The weight that a linear layer has now, adapters included, in the precision that it is held in."""
        layer = self.model.get_submodule(path)
        if isinstance(layer, Int8Linear):
            return layer.dequantize()
        base = getattr(layer, "base_layer", None)
        if base is None:
            weight: Tensor = layer.weight.detach()
            return weight
        adapter: Tensor = layer.get_delta_weight(ADAPTER).detach()
        return _base_weight(base).float() + adapter.float()

    def weight_bytes(self) -> int:
        """Bytes of the model as held, with the masks of pruned weights and the scales of a quantized base."""
        masks = [w.keep_mask.numel() for w in self.weights if w.keep_mask is not None]
        states = [getattr(p, "quant_state", None) for p in self.model.parameters()]
        scales = [s.absmax.numel() * s.absmax.element_size() for s in states if s is not None]
        rows = [p.SCB.numel() * 4 for p in self.model.parameters() if hasattr(p, "SCB")]
        total: int = resident_bytes(self.model) + sum(masks) + sum(scales) + sum(rows)
        return total

    def state_dict(self) -> dict[str, Tensor]:
        """The trained weights as plain tensors, INT8 ones as their codes."""
        return dict(self._tensors())

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Raises: KeyError: a tensor is missing."""
        for name, tensor in self._tensors():
            tensor.copy_(state[name])

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for weight in self.weights:
            if weight.layer is None:
                yield weight.name, weight.parameter.detach()
            else:
                quantized = weight.layer.quantized
                yield f"{weight.name}_codes", quantized.codes
                yield f"{weight.name}_scale", quantized.scale_G
                yield f"{weight.name}_zero_point", quantized.zero_point_G

    def build_optimizer(self, settings: FinetuneSettings) -> SubspaceAdamW:
        method = self.method
        return build_optimizer(
            self.weights,
            projection=projection_of(method),
            # Adapters are small: their moments stay in float32, and nothing is gained by freeing gradients early.
            state_bits=32 if isinstance(method, Lora) else method.state_bits,
            per_layer=False if isinstance(method, Lora) else method.per_layer,
            max_gradient_norm=settings.max_gradient_norm,
            weight_decay=settings.weight_decay,
            seed=settings.seed,
        )


def projection_of(method: Method) -> Projection | None:
    if not isinstance(method, GaLore | QGaLore):
        return None
    lazy = method if isinstance(method, QGaLore) else None
    return Projection(
        rank=method.rank,
        scale=method.scale,
        refresh_interval=method.refresh_interval,
        refresh=method.refresh,
        lazy=lazy is not None and lazy.lazy,
        similarity="overlap" if lazy is None else lazy.similarity,
        basis_bits=32 if lazy is None else 4,
    )


def prepare(model: Any, manifest: Manifest, settings: FinetuneSettings) -> TrainableModel:
    """Make a model trainable, in place.

    Args:
        model: as `compression.hf.load_model` gives it in float32 or, without quantized layers, in `settings.dtype`;
            on its device.
        manifest: of the checkpoint that it was loaded from, which `check_source` accepts for the method.

    Raises:
        MissingDependencyError: lora or qlora without their packages.
    """
    method = settings.method
    dtype = torch.float32 if settings.dtype == "float32" else torch.bfloat16
    low_rank_only = isinstance(method, LrcOnly | LrcOnlyQGaLore)
    trained = {}  # module path to whether zeros stay
    for row in manifest.matrices:
        low_rank = isinstance(row.linear, LowRankLinear)
        if not _IN_BLOCK.search(row.name) or (low_rank_only and not low_rank):
            continue
        factors = ("weight_u", "weight_v") if low_rank else ()
        for path in [f"{row.name}.{factor}" for factor in factors] or [row.name]:
            trained[path] = row.sparsity > 0
    for path, layer in list(model.named_modules()):
        if isinstance(layer, QuantizedLinear):
            model.set_submodule(path, _dense(layer))
    model.to(dtype)
    model.requires_grad_(False)
    if isinstance(method, Lora):
        weights = _add_adapters(model, list(trained), method, dtype)
        return TrainableModel(model=model, weights=weights, method=method, dtype=dtype)
    masks = {
        f"{path}.weight": model.get_submodule(path).weight != 0
        for path, pruned in trained.items()
        if pruned
    }
    if isinstance(method, QGaLore):
        for path in trained:
            linear = model.get_submodule(path)
            model.set_submodule(path, Int8Linear(linear.weight.detach(), linear.bias, dtype))
    weights = []
    for name, parameter in model.named_parameters():
        path, _, kind = name.rpartition(".")
        in_matrix = path in trained
        if low_rank_only and not (in_matrix and kind != "bias") and "norm" not in name:
            continue
        parameter.requires_grad_(True)
        layer = model.get_submodule(path)
        int8 = layer if isinstance(layer, Int8Linear) and kind == "anchor" else None
        weight_name = f"{path}.weight" if int8 is not None else name
        weights.append(
            TrainedWeight(
                name=weight_name,
                parameter=parameter,
                layer=int8,
                keep_mask=masks.get(weight_name),
                projected=in_matrix and kind != "bias" and not isinstance(method, Full | LrcOnly),
            )
        )
    return TrainableModel(model=model, weights=weights, method=method, dtype=dtype)


def _dense(layer: QuantizedLinear) -> nn.Linear:
    """The same layer without codes. Frozen ones too: autograd would keep what they dequantize anyway."""
    weight_OI = layer.dequantize()
    dense = nn.Linear(
        weight_OI.shape[1], weight_OI.shape[0], bias=layer.bias is not None, device="meta"
    )
    dense.weight, dense.bias = nn.Parameter(weight_OI), layer.bias  # type: ignore[assignment]
    return dense


def _add_adapters(
    model: Any, paths: list[str], method: Lora, dtype: torch.dtype
) -> list[TrainedWeight]:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise MissingDependencyError(
            f"{method.name} needs the package peft (extra: lora)"
        ) from None
    if isinstance(method, QLora):
        _quantize_base(model, paths, method, dtype)
    config = LoraConfig(
        r=method.rank,
        lora_alpha=method.alpha,
        lora_dropout=method.dropout,
        target_modules=paths,
        bias="none",
    )
    inject_adapter_in_model(config, model, ADAPTER)
    weights = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # small, and worth the precision
            weights.append(TrainedWeight(name=name, parameter=parameter))
    return weights


def _quantize_base(model: Any, paths: list[str], method: QLora, dtype: torch.dtype) -> None:
    try:
        from bitsandbytes import nn as quantized
    except ImportError:
        raise MissingDependencyError(
            f"{method.name} needs the package bitsandbytes (extra: lora)"
        ) from None
    for path in paths:
        linear = model.get_submodule(path)
        size = (linear.in_features, linear.out_features)
        weight, device = linear.weight.detach(), linear.weight.device
        base: Any
        if method.bits == 4:
            base = quantized.Linear4bit(*size, bias=False, compute_dtype=dtype, quant_type="nf4")
            base.weight = quantized.Params4bit(weight, requires_grad=False, quant_type="nf4")
            # Or else the first evaluation on a CPU turns the weight into a form that has no gradient.
            base.support_avx512bf16_for_cpu = False
        else:
            # Without a threshold no column is taken for an outlier: all of the base has 8 bits.
            base = quantized.Linear8bitLt(*size, bias=False, has_fp16_weights=False, threshold=0.0)
            base.weight = quantized.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        base.bias = linear.bias
        model.set_submodule(path, base.to(device))
    # By these peft knows what to expect.
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = method.bits == 4, method.bits == 8


def _base_weight(base: Any) -> Tensor:
    if type(base) is nn.Linear:
        return base.weight.detach()
    from bitsandbytes import functional

    weight: Tensor
    if getattr(base.weight, "quant_state", None) is not None:
        weight = functional.dequantize_4bit(base.weight.data, base.weight.quant_state)
        return weight
    codes, scale = (
        (base.weight.CB, base.weight.SCB)
        if base.weight.CB is not None
        else (base.state.CB, base.state.SCB)
    )
    weight = functional.int8_vectorwise_dequant(codes, scale)
    return weight
