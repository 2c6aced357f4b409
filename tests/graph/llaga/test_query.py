"""Questions through both engines' embedding rows, against the trainer's scores and `generate` on the same vectors."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from compression.import_model import import_folder
from compression.registry import ModelRegistry
from engines.engine import NativeEngine
from engines.protocol import (
    AsyncEngine,
    Engine,
    EngineError,
    EngineInfo,
    GenerateRequest,
    ScoreRequest,
    ScoreResult,
    TokenOutput,
)
from engines.transformers_engine import TransformersEngine
from graph.llaga.filling import Template, needed_nodes, plan_questions, question_vectors
from graph.llaga.projector import LoadedProjector, load_projector, write_projector
from graph.llaga.prompts import (
    LINK_ANSWERS,
    MAX_DESCRIPTION_TOKENS,
    Task,
    answer_text,
    build_prompt,
)
from graph.llaga.query import CALLS_AT_ONCE, Answer, answer_questions
from graph.llaga.templates import laplacian_embedding
from graph.store import Graph
from tests.graph.llaga.test_projector import HO, manifest_of
from tests.graph.llaga.test_templates import random_graph
from training.projector import FrozenReader, Projector, TaskPrompt

END = 2
DIM = 5
SMALL_ND = Template(kind="nd", hops=2, fanout=2)


def encode(text: str) -> list[int]:
    """A token per word, so that prompts fit the tiny model."""
    return [3 + sum(word.encode()) % 60 for word in text.split()]


class Words:
    """The tokenizer that `encode` is of."""

    special_prefix = (1,)

    def encode(self, text: str) -> list[int]:
        return encode(text)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return " ".join(str(token_id) for token_id in ids if token_id > END)


class Stream:
    """What a request was given, step by step."""

    def __init__(self, outputs: list[TokenOutput]) -> None:
        self._outputs = outputs

    def __aiter__(self) -> AsyncIterator[TokenOutput]:
        return self

    async def __anext__(self) -> TokenOutput:
        if not self._outputs:
            raise StopAsyncIteration
        return self._outputs.pop(0)

    async def aclose(self) -> None:
        pass


class Awaited:
    """An engine as its users see it, without a host in between. Attributes: most: calls that were there at once."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._num_calls = 0
        self.most = 0
        self._expected = 0
        self._all_there: asyncio.Event | None = None

    def expect(self, num_calls: int) -> None:
        """Answer none before so many are there at once."""
        self.most, self._expected, self._all_there = 0, num_calls, asyncio.Event()

    @property
    def info(self) -> EngineInfo:
        return self._engine.info

    async def score(self, request: ScoreRequest) -> ScoreResult:
        self._num_calls += 1
        self.most = max(self.most, self._num_calls)
        if self._all_there is not None:
            if self._num_calls == self._expected:
                self._all_there.set()
            await self._all_there.wait()
        await asyncio.sleep(0)
        self._num_calls -= 1
        return self._engine.score(request)

    async def generate(self, request: GenerateRequest) -> Stream:
        self._engine.submit(request)
        outputs: list[TokenOutput] = []
        while not outputs or outputs[-1].finish_reason is None:
            outputs += self._engine.step()
        return Stream(outputs)


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> Any:
    return LlamaForCausalLM.from_pretrained(tiny_llama).eval().requires_grad_(False)


