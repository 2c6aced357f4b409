"""The native products against float64, at sizes that no vector width divides.

Shapes: T rows, O output channels, I input channels, R rank.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from compression.quantization.int4 import QuantizedWeight, dequantize, round_to_nearest
from compression.quantization.int8 import round_to_nearest_int8
from engines.kernels.cpu_linear import (
    NATIVE_ROWS,
    CpuLinear,
    applies,
    build_cpu_linear,
    pack_tiles,
    pack_weight,
    quantize_on_cpu,
)
from engines.kernels.native import NativeLibrary
from engines.kernels.weights import LinearWeight, LowRankWeight, MatrixWeight
from tests.reference.decoder_ops import int8_rows

ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 17)
BATCHES = (1, 2, 7, 16, 17, 33, 100, 300)
MANY_ROWS = max(NATIVE_ROWS.values()) + 1


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def _int4(
    out_features: int,
    in_features: int,
    group_size: int,
    *,
    symmetric: bool = True,
    scale_dtype: torch.dtype = torch.bfloat16,
) -> QuantizedWeight:
    weight_OI = _random(out_features, in_features) + 0.3
    return round_to_nearest(weight_OI, group_size, symmetric=symmetric, scale_dtype=scale_dtype)


def _exact(matrix: MatrixWeight) -> Tensor:
    """The weight that a matrix stands for, float64."""
    return (dequantize(matrix) if isinstance(matrix, QuantizedWeight) else matrix).double()


def _apply(linear: CpuLinear, x_TI: Tensor) -> Tensor:
    return linear.few_rows(x_TI, torch.float32).double()


def _error(actual: Tensor, exact: Tensor) -> float:
    return float((actual - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sizes", [(16, 32), (33, 70), (1, 1), (7, 31), (100, 208)])
def test_dense(library: NativeLibrary, dtype: torch.dtype, sizes: tuple[int, int]) -> None:
    weight_OI, bias_O = _random(*sizes).to(dtype), _random(sizes[0], seed=1).to(dtype)
    weights = [LinearWeight(weight=weight_OI, bias_O=bias_O)]
    linear = build_cpu_linear(weights, dtype=dtype, library=library)
    for num_rows in (*ROWS, MANY_ROWS):
        x_TI = _random(num_rows, sizes[1]).to(dtype)
        exact = F.linear(x_TI.double(), weight_OI.double(), bias_O.double())
        # Products of bfloat16 are exact in float32, whose sums differ by order only; torch rounds to bfloat16.
        reference = F.linear(x_TI, weight_OI, bias_O)
        bound = 2 * _error(reference.double(), exact) + 1e-7
        assert _error(linear(x_TI).double(), exact) <= bound
        in_float32 = F.linear(x_TI.float(), weight_OI.float(), bias_O.float())
        bound = 2 * _error(in_float32.double(), exact) + 1e-7
        assert _error(_apply(linear, x_TI), exact) <= bound


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("sizes", "group_size"),
    [((16, 32), 32), ((48, 96), 32), ((33, 320), 64), ((1, 64), 64), ((100, 384), 128)],
)
def test_int4(
    library: NativeLibrary,
    symmetric: bool,
    scale_dtype: torch.dtype,
    sizes: tuple[int, int],
    group_size: int,
) -> None:
    """Equal to the exact product of the quantized rows with the dequantized weight, up to float32 sums."""
    quantized = _int4(*sizes, group_size, symmetric=symmetric, scale_dtype=scale_dtype)
    bias_O = _random(sizes[0], seed=1)
    weights = [LinearWeight(weight=quantized, bias_O=bias_O)]
    linear = build_cpu_linear(weights, dtype=torch.bfloat16, library=library)
    for num_rows in ROWS:
        x_TI = _random(num_rows, sizes[1])
        x_TI[0, :group_size] = 0  # a group without a scale
        rows_TI = int8_rows(x_TI)
        expected = F.linear(rows_TI, _exact(quantized), bias_O.double())
        torch.testing.assert_close(_apply(linear, x_TI), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("sizes", [(16, 64), (33, 192), (1, 128), (100, 576)])
def test_int8_head(library: NativeLibrary, sizes: tuple[int, int]) -> None:
    """Beside the exact product of both sides' INT8 values; and both are within a hundredth of the weight."""
    weight_OI = _random(*sizes).bfloat16()
    weight_OI[0, :64] = 0
    linear = quantize_on_cpu(weight_OI, library)
    groups_OGI = weight_OI.double().reshape(sizes[0], -1, 64)
    scale_OG1 = (groups_OGI.abs().amax(dim=2, keepdim=True) / 127).float().bfloat16().double()
    codes_OGI = torch.where(scale_OG1 > 0, groups_OGI / scale_OG1, 0.0).round().clamp(-127, 127)
    held_OI = (codes_OGI * scale_OG1).flatten(1)
    assert _error(held_OI, weight_OI.double()) < 0.01
    for num_rows in ROWS:
        x_TI = _random(num_rows, sizes[1])
        expected = int8_rows(x_TI) @ held_OI.T
        torch.testing.assert_close(_apply(linear, x_TI), expected, rtol=1e-5, atol=1e-4)
    if library.has_amx:  # of many rows no other product
        return
    x_TI = _random(MANY_ROWS, sizes[1]).bfloat16()
    reference = F.linear(x_TI, held_OI.bfloat16())
    exact = x_TI.double() @ held_OI.T
    assert _error(linear(x_TI).double(), exact) <= 2 * _error(reference.double(), exact)


