"""LLaGA on Cora, 60/20/20: node classification and link prediction with a frozen small LLM.

    python -m benchmarks.llaga --home DIR --cora DIR --features FILE.npy --template ho --seeds 0 1 2

DIR of --home has smollm2-135m and all-minilm-l6-v2 as `lathe pull` leaves them; that of --cora has nodes.jsonl.gz and
edges.csv.gz. Link prediction: edges are split 60/20/20 with as many pairs that are no edge; of each pair, the one is
taken out of the graph before the other's template is made, so that no prompt sees its answer. Prints one JSON line per
run; the split is the seed's.
"""

import argparse
import csv
import gzip
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from compression.hf import load_model
from compression.registry import ModelRegistry
from engines.encoder_engine import EncoderEngine
from engines.protocol import EmbedRequest
from graph.llaga.hops import OPERATORS
from graph.llaga.projector import Template, fill_template
from graph.llaga.prompts import LINK_ANSWERS, TASKS, Task, answer_text, build_prompt
from graph.llaga.templates import laplacian_embedding
from graph.store import Graph, GraphStore, Int64s
from graph.upload import columns_from_lists
from training.projector import (
    Examples,
    FrozenReader,
    ProjectorSettings,
    TaskPrompt,
    score_examples,
    train_projector,
)

MAX_TOKENS = 256
BATCH = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--cora", type=Path, required=True)
    parser.add_argument("--features", type=Path, required=True, help="a .npy file, made if missing")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--task", choices=TASKS[:2], default=TASKS[0])
    parser.add_argument("--template", choices=("ho", "nd"), default="ho")
    parser.add_argument("--operator", choices=OPERATORS, default="sym_selfloop")
    parser.add_argument("--hops", type=int)
    parser.add_argument("--fanout", type=int, default=5)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    options.hops = options.hops or (4 if options.template == "ho" else 2)
    registry = ModelRegistry(options.home / "models")
    folder = registry.get(options.model).path
    model = load_model(folder, dtype=getattr(torch, options.dtype))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with tempfile.TemporaryDirectory() as scratch:
        graph, labels, names = load_cora(options.cora, Path(scratch))
        features = embed_texts(registry, graph, options.features)
        for seed in options.seeds:
            print(json.dumps(run(options, seed, model, tokenizer, graph, features, labels, names)))


def load_cora(folder: Path, scratch: Path) -> tuple[Graph, Int64s, list[str]]:
    """The graph, each node's class number and the names of the classes."""
    with gzip.open(folder / "nodes.jsonl.gz", "rt") as file:
        nodes = [json.loads(line) for line in file]
    with gzip.open(folder / "edges.csv.gz", "rt") as file:
        edges = [(int(row["src"]), int(row["dst"])) for row in csv.DictReader(file)]
    labels = np.array([node["label"] for node in nodes])
    found = {node["label"]: node["label_name"].replace("_", " ") for node in nodes}
    columns = columns_from_lists(
        ids=[node["id"] for node in nodes],
        texts=[f"{node['title']}. {node['text']}" for node in nodes],
        labels=[None] * len(nodes),
        splits=[None] * len(nodes),
        edges=edges,
    )
    store = GraphStore(scratch)
    info, _ = store.create("graph-cora", columns, name="cora", owner="me", request_hash="")
    return store.get(info.id, "me"), labels, [found[label] for label in range(len(found))]


def embed_texts(registry: ModelRegistry, graph: Graph, kept: Path) -> Any:
    """MiniLM vectors of all nodes, from the file where they are kept if they are."""
    if kept.is_file():
        return np.load(kept, allow_pickle=False)
    folder = registry.get("all-minilm-l6-v2").path
    tokenizer = AutoTokenizer.from_pretrained(folder)
    engine = EncoderEngine.load("all-minilm-l6-v2", folder)
    texts = graph.texts(np.arange(graph.info.num_nodes))
    ids = [tuple(tokenizer(t, truncation=True, max_length=MAX_TOKENS)["input_ids"]) for t in texts]
    parts = []
    for first in range(0, len(ids), BATCH):
        request = EmbedRequest(request_id="r", token_ids=tuple(ids[first : first + BATCH]))
        result = engine.embed(request)
        parts.append(np.frombuffer(result.vectors, dtype="<f4").reshape(-1, result.dim))
    vectors = np.concatenate(parts)
    np.save(kept, vectors, allow_pickle=False)
    return vectors


