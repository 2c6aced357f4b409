"""Products y = x W^T + b with a weight of any checkpoint kind, and of several weights that share their input.

A `Linear` owns its weight in the one form that its kernel wants. INT4 products are `compression.linear`'s modules.

Shapes: T rows, O output channels, I input channels, R rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from compression.linear import build_int4_linear
from compression.quantization.int4 import QuantizedWeight

MatrixWeight = Tensor | QuantizedWeight
"""A dense (O, I) weight, or its INT4 codes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRankWeight:
    """W ~ weight_u @ weight_v: (O, R) and (R, I), each dense or INT4."""

    weight_u: MatrixWeight
    weight_v: MatrixWeight


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearWeight:
    """One linear layer as a checkpoint stores it, on the CPU.

    Attributes:
        bias_O: None where the layer has none.
    """

    weight: MatrixWeight | LowRankWeight
    bias_O: Tensor | None = None

    @property
    def out_features(self) -> int:
        weight = self.weight
        return _num_rows(weight.weight_u if isinstance(weight, LowRankWeight) else weight)


class Linear(Protocol):
    """A product that is ready to run. Attributes: kernel: the implementation, for `EngineInfo.kernels`."""

    kernel: str

    def __call__(self, x_TI: Tensor) -> Tensor: ...

    def tensors(self) -> list[Tensor]:
        """Everything it holds."""


class DenseLinear:
    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        self.weight_OI = weight_OI
        self.bias_O = bias_O
        self.kernel = f"torch {str(weight_OI.dtype).removeprefix('torch.')}"

    def __call__(self, x_TI: Tensor) -> Tensor:
        return F.linear(x_TI, self.weight_OI, self.bias_O)

    def tensors(self) -> list[Tensor]:
        return [self.weight_OI] if self.bias_O is None else [self.weight_OI, self.bias_O]


class Int4Linear:
    def __init__(
        self,
        quantized: QuantizedWeight,
        bias_O: Tensor | None,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._module = build_int4_linear(quantized, bias_O, dtype=dtype, device=device)
        self.kernel = str(self._module.kernel)

    def __call__(self, x_TI: Tensor) -> Tensor:
        y_TO: Tensor = self._module.forward(x_TI)
        return y_TO

    def tensors(self) -> list[Tensor]:
        return [*self._module.parameters(), *self._module.buffers()]


class LowRankLinear:
    """Two thin products; the rank-R intermediate is all that passes between them."""

    def __init__(self, linear_u: Linear, linear_v: Linear) -> None:
        self._linear_u = linear_u
        self._linear_v = linear_v
        self.kernel = f"low rank, u: {linear_u.kernel}, v: {linear_v.kernel}"

    def __call__(self, x_TI: Tensor) -> Tensor:
        return self._linear_u(self._linear_v(x_TI))

    def tensors(self) -> list[Tensor]:
        return [*self._linear_u.tensors(), *self._linear_v.tensors()]


class ConcatenatedLinear:
    """Weights of one input that cannot be one weight, side by side."""

    def __init__(self, parts: Sequence[Linear]) -> None:
        self._parts = parts
        self.kernel = " + ".join(dict.fromkeys(part.kernel for part in parts))

    def __call__(self, x_TI: Tensor) -> Tensor:
        return torch.cat([part(x_TI) for part in self._parts], dim=-1)

    def tensors(self) -> list[Tensor]:
        return [tensor for part in self._parts for tensor in part.tensors()]


def build_linear(
    weights: Sequence[LinearWeight], *, dtype: torch.dtype, device: torch.device
) -> Linear:
    """One product for weights that share their input; its outputs stand in the order of the weights.

    Dense weights become one weight, and so do INT4 weights of one group size. The result shares no memory with
    the weights.
    """
    bias_O = _join_biases(weights, dtype, device)
    dense = [w.weight for w in weights if isinstance(w.weight, Tensor)]
    if len(dense) == len(weights):
        return DenseLinear(torch.cat([w.to(dtype) for w in dense]).to(device), bias_O)
    quantized = [w.weight for w in weights if isinstance(w.weight, QuantizedWeight)]
    if len(quantized) == len(weights) and len({_group_size(w) for w in quantized}) == 1:
        return Int4Linear(_join_quantized(quantized), bias_O, dtype=dtype, device=device)
    if len(weights) > 1:
        return ConcatenatedLinear(
            [build_linear([weight], dtype=dtype, device=device) for weight in weights]
        )
    low_rank = weights[0].weight
    assert isinstance(low_rank, LowRankWeight)
    u = LinearWeight(weight=low_rank.weight_u, bias_O=weights[0].bias_O)
    v = LinearWeight(weight=low_rank.weight_v)
    return LowRankLinear(
        build_linear([u], dtype=dtype, device=device), build_linear([v], dtype=dtype, device=device)
    )


def _num_rows(weight: MatrixWeight) -> int:
    return len(weight.codes_OI if isinstance(weight, QuantizedWeight) else weight)


def _group_size(weight: QuantizedWeight) -> int:
    return weight.codes_OI.shape[1] // weight.scale_OG.shape[1]


def _join_quantized(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    zero_point_OG: Tensor | None = None
    if any(weight.zero_point_OG is not None for weight in weights):
        zero_point_OG = torch.cat(
            [
                torch.zeros_like(w.scale_OG, dtype=torch.int8)
                if w.zero_point_OG is None
                else w.zero_point_OG
                for w in weights
            ]
        )
    return QuantizedWeight(
        codes_OI=torch.cat([weight.codes_OI for weight in weights]),
        scale_OG=torch.cat([weight.scale_OG for weight in weights]),
        zero_point_OG=zero_point_OG,
    )


def _join_biases(
    weights: Sequence[LinearWeight], dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    if all(weight.bias_O is None for weight in weights):
        return None
    biases = [
        torch.zeros(w.out_features, dtype=dtype) if w.bias_O is None else w.bias_O.to(dtype)
        for w in weights
    ]
    return torch.cat(biases).to(device)
