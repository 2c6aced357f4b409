"""The projector's loss and scores against transformers on whole sequences; PAD rows; a run that stops and goes on."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F  # noqa: N812
from transformers import LlamaForCausalLM

from compression.hf import load_model
from training import projector as trainer
from training.checkpointing import CheckpointFolder
from training.projector import (
    Examples,
    FrozenReader,
    Projector,
    ProjectorProgress,
    ProjectorSettings,
    ProjectorStoppedError,
    TaskPrompt,
    mean_loss,
    schedule,
    score_examples,
    train_projector,
)

PROMPT = TaskPrompt(before=(1, 7, 8, 9), after=((10, 11), (12,)))
REAL_PROMPT = TaskPrompt(before=tuple(range(100, 130)), after=((5, 6, 7, 8), (9, 10, 11)))
ANSWERS = [(20, 2), (21, 22, 23, 2), (24, 25, 2)]
CHOICES = [(20, 2), (21, 2)]
WIDTH = 6


@pytest.fixture
def model(tiny_llama: Path) -> Any:
    return LlamaForCausalLM.from_pretrained(tiny_llama).eval().requires_grad_(False)


def random_rows(num_examples: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(num_examples, 2, 3, 64, generator=generator)


def whole_logprobs(model: Any, rows_CNH: torch.Tensor, answer: tuple[int, ...]) -> torch.Tensor:
    """Log-probability of every token of an answer, from one uncached pass over the whole sequence."""

    def embed(ids: tuple[int, ...]) -> torch.Tensor:
        embedded: torch.Tensor = model.get_input_embeddings()(torch.tensor(ids))
        return embedded

    parts = [embed(PROMPT.before)]
    for rows_NH, ids in zip(rows_CNH, PROMPT.after, strict=True):
        parts += [rows_NH, embed(ids)]
    sequence = torch.cat([*parts, embed(answer)])[None]
    logits: torch.Tensor = model(inputs_embeds=sequence).logits[0, -len(answer) - 1 : -1]
    return logits.log_softmax(-1)[torch.arange(len(answer)), torch.tensor(answer)]


def test_loss_and_its_gradient(model: Any) -> None:
    rows = random_rows(3).requires_grad_()
    loss = FrozenReader(model).loss(PROMPT, rows, ANSWERS)
    (gradient,) = torch.autograd.grad(loss, rows)
    expected_rows = rows.detach().clone().requires_grad_()
    logprobs = [whole_logprobs(model, r, a) for r, a in zip(expected_rows, ANSWERS, strict=True)]
    expected = -torch.cat(logprobs).mean()
    (expected_gradient,) = torch.autograd.grad(expected, expected_rows)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    assert torch.allclose(gradient, expected_gradient, atol=1e-6)
    assert float(gradient.abs().max()) > 1e-4
    assert all(parameter.grad is None for parameter in model.parameters())


def test_in_bfloat16_layers_still_add_up_in_float32(real_home: Path) -> None:
    """Rows thirty times as long as embeddings of the real model. In bfloat16 throughout, the loss is 0.09 too high."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4, 2, 5, 576, generator=generator)
    rows *= 100 / rows.norm(dim=-1, keepdim=True)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model = load_model(real_home / "models" / "smollm2-135m", dtype=dtype)
        taken = rows.clone().requires_grad_()
        loss = FrozenReader(model).loss(REAL_PROMPT, taken, [*ANSWERS[:2], *ANSWERS[:2]])
        (gradient,) = torch.autograd.grad(loss, taken)
        found.append((loss.item(), gradient.flatten()))
    (exact, exact_gradient), (rounded, rounded_gradient) = found
    assert rounded == pytest.approx(exact, abs=0.06)
    assert float(torch.cosine_similarity(rounded_gradient, exact_gradient, dim=0)) > 0.996


def test_scores(model: Any) -> None:
    rows = random_rows(3)
    reader = FrozenReader(model)
    scores = reader.score(PROMPT, rows, ANSWERS)
    for index in range(3):
        expected = [float(whole_logprobs(model, rows[index], a).sum()) for a in ANSWERS]
        assert np.allclose(scores[index], expected, atol=1e-4)
        alone = reader.score(PROMPT, rows[index : index + 1], ANSWERS)
        assert torch.allclose(alone[0], scores[index], atol=1e-5)


def test_what_is_written_is_what_transformers_generates(model: Any) -> None:
    """In a batch, where one answer ends before the others."""
    rows = random_rows(4)
    embed = model.get_input_embeddings()
    expected = []
    for rows_CNH in rows:
        parts = [embed(torch.tensor(PROMPT.before))]
        for rows_NH, ids in zip(rows_CNH, PROMPT.after, strict=True):
            parts += [rows_NH, embed(torch.tensor(ids))]
        sequence = torch.cat(parts)[None]
        mask = torch.ones(sequence.shape[:2], dtype=torch.long)
        generated = model.generate(
            inputs_embeds=sequence,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=9,
            eos_token_id=None,
        )
        expected.append(generated[0].tolist())
    end = expected[1][3]  # of the second, at the latest here
    written = FrozenReader(model).write(PROMPT, rows, max_tokens=9, end_token_id=end)
    cut = [ids[: ids.index(end)] if end in ids else ids for ids in expected]
    assert written == cut
    assert len({len(ids) for ids in cut}) > 1, "the oracle must be worth something"


