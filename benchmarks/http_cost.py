"""What HTTP costs: the engine alone and the same engine behind the whole service, on the same load in one run.

    python -m benchmarks.http_cost [--model smollm2-135m] [--rounds 5] [--concurrency 1 8 16]

Both are measured by the closed loop of `serve_bench.py`, on the same prompts. The engine alone takes token ids, in this
process, and is stepped without a pause; behind the service every prompt is tokenized and every token is detokenized,
framed, sent as an event and parsed by a client on the same cores. They take turns; the service is stopped (SIGSTOP)
while the engine is measured. Recorded as Markdown.
"""

import argparse
import asyncio
import datetime
import itertools
import os
import platform
import signal
import statistics
import tempfile
import time
from pathlib import Path

from engines.process import set_openmp_environment

set_openmp_environment()  # before torch

from benchmarks.peers import lathe, running, signal_all, wait_ready  # noqa: E402
from benchmarks.serve_bench import Target, closed_loop, prompts  # noqa: E402
from compression.registry import ModelRegistry  # noqa: E402
from engines.engine import NativeEngine  # noqa: E402
from engines.protocol import GenerateRequest, SamplingParams  # noqa: E402
from engines.text import TextTokenizer  # noqa: E402
from service.settings import DEFAULT_MODEL, Settings  # noqa: E402

RESULTS = Path(__file__).parent / "results"
NEW_TOKENS = 64
REQUESTS_PER_CLIENT = 3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 16])
    arguments = parser.parse_args()
    folder = ModelRegistry(Settings().models_dir).get(arguments.model).path
    engine = NativeEngine.load(arguments.model, folder)
    tokenizer = TextTokenizer((folder / "tokenizer.json").read_text())
    server = lathe((arguments.model,))
    alone: dict[int, list[float]] = {level: [] for level in arguments.concurrency}
    served: dict[int, list[float]] = {level: [] for level in arguments.concurrency}
    load_average = os.getloadavg()[0]
    with (
        tempfile.NamedTemporaryFile(suffix=".log") as log,
        running(server, Path(log.name)) as process,
    ):
        wait_ready(server, process)
        for round_number in range(arguments.rounds + 1):
            for level in arguments.concurrency:
                num_requests = level * REQUESTS_PER_CLIENT
                seed = 1000 * round_number + level
                signal_all(process.pid, signal.SIGSTOP)
                texts = itertools.islice(prompts(seed), num_requests)
                first = run_alone(engine, [tokenizer.encode(text) for text in texts], level)
                signal_all(process.pid, signal.SIGCONT)
                target = Target(
                    name="service",
                    url=server.url,
                    model=arguments.model,
                    body={"ignore_eos": True},
                )
                loop = closed_loop(
                    target,
                    concurrency=level,
                    num_requests=num_requests,
                    max_tokens=NEW_TOKENS,
                    seed=seed,
                )
                second = asyncio.run(loop).tokens_per_second
                if round_number:  # the first one warms up
                    alone[level].append(first)
                    served[level].append(second)
    lines = [
        f"# {arguments.model}: what HTTP costs",
        "",
        f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores; load average before the run:"
        f" {load_average:.1f}. Closed loop, prompts of 70 words, {NEW_TOKENS} tokens each, greedy; tokens/s of"
        f" wall-clock with prefill, medians of {arguments.rounds} interleaved rounds; streamed over HTTP.",
        "",
        "| concurrency | engine alone | over HTTP | ratio, median (range) |",
        "|---|---|---|---|",
    ]
    for level in arguments.concurrency:
        ratios = [b / a for a, b in zip(alone[level], served[level], strict=True)]
        lines.append(
            f"| {level} | {statistics.median(alone[level]):.0f} | {statistics.median(served[level]):.0f}"
            f" | {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}) |"
        )
    path = RESULTS / f"http_cost_{arguments.model}_{platform.machine()}_{datetime.date.today()}.md"
    path.write_text("\n".join(lines) + "\n")
    print(path.read_text())


def run_alone(engine: NativeEngine, prompts_ids: list[list[int]], concurrency: int) -> float:
    """Tokens per second of a closed loop of `concurrency` clients that share the prompts."""
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
    requests = iter(
        GenerateRequest(request_id=str(number), token_ids=tuple(ids), params=params)
        for number, ids in enumerate(prompts_ids)
    )
    started = time.perf_counter()
    for request in itertools.islice(requests, concurrency):
        engine.submit(request)
    num_tokens = 0
    while engine.has_work():
        for output in engine.step():
            num_tokens += len(output.token_ids)
            if output.finish_reason is not None and (following := next(requests, None)) is not None:
                engine.submit(following)
    return num_tokens / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
