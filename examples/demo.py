"""What Lathe does, in one run: a chat, a compression job, the compressed model, an enriched graph, and the metrics.

Uses the service at LATHE_URL (default http://127.0.0.1:8000), or starts one of its own there and stops it again.
The model that it makes is deleted at the end.
"""

import ipaddress
import json
import os
import subprocess
import sys
import time
import uuid
from typing import Any

import httpx
from tqdm import tqdm

from graph.debian import load_graph

URL = os.environ.get("LATHE_URL", "http://127.0.0.1:8000")
MODEL = "smollm2-135m"
NUM_NODES = 200
NODES_PER_CALL = 20
START_SECONDS = 300
HTTP_PORT = 80


def main() -> None:
    key = os.environ.get("LATHE_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with httpx.Client(base_url=URL, headers=headers, timeout=600) as client:
        own = None if answers(client) else start(client.base_url)
        try:
            if own is not None:
                wait_until_ready(client, own)
            show(client)
        finally:
            if own is not None:
                own.terminate()
                own.wait()


def show(client: httpx.Client) -> None:
    before = metrics(client)
    show_chat(client, MODEL)
    compressed = show_compression(client)
    try:
        show_load(client, compressed)
        show_chat(client, compressed)
        show_graph(client)
        show_metrics(before, metrics(client))
    finally:
        delete_model(client, compressed)


def answers(client: httpx.Client) -> bool:
    try:
        return client.get("/ready").status_code == 200
    except httpx.HTTPError:
        return False


def start(url: httpx.URL) -> "subprocess.Popen[bytes]":
    """A service that will answer at a URL of this machine."""
    if url.scheme != "http" or not is_loopback(url.host) or url.path != "/":
        raise SystemExit(f"error: no service at {URL}, and none can be started there")
    print(f"no service at {URL}; starting one", flush=True)
    where = ("--host", url.host, "--port", str(url.port or HTTP_PORT))
    return subprocess.Popen([sys.executable, "-m", "service.cli", "up", *where])


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def wait_until_ready(client: httpx.Client, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + START_SECONDS
    while not answers(client):
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit("error: the service did not start")
        time.sleep(0.5)


def heading(text: str) -> None:
    print(f"\n== {text}")


def show_chat(client: httpx.Client, model: str) -> None:
    heading(f"chat with {model}, streamed")
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "max_tokens": 40,
        "temperature": 0,
        "stream": True,
    }
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line[6:])
                print(chunk["choices"][0]["delta"].get("content", ""), end="", flush=True)
    print()


def show_compression(client: httpx.Client) -> str:
    output = f"{MODEL}-int4-{uuid.uuid4().hex[:6]}"
    heading(f"compress {MODEL} to INT4, groups of 64, as {output}")
    body = {
        "type": "compress",
        "model": MODEL,
        "output": output,
        "recipe": [{"int4": {"group_size": 64, "method": "rtn"}}],
    }
    created = client.post("/v1/jobs", json=body, headers={"Idempotency-Key": output})
    created.raise_for_status()
    job_id = created.json()["id"]
    print(f"job {job_id}")
    follow(client, job_id)
    job = client.get(f"/v1/jobs/{job_id}").json()
    if job["status"] != "succeeded":
        raise SystemExit(f"the job {job['status']}: {job['error']}")
    report = client.get(f"/v1/jobs/{job_id}/artifacts/report.md").text
    totals, _, rest = report.partition("## Matrices")  # more than two hundred rows
    print(totals + rest[rest.index("## How it was measured") :])
    return output


def show_load(client: httpx.Client, model: str) -> None:
    started = time.monotonic()
    client.post(f"/v1/models/{model}/load", params={"wait": "true"}).raise_for_status()
    print(f"{model} loaded in {time.monotonic() - started:.1f} s")


def delete_model(client: httpx.Client, model: str) -> None:
    try:
        client.post(f"/v1/models/{model}/unload")  # refused where it is not loaded
        client.delete(f"/v1/models/{model}").raise_for_status()
        print(f"\n{model} deleted")
    except httpx.HTTPError:
        print(f"\n{model} is still there; to delete it: lathe models delete {model}")


def follow(client: httpx.Client, job_id: str) -> None:
    with (
        client.stream("GET", f"/v1/jobs/{job_id}/events", params={"stream": "true"}) as response,
        tqdm(unit="step") as bar,
    ):
        for line in response.iter_lines():
            if not line.startswith("data: "):
                continue
            event = json.loads(line[6:])
            if event["type"] == "progress":
                bar.total = event["data"]["total"]
                bar.update(event["data"]["step"] - bar.n)
            else:
                bar.write(f"  {event['message']}")


def show_graph(client: httpx.Client) -> None:
    body, origin = load_graph(NUM_NODES * 5)
    heading(f"Debian's package graph ({origin}): {len(body['nodes'])} nodes")
    graph = client.post("/v1/graphs", json=body).raise_for_status().json()
    print(f"{graph['id']}: {graph['num_nodes']} nodes, {graph['num_edges']} edges")
    selection = {"strategy": "pagerank", "budget": {"nodes": NUM_NODES}}
    chosen = client.post(f"/v1/graphs/{graph['id']}/select", json=selection).raise_for_status()
    node_ids = chosen.json()["node_ids"]
    print(f"{len(node_ids)} nodes by PageRank, first {', '.join(map(str, node_ids[:5]))}")
    rows = enrich(client, graph["id"], node_ids)
    for row in rows[:3]:
        print(f"  {row['node_id']}: {row['text']}  [{len(row['embedding'])} numbers]")
    again = enrich(client, graph["id"], node_ids)
    print(f"again: {sum(row['status'] == 'cached' for row in again)} from the cache")
    client.delete(f"/v1/graphs/{graph['id']}").raise_for_status()


def enrich(client: httpx.Client, graph_id: str, node_ids: list[str]) -> list[dict[str, Any]]:
    started = time.monotonic()
    rows: list[dict[str, Any]] = []
    for first in tqdm(range(0, len(node_ids), NODES_PER_CALL), unit="call"):
        body = {
            "node_ids": node_ids[first : first + NODES_PER_CALL],
            "prompt": "summary@1",
            "return": ["text", "embedding"],
            "max_tokens": 24,
        }
        answer = client.post(f"/v1/graphs/{graph_id}/enrich", json=body).raise_for_status()
        rows += answer.json()["data"]
    seconds = time.monotonic() - started
    print(f"{len(rows)} nodes in {seconds:.1f} s, {len(rows) / seconds:.1f} a second")
    return rows


def metrics(client: httpx.Client) -> dict[str, float]:
    values: dict[str, float] = {}
    for line in client.get("/metrics").text.splitlines():
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            values[name] = float(value)
    return values


def show_metrics(before: dict[str, float], after: dict[str, float]) -> None:
    heading("metrics that moved (counters, and what is said of models)")
    for name, value in sorted(after.items()):
        change = value - before.get(name, 0.0)
        if change and (
            name.partition("{")[0].endswith("_total") or name.startswith("lathe_model_")
        ):
            print(f"  {name}  {change:+g}")


if __name__ == "__main__":
    main()
