"""What enrichment costs beside what it is made of; as Markdown.

    python -m benchmarks.enrich --home DIR --cora DIR [--parts throughput cache loader] [--rounds 5]

DIR of --home has smollm2-135m and all-minilm-l6-v2 as `lathe pull` leaves them; that of --cora has nodes.jsonl.gz and
edges.csv.gz.

- throughput: POST /v1/enrich for texts against the engine alone, stepped without a pause in this process, on the very
  prompts that enrichment makes of them. They take turns, on new texts in each round; the service is stopped (SIGSTOP)
  while the engine is measured.
- cache: nodes per second and bytes per node of answers for which no engine works, over HTTP. Texts of 700 bytes and
  vectors of 384 numbers are put into the cache by a script that has the identity of the engines that serve.
- loader: an epoch of GraphSAGE on Cora with the client's loader hook and a warm store, against the same without.
"""

import argparse
import asyncio
import contextlib
import datetime
import gzip
import itertools
import json
import os
import platform
import random
import secrets
import signal
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engines.process import set_torch_environment

set_torch_environment()  # before torch

import httpx  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks.peers import Server, lathe, running, signal_all, wait_ready  # noqa: E402
from benchmarks.serve_bench import prompts  # noqa: E402
from compression.registry import ModelRegistry  # noqa: E402
from engines.client import EngineClient  # noqa: E402
from engines.protocol import (  # noqa: E402
    AsyncEngine,
    EmbedRequest,
    EmbedResult,
    EngineInfo,
    GenerateRequest,
    SamplingParams,
    TokenOutput,
)
from graph.arrow_stream import MEDIA_TYPE  # noqa: E402
from graph.cache import EnrichmentCache  # noqa: E402
from graph.catalog import default_catalog  # noqa: E402
from graph.enrich import Enricher  # noqa: E402
from graph.enrich_types import EnrichNode, EnrichRequest  # noqa: E402
from graph.node_text import TextModel  # noqa: E402
from graph.served_text import ServedText  # noqa: E402

RESULTS = Path(__file__).parent / "results"
MODEL, ENCODER = "smollm2-135m", "all-minilm-l6-v2"
PROMPT = "summary@1"
NEW_TOKENS = 48
TEXTS_PER_ROUND = 48
CACHED_NODES = 4096
NODES_PER_REQUEST = 1024
TEXT_BYTES = 700
EPOCHS = 3
HIDDEN = 256
"""The hook costs the same whatever the model does, so its share is larger in a narrower one."""
OWNER = "local"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--cora", type=Path, help="for the loader")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    load_average = os.getloadavg()[0]
    lines = [
        "# Enrichment: what it costs beside what it is made of",
        "",
        f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores; load average before the run:"
        f" {load_average:.1f}. Medians of {options.rounds} interleaved rounds (least-most).",
    ]
    for part in options.parts:
        lines += ["", *PARTS[part](options)]
        print("\n".join(lines[-6:]), flush=True)
    path = RESULTS / f"enrich_{platform.machine()}_{datetime.date.today()}.md"
    path.write_text("\n".join(lines) + "\n")


@contextlib.contextmanager
def serving(home: Path) -> Iterator[tuple[Server, int, Path]]:
    """A service over the models of `home`, with a cache of its own: server, process id and its home."""
    with tempfile.TemporaryDirectory() as scratch:
        own = Path(scratch)
        (own / "models").symlink_to((home / "models").resolve())
        plain = lathe((MODEL,))
        server = replace(
            plain,
            command=(*plain.command, "--model", ENCODER),
            environment={**plain.environment, "LATHE_HOME": str(own)},
        )
        with running(server, own / "log") as process:
            wait_ready(server, process)
            while not (own / "run" / f"{ENCODER}.sock").exists():
                time.sleep(0.1)
            yield server, process.pid, own


def middle(values: list[float], digits: int = 2) -> str:
    ends = f"{min(values):.{digits}f}-{max(values):.{digits}f}"
    return f"{statistics.median(values):.{digits}f} ({ends})"


