import asyncio
import io
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import psutil
import pytest

from service.children import RestartPolicy, last_line, limit_log, parse_status
from service.settings import DEFAULT_EMBEDDING_MODEL, DEFAULT_MODEL, Settings
from service.supervisor import (
    Commands,
    Supervisor,
    SupervisorError,
    admit_nobody,
    banner,
    child_environment,
    default_commands,
    is_installed,
)
from service.supervisor_client import (
    SupervisorClient,
    SupervisorRefusedError,
    SupervisorStatus,
    SupervisorUnavailableError,
)
from service.terminal import Terminal, bar

pytestmark = pytest.mark.anyio

FAKE = (sys.executable, "-I", "-S", str(Path(__file__).with_name("fake_process.py")))
QUICK = RestartPolicy(first_seconds=0.01, max_seconds=0.02, max_quick_failures=3)
DEADLINE_SECONDS = 20.0


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home", port=0, models=("tiny",))


@pytest.fixture
def commands(settings: Settings) -> Commands:
    return Commands(
        api=lambda fd: (*FAKE, "api", str(fd)),
        worker=lambda: (*FAKE, "wait", ""),
        engine=lambda model: (*FAKE, "engine", str(settings.engine_socket(model))),
        import_model=lambda model: (*FAKE, "convert", str(settings.models_dir / model)),
    )


def install(settings: Settings, model: str) -> None:
    folder = settings.models_dir / model
    folder.mkdir(parents=True)
    (folder / "lathe.json").write_text("{}")


class Running:
    """A supervisor in this process, and what a test asks of it."""

    def __init__(self, settings: Settings, supervisor: Supervisor, output: io.StringIO) -> None:
        self.supervisor = supervisor
        self.client = SupervisorClient(settings.supervisor_socket)
        self.output = output
        self.task = asyncio.create_task(supervisor.run())

    async def until(self, condition: Callable[[SupervisorStatus], bool]) -> SupervisorStatus:
        async with asyncio.timeout(DEADLINE_SECONDS):
            while True:
                if self.task.done():
                    self.task.result()
                    raise AssertionError("the supervisor ended")
                try:
                    status = await self.client.status()
                except SupervisorUnavailableError:
                    status = None
                if status is not None and condition(status):
                    return status
                await asyncio.sleep(0.01)

    async def until_state(self, model: str, state: str) -> SupervisorStatus:
        return await self.until(
            lambda status: model in status.engines and status.engines[model].state == state
        )


@asynccontextmanager
async def running(settings: Settings, commands: Commands) -> AsyncIterator[Running]:
    output = io.StringIO()
    supervisor = Supervisor(
        settings,
        commands=commands,
        terminal=Terminal(output),
        service_policy=replace(QUICK, max_quick_failures=None),
        engine_policy=QUICK,
    )
    run = Running(settings, supervisor, output)
    try:
        yield run
    finally:
        supervisor.stop()
        await run.task


def alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def read_pid(mark: Path) -> int:
    return int(Path(f"{mark}.pid").read_text())


async def until_dead(pid: int) -> None:
    async with asyncio.timeout(DEADLINE_SECONDS):
        while alive(pid):  # noqa: ASYNC110 -- another process's end; nothing here could set an event
            await asyncio.sleep(0.01)


def pids(status: SupervisorStatus) -> list[int]:
    found = [status.api_pid, status.worker_pid, *(e.pid for e in status.engines.values())]
    return [pid for pid in found if pid is not None]


async def test_starts_everything_says_where_it_is_and_stops_everything(
    settings: Settings, commands: Commands
) -> None:
    install(settings, "tiny")
    async with running(settings, commands) as run:
        async with asyncio.timeout(DEADLINE_SECONDS):
            await run.supervisor.ready.wait()
        status = await run.client.status()
        async with httpx.AsyncClient() as http:
            answer = await http.get(run.supervisor.url + "/health")
    assert answer.text == str(status.api_pid)
    assert len(pids(status)) == 3
    assert not any(alive(pid) for pid in pids(status))
    output = run.output.getvalue()
    assert f"Lathe is ready at {run.supervisor.url}" in output
    assert f"curl {run.supervisor.url}/v1/chat/completions" in output
    assert not settings.supervisor_socket.exists()
    assert not settings.engine_socket("tiny").exists()


