import http.server
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from compression.checkpoint import DenseLinear, Matrix
from service.api_client import ApiClient, ServerEvent, ServiceError, read_events
from service.auth import KeyStore
from service.cli import main, worker_arguments
from service.job_view import follow, human_bytes, report_lines, table
from service.settings import Settings
from service.terminal import Terminal, clock, sparkline

JOB_ID = "job-0123456789ab"


class Answer:
    """What the stub answers: a body, or several in turn."""

    def __init__(self, body: Any, status: int = 200, media_type: str = "application/json") -> None:
        self.status = status
        self.media_type = media_type
        self.bytes = body.encode() if isinstance(body, str) else json.dumps(body).encode()


class Stub:
    """A service that answers what a test put in, and keeps what it was asked."""

    def __init__(self) -> None:
        self.answers: dict[str, list[Answer]] = {}
        self.requests: list[tuple[str, Any, dict[str, str]]] = []
        self.url = ""

    def on(self, request: str, *answers: Answer) -> None:
        """`request` is "METHOD /path"; the last answer is given again and again."""
        self.answers[request] = list(answers)

    def take(self, request: str) -> Answer:
        answers = self.answers.get(request)
        if not answers:
            return Answer({"error": error_object(f"no answer for {request}", "not_found")}, 404)
        return answers.pop(0) if len(answers) > 1 else answers[0]

    def sent(self, request: str) -> Any:
        return next(body for asked, body, _ in self.requests if asked == request)


def error_object(message: str, code: str, param: str | None = None) -> dict[str, Any]:
    return {"message": message, "type": "invalid_request_error", "param": param, "code": code}


@pytest.fixture
def stub() -> Iterator[Stub]:
    stub = Stub()

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            raw = self.rfile.read(length)
            is_form = self.headers.get("Content-Type", "").startswith("multipart/form-data")
            body = raw if is_form else json.loads(raw) if raw else None
            request = f"{self.command} {self.path}"
            stub.requests.append((request, body, dict(self.headers)))
            answer = stub.take(request)
            self.send_response(answer.status)
            self.send_header("Content-Type", answer.media_type)
            self.send_header("Content-Length", str(len(answer.bytes)))
            self.end_headers()
            self.wfile.write(answer.bytes)

        do_GET = do_POST = do_DELETE = answer

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        stub.url = f"http://127.0.0.1:{server.server_port}"
        yield stub
        server.shutdown()
        thread.join()


Lathe = Callable[..., Result]


