"""Seconds and memory of selecting a tenth of a large graph's nodes, by every strategy; as Markdown.

    python -m benchmarks.selection --work DIR [--nodes 1000000] [--edges 10000000] [--dim 64] [--clusters 40]

Edges are random, which is the slowest case of label propagation: there are no communities to find.
"""

import argparse
import datetime
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from graph.selection.request import SelectRequest
from graph.selection.select import select_nodes
from graph.store import Graph, GraphColumns, GraphStore

RESULTS = Path(__file__).parent / "results"
NUM_CLASSES = 40
TEXT = "A text of about a hundred characters, which is the length of a title and half a sentence. "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--nodes", type=int, default=1_000_000)
    parser.add_argument("--edges", type=int, default=10_000_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--clusters", type=int, default=40)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        graph = store(Path(folder), arguments)
        rows = [(name, measure(graph, body), peak_gib()) for name, body in requests(arguments)]
    path = RESULTS / f"selection_{platform.machine()}_{datetime.date.today()}.md"
    path.write_text("\n".join(page(rows, arguments)) + "\n")


def store(folder: Path, arguments: argparse.Namespace) -> Graph:
    import pyarrow as pa

    rng = np.random.default_rng(0)
    num_nodes, dim = arguments.nodes, arguments.dim
    numbers = rng.standard_normal(num_nodes * dim, dtype=np.float32)
    columns = GraphColumns(
        ids=pa.array(np.arange(num_nodes)),
        texts=pa.array([TEXT] * num_nodes),
        labels=pa.array(rng.integers(0, NUM_CLASSES, num_nodes)),
        splits=pa.array(["train"] * num_nodes),
        features=pa.FixedSizeListArray.from_arrays(pa.array(numbers), dim),
        sources=pa.array(rng.integers(0, num_nodes, arguments.edges)),
        targets=pa.array(rng.integers(0, num_nodes, arguments.edges)),
    )
    graphs = GraphStore(folder)
    graphs.create("graph-1", columns, name="g", owner="a", request_hash="hash")
    return graphs.get("graph-1", "a")


def requests(arguments: argparse.Namespace) -> list[tuple[str, dict[str, Any]]]:
    clusters = {"strategy": "clustering_distance", "num_clusters": arguments.clusters}
    mix = [{"strategy": name, "weight": 1.0} for name in ("degree", "text_length", "random")]
    names = ("random", "degree", "text_length", "pagerank")
    return [
        *((name, {"strategy": name}) for name in names),
        ("mix of degree, text_length, random", {"strategy": "mix", "mix": mix}),
        ("degree, quotas per class", {"strategy": "degree", "quotas": {"per": "class"}}),
        (f"clustering_distance, {arguments.clusters} clusters", clusters),
        ("degree, quotas per community", {"strategy": "degree", "quotas": {"per": "community"}}),
    ]


def measure(graph: Graph, body: dict[str, Any]) -> float:
    request = SelectRequest.model_validate({"budget": {"fraction": 0.1}, **body})
    started = time.monotonic()
    selection = select_nodes(graph, request)
    seconds = time.monotonic() - started
    print(f"{body}: {len(selection.indices)} nodes, {seconds:.2f} s", flush=True)
    return seconds


def peak_gib() -> float:
    status = Path("/proc/self/status").read_text()
    (peak,) = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")]
    return int(peak) / 2**20


def page(rows: list[tuple[str, float, float]], arguments: argparse.Namespace) -> list[str]:
    load = os.getloadavg()[0]
    return [
        "# Selecting nodes of a large graph",
        "",
        f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, load {load:.1f}, numpy"
        f" {np.__version__}. Command: `python -m benchmarks.selection --work DIR --nodes {arguments.nodes}"
        f" --edges {arguments.edges} --dim {arguments.dim} --clusters {arguments.clusters}`. A tenth of the nodes,"
        f" random edges, {NUM_CLASSES} classes. Peak memory is the process's high-water mark so far; the first row's"
        " is that of making the graph.",
        "",
        "| selection | seconds | peak, GiB |",
        "|---|---|---|",
        *(f"| {name} | {seconds:.2f} | {gib:.2f} |" for name, seconds, gib in rows),
    ]


if __name__ == "__main__":
    main()
