"""Row 18: a secret that the service is given comes out nowhere: answers, errors, logs, metrics, settings, job store."""

import logging
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from engines.logs import JsonFormatter
from service.app import build_app
from service.settings import Settings
from tests.security.conftest import MODEL, Guarded, check_error, make_home
from tests.security.test_row07_unauthenticated_management import ask, operations

CANARY = "canary-7f3a-secret"


class Everything(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.setFormatter(JsonFormatter())
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text += self.format(record) + "\n"


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> Everything:
    """All that any logger says at any level."""
    handler = Everything()
    monkeypatch.setattr(logging.getLogger(), "level", logging.DEBUG)
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    return handler


def test_no_answer_or_log_repeats_a_key(
    client: TestClient, guarded: Guarded, logged: Everything
) -> None:
    app = client.app
    told = ""
    for role in ("inference", "jobs", "admin"):
        for method, path in operations(app):  # type: ignore[arg-type]
            headers = guarded.headers(role)
            told += ask(client, method, path, headers).text
            spoilt = {"authorization": headers["authorization"] + CANARY}
            told += ask(client, method, path, spoilt).text
    told += client.get("/metrics").text + client.get("/ready").text
    assert '"message": "request"' in logged.text
    for secret in (*guarded.secrets.values(), CANARY):
        assert secret not in told
        assert secret not in logged.text
    assert guarded.secrets["admin"] not in repr(guarded.settings)


def test_a_stores_password_comes_out_nowhere(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody listens there, so every use of it is an error that is logged."""
    pytest.importorskip("redis")
    capsys.readouterr()
    url = f"redis://user:{CANARY}@127.0.0.1:1/0"
    home = make_home(tiny_llama, tmp_path)
    settings = Settings.model_validate(
        {"home": home, "models": (MODEL,), "redis_url": url, "requests_per_minute": 5}
    )
    for shown in (
        repr(settings),
        str(settings),
        settings.model_dump_json(),
        str(settings.redis_url),
    ):
        assert CANARY not in shown
    told = ""
    with TestClient(build_app(settings), raise_server_exceptions=False) as client:
        for method, path in (
            ("GET", "/v1/jobs"),
            ("GET", "/v1/jobs/x"),
            ("GET", "/ready"),
            ("GET", "/metrics"),
        ):
            told += client.request(method, path).text
        response = client.post("/v1/completions", json={"model": MODEL, "prompt": "a"})
        assert check_error(response, 503) == "store_unavailable"
        assert client.get("/health").status_code == 200
    assert "store_unavailable" in told
    logged = capsys.readouterr()
    assert "a store does not answer" in logged.err
    assert CANARY not in told + logged.out + logged.err


def test_the_settings_errors_do_not_quote_them() -> None:
    with pytest.raises(ValueError, match="home") as refused:
        Settings.model_validate({"redis_url": f"redis://:{CANARY}@x", "home": 3, "port": 1})
    assert CANARY not in str(refused.value)
