"""Products y = x W^T + b with a weight of any checkpoint kind, and of several weights that share their input.

A `Linear` owns its weight in the one form that its kernel wants. Products with codes are those of `compression.linear`.

Shapes: T rows, O output channels, I input channels, R rank.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from compression.linear import build_quantized_linear
from compression.pruning.two_four import is_two_four
from compression.quantization.int4 import QuantizedWeight
from engines.kernels.cpu_linear import (
    DTYPES,
    HEAD_GROUP_SIZE,
    TileWeight,
    applies,
    build_cpu_linear,
    pack_tiles,
    quantize_on_cpu,
    share_on_cpu,
)
from engines.kernels.huge_pages import in_huge_pages
from engines.kernels.native import NativeLibrary, native_library
from engines.kernels.sparse_linear import SparseLinear
from engines.kernels.sparse_linear import why_not as why_not_sparse
from engines.kernels.triton.support import why_no_int4
from engines.kernels.weights import LinearWeight, LowRankWeight, is_joinable, join, join_biases

Embedding = Tensor | TileWeight
"""(V, H): a row to each token."""


class Linear(Protocol):
    """A product that is ready to run. Attributes: kernel: the implementation, for `EngineInfo.kernels`."""

    kernel: str

    def __call__(self, x_TI: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Args: dtype: of the result; the input's by default."""

    def tensors(self) -> list[Tensor]:
        """Everything it holds."""


class DenseLinear:
    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, remark: str = "") -> None:
        self.weight_OI = weight_OI
        self.bias_O = bias_O
        self.kernel = f"torch {str(weight_OI.dtype).removeprefix('torch.')}{remark}"

    def __call__(self, x_TI: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return F.linear(x_TI, self.weight_OI, self.bias_O).to(dtype or x_TI.dtype)

    def tensors(self) -> list[Tensor]:
        return [self.weight_OI] if self.bias_O is None else [self.weight_OI, self.bias_O]


class QuantizedLinear:
    def __init__(
        self,
        quantized: QuantizedWeight,
        bias_O: Tensor | None,
        *,
        dtype: torch.dtype,
        device: torch.device,
        remark: str = "",
    ) -> None:
        self._module = build_quantized_linear(quantized, bias_O, dtype=dtype, device=device)
        self.kernel = f"{self._module.kernel}{remark}"

    def __call__(self, x_TI: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        y_TO: Tensor = self._module.forward(x_TI)
        return y_TO.to(dtype or x_TI.dtype)

    def tensors(self) -> list[Tensor]:
        return [*self._module.parameters(), *self._module.buffers()]


class LowRankLinear:
    """Two thin products; the rank-R intermediate is all that passes between them."""

    def __init__(self, linear_u: Linear, linear_v: Linear) -> None:
        self._linear_u = linear_u
        self._linear_v = linear_v
        self.kernel = f"low rank, u: {linear_u.kernel}, v: {linear_v.kernel}"

    def __call__(self, x_TI: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return self._linear_u(self._linear_v(x_TI), dtype)

    def tensors(self) -> list[Tensor]:
        return [*self._linear_u.tensors(), *self._linear_v.tensors()]


class ConcatenatedLinear:
    """Weights of one input that cannot be one weight, side by side."""

    def __init__(self, parts: Sequence[Linear]) -> None:
        self._parts = parts
        self.kernel = " + ".join(dict.fromkeys(part.kernel for part in parts))

    def __call__(self, x_TI: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return torch.cat([part(x_TI, dtype) for part in self._parts], dim=-1)

    def tensors(self) -> list[Tensor]:
        return [tensor for part in self._parts for tensor in part.tensors()]


def build_linear(
    weights: Sequence[LinearWeight], *, dtype: torch.dtype, device: torch.device
) -> Linear:
    """One product for weights that share their input; its outputs stand in the order of the weights.

    The native library's where it takes them. Otherwise dense weights become one weight, and so do weights quantized to
    as many bits in groups of one size; on a GPU 2:4 weights are held sparse and INT4 ones packed where the kernels take
    them, and the name says why where they do not. The result shares no memory with the weights.
    """
    if device.type == "cpu":
        library = native_library()
        if isinstance(library, NativeLibrary) and applies(weights, dtype):
            return build_cpu_linear(weights, dtype=dtype, library=library)
    matrices = [w.weight for w in weights if not isinstance(w.weight, LowRankWeight)]
    if len(matrices) == len(weights) and is_joinable(matrices):
        bias_O = join_biases(weights, dtype)
        bias_O = None if bias_O is None else bias_O.to(device)
        joined = join(matrices)
        if isinstance(joined, Tensor):
            return _build_dense(joined.to(device, dtype), bias_O)
        return _build_quantized(joined, bias_O, dtype=dtype, device=device)
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


def _build_dense(weight_OI: Tensor, bias_O: Tensor | None) -> Linear:
    if weight_OI.device.type != "cuda" or not is_two_four(weight_OI):
        return DenseLinear(weight_OI, bias_O)
    reason = why_not_sparse(weight_OI)
    if reason is not None:
        return DenseLinear(weight_OI, bias_O, f" (2:4 held dense: {reason})")
    return SparseLinear(weight_OI, bias_O)


def _build_quantized(
    quantized: QuantizedWeight, bias_O: Tensor | None, *, dtype: torch.dtype, device: torch.device
) -> Linear:
    if device.type != "cuda" or quantized.bits == 8:
        return QuantizedLinear(quantized, bias_O, dtype=dtype, device=device)
    reason = why_no_int4(device, dtype, quantized.group_size)
    if reason is not None:
        remark = f"; no Triton: {reason}"
        return QuantizedLinear(quantized, bias_O, dtype=dtype, device=device, remark=remark)
    from engines.kernels.triton.int4_matmul import TritonInt4Linear

    return TritonInt4Linear(quantized, bias_O, device=device)


def share_weight(weight_OI: Tensor) -> Linear:
    """The product with a matrix that has another owner: a head tied to the embedding."""
    library = native_library() if weight_OI.device.type == "cpu" else None
    if isinstance(library, NativeLibrary) and weight_OI.dtype in DTYPES:
        return share_on_cpu(weight_OI, library)
    return DenseLinear(weight_OI, None)


def tie_head(embedding_VH: Tensor, *, is_int4: bool) -> tuple[Linear, Embedding]:
    """The product with an embedding, and the embedding as it then is held: once, where the two can share it.

    Beside INT4 layers (`is_int4`) in bfloat16 the native library has a copy of it in INT8: of such a model's bytes the
    head would be the half, and rounding it changes less than the layers' INT4 does (docs/log.md has the perplexities).
    """
    library = native_library() if embedding_VH.device.type == "cpu" else None
    if isinstance(library, NativeLibrary) and embedding_VH.dtype == torch.bfloat16:
        if is_int4 and embedding_VH.shape[1] % HEAD_GROUP_SIZE == 0:
            return quantize_on_cpu(embedding_VH, library), embedding_VH
        if library.has_amx:
            tiles = pack_tiles(embedding_VH)
            return share_on_cpu(tiles, library), tiles
    if embedding_VH.device.type == "cpu":
        embedding_VH = in_huge_pages(embedding_VH)
    return share_weight(embedding_VH), embedding_VH
