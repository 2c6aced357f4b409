"""The parts of a native pass against float64, and whole passes against transformers.

Shapes: T rows, S requests, H hidden, N query heads, K key/value heads, A = N + 2 K, D head dim, C context positions.
"""

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from compression.hf import load_model
from engines.kernels import cpu_step, linear, native
from engines.kernels.cpu_attention import native_batch
from engines.kernels.cpu_step import CpuStep, build_cpu_step
from engines.kernels.metadata import BLOCK_SIZE, RequestRows, build_metadata
from engines.kernels.native import NativeLibrary
from engines.kernels.rotary import rotate
from engines.model import DecoderModel, build_kv_cache, load_decoder
from tests.engines.models import DECODER_CONFIGS, VOCAB_SIZE
from tests.reference import decoder_ops

EPSILON = 1e-5
CPU = torch.device("cpu")


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("sizes", [(1, 1), (3, 7), (1, 16), (2, 33), (5, 576)])
def test_rms_norm(library: NativeLibrary, sizes: tuple[int, int]) -> None:
    x_TH, weight_H = _random(*sizes), _random(sizes[1])
    output_TH = torch.empty(sizes)
    library.functions.lathe_rms_norm(
        library.context, x_TH.data_ptr(), weight_H.data_ptr(), *sizes, EPSILON, output_TH.data_ptr()
    )
    exact = F.rms_norm(x_TH.double(), (sizes[1],), weight_H.double(), EPSILON)
    torch.testing.assert_close(output_TH.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("width", [1, 16, 31, 48, 1000])
def test_swiglu(library: NativeLibrary, width: int) -> None:
    gate_up_TF = _random(3, 2 * width)
    gate_up_TF[0, :width] = torch.linspace(-120, 120, width)  # past where e^x is finite
    output_TF = torch.empty(3, width)
    library.functions.lathe_swiglu(
        library.context, gate_up_TF.data_ptr(), 3, width, output_TF.data_ptr()
    )
    gate_TF, up_TF = gate_up_TF.double().chunk(2, dim=1)
    exact = F.silu(gate_TF) * up_TF
    torch.testing.assert_close(output_TF.double(), exact, rtol=1e-5, atol=1e-6)


class _OneLayer:
    """A model of one layer without products, with a cache of random blocks, for three requests of two rows and more."""

    def __init__(
        self,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        window: int | None = None,
        norms: bool = False,
        rows: tuple[tuple[int, int], ...] = ((5, 2), (20, 1), (600, 3)),
    ) -> None:
        self.sizes = (num_heads, num_kv_heads, head_dim)
        self.window = window
        num_blocks = 2 + sum(-(-(start + count) // BLOCK_SIZE) for start, count in rows)
        order = torch.randperm(num_blocks - 2, generator=torch.Generator().manual_seed(0)) + 2
        free = order.tolist()
        self.requests: list[RequestRows] = []
        for start, count in rows:
            table = [free.pop() for _ in range(-(-(start + count) // BLOCK_SIZE))]
            self.requests.append(RequestRows(start=start, num_tokens=count, block_table=table))
        shape = (num_blocks, BLOCK_SIZE, num_kv_heads, head_dim)
        self.keys = _random(*shape).to(dtype)
        self.values = (_random(*shape) + 0.1).to(dtype)
        self.keys[:2], self.values[:2] = torch.nan, torch.nan  # nobody's
        self.metadata = build_metadata(self.requests, CPU)
        self.batch = native_batch(self.metadata)
        angles_PR = torch.outer(torch.arange(640.0), 0.5 ** torch.arange(head_dim // 2))
        self.cos_PR, self.sin_PR = angles_PR.cos(), angles_PR.sin()
        self.query_norm, self.key_norm = _random(head_dim), _random(head_dim) + 1
        pointers = [norm.data_ptr() if norms else None for norm in (self.query_norm, self.key_norm)]
        self._layer = native.Layer(
            query_norm_D=pointers[0],
            key_norm_D=pointers[1],
            key_cache=self.keys.data_ptr(),
            value_cache=self.values.data_ptr(),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            window=window or 0,
        )
        self.model = native.Model(
            layers=ctypes.pointer(self._layer),
            cos_PR=self.cos_PR.data_ptr(),
            sin_PR=self.sin_PR.data_ptr(),
            num_layers=1,
            head_dim=head_dim,
            block_size=BLOCK_SIZE,
            is_bf16=dtype == torch.bfloat16,
            rms_norm_epsilon=EPSILON,
        )

    def exact_attention(self, queries_TND: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Of every row its output (N, D) in float64, and the values (C, K, D) that it may see."""
        row = 0
        for request in self.requests:
            for position in range(request.start, request.start + request.num_tokens):
                keys_CKD, values_CKD = (
                    cache[list(request.block_table)].flatten(0, 1)[: position + 1]
                    for cache in (self.keys, self.values)
                )
                exact_ND = decoder_ops.attention(
                    queries_TND[row], keys_CKD, values_CKD, self.window
                )
                yield exact_ND, values_CKD
                row += 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 7, 300])
@pytest.mark.parametrize(
    "heads", [(3, 1, 8), (9, 3, 64), (4, 2, 32), (2, 2, 80), (8, 1, 128), (1, 1, 20), (2, 1, 256)]
)
def test_attention(
    library: NativeLibrary, dtype: torch.dtype, window: int | None, heads: tuple[int, int, int]
) -> None:
    num_heads, num_kv_heads, head_dim = heads
    layer = _OneLayer(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        window=window,
    )
    num_rows = len(layer.metadata.positions_T)
    qkv_TA = _random(num_rows, (num_heads + 2 * num_kv_heads) * head_dim)
    output_TND = torch.empty(num_rows, num_heads, head_dim)
    library.functions.lathe_attention(
        *(library.context, ctypes.byref(layer.model), 0, ctypes.byref(layer.batch)),
        *(qkv_TA.data_ptr(), output_TND.data_ptr()),
    )
    queries_TND = qkv_TA[:, : num_heads * head_dim].view(num_rows, num_heads, head_dim)
    # On AMX queries are rounded, and so are the weights: by up to 2^-9 each, which sum to one.
    on_amx = library.has_amx and dtype == torch.bfloat16 and head_dim % 32 == 0
    if on_amx:
        queries_TND = queries_TND.bfloat16().float()
    exact = layer.exact_attention(queries_TND)
    for actual_ND, (exact_ND, values_CKD) in zip(output_TND, exact, strict=True):
        atol = 2**-9 * float(values_CKD.abs().max()) if on_amx else 2e-6
        torch.testing.assert_close(actual_ND.double(), exact_ND, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("window", [None, 7, 300])
@pytest.mark.parametrize("heads", [(9, 3, 64), (4, 4, 32), (32, 2, 128), (1, 1, 20)])
def test_a_row_attends_alone_as_in_any_chunk(
    library: NativeLibrary, window: int | None, heads: tuple[int, int, int]
) -> None:
    """Bit for bit, of one request in bfloat16."""
    num_heads, num_kv_heads, head_dim = heads
    start, count = 230, 150
    qkv_TA = _random(count, (num_heads + 2 * num_kv_heads) * head_dim)

    def outputs(chunks: list[tuple[int, int]]) -> Tensor:
        layer = _OneLayer(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            dtype=torch.bfloat16,
            window=window,
            rows=((start, count),),
        )
        parts = []
        for first, end in chunks:
            table = layer.requests[0].block_table
            rows = RequestRows(start=start + first, num_tokens=end - first, block_table=table)
            metadata = build_metadata([rows], CPU)
            batch = native_batch(metadata)
            output_TND = torch.empty(end - first, num_heads, head_dim)
            library.functions.lathe_attention(
                *(library.context, ctypes.byref(layer.model), 0, ctypes.byref(batch)),
                *(qkv_TA[first:end].data_ptr(), output_TND.data_ptr()),
            )
            parts.append(output_TND)
        return torch.cat(parts)

    alone = outputs([(row, row + 1) for row in range(count)])
    assert alone.isfinite().all()
    for chunks in ([(0, 150)], [(0, 7), (7, 150)], [(0, 33), (33, 49), (49, 150)]):
        assert torch.equal(outputs(chunks), alone)


LONG_ROWS = ((0, 70), (37, 1), (200, 97), (0, 5), (530, 33))
"""Start and number: a prompt, a row of a decode, pieces of prompts that end within a block and a step of 64."""


def _long_attention(library: NativeLibrary, layer: _OneLayer, queries_TND: Tensor) -> Tensor:
    output_TND = torch.empty_like(queries_TND)
    library.functions.lathe_long_attention(
        *(library.context, ctypes.byref(layer.model), 0, ctypes.byref(layer.batch)),
        *(queries_TND.data_ptr(), output_TND.data_ptr()),
    )
    return output_TND


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 1, 7, 64, 300])
@pytest.mark.parametrize(
    "heads",
    [(9, 3, 64), (4, 2, 32), (2, 2, 80), (8, 1, 128), (5, 5, 16), (2, 1, 256), (110, 1, 16)],
)
def test_long_attention(
    library: NativeLibrary, dtype: torch.dtype, window: int | None, heads: tuple[int, int, int]
) -> None:
    num_heads, num_kv_heads, head_dim = heads
    layer = _OneLayer(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        window=window,
        rows=LONG_ROWS,
    )
    for request in layer.requests:  # nobody has written behind a request's last token
        end = request.start + request.num_tokens
        for cache in (layer.keys, layer.values):
            cache[request.block_table[-1], end - (end - 1) // BLOCK_SIZE * BLOCK_SIZE :] = torch.nan
    queries_TND = (3 * _random(len(layer.metadata.positions_T), num_heads, head_dim)).to(dtype)
    output_TND = _long_attention(library, layer, queries_TND)
    rtol = 1e-5 if dtype == torch.float32 else 2**-8
    exact = layer.exact_attention(queries_TND)
    for actual_ND, (exact_ND, _) in zip(output_TND, exact, strict=True):
        torch.testing.assert_close(actual_ND.double(), exact_ND, rtol=rtol, atol=5e-6)


@pytest.mark.parametrize("heads", [(9, 3, 64), (4, 4, 32), (32, 2, 128)])
def test_a_row_of_a_long_pass_does_not_depend_on_the_others(
    library: NativeLibrary, heads: tuple[int, int, int]
) -> None:
    """Bit for bit: with all rows of its request, and with those up to it only."""
    num_heads, num_kv_heads, head_dim = heads

    def outputs(count: int) -> Tensor:
        layer = _OneLayer(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            dtype=torch.bfloat16,
            rows=((100, 150),),
        )
        table = layer.requests[0].block_table
        rows = RequestRows(start=100, num_tokens=count, block_table=table)
        layer.metadata = build_metadata([rows], CPU)
        layer.batch = native_batch(layer.metadata)
        queries_TND = _random(150, num_heads, head_dim)[:count].bfloat16()
        return _long_attention(library, layer, queries_TND)

    whole = outputs(150)
    assert whole.isfinite().all()
    for count in (1, 33, 97, 149):
        assert torch.equal(outputs(count), whole[:count])


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(3, 1, 8), (9, 3, 64), (2, 2, 80), (1, 1, 20)])
def test_rotate_and_write(
    library: NativeLibrary, dtype: torch.dtype, norms: bool, heads: tuple[int, int, int]
) -> None:
    num_heads, num_kv_heads, head_dim = heads
    layer = _OneLayer(
        num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=dtype, norms=norms
    )
    positions_T = layer.metadata.positions_T
    qkv_TAD = _random(len(positions_T), num_heads + 2 * num_kv_heads, head_dim)
    queries_TND, keys_TKD, values_TKD = torch.split(
        qkv_TAD.double(), [num_heads, num_kv_heads, num_kv_heads], dim=1
    )
    if norms:
        query_norm_D, key_norm_D = layer.query_norm.double(), layer.key_norm.double()
        queries_TND = F.rms_norm(queries_TND, (head_dim,), query_norm_D, EPSILON)
        keys_TKD = F.rms_norm(keys_TKD, (head_dim,), key_norm_D, EPSILON)
    cos_TR, sin_TR = layer.cos_PR[positions_T].double(), layer.sin_PR[positions_T].double()
    before = [cache.clone() for cache in (layer.keys, layer.values)]
    library.functions.lathe_rotate_and_write(
        *(library.context, ctypes.byref(layer.model), 0, ctypes.byref(layer.batch)),
        qkv_TAD.data_ptr(),
    )
    torch.testing.assert_close(
        qkv_TAD[:, :num_heads].double(), rotate(queries_TND, cos_TR, sin_TR), rtol=1e-5, atol=1e-5
    )
    written = (rotate(keys_TKD, cos_TR, sin_TR), values_TKD)
    for cache, old, rows_TKD in zip((layer.keys, layer.values), before, written, strict=True):
        expected = old.flatten(0, 1)
        expected[layer.metadata.slot_mapping_T] = rows_TKD.to(dtype)
        # A sum that float64 rounds to the other bfloat16 is one unit, 2^-8, away.
        rtol = 1e-5 if dtype == torch.float32 else 2**-7
        torch.testing.assert_close(
            cache.flatten(0, 1), expected, rtol=rtol, atol=1e-5, equal_nan=True
        )


@pytest.fixture
def load(
    library: NativeLibrary,
    decoder_checkpoint: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[str, torch.dtype], DecoderModel]:
    """Loads a tiny model for the library under test."""
    monkeypatch.setattr(linear, "native_library", lambda: library)
    monkeypatch.setattr(cpu_step, "native_library", lambda: library)
    return lambda name, dtype: load_decoder(decoder_checkpoint(name), dtype=dtype)


PROMPTS = [(5, 40), (60, 3), (1, 17)]
"""Seed and length."""


def _ids(seed: int, length: int) -> Tensor:
    return torch.randint(VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(seed))


def _pass(decoder: DecoderModel, step: CpuStep, chunks: list[tuple[int, int, int]]) -> Tensor:
    """Logits of the chunks (prompt, start, end), each prompt with blocks of its own."""
    rows = [
        RequestRows(
            start=start,
            num_tokens=end - start,
            block_table=[1 + prompt * 4 + block for block in range(-(-end // BLOCK_SIZE))],
        )
        for prompt, start, end in chunks
    ]
    ids_T = torch.cat([_ids(*PROMPTS[prompt])[start:end] for prompt, start, end in chunks])
    metadata = build_metadata(rows, CPU)
    hidden_TH = step.forward(decoder.embed(ids_T), metadata)
    return torch.cat([decoder.logits(rows) for rows in torch.split(hidden_TH, step.max_rows)])


def _step(decoder: DecoderModel) -> CpuStep:
    step = build_cpu_step(decoder, build_kv_cache(decoder, 13))
    assert isinstance(step, CpuStep)
    return step


@pytest.mark.parametrize("name", DECODER_CONFIGS)
def test_logits_equal_transformers(
    name: str,
    load: Callable[[str, torch.dtype], DecoderModel],
    decoder_checkpoint: Callable[[str], Path],
) -> None:
    decoder = load(name, torch.float32)
    model = load_model(decoder_checkpoint(name), dtype=torch.float32)
    step = _step(decoder)
    passes = [[(0, 0, 10), (2, 0, 1)], [(1, 0, 3), (0, 10, 11), (2, 1, 17)], [(0, 11, 40)]]
    for chunks in passes:
        logits_TV = _pass(decoder, step, chunks)
        for prompt, start, end in chunks:
            expected_TV = model(_ids(*PROMPTS[prompt])[None, :end]).logits[0, start:]
            actual_TV, logits_TV = logits_TV[: end - start], logits_TV[end - start :]
            torch.testing.assert_close(actual_TV, expected_TV, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral"])
def test_bfloat16_is_as_close_to_float32_as_transformers_is(
    name: str,
    load: Callable[[str, torch.dtype], DecoderModel],
    decoder_checkpoint: Callable[[str], Path],
) -> None:
    decoder = load(name, torch.bfloat16)
    folder = decoder_checkpoint(name)
    ids_T = _ids(*PROMPTS[0])
    exact = load_model(folder, dtype=torch.float32)(ids_T[None]).logits[0]
    theirs = load_model(folder, dtype=torch.bfloat16)(ids_T[None]).logits[0].float()
    actual = _pass(decoder, _step(decoder), [(0, 0, 40)])
    assert (actual - exact).norm() <= 2 * (theirs - exact).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_alone_is_the_row_in_a_batch(
    dtype: torch.dtype, load: Callable[[str, torch.dtype], DecoderModel]
) -> None:
    """Bit for bit: alone token by token, and with others in chunks."""
    decoder = load("llama", dtype)
    together = _step(decoder)
    first = _pass(decoder, together, [(2, 0, 5), (0, 0, 23), (1, 0, 1)])[5:28]
    second = _pass(decoder, together, [(1, 1, 3), (0, 23, 40)])[2:]
    alone = _step(decoder)
    one_by_one = [_pass(decoder, alone, [(0, i, i + 1)]) for i in range(40)]
    assert torch.equal(torch.cat([first, second]), torch.cat(one_by_one))


def test_what_it_does_not_run_is_named(
    library: NativeLibrary,
    decoder_checkpoint: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without the library a model has torch's products, and is as right with them."""
    monkeypatch.setattr(cpu_step, "native_library", lambda: "no C++ compiler")
    monkeypatch.setattr(linear, "native_library", lambda: "no C++ compiler")
    decoder = load_decoder(decoder_checkpoint("llama"), dtype=torch.float32)
    assert {linear.kernel for linear in decoder.linears()} == {"torch float32"}
    cache = build_kv_cache(decoder, 4)
    assert build_cpu_step(decoder, cache) == "no C++ compiler"
    monkeypatch.setattr(cpu_step, "native_library", lambda: library)
    assert build_cpu_step(decoder, cache) == "a layer runs on torch float32"
    ids_T = _ids(*PROMPTS[0])
    metadata = build_metadata([RequestRows(start=0, num_tokens=40, block_table=[1, 2, 3])], CPU)
    actual = decoder.logits(decoder.forward(decoder.embed(ids_T), metadata, cache))
    expected = load_model(decoder_checkpoint("llama"), dtype=torch.float32)(ids_T[None]).logits[0]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.real_model
def test_the_real_model(real_model_dir: Path) -> None:
    """SmolLM2 in passes of few rows: float32 equals transformers', bfloat16 is as close as transformers' own."""
    ids_T = torch.tensor([504, 3575, 282, 4649, 314, 7042, 30, 657, 314, 253, 2838, 351] * 3)
    model = load_model(real_model_dir, dtype=torch.float32)
    with torch.inference_mode():
        exact_TV = model(ids_T[None]).logits[0]
        in_bf16 = load_model(real_model_dir, dtype=torch.bfloat16)(ids_T[None]).logits[0].float()
    errors = []
    for dtype in (torch.float32, torch.bfloat16):
        decoder = load_decoder(real_model_dir, dtype=dtype)
        step = build_cpu_step(decoder, build_kv_cache(decoder, 4))
        if isinstance(step, str):
            pytest.skip(step)
        logits = []
        for start, end in ((0, 17), (17, 18), (18, 36)):
            rows = RequestRows(start=start, num_tokens=end - start, block_table=[3, 1, 2])
            hidden_TH = step.forward(decoder.embed(ids_T[start:end]), build_metadata([rows], CPU))
            logits.append(decoder.logits(hidden_TH))
        errors.append(float((torch.cat(logits) - exact_TV).norm() / exact_TV.norm()))
    assert errors[0] < 1e-5
    assert errors[1] < 2 * float((in_bf16 - exact_TV).norm() / exact_TV.norm())
