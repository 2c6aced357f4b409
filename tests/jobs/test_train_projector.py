"""The train_projector job from spec to registered projector: figures against a second look, stops, kills, bad input."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest
import torch

from compression.hf import load_model
from compression.import_model import import_folder
from compression.registry import ModelRegistry
from conformance.tiny import write_tiny_tokenizer
from engines.encoder_engine import EncoderEngine
from engines.protocol import AsyncEngine, EmbedRequest
from engines.text import TextTokenizer
from engines.transformers_engine import TransformersEngine
from graph.cache import EnrichmentCache
from graph.llaga.filling import plan_questions
from graph.llaga.projector import LoadedProjector, ProjectorRegistry, load_projector
from graph.llaga.query import answer_questions
from graph.llaga.questions import make_all_questions
from graph.llaga.templates import laplacian_embedding
from graph.store import Graph, GraphColumns, GraphStore
from jobs import child
from jobs.context import RunnerContext
from jobs.runners import projector_results
from jobs.runners import train_projector as runner
from jobs.runners.projector_examples import TextEncoder, encode_nodes
from jobs.runners.projector_results import area_under_curve
from jobs.spec import SpecError, check_graph, parse_spec, spec_json
from tests.compression.models import save_and_import, tiny_decoder
from tests.engines.models import build_encoder
from tests.graph.graphs import columns
from tests.graph.llaga.test_query import Awaited
from training.projector import FrozenReader, ProjectorSettings

OWNER = "tenant-a"
BODY: dict[str, Any] = {
    "type": "train_projector",
    "graph": "graph-1",
    "model": "tiny",
    "output": "mine",
    "template": {"kind": "ho", "hops": 2, "operator": "sym_selfloop"},
    "settings": {"epochs": 4, "batch_size": 8, "learning_rate": 0.2, "dtype": "float32"},
}
NUM_NODES = 60
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def graph_columns() -> GraphColumns:
    """Two classes that features, texts and edges all tell apart."""
    generator = np.random.default_rng(0)
    classes = np.arange(NUM_NODES) % 2
    pairs = generator.integers(0, NUM_NODES // 2, (90, 2)) * 2
    pairs += generator.integers(0, 2, (90, 1))  # both ends of one class
    features = generator.normal(size=(NUM_NODES, 6)).astype(np.float32) + 2 * classes[:, None]
    texts = [
        "".join(generator.choice(list(LETTERS[:13] if c else LETTERS[13:]), 20)) for c in classes
    ]
    parts = columns(
        list(range(NUM_NODES)),
        [(int(a), int(b)) for a, b in pairs],
        texts=texts,
        labels=["y" if c else "z" for c in classes],
    )
    return replace(parts, features=pa.array(features.tolist(), pa.list_(pa.float32())))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with models and a graph, to be copied."""
    folder = tmp_path_factory.mktemp("made")
    home = folder / "home"
    save_and_import(tiny_decoder(max_position_embeddings=256), folder / "hf", home / "models")
    encoder = folder / "encoder"
    build_encoder().save_pretrained(encoder)
    write_tiny_tokenizer(encoder)
    (encoder / "sentence_bert_config.json").write_text('{"max_seq_length": 32}')
    registry = ModelRegistry(home / "models")
    import_folder(registry, "enc", encoder, kind="encoder", report=lambda _: None)
    GraphStore(home / "graphs").create(
        "graph-1", graph_columns(), name="g", owner=OWNER, request_hash=""
    )
    return home


@pytest.fixture
def home(made: Path, tmp_path: Path) -> Path:
    home = tmp_path / "home"
    home.mkdir()
    (home / "models").symlink_to(made / "models")
    GraphStore(home / "graphs").create(
        "graph-1", graph_columns(), name="g", owner=OWNER, request_hash=""
    )
    return home


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "EVENT_SECONDS", 0.0)
    monkeypatch.setattr(projector_results, "MAX_WRITTEN", 4)


