"""The Triton INT4 product against float64, at odd sizes; compiled on a GPU, else in the interpreter.

Shapes: T rows, O output channels, I input channels.
"""

import pytest
import torch
from torch import Tensor

from compression.quantization.int4 import QuantizedWeight, dequantize, round_to_nearest
from engines.kernels.linear import QuantizedLinear, build_linear
from engines.kernels.triton import int4_matmul
from engines.kernels.triton.int4_matmul import MAX_ROWS, TritonInt4Linear
from engines.kernels.weights import LinearWeight
from tests.conftest import HAS_GPU

pytestmark = pytest.mark.usefixtures("single_thread")

DEVICE = torch.device("cuda" if HAS_GPU else "cpu")


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _quantized(sizes: tuple[int, int], group_size: int, *, symmetric: bool) -> QuantizedWeight:
    weight_OI = _random(*sizes) + 0.3  # off centre, so that zero points are not zero
    weight_OI[0] = 0
    return round_to_nearest(weight_OI, group_size, symmetric=symmetric, scale_dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [1, 3, 17, MAX_ROWS + 1])
@pytest.mark.parametrize(
    ("sizes", "group_size", "symmetric", "has_bias"),
    [
        ((1, 32), 32, True, True),
        ((70, 64), 64, True, False),
        ((65, 384), 64, False, True),
        ((100, 256), 128, False, False),
        ((33, 512), 128, True, True),
        ((16, 96), 32, False, False),
    ],
)
def test_product(
    sizes: tuple[int, int],
    group_size: int,
    symmetric: bool,
    has_bias: bool,
    num_rows: int,
    dtype: torch.dtype,
) -> None:
    quantized = _quantized(sizes, group_size, symmetric=symmetric)
    x_TI = _random(num_rows, sizes[1]).to(DEVICE, dtype)
    bias_O = _random(sizes[0]).to(DEVICE, dtype) if has_bias else None
    linear = TritonInt4Linear(quantized, bias_O, device=DEVICE)
    exact_TO = x_TI.double() @ dequantize(quantized).double().to(DEVICE).T
    magnitude_TO = x_TI.double().abs() @ dequantize(quantized).double().abs().to(DEVICE).T
    if bias_O is not None:
        exact_TO += bias_O.double()
        magnitude_TO += bias_O.double().abs()
    actual_TO = linear(x_TI)
    assert actual_TO.dtype == dtype
    # In bfloat16 the packed product rounds the result alone; beyond MAX_ROWS weights are rounded too.
    bound_TO = 2**-18 * magnitude_TO
    if dtype == torch.bfloat16:
        bound_TO += 2**-7 * (magnitude_TO if num_rows > MAX_ROWS else exact_TO.abs())
    assert ((actual_TO.double() - exact_TO).abs() <= bound_TO).all()
    wide_TO = linear(x_TI, torch.float32)
    assert wide_TO.dtype == torch.float32
    if num_rows <= MAX_ROWS:
        assert ((wide_TO.double() - exact_TO).abs() <= 2**-18 * magnitude_TO).all()


def test_groups_are_shared_out_and_a_row_does_not_depend_on_its_company() -> None:
    quantized = _quantized((40, 1024), 32, symmetric=False)
    linear = TritonInt4Linear(quantized, None, device=DEVICE)
    assert int4_matmul.NUM_PROGRAMS >= 1024 // 32  # so that 40 outputs do not fill the GPU
    x_TI = _random(5, 1024).to(DEVICE)
    together_TO = linear(x_TI)
    for row in range(len(x_TI)):
        assert torch.equal(linear(x_TI[row : row + 1])[0], together_TO[row])


def test_dequantized_weight_is_exact_in_float32() -> None:
    quantized = _quantized((70, 192), 64, symmetric=False)
    packed = int4_matmul.pack_int4(quantized, DEVICE)
    weight_IO = int4_matmul.dequantize(packed, torch.float32)
    assert torch.equal(weight_IO.T.cpu(), dequantize(quantized))


def test_a_hand_worked_product() -> None:
    """One group: codes 1, 2, ... with zero point 1 and scale 0.5; a row of ones."""
    codes_OI = (torch.arange(32) % 15 - 7).to(torch.int8)[None]
    quantized = QuantizedWeight(
        codes_OI=codes_OI,
        scale_OG=torch.tensor([[0.5]]),
        zero_point_OG=torch.tensor([[1]], dtype=torch.int8),
    )
    linear = TritonInt4Linear(quantized, torch.tensor([0.25], device=DEVICE), device=DEVICE)
    expected = 0.5 * (sum(i % 15 - 7 for i in range(32)) - 32) + 0.25
    assert linear(torch.ones(1, 32, device=DEVICE)).tolist() == [[expected]]


def test_other_group_sizes_are_refused_by_name() -> None:
    quantized = _quantized((4, 48), 48, symmetric=True)
    with pytest.raises(ValueError, match="group_size 48"):
        TritonInt4Linear(quantized, None, device=DEVICE)


@pytest.mark.cuda
def test_a_gpu_multiplies_with_it_where_it_can() -> None:
    for group_size, kind in ((64, TritonInt4Linear), (256, QuantizedLinear)):
        quantized = _quantized((70, 512), group_size, symmetric=False)
        linear = build_linear(
            [LinearWeight(weight=quantized)], dtype=torch.bfloat16, device=torch.device("cuda")
        )
        assert isinstance(linear, kind)
        x_TI = _random(3, 512).bfloat16()
        exact_TO = x_TI.double() @ dequantize(quantized).double().T
        actual_TO = linear(x_TI.cuda(), torch.float32).cpu()
        torch.testing.assert_close(actual_TO.double(), exact_TO, rtol=2**-6, atol=0.5)
    assert "group_size 256" in linear.kernel
