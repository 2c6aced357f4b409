"""Adam's two moments, in float32 or in 8 bits, and the step that they give (Kingma and Ba 2014, arXiv:1412.6980;
blocks of 8 bits after Dettmers et al. 2021, arXiv:2110.02861).

Eight bits have to span many orders of magnitude. In place of Dettmers' table, codes are a root of the value over its
block's largest: a signed square root for the first moment, a fourth root for the second. Both invert in closed form,
and close to zero the codes lie close together. A second moment that is not zero never becomes zero: the step divides
by it.

Shapes: B blocks of 256.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from training.q_galore.sizes import BLOCK, MIN_8_BIT_ELEMENTS
from training.spec import StateBits

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


@dataclass(slots=True)
class BlockCodes:
    """A moment in 8 bits. Attributes: codes: (B, 256), int8 where signed, else uint8; largest_B: float32."""

    codes: Tensor
    largest_B: Tensor


Moment = Tensor | BlockCodes


def encode_signed(values: Tensor) -> BlockCodes:
    """A first moment."""
    blocks, largest_B = _blocks(values)
    codes = (blocks.abs().sqrt_() * 127).round_().copysign_(blocks)
    return BlockCodes(codes.to(torch.int8), largest_B)


def encode_unsigned(values: Tensor) -> BlockCodes:
    """A second moment, not negative."""
    blocks, largest_B = _blocks(values)
    codes = (blocks.sqrt().sqrt_() * 255).round_()
    codes.clamp_(min=(blocks > 0).float())
    return BlockCodes(codes.to(torch.uint8), largest_B)


def decode(moment: Moment, shape: torch.Size) -> Tensor:
    """float32; a moment kept so is returned itself, not copied."""
    if isinstance(moment, Tensor):
        return moment
    if moment.codes.dtype == torch.int8:
        roots = moment.codes.float().div_(127)
        values = roots * roots.abs()
    else:
        values = moment.codes.float().div_(255).square_().square_()
    values *= moment.largest_B[:, None]
    return values.flatten()[: shape.numel()].view(shape)


def _blocks(values: Tensor) -> tuple[Tensor, Tensor]:
    flat = values.flatten()
    blocks = F.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    largest_B = blocks.abs().amax(dim=1)
    return blocks / largest_B.clamp(min=torch.finfo(torch.float32).tiny)[:, None], largest_B


@dataclass(slots=True)
class Moments:
    """Attributes: num_updates: how many gradients went in, which the bias corrections need."""

    first: Moment
    second: Moment
    num_updates: int = 0

    def update(self, gradient: Tensor, learning_rate: float) -> Tensor:
        """Take a finite float32 gradient in; returns what AdamW adds to the weight, without decay.

        The operations and their order are those of `torch.optim.AdamW`, so that in 32 bits the result is its to the
        bit.
        """
        self.num_updates += 1
        first = decode(self.first, gradient.shape)
        second = decode(self.second, gradient.shape)
        first.lerp_(gradient, 1 - BETA1)
        second.mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)
        step_size = learning_rate / (1 - BETA1**self.num_updates)
        root_of_correction = (1 - BETA2**self.num_updates) ** 0.5
        divisor = (second.sqrt() / root_of_correction).add_(EPSILON)
        update = torch.zeros_like(first).addcdiv_(first, divisor, value=-step_size)
        if isinstance(self.first, BlockCodes):
            self.first, self.second = encode_signed(first), encode_unsigned(second)
        return update


def zero_moments(shape: torch.Size, state_bits: StateBits, device: torch.device) -> Moments:
    zeros = torch.zeros(shape, device=device)
    if state_bits == 32 or shape.numel() < MIN_8_BIT_ELEMENTS:
        return Moments(zeros, torch.zeros_like(zeros))
    return Moments(encode_signed(zeros), encode_unsigned(zeros))
