"""Trains a projector that turns vectors into rows of a frozen LLM's embedding space (LLaGA, arXiv:2402.08170).

The LLM's weights take no gradient; it flows through them into the rows. All prompts of a task begin with the same text,
whose KV cache is computed once: a step costs the rows, the text behind them and the answer, and nothing else.
Sequences are padded on the right, where a causal model does not look, so no mask is needed.

Shapes: B examples, C centres of an example, N rows of a centre, D width of a vector, H hidden size, T tokens, V words.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache

from compression.hf import cache_argument
from training.checkpointing import CheckpointFolder, RunCheckpoint

WARM_UP_RATIO = 0.03
MAX_GRADIENT_NORM = 1.0
EVALUATION_BATCH = 64
IGNORED = -100

Float32s = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectorSettings:
    """How to train one.

    Attributes:
        num_layers: 1 is linear; more have a GELU between layers of the hidden size.
        learning_rate: the peak, reached after 3 % of the steps; then a cosine to 0.
        checkpoint_steps: between two checkpoints.
    """

    num_layers: int = 1
    learning_rate: float = 5e-4
    weight_decay: float = 0.0
    epochs: int = 10
    batch_size: int = 16
    seed: int = 0
    checkpoint_steps: int = 100

    def __post_init__(self) -> None:
        for name in ("num_layers", "epochs", "batch_size", "checkpoint_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.learning_rate < 1:
            raise ValueError(f"learning_rate must be in (0, 1), got {self.learning_rate}")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay must be at least 0, got {self.weight_decay}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskPrompt:
    """Token ids around the rows of each centre: `before` the first, `after[i]` behind centre i."""

    before: tuple[int, ...]
    after: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """Questions of one task.

    Attributes:
        vectors: from example numbers (B,) to vectors (B, C, N, D) and which of them are PAD (B, C, N).
        answers: token ids of each example's answer, its end mark included.
    """

    prompt: TaskPrompt
    vectors: Callable[[npt.NDArray[np.int64]], tuple[Float32s, Bools]]
    answers: Sequence[tuple[int, ...]]


class Projector(nn.Module):
    """Linear(D, H), then `num_layers` - 1 times GELU and Linear(H, H). Rows of PAD are zero."""

    def __init__(self, width: int, hidden_size: int, num_layers: int) -> None:
        super().__init__()
        widths = [width] + [hidden_size] * num_layers
        self.layers = nn.ModuleList(
            nn.Linear(d_in, d_out) for d_in, d_out in itertools.pairwise(widths)
        )

    def forward(self, vectors: Tensor, is_pad: Tensor) -> Tensor:
        rows: Tensor = self.layers[0](vectors)
        for layer in self.layers[1:]:
            rows = layer(functional.gelu(rows))
        return rows.masked_fill(is_pad[..., None], 0.0)


class FrozenReader:
    """A causal LM that reads rows between texts. Its weights never change."""

    def __init__(self, model: Any) -> None:
        """Args: model: on a CPU, its attention becomes the plain one: torch's fused kernel is made for long texts, and
        its backward takes seven times as long for a batch of questions this short.
        """
        self._model = model
        self._embed = model.get_input_embeddings()
        self._cache_argument = cache_argument(model.model)
        self._prefixes: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}
        self.hidden_size = int(model.config.hidden_size)
        if self.device.type == "cpu":
            model.set_attn_implementation("eager")

    @property
    def device(self) -> torch.device:
        device: torch.device = self._embed.weight.device
        return device

    def loss(
        self, prompt: TaskPrompt, rows_BCNH: Tensor, answers: Sequence[tuple[int, ...]]
    ) -> Tensor:
        """Mean cross-entropy over the tokens of all answers."""
        longest = max(map(len, answers))
        ids_BT = torch.zeros(len(answers), longest, dtype=torch.long)
        targets_BT = torch.full((len(answers), longest), IGNORED)
        for index, answer in enumerate(answers):
            ids_BT[index, : len(answer)] = targets_BT[index, : len(answer)] = torch.tensor(answer)
        context_BTH = self._context(prompt, rows_BCNH)
        device = context_BTH.device
        inputs_BTH = torch.cat([context_BTH, self._embed(ids_BT[:, :-1].to(device))], dim=1)
        hidden_BTH = self._run(inputs_BTH, self._cache(prompt, len(answers)))
        # Flat, since a batched product with a slice would copy the head once per example.
        logits_RV = self._model.lm_head(hidden_BTH[:, -longest:].flatten(0, 1))
        return functional.cross_entropy(
            logits_RV.float(), targets_BT.flatten().to(device), ignore_index=IGNORED
        )

    @torch.no_grad()
    def score(
        self, prompt: TaskPrompt, rows_BCNH: Tensor, continuations: Sequence[tuple[int, ...]]
    ) -> Tensor:
        """Summed log-probability of each continuation after each prompt (B, continuations), float32."""
        num_examples = len(rows_BCNH)
        cache = self._cache(prompt, num_examples)
        context_BTH = self._context(prompt, rows_BCNH)
        last_BH = self._run(context_BTH, cache)[:, -1]
        first_BV = self._model.lm_head(last_BH).float().log_softmax(-1)
        length = cache.get_seq_length()
        scores = []
        for ids in continuations:
            total_B = first_BV[:, ids[0]]
            if len(ids) > 1:
                ids_T = torch.tensor(ids, device=context_BTH.device)
                inputs_BTH = self._embed(ids_T[:-1]).expand(num_examples, -1, -1)
                hidden_BTH = self._run(inputs_BTH, cache)
                cache.crop(length - cache.get_seq_length())
                logprobs_BTV = self._model.lm_head(hidden_BTH).float().log_softmax(-1)
                wanted_BT1 = ids_T[None, 1:, None].expand(num_examples, -1, 1)
                total_B = total_B + logprobs_BTV.gather(2, wanted_BT1).sum((1, 2))
            scores.append(total_B)
        return torch.stack(scores, dim=1)

    @torch.no_grad()
    def write(
        self, prompt: TaskPrompt, rows_BCNH: Tensor, *, max_tokens: int, end_token_id: int
    ) -> list[list[int]]:
        """The likeliest next token, again and again: what follows each prompt, without the end mark."""
        cache = self._cache(prompt, len(rows_BCNH))
        hidden_BTH = self._run(self._context(prompt, rows_BCNH), cache)
        written: list[list[int]] = [[] for _ in rows_BCNH]
        ended = [False] * len(written)
        for _ in range(max_tokens):
            next_B = self._model.lm_head(hidden_BTH[:, -1]).argmax(-1)
            for index, token_id in enumerate(next_B.tolist()):
                ended[index] = ended[index] or token_id == end_token_id
                if not ended[index]:
                    written[index].append(token_id)
            if all(ended):
                break
            hidden_BTH = self._run(self._embed(next_B[:, None]), cache)
        return written

    def _context(self, prompt: TaskPrompt, rows_BCNH: Tensor) -> Tensor:
        """Rows of each centre and the text behind them."""
        parts = []
        for centre, ids in enumerate(prompt.after):
            rows_BNH = rows_BCNH[:, centre]
            text_TH = self._embed(torch.tensor(ids, device=rows_BNH.device))
            parts += [rows_BNH, text_TH.expand(len(rows_BNH), -1, -1)]
        return torch.cat(parts, dim=1)

    def _run(self, inputs_BTH: Tensor, cache: DynamicCache) -> Tensor:
        """Products are of the weights' dtype, what layers add up is float32.

        Rows become several times as long as embeddings are; what a layer adds would be rounded at their length.
        """
        dtype = self._embed.weight.dtype
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32):
            hidden: Tensor = self._model.model(
                inputs_embeds=inputs_BTH.float(), use_cache=True, **{self._cache_argument: cache}
            ).last_hidden_state
        return hidden.to(dtype)

    def _cache(self, prompt: TaskPrompt, num_examples: int) -> DynamicCache:
        """A cache that holds the beginning of the prompt, for each example."""
        if prompt.before not in self._prefixes:
            with torch.no_grad():
                filled = DynamicCache()
                ids_1T = torch.tensor([prompt.before], device=self.device)
                self._run(self._embed(ids_1T), filled)
            self._prefixes[prompt.before] = [(lay.keys, lay.values) for lay in filled.layers]
        cache = DynamicCache()
        for index, (keys, values) in enumerate(self._prefixes[prompt.before]):
            cache.update(
                keys.expand(num_examples, -1, -1, -1),
                values.expand(num_examples, -1, -1, -1),
                index,
            )
        return cache


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectorProgress:
    step: int
    total: int
    loss: float
    learning_rate: float


class LossNotFiniteError(Exception):
    """The loss of a step is infinite or no number."""


class ProjectorStoppedError(Exception):
    """Asked to stop; a checkpoint of `step` is kept."""

    def __init__(self, step: int) -> None:
        super().__init__(step)
        self.step = step


def num_steps(tasks: Sequence[Examples], settings: ProjectorSettings) -> int:
    """Of the whole training."""
    per_epoch = sum(math.ceil(len(task.answers) / settings.batch_size) for task in tasks)
    return per_epoch * settings.epochs


def train_projector(
    reader: FrozenReader,
    tasks: Sequence[Examples],
    settings: ProjectorSettings,
    *,
    width: int,
    checkpoints: CheckpointFolder | None = None,
    on_step: Callable[[ProjectorProgress], None] = lambda _: None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> tuple[Projector, list[float]]:
    """Train; returns the projector and the loss of every step. Goes on from the newest sound checkpoint.

    Batches are of one task each, in an order shuffled anew every epoch by the seed.

    Raises:
        ProjectorStoppedError
        LossNotFiniteError
        ValueError: there is no example.
    """
    total = num_steps(tasks, settings)
    if total == 0:
        raise ValueError("there is nothing to train on")
    per_epoch = total // settings.epochs
    torch.manual_seed(settings.seed)
    projector = Projector(width, reader.hidden_size, settings.num_layers).to(reader.device)
    optimizer = torch.optim.AdamW(
        projector.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    losses: list[float] = []
    found = checkpoints.newest_sound() if checkpoints is not None else None
    if found is not None:
        projector.load_state_dict(found.weights)
        _restore(optimizer, projector, found)
        losses = list(found.state["losses"])

    def save() -> None:
        if checkpoints is not None:
            checkpoints.save(
                RunCheckpoint(
                    step=len(losses),
                    weights=dict(projector.state_dict()),
                    optimizer=_moments(optimizer, projector),
                    state={"losses": losses, "settings": asdict(settings)},
                ),
                keep=set(),
                keep_last=1,
            )

    for epoch in range(len(losses) // per_epoch, settings.epochs):
        batches = _batches(tasks, settings, epoch)
        for task, numbers in batches[len(losses) - epoch * per_epoch :]:
            if stop_requested():
                save()
                raise ProjectorStoppedError(len(losses))
            rate = settings.learning_rate * schedule(len(losses), total)
            for group in optimizer.param_groups:
                group["lr"] = rate
            rows = _rows(reader, projector, task, numbers)
            loss = reader.loss(task.prompt, rows, [task.answers[number] for number in numbers])
            if not bool(torch.isfinite(loss)):
                raise LossNotFiniteError(f"the loss of step {len(losses) + 1} is {float(loss)}")
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(projector.parameters(), MAX_GRADIENT_NORM)
            optimizer.step()
            losses.append(float(loss.detach()))
            on_step(
                ProjectorProgress(
                    step=len(losses), total=total, loss=losses[-1], learning_rate=rate
                )
            )
            if len(losses) % settings.checkpoint_steps == 0:
                save()
    return projector, losses


@torch.no_grad()
def score_examples(
    reader: FrozenReader,
    projector: Projector,
    examples: Examples,
    continuations: Sequence[tuple[int, ...]],
    *,
    on_batch: Callable[[int], None] = lambda _: None,
) -> Float32s:
    """Summed log-probabilities (examples, continuations). `on_batch` is told how many examples are done."""
    scores = [np.empty((0, len(continuations)), dtype=np.float32)]
    for numbers in _evaluation_batches(examples):
        rows = _rows(reader, projector, examples, numbers)
        scores.append(reader.score(examples.prompt, rows, continuations).cpu().numpy())
        on_batch(int(numbers[-1]) + 1)
    return np.concatenate(scores)


@torch.no_grad()
def mean_loss(
    reader: FrozenReader,
    projector: Projector,
    examples: Examples,
    *,
    on_batch: Callable[[int], None] = lambda _: None,
) -> float:
    """Cross-entropy per token of all answers. `on_batch` is told how many examples are done."""
    total, num_tokens = 0.0, 0
    for numbers in _evaluation_batches(examples):
        answers = [examples.answers[number] for number in numbers]
        rows = _rows(reader, projector, examples, numbers)
        num_new = sum(map(len, answers))
        total += float(reader.loss(examples.prompt, rows, answers)) * num_new
        num_tokens += num_new
        on_batch(int(numbers[-1]) + 1)
    return total / num_tokens


@torch.no_grad()
def write_answers(
    reader: FrozenReader,
    projector: Projector,
    examples: Examples,
    *,
    max_tokens: int,
    end_token_id: int,
) -> list[list[int]]:
    """Token ids that follow each prompt, decoded greedily."""
    written: list[list[int]] = []
    for numbers in _evaluation_batches(examples):
        rows = _rows(reader, projector, examples, numbers)
        written += reader.write(
            examples.prompt, rows, max_tokens=max_tokens, end_token_id=end_token_id
        )
    return written


def _evaluation_batches(examples: Examples) -> list[npt.NDArray[np.int64]]:
    numbers = np.arange(len(examples.answers))
    return [numbers[i : i + EVALUATION_BATCH] for i in range(0, len(numbers), EVALUATION_BATCH)]


def _rows(
    reader: FrozenReader, projector: Projector, examples: Examples, numbers: npt.NDArray[np.int64]
) -> Tensor:
    """Projected rows of some examples (B, C, N, H)."""
    vectors, is_pad = examples.vectors(numbers)
    device = reader.device
    rows: Tensor = projector(
        torch.from_numpy(vectors).to(device), torch.from_numpy(is_pad).to(device)
    )
    return rows


def schedule(step: int, total: int) -> float:
    """Share of the peak learning rate at a step, counted from 0: linear warm-up, then a cosine to 0."""
    warm_up = math.ceil(WARM_UP_RATIO * total)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, total - warm_up)))


def _batches(
    tasks: Sequence[Examples], settings: ProjectorSettings, epoch: int
) -> list[tuple[Examples, npt.NDArray[np.int64]]]:
    generator = np.random.default_rng((settings.seed, epoch))
    batches = []
    for task in tasks:
        numbers = generator.permutation(len(task.answers))
        for first in range(0, len(numbers), settings.batch_size):
            batches.append((task, numbers[first : first + settings.batch_size]))
    return [batches[index] for index in generator.permutation(len(batches))]


def _moments(optimizer: torch.optim.Optimizer, projector: Projector) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": optimizer.state[parameter][key]
        for name, parameter in projector.named_parameters()
        for key in ("exp_avg", "exp_avg_sq", "step")
        if parameter in optimizer.state
    }


def _restore(optimizer: torch.optim.Optimizer, projector: Projector, found: RunCheckpoint) -> None:
    for name, parameter in projector.named_parameters():
        if f"{name}.step" in found.optimizer:
            optimizer.state[parameter] = {
                key: found.optimizer[f"{name}.{key}"] for key in ("exp_avg", "exp_avg_sq", "step")
            }
