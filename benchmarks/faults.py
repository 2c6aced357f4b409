"""Random faults against one service under mixed load: is an accepted job lost, is a connection cut in silence?

    python -m benchmarks.faults --faults 200

Starts `lathe up` over a home of its own with a small random model (`--model ID --home HOME` take a real one), works it
with chats (whole and streamed), completions and batches. Meanwhile it kills, ends and restarts its parts, one after the
other, each once the one before is recovered from. The exit status is 1 if

- a job that was accepted (201) is gone, never ends, or ends without an answer to each of its lines, unless it says that
  three of the faults in a row each cost it an attempt before it got any further, which is the limit;
- a stream ends without `[DONE]` and without an error event, or a connection breaks while no API process was killed;
- an answer is neither 200 nor an error object of the kind that says "later" (503 with Retry-After, 409 unloaded).

A connection that breaks because its API process was killed is what a client sees of that; those are counted apart.
Recovery ends with the first whole answer, and with `/ready`. Prints Markdown.
"""

import argparse
import asyncio
import contextlib
import json
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from benchmarks.startup import free_port
from service.settings import Settings

READY_SECONDS = 120.0
JOB_SECONDS = 240.0
BREAK_SECONDS = 2.0
"""A connection that breaks within so many seconds of the end of its API process broke because of that."""
NUM_LINES = 24
GIVEN_UP = frozenset({"lease_lost", "runner_crashed"})
"""Codes of a job that lost three attempts in a row to faults without getting further: it is told, and kept."""
ENDED = ("succeeded", "failed", "cancelled")
LATER = frozenset({503, 409})
CHATS, COMPLETIONS, JOBS = 3, 2, 2
"""Clients that do the same over and over."""