def throughput(options: argparse.Namespace) -> list[str]:
    """Prompt and generated tokens per second, at the prompts that enrichment makes."""
    from engines.engine import NativeEngine

    folder = ModelRegistry(options.home / "models").get(MODEL).path
    engine = NativeEngine.load(MODEL, folder)
    text = ServedText.load(folder)
    prompt = default_catalog().get(PROMPT)
    alone: list[float] = []
    enriched: list[float] = []
    passages = prompts(0)
    with serving(options.home) as (server, pid, _), httpx.Client(timeout=600) as http:
        for round_number in range(options.rounds + 1):
            texts = list(itertools.islice(passages, TEXTS_PER_ROUND))
            signal_all(pid, signal.SIGSTOP)
            ids = [text.encode_chat(prompt.fill(one)) for one in sorted(texts, key=len)[::-1]]
            first = engine_alone(engine, ids)
            signal_all(pid, signal.SIGCONT)
            second = enrich_over_http(http, server.url, texts)
            if round_number:  # the first one warms up
                alone.append(first)
                enriched.append(second)
    ratios = [b / a for a, b in zip(alone, enriched, strict=True)]
    return [
        "## Throughput",
        "",
        f"{MODEL}, {TEXTS_PER_ROUND} texts of 70 words a round, prompt {PROMPT}, at most {NEW_TOKENS} tokens, greedy;"
        " prompt and generated tokens per second of wall-clock.",
        "",
        "| engine alone | enrichment over HTTP | ratio (mark 0.9) |",
        "|---|---|---|",
        f"| {middle(alone, 0)} | {middle(enriched, 0)} | {middle(ratios)} |",
    ]


def engine_alone(engine: Any, prompt_ids: list[list[int]]) -> float:
    """Tokens per second; as many requests at once as enrichment keeps under way."""
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0)
    requests = iter(
        GenerateRequest(request_id=str(number), token_ids=tuple(ids), params=params)
        for number, ids in enumerate(prompt_ids)
    )
    num_tokens = sum(map(len, prompt_ids))
    started = time.perf_counter()
    for request in itertools.islice(requests, engine.info.max_num_seqs):
        engine.submit(request)
    while engine.has_work():
        for output in engine.step():
            num_tokens += len(output.token_ids) - (output.stop_token_id is not None)
            if output.finish_reason is not None and (following := next(requests, None)) is not None:
                engine.submit(following)
    return num_tokens / (time.perf_counter() - started)


def enrich_over_http(http: httpx.Client, url: str, texts: list[str]) -> float:
    nodes = [{"id": number, "text": one} for number, one in enumerate(texts)]
    body = {"prompt": PROMPT, "model": MODEL, "max_tokens": NEW_TOKENS, "nodes": nodes}
    started = time.perf_counter()
    answer = http.post(f"{url}/v1/enrich", json=body)
    seconds = time.perf_counter() - started
    answer.raise_for_status()
    usage = answer.json()["usage"]
    assert usage["num_by_status"]["ok"] == len(texts), usage
    return float(usage["total_tokens"] / seconds)


def cache(options: argparse.Namespace) -> list[str]:
    """Nodes per second, and bytes of a node on the wire."""
    nodes = [{"id": f"node-{i}", "text": text} for i, text in enumerate(cached_texts())]
    rows = []
    with serving(options.home) as (server, _, own), httpx.Client(timeout=600) as http:
        asyncio.run(fill_cache(options.home, own, nodes))
        graph = {"name": "cached", "nodes": nodes, "edges": []}
        graph_id = http.post(f"{server.url}/v1/graphs", json=graph).json()["id"]
        ids = [node["id"] for node in nodes]
        by_graph = f"{server.url}/v1/graphs/{graph_id}/enrich"
        for name, url, field, given, accept in (
            ("graph, Arrow", by_graph, "node_ids", ids, MEDIA_TYPE),
            ("graph, JSON base64", by_graph, "node_ids", ids, "application/json"),
            ("texts, Arrow", f"{server.url}/v1/enrich", "nodes", nodes, MEDIA_TYPE),
        ):
            speeds, sizes = [], []
            for round_number in range(options.rounds + 1):
                seconds, size = ask_cached(http, url, field, given, accept)
                if round_number:
                    speeds.append(CACHED_NODES / seconds)
                    sizes.append(size / CACHED_NODES)
            rows.append(f"| {name} | {middle(speeds, 0)} | {statistics.median(sizes):.0f} |")
    return [
        "## Answers from the cache",
        "",
        f"{CACHED_NODES} nodes by {NODES_PER_REQUEST} a request, one client; texts of {TEXT_BYTES} bytes and vectors of"
        " 384 numbers in float16; warm.",
        "",
        "| request, answer | nodes/s (mark 5,000) | bytes per node (mark 1,600) |",
        "|---|---|---|",
        *rows,
    ]


