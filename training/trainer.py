"""Finetuning, start to end: a checkpoint and a JSONL file in, a checkpoint out; stoppable and resumable at any
step."""

import dataclasses
import json
import math
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from compression.checkpoint import (
    Checkpoint,
    Manifest,
    checkpoint_hash,
    hash_file,
    open_checkpoint,
)
from compression.hf import load_model, read_config
from engines.text import find_control_tokens
from training.batches import Batch, SavedBytes, collate, total_loss
from training.checkpointing import CheckpointFolder, RunCheckpoint
from training.data import Encoded, Encoder, Row, pack_rows, read_examples, split_evaluation
from training.ledger import MemoryLedger, predict_memory
from training.methods import MissingDependencyError, TrainableModel, prepare
from training.q_galore.optimizer import SubspaceAdamW
from training.q_galore.schedule import fixed_refreshes
from training.result import write_result
from training.spec import FinetuneSettings, check_source, has_codes

JsonObject = dict[str, Any]
StopReason = Literal["pause", "cancel"]
# Raised whenever the same run would give other bytes; unfinished work of another version is thrown away.
RUN_VERSION = 1
FINAL_RATIO = 0.1
MAX_BAD_STEPS = 5


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
        measured: bytes by part as this attempt held them. Activations are those of its first pass, without what
            gradient checkpointing computes again.
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
        work: checkpoints of the run; a later call with the same source, settings and data goes on from the newest
            sound one, and ends in the same bytes. Work of anything else is thrown away.
        evaluation: a file of examples; None to keep back `settings.evaluation_share` of the training examples.

    Raises:
        DataError: an example is unsound or too long.
        SettingsError: the method does not fit the source.
        CheckpointError: the source is unsound.
        FinetuneStopped: as asked.
        FinetuneError: losses are not finite, or an optional package is missing.
    """
    return _Run(
        source=source,
        output=output,
        settings=settings,
        train=train,
        evaluation=evaluation,
        source_id=source_id,
        job_id=job_id,
        device=torch.device(device),
        hooks=hooks,
        work=work,
    ).run()


def learning_rate_at(step: int, total: int, settings: FinetuneSettings) -> float:
    """Of the step with this number, from 0: a line up to the peak, then a cosine down to a tenth of it."""
    peak = settings.peak_learning_rate
    warm_up = math.ceil(settings.warmup_ratio * total)
    if step < warm_up:
        return peak * (step + 1) / warm_up
    progress = (step - warm_up) / max(1, total - warm_up)
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return peak * (FINAL_RATIO + (1 - FINAL_RATIO) * cosine)


@dataclass(slots=True, kw_only=True)
class _Progress:
    """What a run knows of its past; kept in every checkpoint."""

    losses: list[tuple[int, float]] = field(default_factory=list)
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    best_step: int | None = None
    num_tokens: int = 0
    num_bad: int = 0
    seconds: float = 0.0

    @property
    def best_loss(self) -> float:
        return dict(self.evaluations)[self.best_step] if self.best_step is not None else math.inf


@dataclass(slots=True, kw_only=True)
class _Run:
    """One attempt. The arguments of `finetune`, then what `run` builds from them."""

    source: Path
    output: Path
    work: Path
    settings: FinetuneSettings
    train: Path
    evaluation: Path | None
    source_id: str
    job_id: str | None
    device: torch.device
    hooks: Hooks
    trained: TrainableModel = field(init=False)
    optimizer: SubspaceAdamW = field(init=False)
    folder: CheckpointFolder = field(init=False)
    rows: list[Row] = field(init=False)
    evaluation_rows: list[Row] = field(init=False)
    progress: _Progress = field(default_factory=_Progress)
    activation_bytes: int = 0

    def run(self) -> FinetuneReport:
        checkpoint = open_checkpoint(self.source)
        config = read_config(self.source)
        settings = self.settings
        check_source(settings, checkpoint.manifest, config)
        predicted = predict_memory(checkpoint.manifest, config, settings)
        training, kept_back = self._read_data()
        self.rows = self._pack(training)
        self.evaluation_rows = self._pack(kept_back)
        identity = [RUN_VERSION, settings.to_json(), checkpoint_hash(checkpoint.manifest)]
        identity += [hash_file(path) for path in (self.train, self.evaluation) if path is not None]
        self.folder = CheckpointFolder(self.work, [*identity, self.device.type])
        self._build(checkpoint.manifest)
        measured_weights = self.trained.weight_bytes()
        first = self._resume()
        started = time.monotonic()
        total = self.total_steps
        self._train(first, total, started)
        self.progress.seconds += time.monotonic() - started
        report = self._report(training, kept_back, predicted, measured_weights, total)
        self._write(checkpoint, report)
        return report

    def _read_data(self) -> tuple[list[Encoded], list[Encoded]]:
        encoder = build_encoder(self.source, self.settings.max_length)
        examples = [piece for e in read_examples(self.train) for piece in encoder(e)]
        if self.evaluation is None:
            share, seed = self.settings.evaluation_share, self.settings.seed
            training, kept_back = split_evaluation(examples, share, seed)
        else:
            training = examples
            kept_back = [piece for e in read_examples(self.evaluation) for piece in encoder(e)]
        self.hooks.on_event(
            f"{len(training):,} examples to train on, {len(kept_back):,} to evaluate with"
        )
        return training, kept_back

    def _pack(self, examples: list[Encoded]) -> list[Row]:
        shuffled = list(examples)
        random.Random(f"rows-{self.settings.seed}").shuffle(shuffled)
        return pack_rows(shuffled, self.settings.max_length, packing=self.settings.packing)

    @property
    def rows_per_step(self) -> int:
        return self.settings.batch_size * self.settings.gradient_accumulation

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.rows) // self.rows_per_step)

    @property
    def total_steps(self) -> int:
        return self.settings.max_steps or self.settings.epochs * self.steps_per_epoch

    def _build(self, manifest: Manifest) -> None:
        settings = self.settings
        wants_float32 = any(has_codes(row.linear) for row in manifest.matrices)
        dtype = torch.float32 if wants_float32 or settings.dtype == "float32" else torch.bfloat16
        model = load_model(self.source, dtype=dtype, device=self.device)
        torch.manual_seed(settings.seed)  # adapters begin at random
        try:
            self.trained = prepare(model, manifest, settings)
        except MissingDependencyError as error:
            raise FinetuneError("missing_dependency", str(error)) from None
        model.train()
        if settings.gradient_checkpointing:
            # transformers 5.24 renamed it.
            name = "activation_checkpointing_enable"
            enable = getattr(model, name, None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        self.optimizer = self.trained.build_optimizer(settings)

    def _resume(self) -> int:
        """Returns the number of steps that are done."""
        found = self.folder.newest_sound()
        if found is None:
            return 0
        self.trained.load_state_dict(found.weights)
        self.optimizer.load_state_dict(found.optimizer)
        state = found.state
        for name in ("losses", "evaluations"):
            state[name] = [(step, math.nan if loss is None else loss) for step, loss in state[name]]
        self.progress = _Progress(**state)
        self.hooks.on_event(f"resumed after step {found.step}")
        return found.step

    def _train(self, first: int, total: int, started: float) -> None:
        num_tokens_before = self.progress.num_tokens
        if first == 0 and not self.progress.evaluations:
            self._evaluate(0)
        for number in range(first, total):
            reason = self.hooks.stop_requested()
            if reason is not None:
                self.progress.seconds += time.monotonic() - started
                self._save(number)
                raise FinetuneStopped(reason, number)
            loss, norm = self._step(number, total)
            done = number + 1
            evaluation_loss = None
            every = self.settings.evaluate_every
            if done == total or (every is not None and done % every == 0):
                evaluation_loss = self._evaluate(done)
            improved = evaluation_loss is not None and self.progress.best_step == done
            if done == total or improved or done % self.settings.checkpoint_every == 0:
                self._save(done)
            elapsed = time.monotonic() - started
            self.hooks.on_metrics(
                StepMetrics(
                    step=done,
                    total=total,
                    epoch=done / self.steps_per_epoch,
                    loss=loss,
                    learning_rate=learning_rate_at(number, total, self.settings),
                    gradient_norm=norm,
                    tokens_per_second=(self.progress.num_tokens - num_tokens_before) / elapsed,
                    eta_seconds=elapsed / (done - first) * (total - done),
                    evaluation_loss=evaluation_loss,
                    refreshes=self.optimizer.num_refreshes,
                )
            )

    def _rows_of(self, number: int) -> list[Row]:
        """The rows of a step; every epoch has an order of its own."""
        epoch, position = divmod(number, self.steps_per_epoch)
        order = list(range(len(self.rows)))
        random.Random(f"epoch-{self.settings.seed}-{epoch}").shuffle(order)
        start = position * self.rows_per_step
        return [self.rows[index] for index in order[start : start + self.rows_per_step]]

    def _step(self, number: int, total: int) -> tuple[float, float | None]:
        """One optimizer step; returns its loss and the norm of its gradients."""
        settings = self.settings
        rows = self._rows_of(number)
        size = settings.batch_size
        batches = [
            collate(rows[start : start + size], self.device) for start in range(0, len(rows), size)
        ]
        num_learnt = sum(batch.num_learnt for batch in batches)
        self.optimizer.start_step(number, learning_rate_at(number, total, settings))
        total_nll = 0.0
        for index, batch in enumerate(batches):
            # Dropout draws from the step alone, so that a resumed run draws the same.
            torch.manual_seed(settings.seed * 1_000_003 + number * 1_009 + index)
            with self._watch_activations():
                nll = total_loss(self.trained.model, batch)
            total_nll += float(nll.detach())
            if not math.isfinite(total_nll):
                self.optimizer.abandon_step()
                return self._note(number, math.nan, batches), None
            # Every learnt token of the step counts the same, however the passes share them.
            self.optimizer.backward(nll / num_learnt, last=index == len(batches) - 1)
        norm = self.optimizer.finish_step()
        return self._note(number, total_nll / num_learnt, batches), norm

    def _note(self, number: int, loss: float, batches: list[Batch]) -> float:
        """Raises: FinetuneError: too many steps in a row were not finite."""
        self.progress.losses.append((number + 1, loss))
        self.progress.num_tokens += sum(batch.num_tokens for batch in batches)
        self.progress.num_bad = 0 if math.isfinite(loss) else self.progress.num_bad + 1
        if self.progress.num_bad:
            self.hooks.on_event(f"step {number + 1}: the loss is not finite; no update")
        if self.progress.num_bad >= MAX_BAD_STEPS:
            raise FinetuneError(
                "diverged",
                f"losses of {MAX_BAD_STEPS} steps in a row, up to step {number + 1}, are not finite;"
                " a lower learning rate may help",
            )
        return loss

    @contextmanager
    def _watch_activations(self) -> Iterator[None]:
        """Measures those of the first pass of an attempt."""
        if self.activation_bytes:
            yield
            return
        with SavedBytes(self.trained.model) as saved:
            yield
        self.activation_bytes = saved.num_bytes

    @torch.no_grad()
    def _evaluate(self, step: int) -> float | None:
        """Mean loss of the learnt tokens of the evaluation rows."""
        if not self.evaluation_rows:
            return None
        model, size = self.trained.model, self.settings.batch_size
        model.eval()
        nll, num_learnt = 0.0, 0
        for start in range(0, len(self.evaluation_rows), size):
            batch = collate(self.evaluation_rows[start : start + size], self.device)
            nll += float(total_loss(model, batch))
            num_learnt += batch.num_learnt
        model.train()
        loss = nll / num_learnt
        if loss < self.progress.best_loss:
            self.progress.best_step = step
        self.progress.evaluations.append((step, loss))
        self.hooks.on_event(f"evaluation after step {step}: loss {loss:.4f}")
        return loss

    def _save(self, step: int) -> None:
        state = dataclasses.asdict(self.progress)
        for name in ("losses", "evaluations"):  # JSON has no NaN
            state[name] = [(at, loss if math.isfinite(loss) else None) for at, loss in state[name]]
        checkpoint = RunCheckpoint(
            step=step,
            weights=self.trained.state_dict(),
            optimizer=self.optimizer.state_dict(),
            state=state,
        )
        best = self.progress.best_step
        keep = set() if best is None else {best}
        self.folder.save(checkpoint, keep=keep, keep_last=self.settings.keep_last)
        self.hooks.on_checkpoint(step)

    def _report(
        self,
        training: list[Encoded],
        kept_back: list[Encoded],
        predicted: MemoryLedger,
        measured_weights: int,
        total: int,
    ) -> FinetuneReport:
        progress, optimizer = self.progress, self.optimizer
        interval = None if optimizer.projection is None else optimizer.projection.refresh_interval
        num_projected = sum(slot.schedule is not None for slot in optimizer.slots)
        fixed = 0 if interval is None else num_projected * fixed_refreshes(total, interval)
        return FinetuneReport(
            steps=total,
            num_examples=len(training),
            num_evaluation_examples=len(kept_back),
            num_tokens=progress.num_tokens,
            losses=progress.losses,
            evaluations=progress.evaluations,
            best_step=progress.best_step,
            refreshes=optimizer.num_refreshes,
            refreshes_fixed=fixed,
            skipped_updates=optimizer.num_skipped,
            tokens_per_second=progress.num_tokens / max(progress.seconds, 1e-9),
            seconds=progress.seconds,
            predicted=predicted,
            measured=self._measured(measured_weights),
        )

    def _measured(self, weights: int) -> MemoryLedger:
        optimizer = self.optimizer
        measured = MemoryLedger(
            weights=weights,
            gradients=optimizer.gradient_bytes,
            optimizer=optimizer.moment_bytes(),
            projections=optimizer.basis_bytes(),
            activations=self.activation_bytes,
            temporary=0,
        )
        if self.device.type != "cuda":
            return measured
        allocated = torch.cuda.max_memory_allocated(self.device)
        return dataclasses.replace(measured, temporary=max(0, allocated - measured.peak))

    def _write(self, checkpoint: Checkpoint, report: FinetuneReport) -> None:
        shutil.rmtree(self.output, ignore_errors=True)  # what a killed attempt had written
        hashes = {
            name: hash_file(path)
            for name, path in (("train", self.train), ("evaluation", self.evaluation))
            if path is not None
        }
        provenance = {
            "settings": self.settings.to_json(),
            "data_sha256": hashes,
            "steps": report.steps,
            "num_tokens": report.num_tokens,
            "evaluations": report.evaluations,
        }
        write_result(
            self.trained,
            checkpoint,
            self.output,
            source_id=self.source_id,
            job_id=self.job_id,
            provenance=provenance,
        )


def build_encoder(folder: Path, max_length: int) -> Encoder:
    """The encoder of a checkpoint's own tokenizer and chat template."""
    raw = (folder / "tokenizer.json").read_text()
    tokenizer = Tokenizer.from_str(raw)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    pretrained = AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )

    def render(messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        text = pretrained.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        assert isinstance(text, str)
        return text

    return Encoder(
        tokenizer=tokenizer,
        end_id=pretrained.eos_token_id,
        max_length=max_length,
        render=render if pretrained.chat_template else None,
        control_spellings=tuple(find_control_tokens(json.loads(raw))),
    )
