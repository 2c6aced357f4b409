"""Asymmetric codes in groups of 256: INT8 for weights, INT4, two to a byte, for bases (Zhang et al. 2024,
arXiv:2407.08296).

A tensor is flattened row by row and cut into groups of 256 (the last may be shorter); value ~ (code - zero_point) *
scale, codes from 0. The range of a group always includes zero: a group of one sign would not fit its zero point into
the codes otherwise, and zero weights stay exactly zero.

Departures from the paper, both towards less noise:
- INT8 spends 254 steps on the range, not 255, and rounds the zero point up, so that no value lies beyond the
  outermost codes and stochastic rounding is unbiased for all of them.
- An update moves codes on the grid that is there. Only a group that it drives off its grid gets a new one; the paper
  makes every grid anew at every step, which rounds all weights again however small their update.

Shapes: G groups, E = 256 elements of a group.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from training.q_galore.sizes import GROUP, CodeBits, chunks

# Below it a group counts as zeros: its codes are all the zero point.
MIN_SCALE = 1e-30


@dataclass(slots=True)
class GroupCodes:
    """A tensor in codes.

    Attributes:
        codes: uint8, (G, 256), or (G, 128) with the lower element in the lower four bits.
        scale_G: float32; zero_point_G: uint8.
        shape: of the tensor.
    """

    codes: Tensor
    scale_G: Tensor
    zero_point_G: Tensor
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        tensors = (self.codes, self.scale_G, self.zero_point_G)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def quantize(
    tensor: Tensor, bits: CodeBits, *, generator: torch.Generator | None = None
) -> GroupCodes:
    """Codes of a finite tensor, rounded to nearest; with a generator stochastically, so that the expectation is
    exact."""
    groups_GE = _groups(tensor)
    scale_G, zero_point_G = _fit(groups_GE, bits)
    steps_GE = groups_GE / scale_G[:, None]
    codes_GE = _round(steps_GE, generator) + zero_point_G[:, None]
    codes = codes_GE.clamp_(0, 2**bits - 1).to(torch.uint8)
    if bits == 4:
        codes = codes[:, 0::2] | (codes[:, 1::2] << 4)
    return GroupCodes(codes, scale_G, zero_point_G.to(torch.uint8), tuple(tensor.shape))


def dequantize(quantized: GroupCodes, dtype: torch.dtype = torch.float32) -> Tensor:
    """The tensor that the codes stand for."""
    codes = quantized.codes
    if codes.shape[1] != GROUP:
        codes = torch.stack([codes & 15, codes >> 4], dim=2).flatten(1)
    values_GE = codes.float()
    values_GE -= quantized.zero_point_G[:, None]
    values_GE *= quantized.scale_G[:, None]
    num_elements = torch.Size(quantized.shape).numel()
    return values_GE.flatten()[:num_elements].view(quantized.shape).to(dtype)


def add_(quantized: GroupCodes, update: Tensor, generator: torch.Generator) -> None:
    """Add to a tensor in INT8 codes, in place, such that the expectation of the sum is exact.

    The update is added in float32, as whole steps and a chance of one more: one of a thousandth of a step moves a
    code once in a thousand times.

    Args:
        update: finite, in the tensor's shape.
    """
    update_GE = _groups(update)
    for chunk in chunks(len(update_GE), update.device.type):
        part = GroupCodes(
            quantized.codes[chunk], quantized.scale_G[chunk], quantized.zero_point_G[chunk], ()
        )
        _add_chunk(part, update_GE[chunk], generator)


def _add_chunk(part: GroupCodes, update_GE: Tensor, generator: torch.Generator) -> None:
    moved_GE = torch.rand(update_GE.shape, device=update_GE.device, generator=generator)
    moved_GE.addcmul_(update_GE, (1 / part.scale_G)[:, None]).floor_().add_(part.codes)
    off_grid_G = (moved_GE.amin(dim=1) < 0) | (moved_GE.amax(dim=1) > 255)
    if bool(off_grid_G.any()):
        rows = off_grid_G.nonzero().flatten()
        old_GE = part.codes[rows].float() - part.zero_point_G[rows, None]
        values_GE = old_GE * part.scale_G[rows, None] + update_GE[rows]
        fresh = quantize(values_GE, 8, generator=generator)
        moved_GE[rows] = fresh.codes.float()
        part.scale_G[rows] = fresh.scale_G
        part.zero_point_G[rows] = fresh.zero_point_G
    part.codes.copy_(moved_GE)


def add_to_bfloat16_(weight: Tensor, update: Tensor, generator: torch.Generator) -> None:
    """The same for a bfloat16 tensor: the float32 sum, rounded up or down by chance.

    A float32 whose lower half is dropped is the bfloat16 below it in magnitude, so noise in that half decides.
    """
    bits = (weight.float() + update).view(torch.int32)
    noise = torch.randint(
        0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device, generator=generator
    )
    weight.copy_(((bits + noise) & -(1 << 16)).view(torch.float32))


def _groups(tensor: Tensor) -> Tensor:
    """float32 (G, 256), filled up with zeros, which no range minds."""
    flat = tensor.float().flatten()
    missing = -flat.numel() % GROUP
    return (F.pad(flat, (0, missing)) if missing else flat).view(-1, GROUP)


def _fit(groups_GE: Tensor, bits: CodeBits) -> tuple[Tensor, Tensor]:
    """Scale and (as float32) zero point of each group."""
    low_G = groups_GE.amin(dim=1).clamp_(max=0)
    high_G = groups_GE.amax(dim=1).clamp_(min=0)
    if bits == 8:
        scale_G = ((high_G - low_G) / 254).clamp_(min=MIN_SCALE)
        return scale_G, (-low_G / scale_G).ceil_().clamp_(max=254)
    scale_G = ((high_G - low_G) / 15).clamp_(min=MIN_SCALE)
    return scale_G, (-low_G / scale_G).round_().clamp_(max=15)


def _round(steps_GE: Tensor, generator: torch.Generator | None) -> Tensor:
    if generator is None:
        return steps_GE.round_()
    noise_GE = torch.rand(steps_GE.shape, device=steps_GE.device, generator=generator)
    return steps_GE.add_(noise_GE).floor_()
