"""The Triton kernels beside the products: against float64, at odd sizes; compiled on a GPU, else in the interpreter.

Shapes: T rows, S requests, H hidden, F feed-forward width, N query heads, K key/value heads, A = N + 2 K, D head dim.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from engines.kernels.attention import LayerHeads, PassFacts, turn_heads
from engines.kernels.metadata import BLOCK_SIZE, BatchMetadata, RequestRows, build_metadata
from engines.kernels.paged_attention import LayerCache, write_cache
from engines.kernels.triton import paged_attention as attention
from engines.kernels.triton import turn_heads as heads
from engines.kernels.triton.launch import INTERPRETED
from engines.kernels.triton.rms_norm import add_rms_norm, rms_norm
from engines.kernels.triton.swiglu import swiglu
from tests.conftest import HAS_GPU
from tests.reference import decoder_ops

pytestmark = pytest.mark.usefixtures("single_thread")

DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
DTYPES = [torch.float32, torch.bfloat16]
EPSILON = 1e-5
MAX_POSITIONS = 8192


def _random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def _assert_close(
    actual: Tensor, exact: Tensor, dtype: torch.dtype, num_roundings: int = 2
) -> None:
    """Within so many roundings of the dtype; `exact` is float64."""
    tolerance = 1e-5 if dtype == torch.float32 else num_roundings * 2**-8
    torch.testing.assert_close(actual.double(), exact, rtol=tolerance, atol=tolerance)


def test_kernels_are_interpreted_only_without_a_gpu() -> None:
    assert INTERPRETED is not HAS_GPU


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(1, 1), (3, 7), (1, 16), (2, 33), (5, 576)])
def test_rms_norm(sizes: tuple[int, int], dtype: torch.dtype) -> None:
    x_TH, weight_H = _random(*sizes, dtype=dtype), _random(sizes[1], dtype=dtype)
    exact = F.rms_norm(x_TH.double(), (sizes[1],), weight_H.double(), EPSILON)
    _assert_close(rms_norm(x_TH, weight_H, EPSILON), exact, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(1, 5), (3, 576)])
def test_add_rms_norm(sizes: tuple[int, int], dtype: torch.dtype) -> None:
    x_TH, residual_TH = _random(*sizes, dtype=dtype), 3 * _random(*sizes, dtype=dtype).flip(0)
    weight_H = _random(sizes[1], dtype=dtype)
    before_TH = residual_TH.clone()
    normed_TH, sum_TH = add_rms_norm(x_TH, residual_TH, weight_H, EPSILON)
    assert torch.equal(residual_TH, before_TH)
    # Not equal to torch's sum: the interpreter cuts what does not fit bfloat16 off, where a GPU rounds.
    _assert_close(sum_TH, x_TH.double() + residual_TH.double(), dtype)
    exact = F.rms_norm(sum_TH.double(), (sizes[1],), weight_H.double(), EPSILON)
    _assert_close(normed_TH, exact, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 31, 48, 1500])
def test_swiglu(width: int, dtype: torch.dtype) -> None:
    gate_up_TF = _random(3, 2 * width, dtype=dtype)
    gate_up_TF[0, :width] = torch.linspace(-120, 120, width)  # past where e^x is finite
    gate_TF, up_TF = gate_up_TF.double().chunk(2, dim=1)
    _assert_close(swiglu(gate_up_TF), F.silu(gate_TF) * up_TF, dtype)


@dataclass(frozen=True, kw_only=True)
class _Layer:
    num_heads: int
    num_kv_heads: int
    query_norm_D: Tensor | None = None
    key_norm_D: Tensor | None = None
    window: int | None = None


def build_layer(
    num_heads: int, num_kv_heads: int, *, window: int | None, norm_D: Tensor | None
) -> LayerHeads:
    return _Layer(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        query_norm_D=norm_D,
        key_norm_D=norm_D,
        window=window,
    )


def _requests(spans: list[tuple[int, int]]) -> list[RequestRows]:
    """Requests of (start, rows) whose blocks are scattered; blocks 0 and 1 are nobody's."""
    num_blocks = sum(-(-(start + count) // BLOCK_SIZE) for start, count in spans)
    free = (torch.randperm(num_blocks, generator=torch.Generator().manual_seed(0)) + 2).tolist()
    requests = []
    for start, count in spans:
        table = [free.pop() for _ in range(-(-(start + count) // BLOCK_SIZE))]
        requests.append(RequestRows(start=start, num_tokens=count, block_table=table))
    return requests


def _cache(requests: list[RequestRows], num_kv_heads: int, head_dim: int) -> LayerCache:
    """Random where somebody's, no numbers where nobody's and past each request's end."""
    num_blocks = 2 + sum(len(rows.block_table) for rows in requests)
    shape = (num_blocks, BLOCK_SIZE, num_kv_heads, head_dim)
    cache = _random(*shape), _random(*shape).flip(0) + 0.1
    for part in cache:
        part[:2] = torch.nan
        for rows in requests:
            part[rows.block_table[-1], (rows.start + rows.num_tokens - 1) % BLOCK_SIZE + 1 :] = (
                torch.nan
            )
    return cache


def _facts(requests: list[RequestRows], head_dim: int, window: int | None = None) -> PassFacts:
    return build_facts(build_metadata(requests, DEVICE), head_dim, window)


def build_facts(metadata: BatchMetadata, head_dim: int, window: int | None) -> PassFacts:
    angles_PR = torch.outer(torch.arange(float(MAX_POSITIONS)), 0.5 ** torch.arange(head_dim // 2))
    angles_TR = angles_PR.to(metadata.positions_T.device)[metadata.positions_T]
    return PassFacts(
        metadata=metadata,
        cos_TR=angles_TR.cos(),
        sin_TR=angles_TR.sin(),
        epsilon=EPSILON,
        windows=frozenset({window}),
        max_context_len=MAX_POSITIONS,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_norms", [False, True])
@pytest.mark.parametrize("sizes", [(3, 1, 2), (4, 2, 32), (9, 3, 64), (2, 2, 80)])
def test_heads_turn_into_queries_and_cache(
    sizes: tuple[int, int, int], has_norms: bool, dtype: torch.dtype
) -> None:
    num_heads, num_kv_heads, head_dim = sizes
    requests = _requests([(5, 2), (20, 1), (0, 17)])
    facts = _facts(requests, head_dim)
    norms = [_random(head_dim, dtype=dtype), _random(head_dim, dtype=dtype).flip(0)]
    layer = _Layer(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        query_norm_D=norms[0] if has_norms else None,
        key_norm_D=norms[1] if has_norms else None,
    )
    heads_TAD = _random(20, num_heads + 2 * num_kv_heads, head_dim, dtype=dtype)
    queries_TND, keys_TKD, values_TKD = turn_heads(heads_TAD, layer, facts)
    empty, expected = (
        tuple(part.to(dtype) for part in _cache(requests, num_kv_heads, head_dim)) for _ in range(2)
    )
    write_cache((expected[0], expected[1]), keys_TKD, values_TKD, facts.metadata.slot_mapping_T)
    actual_TND = heads.turn_heads(heads_TAD, layer, facts, (empty[0], empty[1]))
    _assert_close(actual_TND, queries_TND.double(), dtype, num_roundings=4)
    for actual, wanted in zip(empty, expected, strict=True):
        is_number = ~wanted.isnan()
        assert torch.equal(actual.isnan(), wanted.isnan())
        _assert_close(actual[is_number], wanted[is_number].double(), dtype, num_roundings=4)


MIXED = [(5, 2), (20, 1), (290, 20), (0, 1), (0, 33)]
DECODE = [(5, 1), (20, 1), (600, 1), (0, 1), (255, 1), (256, 1), (15, 1)]
HEADS = [(3, 1, 8), (9, 3, 64), (2, 2, 80), (8, 1, 128)]


Spans = list[tuple[int, int]]


def _attention_cases() -> list[tuple[tuple[int, int, int], Spans, int | None, torch.dtype]]:
    cases: list[tuple[tuple[int, int, int], Spans, int | None]] = [
        (HEADS[1], spans, None) for spans in ([(700, 1)], [(40, 3)], [(30, 1)])
    ]
    cases += [(sizes, spans, None) for sizes in HEADS for spans in (MIXED, DECODE)]
    windows = (7, 300)
    cases += [(HEADS[0], [(8100, 1), (3, 1)], None)]  # parts enough to be merged in two goes
    cases += [(HEADS[0], spans, window) for spans in (MIXED, DECODE) for window in windows]
    # The interpreter multiplies bfloat16 in float32, so that one size says all it has to say.
    in_bfloat16 = [case for case in cases if HAS_GPU or case[0] == HEADS[0]]
    return [(*case, torch.float32) for case in cases] + [
        (*case, torch.bfloat16) for case in in_bfloat16
    ]


@pytest.mark.parametrize(("sizes", "spans", "window", "dtype"), _attention_cases())
def test_attention(
    sizes: tuple[int, int, int], spans: Spans, window: int | None, dtype: torch.dtype
) -> None:
    num_heads, num_kv_heads, head_dim = sizes
    requests = _requests(spans)
    facts = _facts(requests, head_dim, window)
    keys, values = (part.to(dtype) for part in _cache(requests, num_kv_heads, head_dim))
    layer = _Layer(num_heads=num_heads, num_kv_heads=num_kv_heads, window=window)
    num_rows = sum(count for _, count in spans)
    heads_TAD = _random(num_rows, num_heads + 2 * num_kv_heads, head_dim, dtype=dtype)
    queries_TND = turn_heads(heads_TAD, layer, facts)[0]
    actual_TND = attention.TritonAttention(facts)(heads_TAD, layer, (keys, values))
    assert actual_TND.dtype == dtype
    row = 0
    for rows in requests:
        table = list(rows.block_table)
        for position in range(rows.start, rows.start + rows.num_tokens):
            exact_ND = decoder_ops.attention(
                queries_TND[row],
                keys[table].flatten(0, 1)[: position + 1],
                values[table].flatten(0, 1)[: position + 1],
                window,
            )
            _assert_close(actual_TND[row], exact_ND, dtype)
            row += 1


def test_a_row_does_not_depend_on_its_company() -> None:
    """In decode: on its own with a short block table, and beside a request whose context has more parts."""
    layer = _Layer(num_heads=4, num_kv_heads=2)
    requests = _requests([(600, 1), (1100, 1), (3, 1)])
    cache = _cache(requests, 2, 32)
    heads_TAD = _random(3, 8, 32)
    together_TND = attention.TritonAttention(_facts(requests, 32))(heads_TAD, layer, cache)
    for index, rows in enumerate(requests):
        alone_TND = attention.TritonAttention(_facts([rows], 32))(
            heads_TAD[index : index + 1], layer, cache
        )
        assert torch.equal(alone_TND[0], together_TND[index])


def test_parts_of_a_context_are_longer_where_contexts_can_be() -> None:
    layer = _Layer(num_heads=3, num_kv_heads=1)
    requests = _requests([(1400, 1), (9, 1)])
    cache = _cache(requests, 1, 8)
    heads_TAD = _random(2, 5, 8)
    short = _facts(requests, 8)
    long = replace(short, max_context_len=2**17)
    outputs = [attention.TritonAttention(facts)(heads_TAD, layer, cache) for facts in (short, long)]
    assert not torch.equal(outputs[0][0], outputs[1][0])  # cut elsewhere, so rounded otherwise
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows_per_tile", [1, 5, 16])
def test_request_tiles_cover_every_row_once(rows_per_tile: int) -> None:
    metadata = build_metadata(_requests(MIXED), DEVICE)
    tiles = attention.request_tiles(metadata, rows_per_tile)
    covered: list[int] = []
    starts = metadata.query_start_S1.tolist()
    for request, first in zip(*(part.tolist() for part in tiles), strict=True):
        if request >= 0:
            assert starts[request] <= first < starts[request + 1]
            covered += range(first, min(first + rows_per_tile, starts[request + 1]))
    assert sorted(covered) == list(range(starts[-1]))