def test_the_mean_loss_is_over_tokens(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers of different lengths, in batches of different sizes."""
    monkeypatch.setattr(trainer, "EVALUATION_BATCH", 2)
    torch.manual_seed(0)
    reader, projector = FrozenReader(model), Projector(WIDTH, 64, 1)
    questions = replace(examples(), answers=[*ANSWERS, *ANSWERS[:2]])
    rows = projector(*map(torch.from_numpy, questions.vectors(np.arange(5)))).detach()
    logprobs = [whole_logprobs(model, r, a) for r, a in zip(rows, questions.answers, strict=True)]
    found = mean_loss(reader, projector, questions)
    assert found == pytest.approx(-float(torch.cat(logprobs).mean()), abs=1e-5)


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_projector_by_hand(num_layers: int) -> None:
    torch.manual_seed(0)
    projector = Projector(WIDTH, 5, num_layers)
    vectors = torch.randn(2, 1, 4, WIDTH)
    is_pad = torch.zeros(2, 1, 4, dtype=torch.bool)
    is_pad[1, 0, 2:] = True
    rows = projector(vectors, is_pad)
    expected = vectors
    for index, layer in enumerate(projector.layers):
        if index:
            expected = F.gelu(expected)
        assert isinstance(layer, torch.nn.Linear)
        expected = expected @ layer.weight.T + layer.bias
    assert torch.equal(rows[1, 0, 2:], torch.zeros(2, 5))
    assert torch.allclose(rows[~is_pad], expected[~is_pad], atol=1e-6)


def examples() -> Examples:
    """Six questions whose answer is told by the sign of the vectors' mean."""
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(6, 2, 3, WIDTH)).astype(np.float32)
    gold = [index % 2 for index in range(6)]
    for index, label in enumerate(gold):
        vectors[index] += 4 * label - 2
    is_pad = np.zeros((6, 2, 3), dtype=bool)
    return Examples(
        prompt=PROMPT,
        vectors=lambda numbers: (vectors[numbers], is_pad[numbers]),
        answers=[CHOICES[label] for label in gold],
    )


SETTINGS = ProjectorSettings(epochs=12, batch_size=4, learning_rate=0.02, checkpoint_steps=5)


def test_it_learns(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, questions = FrozenReader(model), examples()
    settings = replace(SETTINGS, epochs=30, learning_rate=0.1)
    projector, losses = train_projector(reader, [questions], settings, width=WIDTH)
    assert len(losses) == 60
    assert np.mean(losses[-4:]) < np.mean(losses[:4])
    monkeypatch.setattr(trainer, "EVALUATION_BATCH", 4)
    done: list[int] = []
    scores = score_examples(reader, projector, questions, CHOICES, on_batch=done.append)
    assert done == [4, 6]
    assert scores.argmax(1).tolist() == [0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize("stop_after", [0, 7, 10])
def test_a_stopped_run_ends_in_the_same_bytes(model: Any, tmp_path: Path, stop_after: int) -> None:
    reader, questions = FrozenReader(model), examples()
    whole, losses = train_projector(reader, [questions], SETTINGS, width=WIDTH)
    steps: list[ProjectorProgress] = []
    with pytest.raises(ProjectorStoppedError):
        train_projector(
            reader, [questions], SETTINGS, width=WIDTH, checkpoints=CheckpointFolder(tmp_path / "w", ["run"]),
            on_step=steps.append, stop_requested=lambda: len(steps) >= stop_after,
        )  # fmt: skip
    assert len(steps) == stop_after
    resumed, again = train_projector(
        reader, [questions], SETTINGS, width=WIDTH,
        checkpoints=CheckpointFolder(tmp_path / "w", ["run"]), on_step=steps.append,
    )  # fmt: skip
    assert [step.step for step in steps] == list(range(1, 25))
    assert again == losses
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name])


def test_schedule() -> None:
    rates = [schedule(step, 100) for step in range(100)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert rates[3] == 1
    assert rates[51] == pytest.approx(0.5, abs=0.01)
    assert 0 < rates[99] < 0.001
    assert schedule(0, 1) == 1


@pytest.mark.parametrize(
    "bad", [{"num_layers": 0}, {"epochs": 0}, {"learning_rate": 0.0}, {"weight_decay": -1.0}]
)
def test_bad_settings(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        ProjectorSettings(**bad)