def write_small_model(home: Path, model_id: str) -> None:
    """A random two-layer Llama over bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    from compression.import_model import import_folder
    from compression.registry import ModelRegistry

    special = ["<s>", "</s>"]
    alphabet = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    tokenizer.add_special_tokens(special)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
    names = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(alphabet),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        bos_token_id=0,
        eos_token_id=1,
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(names))
        import_folder(ModelRegistry(home / "models"), model_id, folder, report=lambda _: None)
    with contextlib.suppress(FileExistsError, FileNotFoundError):  # kernels that are built already
        shutil.copytree(Settings().home / "native", home / "native")


class Load:
    """Clients of one service, and what they saw.

    Attributes:
        answered: whole answers, by kind of client.
        told: errors that say what happened, by status or "event", and code.
        broken: connections that broke because an API process was killed.
        wrong: whatever must not be, as text.
        jobs: ids of accepted jobs, with the number of their lines.
        given_up: those of them that failed because three faults hit each; `lost_jobs` finds them.
        last_fault: what was done last, for `wrong`.
    """

    def __init__(self, url: str, model: str, *, max_tokens: int = 300) -> None:
        self.url = url
        self.answered: Counter[str] = Counter()
        self.told: Counter[str] = Counter()
        self.broken = 0
        self.wrong: list[str] = []
        self.jobs: dict[str, int] = {}
        self.given_up: list[str] = []
        self.last_fault = "none"
        self.stopping = asyncio.Event()
        self._model = model
        self._max_tokens = max_tokens
        self._api_ends: list[float] = []
        self._http = httpx.AsyncClient(
            base_url=url, timeout=300.0, limits=httpx.Limits(max_connections=100), trust_env=False
        )

    def api_was_killed(self) -> None:
        self._api_ends.append(time.monotonic())

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Clients at work until the block ends; then each ends what it does."""
        clients: list[Callable[[random.Random], Awaitable[None]]] = [
            *[self._chat] * CHATS,
            *[self._complete] * COMPLETIONS,
            *[self._batch] * JOBS,
        ]
        tasks = [
            asyncio.create_task(self._repeat(client, random.Random(number)))
            for number, client in enumerate(clients)
        ]
        try:
            yield
        finally:
            self.stopping.set()
            await asyncio.gather(*tasks)

    async def aclose(self) -> None:
        await self._http.aclose()

    async def _repeat(
        self, client: Callable[[random.Random], Awaitable[None]], draw: random.Random
    ) -> None:
        while not self.stopping.is_set():
            began = time.monotonic()
            try:
                await client(draw)
            except httpx.ConnectError:
                self.told["refused connection"] += 1
            except httpx.TransportError as error:
                self._break(client.__name__.removeprefix("_"), began, error)
            if time.monotonic() - began < 0.1:  # it was refused
                await asyncio.sleep(0.2)

    def _break(self, what: str, began: float, error: Exception) -> None:
        now = time.monotonic()
        if any(began - BREAK_SECONDS <= end <= now for end in self._api_ends):
            self.broken += 1
        else:
            self._accuse(f"{what}: cut ({type(error).__name__} {error}) after {now - began:.2f} s")

    def _accuse(self, text: str) -> None:
        self.wrong.append(f"{time.strftime('%H:%M:%S')} {text}; last fault: {self.last_fault}")
        print(self.wrong[-1], file=sys.stderr)

    def _tell(self, what: str, response: httpx.Response, *expected: int) -> bool:
        """Whether it is as expected; an error object is counted, anything else is wrong."""
        if response.status_code in expected:
            return True
        try:
            error = response.json()["error"]
            code = error["code"]
            assert set(error) == {"message", "type", "param", "code"}
        except (ValueError, KeyError, TypeError, AssertionError):
            self._accuse(f"{what}: {response.status_code} without an error object")
            return False
        later = response.status_code in LATER
        if not later or (response.status_code == 503 and "retry-after" not in response.headers):
            self._accuse(f"{what}: {response.status_code} {code}: {error['message'][:200]}")
        self.told[f"{response.status_code} {code}"] += 1
        return False

    async def _chat(self, draw: random.Random) -> None:
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": f"tell me of {draw.randrange(1000)}"}],
            "max_tokens": draw.randint(1, self._max_tokens),
            "ignore_eos": True,
        }
        if draw.random() < 0.2:
            response = await self._http.post("/v1/chat/completions", json=body)
            if self._tell("chat", response, 200):
                self.answered["chat"] += 1
            return
        leaves_after = draw.randint(1, 20) if draw.random() < 0.1 else None
        lines: list[str] = []
        request = self._http.stream("POST", "/v1/chat/completions", json=body | {"stream": True})
        async with request as response:
            if response.status_code != 200:
                await response.aread()
                self._tell("stream", response, 200)
                return
            async for line in response.aiter_lines():
                if line.startswith("data: "):
                    lines.append(line)
                if leaves_after is not None and len(lines) > leaves_after:
                    self.answered["stream left"] += 1
                    return
        self._take_end(lines)

    def _take_end(self, lines: list[str]) -> None:
        last = lines[-1].removeprefix("data: ") if lines else ""
        if last == "[DONE]":
            self.answered["stream"] += 1
            return
        try:
            code = json.loads(last)["error"]["code"]
        except (ValueError, KeyError, TypeError):
            self._accuse(f"stream: silent end after {len(lines)} events: {last[:80]}")
        else:
            self.told[f"event {code}"] += 1

    async def _complete(self, draw: random.Random) -> None:
        body = {
            "model": self._model,
            "prompt": "one two " * draw.randint(1, 200),
            "max_tokens": draw.randint(1, self._max_tokens // 4),
            "ignore_eos": True,
        }
        response = await self._http.post("/v1/completions", json=body)
        if self._tell("completion", response, 200):
            self.answered["completion"] += 1

    async def _batch(self, draw: random.Random) -> None:
        """A batch from its upload to its end."""
        bodies = [
            {"model": self._model, "prompt": f"number {line}", "max_tokens": 8, "ignore_eos": True}
            for line in range(NUM_LINES)
        ]
        content = "".join(
            json.dumps(
                {"custom_id": str(line), "method": "POST", "url": "/v1/completions", "body": body}
            )
            + "\n"
            for line, body in enumerate(bodies)
        )
        upload = await self._http.post(
            "/v1/files", data={"purpose": "batch"}, files={"file": ("in.jsonl", content)}
        )
        if not self._tell("upload", upload, 201):
            return
        batch = {
            "input_file_id": upload.json()["id"],
            "endpoint": "/v1/completions",
            "completion_window": "24h",
        }
        created = await self._http.post("/v1/batches", json=batch)
        if not self._tell("submit", created, 201):
            return
        job_id = created.json()["id"]
        self.jobs[job_id] = NUM_LINES
        while not self.stopping.is_set():
            with contextlib.suppress(httpx.TransportError):
                response = await self._http.get(f"/v1/jobs/{job_id}")
                if response.status_code == 404:
                    return  # counted at the end
                if response.status_code == 200 and response.json()["status"] in ENDED:
                    return
            await asyncio.sleep(0.5)

    async def lost_jobs(self) -> list[str]:
        """Of the accepted jobs, those that are gone, do not end, or lack an answer. Asks a service that is well."""
        lost = []
        deadline = time.monotonic() + JOB_SECONDS
        for job_id, num_lines in self.jobs.items():
            while True:
                response = await self._http.get(f"/v1/jobs/{job_id}")
                if response.status_code != 200:
                    lost.append(f"{job_id}: {response.status_code}")
                    break
                job = response.json()
                if job["status"] in ENDED:
                    if (job["error"] or {}).get("code") in GIVEN_UP:
                        self.given_up.append(job_id)
                    elif job["status"] != "succeeded":
                        lost.append(f"{job_id}: {job['status']}, {job['error']}")
                    elif (answers := await self._answers(job_id)) != set(range(num_lines)):
                        lost.append(f"{job_id}: {len(answers)} of {num_lines} answers")
                    break
                if time.monotonic() > deadline:
                    lost.append(f"{job_id}: still {job['status']}")
                    break
                await asyncio.sleep(0.5)
        return lost

    async def _answers(self, job_id: str) -> set[int]:
        batch = (await self._http.get(f"/v1/batches/{job_id}")).json()
        content = await self._http.get(f"/v1/files/{batch['output_file_id']}/content")
        rows = [json.loads(line) for line in content.text.splitlines()]
        numbers = [int(row["custom_id"]) for row in rows if row["response"]["status_code"] == 200]
        assert len(numbers) == len(set(numbers)), "a line was answered twice"
        return set(numbers)


@dataclass
class Up:
    """`lathe up`, which may be killed and started again on the same port."""

    home: Path
    model: str
    port: int = field(default_factory=free_port)
    process: "subprocess.Popen[bytes] | None" = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        environment = os.environ | {
            "LATHE_JOB_LEASE_SECONDS": "3",
            "LATHE_JOB_HEARTBEAT_SECONDS": "1",
            "LATHE_DRAIN_SECONDS": "5",
        }
        with (self.home / "up.log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "service.cli", "up", "--home", str(self.home)),
                    *("--port", str(self.port), "--model", self.model),
                ],
                stdout=log,
                stderr=log,
                env=environment,
            )

    def find(self, kind: str) -> psutil.Process | None:
        """A process by what it is: "api", "worker", "job" or "engine"."""
        assert self.process is not None
        word = {
            "api": "serve",
            "worker": "worker",
            "job": "jobs.child",
            "engine": "engines.host",
        }[kind]
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if word in process.cmdline():
                    return process
        return None


