"""One decoder block in the hands of a stage: its weights as float32 factors or codes, read and encoded again.

Shapes: O output channels, I input channels, K rank.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from compression.checkpoint import (
    Checkpoint,
    LowRankLinear,
    Matrix,
    MatrixKind,
    factor_suffix,
)
from compression.encoding import (
    DTYPES,
    decode,
    encode_factor,
    encode_two_four,
    to_dense,
)
from compression.memory import trim_heap
from compression.quantization.int4 import QuantizedWeight
from compression.safetensors_header import CheckpointError

_IN_BLOCK = re.compile(r"(?P<stack>.+?)\.(?P<index>\d+)\.(?P<rest>.+)\Z")

Factor = Tensor | QuantizedWeight


@dataclass(slots=True)
class Linear:
    """A linear layer being compressed.

    Attributes:
        factors: the weight (O, I), or weight_u (O, K) and weight_v (K, I): float32, or codes.
        dtype: that the checkpoint stores, as safetensors names it.
        dense_reason, sparsity: as of `checkpoint.Matrix`.
        two_four: the weight is 2:4 sparse, and stored so unless it is quantized.
    """

    name: str
    dtype: str
    factors: tuple[Factor, ...]
    bias_O: Tensor | None = None
    dense_reason: str | None = None
    sparsity: float = 0.0
    two_four: bool = False

    @property
    def is_low_rank(self) -> bool:
        return len(self.factors) == 2

    @property
    def weight(self) -> Tensor:
        """The matrix that the layer multiplies with, float32 (O, I)."""
        matrices = [to_dense(factor) for factor in self.factors]
        return matrices[0] @ matrices[1] if self.is_low_rank else matrices[0]

    def encode(self) -> tuple[Matrix, dict[str, Tensor]]:
        """The row and the tensors by suffix that a checkpoint stores."""
        bias = self.bias_O is not None
        linear: MatrixKind | LowRankLinear
        if self.is_low_rank:
            (u, u_tensors), (v, v_tensors) = (encode_factor(f, self.dtype) for f in self.factors)
            linear = LowRankLinear(weight_u=u, weight_v=v, bias=bias)
            tensors = {factor_suffix("u", suffix): tensor for suffix, tensor in u_tensors.items()}
            tensors |= {factor_suffix("v", suffix): tensor for suffix, tensor in v_tensors.items()}
        else:
            (weight,) = self.factors
            if self.two_four and isinstance(weight, Tensor):
                linear, tensors = encode_two_four(weight, self.dtype)
            else:
                linear, tensors = encode_factor(weight, self.dtype)
            linear = replace(linear, bias=bias)
        if self.bias_O is not None:
            tensors["bias"] = self.bias_O.to(DTYPES[self.dtype]).contiguous()
        row = Matrix(
            name=self.name, linear=linear, dense_reason=self.dense_reason, sparsity=self.sparsity
        )
        return row, tensors

    @property
    def scale_dtype(self) -> torch.dtype:
        """dtype of what the checkpoint stores beside the codes."""
        return DTYPES[self.dtype]


@dataclass(slots=True)
class Block:
    """A decoder block being compressed.

    Attributes:
        prefix: module path, such as "model.layers.3".
        linears: by their path inside the block, such as "mlp.up_proj".
        others: norms and the like, by path inside the block, in their stored dtype.
    """

    index: int
    prefix: str
    linears: dict[str, Linear]
    others: dict[str, Tensor]

    def dense_linears(self) -> Iterator[tuple[str, Linear]]:
        """Those that are one float32 matrix."""
        for name, linear in self.linears.items():
            if len(linear.factors) == 1 and isinstance(linear.factors[0], Tensor):
                yield name, linear


@dataclass(frozen=True, slots=True)
class BlockNames:
    """What a checkpoint holds of one block: rows of linear layers, and names of other tensors."""

    index: int
    prefix: str
    rows: tuple[Matrix, ...]
    others: tuple[str, ...]

    @property
    def weight_parameters(self) -> int:
        return sum(prod((row.linear.out_features, row.linear.in_features)) for row in self.rows)


def list_blocks(checkpoint: Checkpoint) -> list[BlockNames]:
    """The decoder blocks of a checkpoint, in order.

    Raises:
        CheckpointError: there is none, they are in several stacks, or their numbers have gaps.
    """
    rows: dict[int, list[Matrix]] = {}
    others: dict[int, list[str]] = {}
    stacks: set[str] = set()
    for row in checkpoint.manifest.matrices:
        found = _IN_BLOCK.match(row.name)
        if found:
            stacks.add(found["stack"])
            rows.setdefault(int(found["index"]), []).append(row)
    for name in checkpoint.manifest.other_tensors:
        found = _IN_BLOCK.match(name)
        if found:
            stacks.add(found["stack"])
            others.setdefault(int(found["index"]), []).append(name)
    if len(stacks) != 1 or sorted(rows) != list(range(len(rows))):
        raise CheckpointError(f"{len(rows)} decoder blocks in {len(stacks)} stacks: not known")
    (stack,) = stacks
    return [
        BlockNames(i, f"{stack}.{i}", tuple(rows[i]), tuple(sorted(others.get(i, ()))))
        for i in range(len(rows))
    ]


def is_finite(tensor: Tensor) -> bool:
    """In one pass and without a copy, which `torch.isfinite` makes several of."""
    return all(math.isfinite(extreme) for extreme in tensor.aminmax())


def load_block(checkpoint: Checkpoint, names: BlockNames) -> Block:
    """Read one block into memory, after handing back what the block before has left there.

    Raises:
        CheckpointError: a weight is quantized already, or not finite.
    """
    trim_heap()
    linears = {}
    start = len(names.prefix) + 1
    for row in names.rows:
        linear = row.linear
        stored = checkpoint.linear_tensors(row)
        decoded = decode(linear, stored)
        factors = tuple(factor.float() for factor in decoded if isinstance(factor, Tensor))
        if len(factors) < len(decoded):
            raise CheckpointError(f"{row.name} is quantized already: its codes cannot be changed")
        if not all(is_finite(factor) for factor in factors):
            raise CheckpointError(f"{row.name} has weights that are not finite")
        bias_O = stored["bias"].float() if linear.bias else None
        if bias_O is not None and not is_finite(bias_O):
            raise CheckpointError(f"{row.name} has a bias that is not finite")
        linears[row.name[start:]] = Linear(
            name=row.name,
            dtype=linear.dtype,
            factors=factors,
            bias_O=bias_O,
            dense_reason=row.dense_reason,
            sparsity=row.sparsity,
        )
    others = {name[start:]: checkpoint.tensor(name) for name in names.others}
    return Block(index=names.index, prefix=names.prefix, linears=linears, others=others)
