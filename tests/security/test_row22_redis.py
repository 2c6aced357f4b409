"""Row 22: Redis asks for a password, may be emptied, and may lie; none of it is more than an error."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from jobs.store import JobNotFoundError
from service.app import build_app
from service.settings import Settings
from tests.jobs.conftest import new_job, wait_until
from tests.security.conftest import MODEL, check_error, make_home

redis = pytest.importorskip("redis")
from jobs.redis import RedisJobStore  # noqa: E402

pytestmark = pytest.mark.redis
PASSWORD = "a-password"


@pytest.fixture(scope="module")
def guarded_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The socket of a redis-server that requires a password."""
    binary = shutil.which("redis-server")
    if binary is None:
        pytest.skip("redis-server is not installed")
    folder = tmp_path_factory.mktemp("redis")
    socket = folder / "redis.sock"
    process = subprocess.Popen(
        [binary, "--port", "0", "--unixsocket", str(socket), "--requirepass", PASSWORD,
         "--dir", str(folder), "--save", ""],
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    wait_until(socket.exists, 20)
    yield socket
    process.terminate()
    process.wait()


def test_the_password_counts(guarded_redis: Path) -> None:
    store = RedisJobStore(f"unix://:{PASSWORD}@{guarded_redis}")
    assert store.create(new_job(1))[1]
    store.close()
    for url in (f"unix://{guarded_redis}", f"unix://:wrong@{guarded_redis}"):
        with pytest.raises(redis.RedisError):
            RedisJobStore(url).get("job-1")


@pytest.mark.parametrize("credentials", ["", ":wrong@"])
def test_a_wrong_password_is_a_503(
    guarded_redis: Path, tiny_llama: Path, tmp_path: Path, credentials: str
) -> None:
    settings = Settings.model_validate(
        {
            "home": make_home(tiny_llama, tmp_path),
            "models": (MODEL,),
            "redis_url": f"unix://{credentials}{guarded_redis}",
        }
    )
    with TestClient(build_app(settings), raise_server_exceptions=False) as client:
        response = client.get("/v1/jobs")
        assert check_error(response, 503) == "store_unavailable"
        assert "wrong" not in response.text
        assert response.headers["Retry-After"]


def test_an_emptied_store_is_empty(guarded_redis: Path) -> None:
    url = f"unix://:{PASSWORD}@{guarded_redis}"
    store = RedisJobStore(url)
    store.create(new_job(7))
    claimed = store.claim("w", ("test",), 60)
    assert claimed is not None
    with redis.Redis.from_url(url) as client:
        client.flushall()
    assert store.list_jobs() == []
    with pytest.raises(JobNotFoundError):
        store.get("job-7")
    with pytest.raises(JobNotFoundError):
        store.heartbeat("job-7", claimed.fencing, 60)
    with pytest.raises(JobNotFoundError):
        store.request_cancel("job-7")
    assert store.claim("w", ("test",), 60) is None
    assert store.create(new_job(7))[1]
    store.close()
