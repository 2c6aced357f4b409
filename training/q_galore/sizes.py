"""How large what Q-GaLore keeps is. Imports no torch: the API process tells a job's memory before it accepts it."""

from math import prod
from typing import Literal

from training.spec import StateBits

Side = Literal["left", "right"]
CodeBits = Literal[4, 8]
GROUP = 256
"""Elements of a tensor in codes that share a scale and a zero point."""
BLOCK = 256
"""Elements of a moment in 8 bits that share their largest."""
MIN_8_BIT_ELEMENTS = 4096
"""Smaller tensors, such as norms, keep float32 moments: eight bits would save nothing worth having."""


def code_bytes(num_elements: int, bits: CodeBits) -> int:
    """Bytes of the codes, scales and zero points of a tensor."""
    num_groups = -(-num_elements // GROUP)
    return num_groups * (GROUP * bits // 8 + 4 + 1)


def moment_bytes(num_elements: int, state_bits: StateBits) -> int:
    """Bytes of both moments of a tensor."""
    if state_bits == 32 or num_elements < MIN_8_BIT_ELEMENTS:
        return 8 * num_elements
    num_blocks = -(-num_elements // BLOCK)
    return 2 * num_blocks * (BLOCK + 4)


def basis_bytes(shape: tuple[int, ...], rank: int, basis_bits: int) -> int:
    """Bytes of the basis of a matrix' subspace."""
    num_elements = min(shape) * rank
    return code_bytes(num_elements, 4) if basis_bits == 4 else 4 * num_elements


def side_of(shape: tuple[int, ...]) -> Side:
    """Where the basis of a matrix' subspace is multiplied: along the smaller side."""
    return "right" if shape[0] >= shape[1] else "left"


def coordinate_shape(shape: tuple[int, ...], rank: int) -> tuple[int, int]:
    """Of the coordinates of a matrix in its subspace."""
    return (shape[0], rank) if side_of(shape) == "right" else (rank, shape[1])


def num_coordinates(shape: tuple[int, ...], rank: int) -> int:
    return prod(coordinate_shape(shape, rank))


def chunks(num_groups: int, device_type: str) -> list[slice]:
    """Runs of groups or blocks to work on at a time: on a CPU what its cache holds, else what bounds temporaries."""
    size = (2**17 if device_type == "cpu" else 2**24) // GROUP
    return [slice(start, start + size) for start in range(0, num_groups, size)]