class Faults:
    """Does what goes wrong, and waits until all is well again."""

    def __init__(self, up: Up, load: Load) -> None:
        self._up = up
        self._load = load
        self._http = httpx.AsyncClient(base_url=up.url, timeout=10.0, trust_env=False)
        self.seconds: dict[str, list[tuple[float, float]]] = defaultdict(list)
        self.loaded_by_hand = 0

    async def one(self, draw: random.Random) -> None:
        name = draw.choices(list(FAULTS), weights=[weight for _, weight in FAULTS.values()])[0]
        began = time.monotonic()
        self._load.last_fault = f"{name} at {time.strftime('%H:%M:%S')}"
        if not await FAULTS[name][0](self):
            return await self.one(draw)
        self.seconds[name].append(await self.recovery(began))
        await asyncio.sleep(draw.uniform(0.0, 1.0))

    async def recovery(self, began: float) -> tuple[float, float]:
        """Seconds to the first whole answer, and to `/ready` after it."""
        body = {"model": self._up.model, "prompt": "one", "max_tokens": 2}
        answered: float | None = None
        while time.monotonic() - began < READY_SECONDS:
            with contextlib.suppress(httpx.TransportError):
                if answered is None:
                    response = await self._http.post("/v1/completions", json=body)
                    if response.status_code == 200:
                        answered = time.monotonic() - began
                if answered is not None:
                    ready = await self._http.get("/ready")
                    if ready.status_code == 200:
                        return answered, time.monotonic() - began
                else:
                    await self._load_if_given_up()
            await asyncio.sleep(0.1)
        self._load.wrong.append("the service did not recover")
        return READY_SECONDS, READY_SECONDS

    async def _load_if_given_up(self) -> None:
        """As the operator does who has killed one host five times within a minute."""
        ready = (await self._http.get("/ready")).json()
        if ready.get("models", {}).get(self._up.model, {}).get("state") == "failed":
            self.loaded_by_hand += 1
            await self._http.post(f"/v1/models/{self._up.model}/load")

    async def _send(self, kind: str, number: int) -> bool:
        """Signal a process and wait for its end."""
        process = self._up.find(kind)
        if process is None:
            return False
        if kind == "api" and number == signal.SIGKILL:
            self._load.api_was_killed()
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)
        with contextlib.suppress(psutil.TimeoutExpired):
            await asyncio.to_thread(process.wait, READY_SECONDS)
        return True

    async def kill_engine(self) -> bool:
        return await self._send("engine", signal.SIGKILL)

    async def kill_worker(self) -> bool:
        return await self._send("worker", signal.SIGKILL)

    async def end_worker(self) -> bool:
        return await self._send("worker", signal.SIGTERM)

    async def kill_job(self) -> bool:
        return await self._send("job", signal.SIGKILL)

    async def kill_api(self) -> bool:
        return await self._send("api", signal.SIGKILL)

    async def end_api(self) -> bool:
        return await self._send("api", signal.SIGTERM)

    async def restart_engine(self) -> bool:
        path = f"/v1/models/{self._up.model}/restart"
        try:
            response = await self._http.post(path, timeout=60.0)
        except httpx.TransportError:
            return False
        return response.status_code == 200

    async def kill_everything(self) -> bool:
        assert self._up.process is not None
        self._load.api_was_killed()
        self._up.process.kill()
        self._up.process.wait()
        self._up.start()
        return True

    async def restart_everything(self) -> bool:
        assert self._up.process is not None
        self._up.process.terminate()
        await asyncio.to_thread(self._up.process.wait)
        self._up.start()
        return True

    async def aclose(self) -> None:
        await self._http.aclose()


