"""Which engine serves which model: connections to the hosts, their newest statistics, and whether they really work.

Connections are made on demand and dropped when a host dies. A poll every two seconds reads statistics,
connects to hosts that
have come up, and sends an idle engine a canary now and then: readiness means that tokens come out, not that a
process exists.
"""

import asyncio
import contextlib
import logging
import math
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Literal

from compression.registry import ModelEntry, ModelNotFoundError, ModelRegistry
from engines.client import EngineClient
from engines.metering import DeviceClock, EngineUse, MeteredEngine
from engines.protocol import (
    AsyncEngine,
    EmbedRequest,
    EngineError,
    EngineInfo,
    EngineStats,
    GenerateRequest,
    SamplingParams,
)
from service.drain import draining
from service.errors import ApiError
from service.settings import Settings
from service.supervisor_client import (
    EngineProcess,
    SupervisorClient,
    SupervisorRefusedError,
    SupervisorUnavailableError,
)

POLL_SECONDS = 2.0
CANARY_IDLE_SECONDS = 60.0
CANARY_TIMEOUT_SECONDS = 20.0
FRESH_SECONDS = 120.0
LOAD_WAIT_SECONDS = 120.0
"""How long a request waits for a model that is loaded because of it."""
LOAD_AGAIN_SECONDS = 60.0
"""For how long nobody's request loads a model that did not load for the last one."""

