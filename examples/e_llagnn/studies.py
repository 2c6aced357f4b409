"""The experiments: which runs each has, and one JSON row per run, so that an interrupted study goes on.

budgets   models by split, by heuristic and by share of enriched nodes
depth     2 to 32 layers: accuracy and gradient norms, raw, at a budget, and with every node enriched
prompts   what the LLM is asked for, at a budget of random nodes
joins     how its text meets the node's
llms      the same prompt by a dense LLM and by a compressed one
scorers   neighbourhoods that the service has judged, instead of all neighbours
modes     waiting for the LLM before training, or training meanwhile
"""

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from lathe_client import EnrichmentStore
from torch import Tensor

from examples.e_llagnn.collect import Join, Recipe, Source
from examples.e_llagnn.graphs import Indices
from examples.e_llagnn.models import ModelName
from examples.e_llagnn.train import Layer0, Moment, Outcome, Task, TrainSettings, train

FIXED_RANDOM = "random, same nodes"
"""The same draw for every seed of the training."""
FEATURE_SCALE = 2.0
"""The encoder's vectors have length 1, for which Glorot's initial weights are small. Chosen in validation."""
PREDICTED = ("entropy", "soft_homophily")
FANOUT = 4
Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One training run; everything that shapes it.

    Attributes:
        budget: share of enriched nodes; 0 is raw features alone.
        strategy, recipe: None on raw features.
        scorer: of the neighbours; None takes all of them.
        overlap: train while the LLM works.
    """

    study: str
    split: str
    model: ModelName = "gcn"
    num_layers: int = 2
    budget: float = 0.0
    strategy: str | None = None
    recipe: Recipe | None = None
    scorer: str | None = None
    overlap: bool = False
    seed: int

    def parameters(self) -> Row:
        """All but the study: a run may be part of several."""
        parameters = asdict(self)
        del parameters["study"]
        return parameters

    def key(self) -> str:
        return json.dumps(self.parameters(), sort_keys=True)


class RowsError(Exception):
    """The file is not one of this graph's rows; the message is one line for a person."""


class Rows:
    """Rows of a JSON file, written after each run.

    Args:
        graph: digest of the graph that they are of.

    Raises:
        RowsError: the file has rows of another graph, or rows that name none.
    """

    def __init__(self, path: Path, graph: str) -> None:
        self._path = path
        self._graph = graph
        self.rows: list[Row] = json.loads(path.read_text()) if path.is_file() else []
        for row in self.rows:
            if row.get("graph") != graph:
                raise RowsError(
                    f"{path}: a row is of graph {row.get('graph')!r}, this needs {graph!r};"
                    " name another file, or remove this one"
                )
        self._by_key = {row["key"]: row for row in self.rows}

    def get(self, run: Run) -> Row | None:
        """The row of a run, of whichever study."""
        return self._by_key.get(run.key())

    def add(self, row: Row) -> None:
        row["graph"] = self._graph
        self.rows.append(row)
        self._by_key[row["key"]] = row
        self._write()

    def join_study(self, row: Row, study: str) -> None:
        """A row that is there already is part of one more study."""
        if study not in row["studies"]:
            row["studies"].append(study)
            self._write()

    def _write(self) -> None:
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("[\n" + ",\n".join(json.dumps(row) for row in self.rows) + "\n]\n")
        temporary.replace(self._path)


