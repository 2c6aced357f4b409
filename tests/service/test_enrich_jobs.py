"""Enrich jobs over HTTP: what is refused before a job exists, and one from its upload to its artefacts."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pytest
from fastapi.testclient import TestClient

from compression.import_model import import_folder
from compression.registry import ModelRegistry
from jobs.sqlite import SqliteJobStore
from jobs.worker import Worker, WorkerConfig
from service.app import build_app
from service.quotas import folder_bytes
from service.settings import Settings
from tests.jobs.conftest import REPOSITORY, wait_until
from tests.jobs.test_enrich import Host
from tests.service.openai_app import error_of

GRAPH = {
    "name": "letters",
    "nodes": [{"id": i, "text": text} for i, text in enumerate(["abc", "de", "", "abc"])],
    "edges": [[0, 1], [1, 2]],
}
JOB: dict[str, Any] = {"type": "enrich", "prompt": "summary@1", "model": "tiny"}
SELECT = {"strategy": "random", "budget": {"nodes": 1}}
NODES = b'{"id": "a", "text": "abc"}\n{"id": "b", "text": "de"}\n'


@pytest.fixture(scope="module")
def models(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    import_folder(ModelRegistry(folder), "tiny", tiny_llama, report=lambda _: None)
    return folder


@pytest.fixture
def http(models: Path, tmp_path: Path) -> Iterator[TestClient]:
    (tmp_path / "models").symlink_to(models)
    host = Host(tmp_path)
    with TestClient(build_app(Settings(home=tmp_path)), raise_server_exceptions=False) as client:
        yield client
    host.kill()


def upload(http: TestClient, content: bytes, purpose: str = "enrich") -> Any:
    files = {"file": ("nodes.jsonl", content)}
    return http.post("/v1/files", files=files, data={"purpose": purpose})


def test_from_a_graph_to_artefacts(
    http: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    graph_id = http.post("/v1/graphs", json=GRAPH).json()["id"]
    options = {"embedding_model": "tiny", "return": ["text", "embedding"], "max_tokens": 8}
    created = http.post("/v1/jobs", json={**JOB, **options, "graph": graph_id})
    assert created.status_code == 201, created.text
    assert created.json()["spec"]["prompt"] == "summary@1"
    path = f"/v1/jobs/{created.json()['id']}"
    early = http.delete(f"{path}/artifacts")  # it is queued: no worker runs
    assert error_of(early, 409) == ("job_not_ended", "job_id")

    def job() -> Any:
        return http.get(path).json()

    store, stop = SqliteJobStore(tmp_path / "lathe.db"), threading.Event()
    worker = threading.Thread(target=Worker(store, WorkerConfig(home=tmp_path)).run, args=(stop,))
    worker.start()
    try:
        wait_until(lambda: job()["finished_at"] is not None)
    finally:
        stop.set()
        worker.join()
        store.close()
    assert job()["status"] == "succeeded", job()["error"]
    assert job()["progress"] == {"step": 4, "total": 4}
    result = job()["result"]
    assert result["usage"]["num_by_status"] == {
        "ok": 2, "cached": 1, "skipped_budget": 0, "invalid_output": 0, "failed": 1,
    }  # fmt: skip
    listed = {item["name"] for item in http.get(f"{path}/artifacts").json()["data"]}
    assert listed == set(result["artifacts"]) == {"enriched.arrow", "enriched.jsonl"}
    arrow = http.get(f"{path}/artifacts/enriched.arrow").content
    with pa.ipc.open_stream(arrow) as reader:
        metadata = reader.schema.metadata
        rows = reader.read_all().to_pylist()
    assert json.loads(metadata[b"lathe.usage"]) == result["usage"]
    assert [row["node_id"] for row in rows] == [0, 1, 2, 3]
    lines = http.get(f"{path}/artifacts/enriched.jsonl").text.splitlines()
    assert [json.loads(line)["text"] for line in lines] == [row["text"] for row in rows]

    # What the job found, a request finds too: they have one cache.
    body = {"prompt": "summary@1", "model": "tiny", "node_ids": [0, 1], **options}
    answer = http.post(f"/v1/graphs/{graph_id}/enrich", json=body).json()
    assert [row["status"] for row in answer["data"]] == ["cached", "cached"]
    assert [row["text"] for row in answer["data"]] == [row["text"] for row in rows[:2]]

    used = http.get("/v1/usage").json()["quotas"]["disk_bytes"]["used"]
    kept = folder_bytes(tmp_path / path.removeprefix("/v1/"))
    assert 0 < kept < used
    before = job()
    for _ in range(2):  # a second time changes nothing
        deleted = http.delete(f"{path}/artifacts")
        assert deleted.json() == {"id": before["id"], "object": "job.artifacts", "deleted": True}
    assert http.get("/v1/usage").json()["quotas"]["disk_bytes"]["used"] == used - kept
    assert http.get(f"{path}/artifacts").json()["data"] == []
    gone = http.get(f"{path}/artifacts/enriched.arrow")
    assert error_of(gone, 404) == ("artifact_not_found", "name")
    assert http.get(f"{path}/logs").text == ""
    assert job() == before


def test_a_jobs_price_is_the_servers_unless_it_names_one(http: TestClient) -> None:
    graph_id = http.post("/v1/graphs", json=GRAPH).json()["id"]
    body = {**JOB, "graph": graph_id, "budget": {"max_cost": 0.01}}
    refused = http.post("/v1/jobs", json=body)
    assert refused.status_code == 400, refused.text
    assert refused.json()["error"]["param"] == "budget.cost_per_million_tokens"
    cast(Any, http.app).state.lathe.settings.cost_per_million_tokens = 0.5
    select = {"strategy": "degree", "budget": {"cost": 1.0}}
    spec = http.post("/v1/jobs", json=body | {"select": select}).json()["spec"]
    assert spec["budget"] == {"max_cost": 0.01, "cost_per_million_tokens": 0.5}
    assert spec["select"]["rates"]["cost_per_million_tokens"] == 0.5
    body["budget"] = {"max_cost": 0.01, "cost_per_million_tokens": 2.0}
    assert http.post("/v1/jobs", json=body).json()["spec"]["budget"] == body["budget"]


def test_refusals_before_a_job_exists(http: TestClient) -> None:
    graph_id = http.post("/v1/graphs", json=GRAPH).json()["id"]
    other = upload(http, b"anything", "user_data").json()["id"]
    for fields, status, code, param in [
        ({}, 400, "invalid_value", "graph"),
        ({"graph": "graph-x"}, 404, "graph_not_found", "graph"),
        ({"graph": graph_id, "node_ids": [0, 9]}, 400, "invalid_value", "node_ids[1]"),
        ({"graph": graph_id, "node_ids": [0, 0]}, 400, "invalid_value", "node_ids[1]"),
        ({"graph": graph_id, "node_ids": ["0"]}, 400, "invalid_value", "node_ids[0]"),
        ({"graph": graph_id, "prompt": "x"}, 404, "prompt_not_found", "prompt"),
        ({"graph": graph_id, "model": "other"}, 404, "model_not_found", "model"),
        ({"graph": graph_id, "select": {**SELECT, "mix": []}}, 400, "invalid_value", "select.mix"),
        ({"graph": graph_id, "select": {**SELECT, "order": "low"}}, 400, "unsupported_parameter", "select.order"),
        ({"file": "file-x"}, 404, "file_not_found", "file"),
        ({"file": other}, 400, "invalid_value", "file"),
    ]:  # fmt: skip
        refused = http.post("/v1/jobs", json={**JOB, **fields})
        assert error_of(refused, status)[:2] == (code, param), (fields, refused.text)
    assert http.get("/v1/jobs").json()["data"] == []


def test_a_file_that_a_job_needs_stays(http: TestClient) -> None:
    assert error_of(upload(http, b'{"id": 1}\n'))[0] == "invalid_file"
    file_id = upload(http, NODES).json()["id"]
    created = http.post("/v1/jobs", json={**JOB, "file": file_id})
    assert created.status_code == 201, created.text
    assert error_of(http.delete(f"/v1/files/{file_id}"), 409)[0] == "file_in_use"
    http.post(f"/v1/jobs/{created.json()['id']}/cancel")
    assert http.delete(f"/v1/files/{file_id}").status_code == 200


def test_the_server_names_the_models(http: TestClient) -> None:
    """Both defaults are not loaded here, which is told before a job exists."""
    graph_id = http.post("/v1/graphs", json=GRAPH).json()["id"]
    refused = http.post(
        "/v1/jobs", json={"type": "enrich", "prompt": "summary@1", "graph": graph_id}
    )
    assert error_of(refused, 404)[:2] == ("model_not_found", "model")
