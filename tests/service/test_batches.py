"""What a batch keeps and makes when it is cut short: by a kill, a cancel, or the end of its window."""

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from compression.import_model import import_folder
from compression.registry import ModelRegistry
from jobs.context import JobCancelledError, JobFailedError, RunnerContext
from jobs.files import FileStore, UploadNotFoundError
from jobs.store import JsonObject
from service.batch_ledger import BatchLedger
from service.batch_runner import run
from service.batches import BatchState

URL = "/v1/completions"


def test_a_ledger_goes_on_behind_its_last_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = BatchLedger(path)
    ledger.add(3, {"id": "c"}, succeeded=True)
    ledger.add(1, {"id": "a é"}, succeeded=True)
    ledger.add(2, {"id": "b"}, succeeded=False)
    assert list(ledger.records(succeeded=True)) == [
        '{"id": "a é"}\n'.encode(),
        b'{"id": "c"}\n',
    ]
    ledger.add(5, {"id": "e"}, succeeded=True)  # behind a reading
    ledger.close()
    whole = path.read_bytes()
    for cut in range(1, len(whole.splitlines(keepends=True)[-1])):
        path.write_bytes(whole[:-cut])
        again = BatchLedger(path)
        assert [line in again for line in (1, 2, 3, 4, 5)] == [True, True, True, False, False]
        assert (again.num_succeeded, again.num_failed) == (2, 1)
        again.add(5, {"id": "e"}, succeeded=True)
        again.close()
        assert path.read_bytes() == whole


class Home:
    """A home with a model that no engine serves, and a file of three requests."""

    def __init__(self, home: Path, lines: list[JsonObject]) -> None:
        self.home = home
        self.files = FileStore(home / "files")
        self.sent: list[JsonObject] = []
        with self.files.begin() as upload:
            for line in lines:
                upload.write(json.dumps(line).encode() + b"\n")
            self.files.add(
                upload,
                file_id="file-in",
                owner="me",
                filename="in.jsonl",
                purpose="batch",
                request_hash="",
                max_owner_bytes=2**30,
            )

    def context(self, **changes: Any) -> RunnerContext:
        folder = self.home / "jobs" / "batch-1"
        folder.mkdir(parents=True, exist_ok=True)
        spec = {"input_file_id": "file-in", "endpoint": URL, "expires_at": time.time() + 60}
        made = RunnerContext(
            job_id="batch-1",
            owner="me",
            attempt=1,
            spec=spec,
            folder=folder,
            home=self.home,
            send=self.sent.append,
        )
        return replace(made, **changes)

    def rows(self, file_id: str | None) -> list[JsonObject]:
        assert file_id is not None
        info = self.files.get(file_id, "me")
        return [json.loads(line) for line in self.files.path(info).read_text().splitlines()]


def request(number: int) -> JsonObject:
    body = {"model": "tiny", "prompt": "a", "max_tokens": 1}
    return {"custom_id": f"r{number}", "method": "POST", "url": URL, "body": body}


@pytest.fixture(scope="module")
def models(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    import_folder(ModelRegistry(folder), "tiny", tiny_llama, report=lambda _: None)
    return folder


@pytest.fixture
def home(models: Path, tmp_path: Path) -> Home:
    shutil.copytree(models, tmp_path / "models")
    return Home(tmp_path, [request(1), request(2), request(3)])


def test_a_cancelled_attempt_makes_files_and_the_next_one_its_own(home: Home) -> None:
    context = home.context(cancelled=lambda: True)
    ledger = BatchLedger(context.folder / "ledger.jsonl")
    ledger.add(2, {"id": "b", "custom_id": "r2"}, succeeded=True)
    ledger.close()
    with pytest.raises(JobCancelledError):
        run(context)
    cut = BatchState.load(context.folder)
    assert (cut.total, cut.completed, cut.failed) == (3, 1, 0)
    assert home.rows(cut.output_file_id) == [{"id": "b", "custom_id": "r2"}]
    assert cut.error_file_id is None
    assert cut.output_file_id is not None

    spec = context.spec | {"expires_at": time.time()}
    result = run(home.context(attempt=2, spec=spec))
    assert result["expired"] is True
    state = BatchState.load(context.folder)
    assert (state.total, state.completed, state.failed) == (3, 1, 2)
    assert home.rows(state.output_file_id) == [{"id": "b", "custom_id": "r2"}]
    errors = home.rows(state.error_file_id)
    assert [row["custom_id"] for row in errors] == ["r1", "r3"]
    assert {row["error"]["code"] for row in errors} == {"batch_expired"}
    assert all(row["response"] is None for row in errors)
    with pytest.raises(UploadNotFoundError):
        home.files.get(cut.output_file_id, "me")
    messages = [message.get("message") for message in home.sent]
    assert "going on behind 1 answered requests" in messages
    assert any("waiting: " in (message or "") for message in messages)


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ({"url": "/v1/embeddings"}, "mismatched_url", "line 2: url is '/v1/embeddings'"),
        ({"body": {"stream": True}}, "unsupported_parameter", "line 2: a batch cannot stream"),
        ({"custom_id": "r1"}, "invalid_file", "line 2: its custom_id was on a line before"),
    ],
)
def test_a_wrong_line_fails_it(tmp_path: Path, line: JsonObject, code: str, message: str) -> None:
    home = Home(tmp_path, [request(1), request(2) | line])
    with pytest.raises(JobFailedError, match=message) as caught:
        run(home.context())
    assert caught.value.code == code
    (error,) = BatchState.load(home.context().folder).errors
    assert (error["line"], error["code"]) == (2, code)


def test_a_file_that_is_gone_fails_it(home: Home) -> None:
    home.files.delete("file-in", None, lambda: {})
    with pytest.raises(JobFailedError, match="no file 'file-in'"):
        run(home.context())
