"""FFN-SkipLLM on a model: perplexity of every policy at equal weight traffic, and decoding speed; as Markdown.

`python -m benchmarks.ffn_skip` runs the calibrate_skip job by hand, with a gate that lets everything through, then
decodes with the profile and without in turn. `--job FOLDER` keeps the job's folder: a second run with the same
settings goes on behind what the first one measured.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.model import HOME, packaged_model
from engines.engine import NativeEngine
from engines.protocol import GenerateRequest, SamplingParams, Skip
from evaluation.skip import to_markdown
from jobs.context import RunnerContext
from jobs.runners import calibrate_skip
from jobs.spec import parse_spec

RESULTS = Path(__file__).parent / "results"
TARGETS = (0.1, 0.2, 0.25, 0.3)
DECODED_TARGETS = (0.25,)
PROMPT_TOKENS, NEW_TOKENS = 32, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--home", type=Path, default=HOME)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--job", type=Path, help="folder of the job")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    source = packaged_model(arguments.model, arguments.home)
    with tempfile.TemporaryDirectory() as temporary:
        checkpoint = Path(temporary) / "checkpoint"
        report = calibrated(
            source, checkpoint, TARGETS, arguments.samples, arguments.length, arguments.job
        )
        speed = _speed(checkpoint, arguments.rounds)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    today = datetime.date.today()
    title, _, table = to_markdown(f"{arguments.model}: skipping feed-forwards", report).partition(
        "\n"
    )
    where = (
        f"{today}, commit {commit}, {platform.machine()}, {os.cpu_count()} cores, torch"
        f" {torch.__version__}, transformers {transformers.__version__}."
        "\nCommand: `python -m benchmarks.ffn_skip`. The model is dequantized GGUF Q4_1."
    )
    path = RESULTS / f"ffn_skip_{platform.machine()}_{today}.md"
    path.write_text(f"{title}\n\n{where}\n{table}\n{speed}\n")
    print(path.read_text())


def calibrated(
    source: Path,
    destination: Path,
    targets: Sequence[float],
    samples: int,
    length: int,
    job: Path | None = None,
) -> Any:
    """Write a checkpoint again with a skip profile that no gate refuses; returns the job's report.

    Args:
        job: keep the job's folder here.
    """
    spec = {
        "type": "calibrate_skip",
        "model": "source",
        "output": "skipping",
        "target_ratios": tuple(targets),
        "calibration": {"samples": samples, "length": length},
        "gate": {"max_perplexity_ratio": 1000},
    }
    with tempfile.TemporaryDirectory(dir=destination.parent) as temporary:
        home = Path(temporary)
        (home / "models").mkdir()
        (home / "models" / "source").symlink_to(source.resolve())
        folder = job or home / "job"
        folder.mkdir(parents=True, exist_ok=True)
        context = RunnerContext(
            job_id="benchmark",
            owner="benchmark",
            attempt=1,
            spec=parse_spec(spec).model_dump(mode="json", exclude_none=True),
            folder=folder,
            home=home,
            send=_print,
        )
        calibrate_skip.run(context)
        (home / "models" / "skipping").rename(destination)
        return json.loads((context.artifacts / "report.json").read_text())


def _speed(folder: Path, rounds: int) -> str:
    """Decode tokens per second of the engine, skipping and not in turn, alone and among 16."""
    engine = NativeEngine.load("skipping", folder)
    skips = [Skip(), *(Skip(mode="target", target_ratio=ratio) for ratio in DECODED_TARGETS)]
    lines = [
        "## Decoding with the engine",
        "",
        f"bfloat16, {PROMPT_TOKENS} prompt and {NEW_TOKENS} new tokens, greedy; medians of {rounds} interleaved rounds"
        f" and the range of the ratios; load average {os.getloadavg()[0]:.1f}."
        f" Pass: {engine.info.kernels['pass']}.",
        "The first row is the dense model; skipped shares count the warm-up, which skips nothing.",
        "",
        "| requests | target | rows skipped | tokens/s | ratio to dense | range |",
        "|---|---|---|---|---|---|",
    ]
    for concurrency in (1, 16):
        found: list[list[tuple[float, float]]] = [[] for _ in skips]
        for round_index in range(rounds + 1):
            for index, skip in enumerate(skips):
                measured = _decode(engine, concurrency, skip)
                if round_index:
                    found[index].append(measured)
        for skip, runs in zip(skips, found, strict=True):
            ratios = [run[0] / dense[0] for run, dense in zip(runs, found[0], strict=True)]
            target = "off" if skip.target_ratio is None else f"{skip.target_ratio:.0%}"
            lines.append(
                f"| {concurrency} | {target} | {statistics.mean(share for _, share in runs):.1%} |"
                f" {_median(run[0] for run in runs):.0f} | {_median(ratios):.2f} |"
                f" {min(ratios):.2f} to {max(ratios):.2f} |"
            )
    return "\n".join(lines)


def _median(values: Iterable[float]) -> float:
    return statistics.median(values)


def _decode(engine: NativeEngine, concurrency: int, skip: Skip) -> tuple[float, float]:
    """Tokens per second behind the prompts, and the share of rows skipped."""
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
    for index in range(concurrency):
        prompt = _prompt(engine.info.vocab_size, index)
        engine.submit(
            GenerateRequest(request_id=f"{index}", token_ids=prompt, params=params, skip=skip)
        )
    waiting = set(range(concurrency))
    while waiting:  # until every prompt has its first token
        waiting -= {int(output.request_id) for output in engine.step()}
    before = engine.stats()
    started = time.perf_counter()
    while engine.has_work():
        engine.step()
    seconds = time.perf_counter() - started
    after = engine.stats()
    num_tokens = after.generation_tokens_total - before.generation_tokens_total
    num_rows = after.ffn_rows_total - before.ffn_rows_total
    num_skipped = after.ffn_rows_skipped_total - before.ffn_rows_skipped_total
    return num_tokens / seconds, num_skipped / num_rows if num_rows else 0.0


def _prompt(vocab_size: int, index: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(index)
    ids: list[int] = torch.randint(0, vocab_size, (PROMPT_TOKENS,), generator=generator).tolist()
    return tuple(ids)


def _print(message: dict[str, Any]) -> None:
    if "message" in message:
        print(message["message"], flush=True)


if __name__ == "__main__":
    main()
