"""The compress job from spec to registered model: report against independent measurement, gates, kills, bad input."""

import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from compression import pipeline
from compression.checkpoint import (
    checkpoint_hash,
    hash_file,
    read_manifest,
    verify_checkpoint,
    write_manifest,
)
from compression.hf import load_model
from compression.registry import ModelNotFoundError, ModelRegistry
from evaluation.corpora import STATE_OF_THE_UNION, Corpus, load_corpus
from evaluation.perplexity import measure_perplexity, tokenize
from jobs import child
from jobs.context import RunnerContext
from jobs.files import FileInfo, FileStore
from jobs.runners import compress as runner
from tests.compression.models import save_and_import, tiny_decoder

WELORE_INT4: list[dict[str, Any]] = [
    {"welore": {"err": 0.3, "count": "all", "rank_multiple": 32}},
    {"int4": {"group_size": 32, "method": "gptq"}},
]
CALIBRATION = {"corpus": STATE_OF_THE_UNION, "samples": 4, "length": 32}


@pytest.fixture(autouse=True)
def one_short_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """The speeches only: the other corpus is optional, and large for a tokenizer of letters."""
    monkeypatch.setattr(runner, "CORPORA", (STATE_OF_THE_UNION,))
    monkeypatch.setattr(runner, "MAX_WINDOWS", 3)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    save_and_import(tiny_decoder(), tmp_path / "hf", tmp_path / "home" / "models")
    return tmp_path / "home"


def context_of(home: Path, recipe: list[dict[str, Any]], **spec: Any) -> RunnerContext:
    messages: list[Any] = []
    return RunnerContext(
        job_id="job-1",
        owner="me",
        attempt=1,
        spec={"type": "compress", "model": "tiny", "output": "small", "recipe": recipe, **spec},
        folder=home / "jobs" / "job-1",
        home=home,
        send=messages.append,
    )


def outcome(context: RunnerContext) -> Any:
    """As the job's process reports it."""
    context.folder.mkdir(parents=True, exist_ok=True)
    return json.loads(child._outcome(context, "jobs.runners.compress:run"))


