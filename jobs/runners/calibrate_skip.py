"""The calibrate_skip job: find a skip profile, measure what it costs beside the baselines, gate, register.

Every measurement is written down when it ends, so an attempt that follows a killed one goes on behind the last of them
and ends with the same profile. The model registered is the source's files under a new id, with the profile.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from compression.calibration import ARCHITECTURES, CalibrationError
from compression.checkpoint import (
    add_skip_profile,
    checkpoint_hash,
    open_checkpoint,
    torch_dtype_name,
    verify_checkpoint,
)
from compression.ffn_skip.calibrate import (
    Observation,
    SkipCalibration,
    SkipCalibrationError,
    choose_cold,
)
from compression.ffn_skip.profile import MAX_RANK, SkipPoint, SkipProfile, Substitute
from compression.ffn_skip.rule import SkipRule
from compression.ffn_skip.substitute import Fitted
from compression.ffn_skip.traffic import WeightTraffic, weight_traffic
from compression.hf import check_fingerprint, load_model, read_config
from compression.registry import ModelEntry, ModelNotFoundError, ModelRegistry
from compression.safetensors_header import CheckpointError
from evaluation.corpora import STATE_OF_THE_UNION, CorpusError, load_corpus
from evaluation.skip import POLICIES, SkipTrial, to_markdown
from jobs.context import JobFailedError, RunnerContext
from jobs.runners.calibration import calibration_tokens
from jobs.runners.registration import earlier_report, register_output
from jobs.store import JsonObject

REPORT_NAMES = ("report.json", "report.md")
PROFILE_NAME = "skip_profile.json"
TENSORS_NAME = "substitutes.safetensors"
ARTIFACTS = [*REPORT_NAMES, PROFILE_NAME, TENSORS_NAME]
MAX_WINDOWS = 16
DAMAGE_TOKENS = 1024
BISECTION_TOKENS = 4096


def run(context: RunnerContext) -> JsonObject:
    """Run one attempt; returns the job's result.

    Raises:
        JobFailedError: the source is unsound or cannot skip, the gate refused every target, or the output id was
            taken meanwhile.
        JobCancelledError
    """
    registry = ModelRegistry(context.home / "models")
    spec = context.spec
    finished = earlier_report(context, registry)
    if finished is not None:
        return _result(spec["output"], finished)
    try:
        source = registry.get(spec["model"])
        profile, report, tensors = _calibrate(context, source)
    except ModelNotFoundError:
        raise JobFailedError("model_not_found", f"model {spec['model']!r} is gone") from None
    except (CheckpointError, CalibrationError, CorpusError) as error:
        raise JobFailedError("bad_data", str(error)) from error
    except SkipCalibrationError as error:
        raise JobFailedError("cannot_skip", str(error)) from error
    profile = _gate(context, profile, report)
    folder = context.folder / "checkpoint"
    shutil.rmtree(folder, ignore_errors=True)  # of an attempt that did not end
    add_skip_profile(
        source.path,
        folder,
        profile,
        tensors,
        source={
            "model": spec["model"],
            "checkpoint_hash": checkpoint_hash(source.manifest),
        },
        evaluations=[*source.manifest.evaluations, _evaluation(report)],
        job_id=context.job_id,
    )
    problems = verify_checkpoint(folder).problems
    if problems:
        raise JobFailedError("bad_data", f"the written checkpoint is unsound: {problems[0]}")
    register_output(context, registry, folder)
    return _result(spec["output"], report)


class _Measurements:
    """The job's finished measurements by name; each is a step of its progress."""

    def __init__(self, context: RunnerContext, total: int) -> None:
        self._context = context
        self._path = context.folder / "measurements.json"
        self._total = total
        self._step = 0
        self._found: JsonObject = {}
        if self._path.is_file():
            self._found = json.loads(self._path.read_text())
            context.event(f"going on behind {len(self._found)} finished measurements")

    def __call__(self, name: str, measure: Callable[[], Any]) -> Any:
        self._context.progress(self._step, self._total)
        self._step += 1
        if name not in self._found:
            self._found[name] = measure()
            temporary = self._path.with_suffix(".tmp")
            temporary.write_text(json.dumps(self._found))
            temporary.replace(self._path)
        return self._found[name]


