"""Whether judged neighbours are better ones: the share of chosen neighbours with their centre's label; as Markdown.

    lathe up &
    python -m benchmarks.sampling --cora DIR [--url http://127.0.0.1:8000] [--runs embed:900 llm_pair:120]

A run is a scorer and the number of first nodes that it judges for. DIR has nodes.jsonl.gz and edges.csv.gz. All labels
are used to look at the result; the scorers see texts only. Nodes with at most FANOUT neighbours choose nothing and are
left out. Noise 100 drowns every score: a uniform sample.
"""

import argparse
import datetime
import gzip
import json
import platform
from pathlib import Path
from typing import Any

import httpx

FANOUT = 3
NOISES = (0.0, 0.02, 0.1, 100.0)
NODES_PER_REQUEST = 30
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--cora", type=Path, required=True)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--runs", nargs="+", default=["embed:900", "llm_rank:120", "llm_pair:120"])
    args = parser.parse_args()
    graph, labels = read_cora(args.cora)
    rows = []
    with httpx.Client(base_url=args.url, timeout=3600) as client:
        key = {"Idempotency-Key": f"benchmarks.sampling {len(labels)}"}
        made = client.post("/v1/graphs", json=graph, headers=key).raise_for_status().json()
        for run in args.runs:
            scorer, _, number = run.partition(":")
            node_ids = [node["id"] for node in graph["nodes"][: int(number)]]
            for noise in NOISES:
                rows.append(measure(client, made["id"], node_ids, labels, scorer, noise))
                print(rows[-1], flush=True)
    date = datetime.date.today().isoformat()
    page = RESULTS / f"sampling_cora_{platform.machine()}_{date}.md"
    page.write_text(report(rows, date))
    print(page)


def read_cora(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    with gzip.open(folder / "nodes.jsonl.gz", "rt") as lines:
        nodes = [json.loads(line) for line in lines]
    with gzip.open(folder / "edges.csv.gz", "rt") as lines:
        edges = [line.strip().split(",") for line in lines][1:]
    labels = {str(node["id"]): node["label_name"] for node in nodes}
    texts = [{"id": str(node["id"]), "text": node["text"]} for node in nodes]
    return {"name": "cora", "nodes": texts, "edges": edges}, labels


def measure(
    client: httpx.Client,
    graph_id: str,
    node_ids: list[str],
    labels: dict[str, str],
    scorer: str,
    noise: float,
) -> dict[str, Any]:
    equal: list[bool] = []
    num_judged = 0
    for first in range(0, len(node_ids), NODES_PER_REQUEST):
        body = {
            "node_ids": node_ids[first : first + NODES_PER_REQUEST],
            "fanout": FANOUT,
            "noise": noise,
            "scorer": scorer,
        }
        answer = client.post(f"/v1/graphs/{graph_id}/sample", json=body).raise_for_status().json()
        for item in answer["data"]:
            if item["status"] != "ok":
                raise SystemExit(f"{item['node_id']}: {item['error']}")
            num_judged += sum(n["score"] is not None for n in [*item["kept"], *item["dropped"]])
            equal += [
                labels[kept["node_id"]] == labels[item["node_id"]]
                for kept in item["kept"]
                if kept["chosen_by"] != "all"
            ]
    return {
        "scorer": scorer,
        "nodes": len(node_ids),
        "noise": noise,
        "judged": num_judged,
        "chosen": len(equal),
        "equal": sum(equal) / len(equal),
    }


def report(rows: list[dict[str, Any]], date: str) -> str:
    lines = [
        f"# Judged neighbours on Cora, {date}",
        "",
        f"{platform.machine()}, `python -m benchmarks.sampling --cora DIR`, fanout {FANOUT},",
        "SmolLM2-135M-Instruct and all-MiniLM-L6-v2. Noise 100 is a uniform sample.",
        "",
        "| scorer | first nodes | noise | judged | chosen | with their centre's label |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['scorer']} | {r['nodes']} | {r['noise']:g} | {r['judged']} | {r['chosen']} | {100 * r['equal']:.1f} % |"
        for r in rows
    ]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