logger = logging.getLogger("lathe.engines")
ModelState = Literal[
    "unloaded",
    "importing",
    "starting",
    "ready",
    "sleeping",
    "backoff",
    "failed",
    "stopping",
    "dead",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStatus:
    """Attributes: ready: a token or vector came out of it in the last two minutes."""

    model: str
    state: ModelState
    ready: bool
    restarts: int = 0
    error: str | None = None
    info: EngineInfo | None = None


@dataclass(slots=True)
class _Loaded:
    client: AsyncEngine
    stats: EngineStats | None = None
    proved_at: float | None = None
    clock: DeviceClock = field(default_factory=DeviceClock)


class EnginePool:
    """The engines that this process can reach. Belongs to one event loop.

    Args:
        meter: told what engines do for whom.
        prepare: what a model needs here before its first request; awaited before it counts as loaded.
    """

    def __init__(
        self,
        settings: Settings,
        registry: ModelRegistry,
        supervisor: SupervisorClient,
        meter: Callable[[EngineUse], None] | None = None,
        prepare: Callable[[ModelEntry], Awaitable[object]] | None = None,
    ) -> None:
        self._settings = settings
        self._meter = meter
        self._prepare = prepare
        self._registry = registry
        self._supervisor = supervisor
        self._loaded: dict[str, _Loaded] = {}
        self._processes: dict[str, EngineProcess] = {}
        self._supervised = False
        self._drained = False
        self._connecting: dict[str, asyncio.Lock] = {}
        self._loads: dict[str, asyncio.Task[None]] = {}
        self._failed_loads: dict[str, tuple[float, str]] = {}
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._task = asyncio.create_task(self._poll_for_ever(), name="engine-pool")

    async def drain(self) -> None:
        """End every call with "draining", and refuse further ones."""
        self._drained = True
        await self._close_clients(EngineError("draining", "the service is stopping"))

    async def aclose(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        await self._close_clients(None)
        self._loaded.clear()

    async def _close_clients(self, error: EngineError | None) -> None:
        for loaded in list(self._loaded.values()):
            if isinstance(loaded.client, EngineClient):
                await loaded.client.aclose(error)

    def entry(self, model_id: str) -> ModelEntry:
        """Raises: ApiError: model_not_found."""
        try:
            return self._registry.get(model_id)
        except ModelNotFoundError:
            raise ApiError(
                "model_not_found", f"the model {model_id[:100]!r} does not exist", "model"
            ) from None

    async def get(self, model_id: str, *, load: bool = True) -> AsyncEngine:
        """The engine that serves a model.

        Args:
            load: have a model loaded that is not, if few enough are.

        Raises:
            ApiError: model_not_found, model_not_loaded, model_loading, engine_dead, draining.
        """
        if self._drained:
            raise draining()
        self.entry(model_id)
        loaded = self._alive(model_id)
        if loaded is None:
            loaded = await self._connect(model_id)
        if loaded is None:
            await self._refresh_processes()
            if load:
                await self._load_on_request(model_id)
            loaded = await self._connect(model_id)
        if loaded is None:
            raise self._why_not(model_id)
        if self._meter is None:
            return loaded.client
        return MeteredEngine(loaded.client, model_id, self._meter, loaded.clock)

    async def _load_on_request(self, model_id: str) -> None:
        """Have a model loaded that nobody loaded yet, and wait for it together with all who ask for it meanwhile.

        Raises:
            ApiError: model_load_failed, model_loading.
        """
        failed_at, message = self._failed_loads.get(model_id, (-math.inf, ""))
        if time.monotonic() - failed_at < LOAD_AGAIN_SECONDS:
            raise ApiError("model_load_failed", message)
        if model_id not in self._loads:
            limit = self._settings.max_loaded_models
            if not self._supervised or model_id in self._processes or len(self._processes) >= limit:
                return
            self._loads[model_id] = asyncio.create_task(self._load_and_wait(model_id))
        await asyncio.shield(self._loads[model_id])

    async def _load_and_wait(self, model_id: str) -> None:
        try:
            await self.load(model_id)
            await self.wait_loaded(model_id, LOAD_WAIT_SECONDS)
        except ApiError as error:
            if error.code == "model_load_failed":  # left as it is, it would keep `/ready` red
                self._failed_loads[model_id] = time.monotonic(), error.message
                with contextlib.suppress(ApiError):
                    await self.unload(model_id)
            raise
        finally:
            del self._loads[model_id]

    def add(self, model_id: str, engine: AsyncEngine) -> None:
        """Serve a model by an engine in this process."""
        self._loaded[model_id] = _Loaded(engine, proved_at=time.monotonic())

    def _alive(self, model_id: str) -> _Loaded | None:
        loaded = self._loaded.get(model_id)
        if loaded is not None and getattr(loaded.client, "is_dead", False):
            del self._loaded[model_id]
            return None
        return loaded

    async def _connect(self, model_id: str) -> _Loaded | None:
        path = self._settings.engine_socket(model_id)
        async with self._connecting.setdefault(model_id, asyncio.Lock()):
            loaded = self._alive(model_id)
            if loaded is not None or not path.exists():
                return loaded
            if self._prepare is not None:
                with contextlib.suppress(ApiError):  # a request that needs it is told
                    await self._prepare(self.entry(model_id))
            try:
                client = await EngineClient.connect(path)
            except EngineError:
                return None
            self._loaded[model_id] = _Loaded(client)
            return self._loaded[model_id]

    def _why_not(self, model_id: str) -> ApiError:
        process = self._processes.get(model_id)
        if process is None:
            why = f"model {model_id!r} is not loaded"
            if self._supervised:
                why += f", and {len(self._processes)} are: unload one, or raise LATHE_MAX_LOADED_MODELS"
            return ApiError("model_not_loaded", why, "model")
        if process.state in ("importing", "starting", "ready"):
            return ApiError("model_loading", f"model {model_id!r} is being loaded", "model")
        return ApiError("engine_dead", f"the engine of {model_id!r} is {process.state}", "model")

    async def load(self, model_id: str) -> EngineStatus:
        """Ask the supervisor to start a host; returns at once.

        Raises:
            ApiError: model_not_found, supervisor_unavailable.
        """
        self.entry(model_id)
        if self._alive(model_id) is None:
            await self._ask_supervisor(self._supervisor.load(model_id))
            await self._refresh_processes()
        return (await self.status())[model_id]

    async def wait_loaded(self, model_id: str, timeout_seconds: float) -> EngineStatus:
        """Wait until a model that is being loaded serves.

        Raises:
            ApiError: model_load_failed, its host ended before it served; model_loading, it takes longer.
        """
        deadline = time.monotonic() + timeout_seconds
        while time.monotonic() < deadline:
            if self._alive(model_id) or await self._connect(model_id):
                return (await self.status())[model_id]
            await self._refresh_processes()
            process = self._processes.get(model_id)
            if process is not None and process.state in ("backoff", "failed"):
                raise ApiError("model_load_failed", f"model {model_id!r}: {process.error}")
            await asyncio.sleep(0.1)
        raise ApiError("model_loading", f"model {model_id!r} is still being loaded")

    async def unload(self, model_id: str) -> None:
        """End a model's host; its memory is free when this returns.

        Raises:
            ApiError: model_not_found, model_not_loaded, supervisor_unavailable.
        """
        self.entry(model_id)
        await self._ask_supervisor(self._supervisor.unload(model_id))
        await self._forget(model_id)
        await self._refresh_processes()

    async def restart(self, model_id: str) -> EngineStatus:
        """End a model's host once what runs on it has ended, and start another; returns when that loads.

        Raises:
            ApiError: model_not_found, model_not_loaded, model_in_use, supervisor_unavailable.
        """
        self.entry(model_id)
        await self._ask_supervisor(self._supervisor.restart(model_id))
        await self._forget(model_id)
        return (await self.status())[model_id]

    async def _forget(self, model_id: str) -> None:
        """Drop the connection to a host that has ended."""
        loaded = self._loaded.pop(model_id, None)
        if loaded is not None and isinstance(loaded.client, EngineClient):
            await loaded.client.aclose()

    async def _ask_supervisor(self, question: object) -> None:
        try:
            await question  # type: ignore[misc]
        except SupervisorUnavailableError as error:
            raise ApiError("supervisor_unavailable", str(error)) from error
        except SupervisorRefusedError as error:
            raise ApiError(error.code, error.message, "model") from error

    async def status(self) -> dict[str, EngineStatus]:
        """Every registered model."""
        await self._refresh_processes()
        names = {entry.id for entry in self._registry.list_models()} | self._processes.keys()
        return {name: self._status_of(name) for name in sorted(names)}

    def _status_of(self, model_id: str) -> EngineStatus:
        process = self._processes.get(model_id)
        loaded = self._alive(model_id)
        restarts = process.restarts if process else 0
        if loaded is not None:
            asleep = loaded.stats is not None and loaded.stats.sleeping
            return EngineStatus(
                model=model_id,
                state="sleeping" if asleep else "ready",
                ready=asleep or self._is_fresh(loaded),
                restarts=restarts,
                info=loaded.client.info,
            )
        if process is None:
            return EngineStatus(model=model_id, state="unloaded", ready=False)
        state: ModelState = "starting" if process.state == "ready" else process.state
        return EngineStatus(
            model=model_id, state=state, ready=False, restarts=restarts, error=process.error
        )

    def _is_fresh(self, loaded: _Loaded) -> bool:
        newest = max(
            loaded.proved_at or 0.0, (loaded.stats.last_output_at or 0.0) if loaded.stats else 0.0
        )
        return time.monotonic() - newest < FRESH_SECONDS

    async def wanted(self) -> set[str]:
        """Models that ought to be served now: the supervisor's, else those of the settings that are registered."""
        await self._refresh_processes()
        return self._wanted()

    def _wanted(self) -> set[str]:
        if self._supervised:
            return {m for m, p in self._processes.items() if p.state != "stopping"}
        return set(self._loaded) | set(self._settings.models)

    def snapshot(self) -> dict[str, tuple[EngineInfo, EngineStats]]:
        """What the last poll saw of every loaded engine; for the metrics."""
        return {
            model: (loaded.client.info, loaded.stats)
            for model, loaded in self._loaded.items()
            if loaded.stats is not None
        }

    def readiness(self) -> dict[str, bool]:
        """Whether each wanted model is ready, as the last poll saw it; for the metrics."""
        return {model: self._status_of(model).ready for model in sorted(self._wanted())}

    def restarts(self) -> dict[str, int]:
        return {model: process.restarts for model, process in self._processes.items()}

    async def _refresh_processes(self) -> None:
        try:
            self._processes = (await self._supervisor.status()).engines
            self._supervised = True
        except (SupervisorUnavailableError, SupervisorRefusedError):
            self._processes, self._supervised = {}, False

    async def _poll_for_ever(self) -> None:
        while True:
            try:
                await self.poll()
            except Exception:  # one bad poll must not end all polling
                logger.exception("poll failed")
            await asyncio.sleep(POLL_SECONDS)

    async def poll(self) -> None:
        """Connect to new hosts, read statistics, prove idle engines."""
        await self._refresh_processes()
        models = {entry.id for entry in self._registry.list_models()}
        await asyncio.gather(*(self._poll_one(model_id) for model_id in sorted(models)))

    async def _poll_one(self, model_id: str) -> None:
        loaded = self._alive(model_id) or await self._connect(model_id)
        if loaded is None:
            return
        try:
            async with asyncio.timeout(CANARY_TIMEOUT_SECONDS):
                loaded.stats = await loaded.client.stats()
                newest = max(loaded.proved_at or 0.0, loaded.stats.last_output_at or 0.0)
                if not loaded.stats.sleeping and time.monotonic() - newest > CANARY_IDLE_SECONDS:
                    await _canary(loaded.client)
                    loaded.proved_at = time.monotonic()
        except (EngineError, TimeoutError) as error:
            logger.warning(
                "engine does not answer", extra={"model": model_id, "reason": str(error)}
            )


async def _canary(engine: AsyncEngine) -> None:
    """Have one token or vector computed. Raises: EngineError."""
    request_id = f"canary-{secrets.token_hex(6)}"
    token_id = min(1, engine.info.vocab_size - 1)
    if engine.info.kind == "encoder":
        await engine.embed(EmbedRequest(request_id=request_id, token_ids=((token_id,),)))
        return
    params = SamplingParams(max_tokens=1, temperature=0)
    stream = await engine.generate(
        GenerateRequest(request_id=request_id, token_ids=(token_id,), params=params)
    )
    async for _ in stream:
        pass
