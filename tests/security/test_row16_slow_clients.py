"""Row 16: a body that does not arrive is given up. What a reader that leaves or stalls frees: tests/service."""

import json
import socket
from pathlib import Path

import pytest

from service.settings import Settings
from tests.security.conftest import MODEL, Wire, make_home


@pytest.mark.parametrize("framing", ["Content-Length: 100", "Transfer-Encoding: chunked"])
def test_a_body_that_stops_is_given_up(tiny_llama: Path, tmp_path: Path, framing: str) -> None:
    from service.app import build_app

    home = make_home(tiny_llama, tmp_path)
    wire = Wire(build_app(Settings(home=home, models=(MODEL,), request_timeout_seconds=0.2)))
    wire.start()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n{framing}\r\n"
    with socket.create_connection(("127.0.0.1", wire.port), timeout=30) as connection:
        connection.sendall((head + "Content-Type: application/json\r\n\r\n").encode())
        connection.sendall(b"1\r\n{\r\n" if "chunked" in framing else b"{")
        answer = connection.recv(65536)  # not one byte more is sent
    wire.stop()
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "request_timeout"
