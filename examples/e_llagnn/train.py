"""One training run: epochs over the whole graph, with enrichment dropout, and two test numbers.

`with_llm` uses the enriched vectors, `llm_free` none, both with the weights of the epoch that was best in validation
(with enriched vectors). The same seed gives the same initial weights and dropout whatever is enriched, so that runs are
compared in pairs. Letters: N nodes, D features.
"""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from examples.e_llagnn.graphs import Split
from examples.e_llagnn.models import Gnn, ModelName, build_adjacency, drop_enrichment, mix

VALIDATE_EVERY = 4
"""Epochs. Validation would be a third of the work."""

Layer0 = Callable[[], tuple[Tensor, Tensor]]
"""Enriched vectors (N, D) and which nodes have one (N), as of now; asked for once in each epoch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """Chosen in validation on raw features, for all models and splits alike.

    Attributes:
        enrichment_dropout: probability that an enriched node is taken raw in an epoch.
    """

    model: ModelName = "gcn"
    num_layers: int = 2
    hidden: int = 32
    dropout: float = 0.5
    learning_rate: float = 0.03
    weight_decay: float = 2e-3
    epochs: int = 60
    enrichment_dropout: float = 0.3
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is learnt. Attributes: raw_ND: x. edge_index_2E: both directions. labels_N: of all nodes; read by split."""

    raw_ND: Tensor
    edge_index_2E: Tensor
    labels_N: Tensor
    num_classes: int
    split: Split


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """An epoch of a run. Attributes: enriched: share of nodes with an enriched vector by then."""

    seconds: float
    enriched: float
    val: float


@dataclass(slots=True, kw_only=True)
class Outcome:
    """Accuracies in percent.

    Attributes:
        gradient_norms: geometric mean over the epochs of ||dL/dW_l||, one per layer.
        logits_NC: with enriched vectors.
    """

    val: float
    with_llm: float
    llm_free: float
    best_epoch: int
    num_epochs: int
    seconds: float
    gradient_norms: list[float]
    logits_NC: Tensor
    moments: list[Moment] = field(default_factory=list)


def train(
    task: Task,
    settings: TrainSettings,
    layer0: Layer0 | None = None,
    *,
    is_complete: Callable[[], bool] = lambda: True,
) -> Outcome:
    """Train and test.

    Args:
        layer0: None trains on raw features.
        is_complete: whether all enriched vectors are there. Until then epochs do not count: training overlaps with the
            LLM's work, and `settings.epochs` epochs follow when it has ended.
    """
    started = time.perf_counter()
    torch.manual_seed(settings.seed)
    draws = torch.Generator().manual_seed(settings.seed)  # apart from the weights' and dropout's
    adjacency = build_adjacency(settings.model, task.edge_index_2E, len(task.raw_ND))
    gnn = Gnn(
        settings.model,
        num_features=task.raw_ND.shape[1],
        hidden=settings.hidden,
        num_classes=task.num_classes,
        num_layers=settings.num_layers,
        dropout=settings.dropout,
    )
    optimizer = torch.optim.Adam(
        gnn.parameters(), settings.learning_rate, weight_decay=settings.weight_decay
    )
    raw_ND = task.raw_ND
    nothing = torch.zeros(len(raw_ND), dtype=torch.bool)
    parts = {name: torch.from_numpy(getattr(task.split, name)) for name in ("train", "val", "test")}
    best: tuple[float, float] = (-1.0, -math.inf)
    best_weights, best_epoch = copy.deepcopy(gnn.state_dict()), 0
    log_norms: list[list[float]] = []
    moments: list[Moment] = []
    num_epochs = num_counted = 0
    while num_counted < settings.epochs:
        num_counted += is_complete()  # before reading, so that the counted epochs see everything
        num_epochs += 1
        enriched_ND, mask_N = (raw_ND, nothing) if layer0 is None else layer0()
        gnn.train()
        optimizer.zero_grad()
        kept_N = drop_enrichment(mask_N, settings.enrichment_dropout, draws)
        logits = gnn(mix(raw_ND, enriched_ND, kept_N), adjacency)
        nodes = parts["train"]
        train_loss = functional.cross_entropy(logits[nodes], task.labels_N[nodes])
        train_loss.backward()  # type: ignore[no-untyped-call]
        log_norms.append([math.log(max(norm, 1e-30)) for norm in gnn.gradient_norms()])
        optimizer.step()
        if num_epochs % VALIDATE_EVERY:
            continue
        logits = predict(gnn, mix(raw_ND, enriched_ND, mask_N), adjacency)
        nodes = parts["val"]
        accuracy = _accuracy(logits, task.labels_N, nodes)
        loss = float(functional.cross_entropy(logits[nodes], task.labels_N[nodes]))
        moments.append(
            Moment(
                seconds=time.perf_counter() - started,
                enriched=float(mask_N.float().mean()),
                val=accuracy,
            )
        )
        if (accuracy, -loss) > best:
            best, best_epoch = (accuracy, -loss), num_epochs
            best_weights = copy.deepcopy(gnn.state_dict())
    gnn.load_state_dict(best_weights)
    with_llm = predict(gnn, mix(raw_ND, enriched_ND, mask_N), adjacency)
    llm_free = predict(gnn, raw_ND, adjacency)
    return Outcome(
        val=_accuracy(with_llm, task.labels_N, parts["val"]),
        with_llm=_accuracy(with_llm, task.labels_N, parts["test"]),
        llm_free=_accuracy(llm_free, task.labels_N, parts["test"]),
        best_epoch=best_epoch,
        num_epochs=num_epochs,
        seconds=time.perf_counter() - started,
        gradient_norms=[
            math.exp(sum(layer) / num_epochs) for layer in zip(*log_norms, strict=True)
        ],
        logits_NC=with_llm,
        moments=moments,
    )


@torch.no_grad()
def predict(gnn: Gnn, h_ND: Tensor, adjacency: Tensor) -> Tensor:
    gnn.eval()
    logits: Tensor = gnn(h_ND, adjacency)
    return logits


def _accuracy(logits_NC: Tensor, labels_N: Tensor, nodes: Tensor) -> float:
    return 100 * float((logits_NC[nodes].argmax(1) == labels_N[nodes]).float().mean())
