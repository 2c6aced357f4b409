"""LLaGA, 60/20/20: node classification and link prediction with a frozen small LLM, by the train_projector job.

    python -m benchmarks.llaga --home DIR --cora DIR --template ho --seeds 0 1 2

DIR of --home has smollm2-135m and all-minilm-l6-v2 as `lathe pull` leaves them; that of --cora has nodes.jsonl.gz and
edges.csv.gz; without --cora, the graph is a part of Debian's packages. The job runs in this process, in a home of its
own that lends the models, and keeps no projector. --vectors keeps what the encoder made of the texts for a later
call. Prints one JSON line per run.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from examples.e_llagnn.graphs import TextGraph, load_cora, load_debian
from graph.llaga.hops import OPERATORS
from graph.llaga.prompts import TASKS
from graph.store import GraphStore
from graph.upload import columns_from_lists
from jobs.context import RunnerContext
from jobs.runners import train_projector
from jobs.spec import parse_spec, spec_json

OWNER = "benchmark"
GRAPH_ID = "graph-benchmark"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--cora", type=Path, help="folder of Cora's files")
    parser.add_argument("--nodes", type=int, default=2000, help="of Debian's graph")
    parser.add_argument("--vectors", type=Path, help="an SQLite file, made if missing")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--embedding-model", default="all-minilm-l6-v2")
    parser.add_argument("--tasks", choices=TASKS, nargs="+", default=[TASKS[0]])
    parser.add_argument("--template", choices=("ho", "nd"), default="ho")
    parser.add_argument("--operator", choices=OPERATORS)
    parser.add_argument("--hops", type=int)
    parser.add_argument("--fanout", type=int)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--weight-decay", type=float, default=0.0)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--max-questions", type=int)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        (home / "models").symlink_to((options.home / "models").resolve())
        if options.vectors is not None and options.vectors.exists():
            shutil.copy(options.vectors, home / "cache.db")
        graph = load_cora(options.cora) if options.cora else load_debian(options.nodes)
        store_graph(graph, home / "graphs")
        for seed in options.seeds:
            print(json.dumps(run(options, seed, home)), flush=True)
        if options.vectors is not None:
            shutil.copy(home / "cache.db", options.vectors)


def store_graph(graph: TextGraph, graphs: Path) -> None:
    """Upload it without its splits; a node's label is the name of its class."""
    columns = columns_from_lists(
        ids=graph.ids,
        texts=graph.texts,
        labels=[graph.classes[label] for label in graph.labels],
        splits=[None] * len(graph),
        edges=[(graph.ids[source], graph.ids[target]) for source, target in graph.edges.tolist()],
    )
    GraphStore(graphs).create(GRAPH_ID, columns, name=graph.name, owner=OWNER, request_hash="")


def run(options: argparse.Namespace, seed: int, home: Path) -> dict[str, Any]:
    """One job from its specification to its report, as a worker's child runs it."""
    template = {
        "kind": options.template,
        "hops": options.hops,
        "operator": options.operator,
        "fanout": options.fanout,
    }
    body = {
        "type": "train_projector",
        "graph": GRAPH_ID,
        "model": options.model,
        "embedding_model": options.embedding_model,
        "output": f"projector-{seed}",
        "template": {name: value for name, value in template.items() if value is not None},
        "tasks": options.tasks,
        "settings": {
            "num_layers": options.layers,
            "learning_rate": options.learning_rate,
            "weight_decay": options.weight_decay,
            "epochs": options.epochs,
            "batch_size": options.batch_size,
            "seed": seed,
            "dtype": options.dtype,
        },
        "max_questions": options.max_questions,
    }
    context = RunnerContext(
        job_id=f"job-{seed}",
        attempt=1,
        owner=OWNER,
        spec=spec_json(parse_spec(body)),
        folder=home / "jobs" / str(seed),
        home=home,
        send=tell,
    )
    context.folder.mkdir(parents=True)
    report = train_projector.run(context)["report"]
    return {"seed": seed, "threads": torch.get_num_threads(), **report}


def tell(message: dict[str, Any]) -> None:
    """What the job says goes to standard error."""
    if "message" in message:
        print(message["message"], file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
