"""Questions through a real engine's embedding rows, against the trainer's own scores on the same vectors."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from engines.protocol import AsyncEngine, ScoreRequest, ScoreResult
from engines.transformers_engine import TransformersEngine
from graph.llaga.projector import LoadedProjector, Template, load_projector, write_projector
from graph.llaga.prompts import LINK_ANSWERS, Task, answer_text, build_prompt
from graph.llaga.query import answer_questions, fill_questions, template_nodes
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


class Awaited:
    """An engine as its users see it, without a host in between."""

    def __init__(self, engine: TransformersEngine) -> None:
        self._engine = engine

    async def score(self, request: ScoreRequest) -> ScoreResult:
        return self._engine.score(request)


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> Any:
    return LlamaForCausalLM.from_pretrained(tiny_llama).eval().requires_grad_(False)


@pytest.fixture
def engine(model: Any) -> AsyncEngine:
    return cast(AsyncEngine, Awaited(TransformersEngine(lambda: model, model_id="tiny")))


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


@pytest.mark.anyio
@pytest.mark.parametrize("template", [HO, SMALL_ND])
@pytest.mark.parametrize("task", ["node_classification", "link_prediction"])
async def test_answers(
    tmp_path: Path, model: Any, engine: AsyncEngine, template: Template, task: Task
) -> None:
    module, projector = projector_of(tmp_path / "p", template)
    graph = random_graph(tmp_path / "g")
    features = np.random.default_rng(0).normal(size=(60, DIM)).astype(np.float32)
    questions = np.arange(4)[:, None] if task == "node_classification" else graph.edges[:4]
    questions = questions.astype(np.int64)
    answers = await answer_questions(
        engine, encode, projector, graph, features, task, questions, beginning=[1], end_token_id=END
    )
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
    (alone,) = await answer_questions(
        engine, encode, projector, graph, features, task, questions[2:3], beginning=[1], end_token_id=END
    )  # fmt: skip
    assert alone.logprobs == pytest.approx(answers[2].logprobs, abs=1e-5)


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
    filled = fill_questions(projector, graph, features, task, questions)
    with torch.no_grad():
        rows = module(
            torch.from_numpy(np.stack([part.vectors for part in filled], 1)),
            torch.from_numpy(np.stack([part.is_pad for part in filled], 1)),
        )
    continuations = [(*encode(answer_text(name)), END) for name in classes]
    return FrozenReader(model).score(prompt, rows, continuations).numpy()


@pytest.mark.anyio
@pytest.mark.parametrize("template", [HO, SMALL_ND])
async def test_the_partner_changes_nothing(
    tmp_path: Path, engine: AsyncEngine, template: Template
) -> None:
    """Whatever the second node says, the first one's rows stay, and it is not among the first one's nodes."""
    _, projector = projector_of(tmp_path / "p", template)
    graph = random_graph(tmp_path / "g")
    features = np.random.default_rng(0).normal(size=(60, DIM)).astype(np.float32)
    pairs = graph.edges[:10].astype(np.int64)
    answers = await answer_questions(
        engine, encode, projector, graph, features, "link_prediction", pairs, end_token_id=END
    )
    for (first, second), answer in zip(pairs, answers, strict=True):
        of_first, of_second = answer.template_nodes
        assert first in of_first
        assert second not in of_first
        assert second in of_second
        assert first not in of_second
        pair = np.array([[first, second]])
        poisoned = features.copy()
        poisoned[second] = 99.0
        before, after = (
            fill_questions(projector, graph, given, "link_prediction", pair)[0].vectors
            for given in (features, poisoned)
        )
        assert np.array_equal(before, after)


def test_only_template_nodes_are_read(tmp_path: Path) -> None:
    _, projector = projector_of(tmp_path / "p", HO)
    graph = random_graph(tmp_path / "g")
    features = np.random.default_rng(0).normal(size=(60, DIM)).astype(np.float32)
    questions = np.array([[0, 5]])
    needed = template_nodes(projector, graph, "link_prediction", questions)
    poisoned = np.full_like(features, np.inf)
    poisoned[needed] = features[needed]
    for given, expected in zip(
        fill_questions(projector, graph, poisoned, "link_prediction", questions),
        fill_questions(projector, graph, features, "link_prediction", questions),
        strict=True,
    ):
        assert np.array_equal(given.vectors, expected.vectors)
