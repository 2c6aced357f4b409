"""The enrich job against an engine host that echoes: results, the ledger, kill -9, and what can go away meanwhile."""

import asyncio
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import count, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pyarrow as pa
import pytest
from lathe_client.arrow import read_all
from lathe_client.results import join

from compression.import_model import import_folder
from compression.registry import ModelRegistry
from engines.client import EngineClient
from engines.protocol import EmbedRequest, EmbedResult, EngineError, EngineStats, ErrorCode
from graph import nodes
from graph.store import GraphStore
from graph.upload import columns_from_lists
from graph.user_prompts import UserPrompts
from jobs.context import JobCancelledError, JobFailedError, RunnerContext
from jobs.file_check import FileContentError, check_file, read_nodes
from jobs.files import FileStore
from jobs.runners import enrich
from jobs.runners.enrich_ledger import Ledger
from jobs.spec import SpecError, parse_spec, spec_json
from jobs.sqlite import SqliteJobStore
from jobs.states import JobStatus
from jobs.store import JsonObject, NewJob
from jobs.usage import UsageStore
from jobs.worker import Worker, WorkerConfig
from tests.jobs.conftest import REPOSITORY, child_environment, wait_until

NUM_NODES = 30
SEATS = 4
"""Requests that the host runs at once."""
IDS = [f"n{i}" for i in range(NUM_NODES)]
TEXTS = ["", "abc", "abc", *(f"{chr(97 + i % 26)}{chr(97 + i // 26)}z" for i in range(3, 30))]


