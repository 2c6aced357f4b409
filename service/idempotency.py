"""Idempotency keys: the key names the resource (see docs/decisions/0003)."""

import hashlib
import json
import secrets
from typing import Any

from service.auth import Identity
from service.errors import ApiError

MAX_KEY_CHARS = 255


def resource_id(prefix: str, identity: Identity, key: str | None) -> str:
    """A random id; with an idempotency key, the same id every time for this tenant.

    Raises:
        ApiError: invalid_value, the key is empty, too long or not printable ASCII.
    """
    if key is None:
        return f"{prefix}-{secrets.token_hex(12)}"
    if not 1 <= len(key) <= MAX_KEY_CHARS or not (key.isascii() and key.isprintable()):
        raise ApiError(
            "invalid_value",
            f"Idempotency-Key must be 1 to {MAX_KEY_CHARS} printable ASCII characters",
            "Idempotency-Key",
        )
    digest = hashlib.sha256(f"{identity.tenant}\n{prefix}\n{key}".encode()).hexdigest()
    return f"{prefix}-{digest[:24]}"


def request_hash(body: Any) -> str:
    """sha256 of a JSON body, whatever the order of its keys."""
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()
