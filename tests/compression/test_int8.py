"""INT8 against a hand-worked row and its error bound."""

import pytest
import torch

from compression.quantization.int4 import dequantize
from compression.quantization.int8 import round_to_nearest_int8


def test_a_row_worked_by_hand() -> None:
    # scale 255 / 127.5 = 2
    quantized = round_to_nearest_int8(
        torch.tensor([[-255.0, 3.1, 0.0, 254.0]]), scale_dtype=torch.float32
    )
    assert quantized.scale_OG.tolist() == [[2.0]]
    assert quantized.codes_OI.tolist() == [[-128, 2, 0, 127]]
    assert dequantize(quantized).tolist() == [[-256.0, 4.0, 0.0, 254.0]]


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (17, 96)])
def test_error_is_at_most_half_a_step_but_at_the_largest_weight(shape: tuple[int, int]) -> None:
    weight_OI = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    quantized = round_to_nearest_int8(weight_OI, scale_dtype=torch.float32)
    error_OI = (dequantize(quantized) - weight_OI).abs() / quantized.scale_OG
    assert (error_OI <= 0.5001).all()


def test_rows_of_zeros_stay_zero_and_bad_weights_are_refused() -> None:
    weight_OI = torch.zeros(2, 5).bfloat16()
    weight_OI[1, 2] = 1
    quantized = round_to_nearest_int8(weight_OI, scale_dtype=torch.bfloat16)
    assert dequantize(quantized)[0].count_nonzero() == 0
    with pytest.raises(ValueError, match="finite"):
        round_to_nearest_int8(torch.tensor([[torch.inf]]), scale_dtype=torch.float32)
