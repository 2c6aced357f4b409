"""Compression methods side by side on SmolLM2-135M: perplexity against bytes, in one run; recorded as Markdown.

    python -m benchmarks.compression [--windows 16] [--samples 32] [--length 512] [--only welore ...]

The table is written anew after every row, so a run that is stopped leaves what it measured.
"""

import argparse
import datetime
import json
import platform
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from compression.calibration import sample_tokens
from compression.hf import load_model, resident_bytes
from compression.import_model import import_packaged
from compression.pipeline import compress
from compression.recipe import Calibration, parse_recipe
from compression.registry import ModelNotFoundError, ModelRegistry
from compression.stages import StageError
from evaluation.corpora import CORPORA, load_corpus
from evaluation.perplexity import compare_models, tokenize

MODEL = "smollm2-135m"
RESULTS = Path(__file__).parent / "results"
ERRS = (0.1, 0.2, 0.3, 0.4, 0.5)
Recipe = list[dict[str, Any]]


def welore(err: float, **options: Any) -> dict[str, Any]:
    return {"welore": {"err": err, "rank_multiple": 8, **options}}


def recipes() -> list[Recipe]:
    """In the order of what one wants to know first."""
    found: list[Recipe] = [
        [{"int4": {"method": method, "group_size": 64}}] for method in ("rtn", "gptq", "awq")
    ]
    for err in ERRS:
        found += [
            [welore(err, count="all", allocation=allocation)]
            for allocation in ("welore", "uniform")
        ]
    for err in (0.1, 0.3, 0.5):
        found += [
            [welore(err, count="all", allocation=allocation, calibration="activation")]
            for allocation in ("welore", "uniform")
        ]
    found += [[welore(err)] for err in (0.1, 0.3)]
    found += [[welore(err, calibration="activation")] for err in (0.1, 0.3)]
    found.append(
        [
            {"welore": {"err": 0.1, "calibration": "activation"}},
            {"int4": {"method": "gptq", "group_size": 64}},
        ]
    )
    found += [[{"structured": {"ffn_width": width}}] for width in (1408, 1280, 1024)]
    found += [[{"shortgpt": {"remove": count}}] for count in (1, 3, 6)]
    found += [[{"sparsegpt": {"sparsity": sparsity}}] for sparsity in (0.5, "2:4")]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--home", type=Path, default=Path.home() / ".cache" / "lathe")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument(
        "--only", nargs="*", default=[""], help="Only recipes whose JSON has one of these in it."
    )
    arguments = parser.parse_args()
    registry = ModelRegistry(arguments.home / "models")
    try:
        source = registry.get(MODEL).path
    except ModelNotFoundError:
        import_packaged(registry, MODEL)
        source = registry.get(MODEL).path
    settings = Calibration(samples=arguments.samples, length=arguments.length)
    corpus = load_corpus(settings.corpus)
    tokens = sample_tokens(tokenize(source, corpus)[0], settings, sha256=corpus.sha256)
    dense = load_model(source, dtype=torch.float32)
    rows: list[list[str]] = []
    path = RESULTS / f"compression_{MODEL}_{platform.machine()}_{datetime.date.today()}.md"
    path.parent.mkdir(exist_ok=True)
    for stages in recipes():
        if any(part in json.dumps(stages) for part in arguments.only):
            rows.append(measure(source, dense, stages, tokens, arguments.windows))
            path.write_text("\n".join(page(rows, arguments)) + "\n")
            print(rows[-1], flush=True)


def measure(source: Path, dense: Any, stages: Recipe, tokens: Any, num_windows: int) -> list[str]:
    recipe = parse_recipe(stages)
    started, started_cpu = time.monotonic(), _cpu_seconds()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "compressed"
        try:
            manifest = compress(
                source,
                folder,
                recipe,
                source_id=MODEL,
                calibration=tokens if recipe.calibrated else None,
                cache=source.parent.parent / "cache" / "singular-values",
            )
        except StageError as error:
            return [_name(stages), f"refused: {error}", *[""] * 9]
        seconds, cpu = time.monotonic() - started, _cpu_seconds() - started_cpu
        model = load_model(folder, dtype=torch.float32)
        resident = resident_bytes(load_model(folder))
        cells = [
            _name(stages),
            f"{manifest.ratios.get('effective_rank_reduction', 0):.4f}",
            f"{manifest.ratios['parameters']:.3f}",
            f"{manifest.ratios['bytes']:.3f}",
            f"{resident / 1e6:.0f}",
        ]
        for name in CORPORA:
            found = compare_models(dense, model, source, load_corpus(name), max_windows=num_windows)
            cells.append(f"{found.before.value:.2f} -> {found.after.value:.2f}")
            cells.append(f"{found.kl_divergence:.3f} / {found.top1_agreement:.1%}")
    return [*cells, f"{seconds:.0f}", f"{cpu:.0f}"]


def _name(stages: Recipe) -> str:
    return "`" + json.dumps(stages)[1:-1].replace('"', "") + "`"


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def page(rows: list[list[str]], arguments: argparse.Namespace) -> list[str]:
    head = ["recipe", "ERR", "parameters", "bytes", "resident MB (bf16)"]
    for name in CORPORA:
        head += [f"{name} perplexity", "KL / same top token"]
    head += ["s", "CPU s"]
    only = f" --only {' '.join(arguments.only)}" if any(arguments.only) else ""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return [
        "# SmolLM2-135M: compression methods side by side",
        "",
        f"{datetime.date.today()}, {platform.machine()}, {torch.get_num_threads()} threads, shared machine, torch"
        f" {torch.__version__}, transformers {transformers.__version__}.",
        f"Command: `python -m benchmarks.compression --windows {arguments.windows}"
        f" --samples {arguments.samples}"
        f" --length {arguments.length}{only}`. The original is dequantized GGUF Q4_1: its weights lie on a 4-bit grid"
        " already, which flatters INT4.",
        f"Perplexity and KL: {arguments.windows} windows of 512 tokens per corpus, stride 512, float32. Calibration:"
        f" {arguments.samples} x {arguments.length} tokens of the second half of wikipedia-summaries, seed 0.",
        "Parameters and bytes are shares of the original's. Peak memory of the whole run, two models for evaluation"
        f" included: {peak:.0f} MiB. Seconds are of compression alone; CPU seconds count on a busy machine.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


if __name__ == "__main__":
    main()