def test_the_report_says_what_independent_measurement_says(home: Path) -> None:
    context = context_of(home, WELORE_INT4, calibration=CALIBRATION)
    result = outcome(context)["result"]
    registry = ModelRegistry(home / "models")
    small, tiny = registry.get("small"), registry.get("tiny")
    assert verify_checkpoint(small.path).ok
    assert small.manifest.fingerprint is not None
    assert small.manifest.calibration is not None
    assert small.manifest.calibration["corpus_sha256"] == load_corpus(STATE_OF_THE_UNION).sha256
    report = json.loads((context.artifacts / "report.json").read_text())
    corpus = report["perplexity"]
    models = [load_model(entry.path) for entry in (tiny, small)]
    speeches = load_corpus(STATE_OF_THE_UNION)
    for model, side in zip(models, ("before", "after"), strict=True):
        found = measure_perplexity(model, tiny.path, speeches, window=64, stride=64, max_windows=3)
        assert corpus[side] == pytest.approx(found.value, rel=1e-3)
    # KL and agreement by their definitions
    ids = torch.tensor(tokenize(tiny.path, speeches)[0][: 3 * 64]).reshape(3, 64)
    with torch.no_grad():
        p, q = (model(ids).logits[:, :-1].double().softmax(dim=-1) for model in models)
    kl = (p * (p.log() - q.log())).sum(dim=-1).mean()
    assert corpus["kl_divergence"] == pytest.approx(float(kl), rel=1e-2)
    agreement = (p.argmax(dim=-1) == q.argmax(dim=-1)).double().mean()
    assert corpus["top1_agreement"] == pytest.approx(float(agreement), abs=0.01)
    assert report["parameters"]["after"] == small.manifest.parameters < tiny.manifest.parameters
    assert report["effective_rank_reduction"] == pytest.approx(0.3, abs=0.05)
    assert result["model"] == "small"
    assert "matrices" not in result["report"]
    assert set(result["artifacts"]) == {path.name for path in context.artifacts.iterdir()}
    assert {"kept-ranks.png", "singular-values.png"} <= set(result["artifacts"])
    for name in ("kept-ranks.png", "singular-values.png"):
        assert (context.artifacts / name).read_bytes().startswith(b"\x89PNG")
    page = (context.artifacts / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "http" not in page.replace("http-equiv", "")
    markdown = (context.artifacts / "report.md").read_text()
    assert "low rank (int4, int4)" in markdown
    assert outcome(context)["result"]["model"] == "small"  # a second attempt finds it done


def test_sparsity_without_gain_is_said_so(home: Path) -> None:
    context = context_of(home, [{"magnitude": {"sparsity": 0.5}}])
    report = outcome(context)["result"]["report"]
    assert "saves neither memory nor time" in report["notes"][0]
    assert report["bytes"]["ratio"] == 1


def test_packed_sparsity_is_smaller_and_said_to_save_time_on_some_devices_only(home: Path) -> None:
    context = context_of(home, [{"magnitude": {"sparsity": "2:4"}}])
    report = outcome(context)["result"]["report"]
    assert report["bytes"]["ratio"] < 0.6
    assert len(report["notes"]) == 1
    assert "NVIDIA GPUs with sparse matrix units only" in report["notes"][0]
    assert "two_four" in (context.artifacts / "report.md").read_text()


@pytest.mark.parametrize(
    ("gate", "reason"),
    [
        ({"max_perplexity_ratio": 0.5}, "perplexity ratio"),
        ({"min_top1_agreement": 1.0, "max_perplexity_ratio": 1e9}, "top-1 agreement"),
    ],
)
def test_a_refused_model_is_an_artifact_and_not_registered(
    home: Path, tmp_path: Path, gate: dict[str, float], reason: str
) -> None:
    context = context_of(home, [{"magnitude": {"sparsity": 0.9}}], gate=gate)
    failed = outcome(context)
    assert failed["failed"]["code"] == "gate_refused"
    assert reason in failed["failed"]["message"]
    assert failed["found"]["model"] is None
    with pytest.raises(ModelNotFoundError):
        ModelRegistry(home / "models").get("small")
    with tarfile.open(context.artifacts / "checkpoint.tar") as archive:
        archive.extractall(tmp_path / "kept", filter="data")
    assert verify_checkpoint(tmp_path / "kept" / "small").ok


def test_a_killed_job_ends_in_the_same_bytes(home: Path) -> None:
    class KilledError(BaseException):
        pass

    budget = 27

    def send(message: Any) -> None:
        nonlocal budget
        budget -= 1
        if budget < 0:
            raise KilledError

    context = context_of(home, WELORE_INT4, calibration=CALIBRATION)
    killed = replace(context, send=send)
    context.folder.mkdir(parents=True)
    with pytest.raises(KilledError):
        runner.run(killed)
    assert list((context.folder / "work").glob("stage-*/*"))
    outcome(context)
    whole = replace(
        context, folder=home / "jobs" / "job-2", spec=context.spec | {"output": "whole"}
    )
    outcome(whole)
    registry = ModelRegistry(home / "models")
    hashes = {checkpoint_hash(registry.get(name).manifest) for name in ("small", "whole")}
    assert len(hashes) == 1


def upload(home: Path, *texts: str) -> FileInfo:
    store = FileStore(home / "files")
    with store.begin() as file:
        file.write(b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts))
        return store.add(
            file, file_id="file-1", owner="local", filename="f", purpose="calibration",
            request_hash="h", max_owner_bytes=10**6,
        )[0]  # fmt: skip