def _calibrate(
    context: RunnerContext, source: ModelEntry
) -> tuple[SkipProfile, JsonObject, dict[str, torch.Tensor]]:
    """The profile with every target, gated by none yet; the report; the substitutes' tensors."""
    spec = context.spec
    _check_source(source)
    model = load_model(source.path)
    if source.manifest.fingerprint is not None:
        check_fingerprint(model, source.manifest.fingerprint)
    tokens = calibration_tokens(context, source.path)
    if tokens.ids_NS.shape[1] > model.config.max_position_embeddings:
        raise CalibrationError(
            f"samples of {tokens.ids_NS.shape[1]} tokens, the model takes"
            f" {model.config.max_position_embeddings}"
        )
    calibration = SkipCalibration(
        model,
        tokens.ids_NS,
        k=spec["k"],
        warm_up=spec["warm_up"],
        check=context.check_cancelled,
    )
    targets = sorted(spec["target_ratios"])
    measured = _Measurements(context, total=4 + len(targets) * (1 + len(POLICIES)))

    observation = Observation(
        **measured("observation", lambda: dataclasses.asdict(calibration.observe()))
    )
    damage = measured("damage", lambda: calibration.damage(num_tokens=DAMAGE_TOKENS))
    p10 = [row["p10"] for row in observation.similarity]
    rule = calibration.rule(choose_cold(p10, damage))
    context.event(f"cold layers: first {rule.cold_start}, last {rule.cold_end}")

    dtype = torch_dtype_name(model.get_input_embeddings().weight)
    tensors_path = context.folder / TENSORS_NAME
    rows = measured("substitutes", lambda: _fit(calibration, rule, spec, model, tensors_path))
    tensors = load_file(tensors_path)
    chosen = {int(layer): Substitute(**row["substitute"]) for layer, row in rows.items()}
    fitted = {n: Fitted.from_tensors(chosen[n], n, tensors) for n in chosen}

    trial = SkipTrial(
        model=model,
        folder=source.path,
        corpus=load_corpus(STATE_OF_THE_UNION),
        rule=rule,
        max_windows=MAX_WINDOWS,
        on_window=lambda done, total: context.check_cancelled(),
    )
    dense = measured("dense", trial.dense)
    traffic = weight_traffic(source.manifest, rule.num_layers)
    compared = _Compared(measured, calibration, trial, observation, traffic, chosen, fitted, dtype)
    rows_by_target = []
    for target in targets:
        rows_by_target.append(compared.target(target, dense["perplexity"]))
        ratio = rows_by_target[-1]["policies"]["adaptive, substitutes"]["ratio"]
        context.event(
            f"skipping {target:.0%} of the rows: {ratio:.3f} times the dense perplexity",
            kind="metrics",
            data={"target_ratio": target, "perplexity_ratio": ratio},
        )
    profile = SkipProfile(
        num_layers=rule.num_layers,
        hidden_size=model.config.hidden_size,
        cold_start=rule.cold_start,
        cold_end=rule.cold_end,
        k=rule.k,
        warm_up=rule.warm_up,
        points=tuple(SkipPoint(**row["point"]) for row in rows_by_target),
        substitutes=tuple(chosen.get(n, Substitute()) for n in range(rule.num_layers)),
        dtype=dtype,
        similarity=observation.similarity,
        calibration=tokens.provenance,
    )
    report = {
        "rule": dataclasses.asdict(rule),
        "dense": dense,
        "targets": rows_by_target,
        "calibration": tokens.provenance,
        "layers": [
            {
                "layer": n,
                "similarity": observation.similarity[n],
                "damage": damage[n],
                "block_influence": observation.block_influence[n],
                "substitute": rows[str(n)]["substitute"] if n in chosen else None,
                "missed": rows[str(n)]["missed"] if n in chosen else None,
            }
            for n in range(rule.num_layers)
        ],
    }
    return profile, report, tensors


def _check_source(source: ModelEntry) -> None:
    """Raises: CheckpointError, CalibrationError."""
    open_checkpoint(source.path)
    architecture = read_config(source.path).get("model_type")
    if source.manifest.kind != "decoder" or architecture not in ARCHITECTURES:
        raise CalibrationError(
            f"skipping knows the blocks of {', '.join(ARCHITECTURES)}, not of {architecture!r}"
        )


def _fit(
    calibration: SkipCalibration, rule: SkipRule, spec: JsonObject, model: Any, path: Path
) -> JsonObject:
    """Fit substitutes into a file, rounded to the model's dtype; which kind each layer got."""
    fitted = {}
    if spec["substitutes"]:
        fitted = calibration.fit_substitutes(rule, rank=min(MAX_RANK, model.config.hidden_size))
    tensors = {
        name: tensor.to(model.dtype)
        for layer, (substitute, _) in fitted.items()
        for name, tensor in substitute.tensors(layer).items()
    }
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary)
    temporary.replace(path)
    return {
        str(layer): {
            "substitute": dataclasses.asdict(substitute.substitute),
            "missed": missed,
        }
        for layer, (substitute, missed) in fitted.items()
    }


