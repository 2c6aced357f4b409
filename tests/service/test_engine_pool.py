"""Models that are loaded because somebody asks for them, by a supervisor played here."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from compression.registry import ModelEntry, ModelRegistry
from engines.host import EngineHost
from engines.protocol import AsyncEngine
from service.engine_pool import EnginePool
from service.errors import ApiError
from service.settings import Settings
from service.supervisor_client import EngineProcess, SupervisorStatus, SupervisorUnavailableError
from tests.fakes.echo_engine import ECHO_INFO, EchoEngine
from tests.service.openai_app import add_model


class Supervisor:
    """Starts an echo engine's host for a model that it is told to load, after a moment."""

    def __init__(self, settings: Settings, *, fails: bool = False, runs: bool = True) -> None:
        self._settings = settings
        self._fails = fails
        self._runs = runs
        self.asked: list[str] = []
        self.engines: dict[str, EngineProcess] = {}
        self.tasks: list[asyncio.Task[None]] = []

    async def status(self) -> SupervisorStatus:
        if not self._runs:
            raise SupervisorUnavailableError("none")
        return SupervisorStatus(pid=1, engines=dict(self.engines))

    async def load(self, model: str) -> EngineProcess:
        self.asked.append(model)
        self.engines[model] = EngineProcess(model=model, state="starting")
        self.tasks.append(asyncio.create_task(self._serve(model)))
        return self.engines[model]

    async def unload(self, model: str) -> None:
        del self.engines[model]

    async def _serve(self, model: str) -> None:
        await asyncio.sleep(0.2)
        if self._fails:
            self.engines[model] = EngineProcess(model=model, state="failed", error="it broke")
            return
        host = EngineHost(EchoEngine(info=replace(ECHO_INFO, model=model)))
        await host.serve(self._settings.engine_socket(model))


def pool_of(home: Path, prepare: Any = None, **options: Any) -> tuple[EnginePool, Supervisor]:
    settings = Settings(home=home, max_loaded_models=2)
    settings.run_dir.mkdir()
    for name in ("one", "two", "three"):
        add_model(settings.models_dir / name, "decoder", "{}", {})
    supervisor = Supervisor(settings, **options)
    registry = ModelRegistry(settings.models_dir)
    pool = EnginePool(settings, registry, cast(Any, supervisor), prepare=prepare)
    return pool, supervisor


async def close(pool: EnginePool, supervisor: Supervisor) -> None:
    await pool.aclose()
    for task in supervisor.tasks:
        task.cancel()
    await asyncio.gather(*supervisor.tasks, return_exceptions=True)


@pytest.mark.anyio
async def test_a_model_is_loaded_once_for_all_who_ask(tmp_path: Path) -> None:
    pool, supervisor = pool_of(tmp_path)
    with pytest.raises(ApiError, match="not loaded"):
        await pool.get("one", load=False)
    engines: list[AsyncEngine] = await asyncio.gather(*(pool.get("one") for _ in range(5)))
    assert {engine.info.model for engine in engines} == {"one"}
    assert supervisor.asked == ["one"]
    assert (await pool.get("two")).info.model == "two"
    with pytest.raises(ApiError, match="'three' is not loaded, and 2 are: unload one") as refused:
        await pool.get("three")
    assert refused.value.code == "model_not_loaded"
    with pytest.raises(ApiError) as unknown:
        await pool.get("four")
    assert unknown.value.code == "model_not_found"
    assert supervisor.asked == ["one", "two"]
    await close(pool, supervisor)


@pytest.mark.anyio
async def test_a_model_is_prepared_once_before_it_counts_as_loaded(tmp_path: Path) -> None:
    prepared: list[str] = []

    async def prepare(entry: ModelEntry) -> None:
        assert entry.id not in pool._loaded
        prepared.append(entry.id)
        if entry.id == "two":
            raise ApiError("model_load_failed", "its tokenizer cannot be read")

    pool, supervisor = pool_of(tmp_path, prepare)
    for model in ("one", "two", "one"):
        assert (await pool.get(model)).info.model == model
    assert prepared == ["one", "two"]
    await close(pool, supervisor)


@pytest.mark.anyio
async def test_a_model_that_does_not_load_says_why(tmp_path: Path) -> None:
    pool, supervisor = pool_of(tmp_path, fails=True)
    with pytest.raises(ApiError, match="it broke") as failed:
        await pool.get("one")
    assert failed.value.code == "model_load_failed"
    with pytest.raises(ApiError, match="it broke") as again:  # told without another try
        await pool.get("one")
    assert again.value.code == "model_load_failed"
    assert supervisor.asked == ["one"]
    assert await pool.wanted() == set()  # nor does it keep the service from being ready
    await close(pool, supervisor)


@pytest.mark.anyio
async def test_without_a_supervisor_nothing_is_loaded(tmp_path: Path) -> None:
    pool, supervisor = pool_of(tmp_path, runs=False)
    with pytest.raises(ApiError, match=r"'one' is not loaded\Z"):
        await pool.get("one")
    await close(pool, supervisor)
