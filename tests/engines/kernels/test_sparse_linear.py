"""Which weights go to the sparse matrix units, and that torch packs what our pruning leaves; products on a GPU.

Shapes: O output channels, I input channels.
"""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from compression.pruning.masks import NM, keep_mask
from compression.pruning.two_four import is_two_four
from engines.kernels.linear import DenseLinear, build_linear
from engines.kernels.sparse_linear import SparseLinear, why_not
from engines.kernels.weights import LinearWeight

CPU = torch.device("cpu")


def _two_four(num_rows: int, num_columns: int) -> Tensor:
    """bfloat16 weights pruned by magnitude as a recipe does it, a few of the kept ones zero as well."""
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(num_rows, num_columns, generator=generator)
    weight_OI *= keep_mask(weight_OI.abs(), NM(2, 4), scope="row")
    weight_OI[0] = 0
    weight_OI[:, 1] = 0
    return weight_OI.bfloat16()


def test_two_four_is_recognised() -> None:
    weight_OI = _two_four(32, 64)
    assert is_two_four(weight_OI)
    assert is_two_four(torch.zeros(1, 4))
    assert is_two_four(torch.tensor([[0.0, 1, 2, 0, 3, 0, 0, 4]]))
    assert not is_two_four(torch.tensor([[0.0, 1, 2, 0, 3, 0, 5, 4]]))
    assert not is_two_four(torch.tensor([[1.0, 1, 0, 0, 0, 0]]))  # a row of one and a half groups
    weight_OI[5, 8:11] = 1
    assert not is_two_four(weight_OI)


def test_torch_packs_what_pruning_leaves() -> None:
    weight_OI = _two_four(64, 128)
    packed, meta = sparse_semi_structured_from_dense_cutlass(weight_OI)  # type: ignore[no-untyped-call]
    assert packed.nbytes + meta.nbytes == weight_OI.nbytes * 9 // 16
    unpacked_OI = sparse_semi_structured_to_dense_cutlass(packed, meta)  # type: ignore[no-untyped-call]
    assert torch.equal(unpacked_OI, weight_OI)


def test_weights_that_stay_dense_are_named() -> None:
    weight_OI = _two_four(32, 64)
    assert why_not(weight_OI) == "no sparse product on cpu"
    assert why_not(weight_OI.float()) == "no sparse product in float32"
    assert why_not(weight_OI[:24]) == "24 x 64 is no multiple of 32 x 64"
    assert why_not(weight_OI[:, :32]) == "32 x 32 is no multiple of 32 x 64"


def test_a_cpu_multiplies_them_as_dense_ones() -> None:
    weight_OI = _two_four(32, 64)
    linear = build_linear([LinearWeight(weight=weight_OI)], dtype=torch.bfloat16, device=CPU)
    assert not isinstance(linear, SparseLinear)
    x_TI = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    exact = x_TI.double() @ weight_OI.double().T
    torch.testing.assert_close(linear(x_TI).double(), exact, rtol=2**-7, atol=2**-6)


@pytest.mark.cuda
@pytest.mark.parametrize("num_rows", [1, 3, 17, 129])
@torch.inference_mode()
def test_sparse_product_equals_the_dense_one(num_rows: int) -> None:
    weights = [LinearWeight(weight=_two_four(rows, 192)) for rows in (64, 32, 32)]
    device = torch.device("cuda")
    linear = build_linear(weights, dtype=torch.bfloat16, device=device)
    assert isinstance(linear, SparseLinear)
    dense_OI = torch.cat([_two_four(rows, 192) for rows in (64, 32, 32)])
    x_TI = torch.randn(num_rows, 192, generator=torch.Generator().manual_seed(1)).bfloat16()
    exact = x_TI.double() @ dense_OI.double().T
    actual = linear(x_TI.to(device), torch.float32).cpu()
    torch.testing.assert_close(actual.double(), exact, rtol=2**-7, atol=2**-5)
    held_bytes = sum(tensor.nbytes for tensor in linear.tensors())
    assert held_bytes < 0.7 * dense_OI.nbytes


@pytest.mark.cuda
def test_weights_of_other_shapes_stay_dense_on_a_gpu() -> None:
    weight = LinearWeight(weight=_two_four(24, 64))
    linear = build_linear([weight], dtype=torch.bfloat16, device=torch.device("cuda"))
    assert isinstance(linear, DenseLinear)
    assert "24 x 64" in linear.kernel
    x_TI = torch.randn(2, 64, dtype=torch.bfloat16, device="cuda")
    assert torch.equal(linear(x_TI), F.linear(x_TI, linear.weight_OI))
