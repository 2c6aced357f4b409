"""What the E-LLaGNN example asks the service for, and what it keeps of that on this machine."""

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, Self, cast

import numpy as np
import pytest
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from lathe_client import EnrichmentClient, RetryPolicy, StoreMismatchError

import examples.e_llagnn.__main__ as example
from examples.e_llagnn import studies
from examples.e_llagnn.collect import ENCODER, Recipe, Source
from examples.e_llagnn.graphs import Split, TextGraph
from examples.e_llagnn.studies import Lab, Rows, RowsError, Run
from tests.client.conftest import serve

RECIPE = Recipe(prompt="summary@1", model="writer", join="separate", max_tokens=8)
RUN = Run(study="budgets", split="public", seed=0)
DEADLINE_SECONDS = 20.0
REFUSAL = {"error": {"message": "no model 'e'", "code": "model_not_found", "param": "model"}}


def build_graph(*texts: str, labels: tuple[int, ...] = (0, 1, 0)) -> TextGraph:
    one = np.array([0])
    return TextGraph(
        name="letters (of a test)",
        ids=["a", "b", "c"],
        texts=list(texts) or ["one", "two", "three"],
        labels=np.array(labels),
        classes=["x", "y"],
        edges=np.array([[0, 1], [1, 2]]),
        splits={"public": Split(train=one, val=one + 1, test=one + 2)},
    )


class Refusals:
    """A service that answers nothing but errors, of these statuses; then 404."""

    def __init__(self, *statuses: int) -> None:
        self.statuses = list(statuses)
        self.num_asked = 0
        self.app = FastAPI()
        self.app.add_api_route("/v1/embeddings", self.embeddings, methods=["POST"])

    async def embeddings(self) -> JSONResponse:
        self.num_asked += 1
        return JSONResponse(REFUSAL, self.statuses.pop(0) if self.statuses else 404)


@pytest.fixture
def refusals() -> Refusals:
    return Refusals(503, 429)


@pytest.fixture
def url(refusals: Refusals) -> Iterator[str]:
    with serve(refusals.app) as url:
        yield url


