"""/v1/fine_tuning/jobs through OpenAI's client; a worker's part is played on the job store."""

import dataclasses
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from fastapi.testclient import TestClient

from compression.import_model import import_folder
from compression.registry import ModelRegistry
from jobs.states import JobStatus
from jobs.store import Job, JobStore, NewEvent
from service import submission
from service.app import build_app
from service.settings import Settings
from tests.service.openai_app import error_of
from training.ledger import MemoryLedger

CHAT = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


@pytest.fixture(scope="module")
def models(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    import_folder(ModelRegistry(folder), "tiny", tiny_llama, report=lambda _: None)
    return folder


@pytest.fixture
def http(models: Path, tmp_path: Path) -> Iterator[TestClient]:
    (tmp_path / "models").symlink_to(models)
    app = build_app(Settings(home=tmp_path))
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def store(http: TestClient) -> JobStore:
    found: JobStore = http.app.state.lathe.jobs  # type: ignore[attr-defined]
    return found


@pytest.fixture
def client(http: TestClient) -> openai.OpenAI:
    return openai.OpenAI(
        base_url="http://testserver/v1", api_key="none", max_retries=0, http_client=http
    )


@pytest.fixture
def train(client: openai.OpenAI) -> str:
    return client.files.create(file=("train.jsonl", CHAT * 8), purpose="fine-tune").id


def claim(store: JobStore) -> Job:
    job = store.claim("w", ("finetune",), 60)
    assert job is not None
    return job


def metrics(step: int, **data: Any) -> NewEvent:
    values = {"step": step, "total": 9, "loss": 2.5, "evaluation_loss": None, "eta_seconds": 100.0}
    return NewEvent(kind="metrics", message=f"step {step}", data=values | data)


def test_the_openai_client_creates_and_finds_a_job(client: openai.OpenAI, train: str) -> None:
    validation = client.files.create(file=("v.jsonl", CHAT), purpose="fine-tune").id
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=train,
        validation_file=validation,
        suffix="mine",
        seed=7,
        metadata={"ticket": "42"},
        method={
            "type": "supervised",
            "supervised": {
                "hyperparameters": {
                    "n_epochs": 3, "batch_size": 2, "learning_rate_multiplier": "auto"
                }
            },
        },
    )  # fmt: skip
    assert (job.object, job.status, job.model, job.seed) == (
        "fine_tuning.job", "queued", "tiny", 7
    )  # fmt: skip
    assert (job.training_file, job.validation_file) == (train, validation)
    assert (job.fine_tuned_model, job.trained_tokens, job.error) == (None, None, None)
    assert (job.finished_at, job.estimated_finish, job.metadata) == (None, None, {"ticket": "42"})
    assert job.hyperparameters.model_dump() == {
        "n_epochs": 3, "batch_size": 2, "learning_rate_multiplier": 1.0
    }  # fmt: skip
    assert client.fine_tuning.jobs.retrieve(job.id) == job
    second = client.fine_tuning.jobs.create(model="tiny", training_file=train)
    assert [j.id for j in client.fine_tuning.jobs.list(limit=1)] == [second.id, job.id]
    with pytest.raises(openai.NotFoundError) as missing:
        client.fine_tuning.jobs.retrieve("ftjob-none")
    assert missing.value.code == "job_not_found"


def test_it_is_a_job_like_any_other(http: TestClient, client: openai.OpenAI, train: str) -> None:
    job_id = client.fine_tuning.jobs.create(model="tiny", training_file=train, suffix="x").id
    job = http.get(f"/v1/jobs/{job_id}").json()
    assert (job["type"], job["status"]) == ("finetune", "queued")
    assert job["spec"]["output"] == f"tiny-x-{job_id[-8:]}"
    assert job["spec"]["settings"]["method"].keys() == {"qgalore"}
    assert job["memory"]["peak"] == sum(job["memory"].values()) - job["memory"]["peak"] > 0
    extra = client.fine_tuning.jobs.retrieve(job_id).model_extra
    assert extra is not None
    assert extra["memory"] == job["memory"]
    body = {
        "type": "finetune", "model": "tiny", "output": "other", "training_file": train,
        "settings": {
            "method": {"galore": {"rank": 8}}, "max_steps": 5, "max_length": 64, "max_gradient_norm": None
        },
    }  # fmt: skip
    made = http.post("/v1/jobs", json=body)
    assert made.status_code == 201, made.text
    assert made.json()["spec"]["settings"]["max_gradient_norm"] is None
    shown = client.fine_tuning.jobs.retrieve(made.json()["id"])
    assert shown.method is not None
    options = shown.method.model_dump()["galore"]
    assert (options["rank"], options["hyperparameters"]["max_steps"]) == (8, 5)
    refused = http.delete(f"/v1/files/{train}")
    assert error_of(refused, 409) == ("file_in_use", "file_id")
    compress = {
        "type": "compress", "model": "tiny", "output": "c", "recipe": [{"int4": {"group_size": 32}}]
    }  # fmt: skip
    other = http.post("/v1/jobs", json=compress).json()["id"]
    assert error_of(http.get(f"/v1/fine_tuning/jobs/{other}"), 404) == ("job_not_found", "job_id")
    assert len(http.get("/v1/fine_tuning/jobs").json()["data"]) == 2


