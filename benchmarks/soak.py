"""A service under mixed load for as long as one likes: what fails, how slow it gets, and whether memory grows.

    python -m benchmarks.soak --seconds 1800

Starts `lathe up` on a free port over the models of LATHE_HOME (or `--home`), and works it with clients that chat
(whole and streamed, half with a shared beginning), ask for JSON, embed, enrich (some of it cached), run batches and
enrichment jobs, cancel half of those, leave in the middle of a stream, and send what must be refused. Before the time
begins, prompts fill the KV cache, and made-up words the tokenizer's. Every answer that its client does not expect is
counted by its class, and makes the exit status 1. The resident memory of each long-lived process is read every few
seconds; its slope is that of a least-squares line through all but the first fifth. Prints Markdown.
"""

import argparse
import asyncio
import itertools
import json
import os
import platform
import random
import statistics
import string
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.serve_bench import prompts
from benchmarks.service import running_service
from benchmarks.startup import free_port
from service.settings import DEFAULT_EMBEDDING_MODEL, DEFAULT_MODEL, Settings

SAMPLE_SECONDS = 5.0
POLL_SECONDS = 0.5
TIMEOUT_SECONDS = 600.0
JOB_SECONDS = 1800.0
WARM_UP = 0.2
"""Share of the samples that come before the slope."""
NUM_LINES = 16
NUM_NODES = 8
FILL_PASSAGES = 24
FILL_TOKENS = 100_000
"""2 GiB, the KV cache on a CPU, hold 93,206 tokens of SmolLM2-135M."""
FILL_WORDS = 12_000
"""tokenizers keeps how it split 10,000 words."""
JSON_SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer"}},
    "required": ["name", "age"],
}
BAD_REQUESTS: tuple[tuple[str, str, bytes, int], ...] = (
    ("POST", "/v1/chat/completions", b"{", 400),
    ("POST", "/v1/chat/completions", b'{"model": "MODEL", "messages": []}', 400),
    ("POST", "/v1/completions", b'{"model": "no-such-model", "prompt": "a"}', 404),
    ("POST", "/v1/completions", b'{"model": "../../etc/passwd", "prompt": "a"}', 404),
    ("POST", "/v1/completions", b'{"model": "MODEL", "prompt": "a", "melt": 1}', 400),
    ("POST", "/v1/completions", b'{"model": "MODEL", "prompt": "a", "max_tokens": 1000000}', 400),
    ("POST", "/v1/completions", b'{"model": "MODEL", "prompt": "a", "temperature": NaN}', 400),
    ("POST", "/v1/embeddings", b'{"model": "MODEL", "input": []}', 400),
    ("POST", "/v1/enrich", b'{"prompt": "no-such", "nodes": [{"id": 1, "text": ""}]}', 404),
    ("POST", "/v1/jobs", b'{"type": "melt"}', 400),
    ("GET", "/v1/jobs/job-none", b"", 404),
    ("GET", "/v1/batches/..%2f..%2fetc", b"", 404),
    ("DELETE", "/v1/completions", b"", 405),
)
Client = Callable[["Soak", random.Random], Awaitable[str]]
"""Does one thing; returns what it was called and how it ended, as `kind`. Raises: UnexpectedError."""


class UnexpectedError(Exception):
    """An answer that the client did not expect; its text is the class it is counted under."""


class Soak:
    """What the clients share: the service, and what they saw of it."""

    def __init__(self, url: str) -> None:
        self.http = httpx.AsyncClient(
            base_url=url,
            timeout=TIMEOUT_SECONDS,
            limits=httpx.Limits(max_connections=100),
        )
        self.ends_at = 0.0
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.unexpected: Counter[tuple[str, str]] = Counter()
        self._passages = prompts(0)

    @property
    def is_over(self) -> bool:
        return time.monotonic() >= self.ends_at

    def passage(self, num_words: int = 40) -> str:
        return " ".join(next(self._passages).split()[:num_words])

    async def post(self, path: str, body: Mapping[str, Any], *expected: int) -> Any:
        response = await self.http.post(path, json=body)
        check(response, *expected)
        return response.json()

    async def work(self, kind: str, client: Client, seed: int) -> None:
        """One client, until the end."""
        draw = random.Random(seed)
        while not self.is_over:
            began = time.perf_counter()
            try:
                outcome = await client(self, draw)
            except UnexpectedError as error:
                self.unexpected[kind, str(error)] += 1
                await asyncio.sleep(POLL_SECONDS)
            except httpx.HTTPError as error:
                self.unexpected[kind, type(error).__name__] += 1
                await asyncio.sleep(POLL_SECONDS)
            else:
                self.outcomes[kind, outcome] += 1
                self.seconds[kind].append(time.perf_counter() - began)


