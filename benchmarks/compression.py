"""Compression methods side by side on SmolLM2-135M: perplexity against bytes and against speed; recorded as Markdown.

    python -m benchmarks.compression --work DIR [--windows 8] [--samples 8] [--length 512] [--only welore ...]

Every recipe leaves a row in DIR, so that a run which was stopped goes on where it was, and the table with its plots is
written anew after every row.
"""

import argparse
import datetime
import hashlib
import json
import platform
import resource
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from benchmarks.model import calibration_tokens, packaged_model
from compression.calibration import CalibrationTokens
from compression.checkpoint import Manifest
from compression.hf import load_model, resident_bytes
from compression.pipeline import compress
from compression.recipe import Calibration, parse_recipe
from compression.stages import StageError
from evaluation.corpora import CORPORA, load_corpus
from evaluation.nf4 import apply_nf4
from evaluation.perplexity import measure_perplexity
from evaluation.speed import compare_speed

MODEL = "smollm2-135m"
RESULTS = Path(__file__).parent / "results"
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
ERRS = SHARES[:-1]
NF4 = "nf4"  # no stage: it is only compared with
Recipe = list[dict[str, Any]]
Row = dict[str, Any]


def welore(err: float, rank_multiple: int = 8, **options: Any) -> dict[str, Any]:
    return {"welore": {"err": err, "rank_multiple": rank_multiple, **options}}


def int4(method: str, group_size: int, *, symmetric: bool = True) -> dict[str, Any]:
    return {"int4": {"method": method, "group_size": group_size, "symmetric": symmetric}}


def recipes() -> list[Recipe]:
    """In the order of what one wants to know first."""
    methods = ("rtn", "gptq", "awq")
    weighed: dict[str, Any] = {"count": "all", "calibration": "activation"}
    found: list[Recipe] = [[int4(method, 64)] for method in methods]
    found += [[{"int8": {}}], [{NF4: {}}]]
    for err in ERRS:
        found += [[welore(err, allocation=name, **weighed)] for name in ("welore", "uniform")]
    # Ranks that are no multiple of the group's size get smaller groups, and their scales eat what is saved.
    found += [
        [welore(err, multiple, **weighed), int4("gptq", 64)]
        for err in (0.1, 0.3)
        for multiple in (8, 64)
    ]
    for err in ERRS:
        found += [[welore(err, allocation=name, count="all")] for name in ("welore", "uniform")]
    found += [[{"flap": {"sparsity": share}}] for share in SHARES]
    found += [
        [{"structured": {"heads_per_group": 2}}],
        [{"structured": {"num_key_value_heads": 2}}],
    ]
    found += [[{name: {"sparsity": "2:4"}}] for name in ("magnitude", "wanda", "sparsegpt")]
    found += [[int4(method, 64, symmetric=False)] for method in methods]
    for share in (0.5, 0.3, 0.6, 0.1, 0.2, 0.4):
        found += [[{name: {"sparsity": share}}] for name in ("magnitude", "wanda", "sparsegpt")]
    found += [[{"shortgpt": {"remove": round(30 * share)}}] for share in SHARES]
    found += [[{"structured": {"ffn_width": 64 * round(24 * (1 - share))}}] for share in SHARES]
    found += [[{"wanda": {"sparsity": share, "allocation": "owl"}}] for share in (0.5, 0.6)]
    found += [[welore(err, allocation="owl", **weighed)] for err in (0.1, 0.3, 0.5)]
    found += [[int4(m, 32, symmetric=symmetric)] for symmetric in (True, False) for m in methods]
    found += [[int4("rtn", 128)]]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--home", type=Path, default=Path.home() / ".cache" / "lathe")
    parser.add_argument("--work", type=Path, help="default: HOME/compression-benchmark")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument(
        "--only", nargs="*", default=[""], help="Only recipes whose JSON has one of these in it."
    )
    arguments = parser.parse_args()
    arguments.work = arguments.work or arguments.home / "compression-benchmark"
    source = packaged_model(MODEL, arguments.home)
    settings = Calibration(samples=arguments.samples, length=arguments.length)
    tokens = calibration_tokens(source, settings)
    arguments.work.mkdir(parents=True, exist_ok=True)
    dense = load_model(source)
    original = arguments.work / "original.json"
    if not original.is_file():
        _write(original, {"perplexity": _perplexities(dense, source, arguments.windows)})
    for stages in recipes():
        path = arguments.work / f"{hashlib.sha256(_name(stages).encode()).hexdigest()[:16]}.json"
        if any(part in json.dumps(stages) for part in arguments.only) and not path.is_file():
            _write(path, measure(source, dense, stages, tokens, arguments.windows))
            print(path.read_text(), flush=True)
            record(arguments)
    record(arguments)


