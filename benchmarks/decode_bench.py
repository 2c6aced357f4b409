"""What each kind of compression buys the native engine: prefill, decode, bandwidth and memory, beside transformers.

    python -m benchmarks.decode_bench [--model smollm2-135m] [--rounds 5] [--concurrency 1 8 16]

Every variant of the model is made once, under LATHE_HOME/decode-bench, as a user would make it. All are loaded in one
process and take turns, so that a busy machine slows all of them: read the ratios. Bandwidth is that of a decode step's
weights, against what a sum over 256 MiB reads in the same run; keys and values come on top. Peak memory is measured in
a process for each variant. Recorded as Markdown.
"""

import argparse
import dataclasses
import datetime
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from engines.process import set_torch_environment

set_torch_environment()  # before torch

import torch  # noqa: E402
import transformers  # noqa: E402

from benchmarks.decode_kernels import read_bandwidth  # noqa: E402
from benchmarks.ffn_skip import calibrated  # noqa: E402
from benchmarks.model import HOME, calibration_tokens, packaged_model  # noqa: E402
from compression.pipeline import compress  # noqa: E402
from compression.recipe import Calibration, parse_recipe  # noqa: E402
from engines.engine import NativeEngine  # noqa: E402
from engines.kernels.linear import Linear  # noqa: E402
from engines.kernels.metadata import BLOCK_SIZE  # noqa: E402
from engines.model import DecoderModel, bytes_per_block, load_decoder  # noqa: E402
from engines.protocol import Engine, GenerateRequest, SamplingParams, Skip  # noqa: E402
from engines.transformers_engine import TransformersEngine  # noqa: E402
from evaluation.corpora import STATE_OF_THE_UNION, load_corpus  # noqa: E402
from evaluation.perplexity import tokenize  # noqa: E402

