"""The finetune job: memory check, training that stops and resumes, what it changed, registration.

Safe to kill at any moment: training goes on from its newest sound checkpoint and ends in the same bytes, and one rename
puts the model into the registry. Asked to stop, it writes a checkpoint and ends; whether that is a pause or a cancel,
the worker knows.
"""

import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from compression.checkpoint import read_manifest, verify_checkpoint, write_manifest
from compression.hf import check_fingerprint, fingerprint, load_model, read_config
from compression.registry import ModelEntry, ModelNotFoundError, ModelRegistry
from compression.safetensors_header import CheckpointError
from evaluation.corpora import CORPORA, CorpusError, load_corpus
from evaluation.perplexity import compare_models
from evaluation.plots import can_plot, plot_losses, plot_refreshes
from evaluation.report import corpus_report
from evaluation.training_report import to_html, to_markdown
from jobs.context import JobCancelledError, JobFailedError, RunnerContext, finite
from jobs.files import FileInfo, FileStore, UploadNotFoundError
from jobs.memory import too_large
from jobs.runners.registration import earlier_report, register_output
from jobs.store import JsonObject
from training.data import DataError
from training.ledger import predict_memory
from training.spec import FinetuneSettings, SettingsError, parse_settings
from training.trainer import (
    FinetuneError,
    FinetuneReport,
    FinetuneStopped,
    Hooks,
    StepMetrics,
    finetune,
)

REPORT_NAMES = ("report.json", "report.md", "report.html")
CURVE_NAME = "curve.json"
CHECKPOINTS_NAME = "checkpoints.json"
WINDOW, MAX_WINDOWS = 512, 8
EVENT_SECONDS = 1.0
"""Of two steps that end closer together than this, the first has no event."""


def run(context: RunnerContext) -> JsonObject:
    """Run one attempt; returns the job's result.

    Raises:
        JobFailedError: model or files are gone or unsound, it does not fit, the losses are not finite, or the output id
            was taken meanwhile.
        JobCancelledError: asked to stop; a checkpoint is kept.
    """
    registry = ModelRegistry(context.home / "models")
    finished = earlier_report(context, registry)
    if finished is not None:
        artifacts = sorted(path.name for path in context.artifacts.iterdir())
        return _result(context.spec["output"], finished, artifacts)
    try:
        source = registry.get(context.spec["model"])
        data = _data(context)
        report = _train(context, source, data)
    except ModelNotFoundError:
        raise JobFailedError("model_not_found", f"{context.spec['model']!r} is gone") from None
    except UploadNotFoundError as error:
        raise JobFailedError("file_not_found", str(error)) from None
    except (CheckpointError, DataError) as error:
        raise JobFailedError("bad_data", str(error)) from error
    except SettingsError as error:
        raise JobFailedError("bad_settings", str(error)) from error
    except FinetuneError as error:
        raise JobFailedError(error.code, error.message) from error
    except FinetuneStopped as stopped:
        context.event(f"stopped after step {stopped.step}; its checkpoint is kept")
        raise JobCancelledError(context.job_id) from None
    report["result_file"] = _write_result_file(context, report, data["training_file"][0].owner)
    artifacts = _write_report(context, report)
    register_output(context, registry, _output(context))
    return _result(context.spec["output"], report, artifacts)


def _output(context: RunnerContext) -> Path:
    return context.folder / "checkpoint"


def _data(context: RunnerContext) -> dict[str, tuple[FileInfo, Path]]:
    """Field of the specification to the file that it names."""
    store = FileStore(context.home / "files")
    names = ("training_file", "validation_file")
    return {name: store.open_for_job(context.spec[name]) for name in names if name in context.spec}