def test_our_methods_and_every_setting(client: openai.OpenAI, train: str) -> None:
    method: Any = {
        "type": "qgalore",
        "qgalore": {
            "rank": 16,
            "refresh": "randomized",
            "hyperparameters": {"learning_rate_multiplier": 2, "max_length": 64, "max_steps": 3},
        },
    }
    job = client.fine_tuning.jobs.create(model="tiny", training_file=train, method=method)
    assert job.method is not None
    shown = job.method.model_dump()["qgalore"]
    assert (job.method.type, shown["rank"], shown["refresh"]) == ("qgalore", 16, "randomized")
    assert shown["hyperparameters"]["max_length"] == 64
    assert shown["hyperparameters"]["learning_rate"] == pytest.approx(4e-5)
    assert job.hyperparameters.learning_rate_multiplier == pytest.approx(2)


def method(kind: str, hyperparameters: Any = None, **options: Any) -> dict[str, Any]:
    if hyperparameters is not None:
        options["hyperparameters"] = hyperparameters
    return {"method": {"type": kind, kind: options}}


@pytest.mark.parametrize(
    ("changes", "code", "param"),
    [
        ({"model": "nope"}, "model_not_found", "model"),
        ({"training_file": "file-none"}, "file_not_found", "training_file"),
        ({"training_file": "../etc/passwd"}, "invalid_value", "training_file"),
        ({"validation_file": "file-none"}, "file_not_found", "validation_file"),
        ({"suffix": "My Model"}, "invalid_value", "suffix"),
        ({"seed": -1}, "invalid_value", "seed"),
        ({"integrations": [{"type": "wandb"}]}, "invalid_value", "integrations"),
        ({"metadata": {"k" * 65: "v"}}, "invalid_value", "metadata"),
        ({"colour": "red"}, "unsupported_parameter", "colour"),
        (method("dpo"), "invalid_value", "method.type"),
        ({"method": {"type": "qgalore", "lora": {}}}, "unsupported_parameter", "method.lora"),
        ({"method": {"type": "qgalore", "qgalore": 3}}, "invalid_value", "method.qgalore"),
        (method("supervised", rank=3), "unsupported_parameter", "method.supervised.rank"),
        (method("qgalore", rank=0), "invalid_value", "method.qgalore.rank"),
        (method("qgalore", colour=0), "invalid_value", "method.qgalore.colour"),
        (method("lrc_only"), "unsupported_parameter", "method.lrc_only"),
        (
            method("qgalore", {"n_epochs": 0}),
            "invalid_value",
            "method.qgalore.hyperparameters.n_epochs",
        ),
        (
            method("full", {"max_length": 1.5}),
            "invalid_value",
            "method.full.hyperparameters.max_length",
        ),
        (
            method("supervised", {"learning_rate_multiplier": "high"}),
            "invalid_value",
            "method.supervised.hyperparameters.learning_rate_multiplier",
        ),
        (method("full", {"seed": 3}), "unsupported_parameter", "method.full.hyperparameters.seed"),
        ({"hyperparameters": {"batch_size": 0}}, "invalid_value", "hyperparameters.batch_size"),
        (
            {"hyperparameters": {"n_epochs": 1}, **method("full", {"n_epochs": 1})},
            "invalid_value",
            "hyperparameters",
        ),
    ],
)
def test_what_cannot_be_run_is_refused_by_its_field(
    http: TestClient, train: str, changes: dict[str, Any], code: str, param: str
) -> None:
    body = {"model": "tiny", "training_file": train} | changes
    status = 404 if code.endswith("not_found") else 400
    response = http.post("/v1/fine_tuning/jobs", json=body)
    found = error_of(response, status)
    assert (found[0], (found[1] or "")[: len(param)]) == (code, param)
    assert http.get("/v1/jobs").json()["data"] == []