def test_a_refusal_is_one_line_after_the_retries_that_make_sense(
    url: str,
    refusals: Refusals,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def impatient(url: str, graph: TextGraph, folder: Path, api_key: str | None) -> Source:
        source = Source(url, graph, folder, api_key)
        source.client.close()
        source.client = EnrichmentClient(url, api_key, retry=RetryPolicy(first_seconds=0))
        return source

    monkeypatch.setattr(example, "Source", impatient)
    monkeypatch.setattr(example, "load_debian", lambda _: build_graph())
    with pytest.raises(SystemExit) as ended:
        example.main(["--url", url, "--work", str(tmp_path)])
    assert ended.value.code == "error: no model 'e' (parameter model) [404 model_not_found]"
    assert refusals.num_asked == 3


class ScriptedClient:
    """Vectors that say how long a text is, a ranking, and a neighbour of each node."""

    def __init__(self, ranking: str = "abc") -> None:
        self.ranking = ranking
        self.asked: list[str] = []

    def close(self) -> None:
        pass

    def embeddings(self, texts: list[str], *, model: str, truncate: bool) -> Any:
        assert model == ENCODER
        assert truncate
        self.asked.append("embeddings")
        return np.array([[len(text), 1] for text in texts], np.float32)

    def create_graph(self, name: str, *_: Any, **__: Any) -> Any:
        return SimpleNamespace(id=f"graph-{name}")

    def sample(self, *_: Any, **__: Any) -> dict[str, Any]:
        self.asked.append("sample")
        kept = {"a": "b", "b": "a", "c": "b"}
        data = [{"node_id": i, "kept": [{"node_id": kept[i]}]} for i in kept]
        return {"data": data, "usage": {"judged": 4}}

    def select(self, *_: Any, **__: Any) -> Any:
        self.asked.append("select")
        return SimpleNamespace(node_ids=list(self.ranking))


ASKED: list[Callable[[Source], Any]] = [
    lambda source: source.raw(),
    lambda source: source.ranking("degree"),
    lambda source: source.sample("embed", fanout=1, seed=0),
]


def build_source(folder: Path, graph: TextGraph, client: ScriptedClient) -> Source:
    source = Source("http://127.0.0.1:9", graph, folder)
    source.close()
    source.client = cast(Any, client)
    return source


@pytest.mark.parametrize("other", [build_graph("1", "two", "three"), build_graph(labels=(0, 0, 1))])
def test_graphs_of_one_name_are_kept_apart(tmp_path: Path, other: TextGraph) -> None:
    first = build_source(tmp_path, build_graph(), ScriptedClient())
    second = build_source(tmp_path, other, ScriptedClient("cba"))
    for source in (first, second):
        assert source.raw()[:, 0].tolist() == [len(text) for text in source.graph.texts]
    assert first.ranking("degree").tolist() == [0, 1, 2]
    assert second.ranking("degree").tolist() == [2, 1, 0]
    first.store(RECIPE).write(np.array([0]), np.ones((1, 2), np.float32))
    shutil.copytree(first.folder / RECIPE.name, second.folder / RECIPE.name)
    with pytest.raises(StoreMismatchError, match="origin is"):
        second.store(RECIPE)


def test_the_same_graph_asks_nothing_again(tmp_path: Path) -> None:
    client = ScriptedClient()
    for _ in range(2):
        source = build_source(tmp_path, build_graph(), client)
        source.raw()
        source.ranking("degree")
    assert client.asked == ["embeddings", "select"]


def test_a_file_that_was_cut_off_is_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_off(file: IO[bytes], *_: Any, **__: Any) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    client = ScriptedClient()
    with monkeypatch.context() as patched:
        patched.setattr(np, "save", cut_off)
        patched.setattr(np, "savez", cut_off)
        source = build_source(tmp_path, build_graph(), client)
        for ask in ASKED:
            with pytest.raises(KeyboardInterrupt):
                ask(source)
    source = build_source(tmp_path, build_graph(), client)
    assert source.raw().shape == (3, 2)
    assert source.ranking("degree").tolist() == [0, 1, 2]
    assert source.sample("embed", fanout=1, seed=0)[0].tolist() == [[1, 0, 1], [0, 1, 2]]
    for ask in ASKED:
        ask(source)
    assert client.asked == ["embeddings", "select", "sample"] * 2


@pytest.mark.parametrize("graph", [None, "b"])
def test_rows_of_another_graph_are_refused(tmp_path: Path, graph: str | None) -> None:
    path = tmp_path / "rows.json"
    rows = Rows(path, "a")
    rows.add({"key": RUN.key(), **RUN.parameters(), "studies": ["budgets"]})
    assert Rows(path, "a").get(RUN) is not None
    if graph is None:  # as older versions wrote them
        path.write_text(path.read_text().replace('"graph"', '"older"'))
    with pytest.raises(RowsError, match=r"rows\.json: a row is of graph (None|'a'), this needs "):
        Rows(path, graph or "a")


def test_a_graph_of_the_same_name_has_rows_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = {1: build_graph(), 2: build_graph("other", "texts", "here")}
    monkeypatch.setattr(
        example,
        "Source",
        lambda _, graph, folder, __: build_source(folder, graph, ScriptedClient()),
    )
    monkeypatch.setattr(example, "load_debian", graphs.__getitem__)
    monkeypatch.setattr(example, "STUDIES", {"budgets": lambda _: [RUN]})
    for nodes in ("1", "2", "1"):
        example.main(["--work", str(tmp_path), "--nodes", nodes])
    rows = [json.loads(path.read_text()) for path in tmp_path.rglob("rows.json")]
    assert sorted(row["graph"] for [row] in rows) == sorted(g.digest() for g in graphs.values())
    one_file = ["--work", str(tmp_path), "--rows", str(tmp_path / "all.json"), "--nodes"]
    example.main([*one_file, "1"])
    with pytest.raises(SystemExit, match=r"^error: .*all\.json: a row is of graph"):
        example.main([*one_file, "2"])


class Endless:
    """A prefetcher whose work ends only by being closed."""

    def __init__(self) -> None:
        self.is_closed = threading.Event()
        self.was_closed_while_drained = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.is_closed.set()

    def want(self, _: Any) -> None:
        pass

    def drain(self) -> None:
        self.was_closed_while_drained = self.is_closed.wait(DEADLINE_SECONDS)


def test_an_interrupted_training_does_not_wait_for_the_llm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    source, prefetcher = build_source(tmp_path, build_graph(), ScriptedClient()), Endless()
    monkeypatch.setattr(source, "prefetcher", lambda *_: prefetcher)
    monkeypatch.setattr(studies, "train", interrupted)
    lab = Lab(source, Rows(tmp_path / "rows.json", source.digest))
    with pytest.raises(KeyboardInterrupt):
        lab.run(replace(RUN, budget=1.0, strategy="random", recipe=RECIPE, overlap=True))
    assert prefetcher.was_closed_while_drained