def cached_texts() -> Iterator[str]:
    for number, passage in enumerate(itertools.islice(prompts(0), CACHED_NODES)):
        yield f"{number} {passage}"


def ask_cached(
    http: httpx.Client, url: str, field: str, given: list[Any], accept: str
) -> tuple[float, int]:
    """Seconds and bytes of all answers."""
    size = 0
    started = time.perf_counter()
    for start in range(0, len(given), NODES_PER_REQUEST):
        body = {
            "prompt": PROMPT,
            "model": MODEL,
            "embedding_model": ENCODER,
            "return": ["text", "embedding"],
            "embedding_dtype": "float16",
            "encoding_format": "base64",
            field: given[start : start + NODES_PER_REQUEST],
        }
        answer = http.post(url, json=body, headers={"Accept": accept})
        answer.raise_for_status()
        size += len(answer.content)
        if start == 0 and accept != MEDIA_TYPE:
            assert answer.json()["usage"]["num_by_status"]["cached"] == NODES_PER_REQUEST
    return time.perf_counter() - started, size


async def fill_cache(home: Path, own: Path, nodes: list[dict[str, str]]) -> None:
    """By an enricher of this process; what it writes is found by the service's, whose engines are the same."""
    registry = ModelRegistry(home / "models")
    engines: dict[str, AsyncEngine] = {}
    texts: dict[str, TextModel] = {}
    passage = " ".join(itertools.islice(prompts(1), 9))
    for model in (MODEL, ENCODER):
        client = await EngineClient.connect(own / "run" / f"{model}.sock")
        texts[model] = ServedText.load(registry.get(model).path)
        engines[model] = Script(client.info, texts[model], passage)
        await client.aclose()

    async def engine_for(model: str, param: str) -> AsyncEngine:
        return engines[model]

    async def text_for(model: str, param: str) -> TextModel:
        return texts[model]

    kept = EnrichmentCache(own / "cache.db")
    enricher = Enricher(engine_for=engine_for, text_for=text_for, cache=kept)
    await enricher.enrich(
        EnrichRequest(
            nodes=tuple(EnrichNode(id=node["id"], text=node["text"]) for node in nodes),
            prompt=default_catalog().get(PROMPT),
            model=MODEL,
            embedding_model=ENCODER,
            outputs=frozenset({"text", "embedding"}),
            tenant=OWNER,
        )
    )
    kept.close()


@dataclass
class Script:
    """Answers at once: `TEXT_BYTES` of text, or a random vector."""

    info: EngineInfo
    text: TextModel
    passage: str

    async def generate(self, request: GenerateRequest) -> Any:
        passage = f"{secrets.token_hex(4)} {self.passage}"[:TEXT_BYTES]
        return self._outputs(request, self.text.encode_text(passage))

    async def _outputs(
        self, request: GenerateRequest, ids: list[int]
    ) -> AsyncIterator[TokenOutput]:
        yield TokenOutput(
            request_id=request.request_id, token_ids=tuple(ids), finish_reason="length"
        )

    async def embed(self, request: EmbedRequest) -> EmbedResult:
        vectors = np.random.default_rng(0).standard_normal((len(request.token_ids), 384))
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return EmbedResult(dim=384, vectors=vectors.astype("<f4").tobytes(), num_tokens=1)

    async def score(self, request: Any) -> Any:
        raise NotImplementedError

    async def sleep(self) -> None:
        raise NotImplementedError

    async def wake(self) -> None:
        raise NotImplementedError

    async def stats(self) -> Any:
        raise NotImplementedError


