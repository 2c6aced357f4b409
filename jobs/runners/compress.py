"""The compress job: recipe, checks, perplexity and speed before and after, gate, registration.

Safe to kill at any moment: all work is in the job's folder until one rename puts the model into the registry, and an
attempt that finds its job's own model there has nothing left to do but report it.
"""

import json
import shutil
from pathlib import Path

import torch

from compression.checkpoint import (
    Manifest,
    open_checkpoint,
    read_manifest,
    verify_checkpoint,
    write_manifest,
)
from compression.hf import check_fingerprint, fingerprint, load_model, resident_bytes
from compression.pipeline import compress
from compression.recipe import parse_recipe
from compression.registry import ModelExistsError, ModelNotFoundError, ModelRegistry
from compression.safetensors_header import CheckpointError
from evaluation.corpora import STATE_OF_THE_UNION, load_corpus
from evaluation.perplexity import Perplexity, measure_perplexity
from evaluation.report import build_report, to_markdown
from evaluation.speed import Speed, compare_speed
from jobs.context import JobFailedError, RunnerContext
from jobs.store import JsonObject

REPORT_NAMES = ("report.json", "report.md")
MAX_WINDOWS = 16
_STEPS_PER_PERPLEXITY = MAX_WINDOWS
_STEPS_SPEED = 4


def run(context: RunnerContext) -> JsonObject:
    """Run one attempt; returns the job's result.

    Raises:
        JobFailedError: the source is unsound, the gate refused, or the output id was taken meanwhile.
        JobCancelledError
    """
    registry = ModelRegistry(context.home / "models")
    spec = context.spec
    finished = _own_earlier_result(context, registry)
    if finished is not None:
        context.event("an earlier attempt had finished; its model is registered")
        return finished
    try:
        source = registry.get(spec["model"])
        manifest = _compress(context, source.path, registry)
    except ModelNotFoundError:
        raise JobFailedError("model_not_found", f"model {spec['model']!r} is gone") from None
    except CheckpointError as error:
        raise JobFailedError("bad_data", str(error)) from error
    folder = context.folder / "checkpoint"
    report = _measure(context, source.path, folder, source.manifest, manifest)
    _write_report(context, report)
    _check_gate(spec.get("gate") or {}, report)
    context.check_cancelled()
    try:
        registry.register(folder, spec["output"])
    except ModelExistsError:
        raise JobFailedError("model_exists", f"model {spec['output']!r} exists already") from None
    context.event(f"registered {spec['output']}")
    return _result(spec["output"], report)


def _own_earlier_result(context: RunnerContext, registry: ModelRegistry) -> JsonObject | None:
    try:
        entry = registry.get(context.spec["output"])
    except ModelNotFoundError:
        return None
    report_path = context.artifacts / REPORT_NAMES[0]
    if entry.manifest.job_id != context.job_id or not report_path.is_file():
        return None
    return _result(entry.id, json.loads(report_path.read_text()))


def _compress(context: RunnerContext, source: Path, registry: ModelRegistry) -> Manifest:
    folder = context.folder / "checkpoint"
    shutil.rmtree(folder, ignore_errors=True)  # of an attempt that did not end
    context.event(f"compressing {context.spec['model']}")
    num_matrices = len(open_checkpoint(source).manifest.matrices)
    total = num_matrices + 2 * _STEPS_PER_PERPLEXITY + _STEPS_SPEED
    manifest = compress(
        source,
        folder,
        parse_recipe(context.spec["recipe"]),
        source_id=context.spec["model"],
        job_id=context.job_id,
        progress=lambda done, _: context.progress(done, total),
    )
    problems = verify_checkpoint(folder).problems
    if problems:
        raise CheckpointError(f"the written checkpoint is unsound: {problems[0]}")
    context.event("checkpoint written and verified", data={"bytes_ratio": manifest.ratios["bytes"]})
    return manifest


def _measure(
    context: RunnerContext, source: Path, folder: Path, before: Manifest, after: Manifest
) -> JsonObject:
    """Load both models in turn and side by side; adds fingerprint and evaluation to the new manifest."""
    base = len(after.matrices)
    total = base + 2 * _STEPS_PER_PERPLEXITY + _STEPS_SPEED
    corpus = load_corpus(STATE_OF_THE_UNION)
    models = {"before": load_model(source), "after": load_model(folder)}
    if before.fingerprint is not None:
        check_fingerprint(models["before"], before.fingerprint)
    perplexities: dict[str, Perplexity] = {}
    for index, (name, model) in enumerate(models.items()):
        offset = base + index * _STEPS_PER_PERPLEXITY
        perplexities[name] = measure_perplexity(
            model,
            folder,
            corpus,
            max_windows=MAX_WINDOWS,
            on_window=lambda done, _, offset=offset: context.progress(offset + done, total),
        )
        context.event(
            f"perplexity {name}: {perplexities[name].value:.3f}",
            kind="metrics",
            data={f"perplexity_{name}": perplexities[name].value},
        )
    offset = base + 2 * _STEPS_PER_PERPLEXITY
    speeds: dict[str, Speed] = compare_speed(
        models, on_round=lambda done, _: context.progress(offset + done, total)
    )
    report = build_report(
        before=before,
        after=after,
        resident_before=resident_bytes(models["before"]),
        resident_after=resident_bytes(models["after"]),
        perplexity_before=perplexities["before"],
        perplexity_after=perplexities["after"],
        speed_before=speeds["before"],
        speed_after=speeds["after"],
    )
    _complete_manifest(folder, models["after"], report)
    context.progress(total, total)
    return report


def _complete_manifest(folder: Path, model: torch.nn.Module, report: JsonObject) -> None:
    from dataclasses import replace

    manifest = read_manifest(folder)
    evaluation = {"name": "perplexity", **report["perplexity"]}
    write_manifest(
        folder, replace(manifest, fingerprint=fingerprint(model), evaluations=[evaluation])
    )


def _write_report(context: RunnerContext, report: JsonObject) -> None:
    title = f"{context.spec['model']} -> {context.spec['output']}"
    contents = (json.dumps(report, indent=1), to_markdown(title, report))
    for name, content in zip(REPORT_NAMES, contents, strict=True):
        temporary = context.artifacts / f".{name}.tmp"
        temporary.write_text(content)
        temporary.replace(context.artifacts / name)


def _check_gate(gate: JsonObject, report: JsonObject) -> None:
    """Raises: JobFailedError: the compressed model lost more than its owner allows."""
    limit = gate.get("max_perplexity_ratio")
    ratio = report["perplexity"]["ratio"]
    if limit is not None and not ratio <= limit:  # a NaN is refused too
        raise JobFailedError(
            "gate_refused",
            f"perplexity ratio {ratio:.4f} exceeds max_perplexity_ratio {limit}; the model is not registered",
            result={"model": None, "report": report, "artifacts": list(REPORT_NAMES)},
        )


def _result(model_id: str, report: JsonObject) -> JsonObject:
    totals = {key: value for key, value in report.items() if key != "matrices"}
    return {"model": model_id, "report": totals, "artifacts": list(REPORT_NAMES)}
