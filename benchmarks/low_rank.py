"""WeLore's ranks beside uniform ones, at the same effective rank reduction; recorded as Markdown.

    python -m benchmarks.low_rank [--windows 8] [--samples 16] [--length 512]

Every matrix is decomposed once and then cut in memory, all of them (count "all"), so that only the allocation differs.
With calibration the Gram matrices are the dense model's, in one pass; the pipeline takes them block by block from what
is compressed so far, which is a little better. The table is written anew after every row.
"""

import argparse
import datetime
import platform
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.model import HOME, calibration_tokens, packaged_model
from compression.block import list_blocks, load_block
from compression.calibration import BlockRunner, require_gram
from compression.checkpoint import open_checkpoint
from compression.hf import load_model
from compression.low_rank.factors import Spectrum, factor, spectrum
from compression.low_rank.ranks import RankChoice, choose_ranks, uniform_ranks
from compression.recipe import Calibration
from evaluation.corpora import CORPORA, load_corpus
from evaluation.perplexity import measure_perplexity

MODEL = "smollm2-135m"
RESULTS = Path(__file__).parent / "results"
ERRS = (0.1, 0.2, 0.3, 0.4, 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--home", type=Path, default=HOME)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    arguments = parser.parse_args()
    source = packaged_model(MODEL, arguments.home)
    path = RESULTS / f"low_rank_{MODEL}_{platform.machine()}_{datetime.date.today()}.md"
    path.parent.mkdir(exist_ok=True)
    model = load_model(source, dtype=torch.float32)
    rows = [["dense", "", "0", *perplexities(model, source, arguments.windows)]]
    for calibrated in (True, False):
        spectra = decompose(source, arguments if calibrated else None)
        for err in ERRS:
            values = {name: found.singular_values_R for name, found in spectra.items()}
            sizes = {name: len(found) for name, found in values.items()}
            choices = {
                "welore": choose_ranks(values, err, count="all", multiple=8),
                "uniform": uniform_ranks(sizes, err, multiple=1),
            }
            for allocation, choice in choices.items():
                cut(model, source, spectra, choice)
                figures = perplexities(model, source, arguments.windows)
                how = "activation" if calibrated else "none"
                rows.append([allocation, how, f"{choice.err:.4f}", *figures])
                print(rows[-1], flush=True)
                path.write_text("\n".join(page(rows, arguments)) + "\n")


def decompose(source: Path, calibration: argparse.Namespace | None) -> dict[str, Spectrum]:
    checkpoint = open_checkpoint(source)
    runner = None
    if calibration is not None:
        settings = Calibration(samples=calibration.samples, length=calibration.length)
        tokens = calibration_tokens(source, settings)
        runner = BlockRunner(source, checkpoint, tokens.ids_NS)
    found = {}
    for names in list_blocks(checkpoint):
        block = load_block(checkpoint, names)
        statistics = {} if runner is None else runner.statistics(block, gram=True, advance=True)
        for name, linear in block.linears.items():
            gram_II = require_gram(statistics, name) if statistics else None
            found[linear.name] = spectrum(linear.weight, gram_II)
    return found


def cut(model: Any, source: Path, spectra: dict[str, Spectrum], choice: RankChoice) -> None:
    checkpoint = open_checkpoint(source)
    for name, rank in choice.ranks.items():
        weight_OI = checkpoint.tensor(f"{name}.weight").float()
        u_OK, v_KI = factor(weight_OI, spectra[name].basis_OR, rank)
        model.get_submodule(name).weight.data = u_OK @ v_KI


def perplexities(model: Any, source: Path, num_windows: int) -> list[str]:
    values = [
        measure_perplexity(model, source, load_corpus(name), max_windows=num_windows).value
        for name in CORPORA
    ]
    return [f"{value:,.2f}" for value in values]


def page(rows: list[list[str]], arguments: argparse.Namespace) -> list[str]:
    head = ["ranks", "calibration", "ERR", *(f"{name} perplexity" for name in CORPORA)]
    return [
        "# SmolLM2-135M: WeLore's ranks beside uniform ranks, every matrix cut",
        "",
        f"{datetime.date.today()}, {platform.machine()}, torch {torch.__version__}, transformers"
        f" {transformers.__version__}.",
        f"Command: `python -m benchmarks.low_rank --windows {arguments.windows}"
        f" --samples {arguments.samples} --length {arguments.length}`.",
        f"Perplexity: {arguments.windows} windows of 512 tokens, stride 512, float32. Calibration:"
        f" {arguments.samples} x {arguments.length} tokens of the second half of wikipedia-summaries, seed 0,"
        " one pass of the dense model.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


if __name__ == "__main__":
    main()
