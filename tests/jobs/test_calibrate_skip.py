"""The calibrate_skip job from spec to registered model: gates, kills, bad input, figures against a second look."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from compression.calibration import CalibrationTokens
from compression.checkpoint import LAYER_SHAPES, open_checkpoint, verify_checkpoint
from compression.ffn_skip.calibrate import SkipCalibration
from compression.ffn_skip.profile import SkipProfile
from compression.ffn_skip.rule import SkipRule
from compression.ffn_skip.substitute import Fitted
from compression.ffn_skip.teacher_forced import AdaptiveSkip, feed_forwards_replaced
from compression.hf import load_model, read_config
from compression.pipeline import compress
from compression.recipe import parse_recipe
from compression.registry import ModelNotFoundError, ModelRegistry
from engines.engine import NativeEngine
from engines.protocol import SamplingParams, Skip
from evaluation.corpora import load_corpus
from evaluation.perplexity import measure_perplexity
from evaluation.skip import POLICIES, SkipTrial
from jobs import child
from jobs.context import JobCancelledError, RunnerContext
from jobs.files import FileStore
from jobs.runners import calibrate_skip as runner
from jobs.spec import CalibrateSkipSpec, SpecError, check_source, parse_spec
from tests.compression.ffn_skip.models import skipping_llama
from tests.compression.models import save_and_import
from tests.engines.decoding import build_request, run_one, token_ids_of
from tests.reference.ffn_skip import generate

BODY = {
    "type": "calibrate_skip",
    "model": "tiny",
    "output": "skipping",
    "target_ratios": [0.2, 0.1],
    "warm_up": 4,
    "calibration": {"corpus": "state-of-the-union", "samples": 50, "length": 48},
    "gate": {"max_perplexity_ratio": 50},
}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "MAX_WINDOWS", 2)
    monkeypatch.setattr("evaluation.skip.SCORED_TOKENS", 32)
    monkeypatch.setattr("compression.ffn_skip.calibrate.TOKENS_PER_BATCH", 480)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    model = skipping_llama(6, vocab_size=64)
    save_and_import(model, tmp_path / "hf", tmp_path / "home" / "models")
    return tmp_path / "home"


def context_of(home: Path, job_id: str = "job-1", **changes: Any) -> RunnerContext:
    spec = parse_spec(BODY | changes).model_dump(mode="json", exclude_none=True)
    folder = home / "jobs" / job_id
    folder.mkdir(parents=True, exist_ok=True)
    messages: list[Any] = []
    return RunnerContext(
        job_id=job_id,
        owner="me",
        attempt=1,
        spec=spec,
        folder=folder,
        home=home,
        send=messages.append,
    )


def outcome(context: RunnerContext) -> Any:
    """As the job's process reports it."""
    return json.loads(child._outcome(context, child.RUNNERS["calibrate_skip"]))


def test_the_model_is_the_same_weights_with_a_profile(home: Path) -> None:
    context = context_of(home)
    result = outcome(context)["result"]
    registry = ModelRegistry(home / "models")
    tiny, skipping = registry.get("tiny"), registry.get("skipping")
    assert verify_checkpoint(skipping.path).ok
    weights = tiny.path / "model.safetensors", skipping.path / "model.safetensors"
    assert weights[0].samefile(weights[1])
    profile = skipping.manifest.skip_profile
    assert profile is not None
    assert [point.target_ratio for point in profile.points] == [0.1, 0.2]
    assert skipping.manifest.job_id == "job-1"
    assert skipping.manifest.evaluations[-1]["targets"].keys() == {"0.1", "0.2"}
    assert result["model"] == "skipping"
    assert set(result["artifacts"]) == {path.name for path in context.artifacts.iterdir()}
    assert outcome(context)["result"] == result  # a second attempt finds it done

    # The profile's figures, measured again from the checkpoint alone.
    rule = SkipRule(
        num_layers=6, cold_start=profile.cold_start, cold_end=profile.cold_end, warm_up=4
    )
    names = list(profile.tensors())
    assert names
    tensors = dict(open_checkpoint(skipping.path).tensors(names))
    substitutes = {n: Fitted.from_tensors(profile.substitutes[n], n, tensors) for n in rule.middle}
    model = load_model(skipping.path)
    policy = AdaptiveSkip(rule, profile.tau(0.2), substitutes)
    speeches = load_corpus("state-of-the-union")
    protocol: dict[str, Any] = {"window": 37, "stride": 32, "max_windows": 2}
    dense = measure_perplexity(model, tiny.path, speeches, **protocol).value
    with feed_forwards_replaced(model, policy):
        found = measure_perplexity(model, tiny.path, speeches, **protocol)
    report = json.loads((context.artifacts / "report.json").read_text())
    row = report["targets"][1]["policies"]["adaptive, substitutes"]
    assert row["perplexity"] == pytest.approx(found.value, rel=1e-4)
    assert row["skip_ratio"] == pytest.approx(policy.skip_ratio)
    assert row["protocol"]["num_tokens"] == found.protocol.num_tokens
    assert profile.points[1].perplexity_ratio == pytest.approx(found.value / dense, rel=1e-4)
    markdown = (context.artifacts / "report.md").read_text()
    for target in report["targets"]:
        assert target["policies"].keys() == POLICIES.keys()
        # Equal weight traffic: substitutes cost a little, so plain skipping skips a little less.
        plain, fitted = (target["policies"][name] for name in ("adaptive", "adaptive, substitutes"))
        assert target["saved"] > 0
        assert plain["skip_ratio"] <= fitted["skip_ratio"] + 0.02
        assert f"{plain['perplexity']:.2f}" in markdown