def test_int8_rows_cost_little(library: NativeLibrary) -> None:
    """On normal inputs the rows' quantization costs less than a tenth of what the weights' does."""
    weight_OI, x_TI = _random(64, 512), _random(8, 512)
    quantized = round_to_nearest(weight_OI, 64, symmetric=True, scale_dtype=torch.bfloat16)
    weights = [LinearWeight(weight=quantized)]
    linear = build_cpu_linear(weights, dtype=torch.bfloat16, library=library)
    exact = x_TI.double() @ weight_OI.double().T
    from_weights = _error(x_TI.double() @ _exact(quantized).T, exact)
    from_rows = _error(_apply(linear, x_TI), x_TI.double() @ _exact(quantized).T)
    assert from_rows < 0.1 * from_weights


def test_int4_of_many_rows_has_no_quantized_rows_without_amx(library: NativeLibrary) -> None:
    if library.has_amx:
        pytest.skip("of many rows no other product")
    quantized = _int4(33, 320, 64, symmetric=False)
    weights = [LinearWeight(weight=quantized)]
    linear = build_cpu_linear(weights, dtype=torch.bfloat16, library=library)
    x_TI = _random(MANY_ROWS, 320).bfloat16()
    exact = x_TI.double() @ _exact(quantized).T
    reference = F.linear(x_TI, _exact(quantized).bfloat16())
    assert _error(linear(x_TI).double(), exact) <= 2 * _error(reference.double(), exact)


MIXTURES: dict[str, list[LinearWeight]] = {
    "dense of three": [LinearWeight(weight=_random(n, 64)) for n in (48, 16, 17)],
    "int4 of three": [LinearWeight(weight=_int4(n, 64, 32)) for n in (48, 16, 17)],
    "int4 of two groups": [LinearWeight(weight=_int4(n, 64, g)) for n, g in ((48, 32), (17, 64))],
    "low rank": [
        LinearWeight(
            weight=LowRankWeight(weight_u=_random(33, 13), weight_v=_random(13, 64)),
            bias_O=_random(33),
        )
    ],
    "low rank of int4 factors": [
        LinearWeight(weight=LowRankWeight(weight_u=_int4(33, 32, 32), weight_v=_int4(32, 64, 64))),
        LinearWeight(weight=LowRankWeight(weight_u=_int4(20, 64, 32), weight_v=_int4(64, 64, 64))),
    ],
    "everything": [
        LinearWeight(weight=_random(18, 64), bias_O=_random(18)),
        LinearWeight(weight=LowRankWeight(weight_u=_random(33, 32), weight_v=_int4(32, 64, 32))),
        LinearWeight(weight=_int4(16, 64, 64)),
        LinearWeight(weight=LowRankWeight(weight_u=_int4(5, 32, 32), weight_v=_random(32, 64))),
    ],
}


