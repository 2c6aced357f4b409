"""API keys: made by `lathe keys`, stored as hashes, compared in constant time.

Roles are `inference` (generation, embeddings, enrichment, graphs), `jobs` (compression and other jobs) and `admin`
(everything, and loading models). A role implies no other but admin, which implies all. The file is read again whenever
it changes, so a revocation takes effect at once.
"""

import hashlib
import hmac
import ipaddress
import json
import os
import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from service.errors import ApiError

Role = Literal["inference", "jobs", "admin"]
ROLES: tuple[Role, ...] = ("inference", "jobs", "admin")
Limit = Literal[
    "requests_per_minute",
    "tokens_per_minute",
    "max_open_requests",
    "job_seconds_per_day",
    "max_disk_bytes",
]
"""What a key may have of its own; named as the setting that holds for the others."""
LIMITS: tuple[Limit, ...] = get_args(Limit)


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """A key as stored; the key itself is shown once, when it is made.

    Attributes:
        sha256: of the key; 256 random bits need no slow hash.
        prefix: first characters, to recognise it by.
        requests_per_minute and all below it: see `Limit`; 0 is no limit, None the server's.
    """

    id: str
    name: str
    prefix: str
    sha256: str
    roles: tuple[Role, ...]
    created_at: float
    revoked_at: float | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_open_requests: int | None = None
    job_seconds_per_day: int | None = None
    max_disk_bytes: int | None = None

    def limit(self, name: Limit) -> int | None:
        value: int | None = getattr(self, name)
        return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Who asks.

    Attributes:
        key_id: "local" where no keys are set up.
        tenant: owner of what is created, and salt of every shared cache.
    """

    key_id: str
    roles: frozenset[Role]

    @property
    def tenant(self) -> str:
        return self.key_id

    @property
    def is_admin(self) -> bool:
        return "admin" in self.roles

    @property
    def sees(self) -> str | None:
        """Whose jobs and files it may see; None is everybody's."""
        return None if self.is_admin else self.tenant

    def may(self, role: Role) -> bool:
        return role in self.roles or self.is_admin


LOCAL_IDENTITY = Identity(key_id="local", roles=frozenset(ROLES))


class PublicBindError(Exception):
    """A public address was to be served without a key."""


class KeyStore:
    """Keys of one file. Not the hot path's bottleneck: the file is read when it is another one or was written to."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: tuple[int, ...] | None = None
        self._keys: tuple[ApiKey, ...] = ()
        self._had_keys = False

    def list_keys(self) -> tuple[ApiKey, ...]:
        """All keys, revoked ones included."""
        try:
            status = self._path.stat()
        except FileNotFoundError:
            self._stamp, self._keys = None, ()
            return ()
        # `_write` makes a new file: its number changes even where the clock has not ticked
        stamp = (status.st_mtime_ns, status.st_ino, status.st_size)
        if stamp != self._stamp:
            rows = json.loads(self._path.read_text())["keys"]
            self._keys = tuple(ApiKey(**{**row, "roles": tuple(row["roles"])}) for row in rows)
            self._stamp = stamp
        return self._keys

    @property
    def has_keys(self) -> bool:
        """Whether keys are required. Neither revoking the last key nor losing the file opens the door."""
        self._had_keys = bool(self.list_keys()) or self._had_keys
        return self._had_keys

    def find(self, key_id: str) -> ApiKey | None:
        return next((key for key in self.list_keys() if key.id == key_id), None)

    def create(
        self, name: str, roles: tuple[Role, ...], limits: Mapping[Limit, int | None] | None = None
    ) -> tuple[ApiKey, str]:
        """A new key: how it is stored, and the secret itself."""
        secret = f"lathe-{secrets.token_urlsafe(32)}"
        key = ApiKey(
            id=f"key-{secrets.token_hex(6)}",
            name=name,
            prefix=secret[:10],
            sha256=hashlib.sha256(secret.encode()).hexdigest(),
            roles=roles,
            created_at=time.time(),
            **(limits or {}),  # type: ignore[arg-type]
        )
        self._write((*self.list_keys(), key))
        return key, secret

    def revoke(self, key_id: str) -> ApiKey:
        """Raises: KeyError: no such key."""
        keys = {key.id: key for key in self.list_keys()}
        keys[key_id] = replace(keys[key_id], revoked_at=time.time())
        self._write(tuple(keys.values()))
        return keys[key_id]

    def identify(self, secret: bytes) -> Identity | None:
        """The identity of a key; None if unknown or revoked. Every key is compared, whatever matches."""
        digest = hashlib.sha256(secret).hexdigest()
        found: Identity | None = None
        for key in self.list_keys():
            if hmac.compare_digest(digest, key.sha256) and key.revoked_at is None:
                found = Identity(key_id=key.id, roles=frozenset(key.roles))
        return found

    def _write(self, keys: tuple[ApiKey, ...]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_suffix(".tmp")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            json.dump({"keys": [asdict(key) for key in keys]}, file, indent=1)
        temporary.replace(self._path)
        self._stamp = None


def authenticate(keys: KeyStore, headers: list[tuple[bytes, bytes]]) -> Identity:
    """Whose request this is; anybody's is `LOCAL_IDENTITY`'s where there are no keys.

    Raises:
        ApiError: invalid_api_key.
    """
    if not keys.has_keys:
        return LOCAL_IDENTITY
    token = bearer_token(headers)
    if token is None:
        raise ApiError("invalid_api_key", "an API key is needed: Authorization: Bearer …")
    identity = keys.identify(token) if token else None
    if identity is None:
        raise ApiError("invalid_api_key", "this API key is unknown or revoked")
    return identity


def bearer_token(headers: list[tuple[bytes, bytes]]) -> bytes | None:
    """The token of the one `Authorization: Bearer` header; b"" where there is a header but no single valid token."""
    values = [value for name, value in headers if name == b"authorization"]
    if not values:
        return None
    scheme, _, token = values[0].partition(b" ")
    if len(values) > 1 or scheme.lower() != b"bearer":
        return b""
    return token.strip()


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_bind(host: str, keys: KeyStore) -> str | None:
    """Refuse to serve a public address without a key.

    Returns:
        A line to show where no key is needed, None otherwise.

    Raises:
        PublicBindError
    """
    if keys.has_keys:
        return None
    if not is_loopback(host):
        raise PublicBindError(
            f"refusing to serve {host} without an API key; create one with: lathe keys create --role admin"
        )
    return (
        "no API keys: every local process may do everything (create one with `lathe keys create`)"
    )