async def test_a_crashed_engine_is_started_again(settings: Settings, commands: Commands) -> None:
    install(settings, "tiny")
    async with running(settings, commands) as run:
        first = (await run.until_state("tiny", "ready")).engines["tiny"]
        assert first.pid is not None
        os.kill(first.pid, signal.SIGKILL)
        status = await run.until(
            lambda status: (
                status.engines["tiny"].state == "ready" and status.engines["tiny"].pid != first.pid
            )
        )
    assert status.engines["tiny"].restarts == 1
    assert status.engines["tiny"].error == "killed by signal 9 (Killed)"


async def test_a_crashed_api_process_keeps_its_address(
    settings: Settings, commands: Commands
) -> None:
    install(settings, "tiny")
    async with running(settings, commands) as run:
        async with asyncio.timeout(DEADLINE_SECONDS):
            await run.supervisor.ready.wait()
        first = (await run.client.status()).api_pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        # No connection is refused in between: the supervisor holds the listening socket.
        async with httpx.AsyncClient(timeout=DEADLINE_SECONDS) as http:
            answer = await http.get(run.supervisor.url + "/health")
    assert answer.status_code == 200
    assert answer.text != str(first)


async def test_gives_up_on_an_engine_that_never_starts_until_it_is_loaded_again(
    settings: Settings, commands: Commands
) -> None:
    install(settings, "tiny")
    fails = True

    def engine(model: str) -> Sequence[str]:
        return (*FAKE, "crash", "ValueError: bad weights") if fails else commands.engine(model)

    async with running(settings, replace(commands, engine=engine)) as run:
        status = await run.until_state("tiny", "failed")
        engine_process = status.engines["tiny"]
        assert engine_process.error == "ended with exit code 3: ValueError: bad weights"
        assert engine_process.pid is None
        assert engine_process.restarts == 2
        async with asyncio.timeout(DEADLINE_SECONDS):
            await run.supervisor.ready.wait()
        assert "Without tiny: it failed to load" in run.output.getvalue()
        fails = False
        await run.client.load("tiny")
        status = await run.until_state("tiny", "ready")
    assert status.engines["tiny"].restarts == 0


async def test_what_an_engine_says_before_it_ends_is_its_error(
    settings: Settings, commands: Commands
) -> None:
    install(settings, "tiny")
    refusing = replace(commands, engine=lambda model: (*FAKE, "refuse", "CheckpointError: no"))
    async with running(settings, refusing) as run:
        status = await run.until_state("tiny", "failed")
    assert status.engines["tiny"].error == "ended with exit code 1: CheckpointError: no"


async def test_loads_restarts_and_unloads(settings: Settings, commands: Commands) -> None:
    settings = settings.model_copy(update={"models": ()})
    install(settings, "tiny")
    async with running(settings, commands) as run:
        await run.until(lambda status: status.engines == {})
        loading = await run.client.load("tiny")
        assert loading.model == "tiny"
        ready = (await run.until_state("tiny", "ready")).engines["tiny"]
        again = await run.client.load("tiny")
        assert again.pid == ready.pid is not None
        restarted = await run.client.restart("tiny")
        assert not alive(ready.pid)
        assert (restarted.state, restarted.restarts) == ("starting", 0)
        ready = (await run.until_state("tiny", "ready")).engines["tiny"]
        assert ready.pid is not None
        await run.client.unload("tiny")
        assert not alive(ready.pid)
        assert (await run.client.status()).engines == {}
        assert not settings.engine_socket("tiny").exists()
        await run.client.load("tiny")
        await run.until_state("tiny", "ready")