@pytest.mark.parametrize("name", MIXTURES)
def test_weights_side_by_side(library: NativeLibrary, name: str) -> None:
    weights = MIXTURES[name]
    linear = build_cpu_linear(weights, dtype=torch.bfloat16, library=library)
    for num_rows in (*ROWS, MANY_ROWS):
        x_TI = _random(num_rows, 64)
        # What is rounded on the way may be rounded the other way where it is near a half.
        _check_parts(weights, _apply(linear, x_TI), _rows_of(library), x_TI, 1e-3)
        if not library.has_amx:
            _check_parts(weights, linear.many_rows(x_TI.bfloat16()).double(), _as_is, x_TI, 0.015)


RowsOf = Callable[[MatrixWeight, Tensor], Tensor]
"""The rows (T, I), float64, that a matrix is multiplied with, of exact ones."""


def _check_parts(
    weights: list[LinearWeight], actual: Tensor, rows_of: RowsOf, x_TI: Tensor, bound: float
) -> None:
    expected = [_expected(weight, x_TI, rows_of) for weight in weights]
    parts = torch.split(actual, [part.shape[1] for part in expected], dim=1)
    for part, exact in zip(parts, expected, strict=True):
        assert _error(part, exact) < bound


def _as_is(matrix: MatrixWeight, rows_TI: Tensor) -> Tensor:
    return rows_TI


def _rows_of(library: NativeLibrary) -> RowsOf:
    def rows_of(matrix: MatrixWeight, rows_TI: Tensor) -> Tensor:
        if isinstance(matrix, QuantizedWeight):
            return int8_rows(rows_TI)
        return rows_TI.bfloat16().double() if library.has_amx else rows_TI

    return rows_of


def _expected(weight: LinearWeight, x_TI: Tensor, rows_of: RowsOf) -> Tensor:
    y_TO = x_TI.double()
    for matrix in reversed(weight.matrices):
        exact_OI = _exact(matrix if isinstance(matrix, QuantizedWeight) else matrix.bfloat16())
        y_TO = rows_of(matrix, y_TO) @ exact_OI.T
    return y_TO if weight.bias_O is None else y_TO + weight.bias_O.double()


@pytest.mark.parametrize("name", MIXTURES)
def test_a_row_alone_is_the_row_in_a_batch(library: NativeLibrary, name: str) -> None:
    """Bit for bit, whichever units multiply so many rows."""
    linear = build_cpu_linear(MIXTURES[name], dtype=torch.bfloat16, library=library)
    _check_batches(linear, _random(max(BATCHES), 64))


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_row_alone_is_the_row_in_a_batch_with_the_head(
    library: NativeLibrary, symmetric: bool
) -> None:
    """The same of longer sums: INT8, and INT4 whose groups are longer than those of the rows."""
    weight_OI = _random(100, 576).bfloat16()
    _check_batches(quantize_on_cpu(weight_OI, library), _random(max(BATCHES), 576))
    weights = [LinearWeight(weight=_int4(100, 576, 96, symmetric=symmetric))]
    linear = build_cpu_linear(weights, dtype=torch.bfloat16, library=library)
    _check_batches(linear, _random(max(BATCHES), 576))


def _check_batches(linear: CpuLinear, x_TI: Tensor) -> None:
    alone = torch.cat([_apply(linear, row_I[None]) for row_I in x_TI])
    for num_rows in BATCHES:
        assert torch.equal(_apply(linear, x_TI[:num_rows]), alone[:num_rows])
        assert torch.equal(_apply(linear, x_TI[-num_rows:]), alone[-num_rows:])


