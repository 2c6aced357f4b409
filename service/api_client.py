"""How the `lathe` command and the examples talk to a running service. Errors become one line for a person."""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

import httpx

DEFAULT_URL = "http://127.0.0.1:8000"
CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 600.0
TERMINAL_STATUSES = ("succeeded", "failed", "cancelled")
RECONNECT_SECONDS = 0.5
RECONNECT_FOR_SECONDS = 120.0
"""A service that restarts is waited for, by who has begun to follow a job."""


class ServiceError(Exception):
    """The service refused, or cannot be reached; the message is one line.

    Attributes:
        status: HTTP status; None where there was no answer.
        code: of the error object; None where there was none.
    """

    def __init__(self, message: str, status: int | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerEvent:
    """One server-sent event; `data` as sent."""

    data: str
    id: str | None = None


class ApiClient:
    """A connection to one service. Use as a context manager.

    Args:
        transport: for tests.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        api_key: str | None = None,
        *,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.Client(
            base_url=self.url,
            headers=headers,
            timeout=httpx.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS),
            transport=transport,
            trust_env=False,  # a proxy for the internet is none for this machine's own service
        )

    def __enter__(self) -> "ApiClient":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._http.close()

    def get(self, path: str, **params: str | int) -> Any:
        return self._send("GET", path, params=params).json()

    def get_text(self, path: str, **params: str | int) -> str:
        return self._send("GET", path, params=params).text

    def get_bytes(self, path: str) -> bytes:
        return self._send("GET", path).content

    def post(self, path: str, body: Any = None, *, idempotency_key: str | None = None) -> Any:
        headers = {"Idempotency-Key": idempotency_key} if idempotency_key else {}
        return self._send(
            "POST", path, json=body if body is not None else {}, headers=headers
        ).json()

    def upload(self, path: str, name: str, file: IO[bytes], fields: Mapping[str, str]) -> Any:
        """POST a file as part `file` of a form; it is read as it is sent."""
        return self._send("POST", path, files={"file": (name, file)}, data=fields).json()

    def delete(self, path: str) -> Any:
        return self._send("DELETE", path).json()

    def stream(self, path: str, body: Any) -> Iterator[Any]:
        """POST a streamed request; yields the JSON of each event until `[DONE]`."""
        with self._translated(), self._http.stream("POST", path, json=body) as response:
            _check(response)
            for event in read_events(response.iter_lines()):
                if event.data == "[DONE]":
                    return
                chunk = json.loads(event.data)
                if "error" in chunk:
                    raise ServiceError(_message(chunk["error"]), code=chunk["error"].get("code"))
                yield chunk

    def follow_job(self, job_id: str) -> Iterator[dict[str, Any]]:
        """Events of a job until it ends; gone on with where the connection breaks or the service restarts."""
        last_id: str | None = None
        lost_at: float | None = None
        while True:
            headers = {"Accept": "text/event-stream", "Last-Event-ID": last_id or "0"}
            try:
                path = f"/v1/jobs/{job_id}/events"
                with (
                    self._translated(),
                    self._http.stream("GET", path, headers=headers) as response,
                ):
                    _check(response)
                    for event in read_events(response.iter_lines()):
                        data = json.loads(event.data)
                        if "error" in data:  # the stream's; the job's own is in an event's data
                            raise ServiceError(_message(data["error"]), 503)
                        last_id, lost_at = event.id or last_id, None
                        yield data
                if self.get(f"/v1/jobs/{job_id}")["status"] in TERMINAL_STATUSES:
                    return
            except ServiceError as error:
                now = time.monotonic()
                lost_at = lost_at or now
                told = error.status not in (None, 503)
                if told or last_id is None or now - lost_at > RECONNECT_FOR_SECONDS:
                    raise
            time.sleep(RECONNECT_SECONDS)

    def _send(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        with self._translated():
            response = self._http.request(method, path, **arguments)
            _check(response)
            return response

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except httpx.ConnectError as error:
            raise ServiceError(
                f"nothing answers at {self.url}: start the service with `lathe up`, or name another with --url"
            ) from error
        except httpx.TransportError as error:
            raise ServiceError(f"{self.url}: {type(error).__name__} {error}".strip()) from error


def read_events(lines: Iterator[str]) -> Iterator[ServerEvent]:
    """Parse server-sent events; comments (keep-alives) are skipped."""
    data: list[str] = []
    event_id: str | None = None
    for line in lines:
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if not line:
            if data:
                yield ServerEvent(data="\n".join(data), id=event_id)
            data, event_id = [], None
        elif field == "data":
            data.append(value)
        elif field == "id":
            event_id = value


def _check(response: httpx.Response) -> None:
    """Raises: ServiceError: with the message of the error object."""
    if response.is_success:
        return
    response.read()
    try:
        error = response.json()["error"]
    except (ValueError, KeyError, TypeError):
        raise ServiceError(
            f"unexpected answer {response.status_code}; is this a Lathe service?",
            response.status_code,
        ) from None
    raise ServiceError(_message(error), response.status_code, error.get("code"))


def _message(error: Mapping[str, Any]) -> str:
    param = f" (parameter {error['param']})" if error.get("param") else ""
    return f"{error['message']}{param} [{error['code']}]"