def context_of(
    home: Path, job_id: str = "job-1", **changes: Any
) -> tuple[RunnerContext, list[Any]]:
    messages: list[Any] = []
    context = RunnerContext(
        job_id=job_id, attempt=1, owner=OWNER, spec=spec_json(parse_spec(BODY | changes)),
        folder=home / "jobs" / job_id, home=home, send=messages.append,
    )  # fmt: skip
    context.folder.mkdir(parents=True, exist_ok=True)
    return context, messages


def outcome(context: RunnerContext) -> Any:
    """As the job's process reports it."""
    return json.loads(child._outcome(context, child.RUNNERS["train_projector"]))


def projector_of(home: Path, name: str = "mine") -> LoadedProjector:
    return load_projector(ProjectorRegistry(home / "projectors").path(name, OWNER))


def graph_of(home: Path) -> Graph:
    return GraphStore(home / "graphs").get("graph-1", OWNER)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("kind", "tasks", "epochs"),
    [
        ("ho", ["node_classification"], 20),
        ("nd", ["node_classification", "link_prediction"], 4),
    ],
)
async def test_the_report_says_what_queries_say(
    home: Path, kind: str, tasks: list[str], epochs: int
) -> None:
    """The accuracy that the report tells is that of answers through an engine, for one task and for two together."""
    template = {"kind": kind, "hops": 2} | ({"fanout": 3} if kind == "nd" else {})
    context, messages = context_of(
        home,
        template=template,
        tasks=tasks,
        settings=BODY["settings"] | {"epochs": epochs},
    )
    result = outcome(context)["result"]
    report = json.loads((context.artifacts / "report.json").read_text())
    projector = projector_of(home)
    manifest = projector.manifest
    assert manifest.classes == ("y", "z")
    assert (manifest.encoder, manifest.encoder_dim) == (None, 6)
    assert manifest.training["results"] == report["results"] == result["report"]["results"]
    assert len(report["losses"]) == report["steps"]
    assert np.mean(report["losses"][-5:]) < np.mean(report["losses"][:5])
    if kind == "nd":
        assert projector.laplacian is not None
        assert np.array_equal(projector.laplacian, laplacian_embedding(2, 3))

    folder = home / "models" / "tiny"
    model = load_model(folder, dtype=torch.float32)
    engine = Awaited(TransformersEngine(lambda: model, model_id="tiny"))
    graph = graph_of(home)
    assert graph.features is not None
    for questions in make_all_questions(graph, manifest.tasks, seed=0):
        task = questions.task
        asked = questions.questions["test"]
        answers = await answer_questions(
            cast(AsyncEngine, engine),
            TextTokenizer.load(folder),
            projector,
            task,
            plan_questions(manifest.template, questions.graph, task, asked),
            graph.features,
            end_token_id=2,
        )
        right = [a.text == b for a, b in zip(answers, questions.answers["test"], strict=True)]
        found = report["results"][task]["test"]
        assert found["accuracy"] == pytest.approx(np.mean(right))
        if kind == "ho":
            assert found["accuracy"] > found["most_frequent"], "the oracle must be worth something"
        if task == "link_prediction":
            yes = np.array([a.logprobs["yes"] - a.logprobs["no"] for a in answers])
            is_edge = np.array([answer == "yes" for answer in questions.answers["test"]])
            wins = [float(p > n) + float(p == n) / 2 for p in yes[is_edge] for n in yes[~is_edge]]
            assert found["auc"] == pytest.approx(np.mean(wins), abs=0.02)
    markdown = (context.artifacts / "report.md").read_text()
    assert f"{report['results'][tasks[-1]]['test']['accuracy']:.4f}" in markdown
    assert result["artifacts"] == ["report.json", "report.md"]
    assert messages[-1]["message"] == "registered mine"
    assert max(m["progress"][0] for m in messages if "progress" in m) == report["steps"]