def check(response: httpx.Response, *expected: int) -> None:
    """503 with Retry-After is how overload is told; anybody may get it."""
    if response.status_code in expected:
        return
    try:
        error = response.json()["error"]
        told = f"{response.status_code} {error['code']}: {error['message'][:80]}"
    except (ValueError, KeyError, TypeError):
        told = f"{response.status_code} without an error object"
    if response.status_code == 503 and "retry-after" in response.headers:
        told = f"503 with Retry-After, {told}"
    raise UnexpectedError(told)


async def fill_kv_cache(soak: Soak) -> None:
    """Have every block of the KV cache used once. Its memory is taken when it is written to, which is no leak."""

    num_tokens = 0
    while num_tokens < FILL_TOKENS:
        prompt = " ".join(soak.passage() for _ in range(FILL_PASSAGES))
        body = {"model": DEFAULT_MODEL, "prompt": prompt, "max_tokens": 1}
        usage = (await soak.post("/v1/completions", body, 200))["usage"]
        num_tokens += usage["prompt_tokens"]


async def fill_tokenizer(soak: Soak) -> None:
    """Have it meet as many words as it remembers. Its cache takes memory word by word, and then no more: no leak."""
    draw = random.Random(0)
    words = ("".join(draw.choices(string.ascii_lowercase, k=9)) for _ in range(FILL_WORDS))
    await soak.post("/v1/tokenize", {"model": DEFAULT_MODEL, "prompt": " ".join(words)}, 200)


async def chat(soak: Soak, draw: random.Random) -> str:
    shared = draw.random() < 0.5
    system = "You answer in one short sentence. " * (8 if shared else 1)
    messages = [
        {"role": "system", "content": system},
        {"role": "user", "content": soak.passage()},
    ]
    body: dict[str, Any] = {
        "model": DEFAULT_MODEL,
        "messages": messages,
        "max_tokens": draw.randint(1, 48),
        "seed": draw.randrange(1000),
    }
    kind = draw.choice(["whole", "streamed", "json"])
    if kind == "json":
        schema = {"name": "person", "schema": JSON_SCHEMA}
        body |= {"response_format": {"type": "json_schema", "json_schema": schema}}
        body["max_tokens"] = 64
    if kind != "streamed":
        answer = await soak.post("/v1/chat/completions", body, 200)
        choice = answer["choices"][0]
        if kind == "json" and choice["finish_reason"] == "stop":
            json.loads(choice["message"]["content"])
        return kind
    path = "/v1/chat/completions"
    last = ""
    async with soak.http.stream("POST", path, json=body | {"stream": True}) as response:
        if response.status_code != 200:
            await response.aread()
            check(response, 200)
        async for line in response.aiter_lines():
            last = line or last
    if last != "data: [DONE]":
        raise UnexpectedError(f"a stream ended with {last[:80]!r}")
    return kind


async def leave(soak: Soak, draw: random.Random) -> str:
    """Begin to read, and go."""
    body = {
        "model": DEFAULT_MODEL,
        "prompt": soak.passage(),
        "max_tokens": 400,
        "ignore_eos": True,
        "stream": True,
    }
    num_lines = draw.randint(1, 12)
    async with soak.http.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            await response.aread()
            check(response, 200)
        lines = response.aiter_lines()
        for _ in range(num_lines):
            await anext(lines)
    return "left"


async def embed(soak: Soak, draw: random.Random) -> str:
    texts = [soak.passage() for _ in range(draw.randint(1, 16))]
    body = {"model": DEFAULT_EMBEDDING_MODEL, "input": texts}
    answer = await soak.post("/v1/embeddings", body, 200)
    if len(answer["data"]) != len(texts):
        raise UnexpectedError("vectors are missing")
    return "embedded"