def test_it_calibrates_on_an_uploaded_file(home: Path) -> None:
    store = FileStore(home / "files")
    text = load_corpus("state-of-the-union").text
    with store.begin() as file:
        file.write(json.dumps({"text": text[:9000]}).encode())
        info, _ = store.add(
            file, file_id="file-1", owner="local", filename="f", purpose="calibration",
            request_hash="h", max_owner_bytes=10**6,
        )  # fmt: skip
    calibration = {"file": "file-1", "samples": 50, "length": 48}
    result = outcome(context_of(home, calibration=calibration, target_ratios=[0.1]))["result"]
    profile = ModelRegistry(home / "models").get("skipping").manifest.skip_profile
    assert profile is not None
    assert (profile.calibration["file"], profile.calibration["file_sha256"]) == (
        "file-1",
        info.sha256,
    )
    assert result["report"]["calibration"] == profile.calibration


def test_a_flap_pruned_model_skips_and_decodes_as_its_modules_do(tmp_path: Path) -> None:
    """Blocks of unequal width, with biases on what was cut: the job, then the engine against the naive loop."""
    home = tmp_path / "home"
    registry = ModelRegistry(home / "models")
    model = skipping_llama(6, vocab_size=64, width=256)
    model.model.layers[2].mlp.down_proj.weight[:, :64] *= 3  # makes its other neurons look alike
    source = save_and_import(model, tmp_path / "hf", home / "models")
    ids_NS = torch.randint(0, 64, (4, 32), generator=torch.Generator().manual_seed(1))
    folder = home / "models" / "pruned"
    compress(
        source,
        folder,
        parse_recipe([{"flap": {"sparsity": 0.2}}]),
        source_id="tiny",
        calibration=CalibrationTokens(ids_NS=ids_NS, provenance={}),
    )
    shapes = read_config(folder)[LAYER_SHAPES]
    assert len({shape["intermediate_size"] for shape in shapes}) > 1
    assert any(
        matrix.linear.bias
        for matrix in registry.get("pruned").manifest.matrices
        if matrix.name.endswith("mlp.down_proj")
    )
    context = context_of(home, model="pruned", target_ratios=[0.1])
    result = outcome(context)["result"]
    assert result["model"] == "skipping"
    skipping = registry.get("skipping")
    assert verify_checkpoint(skipping.path).ok
    profile = skipping.manifest.skip_profile
    assert profile is not None
    tensors = dict(open_checkpoint(skipping.path).tensors(list(profile.tensors())))
    substitutes = {
        n: Fitted.from_tensors(kind, n, {name: t.float() for name, t in tensors.items()})
        for n, kind in enumerate(profile.substitutes)
        if kind.kind != "none"
    }
    prompt = [5, 9, 20, 11, 30, 8]
    trace = generate(
        load_model(skipping.path, dtype=torch.float32),
        prompt,
        40,
        tau=profile.tau(0.1),
        k=profile.k,
        warm_up=profile.warm_up,
        cold=(profile.cold_start, profile.cold_end),
        substitutes=substitutes,
    )
    engine = NativeEngine.load("skipping", skipping.path, dtype=torch.float32)
    params = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
    request = build_request("r", prompt, params, skip=Skip(mode="target", target_ratio=0.1))
    outputs = run_one(engine, request)
    assert token_ids_of(outputs) == trace.token_ids
    assert outputs[-1].ffn_rows_skipped == len(trace.skipped) > 0


def test_the_gate_leaves_out_what_loses_more(home: Path) -> None:
    outcome(context_of(home))
    registry = ModelRegistry(home / "models")
    profile = registry.get("skipping").manifest.skip_profile
    assert profile is not None
    ratios = [point.perplexity_ratio or 0 for point in profile.points]
    low, high = sorted(ratios)
    between = {"max_perplexity_ratio": (low + high) / 2}
    result = outcome(context_of(home, "job-2", output="part", gate=between))["result"]
    (kept,) = [point for point in profile.points if point.perplexity_ratio == low]
    assert result["report"]["offered"] == [kept.target_ratio]
    part = registry.get("part").manifest.skip_profile
    assert part is not None
    assert part.points == (kept,)
    assert part.tau() == kept.tau

    context = context_of(home, "job-3", output="none", gate={"max_perplexity_ratio": 0.01})
    refused = outcome(context)
    assert refused["failed"]["code"] == "gate_refused"
    assert refused["found"]["model"] is None
    with pytest.raises(ModelNotFoundError):
        registry.get("none")
    # Kept as an artefact, whole: profile and tensors fit together.
    kept_json = json.loads((context.artifacts / "skip_profile.json").read_text())
    kept_profile = SkipProfile.from_json(kept_json)
    kept_tensors = load_file(context.artifacts / "substitutes.safetensors")
    assert {name: tuple(t.shape) for name, t in kept_tensors.items()} == {
        name: info.shape for name, info in kept_profile.tensors().items()
    }


