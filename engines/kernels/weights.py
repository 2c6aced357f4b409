"""Weights of linear layers as a checkpoint stores them, before a kernel lays them out; on the CPU.

Shapes: O output channels, I input channels, R rank, G groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compression.quantization.int4 import QuantizedWeight

MatrixWeight = Tensor | QuantizedWeight
"""A dense (O, I) weight, or its INT4 or INT8 codes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRankWeight:
    """W ~ weight_u @ weight_v: (O, R) and (R, I), each dense or quantized."""

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
    def matrices(self) -> tuple[MatrixWeight, ...]:
        weight = self.weight
        if isinstance(weight, LowRankWeight):
            return weight.weight_u, weight.weight_v
        return (weight,)

    @property
    def out_features(self) -> int:
        matrix = self.matrices[0]
        return len(matrix.codes_OI if isinstance(matrix, QuantizedWeight) else matrix)


def is_joinable(matrices: Sequence[MatrixWeight]) -> bool:
    """Whether they can be one matrix: all dense, or all quantized to as many bits in groups of one size."""
    if all(isinstance(matrix, Tensor) for matrix in matrices):
        return True
    quantized = [matrix for matrix in matrices if isinstance(matrix, QuantizedWeight)]
    forms = {(weight.bits, weight.group_size) for weight in quantized}
    return len(quantized) == len(matrices) and len(forms) == 1


def join(matrices: Sequence[MatrixWeight]) -> MatrixWeight:
    """One matrix with the outputs of all, for those that `is_joinable`; shares no memory with them."""
    dense = [matrix for matrix in matrices if isinstance(matrix, Tensor)]
    if dense:
        return torch.cat(dense)
    quantized = [matrix for matrix in matrices if isinstance(matrix, QuantizedWeight)]
    zero_point_OG: Tensor | None = None
    if any(weight.zero_point_OG is not None for weight in quantized):
        zero_point_OG = torch.cat(
            [
                torch.zeros_like(w.scale_OG, dtype=torch.int8)
                if w.zero_point_OG is None
                else w.zero_point_OG
                for w in quantized
            ]
        )
    return QuantizedWeight(
        codes_OI=torch.cat([weight.codes_OI for weight in quantized]),
        scale_OG=torch.cat([weight.scale_OG for weight in quantized]),
        zero_point_OG=zero_point_OG,
        bits=quantized[0].bits,
    )


def join_biases(weights: Sequence[LinearWeight], dtype: torch.dtype) -> Tensor | None:
    """Zeros where a weight has none; None where nobody has one."""
    if all(weight.bias_O is None for weight in weights):
        return None
    return torch.cat(
        [
            torch.zeros(w.out_features, dtype=dtype) if w.bias_O is None else w.bias_O.to(dtype)
            for w in weights
        ]
    )