@pytest.fixture
def lathe(stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lathe:
    """Runs `lathe ...` against the stub, in a home of its own."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, input: str | None = None, **environment: str) -> Result:
        settings = {"LATHE_URL": stub.url, "LATHE_HOME": str(tmp_path / "home"), **environment}
        return CliRunner().invoke(main, arguments, input=input, env=settings)

    return run


def events(*rows: dict[str, Any]) -> Answer:
    lines = "".join(f"id: {row['seq']}\ndata: {json.dumps(row)}\n\n" for row in rows)
    return Answer(": keep-alive\n\n" + lines, media_type="text/event-stream")


def event(seq: int, type: str, message: str, **data: Any) -> dict[str, Any]:
    return {
        "seq": seq,
        "created_at": 0.0,
        "type": type,
        "level": "info",
        "message": message,
        "data": data,
    }


def job(status: str, **fields: Any) -> dict[str, Any]:
    return {
        "id": JOB_ID,
        "type": "compress",
        "status": status,
        "status_reason": None,
        "attempt": 1,
        "progress": {"step": 2, "total": 4},
        "created_at": 0.0,
        "result": None,
        "error": None,
        **fields,
    }


REPORT: dict[str, Any] = {
    "parameters": {"before": 1000, "after": 1000},
    "bytes": {"before": 2000, "after": 600, "ratio": 0.3},
    "resident_bytes": {"before": 2000, "after": 700, "ratio": 0.35},
    "notes": ["a note"],
    "perplexity": {
        "before": 20.0,
        "after": 21.0,
        "ratio": 1.05,
        "kl_divergence": 0.0123,
        "top1_agreement": 0.875,
        "protocol": {
            "corpus": "speech",
            "num_windows": 3,
            "window": 8,
            "stride": 8,
            "num_tokens": 21,
            "dtype": "bfloat16",
            "device": "cpu",
        },
    },
    "speed": {
        "before": {"decode_tokens_per_second": 10.0, "prefill_tokens_per_second": 100.0},
        "after": {"decode_tokens_per_second": 15.0, "prefill_tokens_per_second": 90.0},
        "note": "batch size 1",
    },
}
REPORT["corpora"] = [REPORT["perplexity"]]


def all_commands(group: click.Group, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, command in group.commands.items():
        yield (*prefix, name)
        if isinstance(command, click.Group):
            yield from all_commands(command, (*prefix, name))


@pytest.mark.parametrize("words", list(all_commands(main)), ids=" ".join)
def test_every_command_has_help_with_an_example(words: tuple[str, ...]) -> None:
    result = CliRunner().invoke(main, [*words, "--help"])
    assert result.exit_code == 0
    assert "Example" in result.output
    assert f"lathe {words[0]}" in result.output.split("Example")[1]


def test_the_commands_of_the_design_are_there() -> None:
    expected = (
        "up serve engine worker models import compress calibrate-skip jobs chat verify export doctor"
        " keys finetune files import-projector"
    )
    assert set(main.commands) == set(expected.split())


def test_help_imports_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "fastapi", "httpx", "pydantic", "uvicorn")
    code = f"import sys, service.cli; print([m for m in {heavy} if m in sys.modules])"
    output = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        check=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ).stdout
    assert output.strip() == "[]"


def test_a_bad_setting_is_one_line(lathe: Lathe) -> None:
    result = lathe("keys", "list", LATHE_PORT="99999")
    assert result.exit_code == 1
    assert result.output.startswith("Error: bad settings: port: ")
    assert len(result.output.splitlines()) == 1


def test_a_secret_setting_is_not_printed(lathe: Lathe) -> None:
    result = lathe("keys", "list", LATHE_REDIS_URL="redis://:hunter2@h", LATHE_PORT="x")
    assert result.exit_code == 1
    assert "hunter2" not in result.output


@pytest.mark.parametrize("command", ["up", "serve"])
def test_a_public_address_needs_a_key(lathe: Lathe, command: str) -> None:
    result = lathe(command, "--host", "0.0.0.0", "--port", "0")
    assert result.exit_code == 1
    assert "refusing to serve 0.0.0.0 without an API key" in result.output


def test_keys_are_made_listed_and_revoked(lathe: Lathe, tmp_path: Path) -> None:
    assert "no keys" in lathe("keys", "list").output
    made = lathe("keys", "create", "laptop", "--role", "inference", "--role", "jobs")
    secret = made.stdout.strip()
    store = KeyStore(tmp_path / "home" / "keys.json")
    identity = store.identify(secret.encode())
    assert identity is not None
    assert identity.roles == {"inference", "jobs"}
    listed = lathe("keys", "list").output
    assert "laptop" in listed
    assert "active" in listed
    assert secret not in listed
    assert lathe("keys", "revoke", identity.key_id).exit_code == 0
    assert store.identify(secret.encode()) is None
    assert "revoked" in lathe("keys", "list").output
    refused = lathe("keys", "revoke", "key-none")
    assert refused.exit_code == 1
    assert "there is no key 'key-none'" in refused.output


def test_models_list(lathe: Lathe, stub: Stub) -> None:
    model = {
        "id": "tiny",
        "state": "ready",
        "kind": "decoder",
        "parameters": 1234,
        "bytes": 2048,
        "parent": None,
    }
    stub.on("GET /v1/models", Answer({"data": [model]}))
    lines = lathe("models", "list").output.splitlines()
    assert lines[0].split() == ["id", "state", "kind", "parameters", "size", "made", "from"]
    assert lines[2].split() == ["tiny", "ready", "decoder", "1,234", "2.0", "KiB", "-"]


def test_models_load_and_restart_wait_and_unload_and_delete(lathe: Lathe, stub: Stub) -> None:
    stub.on("POST /v1/models/tiny/load?wait=true", Answer({"id": "tiny", "state": "ready"}))
    stub.on("POST /v1/models/tiny/restart?wait=true", Answer({"id": "tiny", "state": "ready"}))
    stub.on("POST /v1/models/tiny/unload", Answer({"id": "tiny", "state": "unloaded"}))
    stub.on("DELETE /v1/models/tiny", Answer({"id": "tiny", "deleted": True}))
    assert lathe("models", "load", "tiny").output == "tiny: ready\n"
    assert lathe("models", "restart", "tiny").output == "tiny: ready\n"
    assert lathe("models", "unload", "tiny").output == "unloaded tiny\n"
    assert lathe("models", "delete", "tiny", input="n\n").exit_code == 1
    assert lathe("models", "delete", "tiny", "--yes").output == "deleted tiny\n"
    assert [request for request, _, _ in stub.requests].count("DELETE /v1/models/tiny") == 1


def test_an_id_stays_one_segment_of_the_path(lathe: Lathe, stub: Stub) -> None:
    result = lathe("models", "show", "../../health?x")
    assert result.exit_code == 1
    assert stub.requests[0][0] == "GET /v1/models/..%2F..%2Fhealth%3Fx"


def test_the_key_is_sent_and_an_error_is_one_line(lathe: Lathe, stub: Stub) -> None:
    error = error_object("the key lacks the role jobs", "insufficient_scope")
    stub.on("GET /v1/jobs?limit=20", Answer({"error": error}, 403))
    result = lathe("jobs", "list", LATHE_API_KEY="lathe-secret")
    assert result.exit_code == 1
    assert result.output == "Error: the key lacks the role jobs [insufficient_scope]\n"
    assert stub.requests[0][2]["Authorization"] == "Bearer lathe-secret"


def test_an_answer_that_is_not_ours_is_said(lathe: Lathe, stub: Stub) -> None:
    stub.on("GET /v1/jobs?limit=20", Answer("<html>", 502, "text/html"))
    result = lathe("jobs", "list")
    assert result.output == "Error: unexpected answer 502; is this a Lathe service?\n"


def test_nobody_there(lathe: Lathe) -> None:
    result = lathe("jobs", "list", "--url", "http://127.0.0.1:1")
    assert result.exit_code == 1
    assert result.output.startswith(
        "Error: nothing answers at http://127.0.0.1:1: start the service"
    )


def test_compress_submits_follows_and_reports(lathe: Lathe, stub: Stub) -> None:
    stub.on("POST /v1/jobs", Answer(job("queued"), 201))
    progress = event(2, "progress", "2/4", step=2, total=4)
    stub.on(
        f"GET /v1/jobs/{JOB_ID}/events",
        events(event(1, "status", "running"), progress),
        events(event(3, "status", "succeeded")),
    )
    done = job("succeeded", result={"model": "tiny-int4", "report": REPORT})
    stub.on(f"GET /v1/jobs/{JOB_ID}", Answer(job("running")), Answer(done))
    result = lathe("compress", "tiny", "--output", "tiny-int4", "--max-perplexity-ratio", "1.5")
    assert result.exit_code == 0, result.output
    assert stub.sent("POST /v1/jobs") == {
        "type": "compress",
        "model": "tiny",
        "output": "tiny-int4",
        "recipe": [{"int4": {"group_size": 64}}],
        "gate": {"max_perplexity_ratio": 1.5},
    }
    assert "running" in result.output
    assert "2/4" not in result.output
    assert "bytes on disk" in result.output
    assert "lathe models load tiny-int4" in result.output
    # The first stream ended before the job did: the second one went on where it broke off.
    follows = [h for r, _, h in stub.requests if r == f"GET /v1/jobs/{JOB_ID}/events"]
    assert [headers["Last-Event-ID"] for headers in follows] == ["0", "2"]


def test_calibrate_skip_submits_and_reports(lathe: Lathe, stub: Stub) -> None:
    stub.on("POST /v1/jobs", Answer(job("queued"), 201))
    stub.on(f"GET /v1/jobs/{JOB_ID}/events", events(event(1, "status", "succeeded")))
    policy = {"skip_ratio": 0.2, "perplexity": 15.0, "ratio": 1.5}
    whole = {"num_blocks": 1.5, "perplexity": 20.0, "ratio": 2.0}
    target = {
        "target_ratio": 0.2,
        "saved": 0.125,
        "policies": {"adaptive": policy, "shortgpt": whole},
    }
    report = {"targets": [target], "offered": [], "max_perplexity_ratio": 1.25}
    done = job("succeeded", result={"model": "o", "report": report})
    stub.on(f"GET /v1/jobs/{JOB_ID}", Answer(done))
    result = lathe("calibrate-skip", "tiny", "--output", "o", "--target-ratio", "0.2",
                   "--max-perplexity-ratio", "1.25", "--no-substitutes")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert stub.sent("POST /v1/jobs") == {
        "type": "calibrate_skip",
        "model": "tiny",
        "output": "o",
        "target_ratios": [0.2],
        "gate": {"max_perplexity_ratio": 1.25},
        "substitutes": False,
    }
    lines = [line.split() for line in result.output.splitlines()]
    assert ["20%", "adaptive", "20.0%", "87.5%", "15.000", "1.500"] in lines
    assert ["20%", "shortgpt", "1.5", "blocks", "87.5%", "20.000", "2.000"] in lines
    assert "Offered: nothing" in result.output


def test_compress_takes_a_recipe_from_a_file_and_calibration(
    lathe: Lathe, stub: Stub, tmp_path: Path
) -> None:
    stub.on("POST /v1/jobs", Answer(job("queued"), 201))
    (tmp_path / "recipe.yaml").write_text("- welore: {err: 0.2}\n- int4: {method: gptq}\n")
    result = lathe(
        "compress", "tiny", "--output", "o", "--detach", "--recipe", str(tmp_path / "recipe.yaml"),
        "--calibration", "{corpus: state-of-the-union, samples: 8}", "--min-top1-agreement", "0.8",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert stub.sent("POST /v1/jobs") == {
        "type": "compress",
        "model": "tiny",
        "output": "o",
        "recipe": [{"welore": {"err": 0.2}}, {"int4": {"method": "gptq"}}],
        "calibration": {"corpus": "state-of-the-union", "samples": 8},
        "gate": {"min_top1_agreement": 0.8},
    }


def test_compress_plans_without_a_job(lathe: Lathe, stub: Stub) -> None:
    linear = DenseLinear(out_features=64, in_features=128, dtype="BF16")
    row = Matrix(name="model.layers.0.mlp.down_proj", linear=linear).to_json()
    model = {"id": "tiny", "parameters": 10_000, "bytes": 20_000, "matrices": [row], "recipe": []}
    stub.on("GET /v1/models/tiny", Answer(model))
    result = lathe("compress", "tiny", "--plan")
    # 8,192 weights in 4 bits, 128 scales and a shape of 16 bytes in place of 16,384 bytes
    after = 20_000 - 16_384 + 4_096 + 256 + 16
    assert f"{after / 1024:.1f} KiB" in result.output
    assert "peak memory" in result.output
    assert "Llama-2-7B's shapes" in result.output
    model["recipe"] = [{"int4": {}}]
    stub.on("GET /v1/models/tiny", Answer(model))
    assert "cannot follow int4" in lathe("compress", "tiny", "--plan").output


def test_compress_can_leave_at_once(lathe: Lathe, stub: Stub) -> None:
    stub.on("POST /v1/jobs", Answer(job("queued"), 201))
    assert lathe("compress", "tiny", "--output", "o", "--detach").output == f"{JOB_ID}\n"
    assert len(stub.requests) == 1


def test_watching_a_job_that_fails_exits_with_1(lathe: Lathe, stub: Stub) -> None:
    failed = job("failed", error={"code": "gate_refused", "message": "it lost too much"})
    stub.on(f"GET /v1/jobs/{JOB_ID}", Answer(failed))
    stub.on(f"GET /v1/jobs/{JOB_ID}/events", events(event(1, "status", "failed")))
    result = lathe("jobs", "watch", JOB_ID)
    assert result.exit_code == 1
    assert result.output.splitlines()[-1] == f"Error: {JOB_ID} failed: it lost too much"


def step(seq: int, number: int, loss: float, **data: Any) -> dict[str, Any]:
    metrics = {
        "step": number,
        "total": 4,
        "loss": loss,
        "learning_rate": 1e-4,
        "tokens_per_second": 1234.5,
        "eta_seconds": 61.0,
        "evaluation_loss": None,
    }
    return event(seq, "metrics", f"step {number}/4: loss {loss}", **(metrics | data))


class Screen(io.StringIO):
    """A terminal; what is on it after each write."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_a_training_run_is_one_live_line(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.terminal.REDRAW_SECONDS", 0.0)
    monkeypatch.setenv("COLUMNS", "200")
    stub.on(f"GET /v1/jobs/{JOB_ID}", Answer(job("succeeded")))
    rows = [
        step(1, 1, 4.0),
        step(2, 2, 3.0),
        event(3, "progress", "2/20", step=2, total=20),
        step(4, 2, 2.0),  # the same step, of a resumed run
        event(5, "message", "checkpoint of step 2 written"),
    ]
    stub.on(f"GET /v1/jobs/{JOB_ID}/events", events(*rows))
    screen = Screen()
    with ApiClient(stub.url) as client:
        follow(client, JOB_ID, Terminal(screen))
    drawn = screen.getvalue().split("\r\x1b[K")
    bar = "[############............]  50%"
    assert [line for line in drawn if line.startswith("step 2")] == [
        f"step 2/4 {bar}  loss 3.0000 █▁  lr 1.00e-04  1,234 tokens/s  ETA 1:01",
        f"step 2/4 {bar}  loss 2.0000 █▁  lr 1.00e-04  1,234 tokens/s  ETA 1:01",
    ]
    assert [line[10:] for line in drawn[-1].splitlines()] == ["checkpoint of step 2 written"]
    assert "2/20" not in screen.getvalue()


