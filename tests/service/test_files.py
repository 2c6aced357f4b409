"""/v1/files through OpenAI's client and by hand, and jobs that name files."""

import errno
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from fastapi.testclient import TestClient

from compression.import_model import import_folder
from compression.registry import ModelRegistry
from jobs.files import FileStore, Upload
from service.app import build_app
from service.auth import KeyStore
from service.settings import Settings
from tests.service.openai_app import error_of

TEXT = b'{"text": "the quick brown fox"}\n'
CHAT = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


@pytest.fixture
def home(tiny_llama: Path, tmp_path: Path) -> Path:
    import_folder(ModelRegistry(tmp_path / "models"), "tiny", tiny_llama, report=lambda _: None)
    return tmp_path


@pytest.fixture
def http(home: Path) -> Iterator[TestClient]:
    with TestClient(build_app(Settings(home=home)), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def client(http: TestClient) -> openai.OpenAI:
    return openai.OpenAI(
        base_url="http://testserver/v1", api_key="none", max_retries=0, http_client=http
    )


def upload(
    http: TestClient, content: bytes, purpose: str = "user_data", name: str = "f.jsonl", **more: Any
) -> Any:
    return http.post(
        "/v1/files", files={"file": (name, content)}, data={"purpose": purpose}, **more
    )


def leftovers(home: Path) -> list[str]:
    """Everything of the store but its database."""
    folder = home / "files"
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return [path.name for path in paths if not path.name.startswith("files.db")]


def test_the_openai_client_uploads_lists_reads_and_deletes(client: openai.OpenAI) -> None:
    one = client.files.create(file=("train.jsonl", CHAT), purpose="fine-tune")
    assert (one.object, one.bytes, one.filename, one.purpose, one.status) == (
        "file", len(CHAT), "train.jsonl", "fine-tune", "processed"
    )  # fmt: skip
    assert one.model_extra == {"sha256": hashlib.sha256(CHAT).hexdigest()}
    others = [
        client.files.create(
            file=("notes.bin", bytes([n])),
            purpose="user_data",
            expires_after={"anchor": "created_at", "seconds": 3600},
        )
        for n in range(3)
    ]
    assert others[0].expires_at == others[0].created_at + 3600
    assert client.files.retrieve(one.id) == one
    assert client.files.content(one.id).read() == CHAT
    assert [f.id for f in client.files.list(limit=1, order="asc")] == [
        one.id,
        *(other.id for other in others),
    ]  # through four pages
    assert [f.id for f in client.files.list(purpose="fine-tune")] == [one.id]
    assert client.files.list(after=others[0].id).data == [one]
    assert client.files.delete(one.id).deleted
    with pytest.raises(openai.NotFoundError) as gone:
        client.files.retrieve(one.id)
    assert gone.value.code == "file_not_found"


def test_a_large_upload_is_streamed_and_counted(http: TestClient, home: Path) -> None:
    content = bytes(range(256)) * 20_000
    made = upload(http, content, name="..\\../etc/passwd")
    assert made.status_code == 201, made.text
    assert made.json()["filename"] == "passwd"
    assert made.json()["sha256"] == hashlib.sha256(content).hexdigest()
    answer = http.get(f"/v1/files/{made.json()['id']}/content")
    assert answer.content == content
    assert leftovers(home) == [made.json()["sha256"]]


@pytest.mark.parametrize(
    ("content", "purpose", "message"),
    [
        (b"", "user_data", "the file is empty"),
        (CHAT * 16 + b'{"messages": [', "fine-tune", "line 17: not JSON"),
        (CHAT + CHAT.replace(b"assistant", b"pirate"), "fine-tune", "line 2: messages[1]: unknown"),
        (b'{"prompt": "a", "completion": ""}', "fine-tune", "line 1: completion is empty"),
        (TEXT + b'{"body": 1}', "calibration", 'line 2: needs "text"'),
        (TEXT, "batch", 'line 1: needs "custom_id"'),
        (b"PAR1 but not really", "calibration", "not a readable Parquet file"),
    ],
)
def test_bad_content_is_refused_with_its_line_and_not_kept(
    http: TestClient, home: Path, content: bytes, purpose: str, message: str
) -> None:
    refused = upload(http, content, purpose)
    assert error_of(refused) == ("invalid_file", "file")
    assert message in refused.json()["error"]["message"]
    assert leftovers(home) == []
    assert http.get("/v1/files").json()["data"] == []


def test_a_line_of_100_megabytes_is_refused_by_its_number(http: TestClient) -> None:
    line = b'{"messages": [{"role": "user", "content": "' + b"x" * 100_000_000 + b'"}]}'
    refused = upload(http, CHAT + line, "fine-tune")
    assert error_of(refused) == ("invalid_file", "file")
    assert "line 2: longer than" in refused.json()["error"]["message"]


def part(name: str, value: str, filename: str | None = None) -> str:
    file = "" if filename is None else f'; filename="{filename}"'
    return f'--b\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n{value}\r\n'


FILE, PURPOSE = part("file", "x", "f"), part("purpose", "user_data")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (PURPOSE + "--b--", "file"),
        (FILE + "--b--", "purpose"),
        (FILE + part("purpose", "vision") + "--b--", "purpose"),
        (FILE + PURPOSE + PURPOSE + "--b--", "purpose"),
        (FILE + PURPOSE + part("tags", "a") + "--b--", "tags"),
        (FILE + part("purpose", "x" * 5000) + "--b--", "purpose"),
        (FILE + FILE + PURPOSE + "--b--", "file"),
        (part("nodes", "x", "f") + PURPOSE + "--b--", None),
        (part("file", "x") + PURPOSE + "--b--", "file"),
        (FILE + PURPOSE, None),
        ("--c\r\n", None),
        (FILE + PURPOSE + part("expires_after[seconds]", "3600") + "--b--", "expires_after"),
        (FILE + PURPOSE + part("expires_after[seconds]", "5") + "--b--", "expires_after[seconds]"),
        ("".join(part(f"p{n}", "") for n in range(40)) + "--b--", None),
    ],
)
def test_bad_forms_name_the_part(
    http: TestClient, home: Path, body: str, param: str | None
) -> None:
    headers = {"content-type": "multipart/form-data; boundary=b"}
    refused = http.post("/v1/files", content=body.encode(), headers=headers)
    assert error_of(refused)[1] == param
    assert leftovers(home) == []