def test_files_must_be_for_training(http: TestClient, client: openai.OpenAI, train: str) -> None:
    notes = client.files.create(file=("n.txt", b"notes"), purpose="user_data").id
    for changes, param in (
        ({"training_file": notes}, "training_file"),
        ({"validation_file": notes}, "validation_file"),
        ({"validation_file": train}, "validation_file"),
    ):
        body = {"model": "tiny", "training_file": train} | changes
        refused = http.post("/v1/fine_tuning/jobs", json=body)
        assert error_of(refused) == ("invalid_value", param)


def chat(user: str, assistant: str) -> bytes:
    roles = {"user": user, "assistant": assistant}
    messages = [{"role": role, "content": content} for role, content in roles.items()]
    return json.dumps({"messages": messages}).encode() + b"\n"


def text(length: int) -> bytes:
    """An example of the completion form that has so many tokens: one for each letter, and the end."""
    return json.dumps({"prompt": "a", "completion": "b" * (length - 2)}).encode() + b"\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (text(33), "line 17: 33 tokens, max_length is 32"),
        (chat("a", "b" * 32), "tokens, max_length is 32"),
        (chat("a</s>", "b"), "line 17: contains the control token '</s>'"),
    ],
)
def test_examples_that_the_model_cannot_take_are_refused_with_their_line(
    http: TestClient, client: openai.OpenAI, line: bytes, message: str
) -> None:
    good = client.files.create(file=("g.jsonl", text(32) * 16), purpose="fine-tune").id
    bad = client.files.create(file=("b.jsonl", text(32) * 16 + line), purpose="fine-tune").id
    settings = {"hyperparameters": {"max_length": 32}}
    body = {"model": "tiny", "training_file": good, **settings}
    assert http.post("/v1/fine_tuning/jobs", json=body).status_code == 201
    for changes in ({"training_file": bad}, {"validation_file": bad}):
        refused = http.post("/v1/fine_tuning/jobs", json=body | changes)
        assert error_of(refused) == ("invalid_file", next(iter(changes)))
        assert message in refused.json()["error"]["message"]