def test_vectors_of_the_encoder_are_made_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context, messages = context_of(home, embedding_model="enc", tasks=["node_description"])
    ended = outcome(context)
    assert "result" in ended, ended
    result = ended["result"]
    encoded = [m["data"] for m in messages if "texts were encoded" in m.get("message", "")]
    assert encoded == [{"nodes": NUM_NODES, "encoded": NUM_NODES}]
    test = result["report"]["results"]["node_description"]["test"]
    assert 0 < test["loss"] < result["report"]["results"]["node_description"]["val"]["loss"] + 2
    assert -1 <= test["similarity_to_others"] <= 1
    assert projector_of(home).manifest.encoder == "enc"

    again, messages = context_of(home, "job-2", embedding_model="enc", output="second")
    outcome(again)
    encoded = [m["data"] for m in messages if "texts were encoded" in m.get("message", "")]
    assert encoded == [{"nodes": NUM_NODES, "encoded": 0}]
    # and they are the encoder's own
    engine = EncoderEngine.load("enc", home / "models" / "enc")
    tokenizer = TextTokenizer.load(home / "models" / "enc")
    texts = graph_of(home).texts([0, 7])
    ids = tuple(tuple(tokenizer.encode(text, add_special_tokens=True)) for text in texts)
    expected = np.frombuffer(
        engine.embed(EmbedRequest(request_id="r", token_ids=ids)).vectors, "<f4"
    )
    encoder = TextEncoder(ModelRegistry(home / "models").get("enc"))
    monkeypatch.setattr(encoder, "embed", None)  # all are in the cache
    features, num_encoded = encode_nodes(
        graph_of(home), np.array([0, 7]), encoder, EnrichmentCache(home / "cache.db"), OWNER, lambda *_: None
    )  # fmt: skip
    assert num_encoded == 0
    assert np.allclose(features[[0, 7]].ravel(), expected, atol=1e-5)


def stopping_at(step: int, messages: list[Any]) -> Callable[[], bool]:
    return lambda: any(m.get("data", {}).get("step") == step for m in messages)


def tensors(home: Path, name: str) -> list[Any]:
    return [part for layer in projector_of(home, name).layers for part in layer]


def test_a_stopped_job_goes_on_to_the_same_projector(home: Path) -> None:
    whole, _ = context_of(home, "job-whole", output="whole")
    outcome(whole)
    context, messages = context_of(home)
    assert outcome(replace(context, cancelled=stopping_at(7, messages))) == {"cancelled": True}
    assert messages[-1]["message"] == "stopped after step 7; its checkpoint is kept"
    messages.clear()
    result = outcome(context)["result"]
    steps = [m["data"]["step"] for m in messages if m.get("kind") == "metrics"]
    assert steps == list(range(8, result["report"]["steps"] + 1))
    for one, other in zip(tensors(home, "whole"), tensors(home, "mine"), strict=True):
        assert np.array_equal(one, other)
    reports = [json.loads((c.artifacts / "report.json").read_text()) for c in (whole, context)]
    assert reports[0]["losses"] == reports[1]["losses"]
    messages.clear()
    assert outcome(context)["result"] == result  # an attempt after the registration changes nothing
    (only,) = messages
    assert only["message"].startswith("an earlier attempt had finished")


