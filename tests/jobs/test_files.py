"""The file store: contents kept once, deletion against use, expiry, quotas, processes that die or race."""

import hashlib
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from jobs.file_check import MAX_CALIBRATION_BYTES, FileContentError, check_file, read_texts
from jobs.files import (
    FileInfo,
    FileStore,
    QuotaExceededError,
    UploadConflictError,
    UploadInUseError,
    UploadNotFoundError,
    files_in_use,
)
from jobs.open import open_job_store
from jobs.states import JobStatus
from tests.jobs.conftest import child_environment, new_job

GIB = 2**30


def nothing_in_use() -> dict[str, str]:
    return {}


def add(store: FileStore, content: bytes, file_id: str = "file-a", **fields: Any) -> FileInfo:
    values: dict[str, Any] = {
        "file_id": file_id,
        "owner": "me",
        "filename": "a.jsonl",
        "purpose": "user_data",
        "request_hash": "h",
        "max_owner_bytes": GIB,
    }
    with store.begin() as upload:
        for start in range(0, len(content), 7):
            upload.write(content[start : start + 7])
        return store.add(upload, **(values | fields))[0]


def blobs(folder: Path) -> set[str]:
    return {path.name for path in (folder / "blobs").iterdir()}


def test_what_was_added_is_there_by_its_hash(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    content = b"twenty-one bytes here"
    info = add(store, content)
    assert info.sha256 == hashlib.sha256(content).hexdigest()
    assert store.path(info).read_bytes() == content
    assert FileStore(tmp_path).get("file-a", "me") == info
    assert store.open_for_job("file-a") == (info, store.path(info))
    for owner, file_id in (("you", "file-a"), ("me", "file-b"), (None, "../x")):
        with pytest.raises(UploadNotFoundError):
            store.get(file_id, owner)
    assert list(tmp_path.glob(".new-*")) == []


def test_equal_contents_are_kept_once_until_the_last_goes(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    add(store, b"same", "file-a")
    add(store, b"same", "file-b", owner="you")
    add(store, b"other", "file-c")
    assert len(blobs(tmp_path)) == 2
    store.delete("file-a", "me", nothing_in_use)
    assert store.path(store.get("file-b", "you")).read_bytes() == b"same"
    store.delete("file-b", None, nothing_in_use)
    assert blobs(tmp_path) == {hashlib.sha256(b"other").hexdigest()}
    with pytest.raises(UploadNotFoundError):
        store.delete("file-b", None, nothing_in_use)


def test_an_id_is_made_once(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    first = add(store, b"one")
    assert add(store, b"one") == first
    with pytest.raises(UploadConflictError):
        add(store, b"one", request_hash="other")
    with pytest.raises(UploadConflictError):
        add(store, b"one", owner="you")


def test_lists_by_age_purpose_and_page(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    for index in range(5):
        purpose = "calibration" if index % 2 else "user_data"
        add(store, b"%d" % index, f"file-{index}", purpose=purpose)
    add(store, b"theirs", "file-x", owner="you")

    def ids(**options: Any) -> list[str]:
        return [info.id for info in store.list_files("me", **options)]

    assert ids() == ["file-4", "file-3", "file-2", "file-1", "file-0"]
    assert ids(order="asc", limit=2) == ["file-0", "file-1"]
    assert ids(order="asc", after="file-3") == ["file-4"]
    assert ids(after="file-3", limit=2) == ["file-2", "file-1"]
    assert ids(purpose="calibration") == ["file-3", "file-1"]
    assert len(store.list_files(None)) == 6
    with pytest.raises(UploadNotFoundError):
        ids(after="file-x")


def test_an_empty_store_makes_no_folder(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "files")
    assert store.list_files("me") == []
    store.purge(nothing_in_use)
    for ask in (lambda: store.get("file-a", None), lambda: store.open_for_job("file-a")):
        with pytest.raises(UploadNotFoundError):
            ask()
    assert not (tmp_path / "files").exists()


def test_quota_counts_one_owner(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    add(store, b"12345", "file-a", max_owner_bytes=8)
    add(store, b"12345678", "file-b", max_owner_bytes=8, owner="you")
    with pytest.raises(QuotaExceededError, match=r"hold 5 bytes, this one has 4, and 8"):
        add(store, b"1234", "file-c", max_owner_bytes=8)
    assert len(blobs(tmp_path)) == 2
    add(store, b"123", "file-c", max_owner_bytes=8)


def test_expired_files_vanish_unless_a_job_needs_them(tmp_path: Path) -> None:
    now = 1000.0
    store = FileStore(tmp_path, clock=lambda: now)
    add(store, b"a", "file-a", lifetime_seconds=60)
    add(store, b"b", "file-b", lifetime_seconds=60)
    add(store, b"c", "file-c")
    now += 60
    assert [info.id for info in store.list_files(None)] == ["file-c"]
    with pytest.raises(UploadNotFoundError):
        store.get("file-a", None)
    store.purge(lambda: {"file-a": "job-1"})
    assert store.open_for_job("file-a")[1].read_bytes() == b"a"
    with pytest.raises(UploadNotFoundError):
        store.open_for_job("file-b")
    assert len(blobs(tmp_path)) == 2


def test_a_file_in_use_is_not_deleted_and_a_held_one_cannot_be(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    add(store, b"a")
    with pytest.raises(UploadInUseError, match="job-7"):
        store.delete("file-a", "me", lambda: {"file-a": "job-7"})
    order: list[str] = []

    def delete() -> None:
        FileStore(tmp_path).delete("file-a", "me", nothing_in_use)
        order.append("deleted")

    deleting = threading.Thread(target=delete)
    with store.held(["file-a"], "me") as infos:
        deleting.start()
        deleting.join(0.3)
        assert [info.id for info in infos] == ["file-a"]
        order.append("held")
    deleting.join(30)
    assert order == ["held", "deleted"]
    with pytest.raises(UploadNotFoundError), store.held(["file-a"], "me"):
        pass


def test_which_files_jobs_need(tmp_path: Path) -> None:
    jobs = open_job_store(tmp_path / "jobs.db", None)
    specs = [
        {"calibration": {"file": "file-a"}},
        {"training_file": "file-b", "validation_file": "file-c"},
        {"calibration": {"corpus": "x"}},
        {"calibration": None, "validation_file": None, "training_file": "file-d"},
    ]
    for number, spec in enumerate(specs):
        jobs.create(new_job(number, spec=spec))
    jobs.request_cancel("job-3")
    jobs.request_pause("job-0")
    assert jobs.get("job-0").status == JobStatus.PAUSED
    assert files_in_use(jobs) == {"file-a": "job-0", "file-b": "job-1", "file-c": "job-1"}
    jobs.close()


def test_many_live_jobs_are_all_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.files._PAGE", 3)
    jobs = open_job_store(tmp_path / "jobs.db", None)
    for number in range(9):
        jobs.create(new_job(number, spec={"training_file": f"file-{number}"}))
    assert len(files_in_use(jobs)) == 9
    jobs.close()


def test_what_a_killed_process_left_is_swept(tmp_path: Path) -> None:
    """Killed behind the blob's rename, before the row was committed."""
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from jobs import files\n"
        "store = files.FileStore(Path(sys.argv[1]))\n"
        "real = os.replace\n"
        "def replace(*paths):\n"
        "    real(*paths)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "files.os.replace = replace\n"
        "with store.begin() as upload:\n"
        "    upload.write(b'lost')\n"
        "    store.add(upload, file_id='file-a', owner='me', filename='a', purpose='user_data',\n"
        "              request_hash='h', max_owner_bytes=100)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=child_environment(), timeout=60
    )
    assert done.returncode == -9
    assert len(blobs(tmp_path)) == 1
    store = FileStore(tmp_path)
    assert store.list_files(None) == []
    add(store, b"found", "file-b")
    store.purge(nothing_in_use)
    assert blobs(tmp_path) == {hashlib.sha256(b"found").hexdigest()}


def test_processes_race_for_one_content(tmp_path: Path) -> None:
    """Adding and deleting the same bytes at once: every file that is listed has its content."""
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from jobs.files import FileStore\n"
        "store = FileStore(Path(sys.argv[1]))\n"
        "for n in range(25):\n"
        "    with store.begin() as upload:\n"
        "        upload.write(b'same')\n"
        "        store.add(upload, file_id=f'file-{sys.argv[2]}x{n}', owner='me', filename='a',\n"
        "                  purpose='user_data', request_hash='h', max_owner_bytes=10**6)\n"
        "    if n != 24:\n"
        "        store.delete(f'file-{sys.argv[2]}x{n}', 'me', dict)\n"
    )
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path), str(number)], env=child_environment()
        )
        for number in range(3)
    ]
    assert [process.wait(120) for process in running] == [0, 0, 0]
    store = FileStore(tmp_path)
    found = store.list_files(None)
    assert {info.id for info in found} == {f"file-{number}x24" for number in range(3)}
    assert all(store.path(info).read_bytes() == b"same" for info in found)


