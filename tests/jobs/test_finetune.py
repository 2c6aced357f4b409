"""The finetune job from spec to registered model: figures against a second look, stops, kills, bad input."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from compression.checkpoint import checkpoint_hash, verify_checkpoint
from compression.hf import load_model
from compression.registry import ModelExistsError, ModelNotFoundError, ModelRegistry
from evaluation.corpora import STATE_OF_THE_UNION, load_corpus
from evaluation.perplexity import measure_perplexity
from jobs import child
from jobs.context import RunnerContext
from jobs.files import FileInfo, FileStore
from jobs.runners import finetune as runner
from jobs.spec import parse_spec, spec_json
from tests.compression.models import save_and_import, tiny_decoder
from training.trainer import FinetuneError

TRAIN = [{"prompt": "ab", "completion": c * 9} for c in "cdefghij"]
VALIDATION = [{"text": "the quick brown fox"}, {"text": "jumps over the lazy dog"}]
BODY: dict[str, Any] = {
    "type": "finetune",
    "model": "tiny",
    "output": "mine",
    "training_file": "file-train",
    "validation_file": "file-valid",
    "settings": {
        "method": {"galore": {"rank": 4, "refresh_interval": 3}},
        "max_steps": 8,
        "batch_size": 2,
        "max_length": 32,
        "learning_rate": 0.01,
        "checkpoint_every": 3,
        "evaluate_every": 4,
        "dtype": "float32",
    },
}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The speeches only, and every step an event."""
    monkeypatch.setattr(runner, "CORPORA", (STATE_OF_THE_UNION,))
    monkeypatch.setattr(runner, "MAX_WINDOWS", 2)
    monkeypatch.setattr(runner, "EVENT_SECONDS", 0.0)


