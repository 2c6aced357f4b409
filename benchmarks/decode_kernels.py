"""Speed of the native CPU library: single products beside torch's, and whole passes beside the decoder's plain path.

    OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=2000 python benchmarks/decode_kernels.py [--repeats N] [--one-thread]

(the environment of an engine host). Everything that is compared runs in turns in one process; weights of a product come
from memory, not from a cache, because as many of them take turns as hold `ROTATED_BYTES`. Writes
benchmarks/results/decode_kernels_<machine>_<date>.md. On a machine that others use, `--one-thread` times the CPU
seconds of one thread, which waiting for a core does not lengthen;
what others do to the memory's bandwidth stays in them.

Shapes: T rows, O output channels, I input channels, R rank.
"""

import argparse
import datetime
import functools
import itertools
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from compression.import_model import import_packaged
from compression.linear import CpuInt4Linear
from compression.pipeline import compress
from compression.quantization.int4 import QuantizedWeight, round_to_nearest
from compression.recipe import parse_recipe
from compression.registry import ModelRegistry
from engines.kernels.cpu_linear import build_cpu_linear
from engines.kernels.cpu_step import CpuStep, build_cpu_step
from engines.kernels.huge_pages import in_huge_pages
from engines.kernels.linear import DenseLinear, Linear
from engines.kernels.metadata import BLOCK_SIZE, RequestRows, build_metadata
from engines.kernels.native import NATIVE, NativeLibrary, native_library, open_library
from engines.kernels.weights import LinearWeight, LowRankWeight
from engines.model import DecoderModel, build_kv_cache, load_decoder

RESULTS = Path(__file__).parent / "results"
ROTATED_BYTES = 100 * 2**20
ROWS = (1, 4, 8, 16, 32, 64, 128)
SIZES = ((3072, 576), (576, 1536), (5632, 2048))
GROUP_SIZE = 64
CONTEXT = 160


clock: Callable[[], float] = time.perf_counter