def test_elsewhere_a_training_run_is_a_line_now_and_then(lathe: Lathe, stub: Stub) -> None:
    report = {
        "steps": 4, "num_tokens": 2048, "num_examples": 8, "tokens_per_second": 100.0, "seconds": 3671.0,
        "evaluations": [[0, 3.5], [4, 2.25]],
        "corpora": [{"protocol": {"corpus": "speech"}, "before": 20, "after": 21}],
        "predicted": {"weights": 2048, "peak": 4096}, "measured": {"weights": 2048, "peak": None},
    }  # fmt: skip
    done = job("succeeded", result={"model": "mine", "report": report})
    stub.on(f"GET /v1/jobs/{JOB_ID}", Answer(done))
    rows = [step(n, n, 5.0 - n) for n in range(1, 5)]
    stub.on(f"GET /v1/jobs/{JOB_ID}/events", events(*rows))
    result = lathe("jobs", "watch", JOB_ID)
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert [line for line in lines if line.startswith("step ")] == [
        "step 1/4 [######..................]  25%  loss 4.0000 ▁  lr 1.00e-04  1,234 tokens/s  ETA 1:01",
        "step  evaluation loss",
    ]
    assert "4 steps over 2,048 tokens of 8 examples, 100 tokens/s, 1:01:11" in lines
    assert "4     2.2500" in lines
    assert "peak     4.0 KiB" in lines
    assert "Perplexity on speech: 20.000 before, 21.000 after." in lines
    assert lines[-1] == "mine is registered; serve it with: lathe models load mine"


