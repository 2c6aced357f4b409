"""Row 21: keys are kept as hashes, compared whole and exactly, and gone the moment they are revoked."""

import hashlib
import json
import os
import stat
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from service.app import build_app
from service.auth import KeyStore
from service.settings import Settings
from tests.security.conftest import MODEL, Guarded, Wire, check_error


def test_what_is_kept_is_a_hash_that_only_the_owner_may_read(tmp_path: Path) -> None:
    store = KeyStore(tmp_path / "keys.json")
    old_mask = os.umask(0)
    try:
        key, secret = store.create("laptop", ("inference",))
    finally:
        os.umask(old_mask)
    kept = (tmp_path / "keys.json").read_text()
    assert secret not in kept
    assert secret[12:] not in kept
    assert json.loads(kept)["keys"][0]["sha256"] == hashlib.sha256(secret.encode()).hexdigest()
    assert len(key.prefix) <= 10 < len(secret) // 3
    assert stat.S_IMODE((tmp_path / "keys.json").stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [tmp_path / "keys.json"]  # no copy is left behind
    assert store.create("other", ("inference",))[1] != secret


def test_only_the_key_itself_is_the_key(client: TestClient, guarded: Guarded) -> None:
    secret = guarded.secrets["inference"]
    for token in (
        secret.upper(), secret.lower(), secret.swapcase(), secret[:-1], secret + "a", secret[:10],
        secret.removeprefix("lathe-"), f"{secret} x", f"x {secret}", f"'{secret}'",
        hashlib.sha256(secret.encode()).hexdigest(), guarded.ids["inference"], "", "*", "null",
    ):  # fmt: skip
        response = client.get("/v1/models", headers={"authorization": f"Bearer {token}"})
        assert check_error(response, 401) == "invalid_api_key", token
    assert client.get("/v1/models", headers=guarded.headers("inference")).status_code == 200


@pytest.mark.parametrize(
    "value",
    [b"Bearer \xff\xfe", b"Bearer \xc3\xa9", b"Bearer", b"Bearer ", b"", b" ", b"Token x", b"\xf0\x9f\x98\x80"],
)  # fmt: skip
def test_tokens_of_any_bytes_are_refused_politely(wire: Wire, value: bytes) -> None:
    status, content = wire.ask("GET /v1/models", "Host: 127.0.0.1", b"Authorization: " + value)
    assert status == 401
    assert json.loads(content)["error"]["code"] == "invalid_api_key"


def test_the_scheme_has_no_case_and_one_header_counts(wire: Wire, guarded: Guarded) -> None:
    secret = guarded.secrets["inference"]
    for scheme in ("Bearer", "bearer", "BEARER"):
        line = f"Authorization: {scheme} {secret}"
        assert wire.ask("GET /v1/models", "Host: 127.0.0.1", line)[0] == 200
        for other in (line, "Authorization: Bearer x", "authorization:"):
            for pair in ((line, other), (other, line)):
                assert wire.ask("GET /v1/models", "Host: 127.0.0.1", *pair)[0] == 401


def test_rotation_and_revocation_count_at_once(
    client: TestClient, guarded: Guarded, home: Path
) -> None:
    """Made and revoked by another process' store, as `lathe keys` does; faster than a file's clock ticks."""
    command = KeyStore(guarded.settings.keys_file)
    for _ in range(20):
        key, secret = command.create("rotated", ("inference",))
        bearer = {"authorization": f"Bearer {secret}"}
        assert client.get("/v1/models", headers=bearer).status_code == 200
        command.revoke(key.id)
        assert client.get("/v1/models", headers=bearer).status_code == 401
    assert client.get("/v1/models", headers=guarded.headers("inference")).status_code == 200


def test_the_door_stays_shut_when_the_keys_are_gone(tmp_path: Path, home: Path) -> None:
    keys_file = tmp_path / "keys.json"
    settings = Settings(home=home, models=(MODEL,), api_keys_file=keys_file)
    key, secret = KeyStore(keys_file).create("only", ("admin",))
    bearer = {"authorization": f"Bearer {secret}"}
    with TestClient(build_app(settings), raise_server_exceptions=False) as client:
        assert client.get("/v1/models", headers=bearer).status_code == 200
        KeyStore(keys_file).revoke(key.id)
        assert client.get("/v1/models").status_code == 401
        for spoilt in ('{"keys": []}', None):
            keys_file.write_text(spoilt) if spoilt else keys_file.unlink()
            assert client.get("/v1/models").status_code == 401
            assert client.get("/v1/models", headers=bearer).status_code == 401
        keys_file.write_text("{")
        assert check_error(client.get("/v1/models"), 500) == "internal_error"
        KeyStore(tmp_path / "new.json").create("new", ("inference",))
        (tmp_path / "new.json").rename(keys_file)
        assert client.get("/v1/models").status_code == 401
