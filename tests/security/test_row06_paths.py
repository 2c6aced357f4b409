"""Row 6: an id from a request is looked up, never opened: nothing outside its folder is read, changed or told of."""

import json
import urllib.parse
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from tests.security.conftest import MODEL, Guarded, Wire, check_error

MARK = "content-of-a-file-outside"
IDS = [
    "..", "../..", "../../secret", "..%2f..%2fsecret", "%2e%2e", "%2e%2e%2f%2e%2e%2fsecret", "..\\..\\secret",
    "..%5c..%5csecret", "/etc/passwd", "%2fetc%2fpasswd", "C:\\Windows\\win.ini", "\\\\host\\share",
    "secret", "secret%00", "tiny%00.txt", "tiny/../../secret", "tiny%2f..%2f..%2fsecret", ".", "%2e", "~",
    "~root", "$HOME", "tiny ", " tiny", "TINY", "tiny.", "tiny%0a", "tiny/lathe.json", "tiny%2flathe.json",
    "%252e%252e%252fsecret", "..%c0%afsecret", "..%ef%bc%8fsecret", "con", "-rf", "--help", "*", "t*", "link",
    "a" * 300, "a" * 65_000, "%ff%fe", "é", ".hidden", "tiny;x", "tiny?x", "tiny#x",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def bait(guarded: Guarded) -> None:
    """What must not be reached: files beside the folders, and a link out of each."""
    home = guarded.settings.home
    (home / "secret").write_text(MARK)
    (home / "secret.txt").write_text(MARK)
    outside = home.parent / f"{home.name}-outside"
    outside.mkdir()
    for name in ("secret", "lathe.json", "manifest.json", "config.json"):
        (outside / name).write_text(json.dumps({"text": MARK}))
    folders = ("models", "files", "jobs", "graphs", "projectors")
    for folder in folders:
        (home / folder).mkdir(exist_ok=True)
        if folder != "models":
            (home / folder / "link").symlink_to(outside)


def snapshot(home: Path) -> dict[str, bytes]:
    """All that no request may touch."""
    folders = (home.parent / f"{home.name}-outside", home / "models")
    files = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path): path.read_bytes() for path in (*files, home / "secret")}


def with_ids(app: FastAPI) -> list[tuple[str, str]]:
    found = [
        (method.upper(), path)
        for path, item in app.openapi()["paths"].items()
        for method in item
        if "{" in path
    ]
    assert len(found) > 20
    return found


def fill(path: str, value: str) -> str:
    parts = [value if part.startswith("{") else part for part in path.split("/")]
    return "/".join(parts)


@pytest.mark.parametrize("value", IDS, ids=lambda value: value[:30])
def test_no_id_in_a_path_leads_out(
    app: FastAPI, client: TestClient, guarded: Guarded, value: str
) -> None:
    home = guarded.settings.home
    before = snapshot(home)
    bearer = guarded.headers("admin") | {"content-type": "application/json"}
    if len(value) > 10_000:  # once is enough
        paths = [("GET", "/v1/models/{model_id}"), ("GET", "/v1/files/{file_id}/content")]
    else:
        paths = with_ids(app)
    for method, path in paths:
        # as it is where it may stand in a URL, so that no client tidies it up
        target = fill(path, value if value.isascii() and "\\" not in value and " " not in value
                      else urllib.parse.quote(value, safe="%"))  # fmt: skip
        body = b"{}" if method == "POST" else b""
        response = client.request(method, target, headers=bearer, content=body)
        assert MARK not in response.text
        assert "root:" not in response.text
        if (
            response.status_code != 200
        ):  # a game may also end at a route without an id, such as a list
            check_error(response, 400, 404, 405, 409)
    assert snapshot(home) == before