def nodes(soak: Soak, draw: random.Random) -> list[dict[str, Any]]:
    """Half of them from a small set, which the cache comes to know."""
    texts = [soak.passage() if i % 2 else f"thing {draw.randrange(50)}" for i in range(NUM_NODES)]
    return [{"id": index, "text": text} for index, text in enumerate(texts)]


async def enrich(soak: Soak, draw: random.Random) -> str:
    body: dict[str, Any] = {"prompt": "summary@1", "nodes": nodes(soak, draw), "max_tokens": 24}
    body["return"] = ["text", "embedding"]
    answer = await soak.post("/v1/enrich", body, 200)
    failed = [row["status"] for row in answer["data"] if row["status"] == "failed"]
    if failed:
        raise UnexpectedError(f"{len(failed)} enriched rows failed")
    return "enriched"


async def refuse(soak: Soak, draw: random.Random) -> str:
    method, path, body, expected = draw.choice(BAD_REQUESTS)
    content = body.replace(b"MODEL", DEFAULT_MODEL.encode())
    headers = {"content-type": "application/json"} if body else {}
    response = await soak.http.request(method, path, content=content, headers=headers)
    check(response, expected)
    await asyncio.sleep(0.1)
    return f"refused with {expected}"


async def job(soak: Soak, draw: random.Random) -> str:
    """A batch or an enrichment job, from its upload to its end; half of them cancelled somewhere."""
    is_batch = draw.random() < 0.5
    purpose = "batch" if is_batch else "enrich"
    if is_batch:
        bodies = [
            {"model": DEFAULT_MODEL, "prompt": soak.passage(), "max_tokens": draw.randint(1, 24)}
            for _ in range(NUM_LINES)
        ]
        lines: list[dict[str, Any]] = [
            {"custom_id": str(index), "method": "POST", "url": "/v1/completions", "body": body}
            for index, body in enumerate(bodies)
        ]
    else:
        lines = nodes(soak, draw)
    content = "".join(json.dumps(line) + "\n" for line in lines)
    upload = await soak.http.post(
        "/v1/files", data={"purpose": purpose}, files={"file": ("in.jsonl", content)}
    )
    check(upload, 201)
    file_id = upload.json()["id"]
    if is_batch:
        batch = {"input_file_id": file_id, "endpoint": "/v1/completions"}
        batch |= {"completion_window": "24h"}
        job_id = (await soak.post("/v1/batches", batch, 201))["id"]
    else:
        asked = {"type": "enrich", "file": file_id, "prompt": "summary@1", "max_tokens": 24}
        job_id = (await soak.post("/v1/jobs", asked, 201))["id"]
    if draw.random() < 0.5:
        await asyncio.sleep(draw.uniform(0, 10))
        await soak.post(f"/v1/jobs/{job_id}/cancel", {}, 200, 409)
    status = await job_end(soak, job_id)
    if status == "failed":
        raise UnexpectedError(f"a {purpose} job failed")
    if is_batch:
        found = (await soak.http.get(f"/v1/batches/{job_id}")).json()
        if status == "succeeded" and found["request_counts"]["completed"] != NUM_LINES:
            raise UnexpectedError("a finished batch lacks answers")
        for name in ("output_file_id", "error_file_id"):
            if found[name] is not None:
                check(await soak.http.delete(f"/v1/files/{found[name]}"), 200)
    check(await soak.http.delete(f"/v1/files/{file_id}"), 200)
    return f"{purpose} {status}"


async def job_end(soak: Soak, job_id: str) -> str:
    deadline = time.monotonic() + JOB_SECONDS
    while time.monotonic() < deadline:
        response = await soak.http.get(f"/v1/jobs/{job_id}")
        check(response, 200)
        status: str = response.json()["status"]
        if status in ("succeeded", "failed", "cancelled"):
            return status
        await asyncio.sleep(POLL_SECONDS)
    raise UnexpectedError("a job never ended")


async def watch(soak: Soak, draw: random.Random) -> str:
    """What a balancer and Prometheus ask."""
    for path in ("/health", "/ready", "/metrics"):
        check(await soak.http.get(path), 200)
    await asyncio.sleep(1.0)
    return "healthy"


