"""Linear layers that hold their weight compressed, one module per layer kind of `checkpoint.py`.

Shapes: N rows of input, O output channels, I input channels, G groups.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from compression.checkpoint import LinearKind
from compression.encoding import decode
from compression.quantization.int4 import QuantizedWeight, dequantize

CPU_GROUP_SIZES = (32, 64, 128, 256)
CPU_OUTPUT_MULTIPLE = 16
CPU_INT8_INPUT_MULTIPLE = 32  # others are read past their end (seen in torch 2.13)


def cpu_int4_applies(out_features: int, group_size: int) -> bool:
    """Whether torch's packed INT4 product for CPUs takes such a weight (checked in torch 2.13)."""
    return out_features % CPU_OUTPUT_MULTIPLE == 0 and group_size in CPU_GROUP_SIZES


class QuantizedLinear(nn.Module):
    """y = x W^T + b with W in plain codes; dequantizes for every call. The reference of INT4 and INT8."""

    def __init__(self, quantized: QuantizedWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.kernel = f"int{quantized.bits}: dequantize, then matmul"
        self.register_buffer("codes_OI", quantized.codes_OI)
        self.register_buffer("scale_OG", quantized.scale_OG)
        self.register_buffer("zero_point_OG", quantized.zero_point_OG)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def dequantize(self) -> Tensor:
        """float32 (O, I)."""
        assert isinstance(self.codes_OI, Tensor)
        assert isinstance(self.scale_OG, Tensor)
        zero_point_OG = self.zero_point_OG
        assert zero_point_OG is None or isinstance(zero_point_OG, Tensor)
        return dequantize(
            QuantizedWeight(
                codes_OI=self.codes_OI, scale_OG=self.scale_OG, zero_point_OG=zero_point_OG
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dequantize().to(x.dtype), self.bias)


class CpuInt4Linear(nn.Module):
    """The same product in bfloat16 on a CPU, through torch's packed kernel; the only copy of the weight.

    The kernel computes (code - 8) * s + m with codes in [0, 15], so m = -z * s for our zero point z in [-8, 7];
    m is rounded to bfloat16, which is the one difference from the reference.
    """

    kernel = "int4: torch _weight_int4pack_mm_for_cpu"

    def __init__(self, quantized: QuantizedWeight, bias: Tensor | None) -> None:
        super().__init__()
        num_rows, num_groups = quantized.scale_OG.shape
        self.group_size = quantized.codes_OI.shape[1] // num_groups
        self.out_features = num_rows
        scale_OG = quantized.scale_OG.float()
        shift_OG = torch.zeros_like(scale_OG)
        if quantized.zero_point_OG is not None:
            shift_OG = -quantized.zero_point_OG.float() * scale_OG
        scale_and_shift_GO2 = torch.stack([scale_OG, shift_OG], dim=2).transpose(0, 1)
        packed = torch._convert_weight_to_int4pack_for_cpu(quantized.codes_OI.int() + 8, 1)
        self.register_buffer("packed", packed)
        self.register_buffer("scale_and_shift_GO2", scale_and_shift_GO2.contiguous().bfloat16())
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.packed, Tensor)
        assert isinstance(self.scale_and_shift_GO2, Tensor)
        x_NI = x.reshape(-1, x.shape[-1])
        y_NO = torch._weight_int4pack_mm_for_cpu(
            x_NI, self.packed, self.group_size, self.scale_and_shift_GO2
        )
        if self.bias is not None:
            y_NO = y_NO + self.bias
        return y_NO.reshape(*x.shape[:-1], self.out_features)


class CpuInt8Linear(nn.Module):
    """The INT8 product in bfloat16 on a CPU, through torch's kernel; the only copy of the weight."""

    kernel = "int8: torch _weight_int8pack_mm"

    def __init__(self, quantized: QuantizedWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("codes_OI", quantized.codes_OI)
        self.register_buffer("scale_O", quantized.scale_OG[:, 0].bfloat16())
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.codes_OI, Tensor)
        assert isinstance(self.scale_O, Tensor)
        x_NI = x.reshape(-1, x.shape[-1])
        y_NO = torch._weight_int8pack_mm(x_NI, self.codes_OI, self.scale_O)
        if self.bias is not None:
            y_NO = y_NO + self.bias
        return y_NO.reshape(*x.shape[:-1], len(self.scale_O))


def build_quantized_linear(
    quantized: QuantizedWeight, bias: Tensor | None, *, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """The fastest module here for a quantized weight on this device in this dtype."""
    on_cpu_in_bf16 = device.type == "cpu" and dtype == torch.bfloat16
    if (
        on_cpu_in_bf16
        and quantized.bits == 8
        and quantized.scale_OG.dtype == torch.bfloat16
        and quantized.codes_OI.shape[1] % CPU_INT8_INPUT_MULTIPLE == 0
    ):
        return CpuInt8Linear(quantized, bias)
    if (
        on_cpu_in_bf16
        and quantized.bits == 4
        and cpu_int4_applies(len(quantized.scale_OG), quantized.group_size)
    ):
        return CpuInt4Linear(quantized, bias)
    return QuantizedLinear(quantized, bias).to(device)


class LowRankProduct(nn.Module):
    """y = (x V^T) U^T + b: the two products of a low-rank layer, each by the module of its factor's kind."""

    kernel = "low rank: two products"

    def __init__(self, weight_u: nn.Module, weight_v: nn.Module) -> None:
        super().__init__()
        self.weight_u = weight_u
        self.weight_v = weight_v

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.weight_u(self.weight_v(x))
        return y


def build_linear(
    linear: LinearKind, tensors: dict[str, Tensor], *, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """The module of any kind of layer, from its tensors by suffix."""
    bias = tensors["bias"].to(dtype) if linear.bias else None
    last, *first = decode(linear, tensors)
    module = _build_factor(last, bias, dtype=dtype, device=device)
    if not first:
        return module
    return LowRankProduct(module, _build_factor(first[0], None, dtype=dtype, device=device))


def _build_factor(
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> nn.Module:
    if isinstance(weight, QuantizedWeight):
        return build_quantized_linear(weight, bias, dtype=dtype, device=device)
    out_features, in_features = weight.shape
    module = nn.Linear(in_features, out_features, bias=bias is not None, device="meta")
    state = {"weight": weight.to(dtype)} | ({} if bias is None else {"bias": bias})
    module.load_state_dict(state, assign=True)
    return module.to(device)