FAULTS: dict[str, tuple[Callable[[Faults], Awaitable[bool]], int]] = {
    "engine host, SIGKILL": (Faults.kill_engine, 4),
    "engine host, restarted by the operator": (Faults.restart_engine, 4),
    "worker, SIGKILL": (Faults.kill_worker, 3),
    "worker, SIGTERM": (Faults.end_worker, 2),
    "job, SIGKILL": (Faults.kill_job, 3),
    "API, SIGKILL": (Faults.kill_api, 3),
    "API, SIGTERM": (Faults.end_api, 3),
    "everything, SIGKILL": (Faults.kill_everything, 1),
    "everything, SIGTERM": (Faults.restart_everything, 1),
}
"""What each does, which tells whether it found a victim; and how often it is drawn."""


def load_seconds(home: Path, model: str) -> list[float]:
    """What the hosts said that loading took."""
    found = []
    for line in (home / "logs" / f"engine-{model}.log").read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError, TypeError, KeyError):
            found.append(float(json.loads(line)["load_seconds"]))
    return found


def report(load: Load, faults: Faults, lost: list[str], loads: list[float], seconds: float) -> str:
    total = sum(len(found) for found in faults.seconds.values())
    silent = [line for line in load.wrong if "cut" in line or "silent" in line]
    lines = [
        f"{total} faults in {seconds:.0f} s, {platform.machine()}, {os.cpu_count()} cores",
        "",
        f"- accepted jobs: {len(load.jobs)}, lost: {len(lost)}; failed, as told, for three lost attempts in a row: "
        f"{len(load.given_up)}",
        f"- silent cuts: {len(silent)}; otherwise wrong: {len(load.wrong) - len(silent)}",
        f"- whole answers: {sum(load.answered.values())}; errors told: {sum(load.told.values())}; connections that a "
        f"killed API process broke: {load.broken}",
        f"- a model load takes {statistics.median(loads):.1f} s (median of {len(loads)}); hosts given up after five "
        f"crashes within a minute and loaded by hand: {faults.loaded_by_hand}",
        "",
        "| fault | times | answers again (s, median, max) | ready again (s, median, max) |",
        "|---|---|---|---|",
    ]
    for name, found in sorted(faults.seconds.items()):
        answered, ready = zip(*found, strict=True)
        cells = [f"{statistics.median(v):.1f}, {max(v):.1f}" for v in (answered, ready)]
        lines.append(f"| {name} | {len(found)} | {' | '.join(cells)} |")
    lines += ["", "| what clients saw | times |", "|---|---|"]
    lines += [f"| {kind} | {count} |" for kind, count in sorted(load.answered.items())]
    lines += [f"| {code} | {count} |" for code, count in sorted(load.told.items())]
    lines += ["", *(f"- **lost** {line}" for line in lost)]
    lines += [f"- **wrong** {line}" for line in load.wrong]
    return "\n".join(lines)