@pytest.mark.parametrize("model", ["absent", "../home", ".", "", "a/b", ".hidden"])
async def test_refuses_to_load_what_is_not_installed(
    settings: Settings, commands: Commands, model: str
) -> None:
    settings = settings.model_copy(update={"models": ()})
    install(settings, ".hidden")
    async with running(settings, commands) as run:
        await run.until(lambda status: True)
        with pytest.raises(SupervisorRefusedError) as refused:
            await run.client.load(model)
        assert refused.value.code == "model_not_found"
        for ask in (run.client.unload, run.client.restart):
            with pytest.raises(SupervisorRefusedError) as refused:
                await ask(model)
            assert refused.value.code == "model_not_loaded"


@pytest.mark.parametrize(
    "line", [b"\xff\n", b"[]\n", b"{}\n", b'{"op": "load"}\n', b'{"op": "drop", "model": "a"}\n']
)
async def test_answers_nonsense_with_an_error(
    settings: Settings, commands: Commands, line: bytes
) -> None:
    settings = settings.model_copy(update={"models": ()})
    async with running(settings, commands) as run:
        await run.until(lambda status: True)
        reader, writer = await asyncio.open_unix_connection(settings.supervisor_socket)
        writer.write(line)
        answer = await reader.readline()
        writer.close()
    assert b'"code": "invalid_value"' in answer


async def test_imports_a_default_model_that_is_missing(
    settings: Settings, commands: Commands
) -> None:
    settings = settings.model_copy(update={"models": (DEFAULT_MODEL, DEFAULT_EMBEDDING_MODEL)})
    async with running(settings, commands) as run:
        await run.until_state(DEFAULT_MODEL, "ready")
        await run.until_state(DEFAULT_EMBEDDING_MODEL, "ready")
    assert is_installed(settings.models_dir, DEFAULT_MODEL)


async def test_a_configured_model_that_is_missing_fails_by_name(
    settings: Settings, commands: Commands
) -> None:
    async with running(settings, commands) as run:
        status = await run.until_state("tiny", "failed")
    assert status.engines["tiny"].error == (
        "there is no model 'tiny'; bring one in with `lathe import`"
    )


async def test_a_failing_import_is_reported(settings: Settings, commands: Commands) -> None:
    settings = settings.model_copy(update={"models": (DEFAULT_MODEL,)})
    broken = replace(commands, import_model=lambda model: (*FAKE, "crash", "no such package"))
    async with running(settings, broken) as run:
        status = await run.until_state(DEFAULT_MODEL, "failed")
    assert status.engines[DEFAULT_MODEL].error == ("importing smollm2-135m failed: no such package")


async def test_stopping_during_an_import_ends_it(settings: Settings, commands: Commands) -> None:
    settings = settings.model_copy(update={"models": (DEFAULT_MODEL,)})
    slow = replace(commands, import_model=lambda model: (*FAKE, "wait", ""))
    async with running(settings, slow) as run:
        await run.until_state(DEFAULT_MODEL, "importing")
    assert not settings.supervisor_socket.exists()


async def test_a_stale_socket_does_not_hinder_a_start(
    settings: Settings, commands: Commands
) -> None:
    install(settings, "tiny")
    settings.run_dir.mkdir(parents=True)
    for path in (settings.engine_socket("tiny"), settings.supervisor_socket):
        left_over = socket.socket(socket.AF_UNIX)
        left_over.bind(str(path))
        left_over.close()
    async with running(settings, commands) as run:
        await run.until_state("tiny", "ready")


async def test_leaves_a_model_alone_that_another_process_serves(
    settings: Settings, commands: Commands
) -> None:
    install(settings, "tiny")
    settings.run_dir.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(settings.engine_socket("tiny")))
        other.listen()
        async with running(settings, commands) as run:
            status = await run.until_state("tiny", "failed")
    assert status.engines["tiny"].error == ("another process serves tiny already; end it first")


async def test_a_stubborn_engine_and_its_group_are_killed_when_hurried(
    settings: Settings, commands: Commands, tmp_path: Path
) -> None:
    install(settings, "tiny")
    mark = tmp_path / "mark"
    stubborn = replace(commands, engine=lambda model: (*FAKE, "stubborn", str(mark)))
    async with running(settings, stubborn) as run:
        status = await run.until_state("tiny", "ready")
        grandchild = read_pid(mark)
        run.supervisor.stop()
        run.supervisor.stop()
        await run.task
    for pid in (*pids(status), grandchild):
        await until_dead(pid)


