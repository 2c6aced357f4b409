"""A linear layer whose only weight is INT8 codes, and which trains (Q-GaLore, Zhang et al. 2024, arXiv:2407.08296).

Codes cannot own a gradient. A parameter of the weight's shape over a single zero, the anchor, takes it in their
place: so autograd counts uses, accumulates, runs hooks and reaches the layer even where its input needs no gradient,
as for any weight. What is dequantized lives for one product.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from training.q_galore.group_codes import GroupCodes, dequantize, quantize


class Int8Linear(nn.Module):
    """y = x W^T + b with W in INT8 codes.

    Attributes:
        anchor: takes the gradient of W, in the activations' dtype.
    """

    def __init__(self, weight_OI: Tensor, bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features = weight_OI.shape
        quantized = quantize(weight_OI, 8)
        self.register_buffer("codes", quantized.codes)
        self.register_buffer("scale_G", quantized.scale_G)
        self.register_buffer("zero_point_G", quantized.zero_point_G)
        zero = torch.zeros((), dtype=dtype, device=weight_OI.device)
        self.anchor = nn.Parameter(zero.expand(weight_OI.shape))
        self.bias = bias

    @property
    def quantized(self) -> GroupCodes:
        """The codes themselves, not a copy."""
        codes, scale_G, zero_point_G = self.codes, self.scale_G, self.zero_point_G
        assert isinstance(codes, Tensor)
        assert isinstance(scale_G, Tensor)
        assert isinstance(zero_point_G, Tensor)
        shape = (self.out_features, self.in_features)
        return GroupCodes(codes, scale_G, zero_point_G, shape)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return dequantize(self.quantized, dtype)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Int8Product.apply(x, self.anchor, self)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias


class _Int8Product(torch.autograd.Function):
    """The backward pass dequantizes again rather than keep the weight; codes change only once all of it has run."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, layer: Int8Linear) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer = layer
        return F.linear(x, layer.dequantize(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (x,) = ctx.saved_tensors
        (gradient,) = gradients
        gradient_x = gradient_weight = None
        if ctx.needs_input_grad[0]:
            gradient_x = gradient @ ctx.layer.dequantize(gradient.dtype)
        if ctx.needs_input_grad[1]:
            gradient_weight = gradient.flatten(0, -2).T @ x.flatten(0, -2)
        return gradient_x, gradient_weight, None