@pytest.fixture(scope="module", params=["native", "transformers"])
def engine(
    request: pytest.FixtureRequest,
    tiny_llama: Path,
    model: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Awaited:
    if request.param == "transformers":
        return Awaited(TransformersEngine(lambda: model, model_id="tiny"))
    registry = ModelRegistry(tmp_path_factory.mktemp("models"))
    import_folder(registry, "tiny", tiny_llama, report=lambda _: None)
    folder = registry.get("tiny").path
    return Awaited(NativeEngine.load("tiny", folder, dtype=torch.float32, device="cpu"))


def projector_of(folder: Path, template: Template) -> tuple[Projector, LoadedProjector]:
    torch.manual_seed(1)
    module = Projector(template.width(DIM), 64, 2)
    tensors = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
    if template.kind == "nd":
        tensors["laplacian"] = laplacian_embedding(template.hops, template.fanout or 0)
    manifest = replace(
        manifest_of(template), encoder_dim=DIM, hidden_size=64, classes=("Red", "Very Green", "Blue")
    )  # fmt: skip
    folder.mkdir()
    write_projector(folder, manifest, tensors)
    return module, load_projector(folder)


async def ask(
    engine: Awaited,
    projector: LoadedProjector,
    graph: Graph,
    features: Any,
    task: Task,
    questions: Any,
) -> list[Answer]:
    fillings = plan_questions(projector.manifest.template, graph, task, questions)
    return await answer_questions(
        cast(AsyncEngine, engine), Words(), projector, task, fillings, features, end_token_id=END
    )


@pytest.mark.anyio
@pytest.mark.parametrize("template", [HO, SMALL_ND])
@pytest.mark.parametrize("task", ["node_classification", "link_prediction"])
async def test_answers(
    tmp_path: Path, model: Any, engine: Awaited, template: Template, task: Task
) -> None:
    """Both engines against the trainer's own scores, and each question in company as alone."""
    module, projector = projector_of(tmp_path / "p", template)
    graph = random_graph(tmp_path / "g")
    features = np.random.default_rng(0).normal(size=(60, DIM)).astype(np.float32)
    questions = np.arange(20)[:, None] if task == "node_classification" else graph.edges[:20]
    questions = questions.astype(np.int64)
    engine.expect(CALLS_AT_ONCE)
    answers = await ask(engine, projector, graph, features, task, questions)
    assert engine.most == CALLS_AT_ONCE
    classes: Sequence[str] = projector.manifest.classes
    if task == "link_prediction":
        classes = LINK_ANSWERS
    expected = trainer_scores(module, projector, model, graph, features, task, classes, questions)
    for answer, logprobs in zip(answers, expected, strict=True):
        assert list(answer.logprobs) == list(classes)
        assert np.allclose(list(answer.logprobs.values()), logprobs, atol=1e-4)
        shares = np.exp(logprobs) / np.exp(logprobs).sum()
        assert np.allclose(list(answer.probabilities.values()), shares, atol=1e-4)
        assert answer.text == classes[int(logprobs.argmax())]
    for number in (0, 13, 19):
        (alone,) = await ask(
            engine, projector, graph, features, task, questions[number : number + 1]
        )
        assert alone.logprobs == pytest.approx(answers[number].logprobs, abs=1e-5)


@pytest.mark.anyio
@pytest.mark.parametrize("template", [HO, SMALL_ND])
async def test_rows_are_made_in_a_thread_of_one_question_at_a_time(
    tmp_path: Path, template: Template, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not before it is its turn, and to the bit what all of them together would be."""
    _, projector = projector_of(tmp_path / "p", template)
    graph = random_graph(tmp_path / "g")
    features = np.random.default_rng(0).normal(size=(60, DIM)).astype(np.float32)
    pairs = graph.edges[:20].astype(np.int64)
    fillings = plan_questions(template, graph, "link_prediction", pairs)
    vectors, is_pad = question_vectors(fillings, features, projector.laplacian)
    expected = projector.project(vectors, is_pad)
    project, made = LoadedProjector.project, 0

    def watched(self: LoadedProjector, vectors: Any, is_pad: Any) -> Any:
        nonlocal made
        with pytest.raises(RuntimeError, match="no running event loop"):
            asyncio.get_running_loop()
        assert len(vectors) == 1
        made += 1
        return project(self, vectors, is_pad)

    class Waiting:
        """An engine that answers nobody."""

        def __init__(self) -> None:
            self.rows: list[bytes | None] = []
            self.is_full = asyncio.Event()

        async def score(self, request: ScoreRequest) -> ScoreResult:
            self.rows.append(request.embedding_rows)
            if len(self.rows) == CALLS_AT_ONCE:
                self.is_full.set()
            raise await asyncio.get_running_loop().create_future()

    monkeypatch.setattr(LoadedProjector, "project", watched)
    engine = Waiting()
    asking = asyncio.ensure_future(
        ask(cast(Any, engine), projector, graph, features, "link_prediction", pairs)
    )
    await engine.is_full.wait()
    assert made == 2 * CALLS_AT_ONCE
    assert engine.rows == [expected[i].astype("<f4").tobytes() for i in range(CALLS_AT_ONCE)]
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking


@pytest.mark.anyio
async def test_descriptions_are_what_generate_writes(
    tmp_path: Path, model: Any, engine: Awaited
) -> None:
    module, projector = projector_of(tmp_path / "p", SMALL_ND)
    graph = random_graph(tmp_path / "g")
    features = np.random.default_rng(0).normal(size=(60, DIM)).astype(np.float32)
    questions = np.array([[3], [59], [7]])
    answers = await ask(engine, projector, graph, features, "node_description", questions)
    embed = model.get_input_embeddings()
    prompt = build_prompt("node_description")
    fillings = plan_questions(SMALL_ND, graph, "node_description", questions)
    vectors, is_pad = question_vectors(fillings, features, projector.laplacian)
    rows = module(torch.from_numpy(vectors), torch.from_numpy(is_pad))
    for index, answer in enumerate(answers):
        parts = [embed(torch.tensor([1, *encode(prompt.before)])), rows[index, 0]]
        parts.append(embed(torch.tensor(encode(prompt.after[0]))))
        written = model.generate(
            inputs_embeds=torch.cat(parts)[None],
            max_new_tokens=MAX_DESCRIPTION_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )[0].tolist()
        assert answer.text == Words().decode(written, skip_special_tokens=True)
        assert answer.num_generated == len(written)
        assert answer.probabilities == answer.logprobs == {}
        assert answer.template_nodes[0].tolist() == fillings[0].nodes[index].tolist()
    assert len({answer.text for answer in answers}) == 3, "the oracle must be worth something"


@pytest.mark.anyio
async def test_a_refusing_engine_ends_the_query(tmp_path: Path, engine: Awaited) -> None:
    """A prompt that the model has no room for: the engine's own error, and no call is left behind."""
    template = Template(kind="nd", hops=2, fanout=12)  # 157 rows, the model reads 128 tokens
    _, projector = projector_of(tmp_path / "p", template)
    graph = random_graph(tmp_path / "g")
    features = np.zeros((60, DIM), dtype=np.float32)
    tasks: tuple[Task, ...] = ("node_classification", "node_description")
    for task in tasks:
        with pytest.raises(EngineError, match="128"):
            await ask(engine, projector, graph, features, task, np.arange(20)[:, None])


def trainer_scores(
    module: Projector,
    projector: LoadedProjector,
    model: Any,
    graph: Graph,
    features: Any,
    task: Task,
    classes: Sequence[str],
    questions: Any,
) -> Any:
    text = build_prompt(task, classes)
    prompt = TaskPrompt(
        before=(1, *encode(text.before)), after=tuple(tuple(encode(part)) for part in text.after)
    )
    fillings = plan_questions(projector.manifest.template, graph, task, questions)
    vectors, is_pad = question_vectors(fillings, features, projector.laplacian)
    with torch.no_grad():
        rows = module(torch.from_numpy(vectors), torch.from_numpy(is_pad))
    continuations = [(*encode(answer_text(name)), END) for name in classes]
    return FrozenReader(model).score(prompt, rows, continuations).numpy()


@pytest.mark.anyio
@pytest.mark.parametrize("template", [HO, SMALL_ND])
async def test_the_partner_changes_nothing(
    tmp_path: Path, engine: Awaited, template: Template
) -> None:
    """Whatever the second node says, the first one's rows stay, and it is not among the first one's nodes."""
    _, projector = projector_of(tmp_path / "p", template)
    graph = random_graph(tmp_path / "g")
    features = np.random.default_rng(0).normal(size=(60, DIM)).astype(np.float32)
    pairs = graph.edges[:10].astype(np.int64)
    answers = await ask(engine, projector, graph, features, "link_prediction", pairs)
    for (first, second), answer in zip(pairs, answers, strict=True):
        of_first, of_second = answer.template_nodes
        assert first in of_first
        assert second not in of_first
        assert second in of_second
        assert first not in of_second
        pair = np.array([[first, second]])
        poisoned = features.copy()
        poisoned[second] = 99.0
        filling = plan_questions(template, graph, "link_prediction", pair)[0]
        before, after = (
            filling.vectors(given, projector.laplacian)[0] for given in (features, poisoned)
        )
        assert np.array_equal(before, after)


def test_only_needed_nodes_are_read(tmp_path: Path) -> None:
    graph = random_graph(tmp_path / "g")
    features = np.random.default_rng(0).normal(size=(60, DIM)).astype(np.float32)
    fillings = plan_questions(HO, graph, "link_prediction", np.array([[0, 5]]))
    needed = needed_nodes(fillings)
    poisoned = np.full_like(features, np.inf)
    poisoned[needed] = features[needed]
    given, expected = (question_vectors(fillings, f, None)[0] for f in (poisoned, features))
    assert np.array_equal(given, expected)