def write_lines(path: Path, *lines: str | bytes) -> Path:
    rows = [line if isinstance(line, bytes) else line.encode() for line in lines]
    path.write_bytes(b"\n".join(rows) + b"\n")
    return path


TEXT = '{"text": "a b c"}'
CHAT = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
TASK = {"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": {}}


@pytest.mark.parametrize(
    ("purpose", "lines", "message"),
    [
        ("calibration", [TEXT] * 16 + ['{"text": '], "line 17: not valid JSON"),
        ("calibration", [TEXT, "[1]"], "line 2: not a JSON object"),
        ("calibration", [TEXT, '{"prompt": "a"}'], 'line 2: needs "text"'),
        ("calibration", ['{"text": 5}'], 'line 1: needs "text"'),
        ("calibration", ['{"text": " "}', '{"text": ""}'], "no line has any text"),
        ("calibration", [TEXT, b'{"text": "\xff"}'], "line 2: not UTF-8"),
        ("calibration", ["[" * 100_000], "line 1: not valid JSON: nested too deep"),
        (
            "calibration",
            [TEXT, "", '{"text": "a \\ud800"}'],
            "line 3: 'text' must be valid Unicode",
        ),
        (
            "fine-tune",
            [CHAT, CHAT.replace('"b"', '"\\udc00"')],
            "line 2: messages[1]: 'content' has a lone",
        ),
        ("fine-tune", [CHAT] * 16 + ['{"messages": '], "line 17: not JSON"),
        ("fine-tune", [CHAT, CHAT.replace("user", "pirate")], "line 2: messages[0]: unknown role"),
        ("fine-tune", [CHAT, CHAT.replace('"b"', '"b", "weight": 0')], "line 2: every assistant"),
        ("batch", [json.dumps(TASK), json.dumps(TASK)], "line 2: its custom_id was on a line"),
        ("batch", [json.dumps(TASK | {"method": "GET"})], 'line 1: needs "custom_id"'),
        ("batch", [json.dumps(TASK | {"body": "x"})], 'line 1: needs "url"'),
        ("batch", ["", " "], "no line"),
        (
            "batch",
            [json.dumps(TASK | {"custom_id": "\ud800"})],
            "line 1: 'custom_id' must be valid Unicode",
        ),
        (
            "batch",
            [json.dumps(TASK | {"body": {"a": ["\udc00"]}})],
            "line 1: 'body' must be valid Unicode",
        ),
        (
            "batch",
            [json.dumps(TASK | {"body": {"\ud800": 1}})],
            "line 1: 'body' must be valid Unicode",
        ),
        (
            "batch",
            [json.dumps(TASK | {"body": {"a": [float("nan")]}})],
            "line 1: 'body' has a number",
        ),
        ("batch", [json.dumps(TASK).replace("{}", '{"a": 1e999}')], "line 1: 'body' has a number"),
    ],
)
def test_bad_content_is_refused_with_its_line(
    tmp_path: Path, purpose: Any, lines: list[str | bytes], message: str
) -> None:
    with pytest.raises(FileContentError) as refused:
        check_file(write_lines(tmp_path / "f", *lines), purpose)
    assert message in str(refused.value)