CLIENTS: dict[str, tuple[Client, int]] = {
    "chat": (chat, 4),
    "leave": (leave, 1),
    "embed": (embed, 1),
    "enrich": (enrich, 1),
    "job": (job, 2),
    "refuse": (refuse, 1),
    "watch": (watch, 1),
}
"""What each does, and how many do it."""


class Memory:
    """Resident bytes of the service's long-lived processes, over time."""

    def __init__(self, supervisor: int) -> None:
        self._supervisor = psutil.Process(supervisor)
        self.samples: dict[str, list[tuple[float, int]]] = defaultdict(list)

    def sample(self) -> None:
        now = time.monotonic()
        for process in (self._supervisor, *self._supervisor.children()):
            try:
                words = process.cmdline()
                self.samples[self._name(process, words)].append((now, process.memory_info().rss))
            except psutil.Error:  # it ended in this moment
                continue

    def _name(self, process: psutil.Process, words: Sequence[str]) -> str:
        if process == self._supervisor:
            return "supervisor"
        if "--model-id" in words:
            return f"engine {words[words.index('--model-id') + 1]} ({process.pid})"
        kind = next((kind for kind in ("serve", "worker") if kind in words), "other")
        return f"{'API' if kind == 'serve' else kind} ({process.pid})"

    async def watch(self, soak: Soak) -> None:
        while not soak.is_over:
            self.sample()
            await asyncio.sleep(SAMPLE_SECONDS)


def slope(samples: Sequence[tuple[float, int]]) -> float | None:
    """Bytes a second of all but the first fifth; None of too few."""
    rest = samples[int(len(samples) * WARM_UP) :]
    if len(rest) < 3:
        return None
    times, sizes = zip(*rest, strict=True)
    return statistics.linear_regression(times, sizes).slope


def quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def report(soak: Soak, memory: Memory, seconds: float) -> str:
    lines = [
        f"{seconds:.0f} s, {platform.machine()}, {os.cpu_count()} cores",
        "",
        "| client | done | p50 (s) | p99 (s) | unexpected |",
        "|---|---|---|---|---|",
    ]
    for kind in CLIENTS:
        took = soak.seconds[kind]
        times = f"{quantile(took, 0.5):.3f} | {quantile(took, 0.99):.3f}" if took else "- | -"
        wrong = sum(count for (one, _), count in soak.unexpected.items() if one == kind)
        lines.append(f"| {kind} | {len(took)} | {times} | {wrong} |")
    lines += ["", "| outcome | count |", "|---|---|"]
    lines += [f"| {k}: {o} | {count} |" for (k, o), count in sorted(soak.outcomes.items())]
    lines += [f"| **{k}: {o}** | {count} |" for (k, o), count in sorted(soak.unexpected.items())]
    lines += [
        "",
        "| process | MiB after warm-up | at the end | slope (MiB/h) |",
        "|---|---|---|---|",
    ]
    for name, samples in sorted(memory.samples.items()):
        begin = samples[int(len(samples) * WARM_UP)][1] / 2**20
        per_second = slope(samples)
        grows = "-" if per_second is None else f"{per_second * 3600 / 2**20:+.1f}"
        lines.append(f"| {name} | {begin:.1f} | {samples[-1][1] / 2**20:.1f} | {grows} |")
    return "\n".join(lines)


async def soak_service(url: str, supervisor: int, seconds: float) -> int:
    soak = Soak(url)
    memory = Memory(supervisor)
    numbers = itertools.count()
    async with soak.http, asyncio.TaskGroup() as group:
        await fill_kv_cache(soak)
        await fill_tokenizer(soak)
        began = time.monotonic()
        soak.ends_at = began + seconds
        group.create_task(memory.watch(soak))
        for kind, (client, count) in CLIENTS.items():
            for _ in range(count):
                group.create_task(soak.work(kind, client, next(numbers)))
    print(report(soak, memory, time.monotonic() - began))
    return 1 if soak.unexpected else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=1800.0)
    parser.add_argument("--home", type=Path, default=Settings().home)
    arguments = parser.parse_args()
    with running_service(arguments.home, free_port()) as (url, pid):
        return asyncio.run(soak_service(url, pid, arguments.seconds))


if __name__ == "__main__":
    sys.exit(main())
