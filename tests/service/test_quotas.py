"""What a key's jobs may use: seconds of a worker within a day, and bytes on the disk."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from compression.import_model import import_folder
from compression.registry import ModelRegistry
from graph.store import GraphStore
from graph.upload import columns_from_lists
from jobs.files import FileStore
from jobs.sqlite import SqliteJobStore
from jobs.states import JobStatus
from service.app import build_app
from service.auth import KeyStore
from service.errors import ApiError
from service.limits import RateLimits, SqliteBuckets
from service.quotas import DAY, Quotas, folder_bytes
from service.settings import Settings
from tests.jobs.conftest import new_job
from tests.service.openai_app import error_of

OWNER = "local"


@dataclass
class Home:
    """A home with quotas, on a clock that a test moves."""

    path: Path
    settings: Settings
    now: float = 1e9

    def __post_init__(self) -> None:
        clock = lambda: self.now  # noqa: E731
        self.jobs = SqliteJobStore(self.path / "lathe.db", clock=clock, uptime=clock)
        self.files = FileStore(self.settings.files_dir)
        self.graphs = GraphStore(self.settings.graphs_dir)
        limits = RateLimits(
            KeyStore(self.settings.keys_file),
            self.settings,
            SqliteBuckets(self.settings.limits_database),
        )
        self.quotas = Quotas(
            self.settings,
            limits,
            jobs=self.jobs,
            files=self.files,
            graphs=self.graphs,
            models=ModelRegistry(self.settings.models_dir),
            clock=clock,
        )

    def start(self, number: int, owner: str = OWNER) -> Any:
        self.jobs.create(new_job(number, owner=owner))
        return self.jobs.claim("w", ("test",), 600)

    def run(self, number: int, seconds: float, owner: str = OWNER) -> None:
        job = self.start(number, owner)
        self.now += seconds
        self.jobs.finish(job.id, job.fencing, JobStatus.SUCCEEDED)


def home(path: Path, **settings: Any) -> Home:
    return Home(path, Settings(home=path, **settings))


def test_seconds_are_those_of_the_last_day(tmp_path: Path) -> None:
    found = home(tmp_path)
    found.run(0, 100)
    found.run(1, 30, owner="another")
    assert found.quotas.job_seconds(OWNER) == 100
    found.now += DAY - 90  # 60 of them are more than a day ago: 30 of another's job came between
    assert found.quotas.job_seconds(OWNER) == pytest.approx(60)
    job = found.start(2)
    found.now += 20
    assert found.quotas.job_seconds(OWNER) == pytest.approx(40 + 20)  # it runs on
    found.jobs.finish(job.id, job.fencing, JobStatus.QUEUED, reason="worker_shutdown")
    found.now += 5
    again = found.jobs.claim("w", ("test",), 60)
    assert again is not None
    found.now += 7
    assert found.quotas.job_seconds(OWNER) == pytest.approx(40 - 12 + 20 + 7)
    found.now += 2 * DAY
    found.jobs.reap()  # its worker vanished, and had it for as long as the lease
    assert found.jobs.get(again.id).device_seconds == 20 + 60
    assert found.quotas.job_seconds(OWNER) == 0


def test_who_used_a_day_is_told_when_to_come_back(tmp_path: Path) -> None:
    found = home(tmp_path, job_seconds_per_day=100)
    found.run(0, 60)
    found.quotas.check_job(OWNER)
    found.now += 1000
    found.run(1, 70)  # accepted with 40 left
    with pytest.raises(ApiError, match="100 s within 24 hours, and yours ran for 130") as refused:
        found.quotas.check_job(OWNER)
    assert (refused.value.status, refused.value.code) == (429, "job_quota_exceeded")
    wait = int(refused.value.headers()["Retry-After"])
    # until 30 of the first job's 60 seconds are a day ago
    assert wait == pytest.approx(DAY - 60 - 1000 - 70 + 30, abs=2)
    found.quotas.check_job("another")
    found.now += wait
    found.quotas.check_job(OWNER)


def test_a_keys_own_quota_comes_before_the_servers(tmp_path: Path) -> None:
    found = home(tmp_path, job_seconds_per_day=10, max_disk_bytes=1)
    own, _ = KeyStore(found.settings.keys_file).create(
        "own", ("jobs",), {"job_seconds_per_day": 0, "max_disk_bytes": 10}
    )
    found.run(0, 100, owner=own.id)
    found.quotas.check_job(own.id)
    folder = found.settings.jobs_dir / "job-0"
    folder.mkdir(parents=True)
    (folder / "attempt-1.log").write_bytes(b"0123456789")
    with pytest.raises(ApiError, match="have 10 bytes, and 10 are allowed") as refused:
        found.quotas.check_job(own.id)
    assert (refused.value.status, refused.value.code) == (429, "insufficient_quota")
    assert refused.value.headers() == {"x-should-retry": "false"}  # time does not help


def test_the_disk_is_all_that_a_key_keeps(tmp_path: Path, tiny_llama: Path) -> None:
    found = home(tmp_path)
    registry = ModelRegistry(found.settings.models_dir)
    import_folder(registry, "imported", tiny_llama, report=lambda _: None)
    assert found.quotas.disk_bytes(OWNER) == 0
    found.run(0, 1)
    work = found.settings.jobs_dir / "job-0" / "work"
    work.mkdir(parents=True)
    (work / "state").write_bytes(b"x" * 1000)
    (work / "gone").symlink_to(tiny_llama)  # what is elsewhere is not counted
    by_jobs = folder_bytes(work)
    assert 1000 < by_jobs < 1200
    with found.files.begin() as upload:
        upload.write(b"y" * 300)
        found.files.add(
            upload,
            file_id="file-a",
            owner=OWNER,
            filename="f",
            purpose="user_data",
            request_hash="h",
        )
    columns = columns_from_lists(ids=["a"], texts=["b"], labels=[None], splits=[None], edges=[])
    graph, _ = found.graphs.create("graph-1", columns, name="g", owner=OWNER, request_hash="h")
    assert found.quotas.disk_bytes(OWNER) == by_jobs + 300 + graph.num_bytes
    manifest = registry.get("imported").path / "lathe.json"
    manifest.write_text(manifest.read_text().replace('"job_id": null', '"job_id": "job-0"'))
    model = folder_bytes(manifest.parent)
    assert found.quotas.disk_bytes(OWNER) == by_jobs + 300 + graph.num_bytes + model
    assert found.quotas.disk_bytes("another") == 0


@pytest.fixture
def http(tmp_path: Path) -> Iterator[TestClient]:
    settings = Settings(home=tmp_path, models=(), max_disk_bytes=2000)
    with TestClient(build_app(settings), raise_server_exceptions=False) as client:
        yield client


def test_routes_keep_to_it_and_usage_tells(http: TestClient) -> None:
    def upload(text: str, **headers: str) -> Any:
        form = {"purpose": "user_data"}
        return http.post("/v1/files", data=form, files={"file": ("f", text)}, headers=headers)

    def graph(**headers: str) -> Any:
        nodes = [{"id": "a", "text": "t"}]
        body = {"name": "g", "nodes": nodes, "edges": []}
        return http.post("/v1/graphs", json=body, headers=headers)

    def used() -> Any:
        return http.get("/v1/usage").json()["quotas"]

    assert used() == {
        "job_seconds": {"used": 0, "limit": None},
        "disk_bytes": {"used": 0, "limit": 2000},
    }
    assert graph(**{"Idempotency-Key": "g"}).status_code == 201
    with_graph = int(used()["disk_bytes"]["used"])
    assert 0 < with_graph < 2000
    refused = upload("x" * (2001 - with_graph))
    assert error_of(refused, 429) == ("insufficient_quota", "file")
    assert refused.json()["error"]["type"] == "insufficient_quota"
    assert (refused.headers["x-should-retry"], "Retry-After" in refused.headers) == ("false", False)
    kept = upload("x" * (2000 - with_graph), **{"Idempotency-Key": "f"})
    assert kept.status_code == 201
    assert used()["disk_bytes"]["used"] == 2000
    assert error_of(graph(), 429) == ("insufficient_quota", None)
    # what is there already is no more of it
    assert graph(**{"Idempotency-Key": "g"}).status_code == 201
    assert upload("x" * (2000 - with_graph), **{"Idempotency-Key": "f"}).status_code == 201
    assert http.delete(f"/v1/files/{kept.json()['id']}").status_code == 200
    assert graph().status_code == 201
