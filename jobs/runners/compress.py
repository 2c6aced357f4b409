"""The compress job: recipe, checks, what was lost before and after, gate, registration.

Safe to kill at any moment: all work is in the job's folder until one rename puts the model into the registry; the next
attempt goes on after the last finished block, and one that finds its job's own model there has nothing left to do but
report it.
"""

import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy
import torch

from compression.calibration import CalibrationError
from compression.checkpoint import Manifest, read_manifest, verify_checkpoint, write_manifest
from compression.hf import check_fingerprint, fingerprint, load_model, read_config, resident_bytes
from compression.memory import trim_heap
from compression.pipeline import compress
from compression.recipe import parse_recipe
from compression.registry import ModelNotFoundError, ModelRegistry
from compression.safetensors_header import CheckpointError
from compression.stages import SPECTRA_NAME, StageError
from evaluation.corpora import CORPORA, Corpus, CorpusError, load_corpus
from evaluation.perplexity import Comparison, compare_models
from evaluation.plots import can_plot, plot_ranks, plot_spectra
from evaluation.report import (
    build_report,
    to_html,
    to_markdown,
    worst_perplexity_ratio,
    worst_top1_agreement,
)
from evaluation.speed import Speed, compare_speed
from jobs.context import JobFailedError, RunnerContext, finite
from jobs.runners.calibration import calibration_tokens
from jobs.runners.registration import earlier_report, register_output
from jobs.store import JsonObject

REPORT_NAMES = ("report.json", "report.md", "report.html")
REFUSED_NAME = "checkpoint.tar"
WINDOW, MAX_WINDOWS = 512, 16
_STEPS_SPEED = 4
_TOTALS_LEAVE_OUT = ("matrices", "stage_results")


def run(context: RunnerContext) -> JsonObject:
    """Run one attempt; returns the job's result.

    Raises:
        JobFailedError: the source is unsound, the recipe does not fit it, the gate refused, or the output id was
            taken meanwhile.
        JobCancelledError
    """
    registry = ModelRegistry(context.home / "models")
    spec = context.spec
    finished = earlier_report(context, registry)
    if finished is not None:
        artifacts = sorted(path.name for path in context.artifacts.iterdir())
        return _result(spec["output"], finished, artifacts)
    try:
        source = registry.get(spec["model"])
        manifest, folder = _compress(context, source.path)
        report = _measure(context, source.path, folder, source.manifest, manifest)
    except ModelNotFoundError:
        raise JobFailedError("model_not_found", f"model {spec['model']!r} is gone") from None
    except CheckpointError as error:
        raise JobFailedError("bad_data", str(error)) from error
    except (CalibrationError, CorpusError) as error:
        raise JobFailedError("bad_calibration", str(error)) from error
    except StageError as error:
        raise JobFailedError("bad_recipe", str(error)) from error
    artifacts = _write_report(context, report)
    _check_gate(context, folder, report, artifacts)
    register_output(context, registry, folder)
    shutil.rmtree(_work(context), ignore_errors=True)
    return _result(spec["output"], report, artifacts)


def _work(context: RunnerContext) -> Path:
    return context.folder / "work"


def _compress(context: RunnerContext, source: Path) -> tuple[Manifest, Path]:
    folder = context.folder / "checkpoint"
    recipe = parse_recipe(context.spec["recipe"])
    problems = verify_checkpoint(source).problems
    if problems:
        raise CheckpointError(f"{context.spec['model']} is unsound: {problems[0]}")
    context.event(f"compressing {context.spec['model']}")
    manifest = compress(
        source,
        folder,
        recipe,
        source_id=context.spec["model"],
        job_id=context.job_id,
        calibration=calibration_tokens(context, source) if recipe.calibrated else None,
        work=_work(context),
        cache=context.home / "cache" / "singular-values",
        progress=lambda done, total: context.progress(done, total + _num_steps()),
    )
    problems = verify_checkpoint(folder).problems
    if problems:
        raise CheckpointError(f"the written checkpoint is unsound: {problems[0]}")
    context.event("checkpoint written and verified", data={"ratios": manifest.ratios})
    return manifest, folder


def _num_steps() -> int:
    """Steps of the job after compression."""
    return len(CORPORA) * MAX_WINDOWS + _STEPS_SPEED


