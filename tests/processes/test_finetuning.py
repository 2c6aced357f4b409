"""A finetuning job of a running service through OpenAI's client: paused, resumed, killed, and its model used."""

import json
import time
from pathlib import Path
from typing import Any

import httpx
import openai

from compression.registry import ModelRegistry
from tests.processes.conftest import TINY, Service, eventually
from training.spec import parse_settings
from training.trainer import finetune

ROWS = [
    {
        "messages": [
            {"role": "user", "content": letter},
            {"role": "assistant", "content": letter * 8},
        ]
    }
    for letter in "abcdefghijklmnopqrstuvwxyz"
]
METHOD: Any = {
    "type": "qgalore",
    "qgalore": {
        "rank": 8,
        "refresh_interval": 20,
        "hyperparameters": {
            "max_steps": 150,
            "batch_size": 4,
            "max_length": 64,
            "checkpoint_every": 10,
            "evaluate_every": 75,
            "learning_rate": 0.003,
        },
    },
}


def test_a_finetuning_job_survives_pause_and_kill_and_its_model_serves(
    tiny_service: Service, tmp_path: Path
) -> None:
    client = openai.OpenAI(base_url=f"{tiny_service.url}/v1", api_key="none", max_retries=0)
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)
    train = client.files.create(file=("letters.jsonl", lines), purpose="fine-tune")
    jobs = client.fine_tuning.jobs

    def step() -> int:
        found = [event.data for event in jobs.list_events(job_id).data if event.type == "metrics"]
        return int(found[0]["step"]) if found else 0  # type: ignore[index]

    def status() -> str:
        found = jobs.retrieve(job_id)
        assert found.error is None, (found.error, tiny_service.log)
        return str(found.status)

    job_id = jobs.create(model=TINY, training_file=train.id, method=METHOD).id
    eventually(lambda: step() >= 20, "some steps")
    running = jobs.retrieve(job_id)
    assert running.estimated_finish is not None
    assert running.estimated_finish >= time.time() - 5
    jobs.pause(job_id)
    eventually(lambda: status() == "paused", "the pause")
    paused_at = jobs.checkpoints.list(job_id).data[0].step_number
    assert paused_at >= step() >= 20
    assert "job" not in tiny_service.children()
    jobs.resume(job_id)
    eventually(lambda: step() > paused_at, "a step after the pause")
    tiny_service.children()["job"].kill()
    eventually(lambda: status() == "succeeded", "the end")
    seen = [event.message for event in jobs.list_events(job_id, limit=100)]
    assert [m for m in seen if m.startswith(("paused", "queued"))] == [
        "queued: runner_crashed", "queued: user", "paused: user", "queued"
    ]  # fmt: skip
    done = jobs.retrieve(job_id)
    assert done.trained_tokens is not None
    assert done.trained_tokens > 0
    curve = client.files.content(done.result_files[0]).text.splitlines()
    assert curve[0] == "step,train_loss,valid_loss"
    assert [line.partition(",")[0] for line in curve[1:]] == [str(n) for n in range(1, 151)]

    # The same run in one go, in this process.
    registry = ModelRegistry(tiny_service.home / "models")
    (tmp_path / "train.jsonl").write_bytes(lines)
    (tmp_path / "whole").mkdir()
    spec = httpx.get(f"{tiny_service.url}/v1/jobs/{job_id}").json()["spec"]
    finetune(
        registry.get(TINY).path, tmp_path / "whole", tmp_path / "work", source_id=TINY,
        settings=parse_settings(spec["settings"]), train=tmp_path / "train.jsonl",
    )  # fmt: skip
    assert done.fine_tuned_model is not None
    weights = registry.get(done.fine_tuned_model).path / "model.safetensors"
    assert weights.read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()

    assert client.models.retrieve(done.fine_tuned_model).model_extra["parent"] == TINY  # type: ignore[index]
    answer = client.chat.completions.create(  # loaded because it is asked for
        model=done.fine_tuned_model,
        messages=[{"role": "user", "content": "c"}],
        max_tokens=30,
        temperature=0,
    )
    assert answer.choices[0].message.content is not None
    assert "cccc" in answer.choices[0].message.content.replace(" ", "")
    assert client.files.delete(train.id).deleted
