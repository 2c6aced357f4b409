"""Seconds and memory of loading a large graph from Parquet files: a million nodes and ten million edges; as Markdown.

    python -m benchmarks.graph_store --work DIR [--nodes 1000000] [--edges 10000000]

Each kind of node id is loaded in a process of its own, by what POST /v1/graphs calls.
"""

import argparse
import datetime
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from graph.store import GraphStore
from graph.upload import read_columns

RESULTS = Path(__file__).parent / "results"
KINDS = ("int64", "string")
TEXT_CHARACTERS = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--nodes", type=int, default=1_000_000)
    parser.add_argument("--edges", type=int, default=10_000_000)
    parser.add_argument(
        "--load", choices=KINDS, help="Load the files that are in --work; print a line."
    )
    arguments = parser.parse_args()
    if arguments.load:
        print(json.dumps(load(arguments.work, arguments.load)))
        return
    arguments.work.mkdir(parents=True, exist_ok=True)
    rows = []
    for kind in KINDS:
        write(arguments.work, kind, arguments.nodes, arguments.edges)
        command = [
            sys.executable,
            "-m",
            "benchmarks.graph_store",
            "--work",
            str(arguments.work),
            "--load",
            kind,
        ]
        run = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
        rows.append(json.loads(run.stdout))
        print(rows[-1], flush=True)
    path = RESULTS / f"graph_store_{platform.machine()}_{datetime.date.today()}.md"
    path.write_text("\n".join(page(rows, arguments)) + "\n")


def write(work: Path, kind: str, num_nodes: int, num_edges: int) -> None:
    """Edges are drawn with replacement, so a few are self-loops or duplicates."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(0)
    words = rng.integers(97, 123, (1_000, TEXT_CHARACTERS), dtype=np.uint8)
    texts = [bytes(row).decode() for row in words]
    ids = pa.array(rng.permutation(num_nodes))
    ends = [ids.take(pa.array(rng.integers(0, num_nodes, num_edges))) for _ in range(2)]
    if kind == "string":
        ids, *ends = (array.cast(pa.string()) for array in (ids, *ends))
    nodes = {"id": ids, "text": pa.array(texts[i % len(texts)] for i in range(num_nodes))}
    pq.write_table(pa.table(nodes), work / f"{kind}-nodes.parquet")
    pq.write_table(pa.table({"source": ends[0], "target": ends[1]}), work / f"{kind}-edges.parquet")


def load(work: Path, kind: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=work) as folder:
        store = GraphStore(Path(folder))
        started = time.monotonic()
        with (
            (work / f"{kind}-nodes.parquet").open("rb") as nodes,
            (work / f"{kind}-edges.parquet").open("rb") as edges,
        ):
            columns = read_columns(nodes, edges)
        read = time.monotonic()
        info, _ = store.create("graph-1", columns, name="g", owner="a", request_hash="hash")
        stored = time.monotonic()
        graph = store.get("graph-1", "a")
        degree = int(graph.degrees.max())
        opened = time.monotonic()
    status = Path("/proc/self/status").read_text()
    (peak,) = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")]
    return {
        "ids": kind,
        "nodes": info.num_nodes,
        "edges": info.num_edges,
        "read": read - started,
        "store": stored - read,
        "open": opened - stored,
        "max_degree": degree,
        "peak_gib": int(peak) / 2**20,
        "disk_gib": info.num_bytes / 2**30,
    }


def page(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> list[str]:
    lines = [
        "# Loading a large graph",
        "",
        f"{datetime.date.today()}, {platform.machine()}, numpy {np.__version__}. Command: `python -m"
        f" benchmarks.graph_store --work DIR --nodes {arguments.nodes} --edges {arguments.edges}`."
        f" Texts of {TEXT_CHARACTERS} characters, random edges; from Parquet files to a stored graph, then"
        " opened. Peak memory is the process's high-water mark.",
        "",
        "| node ids | nodes | distinct edges | read, s | check and store, s | open, s | peak, GiB | on disk, GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        seconds = " | ".join(f"{row[what]:.2f}" for what in ("read", "store", "open"))
        lines.append(
            f"| {row['ids']} | {row['nodes']:,} | {row['edges']:,} | {seconds} | {row['peak_gib']:.2f} |"
            f" {row['disk_gib']:.2f} |"
        )
    return lines


if __name__ == "__main__":
    main()