def test_other_bodies_are_refused(http: TestClient) -> None:
    assert error_of(http.post("/v1/files", json={}), 415)[0] == "unsupported_media_type"
    no_boundary = http.post(
        "/v1/files", content=b"x", headers={"content-type": "multipart/form-data"}
    )
    assert error_of(no_boundary, 415)[0] == "unsupported_media_type"


def test_limits_of_size_and_quota(home: Path) -> None:
    settings = Settings(home=home, max_upload_bytes=1000, max_disk_bytes=700)
    with TestClient(build_app(settings)) as http:
        assert error_of(upload(http, b"x" * 1000), 413)[0] == "request_too_large"

        def slowly() -> Iterator[bytes]:
            yield FILE.encode()
            yield b"x" * 2000

        headers = {"content-type": "multipart/form-data; boundary=b"}
        streamed = http.post("/v1/files", content=slowly(), headers=headers)
        assert error_of(streamed, 413)[0] == "request_too_large"
        assert leftovers(home) == []
        assert upload(http, b"x" * 400).status_code == 201
        refused = upload(http, b"y" * 400)
        assert error_of(refused, 429) == ("insufficient_quota", "file")
        assert "hold 400 bytes, this one has 400, and 700" in refused.json()["error"]["message"]
        assert len(leftovers(home)) == 1