def upload(home: Path, name: str, rows: list[Any]) -> FileInfo:
    store = FileStore(home / "files")
    with store.begin() as file:
        file.write(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
        return store.add(
            file, file_id=f"file-{name}", owner="local", filename=f"{name}.jsonl", purpose="fine-tune",
            request_hash=name, max_owner_bytes=10**6,
        )[0]  # fmt: skip


@pytest.fixture
def home(tmp_path: Path) -> Path:
    save_and_import(tiny_decoder(), tmp_path / "hf", tmp_path / "home" / "models")
    upload(tmp_path / "home", "train", TRAIN)
    upload(tmp_path / "home", "valid", VALIDATION)
    return tmp_path / "home"


def context_of(
    home: Path, job_id: str = "job-1", **changes: Any
) -> tuple[RunnerContext, list[Any]]:
    messages: list[Any] = []
    context = RunnerContext(
        job_id=job_id, owner="me", attempt=1, spec=spec_json(parse_spec(BODY | changes)),
        folder=home / "jobs" / job_id, home=home, send=messages.append,
    )  # fmt: skip
    context.folder.mkdir(parents=True, exist_ok=True)
    return context, messages


def outcome(context: RunnerContext) -> Any:
    """As the job's process reports it."""
    return json.loads(child._outcome(context, child.RUNNERS["finetune"]))


def mean_nll(model: Any, folder: Path, texts: list[str]) -> float:
    """Of every token behind the first, end token included, by transformers alone."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    total, count = 0.0, 0
    for text in texts:
        ids = [*tokenizer.encode(text, add_special_tokens=False).ids, tokenizer.token_to_id("</s>")]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1].float()
        total += float(F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum"))
        count += len(ids) - 1
    return total / count


def test_the_report_says_what_a_second_look_says(home: Path) -> None:
    context, messages = context_of(home)
    result = outcome(context)["result"]
    registry = ModelRegistry(home / "models")
    tiny, mine = registry.get("tiny"), registry.get("mine")
    assert verify_checkpoint(mine.path).ok
    assert mine.manifest.job_id == "job-1"
    assert mine.manifest.fingerprint is not None
    report = json.loads((context.artifacts / "report.json").read_text())

    texts = [row["text"] for row in VALIDATION]
    models = [load_model(entry.path) for entry in (tiny, mine)]
    first, *_, last = report["evaluations"]
    assert (first[0], last[0]) == (0, 8)
    assert first[1] == pytest.approx(mean_nll(models[0], tiny.path, texts), rel=0.02)
    assert last[1] == pytest.approx(mean_nll(models[1], mine.path, texts), rel=0.02)
    (corpus,) = report["corpora"]
    speeches = load_corpus(STATE_OF_THE_UNION)
    for model, side in zip(models, ("before", "after"), strict=True):
        found = measure_perplexity(model, tiny.path, speeches, window=64, stride=64, max_windows=2)
        assert corpus[side] == pytest.approx(found.value, rel=1e-3)
    losses = [loss for _, loss in report["losses"]]
    assert len(losses) == report["steps"] == 8
    assert losses[-1] < losses[0]

    evaluations = {row["name"]: row for row in mine.manifest.evaluations}
    assert evaluations["finetune_loss"]["evaluations"] == report["evaluations"]
    stored = evaluations["finetune_loss"]["data"]["training_file"]
    assert stored["sha256"] == FileStore(home / "files").get("file-train", None).sha256
    assert evaluations["perplexity"]["after"] == pytest.approx(corpus["after"])

    assert result["model"] == "mine"
    assert set(result["artifacts"]) == {path.name for path in context.artifacts.iterdir()}
    assert set(result["artifacts"]) >= {"report.html", "loss.png", "refreshes-of-subspaces.png"}
    html, markdown = ((context.artifacts / f"report.{kind}").read_text() for kind in ("html", "md"))
    for page in (html, markdown):
        assert f"{last[1]:.4f}" in page
        assert f"{report['predicted']['peak']:,}" in page
    assert html.count("data:image/png") == 2
    assert "losses" not in result["report"]

    info, path = FileStore(home / "files").open_for_job(result["report"]["result_file"])
    assert (info.owner, info.purpose) == ("local", "fine-tune-results")
    head, *rows = (line.split(",") for line in path.read_text().splitlines())
    assert head == ["step", "train_loss", "valid_loss"]
    assert [float(row[1]) for row in rows] == losses
    assert [row[2] for row in rows if row[2]] == [
        str(loss) for step, loss in report["evaluations"] if step
    ]

    told = [m["data"] for m in messages if m.get("kind") == "metrics"]
    assert [row["step"] for row in told] == list(range(1, 9))
    assert told[3]["evaluation_loss"] == dict(map(tuple, report["evaluations"]))[4]
    checkpoints = json.loads((context.folder / "checkpoints.json").read_text())
    assert [row["step"] for row in checkpoints][:2] == [3, 6]
    assert checkpoints[0]["loss"] == pytest.approx(losses[2])
    assert outcome(context)["result"] == result  # a second attempt finds it done


def stopping_at(step: int, messages: list[Any]) -> Callable[[], bool]:
    """Asked to stop once this many steps were told."""
    return lambda: sum(m.get("kind") == "metrics" for m in messages) >= step


def test_a_stopped_job_goes_on_to_the_same_bytes(home: Path) -> None:
    whole, _ = context_of(home, "job-whole", output="whole")
    outcome(whole)
    context, messages = context_of(home)
    stopped = replace(context, cancelled=stopping_at(4, messages))
    assert outcome(stopped) == {"cancelled": True}
    assert messages[-1]["message"] == "stopped after step 4; its checkpoint is kept"
    assert json.loads((context.folder / "checkpoints.json").read_text())[-1]["step"] == 4
    with pytest.raises(ModelNotFoundError):
        ModelRegistry(home / "models").get("mine")
    messages.clear()
    outcome(context)
    assert [m["data"]["step"] for m in messages if m.get("kind") == "metrics"] == [5, 6, 7, 8]
    registry = ModelRegistry(home / "models")
    hashes = {checkpoint_hash(registry.get(name).manifest) for name in ("whole", "mine")}
    assert len(hashes) == 1
    reports = [json.loads((c.artifacts / "report.json").read_text()) for c in (whole, context)]
    assert reports[0]["losses"] == reports[1]["losses"]
    assert reports[0]["curve"] == reports[1]["curve"]


@pytest.mark.parametrize("budget", [8, 15])
def test_a_killed_job_ends_in_the_same_bytes(home: Path, budget: int) -> None:
    class KilledError(BaseException):
        pass

    context, messages = context_of(home)

    def send(message: Any) -> None:
        messages.append(message)
        if len(messages) > budget:
            raise KilledError

    with pytest.raises(KilledError):
        runner.run(replace(context, send=send))
    outcome(context)
    whole, _ = context_of(home, "job-whole", output="whole")
    outcome(whole)
    registry = ModelRegistry(home / "models")
    hashes = {checkpoint_hash(registry.get(name).manifest) for name in ("whole", "mine")}
    assert len(hashes) == 1


@pytest.mark.parametrize(
    ("what", "code", "message"),
    [
        ("no file", "file_not_found", "file-gone"),
        ("no model", "model_not_found", "'nobody' is gone"),
        ("damaged", "bad_data", "model.safetensors"),
        ("too long", "bad_data", "line 9: 41 tokens, max_length is 32"),
        ("too large", "does_not_fit", "GiB at its peak"),
        ("wrong method", "bad_settings", "low-rank"),
        ("diverged", "diverged", "not finite"),
        ("taken", "model_exists", "'mine' exists already"),
        ("full disk", "disk_full", "the disk is full"),
    ],
)
def test_bad_input_ends_in_a_code_and_a_sentence(
    home: Path, monkeypatch: pytest.MonkeyPatch, what: str, code: str, message: str
) -> None:
    changes: dict[str, Any] = {}
    models = home / "models"
    match what:
        case "no file":
            changes["training_file"] = "file-gone"
        case "no model":
            changes["model"] = "nobody"
        case "damaged":
            path = models / "tiny" / "model.safetensors"
            path.write_bytes(path.read_bytes()[:-8])
        case "too long":
            upload(home, "long", [*TRAIN, {"prompt": "a", "completion": "b" * 39}])
            changes["training_file"] = "file-long"
        case "too large":
            free = SimpleNamespace(available=5)
            monkeypatch.setattr("psutil.virtual_memory", lambda: free)
        case "wrong method":
            changes["settings"] = BODY["settings"] | {"method": "lrc_only"}
        case "diverged":

            def diverges(*_: Any, **__: Any) -> None:
                raise FinetuneError("diverged", "losses are not finite")

            monkeypatch.setattr(runner, "finetune", diverges)
        case "taken":

            def taken(*_: Any) -> None:
                raise ModelExistsError("mine")

            monkeypatch.setattr(ModelRegistry, "register", taken)
        case "full disk":

            def full(*_: Any, **__: Any) -> None:
                raise OSError(28, "No space left on device")

            monkeypatch.setattr(runner, "finetune", full)
    context, _ = context_of(home, **changes)
    failed = outcome(context)["failed"]
    assert failed["code"] == code, failed
    assert message in failed["message"]
    assert [entry.id for entry in ModelRegistry(models).list_models()] == ["tiny"]