def test_a_line_that_is_far_too_long_is_not_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.file_check.MAX_LINE_BYTES", 1000)
    path = write_lines(tmp_path / "f", TEXT, json.dumps({"text": "x" * 1000}))
    with pytest.raises(FileContentError, match="line 2: longer than 1000 bytes"):
        check_file(path, "calibration")


def test_good_content_is_read_as_written(tmp_path: Path) -> None:
    other = '{"text": "\\ud83d\\ude00", "id": "\\ud800"}'  # an id is not read
    path = write_lines(tmp_path / "f", '{"text": "é", "id": 3}', "", '{"text": "b\\nc"}', other)
    check_file(path, "calibration")
    assert list(read_texts(path)) == ["é", "b\nc", "😀"]
    check_file(write_lines(tmp_path / "b", json.dumps(TASK)), "batch")
    check_file(write_lines(tmp_path / "t", CHAT, '{"prompt": "a", "completion": "b"}'), "fine-tune")
    check_file(write_lines(tmp_path / "u", b"\xff\x00"), "user_data")
    (tmp_path / "e").write_bytes(b"")
    with pytest.raises(FileContentError, match="empty"):
        check_file(tmp_path / "e", "user_data")


def write_parquet(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path, **options)
    return path


def test_parquet_with_a_text_column(tmp_path: Path) -> None:
    import pyarrow as pa

    path = write_parquet(tmp_path / "a", {"id": [1, 2], "text": ["one", "two"]})
    check_file(path, "calibration")
    assert list(read_texts(path)) == ["one", "two"]
    bad: dict[str, dict[str, Any]] = {
        "no column 'text'": {"body": ["a"]},
        "type int64": {"text": [1, 2]},
        'line 2: needs "text"': {"text": ["a", None]},
        "calibration file has at most": {
            "text": pa.array(["x" * 1000] * (MAX_CALIBRATION_BYTES // 1000 + 99))
        },
    }
    for message, columns in bad.items():
        with pytest.raises(FileContentError, match=message):
            check_file(write_parquet(tmp_path / "b", columns), "calibration")
    encoding = {"text": "DELTA_BYTE_ARRAY"}
    path = write_parquet(
        tmp_path / "d", {"text": ["a"]}, use_dictionary=False, column_encoding=encoding
    )
    with pytest.raises(FileContentError, match="DELTA_BYTE_ARRAY"):
        check_file(path, "calibration")
    (tmp_path / "c").write_bytes(path.read_bytes()[:-9])
    with pytest.raises(FileContentError, match="not a readable Parquet file"):
        check_file(tmp_path / "c", "calibration")
