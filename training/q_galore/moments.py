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

from training.q_galore.sizes import BLOCK, MIN_8_BIT_ELEMENTS, chunks
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
    blocks = _blocks(values)
    largest_B = blocks.abs().amax(dim=1)
    codes = (blocks * _inverse(largest_B, 127**2)).abs_().sqrt_().round_().copysign_(blocks)
    return BlockCodes(codes.to(torch.int8), largest_B)


def encode_unsigned(values: Tensor) -> BlockCodes:
    """A second moment, not negative."""
    blocks = _blocks(values)
    largest_B = blocks.amax(dim=1)
    codes = (blocks * _inverse(largest_B, 255**4)).sqrt_().sqrt_().round_()
    torch.maximum(codes, blocks.sign(), out=codes)
    return BlockCodes(codes.to(torch.uint8), largest_B)


def decode(moment: BlockCodes) -> Tensor:
    """float32 (B, 256), the elements that fill up the last block included."""
    values = moment.codes.float()
    if moment.codes.dtype == torch.int8:
        values = values * values.abs()
        values *= (moment.largest_B / 127**2)[:, None]
    else:
        values.square_().square_()
        values *= (moment.largest_B / 255**4)[:, None]
    return values


def _blocks(values: Tensor) -> Tensor:
    flat = values.flatten()
    missing = -flat.numel() % BLOCK
    return (F.pad(flat, (0, missing)) if missing else flat).view(-1, BLOCK)


def _inverse(largest_B: Tensor, factor: int) -> Tensor:
    """What scales a block such that its largest becomes the factor; a block of zeros stays one."""
    return (factor / largest_B.clamp(min=1e-28))[:, None]


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
        if isinstance(self.first, Tensor):
            assert isinstance(self.second, Tensor)
            return self._step(self.first, self.second, gradient, learning_rate)
        assert isinstance(self.second, BlockCodes)
        gradient_BE = _blocks(gradient)
        update_BE = torch.empty_like(gradient_BE)
        for chunk in chunks(len(gradient_BE), gradient.device.type):
            kept = [
                BlockCodes(moment.codes[chunk], moment.largest_B[chunk])
                for moment in (self.first, self.second)
            ]
            first, second = decode(kept[0]), decode(kept[1])
            update_BE[chunk] = self._step(first, second, gradient_BE[chunk], learning_rate)
            for moment, fresh in zip(
                kept, (encode_signed(first), encode_unsigned(second)), strict=True
            ):
                moment.codes.copy_(fresh.codes)
                moment.largest_B.copy_(fresh.largest_B)
        return update_BE.flatten()[: gradient.numel()].view(gradient.shape)

    def _step(
        self, first: Tensor, second: Tensor, gradient: Tensor, learning_rate: float
    ) -> Tensor:
        """Moves both moments, in place."""
        first.lerp_(gradient, 1 - BETA1)
        second.mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)
        step_size = learning_rate / (1 - BETA1**self.num_updates)
        root_of_correction = (1 - BETA2**self.num_updates) ** 0.5
        divisor = (second.sqrt() / root_of_correction).add_(EPSILON)
        return torch.zeros_like(first).addcdiv_(first, divisor, value=-step_size)


def zero_moments(shape: torch.Size, state_bits: StateBits, device: torch.device) -> Moments:
    zeros = torch.zeros(shape, device=device)
    if state_bits == 32 or shape.numel() < MIN_8_BIT_ELEMENTS:
        return Moments(zeros, torch.zeros_like(zeros))
    return Moments(encode_signed(zeros), encode_unsigned(zeros))
