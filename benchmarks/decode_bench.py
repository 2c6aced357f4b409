"""The native engine beside the transformers engine: decode and prefill, interleaved in one run; recorded as Markdown.

    python -m benchmarks.decode_bench [CHECKPOINT] [--rounds 5] [--concurrency 1 8]

Both engines hold the same checkpoint in one process and take turns, so that a busy machine slows both: read the ratios.
"""

import argparse
import datetime
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from engines.process import set_openmp_environment

set_openmp_environment()  # before torch

import torch  # noqa: E402
import transformers  # noqa: E402

from compression.import_model import import_packaged  # noqa: E402
from compression.registry import ModelNotFoundError, ModelRegistry  # noqa: E402
from engines.engine import NativeEngine  # noqa: E402
from engines.protocol import Engine, GenerateRequest, SamplingParams  # noqa: E402
from engines.transformers_engine import TransformersEngine  # noqa: E402

RESULTS = Path(__file__).parent / "results"
PROMPT_TOKENS = 128
NEW_TOKENS = 64
ENGINES: dict[str, Callable[[Path], Engine]] = {
    "native": lambda folder: NativeEngine.load("model", folder),
    "transformers": lambda folder: TransformersEngine.load("model", folder),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, nargs="?", help="default: smollm2-135m")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8])
    arguments = parser.parse_args()
    folder = arguments.checkpoint or _default_model()
    engines = {name: load(folder) for name, load in ENGINES.items()}
    lines = [
        f"# {folder.name}: the native engine beside the transformers engine",
        "",
        f"{datetime.date.today()}, commit {_commit()}, {_processor()}, {torch.get_num_threads()} threads, torch"
        f" {torch.__version__}, transformers {transformers.__version__}, bfloat16. Load average before the run:"
        f" {os.getloadavg()[0]:.1f}.",
        "",
        f"Prompts of {PROMPT_TOKENS} tokens, {NEW_TOKENS} greedy tokens each; medians of {arguments.rounds} interleaved"
        " rounds, in tokens/s over all requests; in brackets the lowest and highest.",
        "",
        "| requests | phase | native | transformers | ratio of medians |",
        "|---|---|---|---|---|",
    ]
    for concurrency in arguments.concurrency:
        figures: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
        for round_number in range(arguments.rounds + 1):
            for name, engine in engines.items():
                speeds = _measure(engine, concurrency, seed=round_number)
                if round_number:  # the first one warms up
                    figures[name].append(speeds)
        for place, phase in enumerate(("prefill", "decode")):
            columns = {name: [pair[place] for pair in pairs] for name, pairs in figures.items()}
            medians = {name: statistics.median(column) for name, column in columns.items()}
            cells = [
                f"{medians[name]:.0f} ({min(column):.0f}-{max(column):.0f})"
                for name, column in columns.items()
            ]
            ratio = medians["native"] / medians["transformers"]
            lines.append(f"| {concurrency} | {phase} | {cells[0]} | {cells[1]} | {ratio:.2f}x |")
    lines += ["", "Kernels of the native engine:", ""]
    lines += [f"- {op}: {kernel}" for op, kernel in engines["native"].info.kernels.items()]
    path = RESULTS / f"decode_{folder.name}_{platform.machine()}_{datetime.date.today()}.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    print(path.read_text())


def _default_model() -> Path:
    registry = ModelRegistry(Path.home() / ".cache" / "lathe" / "models")
    try:
        return registry.get("smollm2-135m").path
    except ModelNotFoundError:
        import_packaged(registry, "smollm2-135m")
        return registry.get("smollm2-135m").path


def _measure(engine: Engine, concurrency: int, seed: int) -> tuple[float, float]:
    """Tokens per second of (prefill, decode). No two prompts of a run share a block."""
    generator = torch.Generator().manual_seed(1000 * concurrency + seed)
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
    for number in range(concurrency):
        ids = torch.randint(engine.info.vocab_size, (PROMPT_TOKENS,), generator=generator)
        engine.submit(
            GenerateRequest(request_id=str(number), token_ids=tuple(ids.tolist()), params=params)
        )
    start = time.perf_counter()
    started: set[str] = set()
    num_tokens, num_before = 0, 0
    prefilled = start
    while engine.has_work():
        for output in engine.step():
            num_tokens += len(output.token_ids)
            started.add(output.request_id)
        if len(started) == concurrency and not num_before:
            prefilled, num_before = time.perf_counter(), num_tokens
    end = time.perf_counter()
    prefill = concurrency * PROMPT_TOKENS / (prefilled - start)
    return prefill, (num_tokens - num_before) / (end - prefilled)


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