def test_an_attempt_goes_on_behind_finished_measurements(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = context_of(home, "job-whole", output="whole")
    expected = outcome(whole)["result"]["report"]

    class KilledError(BaseException):
        pass

    context = context_of(home)
    original = SkipTrial.baseline

    def dying(*args: Any, **kwargs: Any) -> Any:
        raise KilledError

    monkeypatch.setattr(SkipTrial, "baseline", dying)
    with pytest.raises(KilledError):
        runner.run(context)
    monkeypatch.setattr(SkipTrial, "baseline", original)
    finished = json.loads((context.folder / "measurements.json").read_text())
    assert "substitutes" in finished

    def again(*args: Any, **kwargs: Any) -> Any:
        pytest.fail("measured again")

    for name in ("observe", "damage", "fit_substitutes"):
        monkeypatch.setattr(SkipCalibration, name, again)
    assert outcome(context)["result"]["report"] == expected
    profiles = [ModelRegistry(home / "models").get(n).manifest for n in ("whole", "skipping")]
    assert profiles[0].skip_profile == profiles[1].skip_profile


def test_it_stops_when_asked(home: Path) -> None:
    context = context_of(home)
    calls = 0

    def cancelled() -> bool:
        nonlocal calls
        calls += 1
        return calls > 20

    stopping = RunnerContext(
        job_id=context.job_id, owner="me", attempt=1, spec=context.spec, folder=context.folder, home=home,
        send=lambda message: None, cancelled=cancelled,
    )  # fmt: skip
    with pytest.raises(JobCancelledError):
        runner.run(stopping)
    with pytest.raises(ModelNotFoundError):
        ModelRegistry(home / "models").get("skipping")


def test_skipping_as_published_has_no_substitutes(home: Path) -> None:
    outcome(context_of(home, substitutes=False, target_ratios=[0.15]))
    manifest = ModelRegistry(home / "models").get("skipping").manifest
    assert manifest.skip_profile is not None
    assert manifest.skip_tensors() == {}
    assert {substitute.kind for substitute in manifest.skip_profile.substitutes} == {"none"}


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"target_ratios": [0.9]}, "cannot_skip", "cannot be reached"),
        ({"warm_up": 60}, "cannot_skip", "none behind a warm-up"),
        ({"calibration": BODY["calibration"] | {"length": 4096}}, "bad_data", "model takes 128"),  # type: ignore[operator]
    ],
)
def test_what_cannot_be_done_fails_by_name(
    home: Path, changes: dict[str, Any], code: str, message: str
) -> None:
    failed = outcome(context_of(home, **changes))["failed"]
    assert failed["code"] == code
    assert message in failed["message"]
    with pytest.raises(ModelNotFoundError):
        ModelRegistry(home / "models").get("skipping")


def test_a_source_that_is_damaged_or_gone(home: Path) -> None:
    weights = home / "models" / "tiny" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    assert outcome(context_of(home))["failed"]["code"] == "bad_data"
    failed = outcome(context_of(home, model="nobody"))["failed"]
    assert failed["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"target_ratios": []}, "target_ratios"),
        ({"target_ratios": [0.2, 0.2]}, "target_ratios"),
        ({"target_ratios": [0.1, 1.0]}, "target_ratios[1]"),
        ({"k": 0}, "k"),
        ({"recipe": []}, "recipe"),
        ({"gate": {"min_top1_agreement": 0.5}}, "gate.min_top1_agreement"),
        ({"calibration": {"file": "../file-1"}}, "calibration.file"),
        ({"calibration": {"file": "file-1", "corpus": "state-of-the-union"}}, "calibration"),
        ({"calibration": {"corpus": "nothing"}}, "calibration.corpus"),
    ],
)
def test_bad_specs_name_the_field(changes: dict[str, Any], param: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec(BODY | changes)
    assert caught.value.param == param


def test_defaults_and_kind() -> None:
    spec = parse_spec({key: BODY[key] for key in ("type", "model", "output")})
    assert isinstance(spec, CalibrateSkipSpec)
    assert spec.target_ratios == (0.1, 0.2, 0.25, 0.3)
    assert spec.gate.max_perplexity_ratio == 1.5
    encoder: Any = type("Manifest", (), {"kind": "encoder"})()
    with pytest.raises(SpecError, match="decoders only"):
        check_source(spec, encoder, {})


def test_dtype_of_the_model_is_kept(home: Path) -> None:
    outcome(context_of(home))
    folder = ModelRegistry(home / "models").get("skipping").path
    tensors = load_file(folder / "skip_profile.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