def test_threads_share_a_large_product(library: NativeLibrary) -> None:
    """Small ones are not worth handing over; here every chunk must be done once, by whomever."""
    weights = [LinearWeight(weight=_random(1500, 256)), LinearWeight(weight=_int4(700, 256, 64))]
    linear = build_cpu_linear(weights, dtype=torch.bfloat16, library=library)
    x_TI = _random(3, 256)
    expected = torch.cat([_expected(weight, x_TI, _rows_of(library)) for weight in weights], dim=1)
    for _ in range(20):
        torch.testing.assert_close(_apply(linear, x_TI), expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("sizes", [(16, 32), (33, 320), (1, 1536), (100, 96)])
def test_int8_codes_of_a_checkpoint(library: NativeLibrary, sizes: tuple[int, int]) -> None:
    weight_OI = _random(*sizes).clamp(-1.9, 1.9)
    weight_OI[:, 0] = -127.5 / 64  # a code of -128 in every row
    quantized = round_to_nearest_int8(weight_OI, scale_dtype=torch.bfloat16)
    assert (quantized.codes_OI[:, 0] == -128).all()
    linear = build_cpu_linear(
        [LinearWeight(weight=quantized)], dtype=torch.bfloat16, library=library
    )
    assert linear.kernel.startswith("native int8")
    for num_rows in (*ROWS, MANY_ROWS) if library.has_amx else ROWS:
        x_TI = _random(num_rows, sizes[1])
        expected = int8_rows(x_TI) @ _exact(quantized).T
        torch.testing.assert_close(_apply(linear, x_TI), expected, rtol=1e-5, atol=1e-3)
    if library.has_amx:
        return
    x_TI = _random(MANY_ROWS, sizes[1]).bfloat16()
    reference = F.linear(x_TI, _exact(quantized).bfloat16())
    exact = x_TI.double() @ _exact(quantized).T
    assert _error(linear(x_TI).double(), exact) <= 2 * _error(reference.double(), exact)


def test_layout_by_hand() -> None:
    """Input 8j + i of output `lane` is in byte 4 lane + i of the j-th 64: the low half; 8j + 4 + i: the high half."""
    codes_OI = torch.zeros(17, 64, dtype=torch.int8)
    codes_OI[3, 8 + 2], codes_OI[3, 8 + 6], codes_OI[16, 0] = -8, 7, 1
    packed = pack_weight(
        QuantizedWeight(codes_OI=codes_OI, scale_OG=torch.ones(17, 2), zero_point_OG=None)
    )
    assert packed.packed_BJ64.shape == (2, 8, 64)
    assert packed.packed_BJ64[0, 1, 4 * 3 + 2] == 0xF0
    assert packed.packed_BJ64[1, 0, 0] == 0x89
    assert (packed.packed_BJ64 == 0x88).sum() == 2 * 8 * 64 - 2 - 15 * 8 * 4
    assert (packed.scale_BGL[1, :, 1:] == 0).all()


def test_tiles_by_hand() -> None:
    """Inputs 2p and 2p + 1 of output 16b + l are tiles[b, p, l]; a tile of 32 inputs is 16 lines of 64 bytes."""
    weight_OI = torch.arange(17 * 33.0).view(17, 33).bfloat16()
    tiles_BPL2 = pack_tiles(weight_OI).tiles_BPL2
    assert tiles_BPL2.shape == (2, 32, 16, 2)
    assert torch.equal(tiles_BPL2[0, 5, 3], weight_OI[3, 10:12])
    assert torch.equal(tiles_BPL2[1, 16, 0], torch.tensor([weight_OI[16, 32], 0]))
    assert not tiles_BPL2[1, :, 1:].any()
    assert not tiles_BPL2[:, 17:].any()
    indices = torch.tensor([16, 0, 3, 16])
    assert torch.equal(pack_tiles(weight_OI).rows(indices), weight_OI[indices])


def test_float32_is_never_approximated() -> None:
    assert applies([LinearWeight(weight=_random(8, 8))], torch.float32)
    assert applies([LinearWeight(weight=_int4(8, 32, 32))], torch.bfloat16)
    assert not applies([LinearWeight(weight=_int4(8, 32, 32))], torch.float32)
    assert not applies([LinearWeight(weight=_random(8, 8))], torch.float16)
    assert not applies([LinearWeight(weight=_int4(8, 48, 48))], torch.bfloat16)
