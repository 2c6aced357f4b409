"""Lathe beside llm-compressor on SmolLM2-135M: the same weights, calibration tokens and perplexity; as Markdown.

    python -m benchmarks.compression_peers --peer PEER/bin/python --work DIR [--samples 32] [--length 512] [--only gptq]

PEER is a virtual environment of its own that has `llmcompressor`; `llmcompressor_peer.py` runs in it. Every method runs
in a process of its own, one after another, and leaves a row in DIR: a run that was stopped goes on behind its last row.
"""

import argparse
import datetime
import json
import os
import platform
import resource
import shutil
import subprocess
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from engines.process import TORCH_ENVIRONMENT, set_torch_environment

set_torch_environment()

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from benchmarks.model import HOME, calibration_tokens, packaged_model  # noqa: E402
from compression.calibration import CalibrationTokens  # noqa: E402
from compression.hf import load_model  # noqa: E402
from compression.pipeline import compress  # noqa: E402
from compression.recipe import Calibration, parse_recipe  # noqa: E402
from evaluation.corpora import CORPORA, load_corpus  # noqa: E402
from evaluation.perplexity import measure_perplexity  # noqa: E402

MODEL = "smollm2-135m"
RESULTS = Path(__file__).parent / "results"
GROUP_SIZE = 64
Row = dict[str, Any]
# The keys are llmcompressor_peer.RECIPES'.
STAGES: dict[str, Row] = {
    "wanda": {"wanda": {"sparsity": 0.5}},
    "wanda 2:4": {"wanda": {"sparsity": "2:4"}},
    "sparsegpt": {"sparsegpt": {"sparsity": 0.5}},
    "sparsegpt 2:4": {"sparsegpt": {"sparsity": "2:4"}},
    **{
        f"{method}{'' if symmetric else ' asymmetric'}": {
            "int4": {"method": method, "group_size": GROUP_SIZE, "symmetric": symmetric}
        }
        for symmetric in (True, False)
        for method in ("rtn", "gptq", "awq")
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--home", type=Path, default=HOME)
    parser.add_argument("--peer", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--only", nargs="*", default=list(STAGES), choices=list(STAGES))
    parser.add_argument("--sides", nargs="*", default=["lathe", "peer"])
    arguments = parser.parse_args()
    source = packaged_model(MODEL, arguments.home)
    settings = Calibration(samples=arguments.samples, length=arguments.length)
    tokens = calibration_tokens(source, settings)
    arguments.work.mkdir(parents=True, exist_ok=True)
    (arguments.work / "tokens.json").write_text(json.dumps(tokens.ids_NS.tolist()))
    original = arguments.work / "original.json"
    if not original.is_file():
        original.write_text(json.dumps(_perplexities(source, source, arguments.windows)))
    for method in arguments.only:
        for side in arguments.sides:
            row = arguments.work / f"{side} {method}.json"
            if not row.is_file():
                found = _measure(side, method, source, tokens, arguments)
                row.write_text(json.dumps(found))
                print(side, method, found, flush=True)
    path = RESULTS / f"compression_peers_{MODEL}_{platform.machine()}_{datetime.date.today()}.md"
    path.write_text("\n".join(page(arguments)) + "\n")


def _measure(
    side: str, method: str, source: Path, tokens: CalibrationTokens, arguments: argparse.Namespace
) -> Row:
    output = arguments.work / f"output of {side}"
    shutil.rmtree(output, ignore_errors=True)
    if side == "lathe":
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            cost = pool.submit(_compress, method, source, tokens, output).result()
    else:
        command = [str(arguments.peer), "-m", "benchmarks.llmcompressor_peer", method]
        paths = [str(source), str(arguments.work / "tokens.json"), str(output)]
        run = subprocess.run(
            [*command, *paths],
            stdout=subprocess.PIPE,
            check=True,
            text=True,
            env=os.environ | TORCH_ENVIRONMENT,
        )
        cost = json.loads(run.stdout.splitlines()[-1])
    found = cost | {"perplexity": _perplexities(output, source, arguments.windows)}
    shutil.rmtree(output)
    return found


def _compress(method: str, source: Path, tokens: CalibrationTokens, output: Path) -> Row:
    """Lathe's side, in a process of its own; what it returns is what `llmcompressor_peer` prints."""
    recipe = parse_recipe([STAGES[method]])
    before = _cpu_seconds()
    compress(
        source,
        output,
        recipe,
        source_id=MODEL,
        calibration=tokens if recipe.calibrated else None,
    )
    status = Path("/proc/self/status").read_text()
    (peak,) = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")]
    return {"cpu_seconds": _cpu_seconds() - before, "peak_mib": int(peak) / 1024}


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _perplexities(folder: Path, source: Path, num_windows: int) -> list[float]:
    """Of a Lathe checkpoint, or of the peer's dense weights in the model that they came from."""
    weights = folder / "weights.safetensors"
    if weights.is_file():
        model = load_model(source, dtype=torch.float32)
        unused = model.load_state_dict(load_file(weights), strict=False).unexpected_keys
        assert not unused, unused
    else:
        model = load_model(folder, dtype=torch.float32)
    return [
        measure_perplexity(model, source, load_corpus(name), max_windows=num_windows).value
        for name in CORPORA
    ]


def page(arguments: argparse.Namespace) -> list[str]:
    original = json.loads((arguments.work / "original.json").read_text())
    versions = subprocess.run(
        [str(arguments.peer), "-m", "pip", "freeze"], stdout=subprocess.PIPE, check=True, text=True
    ).stdout.splitlines()
    peer = [
        v.replace("==", " ") for v in versions if v.startswith(("llmcomp", "torch==", "transf"))
    ]
    head = [f"{name} perplexity" for name in CORPORA] + ["CPU s", "peak MiB"]
    lines = [
        "# SmolLM2-135M: Lathe beside llm-compressor",
        "",
        f"{datetime.date.today()}, {platform.machine()}, {torch.get_num_threads()} threads, shared machine."
        f" Lathe: torch {torch.__version__}, transformers {transformers.__version__}."
        f" The other: {', '.join(peer)}.",
        "Command: `python -m benchmarks.compression_peers --peer PEER/bin/python --work DIR"
        f" --samples {arguments.samples} --length {arguments.length} --windows {arguments.windows}`.",
        f"The same bfloat16 weights, computed with in float32; the same {arguments.samples} x"
        f" {arguments.length} tokens of the second half of wikipedia-summaries; pruning of half the weights;"
        f" INT4 in groups of {GROUP_SIZE} (128 does not divide SmolLM2's 576 channels). Perplexity by Lathe's"
        f" code on {arguments.windows} windows of 512 tokens, float32: Lathe's checkpoint as stored, the other's"
        " weights as it left them in memory. In every cell Lathe / llm-compressor, and their ratio.",
        "CPU seconds (user + system) and high-water mark of resident memory are of each method's own process,"
        " from loading the weights to the compressed weights; Lathe's include writing the checkpoint.",
        "",
        "| method | " + " | ".join(head) + " |",
        "|" + "---|" * (len(head) + 1),
        "| original | " + " | ".join(f"{value:.2f}" for value in original) + " | | |",
    ]
    for method in STAGES:
        rows = [arguments.work / f"{side} {method}.json" for side in ("lathe", "peer")]
        if not all(row.is_file() for row in rows):
            continue
        ours, theirs = (_figures(json.loads(row.read_text())) for row in rows)
        cells = [
            f"{a:.{digits}f} / {b:.{digits}f} ({a / b:.3f})"
            for a, b, digits in zip(ours, theirs, (2, 2, 0, 0), strict=True)
        ]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return lines


def _figures(row: Row) -> list[float]:
    return [*row["perplexity"], row["cpu_seconds"], row["peak_mib"]]


if __name__ == "__main__":
    main()