def _measure(
    context: RunnerContext, source: Path, folder: Path, before: Manifest, after: Manifest
) -> JsonObject:
    """Load both models and measure them side by side; adds fingerprint and evaluations to the new manifest."""
    base = len(after.matrices)
    total = base + _num_steps()
    corpora = _load_corpora(context)
    trim_heap()  # of what compressing and reading left
    models = {"before": load_model(source), "after": load_model(folder)}
    if before.fingerprint is not None:
        check_fingerprint(models["before"], before.fingerprint)
    comparisons: list[Comparison] = []
    for index, corpus in enumerate(corpora):
        offset = base + index * MAX_WINDOWS
        comparison = compare_models(
            models["before"],
            models["after"],
            folder,
            corpus,
            window=min(WINDOW, read_config(folder).get("max_position_embeddings", WINDOW)),
            max_windows=MAX_WINDOWS,
            on_window=lambda done, _, offset=offset: context.progress(offset + done, total),
        )
        comparisons.append(comparison)
        context.event(
            f"perplexity on {corpus.name}: {comparison.before.value:.3f} before, {comparison.after.value:.3f} after",
            kind="metrics",
            data={"corpus": corpus.name, "perplexity": comparison.after.value},
        )
    offset = total - _STEPS_SPEED
    speeds: dict[str, Speed] = compare_speed(
        models, on_round=lambda done, _: context.progress(offset + done, total)
    )
    report = build_report(
        before=before,
        after=after,
        resident_before=resident_bytes(models["before"]),
        resident_after=resident_bytes(models["after"]),
        comparisons=comparisons,
        speed_before=speeds["before"],
        speed_after=speeds["after"],
    )
    _complete_manifest(folder, models["after"], report)
    context.progress(total, total)
    return report


def _load_corpora(context: RunnerContext) -> list[Corpus]:
    corpora = []
    for name in CORPORA:
        try:
            corpora.append(load_corpus(name))
        except CorpusError as error:  # an optional package; the first corpus ships with Lathe
            context.event(f"not measured on {name}: {error}", level="warn")
    return corpora


def _complete_manifest(folder: Path, model: torch.nn.Module, report: JsonObject) -> None:
    manifest = read_manifest(folder)
    evaluations = [{"name": "perplexity", **corpus} for corpus in report["corpora"]]
    write_manifest(
        folder, replace(manifest, fingerprint=fingerprint(model), evaluations=evaluations)
    )


def _write_report(context: RunnerContext, report: JsonObject) -> list[str]:
    """Returns the names of all artifacts."""
    title = f"{context.spec['model']} -> {context.spec['output']}"
    pictures = _pictures(context, report)
    contents: dict[str, bytes] = {
        REPORT_NAMES[0]: json.dumps(finite(report), indent=1).encode(),
        REPORT_NAMES[1]: to_markdown(title, report).encode(),
        REPORT_NAMES[2]: to_html(title, report, pictures).encode(),
        **{f"{caption.replace(' ', '-')}.png": png for caption, png in pictures.items()},
    }
    for name, content in contents.items():
        temporary = context.artifacts / f".{name}.tmp"
        temporary.write_bytes(content)
        temporary.replace(context.artifacts / name)
    return list(contents)


def _pictures(context: RunnerContext, report: JsonObject) -> dict[str, bytes]:
    """Caption to PNG; none without a low-rank stage, or without matplotlib."""
    for index, stage in enumerate(parse_recipe(context.spec["recipe"]).stages):
        if stage.name != "welore":
            continue
        if not can_plot():
            context.event("no pictures: matplotlib is missing (extra: plots)", level="warn")
            return {}
        with numpy.load(_work(context) / f"stage-{index}" / SPECTRA_NAME) as file:
            spectra = {name: file[name] for name in file.files}
        plan = next(r["welore"] for r in reversed(report["stage_results"]) if "welore" in r)
        kept = {name: rank / len(spectra[name]) for name, rank in plan["ranks"].items()}
        return {
            "kept ranks": plot_ranks(kept),
            "singular values": plot_spectra(spectra, plan["threshold"]),
        }
    return {}


def _check_gate(
    context: RunnerContext, folder: Path, report: JsonObject, artifacts: list[str]
) -> None:
    """The worst corpus counts. A refused checkpoint is kept as an artifact.

    Raises:
        JobFailedError: the compressed model lost more than its owner allows.
    """
    gate = context.spec.get("gate") or {}
    ratio, limit = worst_perplexity_ratio(report), gate.get("max_perplexity_ratio")
    agreement, least = worst_top1_agreement(report), gate.get("min_top1_agreement")
    refusals = []
    if limit is not None and not ratio <= limit:  # a NaN is refused too
        refusals.append(f"perplexity ratio {ratio:.4f} exceeds max_perplexity_ratio {limit}")
    if least is not None and not agreement >= least:
        refusals.append(f"top-1 agreement {agreement:.4f} is below min_top1_agreement {least}")
    if not refusals:
        return
    temporary = context.artifacts / f".{REFUSED_NAME}.tmp"
    with tarfile.open(temporary, "w") as archive:
        archive.add(folder, arcname=context.spec["output"])
    temporary.replace(context.artifacts / REFUSED_NAME)
    shutil.rmtree(folder)
    shutil.rmtree(_work(context), ignore_errors=True)
    raise JobFailedError(
        "gate_refused",
        f"{'; '.join(refusals)}; the model is not registered, {REFUSED_NAME} has it",
        result=_result(None, report, [*artifacts, REFUSED_NAME]),
    )


def _result(model_id: str | None, report: JsonObject, artifacts: list[str]) -> JsonObject:
    totals = {key: value for key, value in report.items() if key not in _TOTALS_LEAVE_OUT}
    return {"model": model_id, "report": totals, "artifacts": artifacts}
