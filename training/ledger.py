"""The memory ledger: what a finetuning run will hold, by part, told before it starts. Imports no torch."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from compression.checkpoint import Manifest
from training.spec import FinetuneSettings

JsonObject = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryLedger:
    """Bytes by part, at the moment when all are largest.

    Attributes:
        gradients: whole gradients, and those accumulated in a subspace.
        optimizer: both moments of Adam.
        projections: bases of the subspaces.
        activations: what the backward pass needs, and the logits.
    """

    weights: int
    gradients: int
    optimizer: int
    projections: int
    activations: int

    @property
    def peak(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.projections + self.activations

    def to_json(self) -> JsonObject:
        return {**dataclasses.asdict(self), "peak": self.peak}


def predict_memory(
    manifest: Manifest, config: JsonObject, settings: FinetuneSettings
) -> MemoryLedger:
    """What a run of these settings will hold.

    Args:
        manifest, config: the source's `lathe.json` and `config.json`.
    """
    raise NotImplementedError