class Host:
    """An engine host process that serves a model of a home."""

    def __init__(
        self,
        home: Path,
        model: str = "tiny",
        *,
        step_seconds: float = 0.0,
        hold_at: int = 0,
        hold_file: Path | None = None,
    ) -> None:
        self.socket = home / "run" / f"{model}.sock"
        self._step_seconds = step_seconds
        self._hold = ["--hold-at", str(hold_at), "--hold-file", str(hold_file)] if hold_file else []
        self.start()

    def start(self) -> None:
        self.socket.parent.mkdir(exist_ok=True)
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "tests.fakes.echo_host", "--socket", str(self.socket)),
                *("--max-model-len", "2048", "--max-num-seqs", str(SEATS)),
                *("--step-seconds", str(self._step_seconds)),
                *self._hold,
            ],
            env={**child_environment(), "LATHE_PARENT_PID": "0"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_until(self.socket.exists)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.socket.unlink(missing_ok=True)

    async def stats(self) -> EngineStats:
        client = await EngineClient.connect(self.socket)
        try:
            return await client.stats()
        finally:
            await client.aclose()


@pytest.fixture(scope="module")
def tiny_home(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    import_folder(ModelRegistry(home / "models"), "tiny", tiny_llama, report=lambda _: None)
    return home


@pytest.fixture
def home(tiny_home: Path, tmp_path: Path) -> Path:
    home = tmp_path / "home"
    shutil.copytree(tiny_home, home)
    return home


@pytest.fixture
def host(home: Path) -> Iterator[Host]:
    host = Host(home)
    yield host
    host.kill()


@pytest.fixture
def slow_host(home: Path) -> Iterator[Host]:
    host = Host(home, step_seconds=0.01)
    yield host
    host.kill()


@pytest.fixture
def held_host(home: Path) -> Iterator[Host]:
    """Generates no more than three answers per seat while `home / "hold"` is there."""
    hold_file = home / "hold"
    hold_file.touch()
    host = Host(home, hold_at=3 * SEATS * 8, hold_file=hold_file)
    yield host
    host.kill()


def create_graph(home: Path, ids: Sequence[Any] = IDS) -> str:
    columns = columns_from_lists(
        ids=ids,
        texts=TEXTS,
        labels=[None] * NUM_NODES,
        splits=[None] * NUM_NODES,
        edges=list(pairwise(ids)),
    )
    GraphStore(home / "graphs").create(
        "graph-1", columns, name="letters", owner="me", request_hash="h", directed=False
    )
    return "graph-1"


def spec_of(**fields: Any) -> JsonObject:
    body = {
        "type": "enrich",
        "graph": "graph-1",
        "prompt": "summary@1",
        "model": "tiny",
        "embedding_model": "tiny",
        "return": ["text", "embedding"],
        "embedding_dtype": "float32",
        "max_tokens": 8,
    }
    given = {name: value for name, value in {**body, **fields}.items() if value is not None}
    return spec_json(parse_spec(given))


def context_of(
    home: Path,
    *,
    job_id: str = "job-1",
    owner: str = "me",
    on_progress: Callable[[int], None] = lambda step: None,
    **fields: Any,
) -> RunnerContext:
    folder = home / "jobs" / job_id
    folder.mkdir(parents=True, exist_ok=True)

    def send(message: JsonObject) -> None:
        if "progress" in message:
            on_progress(message["progress"][0])

    return RunnerContext(
        job_id=job_id, owner=owner, attempt=1, spec=spec_of(**fields), folder=folder, home=home,
        send=send,
    )  # fmt: skip


def rows_of(context: RunnerContext) -> list[dict[str, Any]]:
    with pa.ipc.open_stream((context.artifacts / "enriched.arrow").read_bytes()) as reader:
        table = reader.read_all()
    table.validate(full=True)
    rows: list[dict[str, Any]] = table.to_pylist()
    lines = (context.artifacts / "enriched.jsonl").read_text().splitlines()
    for row, line in zip(rows, map(json.loads, lines), strict=True):
        same = ("node_id", "status", "text", "tokens_in", "tokens_out")
        assert [row[name] for name in same] == [line[name] for name in same]
        assert (row["embedding"] is None) == (line["embedding"] is None)
    return rows


def results_of(rows: list[dict[str, Any]]) -> list[Any]:
    """What must not depend on how a job came to its end."""
    return [(row["node_id"], row["text"], row["embedding"], row["error_code"]) for row in rows]


def statuses(rows: list[dict[str, Any]]) -> list[str]:
    return [row["status"] for row in rows]


def test_a_graph(home: Path, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enrich, "PIECE", 7)
    create_graph(home)
    steps: list[int] = []
    context = context_of(home, on_progress=steps.append)
    result = enrich.run(context)
    rows = rows_of(context)
    assert [row["node_id"] for row in rows] == [f"n{i}" for i in range(NUM_NODES)]
    assert statuses(rows) == ["failed", "ok", "cached", *["ok"] * 27]
    assert len({tuple(row["embedding"]) for row in rows[2:]}) > 20  # each is of its own text
    assert steps == sorted(steps)
    assert steps[-1] == NUM_NODES
    usage = result["usage"]
    assert usage["num_by_status"]["ok"] == 28
    assert usage["prompt_tokens"] == sum(row["tokens_in"] for row in rows if row["status"] == "ok")
    assert usage["completion_tokens"] == 28 * 8
    assert usage["cached_tokens"] == rows[1]["tokens_in"] + 8
    assert usage["embedding_tokens"] > 0
    assert result["artifacts"] == ["enriched.arrow", "enriched.jsonl"]
    assert result["prompt"]["id"] == "summary"
    counted = {row.operation: row.counters for row in UsageStore(home / "usage.db").read("me")}
    assert counted["generate"].requests == 28
    assert counted["generate"].prompt_tokens == usage["prompt_tokens"]
    assert counted["generate"].completion_tokens == usage["completion_tokens"]
    assert counted["embed"].prompt_tokens == usage["embedding_tokens"]
    assert (counted["enrich"].items, counted["enrich"].cached_items) == (30, 1)
    assert counted["enrich"].cached_tokens == usage["cached_tokens"]


@pytest.mark.anyio
async def test_a_second_run_asks_no_engine(home: Path, host: Host) -> None:
    create_graph(home)
    first, second = context_of(home), context_of(home, job_id="job-2")
    enrich_in_thread(first)
    before = await host.stats()
    result = enrich_in_thread(second)
    after = await host.stats()
    assert before.prompt_tokens_total > 0
    assert after.prompt_tokens_total == before.prompt_tokens_total
    assert after.generation_tokens_total == before.generation_tokens_total
    assert result["usage"]["total_tokens"] == result["usage"]["embedding_tokens"] == 0
    assert statuses(rows_of(second)) == ["failed", *["cached"] * 29]
    assert results_of(rows_of(second)) == results_of(rows_of(first))


def enrich_in_thread(context: RunnerContext) -> JsonObject:
    """A runner has an event loop of its own."""
    results: list[JsonObject] = []
    thread = threading.Thread(target=lambda: results.append(enrich.run(context)))
    thread.start()
    thread.join()
    return results[0]


@pytest.mark.anyio
async def test_kill_9_and_go_on(
    home: Path, held_host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real worker and a real child, which is killed when some rows are in the ledger, and others are not made."""
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    create_graph(home)
    store = SqliteJobStore(home / "lathe.db")
    stop = threading.Event()
    worker = threading.Thread(
        target=Worker(store, WorkerConfig(home=home, heartbeat_seconds=0.2)).run, args=(stop,)
    )
    worker.start()
    try:
        store.create(
            NewJob(id="job-1", type="enrich", owner="me", spec=spec_of(), request_hash="h")
        )
        wait_until(lambda: store.get("job-1").progress_step >= 6)
        (child,) = (p for p in psutil.Process().children() if "jobs.child" in p.cmdline())
        child.kill()
        (home / "hold").unlink()
        wait_until(lambda: store.get("job-1").finished_at is not None)
        job = store.get("job-1")
        events = [event.message for event in store.events("job-1")]
    finally:
        stop.set()
        worker.join()
        store.close()
    assert (job.status, job.attempt) == (JobStatus.SUCCEEDED, 2), job.error
    assert any("going on behind" in message for message in events)
    killed = context_of(home)
    rows = rows_of(killed)
    assert [row["node_id"] for row in rows] == [f"n{i}" for i in range(NUM_NODES)]

    # All texts have three tokens, so all prompts are as long: tokens count calls.
    (length,) = {row["tokens_in"] for row in rows if row["tokens_in"]}
    num_calls = (await held_host.stats()).prompt_tokens_total / length
    assert 28 <= num_calls <= 28 + SEATS  # those that were running when it was killed
    assert job.result is not None
    assert job.result["usage"]["num_by_status"]["failed"] == 1

    (home / "cache.db").unlink()  # as if nothing had been asked before
    whole = context_of(home, job_id="job-2")
    enrich_in_thread(whole)
    assert results_of(rows) == results_of(rows_of(whole))


def test_nodes_by_id_in_their_order(home: Path, host: Host) -> None:
    create_graph(home)
    context = context_of(home, node_ids=["n5", "n1", "n9"])
    enrich.run(context)
    assert [row["node_id"] for row in rows_of(context)] == ["n5", "n1", "n9"]


def test_selected_nodes_best_first(home: Path, host: Host) -> None:
    create_graph(home)
    select = {"strategy": "text_length", "order": "high", "budget": {"nodes": 4}}
    context = context_of(home, select=select)
    enrich.run(context)
    assert [row["node_id"] for row in rows_of(context)] == ["n1", "n2", "n3", "n4"]


@pytest.mark.parametrize("ids", [IDS, range(NUM_NODES)], ids=["string", "int64"])
@pytest.mark.parametrize("outputs", [["text"], ["text", "embedding"]], ids="+".join)
def test_a_selection_that_chooses_nothing(
    home: Path, host: Host, ids: Sequence[Any], outputs: list[str]
) -> None:
    create_graph(home, ids)
    fields: dict[str, Any] = {"return": outputs}
    select = {"strategy": "random", "budget": {"tokens": 1}}
    context = context_of(home, select=select, **fields)
    usage = enrich.run(context)["usage"]
    assert (usage["num_nodes"], usage["total_tokens"], usage["embedding_tokens"]) == (0, 0, 0)
    assert rows_of(context) == []
    enriched = read_all((context.artifacts / "enriched.arrow").read_bytes())
    kind = pa.int64() if ids[0] == 0 else pa.string()
    assert enriched.table.schema.field("node_id").type == kind
    assert (list(enriched.rows()), enriched.node_ids) == ([], [])
    assert enriched.usage is not None
    assert enriched.usage.num_by_status["ok"] == 0
    if "embedding" in outputs:
        whole = context_of(home, job_id="job-2", node_ids=[ids[1]], **fields)
        enrich.run(whole)
        more = read_all((whole.artifacts / "enriched.arrow").read_bytes())
        assert enriched.embeddings.shape == (0, more.dim)
        assert len(join([enriched, more])) == 1


CLUSTERS = {"strategy": "clustering_distance", "num_clusters": 3, "budget": {"nodes": 9}}


def test_a_selection_that_encodes_texts_is_kept(home: Path, host: Host) -> None:
    """A second attempt keeps to what the first one chose, here after a kill before the first row."""
    create_graph(home)
    context = context_of(home, select=CLUSTERS)
    enrich.run(context)
    first = [row["node_id"] for row in rows_of(context)]
    kept = context.folder / "selected.json"
    chosen = json.loads(kept.read_text())
    assert first == [f"n{index}" for index in chosen]
    assert len(set(chosen)) == 9
    for path in context.folder.glob("ledger.db*"):
        path.unlink()
    kept.write_text(json.dumps(chosen[::-1]))  # as an older version chose
    enrich.run(context)
    assert [row["node_id"] for row in rows_of(context)] == first[::-1]


class Falters:
    """An encoder whose engine is lost before every call that is not repeated."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, code: ErrorCode) -> None:
        embed = EngineClient.embed

        async def falter(client: EngineClient, request: EmbedRequest) -> EmbedResult:
            if request.token_ids not in self._lost:
                self._lost.append(request.token_ids)
                raise EngineError(code, "lost")
            return await embed(client, request)

        self._lost: list[Any] = []
        monkeypatch.setattr(EngineClient, "embed", falter)

    @property
    def num_lost(self) -> int:
        return len(self._lost)


@pytest.mark.parametrize("code", sorted(enrich.TRANSIENT))
def test_a_selection_waits_for_an_engine(
    home: Path, host: Host, monkeypatch: pytest.MonkeyPatch, code: ErrorCode
) -> None:
    """However often it is lost, as long as texts are encoded in between."""
    monkeypatch.setattr("graph.text_vectors.BATCH", 6)
    monkeypatch.setattr(enrich, "_RETRY_SECONDS", 0)
    monkeypatch.setattr(enrich, "ENGINE_SECONDS", 0)  # each second wait in a row is one too many
    monkeypatch.setattr(enrich, "time", SimpleNamespace(monotonic=count(1).__next__))
    create_graph(home)
    falters = Falters(monkeypatch, code)
    fields: dict[str, Any] = {"return": ["text"], "select": CLUSTERS}
    context = context_of(home, **fields)
    assert enrich.run(context)["usage"]["num_nodes"] == 9
    assert falters.num_lost == 5


def test_a_selection_whose_engine_stays_away(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enrich, "_RETRY_SECONDS", 0)
    monkeypatch.setattr(enrich, "ENGINE_SECONDS", 3)
    clock = count(1)
    monkeypatch.setattr(enrich, "time", SimpleNamespace(monotonic=clock.__next__))
    create_graph(home)
    with pytest.raises(JobFailedError, match="stayed away") as caught:
        enrich.run(context_of(home, select=CLUSTERS))
    assert caught.value.code == "engine_unavailable"
    assert next(clock) == 6


def test_a_selection_whose_engine_refuses(
    home: Path, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_graph(home)
    Falters(monkeypatch, "invalid_value")
    with pytest.raises(JobFailedError, match=r"lost\Z") as caught:
        enrich.run(context_of(home, select=CLUSTERS))
    assert caught.value.code == "engine_unavailable"


def test_a_piece_is_as_large_as_its_texts_allow(
    home: Path, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_graph(home)
    parts: list[int] = []
    whole = nodes.nodes_of_graph

    def nodes_of_graph(graph: Any, indices: Any, prompt: Any) -> Any:
        parts.append(len(indices))
        return whole(graph, indices, prompt)

    monkeypatch.setattr(enrich, "nodes_of_graph", nodes_of_graph)
    monkeypatch.setattr(nodes, "MAX_TEXT_BYTES_AT_ONCE", 12)  # texts are 3 long, but the first
    context = context_of(home)
    enrich.run(context)
    assert [row["node_id"] for row in rows_of(context)] == [f"n{i}" for i in range(NUM_NODES)]
    assert parts == [5, 4, 4, 4, 4, 4, 4, 1]


def test_a_graph_of_too_many_classes(
    home: Path, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_graph(home)
    monkeypatch.setattr(nodes, "MAX_CLASSES", -1)
    with pytest.raises(JobFailedError) as caught:
        enrich.run(context_of(home, prompt="pseudo_label@1"))
    assert caught.value.code == "invalid_value"


def test_neighbours_of_the_graph_are_read(home: Path, host: Host) -> None:
    create_graph(home)
    context = context_of(home, node_ids=["n5", "n0"], prompt="digest@1")
    enrich.run(context)
    with pa.ipc.open_stream((context.artifacts / "enriched.arrow").read_bytes()) as reader:
        assert reader.read_all().column("neighbors_used").to_pylist() == [2, 0]


def test_budgets_hold_for_the_whole_job(
    home: Path, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(enrich, "PIECE", 4)
    create_graph(home)
    context = context_of(home, budget={"max_nodes": 10})
    assert enrich.run(context)["usage"]["stopped_by"] == "max_nodes"
    rows = rows_of(context)
    assert statuses(rows[10:]) == ["skipped_budget"] * 20
    assert "skipped_budget" not in statuses(rows[:10])

    (home / "cache.db").unlink()
    cost = rows[1]["tokens_in"] + rows[1]["tokens_out"]
    context = context_of(home, job_id="job-2", budget={"max_tokens": 9 * cost})
    result = enrich.run(context)
    assert result["usage"]["total_tokens"] == 9 * cost
    assert result["usage"]["stopped_by"] == "max_tokens"
    assert statuses(rows_of(context)).count("ok") == 9

    (home / "cache.db").unlink()
    budget = {"max_cost": 9 * cost * 0.29 / 1e6, "cost_per_million_tokens": 0.29}
    context = context_of(home, job_id="job-4", budget=budget)
    result = enrich.run(context)
    assert (result["usage"]["total_tokens"], result["usage"]["stopped_by"]) == (
        9 * cost,
        "max_cost",
    )

    context = context_of(home, job_id="job-3", budget={"max_seconds": 1e-6}, max_tokens=9)
    assert enrich.run(context)["usage"]["stopped_by"] == "max_seconds"
    assert set(statuses(rows_of(context))) == {"failed", "skipped_budget"}


def test_a_budget_counts_what_the_attempt_before_spent(home: Path, host: Host) -> None:
    create_graph(home)
    probe = context_of(home, job_id="probe", node_ids=["n1"])
    cost = enrich.run(probe)["usage"]["total_tokens"]
    (home / "cache.db").unlink()
    stopping = stop_at(context_of(home, budget={"max_tokens": 12 * cost}), 6)
    with pytest.raises(JobCancelledError):
        enrich.run(stopping)
    result = enrich.run(context_of(home, budget={"max_tokens": 12 * cost}))
    assert 11 * cost <= result["usage"]["total_tokens"] <= 12 * cost


def stop_at(context: RunnerContext, step: int) -> RunnerContext:
    """The same, cancelled once so many nodes are finished."""
    reached = threading.Event()

    def send(message: JsonObject) -> None:
        if message.get("progress", [0])[0] >= step:
            reached.set()

    return RunnerContext(
        job_id=context.job_id, owner=context.owner, attempt=1, spec=context.spec, folder=context.folder,
        home=context.home, send=send, cancelled=reached.is_set,
    )  # fmt: skip


def test_cancelling_aborts_what_runs(home: Path, slow_host: Host) -> None:
    create_graph(home)
    with pytest.raises(JobCancelledError):
        enrich.run(stop_at(context_of(home), 5))
    wait_until(lambda: asyncio.run(slow_host.stats()).num_requests_running == 0)


def test_a_graph_deleted_meanwhile_ends_the_job(home: Path, slow_host: Host) -> None:
    graph_id = create_graph(home)

    def delete(step: int) -> None:
        if step >= 5 and (home / "graphs" / graph_id).exists():
            GraphStore(home / "graphs").delete(graph_id, "me")

    with pytest.raises(JobFailedError) as caught:
        enrich.run(context_of(home, on_progress=delete, max_tokens=200))
    assert caught.value.code == "graph_not_found"


def test_somebody_elses_graph_is_not_found(home: Path, host: Host) -> None:
    create_graph(home)
    with pytest.raises(JobFailedError) as caught:
        enrich.run(context_of(home, owner="somebody"))
    assert caught.value.code == "graph_not_found"


def test_a_killed_engine_is_waited_for(home: Path, slow_host: Host) -> None:
    create_graph(home)
    begun = threading.Event()
    context = context_of(home, on_progress=lambda step: begun.set() if step >= 5 else None)
    thread = threading.Thread(target=enrich.run, args=(context,))
    thread.start()
    assert begun.wait(60)
    slow_host.kill()
    slow_host.start()
    thread.join()
    assert statuses(rows_of(context)).count("failed") == 1  # the empty text


def test_an_engine_that_stays_away(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enrich, "ENGINE_SECONDS", 0.2)
    monkeypatch.setattr(enrich, "_RETRY_SECONDS", 0.05)
    create_graph(home)
    with pytest.raises(JobFailedError) as caught:
        enrich.run(context_of(home))
    assert caught.value.code == "engine_unavailable"


def test_other_weights_under_the_same_name_are_refused(home: Path, host: Host) -> None:
    create_graph(home)
    context = context_of(home, node_ids=["n1"])
    enrich.run(context)
    ledger = Ledger(context.folder / "ledger.db")
    for name in ("model checkpoint", "embedding_model checkpoint"):
        found = ledger.fact(name, None)
        ledger.add([], {name: "another hash"})
        with pytest.raises(JobFailedError) as caught:
            enrich.run(context_of(home))  # the same job's next attempt, with nodes left
        assert caught.value.code == "model_changed"
        ledger.add([], {name: found})
    ledger.close()
    enrich.run(context_of(home))


MINE: dict[str, Any] = {
    "id": "mine",
    "kind": "summary",
    "description": "of my own",
    "inputs": ["text", "tone"],
    "max_tokens": 8,
    "max_text_tokens": 100,
    "max_neighbors": 0,
    "max_neighbor_tokens": 0,
    "output": {"type": "text"},
    "messages": [
        {"role": "user", "content": "<tone>\n{tone}\n</tone>\n<text>\n{text}\n</text>\nsay it"}
    ],
}


def test_a_prompt_of_ones_own(home: Path, host: Host) -> None:
    create_graph(home)
    prompts = UserPrompts(home / "prompts")
    prompts.create("me", MINE)
    context = context_of(home, prompt="mine@1", node_ids=["n1"], variables={"tone": "mild"})
    assert enrich.run(context)["prompt"]["id"] == "mine"
    with pytest.raises(JobFailedError) as caught:  # the variable is missing
        enrich.run(context_of(home, job_id="job-2", prompt="mine@1"))
    assert caught.value.code == "invalid_value"
    prompts.delete("me", "mine")
    with pytest.raises(JobFailedError) as caught:
        enrich.run(context_of(home, job_id="job-3", prompt="mine@1", variables={"tone": "mild"}))
    assert caught.value.code == "prompt_not_found"


def add_file(home: Path, content: bytes, file_id: str = "file-1") -> None:
    store = FileStore(home / "files")
    with store.begin() as upload:
        upload.write(content)
        store.add(
            upload, file_id=file_id, owner="me", filename="nodes.jsonl", purpose="enrich",
            request_hash="h", max_owner_bytes=10**6,
        )  # fmt: skip


def test_a_file_of_nodes(home: Path, host: Host) -> None:
    add_file(home, b'{"id": 7, "text": "abc", "neighbors": ["xy"]}\n{"id": 8, "text": "def"}\n')
    context = context_of(home, graph=None, file="file-1", prompt="digest@1")
    enrich.run(context)
    rows = rows_of(context)
    assert [row["node_id"] for row in rows] == [7, 8]
    assert [row["neighbors_used"] for row in rows] == [1, 0]
    with pytest.raises(JobFailedError) as caught:
        enrich.run(context_of(home, job_id="job-2", graph=None, file="file-2"))
    assert caught.value.code == "file_not_found"


@pytest.mark.parametrize(
    ("lines", "code", "message"),
    [
        (
            [{"id": "a", "text": "b"}, {"id": "c", "text": "d", "variables": {"tone": "mild"}}],
            "invalid_value",
            "variables of node 'c': summary@1 has no variable 'tone'",
        ),
        (  # of before such a file was refused
            [{"id": "a", "text": "b"}, {"id": "\ud800", "text": "b"}],
            "invalid_file",
            "file-1: line 2: 'id' must be valid Unicode",
        ),
    ],
)
def test_files_that_cannot_be_worked_on(
    home: Path, host: Host, lines: list[JsonObject], code: str, message: str
) -> None:
    add_file(home, "\n".join(map(json.dumps, lines)).encode())
    with pytest.raises(JobFailedError, match=message) as caught:
        enrich.run(context_of(home, graph=None, file="file-1"))
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file is empty"),
        ("\n", "no line"),
        ('{"id": 1}', "line 1: Object missing required field `text`"),
        ('{"id": 1, "text": "a"}\n{"id": 1, "text": "b"}', "line 2: its id was on a line before"),
        ('{"id": 1, "text": "a"}\n{"id": "1", "text": "b"}', "line 2: ids must all be"),
        ('{"id": true, "text": "a"}', "line 1"),
        ('{"id": "", "text": "a"}', "line 1"),
        ('{"id": 1, "text": "a", "label": "x"}', "unknown field `label`"),
        ('{"id": 1, "text": 5}', "line 1"),
        ('{"id": 1, "text": "a", "neighbors": [2]}', "line 1"),
        ('["id"]', "line 1: not a JSON object"),
        ('{"id": "\\ud800", "text": "a"}', "line 1: 'id' must be valid Unicode"),
        (
            '{"id": 1, "text": "a"}\n{"id": 2, "text": "\\ud800"}',
            "line 2: 'text' must be valid Unicode",
        ),
        (
            '{"id": 1, "text": "a", "neighbors": ["\\udc00"]}',
            "line 1: 'neighbors' must be valid Unicode",
        ),
        (
            '{"id": 1, "text": "a", "variables": {"a": "\\ud800"}}',
            "line 1: 'variables' must be valid",
        ),
        (
            '{"id": 1, "text": "a", "variables": {"\\ud800": "a"}}',
            "line 1: 'variables' must be valid",
        ),
        ('{"id": 1, "text": "a", "\\ud800": 1}', "line 1: .* must be valid Unicode"),
    ],
)
def test_files_that_hold_no_nodes(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "nodes.jsonl"
    path.write_text(content)
    with pytest.raises(FileContentError, match=message):
        check_file(path, "enrich")


def test_nodes_of_a_file_as_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "nodes.jsonl"
    path.write_text(
        '{"id": "a", "text": ""}\n\n{"id": "b", "text": "t", "neighbors": ["x", "y"]}\n'
    )
    first, second = read_nodes(path)
    assert (first.id, first.text, first.neighbors) == ("a", "", ())
    assert second.neighbors == ("x", "y")


SELECT = {"strategy": "random", "budget": {"nodes": 1}}


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"graph": None}, "graph", "invalid_value"),
        ({"file": "file-1"}, "graph", "invalid_value"),
        ({"graph": None, "file": "file-1", "node_ids": ["a"]}, "node_ids", "invalid_value"),
        ({"graph": None, "file": "file-1", "select": SELECT}, "select", "invalid_value"),
        ({"node_ids": ["a"], "select": SELECT}, "select", "invalid_value"),
        ({"select": {**SELECT, "strategy": "best"}}, "select.strategy", "invalid_value"),
        ({"return": ["text", "text"]}, "return", "invalid_value"),
        ({"return": ["image"]}, "return[0]", "invalid_value"),
        ({"node_ids": []}, "node_ids", "invalid_value"),
        ({"prompt": None}, "prompt", "invalid_value"),
        ({"priority": "high"}, "priority", "invalid_value"),
        ({"budget": {"max_gold": 1}}, "budget.max_gold", "unsupported_parameter"),
        ({"output": "x"}, "output", "unsupported_parameter"),
        ({"temperature": 1}, "temperature", "unsupported_parameter"),
    ],
)
def test_bad_specifications(fields: dict[str, Any], param: str, code: str) -> None:
    with pytest.raises(SpecError) as caught:
        spec_of(**fields)
    assert (caught.value.param, caught.value.code) == (param, code)
