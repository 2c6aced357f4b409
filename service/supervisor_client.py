"""How to ask the supervisor: one JSON line each way over its Unix socket, one connection per question.

Request `{"op": "status" | "load" | "unload" | "restart", "model": id}`; answer `{"ok": true, ...}` or
`{"ok": false, "code": ..., "message": ...}` with a code of `service/errors.py`. The supervisor itself uses the
message classes of this module, so both ends agree by construction.
"""

import asyncio
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

EngineState = Literal["importing", "starting", "ready", "backoff", "failed", "stopping"]

MAX_LINE_BYTES = 2**20


class SupervisorUnavailableError(Exception):
    """No supervisor answers on the socket: none runs, or the processes were started by hand."""


class SupervisorRefusedError(Exception):
    """The supervisor answered "no".

    Attributes:
        code: a key of `service.errors.ERRORS`: "model_not_found", "model_not_loaded", "model_in_use", "draining" or
            "invalid_value".
        message: safe to show to a client.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineProcess:
    """One engine host as the supervisor sees it.

    Attributes:
        state: "importing" waits for its checkpoint to be converted; "starting" loads; "backoff" crashed and waits
            for its next start; "failed" crashed too often and stays down until it is loaded again.
        pid: None unless a process runs.
        restarts: automatic restarts since the last explicit load.
        error: last line of what the last crash said; None before any.
        since: Unix seconds at which `state` was entered.
    """

    model: str
    state: EngineState
    pid: int | None = None
    restarts: int = 0
    error: str | None = None
    since: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisorStatus:
    """Attributes: engines: by model id; a model that is not loaded is not in it."""

    pid: int
    engines: dict[str, EngineProcess]
    api_pid: int | None = None
    worker_pid: int | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, body: dict[str, Any]) -> "SupervisorStatus":
        engines = {model: EngineProcess(**fields) for model, fields in body["engines"].items()}
        return cls(
            pid=body["pid"],
            engines=engines,
            api_pid=body["api_pid"],
            worker_pid=body["worker_pid"],
        )


class SupervisorClient:
    """Asks the supervisor of one `LATHE_HOME`. Stateless; any number may be used at once.

    Every method raises `SupervisorUnavailableError` where no supervisor answers in time, and
    `SupervisorRefusedError` where it says no.

    Args:
        socket: `settings.supervisor_socket`.
        timeout_seconds: for an answer to `status` and `load`, which come at once.
        unload_timeout_seconds: for an answer to `unload` and `restart`, which comes when the process is gone.
    """

    def __init__(
        self,
        socket: Path,
        *,
        timeout_seconds: float = 5.0,
        unload_timeout_seconds: float = 60.0,
    ) -> None:
        self._socket = socket
        self._timeout_seconds = timeout_seconds
        self._unload_timeout_seconds = unload_timeout_seconds

    async def status(self) -> SupervisorStatus:
        answer = await self._ask({"op": "status"}, self._timeout_seconds)
        return SupervisorStatus.from_json(answer["status"])

    async def load(self, model: str) -> EngineProcess:
        """Start a host for the model; returns at once, mostly in state "starting": poll `status`.

        A model that is loaded already is left as it is; one in "backoff" or "failed" is started now.
        Refused with "model_not_found" where `LATHE_HOME` has no such checkpoint.
        """
        answer = await self._ask({"op": "load", "model": model}, self._timeout_seconds)
        return EngineProcess(**answer["engine"])

    async def unload(self, model: str) -> None:
        """End the model's host; returns when its process is gone. Refused with "model_not_loaded"."""
        await self._ask({"op": "unload", "model": model}, self._unload_timeout_seconds)

    async def restart(self, model: str) -> EngineProcess:
        """End the model's host, which lets running requests end, and start another.

        Refused with "model_not_loaded", and with "model_in_use" while it is being unloaded or restarted.
        """
        answer = await self._ask({"op": "restart", "model": model}, self._unload_timeout_seconds)
        return EngineProcess(**answer["engine"])

    async def _ask(self, request: dict[str, str], timeout_seconds: float) -> dict[str, Any]:
        try:
            async with asyncio.timeout(timeout_seconds):
                line = await self._exchange(request)
        except (OSError, TimeoutError, ValueError) as error:
            raise SupervisorUnavailableError(
                f"the supervisor does not answer ({type(error).__name__}); start it with `lathe up`"
            ) from error
        if not line.endswith(b"\n"):
            raise SupervisorUnavailableError("the supervisor closed the connection; it is stopping")
        answer: dict[str, Any] = json.loads(line)
        if not answer["ok"]:
            raise SupervisorRefusedError(answer["code"], answer["message"])
        return answer

    async def _exchange(self, request: dict[str, str]) -> bytes:
        reader, writer = await asyncio.open_unix_connection(self._socket, limit=MAX_LINE_BYTES)
        try:
            writer.write(json.dumps(request).encode() + b"\n")
            await writer.drain()
            return await reader.readline()
        finally:
            writer.close()
            await asyncio.gather(writer.wait_closed(), return_exceptions=True)