@dataclasses.dataclass(frozen=True, slots=True)
class _Compared:
    """All policies at one target, reading the same bytes of weights."""

    measured: _Measurements
    calibration: SkipCalibration
    trial: SkipTrial
    observation: Observation
    traffic: WeightTraffic
    chosen: Mapping[int, Substitute]
    fitted: Mapping[int, Fitted]
    dtype: str

    def target(self, target_ratio: float, dense: float) -> JsonObject:
        name = f"{target_ratio}"
        found = self.measured(f"{name} tau", lambda: self._find(target_ratio, self.fitted))
        saved = found["saved"]
        ffn_ratio = self.traffic.feed_forwards_of(saved)
        plain = self.measured(f"{name} plain tau", lambda: self._find(ffn_ratio, {}))
        rows = {}
        for policy in POLICIES:
            measure = partial(self._perplexity, policy, found, plain, ffn_ratio)
            rows[policy] = self.measured(f"{name} {policy}", measure)
            rows[policy]["ratio"] = rows[policy]["perplexity"] / dense
        return {
            "target_ratio": target_ratio,
            "saved": saved,
            "point": {
                "target_ratio": target_ratio,
                "tau": found["tau"],
                "skip_ratio": found["skip_ratio"],
                "perplexity_ratio": rows["adaptive, substitutes"]["ratio"],
            },
            "policies": rows,
        }

    def _find(self, ratio: float, substitutes: Mapping[int, Fitted]) -> JsonObject:
        tau, policy = self.calibration.find_tau(
            self.trial.rule,
            ratio,
            substitutes,
            low=self.observation.lowest,
            high=self.observation.highest,
            num_tokens=BISECTION_TOKENS,
        )
        saved = self.traffic.saved_by_rows(
            policy.num_skipped,
            policy.num_rows,
            self.chosen if substitutes else {},
            hidden_size=self.trial.model.config.hidden_size,
            dtype=self.dtype,
        )
        return {"tau": tau, "skip_ratio": policy.skip_ratio, "saved": saved}

    def _perplexity(
        self, policy: str, found: JsonObject, plain: JsonObject, ffn_ratio: float
    ) -> JsonObject:
        if policy == "adaptive, substitutes":
            return self.trial.adaptive(found["tau"], self.fitted)
        if policy == "adaptive":
            return self.trial.adaptive(plain["tau"], {})
        num_blocks = self.traffic.blocks_of(found["saved"])
        return self.trial.baseline(policy, self.observation, ffn_ratio, num_blocks)


def _gate(context: RunnerContext, profile: SkipProfile, report: JsonObject) -> SkipProfile:
    """The profile without the targets that lose more than their owner allows; report and profile become artefacts.

    Raises:
        JobFailedError: no target is left.
    """
    limit = context.spec["gate"]["max_perplexity_ratio"]
    kept = tuple(
        point
        for point in profile.points
        if point.perplexity_ratio is not None and point.perplexity_ratio <= limit
    )  # a NaN is refused too
    report["max_perplexity_ratio"] = limit
    report["offered"] = [point.target_ratio for point in kept]
    title = f"{context.spec['model']} -> {context.spec['output']}: skipping feed-forwards"
    contents = {
        REPORT_NAMES[0]: json.dumps(report, indent=1),
        REPORT_NAMES[1]: to_markdown(title, report),
        PROFILE_NAME: json.dumps(profile.to_json(), indent=1),
    }
    for name, content in contents.items():
        temporary = context.artifacts / f".{name}.tmp"
        temporary.write_text(content)
        temporary.replace(context.artifacts / name)
    shutil.copyfile(context.folder / TENSORS_NAME, context.artifacts / TENSORS_NAME)
    for point in profile.points:
        if point not in kept:
            context.event(
                f"target_ratio {point.target_ratio} is not offered: perplexity ratio"
                f" {point.perplexity_ratio:.4f} exceeds {limit}",
                level="warn",
            )
    if not kept:
        ratios = ", ".join(f"{point.perplexity_ratio:.4f}" for point in profile.points)
        raise JobFailedError(
            "gate_refused",
            f"perplexity ratios {ratios} exceed max_perplexity_ratio {limit}; the model is not registered",
            result=_result(None, report),
        )
    return dataclasses.replace(profile, points=kept)


def _evaluation(report: JsonObject) -> JsonObject:
    offered = {
        str(target["target_ratio"]): target["policies"]["adaptive, substitutes"]
        for target in report["targets"]
        if target["target_ratio"] in report["offered"]
    }
    return {"name": "ffn_skip_perplexity", "dense": report["dense"], "targets": offered}


def _result(model_id: str | None, report: JsonObject) -> JsonObject:
    totals = {key: value for key, value in report.items() if key != "layers"}
    return {"model": model_id, "report": totals, "artifacts": ARTIFACTS}