def test_a_full_disk_is_said_and_leaves_nothing(
    http: TestClient, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Upload.write

    def full(upload: Upload, data: bytes) -> None:
        write(upload, data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Upload, "write", full)
    refused = upload(http, b"x" * 100)
    assert error_of(refused, 507) == ("disk_full", None)
    assert refused.headers["x-should-retry"] == "false"
    assert leftovers(home) == []
    monkeypatch.setattr(Upload, "write", write)
    assert upload(http, b"x" * 100).status_code == 201


def test_an_idempotency_key_uploads_once(http: TestClient, home: Path) -> None:
    key = {"Idempotency-Key": "k"}
    first, again = (upload(http, b"same", headers=key) for _ in range(2))
    assert first.json() == again.json()
    assert again.headers["Idempotent-Replayed"] == "true"
    other = upload(http, b"other", headers=key)
    assert error_of(other, 409)[0] == "idempotency_conflict"
    assert len(leftovers(home)) == 1


def test_files_belong_to_a_key(home: Path) -> None:
    keys = KeyStore(home / "keys.json")
    _, mine = keys.create("mine", ("jobs",))
    _, yours = keys.create("yours", ("jobs", "inference"))
    _, admin = keys.create("admin", ("admin",))
    _, reader = keys.create("reader", ("inference",))

    def bearer(secret: str) -> dict[str, Any]:
        return {"headers": {"authorization": f"Bearer {secret}"}}

    with TestClient(build_app(Settings(home=home))) as http:
        file_id = upload(http, TEXT, "calibration", **bearer(mine)).json()["id"]
        assert error_of(upload(http, TEXT, **bearer(reader)), 403)[0] == "insufficient_scope"
        for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
            denied = http.request(method, f"/v1/files/{file_id}{path}", **bearer(yours))
            assert error_of(denied, 404)[0] == "file_not_found"
        assert http.get("/v1/files", **bearer(yours)).json()["data"] == []
        job = http.post("/v1/jobs", json=compress(file_id), **bearer(yours))
        assert error_of(job, 404) == ("file_not_found", "calibration.file")
        assert len(http.get("/v1/files", **bearer(admin)).json()["data"]) == 1
        assert http.delete(f"/v1/files/{file_id}", **bearer(admin)).status_code == 200


def compress(file_id: str, **calibration: Any) -> dict[str, Any]:
    return {
        "type": "compress",
        "model": "tiny",
        "output": "small",
        "recipe": [{"wanda": {"sparsity": 0.5}}],
        "calibration": {"file": file_id, "length": 16} | calibration,
    }


def test_a_job_names_a_file_and_keeps_it(http: TestClient) -> None:
    file_id = upload(http, TEXT, "calibration").json()["id"]
    job = http.post("/v1/jobs", json=compress(file_id))
    assert job.status_code == 201, job.text
    assert job.json()["spec"]["calibration"] == {
        "file": file_id, "length": 16, "samples": 32, "seed": 0
    }  # fmt: skip
    refused = http.delete(f"/v1/files/{file_id}")
    assert error_of(refused, 409) == ("file_in_use", "file_id")
    assert job.json()["id"] in refused.json()["error"]["message"]
    http.post(f"/v1/jobs/{job.json()['id']}/cancel")
    assert http.delete(f"/v1/files/{file_id}").json() == {
        "id": file_id, "object": "file", "deleted": True
    }  # fmt: skip
    again = http.post("/v1/jobs", json=compress(file_id))
    assert error_of(again, 404) == ("file_not_found", "calibration.file")


def test_a_file_that_cannot_calibrate_is_refused_by_name(http: TestClient) -> None:
    wrong = upload(http, TEXT, "user_data").json()["id"]
    refused = http.post("/v1/jobs", json=compress(wrong))
    assert error_of(refused) == ("invalid_value", "calibration.file")
    assert "of purpose 'user_data', this needs 'calibration'" in refused.json()["error"]["message"]
    # 19 characters, each a token of the tiny model; what is between two texts counts too.
    short = upload(http, TEXT, "calibration").json()["id"]
    assert http.post("/v1/jobs", json=compress(short, length=19)).status_code == 201
    body = compress(short, length=20) | {"output": "other"}
    refused = http.post("/v1/jobs", json=body)
    assert error_of(refused) == ("invalid_value", "calibration.file")
    assert "has 19 tokens, one sample needs 20" in refused.json()["error"]["message"]
    skip = {"type": "calibrate_skip", "model": "tiny", "output": "s"}
    refused = http.post("/v1/jobs", json=skip | {"calibration": body["calibration"]})
    assert error_of(refused) == ("invalid_value", "calibration.file")


def test_several_api_processes_see_the_same_files(http: TestClient, home: Path) -> None:
    file_id = upload(http, TEXT).json()["id"]
    with TestClient(build_app(Settings(home=home))) as second:
        assert second.get(f"/v1/files/{file_id}/content").content == TEXT
        assert second.delete(f"/v1/files/{file_id}").status_code == 200
    assert error_of(http.get(f"/v1/files/{file_id}"), 404)[0] == "file_not_found"
    assert FileStore(home / "files").list_files(None) == []
    assert json.loads(http.get("/v1/files").text)["has_more"] is False