RESULTS = Path(__file__).parent / "results"
PROMPT_TOKENS = 128
NEW_TOKENS = 64
MEMORY_REQUESTS = 16
SKIP_RATIO = 0.25
INT4 = {"int4": {"group_size": 64}}
WELORE = {"welore": {"err": 0.3, "calibration": "activation"}}
HALF_WIDTH = 768  # of SmolLM2-135M
RECIPES: dict[str, list[Any]] = {
    "INT4": [INT4],
    "low rank, 30 % ERR": [WELORE],
    "low rank, 30 % ERR, INT4 factors": [WELORE, INT4],
    "feed-forwards half as wide": [{"structured": {"ffn_width": HALF_WIDTH}}],
}
DENSE, TRANSFORMERS = "dense bf16", "dense bf16, transformers engine"
SKIPPING = f"{SKIP_RATIO:.0%} of feed-forwards skipped"


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """Attributes: bytes_per_step: of the weights that a decode step reads, those of all feed-forwards included."""

    engine: Engine
    text: tuple[int, ...]
    bytes_per_step: int
    feed_forward_bytes: int
    skip: Skip = dataclasses.field(default_factory=Skip)


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Tokens per second of all requests together, and the share of feed-forward rows skipped."""

    prefill: float
    decode: float
    skipped: float


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--home", type=Path, default=HOME)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--peak-memory-of", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak_memory_of:
        print(json.dumps(peak_memory(arguments.peak_memory_of)))
        return
    folders = make_variants(arguments.home, arguments.model)
    memory = {name: _in_own_process(folder) for name, folder in folders.items()}
    variants = {name: _variant(folder) for name, folder in folders.items()}
    engine = TransformersEngine.load("model", folders[DENSE])
    variants[TRANSFORMERS] = dataclasses.replace(variants[DENSE], engine=engine)
    skip = Skip(mode="target", target_ratio=SKIP_RATIO)
    variants[SKIPPING] = dataclasses.replace(variants[SKIPPING], skip=skip)
    load_average = os.getloadavg()[0]
    bandwidth = read_bandwidth(torch.get_num_threads())
    lines = [
        f"# {arguments.model}: what the native engine makes of each kind of compression",
        "",
        f"{datetime.date.today()}, commit {_commit()}, {_processor()}, {torch.get_num_threads()} threads, torch"
        f" {torch.__version__}, transformers {transformers.__version__}. Load average before the run:"
        f" {load_average:.1f}. Memory read: {bandwidth:.1f} GB/s.",
        "",
        f"Prompts of {PROMPT_TOKENS} tokens, {NEW_TOKENS} greedy tokens each; medians of {arguments.rounds} interleaved"
        " rounds, in tokens/s over all requests; in brackets the ratio to dense bf16 of the same round.",
        "",
        "| requests | variant | prefill | decode | weights read, GB/s | share of bandwidth |",
        "|---|---|---|---|---|---|",
    ]
    for concurrency in arguments.concurrency:
        runs = _interleaved(variants, concurrency, arguments.rounds)
        lines += [
            _row(concurrency, name, variants[name], runs[name], runs[DENSE], bandwidth)
            for name in variants
        ]
    lines += [
        "",
        f"Peak memory of a process that serves {MEMORY_REQUESTS} requests of {PROMPT_TOKENS} + {NEW_TOKENS} tokens,"
        " in MiB:",
        "",
        "| variant | weights as held | keys and values | peak | beyond both |",
        "|---|---|---|---|---|",
        *(
            f"| {name} | {m['weights']:.0f} | {m['kv']:.0f} | {m['peak']:.0f}"
            f" | {m['peak'] - m['weights'] - m['kv']:.0f} |"
            for name, m in memory.items()
        ),
        "",
        "Kernels:",
        "",
        *(f"- {name}: {variant.engine.info.kernels}" for name, variant in variants.items()),
    ]
    path = RESULTS / f"decode_{arguments.model}_{platform.machine()}_{datetime.date.today()}.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    print(path.read_text())


def make_variants(home: Path, model: str) -> dict[str, Path]:
    """Checkpoints of every kind, by name; those that are there are not made again."""
    source = packaged_model(model, home)
    root = home / "decode-bench" / model
    folders = {DENSE: source}
    for index, (name, stages) in enumerate(RECIPES.items()):
        folders[name] = root / f"{index}"
        _make(folders[name], partial(_compress, source, model, stages))
    folders[SKIPPING] = root / "skip"
    _make(folders[SKIPPING], lambda folder: calibrated(source, folder, (SKIP_RATIO,), 16, 256))
    return folders


def _compress(source: Path, model: str, stages: list[Any], destination: Path) -> None:
    recipe = parse_recipe(stages)
    tokens = None
    if recipe.calibrated:
        settings = Calibration(samples=32, length=512)
        tokens = calibration_tokens(source, settings)
    compress(source, destination, recipe, source_id=model, calibration=tokens)


def _make(folder: Path, write: Callable[[Path], object]) -> None:
    if (folder / "lathe.json").is_file():
        return
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    folder.parent.mkdir(parents=True, exist_ok=True)
    write(folder)


def _engine(folder: Path) -> tuple[NativeEngine, DecoderModel]:
    model = load_decoder(folder)
    engine = NativeEngine(
        lambda: model, model_id="model", checkpoint_hash="", tokenizer=folder / "tokenizer.json"
    )
    return engine, model


def _variant(folder: Path) -> Variant:
    engine, model = _engine(folder)
    feed_forwards = (linear for layer in model.layers for linear in (layer.gate_up, layer.down))
    return Variant(
        engine=engine,
        text=_text(folder),
        bytes_per_step=_num_bytes(model.linears()),
        feed_forward_bytes=_num_bytes(feed_forwards),
    )


def _text(folder: Path) -> tuple[int, ...]:
    return tuple(tokenize(folder, load_corpus(STATE_OF_THE_UNION))[0])


def _num_bytes(linears: Iterable[Linear]) -> int:
    return sum(tensor.nbytes for linear in linears for tensor in linear.tensors())


def _interleaved(
    variants: Mapping[str, Variant], concurrency: int, rounds: int
) -> dict[str, list[Speed]]:
    runs: dict[str, list[Speed]] = {name: [] for name in variants}
    for round_number in range(rounds + 1):
        for name, variant in variants.items():
            speed = measure(
                variant.engine, variant.text, variant.skip, concurrency, seed=round_number
            )
            if round_number:  # the first one warms up
                runs[name].append(speed)
    return runs


def measure(
    engine: Engine, text: tuple[int, ...], skip: Skip, concurrency: int, seed: int
) -> Speed:
    """One batch of requests, passages of `text`, from submission to the last token."""
    generator = random.Random(1000 * concurrency + seed)
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
    for number in range(concurrency):
        start = generator.randrange(len(text) - PROMPT_TOKENS)
        prompt = text[start : start + PROMPT_TOKENS]
        request_id = str(number)
        engine.submit(
            GenerateRequest(request_id=request_id, token_ids=prompt, params=params, skip=skip)
        )
    before = engine.stats()
    began = time.perf_counter()
    started: set[str] = set()
    num_tokens, num_before = 0, 0
    prefilled = began
    while engine.has_work():
        for output in engine.step():
            num_tokens += len(output.token_ids)
            started.add(output.request_id)
        if len(started) == concurrency and not num_before:
            prefilled, num_before = time.perf_counter(), num_tokens
    end = time.perf_counter()
    after = engine.stats()
    num_rows = after.ffn_rows_total - before.ffn_rows_total
    num_skipped = after.ffn_rows_skipped_total - before.ffn_rows_skipped_total
    return Speed(
        prefill=concurrency * PROMPT_TOKENS / (prefilled - began),
        decode=(num_tokens - num_before) / (end - prefilled),
        skipped=num_skipped / num_rows if num_rows else 0.0,
    )


def _row(
    concurrency: int,
    name: str,
    variant: Variant,
    runs: list[Speed],
    dense: list[Speed],
    bandwidth: float,
) -> str:
    def cell(attribute: str) -> str:
        values = [getattr(run, attribute) for run in runs]
        ratios = [
            value / getattr(other, attribute) for value, other in zip(values, dense, strict=True)
        ]
        return f"{statistics.median(values):.0f} ({statistics.median(ratios):.2f}x)"

    decode = statistics.median(run.decode for run in runs)
    skipped = statistics.median(run.skipped for run in runs)
    num_bytes = variant.bytes_per_step - skipped * variant.feed_forward_bytes
    read = num_bytes * decode / concurrency / 1e9
    label = f"{name} (rows: {skipped:.1%})" if skipped else name
    return (
        f"| {concurrency} | {label} | {cell('prefill')} | {cell('decode')} | {read:.1f}"
        f" | {read / bandwidth:.0%} |"
    )


def peak_memory(folder: Path) -> dict[str, float]:
    """MiB of this process: weights as held, the blocks that were written, and the highest resident size."""
    engine, model = _engine(folder)
    measure(engine, _text(folder), Skip(), MEMORY_REQUESTS, seed=0)
    status = Path("/proc/self/status").read_text()
    peak_kib = int(status.partition("VmHWM:")[2].split()[0])
    num_blocks = MEMORY_REQUESTS * -(-(PROMPT_TOKENS + NEW_TOKENS) // BLOCK_SIZE)
    return {
        "weights": engine.info.resident_bytes / 2**20,
        "kv": num_blocks * bytes_per_block(model) / 2**20,
        "peak": peak_kib / 2**10,
    }


def _in_own_process(folder: Path) -> dict[str, float]:
    command = (sys.executable, "-m", "benchmarks.decode_bench", "--peak-memory-of", str(folder))
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result: dict[str, float] = json.loads(output.splitlines()[-1])
    return result


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _processor() -> str:
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return f"{names[0]} ({len(names)} CPUs)" if names else platform.machine()


if __name__ == "__main__":
    main()