def test_a_sparkline_follows_the_means() -> None:
    assert sparkline([]) == ""
    assert sparkline([3.0]) == sparkline([2, 2])[:1] == "▁"
    assert sparkline([0, 7]) == "▁█"
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([0, 0, 7, 7], width=2) == "▁█"
    assert len(sparkline(range(1000), width=30)) == 30
    assert [clock(s) for s in (0, 59.6, 3600)] == ["0:00", "1:00", "1:00:00"]


def test_finetune_uploads_submits_and_follows(lathe: Lathe, stub: Stub, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "a b"}')
    stub.on("POST /v1/files", Answer({"id": "file-1"}, 201))
    created = {"id": JOB_ID, "memory": {"peak": 2048}}
    stub.on("POST /v1/fine_tuning/jobs", Answer(created, 201))
    stub.on(f"GET /v1/jobs/{JOB_ID}", Answer(job("succeeded", result={"model": "mine"})))
    stub.on(f"GET /v1/jobs/{JOB_ID}/events", events(event(1, "status", "succeeded")))
    result = lathe(
        "finetune", "tiny", "train.jsonl", "--validation-file", "file-9", "--suffix", "s",
        "--set", "rank=16", "--set", "n_epochs=2", "--set", "dtype=float32", "--set", "seed=3",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    form = stub.sent("POST /v1/files")
    assert b'name="purpose"\r\n\r\nfine-tune' in form
    assert b'filename="train.jsonl"' in form
    assert b'{"text": "a b"}' in form
    assert stub.sent("POST /v1/fine_tuning/jobs") == {
        "model": "tiny",
        "suffix": "s",
        "seed": 3,
        "training_file": "file-1",
        "validation_file": "file-9",
        "method": {
            "type": "qgalore",
            "qgalore": {"rank": 16, "hyperparameters": {"n_epochs": 2, "dtype": "float32"}},
        },
    }
    assert "predicted peak memory: 2.0 KiB" in result.output
    missing = lathe("finetune", "tiny", "no.jsonl")
    assert missing.output.splitlines()[-1] == "Error: no.jsonl: No such file or directory"
    assert "KEY=VALUE" in lathe("finetune", "tiny", "train.jsonl", "--set", "x").output


def test_files_upload_list_and_delete(lathe: Lathe, stub: Stub, tmp_path: Path) -> None:
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    stub.on("POST /v1/files", Answer({"id": "file-1"}, 201))
    row = {"id": "file-1", "purpose": "calibration", "bytes": 2048, "filename": "t.parquet"}
    stub.on("GET /v1/files?limit=100", Answer({"data": [row | {"created_at": 0}]}))
    stub.on("DELETE /v1/files/file-1", Answer({"id": "file-1", "deleted": True}))
    uploaded = lathe("files", "upload", "t.parquet", "--purpose", "calibration")
    assert uploaded.output == "file-1\n"
    assert b"calibration" in stub.sent("POST /v1/files")
    assert "2.0 KiB" in lathe("files", "list").output
    assert lathe("files", "delete", "file-1").output == "deleted file-1\n"


def test_jobs_pause_and_resume(lathe: Lathe, stub: Stub) -> None:
    stub.on(f"POST /v1/jobs/{JOB_ID}/pause", Answer(job("pausing")))
    stub.on(f"POST /v1/jobs/{JOB_ID}/resume", Answer(job("queued")))
    assert lathe("jobs", "pause", JOB_ID).output == f"{JOB_ID}: pausing\n"
    assert lathe("jobs", "resume", JOB_ID).output == f"{JOB_ID}: queued\n"


def test_jobs_list_logs_and_cancel(lathe: Lathe, stub: Stub) -> None:
    stub.on("GET /v1/jobs?limit=20", Answer({"data": [job("running")]}))
    stub.on(f"GET /v1/jobs/{JOB_ID}/logs", Answer("said this\n", media_type="text/plain"))
    stub.on(f"POST /v1/jobs/{JOB_ID}/cancel", Answer(job("cancelling")))
    assert "2/4" in lathe("jobs", "list").output
    assert lathe("jobs", "logs", JOB_ID).output == "said this\n"
    assert lathe("jobs", "cancel", JOB_ID).output == f"{JOB_ID}: cancelling\n"


def test_artifacts_are_saved_under_their_own_name_only(
    lathe: Lathe, stub: Stub, tmp_path: Path
) -> None:
    path = f"GET /v1/jobs/{JOB_ID}/artifacts"
    rows = [{"name": "../report.md", "bytes": 5, "sha256": "ab"}]
    stub.on(path, Answer({"data": rows}))
    stub.on(f"{path}/..%2Freport.md", Answer("hello", media_type="text/markdown"))
    result = lathe("jobs", "artifacts", JOB_ID, "--save", "out")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "report.md").read_text() == "hello"
    assert not (tmp_path / "report.md").exists()


