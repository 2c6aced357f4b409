"""Log lines and spans name what caused them, across threads, processes and the engine's socket."""

import io
import json
import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest

from engines import tracing
from engines.logs import JsonFormatter
from engines.origin import Origin, caused_by, current_origin, parse_traceparent
from tests.conftest import REPOSITORY

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    logger = logging.getLogger("lathe.test")
    logger.addHandler(handler)
    logger.setLevel("INFO")
    yield stream
    logger.removeHandler(handler)


def test_a_line_names_request_job_and_trace(log: io.StringIO) -> None:
    logger = logging.getLogger("lathe.test")
    with caused_by(Origin(request_id="r", job_id="j", traceparent=TRACEPARENT)):
        logger.info("a\nb", extra={"count": 2})
        with caused_by(Origin(request_id="inner")):
            logger.info("inside")
    logger.info("outside")
    first, inside, outside = map(json.loads, log.getvalue().splitlines())
    assert first.pop("time").endswith("+00:00")
    assert first == {
        "level": "info",
        "logger": "lathe.test",
        "message": "a\nb",
        "request_id": "r",
        "job_id": "j",
        "trace_id": TRACE,
        "count": 2,
    }
    assert inside["request_id"] == "inner"
    assert not {"job_id", "trace_id"} & inside.keys()
    assert not {"request_id", "job_id", "trace_id"} & outside.keys()


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (TRACEPARENT, TRACEPARENT),
        (f"01-{TRACE}-{PARENT}-00-more", f"01-{TRACE}-{PARENT}-00"),  # of a later version
        (f"00-{TRACE}-{PARENT}-01-more", None),
        (f"ff-{TRACE}-{PARENT}-01", None),
        (f"00-{'0' * 32}-{PARENT}-01", None),
        (f"00-{TRACE}-{'0' * 16}-01", None),
        (TRACEPARENT.upper(), None),
        (TRACEPARENT + "\n", None),
        (f"01-{TRACE}-{PARENT}-01-{'a' * 600}", None),
        ("", None),
    ],
)
def test_traceparent(header: str, expected: str | None) -> None:
    assert parse_traceparent(header) == expected


def test_without_an_endpoint_nothing_is_traced_or_imported() -> None:
    code = (
        "import sys, tempfile, pathlib\n"
        "from engines.tracing import is_tracing, record_span, set_up_tracing, span\n"
        "from service.app import build_app\n"
        "from service.settings import Settings\n"
        "build_app(Settings(home=pathlib.Path(tempfile.mkdtemp())))\n"
        "set_up_tracing('api', None)\n"
        "with span('a') as traced:\n"
        "    traced.rename('b')\n"
        "    traced.describe({'c': 1})\n"
        "    traced.fail('d')\n"
        "    record_span('e', 0.0, 1.0)\n"
        "assert not is_tracing()\n"
        "ours = ('opentelemetry.sdk.trace', 'opentelemetry.exporter')\n"
        "assert not [name for name in sys.modules if name.startswith(ours)]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY, timeout=60)


def test_an_endpoint_without_the_packages_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.resources", None)
    with pytest.raises(tracing.TracingUnavailableError, match=r"lathe\[otel\]"):
        tracing.set_up_tracing("api", "http://127.0.0.1:1")
    assert not tracing.is_tracing()


def test_without_tracing_the_caller_s_trace_is_passed_on() -> None:
    with caused_by(Origin(traceparent=TRACEPARENT)), tracing.span("a"):
        assert current_origin().traceparent == TRACEPARENT