class Lab:
    """Runs what is not in the rows yet."""

    def __init__(self, source: Source, rows: Rows) -> None:
        self.source = source
        self.rows = rows
        self._predictions: dict[Run, dict[str, list[float]]] = {}
        graph = source.graph
        self._labels = torch.from_numpy(graph.labels)
        self._raw = FEATURE_SCALE * torch.from_numpy(source.raw())
        both = np.concatenate([graph.edges, graph.edges[:, ::-1]])
        self._edges = torch.from_numpy(np.ascontiguousarray(both.T))

    def run(self, run: Run) -> Row:
        row = self.rows.get(run)
        if row is None:
            outcome, more = self._train(run)
            row = {
                "key": run.key(),
                **run.parameters(),
                "studies": [run.study],
                "val": round(outcome.val, 3),
                "with_llm": round(outcome.with_llm, 3),
                "llm_free": round(outcome.llm_free, 3),
                "best_epoch": outcome.best_epoch,
                "num_epochs": outcome.num_epochs,
                "train_seconds": round(outcome.seconds, 2),
                "gradient_norms": [float(f"{norm:.4g}") for norm in outcome.gradient_norms],
                **more,
            }
            self.rows.add(row)
        self.rows.join_study(row, run.study)
        return row

    def _train(self, run: Run) -> tuple[Outcome, Row]:
        task, more = self._task(run)
        settings = TrainSettings(model=run.model, num_layers=run.num_layers, seed=run.seed)
        if run.recipe is None:
            return train(task, settings), more
        nodes = self.nodes(run)
        if run.overlap:
            return self._train_overlapped(run, task, settings, nodes)
        started = time.perf_counter()
        store = self.source.enriched(run.recipe, nodes)
        more["wait_seconds"] = round(time.perf_counter() - started, 2)
        layer0 = constant_layer0(*read_store(store, nodes))
        more["num_enriched"] = int(layer0()[1].sum())
        return train(task, settings, layer0), more

    def _train_overlapped(
        self, run: Run, task: Task, settings: TrainSettings, nodes: Indices
    ) -> tuple[Outcome, Row]:
        assert run.recipe is not None
        store = self.source.store(run.recipe)
        num_known = int(store.has(nodes).sum())
        # The pool's exit waits for drain, which an interrupted prefetcher ends once it is closed.
        with ThreadPoolExecutor(1) as pool, self.source.prefetcher(run.recipe, nodes) as prefetcher:
            prefetcher.want(nodes)
            drained = pool.submit(prefetcher.drain)
            outcome = train(
                task, settings, lambda: read_store(store, nodes), is_complete=drained.done
            )
            drained.result()
        return outcome, {
            "num_enriched": int(store.has(nodes).sum()),
            "num_known_before": num_known,
            "moments": [
                [round(moment.seconds, 2), round(moment.enriched, 4), round(moment.val, 2)]
                for moment in _changes(outcome.moments)
            ],
        }

    def nodes(self, run: Run) -> Indices:
        """Which nodes a run enriches."""
        assert run.strategy is not None
        num_nodes = len(self.source.graph)
        count = int(np.ceil(round(run.budget * num_nodes, 9)))
        if count == num_nodes:
            return np.arange(num_nodes)
        return self._ranking(run)[:count]

    def _ranking(self, run: Run) -> Indices:
        assert run.strategy is not None
        if run.strategy == "random":
            return self.source.ranking("random", seed=run.seed)
        if run.strategy == FIXED_RANDOM:
            return self.source.ranking("random", seed=0)
        if run.strategy == "clustering_distance":
            return self.source.ranking(
                run.strategy, num_clusters=len(self.source.graph.classes), seed=0
            )
        if run.strategy in PREDICTED:
            raw = Run(
                study="", split=run.split, model=run.model, num_layers=run.num_layers, seed=run.seed
            )
            if raw not in self._predictions:
                self._predictions[raw] = self._predict(raw)
            return self.source.ranking(run.strategy, predictions=self._predictions[raw])
        return self.source.ranking(run.strategy)

    def _predict(self, raw: Run) -> dict[str, list[float]]:
        """Class probabilities by node id, of a model on raw features."""
        task, _ = self._task(raw)
        settings = TrainSettings(model=raw.model, num_layers=raw.num_layers, seed=raw.seed)
        p_NC = train(task, settings).logits_NC.softmax(1).tolist()
        return {str(i): row for i, row in zip(self.source.graph.ids, p_NC, strict=True)}

    def _task(self, run: Run) -> tuple[Task, Row]:
        graph = self.source.graph
        edges, more = self._edges, Row()
        if run.scorer is not None:
            kept, more["sample_cost"] = self.source.sample(run.scorer, fanout=FANOUT, seed=run.seed)
            more["num_kept_edges"] = kept.shape[1]
            edges = torch.from_numpy(kept)
        task = Task(
            raw_ND=self._raw,
            edge_index_2E=edges,
            labels_N=self._labels,
            num_classes=len(graph.classes),
            split=graph.splits[run.split],
        )
        return task, more