def measure(candidates: dict[str, Callable[[int], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, the candidates in turns; the argument counts the calls."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(repeats + 2):
        for name, call in candidates.items():
            start = clock()
            call(turn)
            elapsed = clock() - start
            if turn >= 2:
                seconds[name].append(elapsed)
    return seconds


def read_bandwidth(num_threads: int) -> float:
    """GB/s of summing 256 MiB of integers; the best of ten, being a limit."""
    memory = in_huge_pages(torch.ones(2**25, dtype=torch.int64))
    torch.set_num_threads(num_threads)
    seconds = measure({"sum": lambda turn: memory.sum()}, 10)["sum"]
    return memory.nbytes / min(seconds) / 1e9


@functools.cache
def vector_library() -> NativeLibrary:
    """Without AMX."""
    folder = Path(tempfile.gettempdir()) / "lathe-benchmark"
    flags = (NATIVE, "-mno-amx-bf16")
    return open_library(folder, flags=flags, num_threads=torch.get_num_threads())


def products(size: tuple[int, int], library: NativeLibrary) -> dict[str, list[Linear]]:
    """Copies enough of each kind that none stays in a cache."""
    num_outputs, num_inputs = size
    count = max(2, ROTATED_BYTES // (num_outputs * num_inputs * 2))
    rank = min(size) // 4 // GROUP_SIZE * GROUP_SIZE
    kinds: dict[str, list[Linear]] = {}

    def add(kind: str, linear: Linear) -> None:
        kinds.setdefault(kind, []).append(linear)

    def quantized(weight_OI: Tensor) -> LinearWeight:
        return LinearWeight(weight=_int4(weight_OI))

    for _ in range(count):
        weight_OI = torch.randn(size).bfloat16()
        u_OR, v_RI = (
            torch.randn(num_outputs, rank).bfloat16(),
            torch.randn(rank, num_inputs).bfloat16(),
        )
        add("torch bf16", DenseLinear(in_huge_pages(weight_OI), None))
        add("native bf16", _native([LinearWeight(weight=weight_OI)], library))
        if library.has_amx:
            add("bf16, no AMX", _native([LinearWeight(weight=weight_OI)], vector_library()))
        add("native int4", _native([quantized(weight_OI)], library))
        if library.has_amx:
            add("int4, no AMX", _native([quantized(weight_OI)], vector_library()))
        low_rank = LowRankWeight(weight_u=u_OR, weight_v=v_RI)
        add(f"native rank {rank}", _native([LinearWeight(weight=low_rank)], library))
        low_rank = LowRankWeight(weight_u=_int4(u_OR), weight_v=_int4(v_RI))
        add(f"native rank {rank} int4", _native([LinearWeight(weight=low_rank)], library))
        add("torch int4 packed", _TorchInt4(weight_OI))
    return kinds


class _TorchInt4:
    """torch's own INT4 product, for the comparison."""

    kernel = CpuInt4Linear.kernel

    def __init__(self, weight_OI: Tensor) -> None:
        self._module = CpuInt4Linear(_int4(weight_OI), None)

    def __call__(self, x_TI: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        y_TO: Tensor = self._module.forward(x_TI)
        return y_TO

    def tensors(self) -> list[Tensor]:
        return list(self._module.buffers())


def _int4(weight_OI: Tensor) -> QuantizedWeight:
    return round_to_nearest(weight_OI, GROUP_SIZE, symmetric=True, scale_dtype=torch.bfloat16)


def _native(weights: Sequence[LinearWeight], library: NativeLibrary) -> Linear:
    return build_cpu_linear(weights, dtype=torch.bfloat16, library=library)


def product_table(size: tuple[int, int], library: NativeLibrary, repeats: int) -> list[str]:
    """Milliseconds by rows; native products by their own kernel at every row count."""
    kinds = products(size, library)
    lines = [f"| {size[1]} -> {size[0]}, rows | " + " | ".join(kinds) + " |"]
    lines.append("|---" * (len(kinds) + 1) + "|")
    for num_rows in ROWS:
        x_TI = torch.randn(num_rows, size[1]).bfloat16()

        def call(linears: list[Linear], turn: int, x_TI: Tensor = x_TI) -> Tensor:
            linear = linears[turn % len(linears)]
            few_rows = getattr(linear, "few_rows", None)
            result: Tensor = few_rows(x_TI, torch.bfloat16) if few_rows else linear(x_TI)
            return result

        candidates: dict[str, Callable[[int], object]] = {
            kind: functools.partial(call, linears) for kind, linears in kinds.items()
        }
        seconds = measure(candidates, repeats if num_rows <= 16 else max(5, repeats // 3))
        cells = []
        for kind, linears in kinds.items():
            median = statistics.median(seconds[kind])
            held = sum(tensor.nbytes for tensor in linears[0].tensors())
            cells.append(f"{median * 1e3:.3f} ({held / median / 1e9:.1f} GB/s)")
        lines.append(f"| {num_rows} | " + " | ".join(cells) + " |")
    return lines


def pass_rows(decoder: DecoderModel, num_requests: int, repeats: int) -> list[str]:
    """Decode of one token for each request at a context of `CONTEXT`, up to the greedy choice."""
    blocks = CONTEXT // BLOCK_SIZE + 1
    cache = build_kv_cache(decoder, 1 + num_requests * blocks)
    step = build_cpu_step(decoder, cache)
    assert isinstance(step, CpuStep), step
    rows = [
        RequestRows(
            start=CONTEXT,
            num_tokens=1,
            block_table=range(1 + request * blocks, 1 + (request + 1) * blocks),
        )
        for request in range(num_requests)
    ]
    metadata = build_metadata(rows, decoder.device)
    ids_T = torch.randint(1000, 30000, (num_requests,))

    def native(turn: int) -> Tensor:
        hidden_TH = step.forward(decoder.embed(ids_T), metadata)
        return decoder.logits(hidden_TH).argmax(dim=1)

    def plain(turn: int) -> Tensor:
        hidden_TH = decoder.forward(decoder.embed(ids_T), metadata, cache)
        return decoder.logits(hidden_TH).argmax(dim=1)

    hidden_TH = decoder.embed(ids_T)
    seconds = measure(
        {"native": native, "plain": plain, "head": lambda turn: decoder.logits(hidden_TH)}, repeats
    )
    held = sum({t.data_ptr(): t.nbytes for t in decoder.tensors()}.values())
    if "int8" in decoder.lm_head.kernel:  # beside an embedding of which one row is read
        held -= decoder.config.vocab_size * decoder.config.hidden_size * 2
    lines = []
    for name in ("native", "plain"):
        median, best = statistics.median(seconds[name]), min(seconds[name])
        lines.append(
            f"| {num_requests} | {name} | {median * 1e3:.2f} | {best * 1e3:.2f} | "
            f"{num_requests / median:.0f} | {num_requests / best:.0f} | {held / best / 1e9:.1f} |"
        )
    head_seconds = statistics.median(seconds["head"])
    lines.append(
        f"| {num_requests} | of which head | {head_seconds * 1e3:.2f} | "
        f"{min(seconds['head']) * 1e3:.2f} | | | |"
    )
    return lines


def prefill_rows(decoder: DecoderModel, num_tokens: int, repeats: int) -> list[str]:
    """One prompt in one pass, up to its first greedy choice."""
    cache = build_kv_cache(decoder, 2 + num_tokens // BLOCK_SIZE)
    step = build_cpu_step(decoder, cache)
    assert isinstance(step, CpuStep), step
    table = range(1, 1 + -(-num_tokens // BLOCK_SIZE))
    rows = RequestRows(start=0, num_tokens=num_tokens, block_table=table)
    metadata = build_metadata([rows], decoder.device)
    ids_T = torch.randint(1000, 30000, (num_tokens,))

    def native(turn: int) -> Tensor:
        return decoder.logits(step.forward(decoder.embed(ids_T), metadata)[-1:]).argmax(dim=1)

    def plain(turn: int) -> Tensor:
        hidden_TH = decoder.forward(decoder.embed(ids_T), metadata, cache)
        return decoder.logits(hidden_TH[-1:]).argmax(dim=1)

    seconds = measure({"native": native, "plain": plain}, repeats)
    return [
        f"| prompt of {num_tokens} | {name} | {statistics.median(taken) * 1e3:.2f} | {min(taken) * 1e3:.2f} | "
        f"{num_tokens / statistics.median(taken):.0f} | {num_tokens / min(taken):.0f} | |"
        for name, taken in seconds.items()
    ]


def pass_tables(repeats: int) -> list[str]:
    lines: list[str] = []
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        registry = ModelRegistry(Path(scratch) / "models")
        import_packaged(registry, "smollm2-135m")
        source = registry.get("smollm2-135m").path
        int4 = Path(scratch) / "int4"
        recipe = parse_recipe([{"int4": {"group_size": GROUP_SIZE, "symmetric": True}}])
        compress(source, int4, recipe, source_id="smollm2-135m")
        for name, folder in (("bf16", source), ("INT4, groups of 64", int4)):
            decoder = load_decoder(folder, dtype=torch.bfloat16)
            lines += [
                f"\n### SmolLM2-135M, {name}; head: {decoder.lm_head.kernel}\n",
                "| rows | pass | median ms | best ms | tokens/s | best tokens/s | best GB/s |",
                "|---" * 7 + "|",
            ]
            for num_requests in (1, 8, 16):
                lines += pass_rows(decoder, num_requests, repeats)
            for num_tokens in (128, 512):
                lines += prefill_rows(decoder, num_tokens, max(3, repeats // 3))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--one-thread", action="store_true")
    arguments = parser.parse_args()
    repeats: int = arguments.repeats
    if arguments.one_thread:
        torch.set_num_threads(1)
        global clock
        clock = time.thread_time
    num_threads = torch.get_num_threads()
    library = native_library()
    if isinstance(library, str):
        sys.exit(f"no native library: {library}")
    load_before = os.getloadavg()[0]
    bandwidths = {threads: read_bandwidth(threads) for threads in {1, num_threads}}
    limits = ", ".join(f"{gbs:.1f} GB/s with {n} of the threads" for n, gbs in bandwidths.items())
    torch.set_num_threads(num_threads)
    tables = [product_table(size, library, repeats) for size in SIZES]
    seconds = "CPU" if arguments.one_thread else "wall-clock"
    lines = [
        "# Native CPU kernels\n",
        f"{datetime.date.today()}, {_cpu_name()}, {num_threads} threads, torch {torch.__version__}, "
        f"{library.description}, {seconds} seconds. Load average {load_before:.1f} before and {os.getloadavg()[0]:.1f} "
        "after the products: with other processes on the machine compare within a row only.\n",
        f"Memory read: {limits}.\n",
        "## Single products: median milliseconds (weights' bytes per second)\n",
        *itertools.chain.from_iterable([*table, ""] for table in tables),
        f"## Passes at a context of {CONTEXT} tokens, with head and greedy choice",
        *pass_tables(repeats),
    ]
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"decode_kernels_{platform.machine()}_{datetime.date.today()}.md"
    path.write_text("\n".join(lines) + "\n")
    print(path.read_text())


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
