"""What HTTP costs: the engine alone and the same engine behind the whole service, on the same load in one run.

    python -m benchmarks.http_cost [--model smollm2-135m] [--rounds 5] [--concurrency 1 8 16]

What is it in tokens a second, and how much later than the engine has a client its answer?

For the first, both are measured by the closed loop of `serve_bench.py`, on the same prompts. The engine alone takes
token ids, in this process, and is stepped without a pause; behind the service every prompt is tokenized and every token
is detokenized, framed, sent as an event and parsed by a client on the same cores. They take turns; the service is
stopped (SIGSTOP) while the engine is measured.

For the second, each request's time at the client is compared with that of the same request in the engine's process,
which the host logs when it ends. What is left is the API's, the sockets' and the client's, which reads bytes and parses
none. Recorded as Markdown.
"""

import argparse
import asyncio
import datetime
import itertools
import json
import os
import platform
import secrets
import signal
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from engines.process import set_torch_environment

set_torch_environment()  # before torch

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
REQUESTS_PER_CLIENT_LATE = 20


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
        late = {
            (level, stream): asyncio.run(
                lateness(server.port, arguments.model, concurrency=level, stream=stream)
            )
            for level in arguments.concurrency
            for stream in (False, True)
        }
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
    lines += [
        "",
        f"What a client waits beyond the engine, ms, of {REQUESTS_PER_CLIENT_LATE} requests per client: median, 99th"
        " percentile.",
        "",
        "| concurrency | whole answer | stream: first token | stream: last token |",
        "|---|---|---|---|",
    ]
    for level in arguments.concurrency:
        whole, stream = late[level, False], late[level, True]
        cells = [[last for _, last in whole], *zip(*stream, strict=True)]
        lines.append(f"| {level} | {' | '.join(map(_percentiles, cells))} |")
    path = RESULTS / f"http_cost_{arguments.model}_{platform.machine()}_{datetime.date.today()}.md"
    path.write_text("\n".join(lines) + "\n")
    print(path.read_text())


async def lateness(
    port: int, model: str, *, concurrency: int, stream: bool
) -> list[tuple[float, float]]:
    """Seconds by which the first and the last bytes of each answer came later than the engine had their tokens.

    Raises:
        SystemExit: a request failed, or the host's log has no line of it.
    """
    texts = itertools.islice(prompts(concurrency), concurrency * REQUESTS_PER_CLIENT_LATE)
    seen: dict[str, tuple[float, float]] = {}
    run = secrets.token_hex(4)  # the log has the lines of earlier runs, too

    async def client(number: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for text in texts:
            request_id = f"late-{run}-{number}-{len(seen)}"
            body = {"model": model, "prompt": text, "max_tokens": NEW_TOKENS, "temperature": 0}
            data = json.dumps(body | {"ignore_eos": True, "stream": stream}).encode()
            head = (
                f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: {request_id}\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
            )
            sent_at = time.perf_counter()
            writer.write(head.encode() + data)
            first, last = await (_read_stream if stream else _read_whole)(reader)
            seen[request_id] = (first - sent_at, last - sent_at)
        writer.close()

    await asyncio.gather(*(client(number) for number in range(concurrency)))
    log = Settings().home / "logs" / f"engine-{model}.log"
    late = []
    for line in log.read_text().splitlines():
        row = json.loads(line)
        times = seen.pop(row.get("request_id", ""), None)
        if times is not None:
            first_token = row["queue_seconds"] + row["prefill_seconds"]
            late.append((times[0] - first_token, times[1] - row["seconds"]))
    if seen:
        raise SystemExit(f"{log} has no line of {len(seen)} requests")
    return late


async def _read_whole(reader: asyncio.StreamReader) -> tuple[float, float]:
    head = await _read_head(reader)
    await reader.readexactly(int(head.split(b"content-length:")[1].split(b"\r\n")[0]))
    now = time.perf_counter()
    return now, now


async def _read_stream(reader: asyncio.StreamReader) -> tuple[float, float]:
    """When the first event came, and when the last did before `[DONE]`."""
    await _read_head(reader)
    first = last = None
    while size := int(await reader.readline(), 16):
        chunk = await reader.readexactly(size + 2)
        if chunk.startswith(b"data: {"):
            last = time.perf_counter()
            first = first or last
    await reader.readline()
    if first is None or last is None:
        raise SystemExit("an answer without a token")
    return first, last


async def _read_head(reader: asyncio.StreamReader) -> bytes:
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    if not head.startswith(b"http/1.1 200"):
        raise SystemExit(f"the service answered {head[:200]!r}")
    return head


def _percentiles(seconds: Sequence[float]) -> str:
    ordered = sorted(seconds)
    p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return f"{1000 * statistics.median(ordered):.1f}, {1000 * p99:.1f}"


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
