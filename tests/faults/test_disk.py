"""The disk of LATHE_HOME runs full, and is given room again."""

import errno
import io
import os
import time
from pathlib import Path

import httpx
import pytest

from tests.faults.conftest import (
    Faulty,
    check_batch,
    complete,
    job,
    recovery_seconds,
    submit_batch,
    tell,
    until_status,
)
from tests.processes.conftest import TINY, Service, eventually

pytestmark = pytest.mark.processes
NUM_LINES = 200


@pytest.fixture
def disk(faulty: Faulty) -> Path:
    if faulty.disk is None:
        pytest.skip("mounting a tmpfs is not allowed here")
    return faulty.disk


def fill(path: Path) -> Path:
    """A file that takes all that is left."""
    ballast = path / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (2**16, 1):
            while writes(file, bytes(size)):
                pass
    assert os.statvfs(path).f_bavail == 0
    return ballast


def writes(file: io.FileIO, data: bytes) -> bool:
    try:
        return file.write(data) == len(data)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return False


def test_a_full_disk_is_told_and_nothing_accepted_is_lost(
    service: Service, disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    running = submit_batch(service, NUM_LINES, max_tokens=200)
    until_status(service, running, "running")
    queued = [submit_batch(service, 3) for _ in range(3)]
    before = {job_id: job(service, job_id)["created_at"] for job_id in queued}
    ballast = fill(disk)
    try:
        assert httpx.get(f"{service.url}/health").status_code == 200
        assert complete(service).status_code == 200
        upload = httpx.post(
            f"{service.url}/v1/files",
            data={"purpose": "batch"},
            files={"file": ("a.jsonl", b"{}\n" * 100_000)},
            timeout=60,
        )
        assert (upload.status_code, upload.json()["error"]["code"]) == (507, "disk_full")
        body = {"type": "export", "model": TINY, "format": "dense"}
        created = eventually(
            lambda: refused(httpx.post(f"{service.url}/v1/jobs", json=body, timeout=60)),
            "a job that is refused",
        )
        assert created == "disk_full"
        assert {job_id: job(service, job_id)["created_at"] for job_id in queued} == before
        service.children()["worker"].kill()
        eventually(lambda: "worker" in service.children(), "another worker")
    finally:
        ballast.unlink()
    began = time.monotonic()
    seconds = recovery_seconds(service, began)
    for job_id in queued:
        check_batch(service, job_id, 3)
    found = until_status(service, running, "succeeded", "failed")
    if found["status"] == "failed":  # where it was its own write that found no room
        assert found["error"]["code"] == "disk_full", found
    check_batch(service, submit_batch(service, 3), 3)
    tell(
        capsys,
        f"disk full: well {seconds:.1f} s after there was room; the running job {found['status']}",
    )


def refused(response: httpx.Response) -> str | None:
    """The error's code; None while the store still finds room in what it has."""
    return None if response.status_code == 201 else str(response.json()["error"]["code"])
