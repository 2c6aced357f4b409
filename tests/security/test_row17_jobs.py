"""Row 17: a job names what there is, with typed parameters; it brings no code, and its key has quotas."""

import copy
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from service.app import build_app
from service.settings import Settings
from tests.security.conftest import MODEL, Guarded, check_error, make_home, scripted_engine
from tests.security.test_row05_no_url_is_fetched import examples
from tests.security.test_row09_parameters import places, put

COMPRESS: dict[str, Any] = {
    "type": "compress", "model": MODEL, "output": "out", "recipe": [{"int4": {"group_size": 32}}],
}  # fmt: skip
HOSTILE: list[Any] = [
    "; rm -rf /", "$(id)", "`id`", "__import__('os').system('id')", "!!python/object/apply:os.system [id]",
    "{{ 7 * 7 }}", "../../x", 10**9, -1, 0, 1e300, None, True, [], {}, ["x"] * 1000, {"x": {"y": "z"}}, "\x00",
]  # fmt: skip


@pytest.mark.parametrize(
    "field",
    ["command", "cmd", "entrypoint", "script", "env", "runtime_env", "image", "working_dir", "code",
     "callback", "webhook", "path", "output_dir", "trust_remote_code", "python", "args"],
)  # fmt: skip
def test_there_is_no_field_for_code(client: TestClient, guarded: Guarded, field: str) -> None:
    for body in (
        COMPRESS | {field: "id"},
        COMPRESS | {"recipe": [{"int4": {"group_size": 32, field: "id"}}]},
        COMPRESS | {"recipe": [{field: {}}]},
        {"type": field, "model": MODEL},
    ):
        response = client.post("/v1/jobs", json=body, headers=guarded.headers("jobs"))
        assert check_error(response, 400) in ("unsupported_parameter", "invalid_value")


def test_a_fuzzed_spec_is_a_job_or_a_refusal(
    app: FastAPI, client: TestClient, guarded: Guarded
) -> None:
    draw = random.Random(0)
    bodies = [body for path, body in examples(app) if path in ("/v1/jobs", "/v1/fine_tuning/jobs")]
    assert bodies
    statuses = set()
    for _ in range(400):
        body = copy.deepcopy(draw.choice([COMPRESS, *bodies]))
        for _ in range(draw.randint(1, 3)):
            place = draw.choice(list(places(body))[1:] or [[]])
            body = put(body, place, draw.choice(HOSTILE))
            if not isinstance(body, dict):
                break
        response = client.post("/v1/jobs", json=body, headers=guarded.headers("jobs"))
        statuses.add(response.status_code)
        if response.status_code != 201:
            check_error(response, 400, 404, 409)
    assert 400 in statuses


@pytest.fixture
def limited(tiny_llama: Path, tmp_path: Path) -> Iterator[TestClient]:
    home = make_home(tiny_llama, tmp_path)
    settings = Settings(home=home, models=(MODEL,), max_active_jobs=2, max_job_seconds=90)
    app = build_app(settings)
    app.state.lathe.engines.add(MODEL, scripted_engine())
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def test_a_key_has_so_many_jobs_at_once(limited: TestClient) -> None:
    def create(number: int, **headers: str) -> Any:
        return limited.post("/v1/jobs", json=COMPRESS | {"output": f"o{number}"}, headers=headers)

    first = create(0, **{"Idempotency-Key": "k"})
    assert (first.status_code, create(1).status_code) == (201, 201)
    refused = create(2)
    assert check_error(refused, 429) == "job_quota_exceeded"
    assert int(refused.headers["Retry-After"]) > 0
    replayed = create(0, **{"Idempotency-Key": "k"})
    assert (replayed.status_code, replayed.json()["id"]) == (201, first.json()["id"])
    limited.post(f"/v1/jobs/{first.json()['id']}/pause")
    assert create(2).status_code == 429
    limited.post(f"/v1/jobs/{first.json()['id']}/cancel")
    assert create(2).status_code == 201


def test_every_attempt_has_an_end(limited: TestClient) -> None:
    """However many steps it asks for: the worker ends what runs longer (tests/jobs/test_worker.py)."""
    made = limited.post("/v1/jobs", json=COMPRESS).json()
    job = limited.app.state.lathe.jobs.get(made["id"])  # type: ignore[attr-defined]
    assert job.deadline_seconds == 90


def test_uploads_have_a_quota(tiny_llama: Path, tmp_path: Path) -> None:
    settings = Settings(home=make_home(tiny_llama, tmp_path), models=(MODEL,), max_disk_bytes=100)
    line = b'{"text": "thirty-odd bytes of a text"}\n'
    with TestClient(build_app(settings), raise_server_exceptions=False) as client:
        statuses = [
            client.post(
                "/v1/files",
                data={"purpose": "calibration"},
                files={"file": (f"f{i}", line.replace(b'text"}', b'text %d"}' % i))},
            ).status_code
            for i in range(3)
        ]
    assert statuses == [201, 201, 429]