def test_artifacts_are_deleted_when_asked_for_once_they_are_saved(
    lathe: Lathe, stub: Stub, tmp_path: Path
) -> None:
    path = f"/v1/jobs/{JOB_ID}/artifacts"
    stub.on(f"GET {path}", Answer({"data": [{"name": "report.md", "bytes": 5, "sha256": "ab"}]}))
    stub.on(f"DELETE {path}", Answer({"id": JOB_ID, "deleted": True}))
    assert lathe("jobs", "artifacts", JOB_ID, "--save", "out", "--delete").exit_code == 1
    asked = [request for request, *_ in stub.requests]
    assert asked == [f"GET {path}", f"GET {path}/report.md"]  # it was not saved: nothing is deleted
    stub.on(f"GET {path}/report.md", Answer("hello", media_type="text/markdown"))
    assert lathe("jobs", "artifacts", JOB_ID, "--save", "out", "--delete").exit_code == 0
    assert stub.requests[-1][0] == f"DELETE {path}"
    assert (tmp_path / "out" / "report.md").read_text() == "hello"


def chat_answer(*pieces: str) -> Answer:
    chunks = [{"choices": [{"delta": {"content": piece}}]} for piece in pieces]
    chunks.append({"choices": []})
    text = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks)
    return Answer(text + "data: [DONE]\n\n", media_type="text/event-stream")