def measure(
    source: Path, dense: Any, stages: Recipe, tokens: CalibrationTokens, num_windows: int
) -> Row:
    if NF4 in stages[0]:
        return measure_nf4(source, stages, num_windows)
    recipe = parse_recipe(stages)
    started = _cpu_seconds()
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
            return {"recipe": stages, "refused": str(error)}
        cpu_seconds = _cpu_seconds() - started
        model = load_model(folder)
        row: Row = {
            "recipe": stages,
            "err": manifest.ratios.get("effective_rank_reduction"),
            "parameters": manifest.ratios["parameters"],
            "bytes": manifest.ratios["bytes"],
            "resident": resident_bytes(model) / resident_bytes(dense),
            "perplexity": _perplexities(model, source, num_windows),
            "cpu_seconds": cpu_seconds,
        }
        if not _runs_as_dense(manifest):
            speed = compare_speed({"dense": dense, "this": model}, prompt_tokens=64, new_tokens=16)
            for what in ("decode", "prefill"):
                per_second = [getattr(s, f"{what}_tokens_per_second") for s in speed.values()]
                row[what] = per_second[1] / per_second[0]
    return row


def measure_nf4(source: Path, stages: Recipe, num_windows: int) -> Row:
    """bitsandbytes' rounding of the blocks' weights, the embedding left alone; computed with as dense weights."""
    model = load_model(source)
    dense_bytes = resident_bytes(model)
    rounded = sum(m.weight.nbytes for m in model.model.layers.modules() if isinstance(m, nn.Linear))
    started = _cpu_seconds()
    share = (dense_bytes - rounded + apply_nf4(model)) / dense_bytes
    return {
        "recipe": stages,
        "err": None,
        "parameters": 1.0,
        "bytes": share,
        "resident": share,
        "cpu_seconds": _cpu_seconds() - started,
        "perplexity": _perplexities(model, source, num_windows),
    }


def _runs_as_dense(manifest: Manifest) -> bool:
    """Zeros among dense weights of the same shapes: the same work."""
    return manifest.ratios["bytes"] == 1


def _perplexities(model: Any, source: Path, num_windows: int) -> list[float]:
    return [
        measure_perplexity(model, source, load_corpus(name), max_windows=num_windows).value
        for name in CORPORA
    ]


def _write(path: Path, row: Row) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(row))
    temporary.replace(path)


def _name(stages: Recipe) -> str:
    return "`" + json.dumps(stages)[1:-1].replace('"', "") + "`"


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def record(arguments: argparse.Namespace) -> None:
    """The table, and beside it its plots, of every row that is there."""
    original: list[float] = json.loads((arguments.work / "original.json").read_text())["perplexity"]
    found = {path.stem: json.loads(path.read_text()) for path in arguments.work.glob("*.json")}
    keys = [hashlib.sha256(_name(stages).encode()).hexdigest()[:16] for stages in recipes()]
    rows = [found[key] for key in keys if key in found]
    stem = f"compression_{MODEL}_{platform.machine()}_{datetime.date.today()}"
    missing = len(keys) - len(rows)
    lines = page(rows, original, arguments, f"{stem}.png", missing)
    (RESULTS / f"{stem}.md").write_text("\n".join(lines) + "\n")
    plot([row for row in rows if "refused" not in row], original, RESULTS / f"{stem}.png")


