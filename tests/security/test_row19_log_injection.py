"""Row 19: whatever a request holds, a log line is one JSON object that says what happened, and nothing of the text."""

import json
import logging
from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient

from engines.logs import JsonFormatter
from tests.security.conftest import MODEL, Guarded

HOSTILE = 'x\r\n{"level":"error"}\n\x1b[31mred\x1b[0m\u2028\u2029\x00\x7f\u202e'


class Lines(logging.Handler):
    """What stderr would get."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(JsonFormatter())
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


@pytest.fixture
def lines() -> Iterator[list[str]]:
    handler = Lines()
    logging.getLogger("lathe").addHandler(handler)
    yield handler.lines
    logging.getLogger("lathe").removeHandler(handler)


def check_lines(lines: list[str]) -> list[dict[str, object]]:
    assert lines
    for line in lines:
        assert line.isascii()
        assert line.isprintable()
        assert "red" not in line
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("abc-1._X", True), ("a" * 128, True), ("a" * 129, False), ("", False), ("a b", False),
        ("a\tb", False), ("a{}", False), ("a\"", False), ("%0d%0a", False),
    ],
)  # fmt: skip
def test_a_request_id_is_taken_over_only_if_it_is_plain(
    client: TestClient, given: str, kept: bool
) -> None:
    answered = client.get("/health", headers={"x-request-id": given}).headers["x-request-id"]
    assert (answered == given) is kept
    assert kept or answered.startswith("req-")


@pytest.mark.parametrize("given", [b"a\xc3\xa9", b"\xff", b"a\x1b[31m", b"a\x85b"])
def test_bytes_that_are_no_text_do_not_come_back(client: TestClient, given: bytes) -> None:
    response = client.get("/health", headers=[(b"x-request-id", given)])
    assert response.headers["x-request-id"].startswith("req-")


def test_no_field_of_a_request_forges_a_line(
    client: TestClient, guarded: Guarded, lines: list[str]
) -> None:
    everything = {
        "model": HOSTILE, "prompt": HOSTILE, "user": HOSTILE, "stop": HOSTILE,
        "metadata": {HOSTILE: HOSTILE}, HOSTILE: HOSTILE,
    }  # fmt: skip
    bearer = guarded.headers("admin")
    for body in (
        everything,
        {"model": HOSTILE, "prompt": "a"},
        {"model": MODEL, "prompt": HOSTILE},
    ):
        client.post("/v1/completions", json=body, headers=bearer)
    client.post("/v1/jobs", json={"type": HOSTILE, "model": HOSTILE}, headers=bearer)
    client.post("/v1/models/%0d%0a%1b[31mred/load", headers=bearer)
    client.get("/v1/jobs/%0d%0a%1b[31mred", headers=bearer)
    client.get("/%0d%0a%1b[31mred?red=%0d%0a", headers=bearer | {"user-agent": "red"})
    client.get("/v1/models", headers={"authorization": "Bearer red"})
    rows = check_lines(lines)
    assert [row["message"] for row in rows if row["logger"] == "lathe.http"] == ["request"] * 8
    assert rows[0]["key_id"] == guarded.ids["admin"]


def test_an_exceptions_own_text_stays_one_line() -> None:
    try:
        raise ValueError(HOSTILE)
    except ValueError as error:
        record = logging.LogRecord("lathe", 40, "f", 1, HOSTILE, None, (ValueError, error, None))
    record.model = HOSTILE
    line = JsonFormatter().format(record)
    assert line.isascii()
    assert line.isprintable()
    assert json.loads(line)["model"] == HOSTILE