def _train(
    context: RunnerContext, source: ModelEntry, data: Mapping[str, tuple[FileInfo, Path]]
) -> JsonObject:
    settings = parse_settings(context.spec["settings"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    _check_memory(source, settings, device)
    problems = verify_checkpoint(source.path).problems
    if problems:
        raise CheckpointError(f"{source.id} is unsound: {problems[0]}")
    folder = _output(context)
    shutil.rmtree(folder, ignore_errors=True)  # of an attempt that did not end
    folder.mkdir(parents=True)
    curve = _Curve(context.folder)
    trained = finetune(
        source.path,
        folder,
        context.folder / "work",
        settings=settings,
        train=data["training_file"][1],
        evaluation=data["validation_file"][1] if "validation_file" in data else None,
        source_id=source.id,
        job_id=context.job_id,
        device=device,
        hooks=_hooks(context, curve),
    )
    curve.save()
    corpora = _measure(context, source, folder, trained)
    report = {
        "settings": settings.to_json(),
        "data": {name: _described(info) for name, (info, _) in data.items()},
        "device": device,
        **trained.to_json(),
        "corpora": corpora,
        "curve": curve.rows,
    }
    _complete_manifest(folder, report)
    problems = verify_checkpoint(folder).problems
    if problems:
        raise CheckpointError(f"the written checkpoint is unsound: {problems[0]}")
    return report


def _check_memory(source: ModelEntry, settings: FinetuneSettings, device: str) -> None:
    """Raises: JobFailedError: what the run will hold is more than is free now."""
    ledger = predict_memory(source.manifest, read_config(source.path), settings)
    if device == "cuda":
        free, _ = torch.cuda.mem_get_info()
    else:
        free = psutil.virtual_memory().available
    reason = too_large(ledger, free, f"and free on {device} are")
    if reason is not None:
        raise JobFailedError("does_not_fit", reason, result={"memory": ledger.to_json()})


def _described(info: FileInfo) -> JsonObject:
    return {
        "id": info.id,
        "filename": info.filename,
        "bytes": info.num_bytes,
        "sha256": info.sha256,
    }


class _Curve:
    """What every step told, kept beside the checkpoints so that a resumed run's report has its beginning."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / CURVE_NAME
        self._rows: dict[int, JsonObject] = {}
        if self._path.is_file():
            self._rows = {row["step"]: row for row in json.loads(self._path.read_text())}

    @property
    def rows(self) -> list[JsonObject]:
        return [self._rows[step] for step in sorted(self._rows)]

    def add(self, metrics: StepMetrics) -> None:
        self._rows[metrics.step] = {
            "step": metrics.step,
            "loss": metrics.loss,
            "evaluation_loss": metrics.evaluation_loss,
            "learning_rate": metrics.learning_rate,
            "refreshes": metrics.refreshes,
        }

    def save(self) -> None:
        _write(self._path, json.dumps(finite(self.rows)).encode())


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


@dataclass(slots=True)
class _Told:
    """What the hooks remember.

    Attributes:
        at: `time.monotonic()` of the last step's event.
        checkpoint: the step last saved; what it lost is told after that.
    """

    at: float = float("-inf")
    checkpoint: int | None = None


def _hooks(context: RunnerContext, curve: _Curve) -> Hooks:
    told = _Told()

    def on_metrics(metrics: StepMetrics) -> None:
        curve.add(metrics)
        if metrics.step == told.checkpoint:
            curve.save()
            _add_checkpoint(context.folder, metrics.step, curve)
        total = metrics.total + len(CORPORA) * MAX_WINDOWS
        context.send({"progress": [metrics.step, total]})
        now = time.monotonic()
        is_last = metrics.step == metrics.total
        if now - told.at < EVENT_SECONDS and not is_last and metrics.evaluation_loss is None:
            return
        told.at = now
        message = f"step {metrics.step}/{metrics.total}: loss {metrics.loss:.4f}"
        if metrics.evaluation_loss is not None:
            message += f", evaluation loss {metrics.evaluation_loss:.4f}"
        context.event(message, kind="metrics", data=dataclasses.asdict(metrics))

    def on_checkpoint(step: int) -> None:
        told.checkpoint = step
        curve.save()
        _add_checkpoint(context.folder, step, curve)
        context.event(f"checkpoint of step {step} written", data={"checkpoint": step})

    return Hooks(
        on_event=context.event,
        on_metrics=on_metrics,
        on_checkpoint=on_checkpoint,
        stop_requested=lambda: "cancel" if context.cancelled() else None,
    )


def _add_checkpoint(folder: Path, step: int, curve: _Curve) -> None:
    """Note a checkpoint for the API, or what is known of one by now."""
    path = folder / CHECKPOINTS_NAME
    known = json.loads(path.read_text()) if path.is_file() else []
    others = [other for other in known if other["step"] != step]
    row = next((row for row in curve.rows if row["step"] == step), {})
    losses = {name: row.get(name) for name in ("loss", "evaluation_loss")}
    new = {"step": step, "created_at": time.time(), **losses}
    _write(path, json.dumps(finite([*others, new])).encode())


def _measure(
    context: RunnerContext, source: ModelEntry, folder: Path, trained: FinetuneReport
) -> list[JsonObject]:
    """What training on one text did to others: perplexity before and after. Adds the new model's fingerprint."""
    before, after = load_model(source.path), load_model(folder)
    if source.manifest.fingerprint is not None:
        check_fingerprint(before, source.manifest.fingerprint)
    write_manifest(folder, replace(read_manifest(folder), fingerprint=fingerprint(after)))
    window = min(WINDOW, read_config(folder).get("max_position_embeddings", WINDOW))
    total = trained.steps + len(CORPORA) * MAX_WINDOWS
    corpora = []
    for index, name in enumerate(CORPORA):
        try:
            corpus = load_corpus(name)
        except CorpusError as error:  # an optional package; the first corpus ships with Lathe
            context.event(f"not measured on {name}: {error}", level="warn")
            continue
        offset = trained.steps + index * MAX_WINDOWS
        comparison = compare_models(
            before,
            after,
            folder,
            corpus,
            window=window,
            max_windows=MAX_WINDOWS,
            on_window=lambda done, _, offset=offset: context.progress(offset + done, total),
        )
        corpora.append(corpus_report(comparison))
        context.event(
            f"perplexity on {name}: {comparison.before.value:.3f} before, {comparison.after.value:.3f} after",
            data={"corpus": name, "perplexity": comparison.after.value},
        )
    context.progress(total, total)
    return corpora


def _complete_manifest(folder: Path, report: JsonObject) -> None:
    """The files that it was trained on are its provenance, what it lost and gained its evaluation."""
    manifest = read_manifest(folder)
    evaluations = [
        {
            "name": "finetune_loss",
            "settings": report["settings"],
            "data": report["data"],
            "evaluations": report["evaluations"],
            "num_tokens": report["num_tokens"],
        },
        *({"name": "perplexity", **corpus} for corpus in report["corpora"]),
    ]
    write_manifest(folder, replace(manifest, evaluations=evaluations))


def _write_report(context: RunnerContext, report: JsonObject) -> list[str]:
    """Returns the names of all artifacts."""
    title = f"{context.spec['model']} -> {context.spec['output']}: finetuning"
    pictures: dict[str, bytes] = {}
    if can_plot():
        pictures["loss"] = plot_losses(report["losses"], report["evaluations"])
        if report["refreshes"]:
            pictures["refreshes of subspaces"] = plot_refreshes(
                [(row["step"], row["refreshes"]) for row in report["curve"]],
                report["refreshes_fixed"],
            )
    else:
        context.event("no pictures: matplotlib is missing (extra: plots)", level="warn")
    contents: dict[str, bytes] = {
        REPORT_NAMES[0]: json.dumps(finite(report), indent=1).encode(),
        REPORT_NAMES[1]: to_markdown(title, report).encode(),
        REPORT_NAMES[2]: to_html(title, report, pictures).encode(),
        **{f"{caption.replace(' ', '-')}.png": png for caption, png in pictures.items()},
    }
    for name, content in contents.items():
        _write(context.artifacts / name, content)
    return sorted(contents)


def _write_result_file(context: RunnerContext, report: JsonObject, owner: str) -> str:
    """The curve as a file of the one who trained, as OpenAI gives it: CSV. Returns its id."""
    names = {"step": "step", "loss": "train_loss", "evaluation_loss": "valid_loss"}
    lines = [",".join(names.values())]
    for row in report["curve"]:
        lines.append(",".join("" if row[name] is None else str(row[name]) for name in names))
    store = FileStore(context.home / "files")
    with store.begin() as upload:
        upload.write("\n".join([*lines, ""]).encode())
        info, _ = store.add(
            upload,
            file_id=f"file-{hashlib.sha256(context.job_id.encode()).hexdigest()[:24]}",
            owner=owner,
            filename=f"{context.job_id}-metrics.csv",
            purpose="fine-tune-results",
            request_hash=context.job_id,  # of an earlier attempt, it stays
        )
    return info.id


def _result(model_id: str, report: JsonObject, artifacts: list[str]) -> JsonObject:
    totals = {key: value for key, value in report.items() if key not in ("losses", "curve")}
    return {"model": model_id, "report": totals, "artifacts": artifacts}
