"""One GPU for engines and jobs: engines of a fake device behind real sockets, and a worker's job beside them."""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from engines.host import EngineHost
from jobs.gpu import ASLEEP_NAME, GpuBusyError, GpuPolicy, give_gpu_back, take_gpu
from jobs.sqlite import SqliteJobStore
from jobs.states import TERMINAL_STATUSES
from jobs.store import Job, NewJob
from jobs.worker import Worker, WorkerConfig
from tests.fakes.echo_engine import ECHO_INFO, EchoEngine
from tests.jobs.conftest import REPOSITORY, wait_until


class Naps(EchoEngine):
    """Remembers what it was told; may refuse to sleep."""

    def __init__(self, device: str, *, stubborn: bool = False) -> None:
        super().__init__(info=replace(ECHO_INFO, device=device))
        self.told: list[str] = []
        self.stubborn = stubborn

    def sleep(self) -> None:
        self.told.append("sleep")
        if self.stubborn:
            raise RuntimeError("no")
        super().sleep()

    def wake(self) -> None:
        self.told.append("wake")
        super().wake()


@contextmanager
def served(run_dir: Path, **engines: EchoEngine) -> Iterator[None]:
    """Engine hosts by model id, on one thread."""
    ready = threading.Event()
    loops: list[asyncio.AbstractEventLoop] = []
    hosts = {name: EngineHost(engine) for name, engine in engines.items()}

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        waiting = [asyncio.Event() for _ in hosts]
        tasks = [
            asyncio.ensure_future(host.serve(run_dir / f"{name}.sock", on_ready=event.set))
            for (name, host), event in zip(hosts.items(), waiting, strict=True)
        ]
        await asyncio.gather(*(event.wait() for event in waiting))
        ready.set()
        await asyncio.gather(*tasks)

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert ready.wait(20)
    yield
    for host in hosts.values():
        loops[0].call_soon_threadsafe(host.stop)
    thread.join(20)


def test_engines_on_the_gpu_sleep_and_only_those_wake(tmp_path: Path) -> None:
    busy, idle, cpu = Naps("cuda:0"), Naps("cuda:0"), Naps("cpu")
    idle._sleeping = True
    with served(tmp_path, busy=busy, idle=idle, cpu=cpu):
        take_gpu(tmp_path, "sleep")
        assert (busy.told, idle.told, cpu.told) == (["sleep"], [], [])
        assert json.loads((tmp_path / ASLEEP_NAME).read_text()) == ["busy"]
        give_gpu_back(tmp_path)
        assert (busy.told, idle.told, cpu.told) == (["sleep", "wake"], [], [])
        give_gpu_back(tmp_path)
        assert busy.told == ["sleep", "wake"]


@pytest.mark.parametrize(("policy", "refused"), [("busy", True), ("share", False)])
def test_other_policies_disturb_nobody(tmp_path: Path, policy: GpuPolicy, refused: bool) -> None:
    engine = Naps("cuda:0")
    with served(tmp_path, one=engine):
        if refused:
            with pytest.raises(GpuBusyError, match="the GPU serves one"):
                take_gpu(tmp_path, policy)
        else:
            take_gpu(tmp_path, policy)
        assert engine.told == []
        engine._sleeping = True
        take_gpu(tmp_path, policy)  # nobody is on it


def test_one_that_does_not_sleep_refuses_the_job_and_the_others_wake(tmp_path: Path) -> None:
    good, bad = Naps("cuda:0"), Naps("cuda:0", stubborn=True)
    with served(tmp_path, bad=bad, good=good):
        with pytest.raises(GpuBusyError, match="bad could not be put to sleep"):
            take_gpu(tmp_path, "sleep")
        assert good.told == ["sleep", "wake"]
    assert not (tmp_path / ASLEEP_NAME).exists()


def test_nobody_there(tmp_path: Path) -> None:
    (tmp_path / "dead.sock").touch()
    take_gpu(tmp_path, "busy")
    (tmp_path / ASLEEP_NAME).write_text('["dead"]')
    give_gpu_back(tmp_path)
    assert not (tmp_path / ASLEEP_NAME).exists()


def run_job(home: Path, policy: GpuPolicy, monkeypatch: pytest.MonkeyPatch) -> Job:
    """One finetune job, by a runner that only looks at who is asleep."""
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    store = SqliteJobStore(home / "lathe.db")
    store.create(NewJob(id="job-1", type="finetune", owner="me", spec={}, request_hash="h"))
    config = WorkerConfig(
        home=home, gpu_policy=policy, runners={"finetune": "tests.jobs.runners:who_sleeps"}
    )
    stop = threading.Event()
    thread = threading.Thread(target=Worker(store, config).run, args=(stop,))
    thread.start()
    try:
        wait_until(lambda: store.get("job-1").status in TERMINAL_STATUSES)
    finally:
        stop.set()
        thread.join(20)
    job = store.get("job-1")
    store.close()
    return job


@pytest.mark.processes
def test_a_finetune_job_has_the_gpu_while_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    engine, left_asleep = Naps("cuda:0"), Naps("cuda:0")
    left_asleep._sleeping = True
    with served(run_dir, one=engine, old=left_asleep):
        (run_dir / ASLEEP_NAME).write_text('["old"]')  # by a worker that died
        job = run_job(tmp_path, "sleep", monkeypatch)
        assert job.result == {"asleep": ["old", "one"]}
        assert engine.told == ["sleep", "wake"]
        assert left_asleep.told == ["wake", "sleep", "wake"]
        busy = run_job(tmp_path / "second", "busy", monkeypatch)
    assert busy.result is not None  # of another home, without engines
    with served(run_dir, one=Naps("cuda:0")):
        (tmp_path / "lathe.db").unlink()
        refused = run_job(tmp_path, "busy", monkeypatch)
    assert refused.error is not None
    assert (refused.error["code"], refused.status_reason) == ("gpu_busy", "gpu_busy")
    assert "the GPU serves one" in refused.error["message"]