def page(
    rows: list[Row], original: list[float], arguments: argparse.Namespace, plots: str, missing: int
) -> list[str]:
    head = ["recipe", "ERR", "parameters", "bytes", "resident"]
    head += [f"{name} perplexity" for name in CORPORA]
    head += ["decode", "prefill", "CPU s"]
    return [
        "# SmolLM2-135M: compression methods side by side",
        "",
        f"{datetime.date.today()}, {platform.machine()}, {torch.get_num_threads()} threads, shared machine, torch"
        f" {torch.__version__}, transformers {transformers.__version__}.",
        f"Command: `python -m benchmarks.compression --work DIR --windows {arguments.windows}"
        f" --samples {arguments.samples} --length {arguments.length}`."
        + (
            f" {missing} of its recipes are not in the table: the run was stopped."
            if missing
            else ""
        ),
        "The original is dequantized GGUF Q4_1: its weights lie on a 4-bit grid already, which flatters INT4.",
        f"Perplexity: {arguments.windows} windows of 512 tokens per corpus, stride 512, bfloat16; in brackets the ratio"
        f" to the original's {original[0]:.2f} and {original[1]:.2f}. Calibration: {arguments.samples} x"
        f" {arguments.length} tokens of the second half of wikipedia-summaries, seed 0.",
        "Everything else is a share of the original's: parameters, bytes on disk, bytes resident in bfloat16,"
        " tokens a second of decoding and of prefill (batch size 1, transformers' modules, medians of 3 interleaved"
        " rounds). Speed is left out where nothing but zeros changed: no kernel here makes use of them. CPU seconds"
        " are of compression alone, on a busy machine.",
        "",
        f"![perplexity against bytes and against tokens a second]({plots})",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(_cells(row, original)) + " |" for row in rows),
    ]


def _cells(row: Row, original: list[float]) -> list[str]:
    if "refused" in row:
        return [_name(row["recipe"]), f"refused: {row['refused']}", *[""] * 8]
    figures = [
        f"{value:,.2f} ({value / before:,.2f})"
        for value, before in zip(row["perplexity"], original, strict=True)
    ]
    return [
        _name(row["recipe"]),
        "" if row["err"] is None else f"{row['err']:.4f}",
        *(f"{row[what]:.3f}" for what in ("parameters", "bytes", "resident")),
        *figures,
        *(f"{row[what]:.2f}" if what in row else "" for what in ("decode", "prefill")),
        f"{row['cpu_seconds']:.0f}",
    ]


def plot(rows: list[Row], original: list[float], path: Path) -> None:
    """Perplexity of the first corpus against bytes and against decoding speed."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(13, 6), sharey=True)
    for axis, what, better in zip(axes, ("bytes", "decode"), ("left", "right"), strict=True):
        kinds = sorted({_kind(row) for row in rows})
        for kind, marker in zip(kinds, "osv^<>DPXdph*8+x|_1234", strict=False):
            points = [
                (row[what], row["perplexity"][0])
                for row in rows
                if _kind(row) == kind and what in row
            ]
            if points:
                axis.scatter(*zip(*points, strict=True), marker=marker, label=kind)
        axis.axhline(original[0], linewidth=0.8, color="grey")
        axis.set_yscale("log")
        axis.set_xlabel(f"{what}, share of the original's (better to the {better})")
    axes[0].set_ylabel(f"perplexity, {CORPORA[0]}")
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _kind(row: Row) -> str:
    names = []
    for stage in row["recipe"]:
        ((name, options),) = stage.items()
        names.append(" ".join([name, options.get("method", options.get("allocation", ""))]).strip())
    return " + ".join(names)


if __name__ == "__main__":
    main()