@pytest.mark.parametrize("value", [v for v in IDS if "?" not in v and "#" not in v])
def test_nor_does_one_in_a_body(client: TestClient, guarded: Guarded, value: str) -> None:
    value = urllib.parse.unquote(value, errors="replace")
    home = guarded.settings.home
    before = snapshot(home)
    bearer = guarded.headers("admin")
    recipe = [{"int4": {"group_size": 32}}]
    compress: dict[str, Any] = {
        "type": "compress",
        "model": MODEL,
        "output": "out",
        "recipe": recipe,
    }
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("completions", {"model": value, "prompt": "a"}),
        ("chat/completions", {"model": value, "messages": [{"role": "user", "content": "a"}]}),
        ("embeddings", {"model": value, "input": "a"}),
        ("score", {"model": value, "context": "a", "continuations": ["b"]}),
        ("tokenize", {"model": value, "prompt": "a"}),
        ("enrich", {"prompt": value, "model": MODEL, "nodes": [{"id": "a", "text": "a"}]}),
        ("enrich", {"prompt": "summary", "model": value, "nodes": [{"id": "a", "text": "a"}]}),
        ("jobs", compress | {"model": value}),
        ("jobs", compress | {"output": f"../{value}"}),
        ("jobs", compress | {"calibration": {"file": value}}),
        ("jobs", compress | {"calibration": {"corpus": value}}),
        ("fine_tuning/jobs", {"model": MODEL, "training_file": value}),
        ("fine_tuning/jobs", {"model": MODEL, "training_file": "file-x", "suffix": f"/{value}"}),
    ]
    for path, body in bodies:
        response = client.post(f"/v1/{path}", json=body, headers=bearer)
        check_error(response, 400, 404)
        assert MARK not in response.text
    assert snapshot(home) == before


@pytest.mark.parametrize(
    "value", ["../../secret", "..", "%2e%2e/%2e%2e/secret", "link/secret", "./link"]
)
def test_nor_does_one_that_no_client_tidied_up(wire: Wire, guarded: Guarded, value: str) -> None:
    bearer = f"Authorization: {guarded.headers('admin')['authorization']}"
    for path in ("models", "files", "jobs", "graphs"):
        for rest in ("", "/content", "/logs", "/artifacts/x"):
            status, content = wire.ask(f"GET /v1/{path}/{value}{rest}", "Host: 127.0.0.1", bearer)
            assert status in (400, 404, 405), content
            assert MARK.encode() not in content


def test_an_artifact_is_named_by_the_list_or_not_at_all(
    client: TestClient, guarded: Guarded
) -> None:
    """Beside the artefacts lie a link out, a hidden file and a folder."""
    bearer = guarded.headers("jobs")
    body = {
        "type": "compress", "model": MODEL, "output": "made", "recipe": [{"int4": {"group_size": 32}}],
    }  # fmt: skip
    job_id = client.post("/v1/jobs", json=body, headers=bearer).json()["id"]
    folder = guarded.settings.jobs_dir / job_id / "artifacts"
    (folder / "folder").mkdir(parents=True)
    (folder / "plot.png").write_bytes(b"png")
    (folder / ".hidden").write_text(MARK)
    (folder / "link").symlink_to(guarded.settings.home / "secret")
    (folder.parent / "attempt-1.log").write_text(MARK)
    listed = client.get(f"/v1/jobs/{job_id}/artifacts", headers=bearer).json()["data"]
    assert [artifact["name"] for artifact in listed] == ["plot.png"]
    for name in (*IDS[:-1], "folder", ".hidden", "link", "..%2fattempt-1.log", "../attempt-1.log"):
        if len(name) < 1000 and name.isascii() and "?" not in name:
            target = f"/v1/jobs/{job_id}/artifacts/{name}"
            response = client.get(target, headers=bearer)
            assert MARK not in response.text
    good = client.get(f"/v1/jobs/{job_id}/artifacts/plot.png", headers=bearer)
    assert good.content == b"png"


@pytest.mark.parametrize(
    "name",
    ["../../../secret", "..\\..\\secret", "/etc/passwd", "a\r\nX-Evil: 1", "a\";x=\"", ".", "..", "\u202egnp.exe"],
)  # fmt: skip
def test_an_uploads_name_is_a_label(client: TestClient, guarded: Guarded, name: str) -> None:
    bearer = guarded.headers("jobs")
    line = b'{"text": "some text"}\n'
    made = client.post(
        "/v1/files", headers=bearer, data={"purpose": "calibration"}, files={"file": (name, line)}
    )
    assert made.status_code == 201, made.text
    kept = made.json()["filename"]
    assert "/" not in kept
    assert "\\" not in kept
    assert kept.isprintable()
    content = client.get(f"/v1/files/{made.json()['id']}/content", headers=bearer)
    assert content.content == line
    assert "x-evil" not in content.headers
    assert content.headers["content-disposition"].startswith("attachment")
    assert content.headers["content-type"] == "application/octet-stream"
