"""Our batching over transformers' modules beside transformers' own: `generate`, and its continuous batching.

    python -m benchmarks.transformers_batching

One process, one model per method, the methods in turn, medians. Why the engine does not use continuous batching is in
docs/decisions/0005; this is the measurement behind it. Recorded as Markdown in benchmarks/results.
"""

import datetime
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from compression.hf import load_model
from compression.registry import ModelRegistry
from engines.protocol import GenerateRequest, SamplingParams
from engines.transformers_engine import TransformersEngine
from service.settings import Settings

MODEL = "smollm2-135m"
RESULTS = Path(__file__).parent / "results"
PROMPT_TOKENS = 64
NEW_TOKENS = 48
ROUNDS = 5
BATCHES = (1, 8)
Run = Callable[[list[list[int]]], tuple[int, float]]
"""Prompts to the number of tokens generated and the seconds it took."""


def prompts(count: int, vocab_size: int) -> list[list[int]]:
    draw = torch.Generator().manual_seed(count)
    ids = torch.randint(100, vocab_size, (count, PROMPT_TOKENS), generator=draw)
    return [list(map(int, row)) for row in ids]


def with_engine(folder: Path) -> Run:
    engine = TransformersEngine.load(MODEL, folder)
    serial = iter(range(10**9))

    def run(batch: list[list[int]]) -> tuple[int, float]:
        started = time.perf_counter()
        for ids in batch:
            params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
            request_id = str(next(serial))
            engine.submit(
                GenerateRequest(request_id=request_id, token_ids=tuple(ids), params=params)
            )
        count = 0
        while engine.has_work():
            count += sum(len(output.token_ids) for output in engine.step())
        return count, time.perf_counter() - started

    return run


def with_generate(folder: Path) -> Run:
    model = load_model(folder)

    def run(batch: list[list[int]]) -> tuple[int, float]:
        started = time.perf_counter()
        inputs = torch.tensor(batch)
        output = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )
        count = int((output.shape[1] - inputs.shape[1]) * output.shape[0])
        return count, time.perf_counter() - started

    return run


def with_continuous_batching(folder: Path) -> Run:
    model = load_model(folder)
    config = ContinuousBatchingConfig(
        page_size=32, num_blocks=256, max_batch_tokens=512, use_cuda_graph=False
    )

    def run(batch: list[list[int]]) -> tuple[int, float]:
        # A manager of its own for each run, ended after it: an idle one keeps a core busy.
        manager: Any = model.init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, max_new_tokens=NEW_TOKENS),
            continuous_batching_config=config,
        )
        manager.start()
        manager.add_request(batch[0], max_new_tokens=1, eos_token_id=-1)
        manager.get_result(timeout=120)
        started = time.perf_counter()
        for ids in batch:
            manager.add_request(ids, max_new_tokens=NEW_TOKENS, eos_token_id=-1)
        results = [manager.get_result(timeout=120) for _ in batch]
        seconds = time.perf_counter() - started
        manager.stop(block=True, timeout=10, hard_stop=True)
        return sum(len(result.generated_tokens) for result in results), seconds

    return run


def main() -> None:
    folder = ModelRegistry(Settings().models_dir).get(MODEL).path
    runs: dict[str, Run] = {
        "generate (one batch, equal lengths)": with_generate(folder),
        "transformers' continuous batching": with_continuous_batching(folder),
        "Lathe's engine over transformers' modules": with_engine(folder),
    }
    rates: dict[tuple[str, int], list[float]] = {}
    for round_index in range(ROUNDS + 1):  # the first one warms up
        for size in BATCHES:
            batch = prompts(size, 49152)
            for name, run in runs.items():
                count, seconds = run(batch)
                assert count == size * NEW_TOKENS, (name, count)
                if round_index:
                    rates.setdefault((name, size), []).append(count / seconds)
    today = datetime.date.today()
    lines = [
        f"# {MODEL}, bfloat16: batching over transformers' modules",
        "",
        f"{today}, {platform.machine()}, {torch.get_num_threads()} threads,"
        f" torch {torch.__version__}, transformers {transformers.__version__}.",
        f"{PROMPT_TOKENS} prompt tokens, {NEW_TOKENS} new, greedy; tokens a second with prefill, medians of {ROUNDS}"
        " interleaved rounds; in brackets as a ratio to the first row.",
        "",
        "| method | " + " | ".join(f"{size} at once" for size in BATCHES) + " |",
        "|---|" + "---|" * len(BATCHES),
    ]
    first = next(iter(runs))
    for name in runs:
        cells = [
            f"{(rate := statistics.median(rates[name, size])):.0f}"
            f" ({rate / statistics.median(rates[first, size]):.2f}x)"
            for size in BATCHES
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    path = RESULTS / f"transformers_batching_{platform.machine()}_{today}.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    print(path.read_text())


if __name__ == "__main__":
    main()
