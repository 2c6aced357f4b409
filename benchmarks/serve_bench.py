"""Load on an OpenAI-compatible server: time to first token, time between tokens, tokens a second, as JSON.

    python -m benchmarks.serve_bench --model smollm2-135m --concurrency 1,4,16
    python -m benchmarks.serve_bench --model smollm2-135m --rate 4 --num-requests 100

Closed loop: so many clients, each sending its next request when the last one ended. Open loop (`--rate`): requests
arrive as a Poisson process and wait for nobody, which is what shows a queue. Prompts are passages of a packaged text,
different in every request, so that no prefix cache helps; answers are streamed, greedy, of a fixed length where the
server can ignore its end token. Tokens are counted by the server's `usage`; only where it sends none, by its events.
"""

import argparse
import asyncio
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import httpx

from evaluation.corpora import STATE_OF_THE_UNION, load_corpus

PROMPT_WORDS = 70
TIMEOUT_SECONDS = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One server.

    Attributes:
        body: what is added to every request, such as {"ignore_eos": true}.
    """

    name: str
    url: str
    model: str
    body: dict[str, Any] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Answer:
    """One request's times, in seconds of `time.perf_counter`; `error` where it failed."""

    sent_at: float
    event_times: list[float] = field(default_factory=list)
    num_tokens: int = 0
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """What one level of load gave. Rates are per second of wall-clock, prefill included."""

    target: str
    load: str
    num_requests: int
    num_errors: int
    seconds: float
    tokens_per_second: float
    requests_per_second: float
    time_to_first_token_seconds: dict[str, float]
    inter_token_seconds: dict[str, float]
    request_seconds: dict[str, float]
    errors: list[str]


def prompts(seed: int) -> Iterator[str]:
    """Passages of `PROMPT_WORDS` words, from places that do not repeat."""
    words = load_corpus(STATE_OF_THE_UNION).text.split()
    starts = list(range(0, len(words) - PROMPT_WORDS))
    random.Random(seed).shuffle(starts)
    for start in itertools.cycle(starts):
        yield " ".join(words[start : start + PROMPT_WORDS])


async def ask(client: httpx.AsyncClient, target: Target, prompt: str, max_tokens: int) -> Answer:
    """Stream one completion."""
    body = {
        "model": target.model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        **target.body,
    }
    answer = Answer(time.perf_counter())
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                answer.error = f"{response.status_code}: {(await response.aread())[:200]!r}"
                return answer
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    _take(answer, json.loads(line[6:]))
    except httpx.HTTPError as error:
        answer.error = f"{type(error).__name__}: {error}"
    if answer.error is None and not answer.event_times:
        answer.error = "no token"
    return answer


def _take(answer: Answer, chunk: dict[str, Any]) -> None:
    if "error" in chunk:
        answer.error = str(chunk["error"])
    elif any(choice.get("text") for choice in chunk.get("choices") or ()):
        answer.event_times.append(time.perf_counter())
        answer.num_tokens = max(answer.num_tokens, len(answer.event_times))
    if chunk.get("usage"):
        answer.num_tokens = chunk["usage"]["completion_tokens"]


async def closed_loop(
    target: Target, *, concurrency: int, num_requests: int, max_tokens: int, seed: int
) -> Level:
    """`concurrency` clients share `num_requests` requests."""
    texts = itertools.islice(prompts(seed), num_requests)
    answers: list[Answer] = []

    async def client_loop(client: httpx.AsyncClient) -> None:
        for text in texts:
            answers.append(await ask(client, target, text, max_tokens))

    async with _client(target, concurrency) as client:
        started = time.perf_counter()
        await asyncio.gather(*(client_loop(client) for _ in range(concurrency)))
        seconds = time.perf_counter() - started
    return summarize(target, f"concurrency {concurrency}", answers, seconds)


async def open_loop(
    target: Target, *, rate: float, num_requests: int, max_tokens: int, seed: int
) -> Level:
    """Requests arrive as a Poisson process of `rate` a second."""
    draw = random.Random(seed)
    texts = list(itertools.islice(prompts(seed), num_requests))
    async with _client(target, num_requests) as client:
        started = time.perf_counter()
        due = started
        tasks = []
        for text in texts:
            due += draw.expovariate(rate)
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.append(asyncio.ensure_future(ask(client, target, text, max_tokens)))
        answers = list(await asyncio.gather(*tasks))
        seconds = time.perf_counter() - started
    return summarize(target, f"{rate:g} requests/s", answers, seconds)


def _client(target: Target, num_connections: int) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        base_url=target.url,
        headers=target.headers,
        timeout=TIMEOUT_SECONDS,
        limits=httpx.Limits(max_connections=num_connections),
    )


def summarize(target: Target, load: str, answers: Sequence[Answer], seconds: float) -> Level:
    good = [answer for answer in answers if answer.error is None]
    first = [answer.event_times[0] - answer.sent_at for answer in good]
    whole = [answer.event_times[-1] - answer.sent_at for answer in good]
    between = [
        (answer.event_times[-1] - answer.event_times[0]) / (answer.num_tokens - 1)
        for answer in good
        if answer.num_tokens > 1
    ]
    return Level(
        target=target.name,
        load=load,
        num_requests=len(answers),
        num_errors=len(answers) - len(good),
        seconds=round(seconds, 3),
        tokens_per_second=round(sum(answer.num_tokens for answer in good) / seconds, 1),
        requests_per_second=round(len(good) / seconds, 2),
        time_to_first_token_seconds=_quantiles(first),
        inter_token_seconds=_quantiles(between),
        request_seconds=_quantiles(whole),
        errors=sorted({answer.error for answer in answers if answer.error is not None})[:5],
    )


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    """Median and 95th and 99th percentile; nothing of nothing."""
    if not values:
        return {}
    ordered = sorted(values)
    cuts = {"p50": statistics.median(ordered)}
    for name, share in (("p95", 0.95), ("p99", 0.99)):
        cuts[name] = ordered[min(len(ordered) - 1, int(share * len(ordered)))]
    return {name: round(value, 5) for name, value in cuts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", required=True)
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--body", type=json.loads, default={"ignore_eos": True})
    parser.add_argument("--concurrency", default="1,4,16")
    parser.add_argument("--rate", type=float, help="requests a second; instead of --concurrency")
    parser.add_argument("--num-requests", type=int, default=32, help="of each level")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    target = Target(
        name=arguments.model,
        url=arguments.url,
        model=arguments.model,
        body=arguments.body,
        headers={"Authorization": f"Bearer {arguments.api_key}"},
    )
    common = {"num_requests": arguments.num_requests, "max_tokens": arguments.max_tokens}
    levels = []
    # One request beforehand, not counted: whatever is done at a first request is done.
    asyncio.run(closed_loop(target, concurrency=1, num_requests=1, max_tokens=8, seed=-1))
    if arguments.rate is not None:
        levels.append(
            asyncio.run(open_loop(target, rate=arguments.rate, seed=arguments.seed, **common))
        )
    else:
        for index, concurrency in enumerate(map(int, arguments.concurrency.split(","))):
            seed = arguments.seed + index
            levels.append(
                asyncio.run(closed_loop(target, concurrency=concurrency, seed=seed, **common))
            )
    json.dump([asdict(level) for level in levels], sys.stdout, indent=1)
    print()
    if any(level.num_errors for level in levels):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