def test_calibration_from_an_uploaded_file(home: Path) -> None:
    """Token for token what the packaged corpus gives, where the file holds its second half."""
    ids, _ = tokenize(home / "models" / "tiny", load_corpus(STATE_OF_THE_UNION))
    text = load_corpus(STATE_OF_THE_UNION).text
    assert len(ids) == len(text)  # a tokenizer of letters
    info = upload(home, text[len(text) // 2 :])
    recipe = [{"wanda": {"sparsity": 0.5}}]
    first = context_of(home, recipe, calibration=CALIBRATION)
    outcome(first)
    settings = CALIBRATION | {"file": "file-1"}
    del settings["corpus"]
    second = replace(
        first,
        folder=home / "jobs" / "job-2",
        spec=first.spec | {"output": "mine", "calibration": settings},
    )
    result = outcome(second)["result"]
    registry = ModelRegistry(home / "models")
    small, mine = (registry.get(name).manifest for name in ("small", "mine"))
    assert mine.calibration is not None
    assert small.calibration is not None
    assert mine.calibration["tokens_sha256"] == small.calibration["tokens_sha256"]
    assert (mine.calibration["file"], mine.calibration["file_sha256"]) == ("file-1", info.sha256)
    assert checkpoint_hash(small) == checkpoint_hash(mine)
    assert result["report"]["calibration"]["file_sha256"] == info.sha256


def test_a_file_that_is_gone_or_short_fails_by_name(home: Path) -> None:
    recipe = [{"wanda": {"sparsity": 0.5}}]
    context = context_of(home, recipe, calibration={"file": "file-1", "length": 32})
    assert outcome(context)["failed"]["code"] == "file_not_found"
    upload(home, "a b c")
    failed = outcome(context)["failed"]
    assert failed["code"] == "bad_calibration"
    assert "5 tokens in its whole, one sample needs 32" in failed["message"]


def damage_weights(folder: Path, size: int | None) -> None:
    path = folder / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-100] ^= 1
    path.write_bytes(raw[:size])


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def write_hash(folder: Path, name: str) -> None:
    """Whoever lies may be consistent."""
    manifest = read_manifest(folder)
    manifest.files[name]["sha256"] = hash_file(folder / name)
    write_manifest(folder, manifest)


@pytest.mark.parametrize(
    ("what", "code", "message"),
    [
        ("not finite", "bad_data", "not finite"),
        ("norm not finite", "bad_data", "model.norm.weight has values that are not finite"),
        ("config lies soundly", "bad_data", "config.json promises (64, 96)"),
        ("too few blocks promised", "bad_data", "model.layers.2.self_attn"),
        ("truncated", "bad_data", "model.safetensors"),
        ("bit flipped", "bad_data", "sha256"),
        ("config lies", "bad_data", "config.json"),
        ("too many blocks", "bad_recipe", "3 blocks"),
        ("unknown blocks", "bad_calibration", "gpt_neox"),
        ("short text", "bad_calibration", "second half"),
        ("full disk", "disk_full", "the disk is full"),
    ],
)
def test_bad_input_ends_in_a_code_and_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, code: str, message: str
) -> None:
    home = tmp_path / "home"
    model = tiny_decoder()
    recipe: list[dict[str, Any]] = [{"wanda": {"sparsity": 0.5}}]
    if what == "not finite":
        model.model.layers[2].mlp.down_proj.weight.data[0, 0] = torch.inf
    if what == "norm not finite":
        model.model.norm.weight.data[3] = torch.nan
        recipe = [{"int8": {}}]
    if what == "unknown blocks":
        from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

        model = GPTNeoXForCausalLM(
            GPTNeoXConfig(
                vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                num_attention_heads=2, max_position_embeddings=64,
            )
        )  # fmt: skip
    folder = save_and_import(model, tmp_path / "hf", home / "models")
    match what:
        case "truncated":
            damage_weights(folder, -8)
        case "bit flipped":
            damage_weights(folder, None)
        case "config lies":
            edit_config(folder, hidden_size=128)
        case "config lies soundly":
            edit_config(folder, intermediate_size=96)
            write_hash(folder, "config.json")
        case "too few blocks promised":
            edit_config(folder, num_hidden_layers=2, layer_types=["full_attention"] * 2)
            write_hash(folder, "config.json")
            recipe = [{"int8": {}}]
        case "too many blocks":
            recipe = [{"shortgpt": {"remove": 5}}]
        case "short text":
            text = Corpus(name="short", text="a b c", sha256="s")
            monkeypatch.setattr("jobs.runners.calibration.load_corpus", lambda name: text)
        case "full disk":

            def full(*_: object) -> None:
                raise OSError(28, "No space left on device")

            monkeypatch.setattr(pipeline, "_write", full)
    context = context_of(home, recipe, calibration=CALIBRATION)
    failed = outcome(context)["failed"]
    assert failed["code"] == code
    assert message in failed["message"]
    assert [entry.id for entry in ModelRegistry(home / "models").list_models()] == ["tiny"]
