"""Decode steps from static buffers: run as they are on a CPU, recorded on a GPU; against the plain way.

Shapes: T rows, H hidden.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

from engines.engine import NativeEngine
from engines.kernels.cuda_graphs import (
    WARM_UP_TOKENS,
    DecodeGraphs,
    StaticBatch,
    build_decode_graphs,
    row_counts,
)
from engines.kernels.metadata import BLOCK_SIZE, RequestRows, build_metadata
from engines.kernels.ops import TORCH_OPS, Ops, choose_ops
from engines.kernels.paged_attention import LayerCache
from engines.kernels.triton.int4_matmul import MAX_ROWS, MIN_DOT
from engines.kernels.triton.launch import tile
from engines.kernels.triton.ops import TRITON_OPS
from engines.model import DecoderModel, build_kv_cache, load_decoder
from engines.protocol import SamplingParams
from engines.requests import EngineLimits
from tests.conftest import HAS_GPU
from tests.engines.decoding import PROMPTS, build_request, run, token_ids_of

pytestmark = pytest.mark.usefixtures("single_thread")

DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
OPS = {"torch": TORCH_OPS, "triton": TRITON_OPS}
Checkpoints = Callable[[str], Path]


def _as_it_is(run_pass: Callable[[], Tensor]) -> Callable[[], Tensor]:
    return run_pass


def _model(folder: Path, ops: Ops = TORCH_OPS) -> DecoderModel:
    model = load_decoder(folder, dtype=torch.float32, device=DEVICE)
    model.ops = ops
    return model


def _pass(
    model: DecoderModel,
    cache: Sequence[LayerCache],
    token_ids: list[int],
    requests: list[RequestRows],
) -> Tensor:
    hidden_TH = model.embed(torch.tensor(token_ids, device=DEVICE))
    return model.forward(hidden_TH, build_metadata(requests, DEVICE), cache)


TABLES = [[3, 1], [2], [6, 4, 5]]
PROMPT_LENGTHS = [BLOCK_SIZE + 1, 1, 2 * BLOCK_SIZE + 7]


def _prompts() -> tuple[list[int], list[RequestRows]]:
    requests = [
        RequestRows(start=0, num_tokens=length, block_table=table)
        for length, table in zip(PROMPT_LENGTHS, TABLES, strict=True)
    ]
    return [7 * i % 90 for i in range(sum(PROMPT_LENGTHS))], requests


def _decode(step: int) -> tuple[list[int], list[RequestRows]]:
    """The requests' next tokens; the second one's stands at an odd offset in its only block."""
    requests = [
        RequestRows(start=length + step, num_tokens=1, block_table=table)
        for length, table in zip(PROMPT_LENGTHS, TABLES, strict=True)
    ]
    return [11 + step, 5, 60 - step], requests


@pytest.mark.parametrize("name", ["llama of one head group", "mistral", "qwen3"])
@torch.inference_mode()
def test_triton_passes_equal_plain_ones(name: str, decoder_checkpoint: Checkpoints) -> None:
    """Prompts, then decode steps, then a mixed pass; in float32."""
    folder = decoder_checkpoint(name)
    outputs: dict[str, list[Tensor]] = {}
    for kind, ops in OPS.items():
        model = _model(folder, ops)
        cache = build_kv_cache(model, 8)
        passes = [_prompts(), _decode(0), _decode(1)]
        ids, requests = _decode(2)
        longer = RequestRows(start=PROMPT_LENGTHS[1] + 2, num_tokens=4, block_table=TABLES[1])
        passes.append(([ids[0], 1, 2, 3, 4, ids[2]], [requests[0], longer, requests[2]]))
        outputs[kind] = [_pass(model, cache, *each) for each in passes]
    for actual, expected in zip(outputs["triton"], outputs["torch"], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_warming_up_needs_every_product_that_a_prompt_can() -> None:
    counts = range(1, 200)
    needed = {min(tile(n, MIN_DOT), 64) if n <= MAX_ROWS else None for n in counts}
    warm = {min(tile(n, MIN_DOT), 64) if n <= MAX_ROWS else None for n in (1, *WARM_UP_TOKENS)}
    assert warm == needed  # the recorded steps begin with one row


def test_row_counts() -> None:
    assert row_counts(1) == (1,)
    assert row_counts(3) == (1, 2, 3)
    assert row_counts(4) == (1, 2, 4)
    assert row_counts(8) == (1, 2, 4, 8)
    assert row_counts(30) == (1, 2, 4, 8, 16, 24, 30)


def test_buffers_hold_what_the_plain_metadata_says_and_padding() -> None:
    token_ids, requests = _decode(0)
    batch = StaticBatch(5, 4, DEVICE)
    batch.fill([1] * 5, [RequestRows(start=63, num_tokens=1, block_table=[9] * 4)] * 5)
    batch.fill(token_ids, requests)
    assert batch.token_ids().tolist() == [*token_ids, 0, 0]
    actual, plain = batch.metadata(), build_metadata(requests, DEVICE)
    assert actual.max_query_len == plain.max_query_len == 1
    assert actual.positions_T.tolist() == [*plain.positions_T.tolist(), 0, 0]
    assert actual.slot_mapping_T.tolist() == [*plain.slot_mapping_T.tolist(), 0, 0]
    assert actual.context_lens_S.tolist() == [*plain.context_lens_S.tolist(), 1, 1]
    assert actual.query_start_S1.tolist() == [0, 1, 2, 3, 4, 5]
    padded = [[*table, 0] for table in plain.block_tables_SB.tolist()]
    assert actual.block_tables_SB.tolist() == [*padded, [0] * 4, [0] * 4]
    for name in ("positions_T", "slot_mapping_T", "block_tables_SB", "context_lens_S"):
        assert getattr(actual, name).dtype == getattr(plain, name).dtype
    address = actual.block_tables_SB.data_ptr()
    assert address % 16 == 0
    batch.fill(token_ids, requests)
    assert batch.metadata().block_tables_SB.data_ptr() == address


@pytest.mark.parametrize("kind", OPS)
@torch.inference_mode()
def test_a_padded_step_equals_the_plain_one(kind: str, decoder_checkpoint: Checkpoints) -> None:
    """Three requests in a pass of four rows; nothing but their slots and block 0 is written."""
    model = _model(decoder_checkpoint("mistral"), OPS[kind])
    plain, static = build_kv_cache(model, 8), build_kv_cache(model, 8)
    graphs = DecodeGraphs(model, static, max_num_seqs=4, max_blocks=5, record=_as_it_is)
    for cache in (plain, static):
        _pass(model, cache, *_prompts())
    for step in range(3):
        token_ids, requests = _decode(step)
        assert graphs.takes(token_ids, requests)
        actual = graphs.forward(token_ids, requests)
        expected = _pass(model, plain, token_ids, requests)
        assert actual.shape == expected.shape
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    for layer, other in zip(static, plain, strict=True):
        for actual, expected in zip(layer, other, strict=True):
            torch.testing.assert_close(actual[1:], expected[1:], rtol=1e-5, atol=1e-5)


def test_other_passes_are_not_taken(decoder_checkpoint: Checkpoints) -> None:
    model = _model(decoder_checkpoint("llama"))
    cache = build_kv_cache(model, 8)
    graphs = DecodeGraphs(model, cache, max_num_seqs=2, max_blocks=5, record=_as_it_is)
    token_ids, requests = _decode(0)
    assert not graphs.takes(token_ids, requests)  # three, for two seats
    assert graphs.takes(token_ids[:2], requests[:2])
    assert not graphs.takes([token_ids[0], -1], requests[:2])  # an embedding row
    assert not graphs.takes(*_prompts())


def test_an_engine_decodes_the_same_from_static_buffers(decoder_checkpoint: Checkpoints) -> None:
    folder = decoder_checkpoint("llama")
    limits = EngineLimits(max_num_seqs=5, max_num_batched_tokens=32)
    params = SamplingParams(max_tokens=5, temperature=0)

    def engine(ops: Ops) -> NativeEngine:
        return NativeEngine(lambda: _model(folder, ops), model_id="llama", limits=limits)

    requests = [build_request(str(i), ids, params) for i, ids in enumerate(PROMPTS[:7])]
    plain = {key: token_ids_of(out) for key, out in run(engine(TORCH_OPS), requests).items()}
    static = engine(TRITON_OPS)
    model = static._model
    assert model is not None
    calls: list[int] = []

    def count(run_pass: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def counted() -> Tensor:
            calls.append(1)
            return run_pass()

        return counted

    static._cpu_step = "left out"
    static._decode_graphs = DecodeGraphs(
        model, static._kv_cache, max_num_seqs=5, max_blocks=16, record=count
    )
    assert {key: token_ids_of(out) for key, out in run(static, requests).items()} == plain
    assert len(calls) >= 4


@pytest.mark.skipif(HAS_GPU, reason="says what is said without a GPU")
def test_a_cpu_has_no_graphs_and_says_so(decoder_checkpoint: Checkpoints) -> None:
    engine = NativeEngine.load("llama", decoder_checkpoint("llama"), dtype=torch.float32)
    assert engine.info.kernels["decode step"] == "op by op: the model is on cpu"
    ops = choose_ops(torch.device("cpu"), torch.float32, head_dim=8)
    assert ops.attention is TORCH_OPS.attention
    assert engine.info.kernels["attention"] == ops.kernels["attention"]


@pytest.mark.cuda
@torch.inference_mode()
def test_recorded_steps_equal_plain_ones(decoder_checkpoint: Checkpoints) -> None:
    for name in ("llama", "mistral", "qwen3"):
        model = _model(decoder_checkpoint(name), TRITON_OPS)
        plain, recorded = build_kv_cache(model, 8), build_kv_cache(model, 8)
        graphs = build_decode_graphs(model, recorded, max_num_seqs=9, max_blocks=7)
        assert isinstance(graphs, DecodeGraphs)
        for cache in (plain, recorded):
            _pass(model, cache, *_prompts())
        for step in range(3):
            token_ids, requests = _decode(step)
            for count in (1, 2, 3):
                actual = graphs.forward(token_ids[:count], requests[:count]).clone()
                expected = _pass(model, plain, token_ids[:count], requests[:count])
                torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.cuda
def test_an_engine_on_a_gpu_uses_them_and_decodes_as_the_cpu_does(
    decoder_checkpoint: Checkpoints,
) -> None:
    folder = decoder_checkpoint("llama")
    requests = [build_request(str(i), prompt) for i, prompt in enumerate(PROMPTS)]
    tokens = {}
    devices: tuple[Literal["cpu"], Literal["cuda"]] = ("cpu", "cuda")
    for device in devices:
        engine = NativeEngine.load("llama", folder, dtype=torch.float32, device=device)
        tokens[device] = {key: token_ids_of(out) for key, out in run(engine, requests).items()}
    assert tokens["cuda"] == tokens["cpu"]
    assert engine.info.kernels["decode step"].startswith("CUDA graphs")
    assert engine.info.kernels["attention"].startswith("triton")
    engine.sleep()
    engine.wake()
    assert token_ids_of(run(engine, requests)["0"]) == tokens["cpu"]["0"]