@pytest.mark.parametrize("budget", [6, 30, 44])
def test_a_killed_job_ends_in_the_same_projector(
    home: Path, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class KilledError(BaseException):
        pass

    settings = partial(ProjectorSettings, checkpoint_steps=5)
    monkeypatch.setattr(runner, "ProjectorSettings", settings)
    context, messages = context_of(home, embedding_model="enc")

    def send(message: Any) -> None:
        messages.append(message)
        if len(messages) > budget:
            raise KilledError

    with pytest.raises(KilledError):
        runner.run(replace(context, send=send))
    outcome(context)
    whole, _ = context_of(home, "job-whole", embedding_model="enc", output="whole")
    outcome(whole)
    for one, other in zip(tensors(home, "whole"), tensors(home, "mine"), strict=True):
        assert np.array_equal(one, other)
    assert [path.name for path in (home / "projectors").iterdir()] == ["mine", "whole"]


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ({"model": "nobody"}, "model_not_found", "nobody"),
        ({"embedding_model": "nobody"}, "model_not_found", "nobody"),
        ({"embedding_model": "tiny"}, "bad_data", "tiny is no encoder"),
        ({"graph": "graph-2"}, "graph_not_found", "graph-2"),
        ({"template": {"kind": "nd", "hops": 2, "fanout": 15}}, "context_length_exceeded", "reads 256"),
        ({}, "loss_not_finite", "step 1 is nan"),
    ],
)  # fmt: skip
def test_failures_say_why(
    home: Path, change: dict[str, Any], code: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if code == "loss_not_finite":
        monkeypatch.setattr(FrozenReader, "loss", lambda *_: torch.tensor(float("nan")))
    context, _ = context_of(home, **change)
    failed = outcome(context)["failed"]
    assert (failed["code"], message in failed["message"]) == (code, True), failed
    assert not (home / "projectors" / "mine").exists()


def test_a_graph_deleted_before_a_new_attempt(home: Path) -> None:
    """The attempt that had it open ends well; a later one fails by name."""
    context, messages = context_of(home)

    def send(message: Any) -> None:
        messages.append(message)
        if message.get("kind") == "metrics" and message["data"]["step"] == 1:
            GraphStore(home / "graphs").delete("graph-1", OWNER)

    assert "result" in outcome(replace(context, send=send))
    again, _ = context_of(home, "job-2", output="second")
    assert outcome(again)["failed"]["code"] == "graph_not_found"


def test_the_id_was_taken_meanwhile(home: Path) -> None:
    first, _ = context_of(home)
    outcome(first)
    second, _ = context_of(home, "job-2")
    assert outcome(second)["failed"]["code"] == "projector_exists"
    assert projector_of(home).manifest.training["job_id"] == "job-1"


def test_another_owners_graph_is_not_read(home: Path) -> None:
    context, _ = context_of(home)
    assert outcome(replace(context, owner="tenant-b"))["failed"]["code"] == "graph_not_found"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"template": {"kind": "ho", "fanout": 3}}, "template"),
        ({"template": {"kind": "nd", "operator": "sym"}}, "template"),
        ({"template": {"kind": "nd", "hops": 3, "fanout": 30}}, "template"),
        ({"template": {"hops": 9}}, "template"),
        ({"tasks": []}, "tasks"),
        ({"tasks": ["node_classification", "node_classification"]}, "tasks"),
        ({"tasks": ["graph_description"]}, "tasks[0]"),
        ({"settings": {"epochs": 0}}, "settings.epochs"),
        ({"settings": {"momentum": 1}}, "settings.momentum"),
        ({"output": "../up"}, "output"),
        ({"graph": "../graph"}, "graph"),
        ({"max_questions": 0}, "max_questions"),
    ],
)
def test_specs_are_checked(change: dict[str, Any], param: str) -> None:
    with pytest.raises(SpecError) as refused:
        parse_spec(BODY | change)
    assert refused.value.param == param


def test_defaults() -> None:
    spec = spec_json(parse_spec(BODY | {"template": {"kind": "nd"}, "settings": {}}))
    assert spec["template"] == {"kind": "nd", "hops": 2, "fanout": 5}
    assert spec["tasks"] == ["node_classification"]
    spec = spec_json(parse_spec({k: v for k, v in BODY.items() if k != "template"}))
    assert spec["template"] == {"kind": "ho", "hops": 4, "operator": "sym_selfloop"}


def test_what_a_graph_must_have(home: Path) -> None:
    info = graph_of(home).info
    spec: Any = parse_spec(BODY | {"tasks": ["node_classification", "link_prediction"]})
    check_graph(spec, info)
    for lacking, param in (
        ({"feature_dim": None}, "embedding_model"),
        ({"has_labels": False}, "tasks"),
        ({"num_edges": 0}, "tasks"),
    ):
        with pytest.raises(SpecError) as refused:
            check_graph(spec, replace(info, **cast(Any, lacking)))
        assert refused.value.param == param


def test_area_under_curve_by_hand() -> None:
    scores = np.array([3.0, 1.0, 2.0, 1.0], dtype=np.float32)
    is_true = np.array([True, True, False, False])
    # 3 beats both, 1 loses to 2 and ties with 1
    assert area_under_curve(scores, is_true) == pytest.approx((2 + 0.5) / 4)
    assert area_under_curve(scores, np.ones(4, dtype=bool)) is None