def test_chat_needs_a_template(http: TestClient, client: openai.OpenAI, tmp_path: Path) -> None:
    source, bare = tmp_path / "models" / "tiny", tmp_path / "models" / "bare"
    if not bare.exists():
        shutil.copytree(source, bare)
        (bare / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    file_id = client.files.create(file=("c.jsonl", chat("a", "b")), purpose="fine-tune").id
    body = {"model": "bare", "training_file": file_id}
    refused = http.post("/v1/fine_tuning/jobs", json=body)
    assert error_of(refused) == ("invalid_file", "training_file")
    assert "line 1: this model has no chat template" in refused.json()["error"]["message"]


def test_what_cannot_fit_is_refused_with_the_arithmetic(
    http: TestClient, train: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = dict.fromkeys((field.name for field in dataclasses.fields(MemoryLedger)), 0)
    huge = MemoryLedger(**(parts | {"weights": 2**50, "gradients": 2**49, "activations": 1}))
    monkeypatch.setattr(submission, "predict_memory", lambda *_: huge)
    monkeypatch.setattr(submission, "has_nvidia_gpu", lambda: False)
    refused = http.post("/v1/fine_tuning/jobs", json={"model": "tiny", "training_file": train})
    assert error_of(refused)[0] == "job_too_large"
    message = refused.json()["error"]["message"]
    assert (
        "1572864.00 GiB at its peak (1048576.00 weights + 524288.00 gradients + 0.00 act" in message
    )
    monkeypatch.setattr(submission, "has_nvidia_gpu", lambda: True)  # which may hold it
    accepted = http.post("/v1/fine_tuning/jobs", json={"model": "tiny", "training_file": train})
    assert accepted.json()["memory"]["peak"] == huge.peak


def test_an_idempotency_key_creates_once(client: openai.OpenAI, train: str) -> None:
    header = {"Idempotency-Key": "k"}
    jobs = [
        client.fine_tuning.jobs.create(model="tiny", training_file=train, extra_headers=header)
        for _ in range(2)
    ]
    assert jobs[0] == jobs[1]
    with pytest.raises(openai.ConflictError) as conflict:
        client.fine_tuning.jobs.create(
            model="tiny", training_file=train, seed=1, extra_headers=header
        )
    assert conflict.value.code == "idempotency_conflict"


def test_events_metrics_and_estimated_finish(
    http: TestClient, client: openai.OpenAI, store: JobStore, train: str
) -> None:
    job_id = client.fine_tuning.jobs.create(model="tiny", training_file=train).id
    running = claim(store)
    events = [
        NewEvent(kind="message", message="begun"),
        metrics(1),
        NewEvent(kind="progress", message="1/9", data={"step": 1, "total": 9}),
        metrics(2, evaluation_loss=2.25, eta_seconds=50.0),
    ]
    store.report(job_id, running.fencing, events, (2, 9))
    now = time.time()
    job = client.fine_tuning.jobs.retrieve(job_id)
    assert job.status == "running"
    assert job.estimated_finish == pytest.approx(now + 50, abs=5)
    found = list(client.fine_tuning.jobs.list_events(job_id, limit=2))  # through three pages
    assert [event.message for event in found] == ["step 2", "step 1", "begun", "running", "queued"]
    assert found[0].type == "metrics"
    data: Any = found[0].data
    assert (data["step"], data["total_steps"], data["train_loss"], data["valid_loss"]) == (
        2, 9, 2.5, 2.25
    )  # fmt: skip
    assert (found[2].type, found[2].object) == ("message", "fine_tuning.job.event")
    bad = http.get(f"/v1/fine_tuning/jobs/{job_id}/events?after=job-1-3")
    assert error_of(bad) == ("invalid_value", "after")
    store.finish(
        job_id, running.fencing, JobStatus.FAILED, error={"code": "bad_data", "message": "m"}
    )
    accept = {"accept": "text/event-stream", "Last-Event-ID": "3"}
    streamed = http.get(f"/v1/fine_tuning/jobs/{job_id}/events", headers=accept).text
    rows = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: ")]
    assert [row["message"] for row in rows] == ["step 1", "step 2", "failed"]
    failed = client.fine_tuning.jobs.retrieve(job_id)
    assert failed.error is not None
    assert failed.error.model_dump() == {
        "code": "bad_data", "message": "m", "param": "training_file"
    }  # fmt: skip
    assert (failed.status, failed.estimated_finish) == ("failed", None)
    assert failed.finished_at == pytest.approx(time.time(), abs=60)


def test_pause_resume_cancel_and_what_a_finished_job_says(
    http: TestClient, client: openai.OpenAI, store: JobStore, train: str
) -> None:
    jobs = client.fine_tuning.jobs
    job_id = jobs.create(model="tiny", training_file=train).id
    running = claim(store)
    assert jobs.pause(job_id).status == "running"  # until it has written its checkpoint
    assert http.get(f"/v1/jobs/{job_id}").json()["status"] == "pausing"
    store.finish(job_id, running.fencing, JobStatus.PAUSED, reason="user")
    assert jobs.retrieve(job_id).model_dump()["status"] == "paused"
    assert jobs.resume(job_id).status == "queued"
    running = claim(store)
    report = {"num_tokens": 123, "result_file": "file-1"}
    result = {"model": "tiny-ft", "report": report, "artifacts": []}
    store.finish(job_id, running.fencing, JobStatus.SUCCEEDED, result=result)
    done = jobs.retrieve(job_id)
    assert (done.status, done.trained_tokens) == ("succeeded", 123)
    assert done.result_files == ["file-1"]
    assert done.fine_tuned_model == f"tiny-ft-{job_id[-8:]}"
    for ask in (jobs.cancel, jobs.pause, jobs.resume):
        with pytest.raises(openai.ConflictError):
            ask(job_id)
    second = jobs.create(model="tiny", training_file=train).id
    assert jobs.cancel(second).status == "cancelled"


def test_checkpoints_are_listed_newest_first(
    client: openai.OpenAI, train: str, tmp_path: Path
) -> None:
    jobs = client.fine_tuning.jobs
    job_id = jobs.create(model="tiny", training_file=train).id
    assert jobs.checkpoints.list(job_id).data == []
    rows = [
        {"step": step, "created_at": 1e9 + step, "loss": 3.0 - step / 100, "evaluation_loss": None}
        for step in (10, 20, 30)
    ]
    folder = tmp_path / "jobs" / job_id
    folder.mkdir(parents=True)
    (folder / "checkpoints.json").write_text(json.dumps(rows))
    found = list(jobs.checkpoints.list(job_id, limit=2))
    assert [checkpoint.step_number for checkpoint in found] == [30, 20, 10]
    assert found[0].fine_tuning_job_id == job_id
    assert found[0].metrics.train_loss == pytest.approx(2.7)
    assert found[0].fine_tuned_model_checkpoint == f"tiny-ft-{job_id[-8:]}:step-30"
