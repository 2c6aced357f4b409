"""Every error a client can see: one class, one table of code to status and type, one JSON shape.

The shape is OpenAI's, `{"error": {"message", "type", "param", "code"}}`, on every route and status.
"""

import math
import re
from typing import Any

from pydantic import BaseModel, Field

from engines.protocol import EngineError

MAX_MESSAGE_CHARS = 1000
"""An error body stays under 8 KiB, whatever the request held: JSON writes a control character with six."""
MAX_PARAM_CHARS = 200

_INTERNALS = re.compile(
    r"0x[0-9a-fA-F]{6,}"
    r"|/(?:home|root|usr|var|tmp|opt|etc|proc|srv|mnt|data|work|lib|run|Users)(?:/[\w.@+-]+)+/?"
    r"|[\w./-]{0,200}site-packages[\w./-]*"
    r"|Traceback[\s\S]*"
)

# code: (HTTP status, OpenAI error type, seconds for Retry-After or None)
ERRORS: dict[str, tuple[int, str, int | None]] = {
    "invalid_json": (400, "invalid_request_error", None),
    "invalid_value": (400, "invalid_request_error", None),
    "unsupported_parameter": (400, "invalid_request_error", None),
    "job_too_large": (400, "invalid_request_error", None),
    "invalid_file": (400, "invalid_request_error", None),
    "context_length_exceeded": (400, "invalid_request_error", None),
    "invalid_api_key": (401, "authentication_error", None),
    "insufficient_scope": (403, "permission_error", None),
    "host_not_allowed": (403, "permission_error", None),
    "origin_not_allowed": (403, "permission_error", None),
    "not_found": (404, "invalid_request_error", None),
    "model_not_found": (404, "invalid_request_error", None),
    "job_not_found": (404, "invalid_request_error", None),
    "batch_not_found": (404, "invalid_request_error", None),
    "file_not_found": (404, "invalid_request_error", None),
    "graph_not_found": (404, "invalid_request_error", None),
    "projector_not_found": (404, "invalid_request_error", None),
    "prompt_not_found": (404, "invalid_request_error", None),
    "artifact_not_found": (404, "invalid_request_error", None),
    "method_not_allowed": (405, "invalid_request_error", None),
    "not_acceptable": (406, "invalid_request_error", None),
    "request_timeout": (408, "invalid_request_error", None),
    "idempotency_conflict": (409, "conflict_error", None),
    "job_not_cancellable": (409, "conflict_error", None),
    "job_not_pausable": (409, "conflict_error", None),
    "job_not_ended": (409, "conflict_error", None),
    "file_in_use": (409, "conflict_error", None),
    "model_exists": (409, "conflict_error", None),
    "projector_exists": (409, "conflict_error", None),
    "model_in_use": (409, "conflict_error", None),
    "model_not_loaded": (409, "conflict_error", None),
    "model_sleeping": (409, "conflict_error", None),
    "request_too_large": (413, "invalid_request_error", None),
    "unsupported_media_type": (415, "invalid_request_error", None),
    "rate_limit_exceeded": (429, "rate_limit_error", 1),
    "job_quota_exceeded": (429, "rate_limit_error", 30),
    "insufficient_quota": (429, "insufficient_quota", None),
    "internal_error": (500, "server_error", None),
    "model_load_failed": (500, "server_error", None),
    "out_of_memory": (503, "server_error", 5),
    "server_overloaded": (503, "server_error", 1),
    "model_loading": (503, "server_error", 2),
    "engine_dead": (503, "server_error", 5),
    "draining": (503, "server_error", 5),
    "store_unavailable": (503, "server_error", 2),
    "supervisor_unavailable": (503, "server_error", 5),
    "disk_full": (507, "server_error", None),
}


class ApiError(Exception):
    """An error for the client.

    Args:
        code: a key of `ERRORS`.
        message: what, got, allowed; no path, address or traceback (they are scrubbed).
        param: dotted name of the request field at fault.
        retry_after: seconds, where they are known better than the table does.
    """

    def __init__(
        self,
        code: str,
        message: str,
        param: str | None = None,
        *,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.status, self.type, self.retry_after = ERRORS[code]
        if retry_after is not None:
            self.retry_after = max(1, math.ceil(retry_after))
        self.message = scrub(message)
        self.param = None if param is None else scrub(param)[:MAX_PARAM_CHARS]

    def body(self) -> dict[str, Any]:
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }

    def headers(self) -> dict[str, str]:
        """Clients retry 409, 429 and 5xx on their own; a conflict, a used quota or a full disk stays: they are told."""
        headers: dict[str, str] = {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(self.retry_after)
        if self.status in (409, 507) or self.code == "insufficient_quota":
            headers["x-should-retry"] = "false"
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers


def scrub(message: str) -> str:
    """Remove what describes our insides and what UTF-8 cannot carry, and cap the length."""
    message = message[: 2 * MAX_MESSAGE_CHARS]  # before the search, whose time grows with it
    message = message.encode("utf-8", "replace").decode()
    message = _INTERNALS.sub("…", message)
    if len(message) > MAX_MESSAGE_CHARS:
        message = message[:MAX_MESSAGE_CHARS] + "…"
    return message


class ErrorBody(BaseModel):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None = Field(description="Dotted name of the request field at fault.")
    code: str | None = Field(description="Stable, machine-readable.")


class ErrorResponse(BaseModel):
    error: ErrorBody


_DESCRIPTIONS = {
    400: "The request is malformed, out of range, or asks for what cannot be honoured",
    401: "No valid API key",
    403: "The key's roles do not allow this, or the Host or Origin is not served",
    404: "No such resource",
    405: "Method not allowed",
    406: "No acceptable media type",
    408: "The request took too long, or its client left",
    409: "Conflicts with the resource's state",
    413: "The body is too large",
    415: "The body has another media type",
    429: "Too many requests, or a quota is used up",
    500: "Internal error",
    503: "Cannot serve now; retry after the given time",
    507: "The disk is full; nothing was kept",
}
COMMON_STATUSES = (400, 401, 403, 404, 405, 408, 413, 415, 429, 500, 503)


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What OpenAPI says of errors: those that any route may give, and `statuses`."""
    return {
        status: {"model": ErrorResponse, "description": _DESCRIPTIONS[status]}
        for status in sorted({*COMMON_STATUSES, *statuses})
    }


_ENGINE_CODES = {
    "queue_full": "server_overloaded",
    "sleeping": "model_sleeping",
}


def store_unavailable() -> ApiError:
    return ApiError("store_unavailable", "a store does not answer")


def from_engine_error(error: EngineError) -> ApiError:
    """How a client sees what an engine refused or lost."""
    return ApiError(_ENGINE_CODES.get(error.code, error.code), error.message, error.param)