def _changes(moments: list[Moment]) -> list[Moment]:
    """The epochs in which more was enriched than before; the first among them."""
    before = [-1.0, *(moment.enriched for moment in moments)]
    return [m for m, share in zip(moments, before, strict=False) if m.enriched != share]


def read_store(store: EnrichmentStore, nodes: Indices) -> tuple[Tensor, Tensor]:
    """x+ (N, D) and m (N): of these nodes, as far as they are there."""
    vectors, there = store.lookup(nodes)
    enriched_ND = torch.zeros(store.num_nodes, store.dim)
    enriched_ND[nodes] = FEATURE_SCALE * torch.from_numpy(vectors).float()
    mask_N = torch.zeros(store.num_nodes, dtype=torch.bool)
    mask_N[nodes] = torch.from_numpy(there)
    return enriched_ND, mask_N


def constant_layer0(enriched_ND: Tensor, mask_N: Tensor) -> Layer0:
    return lambda: (enriched_ND, mask_N)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a study runs over. Attributes: recipe: the one of every study but those that compare recipes."""

    splits: tuple[str, ...]
    models: tuple[ModelName, ...]
    seeds: tuple[int, ...]
    strategies: tuple[str, ...]
    budgets: tuple[float, ...]
    depths: tuple[int, ...]
    recipe: Recipe
    prompts: tuple[str, ...]
    llms: tuple[str, ...]
    scorers: tuple[str, ...]
    ablation_budget: float


def budgets(options: Options) -> Iterator[Run]:
    for model, split in product(options.models, options.splits):
        for budget, strategy, seed in product(options.budgets, options.strategies, options.seeds):
            if budget == 1.0 and strategy != options.strategies[0]:
                continue  # every node, whatever the strategy
            run = Run(study="budgets", split=split, model=model, seed=seed)
            yield run
            yield replace(run, budget=budget, strategy=strategy, recipe=options.recipe)


def depth(options: Options) -> Iterator[Run]:
    for num_layers, seed in product(options.depths, options.seeds):
        raw = Run(study="depth", split=options.splits[0], num_layers=num_layers, seed=seed)
        yield raw
        for budget in (options.ablation_budget, 1.0):
            yield replace(raw, budget=budget, strategy="random", recipe=options.recipe)


def prompts(options: Options) -> Iterator[Run]:
    for split, prompt in product(options.splits, options.prompts):
        yield from _ablation("prompts", split, replace(options.recipe, prompt=prompt), options)


def joins(options: Options) -> Iterator[Run]:
    for split, join in product(options.splits, get_args(Join)):
        yield from _ablation("joins", split, replace(options.recipe, join=join), options)


def llms(options: Options) -> Iterator[Run]:
    for split, llm in product(options.splits, options.llms):
        yield from _ablation("llms", split, replace(options.recipe, model=llm), options)


def _ablation(study: str, split: str, recipe: Recipe, options: Options) -> Iterator[Run]:
    """The same random nodes for every seed, so that the LLM writes about few of them; and no node, to compare."""
    for seed in options.seeds:
        raw = Run(study=study, split=split, seed=seed)
        yield raw
        yield replace(raw, budget=options.ablation_budget, strategy=FIXED_RANDOM, recipe=recipe)


def scorers(options: Options) -> Iterator[Run]:
    for split, scorer, seed in product(options.splits, options.scorers, options.seeds):
        yield Run(study="scorers", split=split, seed=seed)
        yield Run(study="scorers", split=split, scorer=scorer, seed=seed)


def modes(options: Options) -> Iterator[Run]:
    """Different nodes for the two, so that neither finds the other's in the service's cache."""
    for seed, overlap in enumerate((True, False)):
        yield Run(
            study="modes",
            split=options.splits[0],
            budget=options.ablation_budget,
            strategy="random",
            recipe=options.recipe,
            overlap=overlap,
            seed=seed,
        )


STUDIES: dict[str, Callable[[Options], Iterator[Run]]] = {
    "budgets": budgets,
    "depth": depth,
    "joins": joins,
    "prompts": prompts,
    "llms": llms,
    "scorers": scorers,
    "modes": modes,
}