async def test_one_supervisor_per_home(settings: Settings, commands: Commands) -> None:
    install(settings, "tiny")
    async with running(settings, commands) as run:
        await run.until_state("tiny", "ready")
        with pytest.raises(SupervisorError, match=f"runs here already .process {os.getpid()}"):
            await Supervisor(settings, commands=commands).run()
        await run.client.status()


async def test_who_waits_while_there_is_no_api_process_is_turned_away(
    settings: Settings, commands: Commands
) -> None:
    """It ended, another one is not up yet, and everything stops."""
    commands = replace(commands, api=lambda fd: (*FAKE, "wait", ""))
    async with running(settings, commands) as run:
        await run.until(lambda status: status.api_pid is not None)
        port = int(run.supervisor.url.rpartition(":")[2])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}")
        run.supervisor.stop()
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
    assert head.startswith(b"HTTP/1.1 503 ")
    assert b"Retry-After: " in head
    assert json.loads(body)["error"]["code"] == "draining"


@pytest.mark.skipif(sys.platform != "linux", reason="a filter of Linux' sockets")
def test_a_socket_that_admits_nobody_keeps_who_is_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        with socket.create_connection(address, timeout=5):
            admit_nobody(listener)
            with pytest.raises(TimeoutError):
                socket.create_connection(address, timeout=0.2)
            listener.accept()[0].close()


async def test_a_taken_port_is_said(settings: Settings, commands: Commands) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        taken = settings.model_copy(update={"port": port})
        with pytest.raises(SupervisorError, match=f"port {port} is in use"):
            await Supervisor(taken, commands=commands).run()


async def test_a_home_too_deep_for_sockets_is_refused(
    settings: Settings, commands: Commands, tmp_path: Path
) -> None:
    deep = settings.model_copy(update={"home": tmp_path / ("x" * 110)})
    with pytest.raises(SupervisorError, match="LATHE_HOME is too long"):
        await Supervisor(deep, commands=commands).run()


async def test_the_client_says_when_nobody_answers(tmp_path: Path) -> None:
    with pytest.raises(SupervisorUnavailableError, match="lathe up"):
        await SupervisorClient(tmp_path / "none.sock").status()


KILLED_SUPERVISOR = """
import asyncio, sys
from pathlib import Path
from service.settings import Settings
from service.supervisor import Commands, Supervisor
fake = sys.argv[2:]
settings = Settings(home=Path(sys.argv[1]), port=0, models=("tiny",))
commands = Commands(
    api=lambda fd: (*fake, "api", str(fd)),
    worker=lambda: (*fake, "wait", ""),
    engine=lambda model: (*fake, "engine", str(settings.engine_socket(model))),
    import_model=lambda model: (*fake, "wait", ""),
)
asyncio.run(Supervisor(settings, commands=commands).run())
"""


async def test_children_die_with_a_killed_supervisor_and_the_next_one_starts(
    settings: Settings, commands: Commands
) -> None:
    install(settings, "tiny")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", KILLED_SUPERVISOR, str(settings.home), *FAKE),
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    client = SupervisorClient(settings.supervisor_socket)
    async with asyncio.timeout(DEADLINE_SECONDS):
        while True:
            try:
                status = await client.status()
                if status.engines["tiny"].state == "ready" and len(pids(status)) == 3:
                    break
            except SupervisorUnavailableError:
                pass
            await asyncio.sleep(0.02)
    process.kill()
    await process.wait()
    for pid in pids(status):
        await until_dead(pid)
    async with running(settings, commands) as run:
        await run.until_state("tiny", "ready")


def test_back_off_doubles_up_to_its_limit() -> None:
    policy = RestartPolicy()
    delays = [policy.delay_seconds(failures) for failures in range(1, 9)]
    assert delays == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]