def test_chat_prints_one_answer(lathe: Lathe, stub: Stub) -> None:
    stub.on("POST /v1/chat/completions", chat_answer("Hel", "lo."))
    result = lathe("chat", "-m", "Hi", "--system", "Be brief", "--model", "tiny")
    assert result.stdout == "Hello.\n"
    body = stub.sent("POST /v1/chat/completions")
    assert body["messages"] == [
        {"role": "system", "content": "Be brief"},
        {"role": "user", "content": "Hi"},
    ]
    assert body["model"] == "tiny"
    assert body["stream"] is True


def test_a_conversation_remembers(lathe: Lathe, stub: Stub) -> None:
    stub.on("POST /v1/chat/completions", chat_answer("One."), chat_answer("Two."))
    result = lathe("chat", input="first\nsecond\n\n")
    assert result.stdout == "One.\nTwo.\n"
    contents = [message["content"] for message in stub.requests[1][1]["messages"]]
    assert contents == ["first", "One.", "second"]


def test_an_error_inside_a_stream_ends_the_command(lathe: Lathe, stub: Stub) -> None:
    error = {"error": error_object("the engine died", "engine_dead")}
    text = f"data: {json.dumps(error)}\n\n"
    stub.on("POST /v1/chat/completions", Answer(text, media_type="text/event-stream"))
    result = lathe("chat", "-m", "Hi")
    assert result.exit_code == 1
    assert result.output.endswith("Error: the engine died [engine_dead]\n")