def run(
    options: argparse.Namespace,
    seed: int,
    model: Any,
    tokenizer: Any,
    graph: Graph,
    features: Any,
    labels: Int64s,
    names: list[str],
) -> dict[str, Any]:
    started = time.perf_counter()
    task: Task = options.task
    if task == "node_classification":
        order = np.random.default_rng(seed).permutation(graph.info.num_nodes)
        questions, gold = order[:, None], labels[order]
        answers = names
    else:
        questions, gold = link_questions(graph, seed)
        answers = list(LINK_ANSWERS)
    first, second = int(0.6 * len(questions)), int(0.8 * len(questions))
    spans = {
        "train": slice(0, first),
        "val": slice(first, second),
        "test": slice(second, len(questions)),
    }
    answer_ids = [
        (*tokenizer.encode(answer_text(answer), add_special_tokens=False), tokenizer.eos_token_id)
        for answer in answers
    ]
    text = build_prompt(task, names)
    prompt = TaskPrompt(
        before=tuple(tokenizer.encode(text.before)),
        after=tuple(tuple(tokenizer.encode(part)) for part in text.after),
    )
    vectors, is_pad = template_vectors(options, graph, features, questions)

    def part(span: slice) -> Examples:
        return Examples(
            prompt=prompt,
            vectors=lambda numbers: (vectors[span][numbers], is_pad[span][numbers]),
            answers=[answer_ids[label] for label in gold[span]],
        )

    examples = {name: part(span) for name, span in spans.items()}
    settings = ProjectorSettings(
        num_layers=options.layers,
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        epochs=options.epochs,
        batch_size=options.batch_size,
        seed=seed,
    )
    reader = FrozenReader(model)
    prepared = time.perf_counter()
    projector, losses = train_projector(
        reader, [examples["train"]], settings, width=vectors.shape[-1]
    )
    trained = time.perf_counter()
    result = {
        name: round(
            100
            * float(
                (
                    score_examples(reader, projector, examples[name], answer_ids).argmax(1)
                    == gold[spans[name]]
                ).mean()
            ),
            2,
        )
        for name in ("val", "test")
    }
    return {
        "task": task,
        "template": options.template,
        "operator": options.operator if options.template == "ho" else None,
        "fanout": options.fanout if options.template == "nd" else None,
        "hops": options.hops,
        "layers": options.layers,
        "epochs": options.epochs,
        "batch_size": options.batch_size,
        "learning_rate": options.learning_rate,
        "weight_decay": options.weight_decay,
        "seed": seed,
        "dtype": options.dtype,
        "threads": torch.get_num_threads(),
        "num_examples": {name: len(part.answers) for name, part in examples.items()},
        "last_loss": round(float(np.mean(losses[-20:])), 4),
        **result,
        "prepare_seconds": round(prepared - started, 1),
        "train_seconds": round(trained - prepared, 1),
    }


def link_questions(graph: Graph, seed: int) -> tuple[Int64s, Int64s]:
    """All edges and as many pairs that are none, shuffled; 0 is yes, 1 is no."""
    generator = np.random.default_rng(seed)
    edges = {(int(a), int(b)) for a, b in graph.edges}
    others: set[tuple[int, int]] = set()
    while len(others) < len(edges):
        a, b = sorted(generator.integers(0, graph.info.num_nodes, 2).tolist())
        if a != b and (a, b) not in edges:
            others.add((a, b))
    pairs = np.array(sorted(edges) + sorted(others), dtype=np.int64)
    gold = np.repeat([0, 1], len(edges))
    order = generator.permutation(len(pairs))
    flipped = generator.random(len(pairs)) < 0.5
    pairs[flipped] = pairs[flipped, ::-1]
    return pairs[order], gold[order]


def template_vectors(
    options: argparse.Namespace, graph: Graph, features: Any, questions: Int64s
) -> tuple[Any, Any]:
    """Vectors (questions, centres, N, D) and which are PAD; of a pair, each is hidden from the other."""
    template = (
        Template(kind="ho", hops=options.hops, operator=options.operator)
        if options.template == "ho"
        else Template(kind="nd", hops=options.hops, fanout=options.fanout)
    )
    laplacian = laplacian_embedding(options.hops, options.fanout) if template.kind == "nd" else None
    filled = [
        fill_template(
            template,
            graph,
            features,
            questions[:, centre],
            hidden=questions[:, 1 - centre] if questions.shape[1] == 2 else None,
            laplacian=laplacian,
        )
        for centre in range(questions.shape[1])
    ]
    return np.stack([part.vectors for part in filled], 1), np.stack([p.is_pad for p in filled], 1)


if __name__ == "__main__":
    main()
