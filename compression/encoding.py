"""A matrix between memory and disk: which kind stores a weight, and what the stored tensors of a kind stand for.

Shapes: O output channels, I input channels.
"""

import torch
from torch import Tensor

from compression.checkpoint import (
    DenseLinear,
    FactorKind,
    Int4Linear,
    Int8Linear,
    LinearKind,
    LowRankLinear,
    MatrixKind,
    TwoFourLinear,
    factor_suffix,
)
from compression.pruning import two_four
from compression.quantization import int4, int8
from compression.quantization.int4 import QuantizedWeight, dequantize
from compression.safetensors_header import CheckpointError

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def encode_factor(
    weight: Tensor | QuantizedWeight, dtype: str
) -> tuple[FactorKind, dict[str, Tensor]]:
    """The kind of a weight and its tensors by suffix, without a bias.

    Args:
        dtype: that the checkpoint stores, as safetensors names it.
    """
    kind: FactorKind
    if isinstance(weight, Tensor):
        rows, columns = weight.shape
        kind = DenseLinear(out_features=rows, in_features=columns, dtype=dtype)
        return kind, {"weight": weight.to(DTYPES[dtype]).contiguous()}
    rows, columns = weight.codes_OI.shape
    if weight.bits == 8:
        kind = Int8Linear(out_features=rows, in_features=columns, dtype=dtype)
        return kind, int8.to_tensors(weight)
    kind = Int4Linear(
        out_features=rows,
        in_features=columns,
        dtype=dtype,
        group_size=weight.group_size,
        symmetric=weight.zero_point_OG is None,
    )
    return kind, int4.to_tensors(weight)


def encode_two_four(weight_OI: Tensor, dtype: str) -> tuple[TwoFourLinear, dict[str, Tensor]]:
    """The same of a 2:4 sparse weight."""
    rows, columns = weight_OI.shape
    kind = TwoFourLinear(out_features=rows, in_features=columns, dtype=dtype)
    return kind, two_four.to_tensors(weight_OI.to(DTYPES[dtype]))


def decode(linear: LinearKind, tensors: dict[str, Tensor]) -> tuple[Tensor | QuantizedWeight, ...]:
    """The weight, or weight_u and weight_v, from a layer's tensors by suffix: codes where quantized, else as stored.

    Raises:
        CheckpointError: the tensors contradict each other or their row.
    """
    if not isinstance(linear, LowRankLinear):
        return (_decode_matrix(linear, tensors),)
    u = {suffix: tensors[factor_suffix("u", suffix)] for suffix in linear.weight_u.tensors()}
    v = {suffix: tensors[factor_suffix("v", suffix)] for suffix in linear.weight_v.tensors()}
    return _decode_matrix(linear.weight_u, u), _decode_matrix(linear.weight_v, v)


def _decode_matrix(linear: MatrixKind, tensors: dict[str, Tensor]) -> Tensor | QuantizedWeight:
    match linear:
        case DenseLinear():
            return tensors["weight"]
        case Int4Linear() | Int8Linear() | TwoFourLinear():
            shape = tensors["shape" if isinstance(linear, TwoFourLinear) else "weight_shape"]
            if shape.tolist() != [linear.out_features, linear.in_features]:
                raise CheckpointError(f"stored shape {shape.tolist()}, its row says {linear}")
    match linear:
        case Int4Linear():
            return int4.from_tensors(tensors)
        case Int8Linear():
            return int8.from_tensors(tensors)
        case TwoFourLinear():
            try:
                return two_four.from_tensors(tensors)
            except ValueError as error:
                raise CheckpointError(str(error)) from None


def to_dense(weight: Tensor | QuantizedWeight) -> Tensor:
    """The weight (O, I) that a decoded one stands for: float32 from codes, else as it is."""
    return dequantize(weight) if isinstance(weight, QuantizedWeight) else weight