async def test_a_healthy_spell_wipes_the_slate(settings: Settings, commands: Commands) -> None:
    install(settings, "tiny")
    forgiving = RestartPolicy(
        first_seconds=0.01, max_seconds=0.02, healthy_seconds=0.0, max_quick_failures=2
    )
    supervisor = Supervisor(
        settings, commands=commands, terminal=Terminal(io.StringIO()), engine_policy=forgiving
    )
    run = Running(settings, supervisor, io.StringIO())
    seen: set[int] = set()
    for _ in range(4):  # twice as many crashes as a row may have
        status = await run.until(
            lambda status: (
                status.engines["tiny"].state == "ready" and status.engines["tiny"].pid not in seen
            )
        )
        pid = status.engines["tiny"].pid
        assert pid is not None
        seen.add(pid)
        os.kill(pid, signal.SIGKILL)
    supervisor.stop()
    await run.task


def test_status_survives_its_json_form() -> None:
    status = SupervisorStatus.from_json(
        {
            "pid": 1,
            "engines": {"a": {"model": "a", "state": "ready", "pid": 2, "since": 3.0}},
            "api_pid": None,
            "worker_pid": 4,
        }
    )
    assert SupervisorStatus.from_json(status.to_json()) == status


@pytest.mark.parametrize("line", [b"", b"text", b"[1]", b'"status"', b'{"status": 1}', b"\xff"])
def test_other_output_is_not_a_status(line: bytes) -> None:
    assert parse_status(line) is None


def test_a_large_log_keeps_one_older_generation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.children.MAX_LOG_BYTES", 4)
    path = tmp_path / "a.log"
    path.write_bytes(b"12345")
    with path.open("ab") as still_writing:
        limit_log(path)
        still_writing.write(b"6")
    assert path.read_bytes() == b"6"
    assert path.with_suffix(".log.1").read_bytes() == b"12345"


def test_last_line_looks_at_what_is_new(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    path.write_text("old\nnew\n  \n")
    assert last_line(path, 4) == "new"
    assert last_line(path, 8) == ""
    assert last_line(tmp_path / "none", 0) == ""


def test_last_line_of_our_own_log_is_its_message(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    line = {"level": "error", "message": "it broke"}
    path.write_text(json.dumps(line) + "\n")
    assert last_line(path, 0) == "it broke"
    traced = line | {"exception": "Traceback ...\n  line 1\nValueError: no such thing"}
    path.write_text(json.dumps(traced) + "\n")
    assert last_line(path, 0) == "ValueError: no such thing"
    path.write_text("[1]\n")
    assert last_line(path, 0) == "[1]"


def test_idle_threads_of_children_sleep(settings: Settings) -> None:
    environment = child_environment(settings)
    assert environment["OMP_WAIT_POLICY"] == "passive"
    assert environment["LATHE_HOME"] == str(settings.home)


def test_default_commands_are_ours(settings: Settings) -> None:
    commands = default_commands(settings)
    assert commands.api(7)[1:] == ("-P", "-m", "service.cli", "serve", "--fd", "7")
    engine = commands.engine("tiny")
    assert engine[3:6] == ("engines.host", "--model-id", "tiny")
    assert engine[engine.index("--max-num-waiting") + 1] == "256"
    assert commands.import_model("tiny")[3:5] == ("compression.import_model", "tiny")


def test_the_banner_names_the_key_only_where_there_is_one(settings: Settings) -> None:
    open_banner = "\n".join(banner(settings, "http://h:1", [], has_keys=False))
    keyed_banner = "\n".join(banner(settings, "http://h:1", [], has_keys=True))
    assert "LATHE_API_KEY" not in open_banner
    assert "Bearer $LATHE_API_KEY" in keyed_banner
    assert '"model": "tiny"' in open_banner


def test_bar_is_bounded() -> None:
    assert bar(0.5) == "[############............]  50%"
    assert bar(0.0).count("#") == 0
    assert bar(1.0).count("#") == 24


def test_the_supervisor_imports_neither_torch_nor_fastapi() -> None:
    code = "import service.supervisor, sys; print([m for m in ('torch', 'fastapi') if m in sys.modules])"
    output = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        check=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ).stdout
    assert output.strip() == "[]"