async def run(up: Up, count: int, seed: int) -> int:
    load = Load(up.url, up.model)
    faults = Faults(up, load)
    draw = random.Random(seed)
    up.start()
    first = await faults.recovery(time.monotonic())
    print(f"first start: answers after {first[0]:.1f} s", file=sys.stderr)
    began = time.monotonic()
    async with load.running():
        for number in range(count):
            await faults.one(draw)
            if number % 10 == 9:
                print(f"{number + 1} faults, {len(load.wrong)} wrong", file=sys.stderr)
    await faults.recovery(time.monotonic())
    lost = await load.lost_jobs()
    loads = load_seconds(up.home, up.model)
    print(report(load, faults, lost, loads, time.monotonic() - began))
    await load.aclose()
    await faults.aclose()
    return 1 if lost or load.wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--home", type=Path, help="of `--model`; default: one of its own")
    parser.add_argument("--model", default="small")
    parser.add_argument("--logs", type=Path, help="a folder to keep the service's logs in")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = arguments.home or Path(folder)
        if arguments.home is None:
            write_small_model(home, arguments.model)
        up = Up(home, arguments.model)
        try:
            return asyncio.run(run(up, arguments.faults, arguments.seed))
        finally:
            if up.process is not None:
                up.process.terminate()
                up.process.wait()
            if arguments.logs is not None:
                shutil.copytree(home / "logs", arguments.logs, dirs_exist_ok=True)
                shutil.copy(home / "up.log", arguments.logs)


if __name__ == "__main__":
    sys.exit(main())
