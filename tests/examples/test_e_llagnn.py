"""The E-LLaGNN example: layer 0 and its dropout by hand, GNNs against dense formulas, gradients against autograd."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lathe_client import EnrichmentStore
from torch.nn import functional

from examples.e_llagnn import report
from examples.e_llagnn.collect import Recipe, halfway
from examples.e_llagnn.graphs import Split, few_labels, load_cora, stratified
from examples.e_llagnn.models import Gnn, build_adjacency, drop_enrichment, mix
from examples.e_llagnn.studies import FEATURE_SCALE, Options, Rows, Run, budgets, read_store
from examples.e_llagnn.train import Task, TrainSettings, train

NUM_NODES = 60
RECIPE = Recipe(prompt="summary@1", model="writer", join="separate", max_tokens=8)


@pytest.fixture
def path_graph() -> torch.Tensor:
    """0 - 1 - 2, and node 3 alone."""
    return torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])


def build_task(seed: int = 0) -> Task:
    """Two classes; a node's features say its class faintly, its neighbours are of its class."""
    random = np.random.default_rng(seed)
    labels = np.arange(NUM_NODES) % 2
    x = random.normal(size=(NUM_NODES, 8)) + 0.5 * labels[:, None]
    ends = random.integers(0, NUM_NODES // 2, size=(200, 2)) * 2 + random.integers(0, 2, (200, 1))
    ends = np.concatenate([ends, ends[:, ::-1]])
    order = random.permutation(NUM_NODES)
    return Task(
        raw_ND=torch.from_numpy(x).float(),
        edge_index_2E=torch.from_numpy(np.unique(ends, axis=0).T.copy()),
        labels_N=torch.from_numpy(labels),
        num_classes=2,
        split=Split(train=order[:20], val=order[20:40], test=order[40:]),
    )


def build_gnn(num_layers: int = 3) -> Gnn:
    torch.manual_seed(1)
    return Gnn("gcn", num_features=3, hidden=4, num_classes=2, num_layers=num_layers, dropout=0.5)


def test_layer_0_is_enriched_where_the_mask_is_set() -> None:
    raw = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    enriched = torch.tensor([[-1.0, -2.0], [-3.0, -4.0], [math.nan, math.nan]])
    mask = torch.tensor([False, True, False])
    assert mix(raw, enriched, mask).tolist() == [[1, 2], [-3, -4], [5, 6]]


def test_enrichment_dropout_takes_some_enriched_nodes_raw_and_never_the_reverse() -> None:
    mask = torch.arange(10_000) % 4 == 0
    kept = drop_enrichment(mask, 0.3, torch.Generator().manual_seed(0))
    assert not (kept & ~mask).any()
    assert float(kept.sum() / mask.sum()) == pytest.approx(0.7, abs=0.03)
    again = drop_enrichment(mask, 0.3, torch.Generator().manual_seed(0))
    assert torch.equal(kept, again)
    assert torch.equal(drop_enrichment(mask, 0.0, torch.Generator()), mask)
    assert not drop_enrichment(mask, 1.0, torch.Generator()).any()


def test_gcn_is_the_normalised_adjacency_with_self_loops(path_graph: torch.Tensor) -> None:
    gnn = build_gnn(1)
    x = torch.randn(4, 3)
    a = torch.eye(4)
    a[[0, 1, 1, 2], [1, 0, 2, 1]] = 1
    d = a.sum(1).rsqrt()
    layer: Any = gnn.layers[0]
    wanted = (d[:, None] * a * d) @ (x @ layer.lin.weight.T) + layer.bias
    torch.testing.assert_close(gnn(x, build_adjacency("gcn", path_graph, 4)), wanted)


def test_sage_averages_the_senders_of_directed_edges() -> None:
    torch.manual_seed(0)
    gnn = Gnn("sage", num_features=3, hidden=4, num_classes=2, num_layers=1, dropout=0.0)
    x = torch.randn(4, 3)
    edges = torch.tensor([[1, 2, 3], [0, 0, 1]])  # 0 hears 1 and 2, 1 hears 3
    heard = torch.stack([(x[1] + x[2]) / 2, x[3], torch.zeros(3), torch.zeros(3)])
    layer: Any = gnn.layers[0]
    wanted = heard @ layer.lin_l.weight.T + layer.lin_l.bias + x @ layer.lin_r.weight.T
    torch.testing.assert_close(gnn(x, build_adjacency("sage", edges, 4)), wanted)


def test_gradient_norms_are_those_of_the_formula(path_graph: torch.Tensor) -> None:
    """Against gradients of the same network written with dense matrices."""
    gnn = build_gnn()
    x, labels = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
    gnn.eval()  # no dropout
    loss = functional.cross_entropy(gnn(x, build_adjacency("gcn", path_graph, 4)), labels)
    loss.backward()  # type: ignore[no-untyped-call]
    a = torch.eye(4)
    a[[0, 1, 1, 2], [1, 0, 2, 1]] = 1
    a = a.sum(1).rsqrt()[:, None] * a * a.sum(1).rsqrt()
    layers: list[Any] = list(gnn.layers)
    weights = [layer.lin.weight.detach().clone().requires_grad_() for layer in layers]
    h = x
    for index, (weight, layer) in enumerate(zip(weights, layers, strict=True)):
        h = a @ h @ weight.T + layer.bias.detach()
        h = h if index == 2 else h.clamp(min=0)
    loss = -(h.log_softmax(1)[torch.arange(4), labels]).mean()
    wanted = [float(g.pow(2).sum().sqrt()) for g in torch.autograd.grad(loss, weights)]
    assert gnn.gradient_norms() == pytest.approx(wanted, rel=1e-4)


def test_llm_free_never_reads_an_enriched_vector() -> None:
    """What the service wrote is NaN: with it every answer is spoiled, without it none."""
    task = build_task()
    spoiled = torch.full_like(task.raw_ND, math.nan)
    trained_without = TrainSettings(epochs=20, enrichment_dropout=1.0)
    mask = torch.ones(NUM_NODES, dtype=torch.bool)
    outcome = train(task, trained_without, lambda: (spoiled, mask))
    raw = train(task, TrainSettings(epochs=20))
    assert outcome.logits_NC.isnan().all()
    assert outcome.gradient_norms == raw.gradient_norms  # dropout 1: the same training
    assert not math.isnan(outcome.llm_free)
    assert raw.with_llm == raw.llm_free


def test_runs_of_one_seed_are_equal_and_enrichment_draws_from_elsewhere() -> None:
    task = build_task()
    first = train(task, TrainSettings(epochs=12, seed=3))
    nobody = torch.zeros(NUM_NODES, dtype=torch.bool)
    second = train(task, TrainSettings(epochs=12, seed=3), lambda: (task.raw_ND, nobody))
    assert torch.equal(first.logits_NC, second.logits_NC)
    other = train(task, TrainSettings(epochs=12, seed=4))
    assert not torch.equal(first.logits_NC, other.logits_NC)


@pytest.mark.parametrize("model", ["gcn", "sage", "gat"])
def test_enriched_vectors_that_say_the_class_are_learnt(model: Any) -> None:
    task = build_task()
    told = task.raw_ND.clone()
    told[:, 0] = 6.0 * task.labels_N - 3.0
    everyone = torch.ones(NUM_NODES, dtype=torch.bool)
    raw = train(task, TrainSettings(model=model, epochs=60))
    outcome = train(task, TrainSettings(model=model, epochs=60), lambda: (told, everyone))
    assert outcome.with_llm == 100.0
    assert outcome.with_llm >= raw.with_llm
    assert len(outcome.gradient_norms) == 2


def test_overlap_trains_until_everything_is_there_and_then_as_long_as_else() -> None:
    task = build_task()
    asked: list[int] = []

    def arriving() -> tuple[torch.Tensor, torch.Tensor]:
        asked.append(len(asked))
        return task.raw_ND, torch.arange(NUM_NODES) < min(len(asked), NUM_NODES // 2)

    outcome = train(
        task, TrainSettings(epochs=12), arriving, is_complete=lambda: len(asked) >= NUM_NODES // 2
    )
    assert outcome.num_epochs == NUM_NODES // 2 + 12 == len(asked)
    shares = [moment.enriched for moment in outcome.moments]
    assert shares == sorted(shares)
    assert shares[0] < shares[-1] == 0.5


def test_a_store_that_is_half_full_gives_the_mask_of_what_is_there(tmp_path: Path) -> None:
    store = EnrichmentStore(tmp_path / "s", num_nodes=5, dim=2, encoder="e", dtype="float32")
    store.write(np.array([1, 4]), np.array([[1.0, 2.0], [3.0, 4.0]], np.float32))
    enriched, mask = read_store(store, np.array([0, 1]))  # 4 is there and was not selected
    assert mask.tolist() == [False, True, False, False, False]
    assert enriched[1].tolist() == [FEATURE_SCALE * 1.0, FEATURE_SCALE * 2.0]


def test_halfway_is_the_bisector() -> None:
    first, second = np.array([[1.0, 0.0]], np.float32), np.array([[0.0, 1.0]], np.float32)
    np.testing.assert_allclose(halfway(first, second), [[0.5**0.5, 0.5**0.5]], rtol=1e-6)


@pytest.mark.parametrize("split", [stratified, few_labels])
def test_splits_cover_every_node_once_and_every_class(split: Any) -> None:
    labels = np.repeat([0, 1, 2], [100, 40, 3])
    parts = split(labels)
    together = np.concatenate([parts.train, parts.val, parts.test])
    assert sorted(together.tolist()) == list(range(143))
    assert set(labels[parts.train]) == {0, 1, 2}
    again = split(labels)
    assert np.array_equal(parts.train, again.train)


def test_few_labels_takes_twenty_or_less_of_a_small_class() -> None:
    labels = np.repeat([0, 1], [100, 10])
    assert np.bincount(labels[few_labels(labels).train]).tolist() == [20, 4]


def test_reads_cora_files(tmp_path: Path) -> None:
    import gzip

    nodes = [
        {
            "id": i,
            "title": f"t{i}",
            "text": f"x{i}",
            "label": i % 2,
            "label_name": f"C_{i % 2}",
            "split": split,
            "split_60_20_20": "train",
        }
        for i, split in enumerate(["train", "val", "test", "none"])
    ]
    with gzip.open(tmp_path / "nodes.jsonl.gz", "wt") as file:
        file.write("\n".join(json.dumps(node) for node in nodes))
    with gzip.open(tmp_path / "edges.csv.gz", "wt") as file:
        file.write("src,dst\n0,1\n2,3\n")
    graph = load_cora(tmp_path)
    assert graph.texts[0] == "t0. x0"
    assert graph.classes == ["C 0", "C 1"]
    assert graph.edges.tolist() == [[0, 1], [2, 3]]
    assert graph.splits["public"].test.tolist() == [2]
    assert graph.splits["60/20/20"].train.tolist() == [0, 1, 2, 3]


def options(**changes: Any) -> Options:
    given: dict[str, Any] = {
        "splits": ("public",),
        "models": ("gcn",),
        "seeds": (0, 1),
        "strategies": ("random", "degree"),
        "budgets": (0.1, 1.0),
        "depths": (2,),
        "recipe": RECIPE,
        "prompts": ("summary@1",),
        "llms": ("writer",),
        "scorers": ("embed",),
        "ablation_budget": 0.2,
    }
    return Options(**{**given, **changes})


def test_a_budget_of_every_node_is_run_once_for_all_strategies() -> None:
    runs = [run for run in budgets(options()) if run.recipe is not None]
    assert sorted((run.budget, run.strategy or "", run.seed) for run in runs) == [
        (0.1, "degree", 0),
        (0.1, "degree", 1),
        (0.1, "random", 0),
        (0.1, "random", 1),
        (1.0, "random", 0),
        (1.0, "random", 1),
    ]


def test_rows_outlive_the_process_and_know_their_studies(tmp_path: Path) -> None:
    run = Run(study="budgets", split="public", seed=0)
    rows = Rows(tmp_path / "rows.json", "a graph")
    rows.add({"key": run.key(), **run.parameters(), "studies": ["budgets"], "with_llm": 1.0})
    later = Rows(tmp_path / "rows.json", "a graph")
    row = later.get(Run(study="depth", split="public", seed=0))
    assert row is not None
    later.join_study(row, "depth")
    assert Rows(tmp_path / "rows.json", "a graph").rows[0]["studies"] == ["budgets", "depth"]
    assert later.get(Run(study="budgets", split="public", seed=1)) is None


def test_tables_pair_each_run_with_the_raw_one_of_its_seed() -> None:
    rows = []
    for seed, raw, enriched in ((0, 80.0, 81.0), (1, 90.0, 90.5)):
        base = Run(study="budgets", split="public", seed=seed)
        for run, accuracy in (
            (base, raw),
            (
                Run(**{**base.parameters(), "study": "budgets", "budget": 0.1,
                       "strategy": "random", "recipe": RECIPE}),
                enriched,
            ),
        ):  # fmt: skip
            more = {
                "studies": ["budgets"],
                "with_llm": accuracy,
                "llm_free": accuracy - (run.recipe is not None),
            }
            rows.append({"key": run.key(), **run.parameters(), **more})
    table = report.markdown(rows)
    assert "| raw | 85.00 ±7.07 |" in table
    assert "| random | 85.75 ±6.72 (+0.75 ±0.25) |" in table
    assert "| random, LLM-free | 84.75 ±6.72 (-0.25 ±0.25) |" in table
