"""Idempotency keys: the key names the resource (see docs/decisions/0003)."""

import hashlib
import json
import secrets
from typing import Any

from service.auth import Identity


def resource_id(prefix: str, identity: Identity, key: str | None) -> str:
    """A random id; with an idempotency key, the same id every time for this tenant."""
    if key is None:
        return f"{prefix}-{secrets.token_hex(12)}"
    digest = hashlib.sha256(f"{identity.tenant}\n{prefix}\n{key}".encode()).hexdigest()
    return f"{prefix}-{digest[:24]}"


def request_hash(body: Any) -> str:
    """sha256 of a JSON body, whatever the order of its keys."""
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()