def test_engine_and_import_name_what_is_missing(lathe: Lathe) -> None:
    absent = lathe("engine", "absent")
    assert absent.exit_code == 1
    assert "there is no model 'absent'" in absent.output
    nameless = lathe("import", "somewhere")
    assert nameless.exit_code == 2
    assert "--id is needed" in nameless.output
    nowhere = lathe("import", "somewhere", "--id", "x")
    assert nowhere.exit_code == 1
    assert "neither a folder" in nowhere.output


def test_imports_and_verifies_a_folder(lathe: Lathe, tiny_llama: Path) -> None:
    imported = lathe("import", str(tiny_llama), "--id", "tiny")
    assert imported.exit_code == 0, imported.output
    sound = lathe("verify", "tiny")
    assert sound.exit_code == 0, sound.output
    assert "hashes and shapes are as promised" in sound.output
    assert "logits are as promised" in sound.output
    again = lathe("import", str(tiny_llama), "--id", "tiny")
    assert again.exit_code == 1
    assert "a model 'tiny' exists already" in again.output


def test_verify_names_what_is_wrong(lathe: Lathe, tiny_llama: Path, tmp_path: Path) -> None:
    lathe("import", str(tiny_llama), "--id", "tiny")
    config = tmp_path / "home" / "models" / "tiny" / "config.json"
    config.write_text(config.read_text() + " ")
    result = lathe("verify", "tiny", "--no-logits")
    assert result.exit_code == 1
    assert "problem: config.json: sha256 differs from the manifest" in result.output