def loader(options: argparse.Namespace) -> list[str]:
    """Seconds of epochs, with the hook and without, batch by batch in turns."""
    import torch
    from lathe_client import EnrichmentStore
    from lathe_client.prefetch import Prefetcher
    from lathe_client.pyg import CsrSampler, EnrichHook, SeedSampler
    from torch_geometric.data import Data
    from torch_geometric.loader import NodeLoader
    from torch_geometric.nn import GraphSAGE

    assert options.cora is not None, "--parts loader needs --cora"
    labels, edge_index = load_cora(options.cora)
    num_nodes = len(labels)
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((num_nodes, 384)).astype(np.float32)
    data = Data(
        x=torch.from_numpy(vectors), edge_index=torch.from_numpy(edge_index), y=torch.from_numpy(labels)
    )  # fmt: skip
    seeds = torch.arange(num_nodes)
    torch.manual_seed(0)
    model = GraphSAGE(384, HIDDEN, 2, int(labels.max()) + 1)
    optimizer = torch.optim.Adam(model.parameters())

    def never(indices: Any) -> Any:
        raise AssertionError("a warm store needs nothing")

    def train(batches: Iterator[Any], name: str) -> Any:
        """Seconds of one batch, and seconds of CPU."""
        started, cpu_started = time.perf_counter(), time.process_time()
        batch = next(batches)
        optimizer.zero_grad()
        out = model(batch[name], batch.edge_index)[: batch.batch_size]
        loss: Any = torch.nn.functional.cross_entropy(out, batch.y[: batch.batch_size])
        loss.backward()
        optimizer.step()
        return np.array([time.perf_counter() - started, time.process_time() - cpu_started])

    bare: list[Any] = []
    hooked: list[Any] = []
    with tempfile.TemporaryDirectory() as scratch:
        store = EnrichmentStore(
            Path(scratch) / "vectors", num_nodes=num_nodes, dim=384, encoder=ENCODER
        )
        store.write(np.arange(num_nodes), vectors.astype(np.float16))
        with Prefetcher(store, never) as prefetcher:
            common: dict[str, Any] = {"input_nodes": seeds, "batch_size": 128}
            plain = NodeLoader(
                data, CsrSampler(data.edge_index, num_nodes, [10, 5]), shuffle=True, **common
            )
            enriching = NodeLoader(
                data,
                CsrSampler(data.edge_index, num_nodes, [10, 5]),
                sampler=SeedSampler(seeds, prefetcher),
                transform=EnrichHook(store, prefetcher),
                **common,
            )
            for round_number in range(EPOCHS * options.rounds + 1):
                sides = [("x", iter(plain)), ("x_enriched", iter(enriching))]
                seconds = {name: np.zeros(2) for name, _ in sides}
                for _ in range(len(plain)):
                    for name, batches in sides:
                        seconds[name] += train(batches, name)
                    sides.reverse()
                if round_number:
                    bare.append(seconds["x"])
                    hooked.append(seconds["x_enriched"])
    rows = []
    for name, number in (("wall-clock", 0), ("CPU", 1)):
        without, with_hook = [one[number] for one in bare], [one[number] for one in hooked]
        added = [100 * (b / a - 1) for a, b in zip(without, with_hook, strict=True)]
        total = 100 * (sum(with_hook) / sum(without) - 1)
        rows.append(
            f"| {name} | {middle(without, 3)} | {middle(with_hook, 3)} | {middle(added, 1)} | {total:.1f} |"
        )
    return [
        "## Loader hook",
        "",
        f"GraphSAGE, 2 layers of {HIDDEN}, Cora, batches of 128 seeds, 10 and 5 neighbours; {len(bare)} epochs of"
        " each, by batches in turns.",
        "",
        "| seconds | an epoch without | with the hook | added, % | added to all, % (mark 5) |",
        "|---|---|---|---|---|",
        *rows,
    ]


def load_cora(folder: Path) -> tuple[Any, Any]:
    """Labels, and edges in both directions."""
    with gzip.open(folder / "nodes.jsonl.gz", "rt") as file:
        labels = np.array([json.loads(line)["label"] for line in file])
    with gzip.open(folder / "edges.csv.gz", "rt") as file:
        ends = np.loadtxt(file, delimiter=",", skiprows=1, usecols=(0, 1), dtype=np.int64).T
    return labels, np.concatenate([ends, ends[::-1]], axis=1)


PARTS = {"throughput": throughput, "cache": cache, "loader": loader}


if __name__ == "__main__":
    random.seed(0)
    main()
