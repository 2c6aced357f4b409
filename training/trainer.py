"""Finetuning, start to end: a checkpoint and a JSONL file in, a checkpoint out; stoppable and resumable at any step."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from training.ledger import MemoryLedger
from training.spec import FinetuneSettings

JsonObject = dict[str, Any]
StopReason = Literal["pause", "cancel"]


class FinetuneError(RuntimeError):
    """The run cannot succeed.

    Attributes:
        code: machine-readable: "diverged", "missing_dependency", "bad_data".
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class FinetuneStopped(Exception):  # noqa: N818 - a request that was obeyed, not an error
    """The run was asked to stop; a checkpoint of its last step is in the work folder.

    Attributes:
        step: optimizer steps done.
    """

    def __init__(self, reason: StopReason, step: int) -> None:
        super().__init__(f"{reason} after step {step}")
        self.reason = reason
        self.step = step


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMetrics:
    """One optimizer step.

    Attributes:
        step: steps done, this one included; total: of the run.
        loss: mean over the learnt tokens of the step, in nats.
        gradient_norm: before clipping, projected matrices in their subspace; None where nothing was clipped.
        tokens_per_second: of this attempt so far, padding not counted.
        evaluation_loss: where this step was followed by an evaluation.
        refreshes: bases of subspaces found anew so far.
    """

    step: int
    total: int
    epoch: float
    loss: float
    learning_rate: float
    gradient_norm: float | None
    tokens_per_second: float
    eta_seconds: float
    evaluation_loss: float | None
    refreshes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Hooks:
    """How a run talks to who started it.

    Attributes:
        stop_requested: asked between steps; None to go on.
    """

    on_event: Callable[[str], None] = lambda message: None
    on_metrics: Callable[[StepMetrics], None] = lambda metrics: None
    on_checkpoint: Callable[[int], None] = lambda step: None
    stop_requested: Callable[[], StopReason | None] = lambda: None


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneReport:
    """What a run did.

    Attributes:
        losses: [step, loss] of every step, evaluations: [step, loss] of every evaluation, both of all attempts.
        refreshes_fixed: refreshes that the same run without lazy intervals would have made.
        measured: bytes by part as held; activations only where the device counts them.
    """

    steps: int
    num_examples: int
    num_evaluation_examples: int
    num_tokens: int
    losses: list[tuple[int, float]]
    evaluations: list[tuple[int, float]]
    best_step: int | None
    refreshes: int
    refreshes_fixed: int
    skipped_updates: int
    tokens_per_second: float
    seconds: float
    predicted: MemoryLedger
    measured: MemoryLedger

    def to_json(self) -> JsonObject:
        return {
            **dataclasses.asdict(self),
            "predicted": self.predicted.to_json(),
            "measured": self.measured.to_json(),
        }


def finetune(
    source: Path,
    output: Path,
    work: Path,
    *,
    settings: FinetuneSettings,
    train: Path,
    evaluation: Path | None = None,
    source_id: str,
    job_id: str | None = None,
    device: str = "cpu",
    hooks: Hooks = Hooks(),
) -> FinetuneReport:
    """Train a checkpoint on a file of examples.

    Args:
        output: an empty folder; it is a checkpoint once this returns. It has no fingerprint: that is taken
            from the result as loaded.
        work: checkpoints of the run; a later call with the same source, settings and data goes on from the newest sound
            one, and ends in the same bytes. Work of anything else is thrown away.
        evaluation: a file of examples; None to keep back `settings.evaluation_share` of the training examples.

    Raises:
        DataError: an example is unsound or too long.
        SettingsError: the method does not fit the source.
        CheckpointError: the source is unsound.
        FinetuneStopped: as asked.
        FinetuneError: losses are not finite, or an optional package is missing.
    """
    raise NotImplementedError