def test_doctor_says_what_there_is(lathe: Lathe) -> None:
    result = lathe("doctor")
    for name in ("python", "torch", "cpu", "kernels", "openmp", "memory", "disk"):
        assert f"\nok   {name} " in "\n" + result.output or f"BAD  {name} " in result.output
    assert "OMP_WAIT_POLICY=passive" in result.output


def test_the_worker_gets_its_times_from_the_settings(tmp_path: Path) -> None:
    arguments = worker_arguments(Settings(home=tmp_path, job_lease_seconds=7.0))
    assert arguments[:4] == ["--home", str(tmp_path), "--lease-seconds", "7.0"]


def test_events_are_parsed_as_the_standard_says() -> None:
    lines = [
        ": comment",
        "",
        "id: 3",
        "event: x",
        "data: a",
        "data:b",
        "",
        "data: c",
        "",
        "data: cut",
    ]
    assert list(read_events(iter(lines))) == [
        ServerEvent(data="a\nb", id="3"),
        ServerEvent(data="c"),
    ]


def test_an_error_carries_its_code(stub: Stub) -> None:
    with ApiClient(stub.url) as client, pytest.raises(ServiceError) as caught:
        client.get("/v1/none")
    assert (caught.value.status, caught.value.code) == (404, "not_found")


def test_report_shows_what_changed_and_how_it_was_measured() -> None:
    lines = [" ".join(line.split()) for line in report_lines(REPORT)]
    assert "bytes on disk 2,000 600 0.300" in lines
    assert "perplexity, speech 20.000 21.000 1.050" in lines
    assert "decode tokens/s 10.0 15.0 1.500" in lines
    assert "Against the original on speech: KL 0.0123 nats, the same top token at 87.5%." in lines
    assert "a note" in lines
    text = "\n".join(lines)
    assert "Perplexity on speech: 3 windows of 8 tokens, stride 8, 21 tokens scored" in text


def test_table_aligns_its_columns() -> None:
    assert table([["a", "bb"], ["ccc", "d"]]) == ["a    bb", "---  --", "ccc  d"]


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (2048, "2.0 KiB"), (3 * 2**30, "3.0 GiB")]
)
def test_bytes_for_people(count: int, text: str) -> None:
    assert human_bytes(count) == text
