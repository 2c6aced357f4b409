"""From a graph's questions to what a projector is trained on: vectors of templates, token ids of prompts and answers.

The words become tokens here as the query route makes them, so that a projector is asked what it was taught.
"""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compression.hf import read_config
from compression.registry import ModelEntry
from compression.safetensors_header import CheckpointError
from engines.encoder_engine import EncoderEngine
from engines.protocol import EmbedRequest, EmbedResult
from engines.text import TextTokenizer
from engines.transformers_engine import eos_token_ids
from graph.cache import EnrichmentCache
from graph.llaga.filling import Float32s, Template, plan_questions, question_vectors
from graph.llaga.prompts import MAX_DESCRIPTION_TOKENS, Task, answer_text, build_prompt
from graph.llaga.questions import TaskQuestions
from graph.node_text import TextModel, normalise
from graph.served_text import ServedText
from graph.store import Graph, Int64s
from graph.text_vectors import TextVectors, VectorUsage, text_tokens
from jobs.context import JobFailedError
from training.projector import Examples, TaskPrompt

_FILL_BATCH = 256


class TextEncoder:
    """A sentence encoder with its tokenizer, in this process; an `Embedder`."""

    def __init__(self, entry: ModelEntry) -> None:
        """Raises: CheckpointError."""
        if entry.manifest.kind != "encoder":
            raise CheckpointError(f"{entry.id} is no encoder")
        self._engine = EncoderEngine.load(entry.id, entry.path)
        self.text = ServedText.load(entry.path)
        self.info = self._engine.info

    async def embed(self, request: EmbedRequest) -> EmbedResult:
        return self._engine.embed(request)

    def vectors(self, texts: Sequence[str]) -> Float32s:
        """Of unit norm (texts, dim); zero for a text without a token."""
        ids = text_tokens(self.text, [normalise(text) for text in texts], self.info)
        rows = np.zeros((len(texts), self.info.hidden_size), dtype=np.float32)
        filled = [index for index, one in enumerate(ids) if one]
        if filled:
            request = EmbedRequest(
                request_id="projector", token_ids=tuple(ids[index] for index in filled)
            )
            vectors = np.frombuffer(self._engine.embed(request).vectors, dtype="<f4")
            rows[filled] = vectors.reshape(len(filled), -1)
        return rows


class AnswerText:
    """Between words and the LLM's tokens."""

    def __init__(self, folder: Path, model: Any) -> None:
        self._tokenizer = TextTokenizer.load(folder)
        ids = eos_token_ids(model)
        if not ids:
            raise CheckpointError("the model has no token that ends a text")
        self.end_token_id = ids[0]

    def prompt(self, task: TaskQuestions) -> TaskPrompt:
        prompt = build_prompt(task.task, task.choices if task.task == "node_classification" else ())
        return TaskPrompt(
            before=(*self._tokenizer.special_prefix, *self._tokenizer.encode(prompt.before)),
            after=tuple(tuple(self._tokenizer.encode(part)) for part in prompt.after),
        )

    def encode(self, task: Task, answer: str) -> tuple[int, ...]:
        """An answer and its end mark."""
        ids = self._tokenizer.encode(answer_text(answer))
        if task == "node_description":
            ids = ids[: MAX_DESCRIPTION_TOKENS - 1]
        return (*ids, self.end_token_id)

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True).strip()


def encode_nodes(
    graph: Graph,
    nodes: Int64s,
    encoder: TextEncoder,
    cache: EnrichmentCache,
    tenant: str,
    on_batch: Callable[[int, int], None],
) -> tuple[Float32s, int]:
    """Features (nodes of the graph, dim), whose rows of `nodes` are filled, and of how many nodes they were made now.

    Args:
        on_batch: told of nodes done and to do; what it raises ends the work, and what was encoded is kept.
    """

    async def engine_for(model: str, param: str) -> TextEncoder:
        return encoder

    async def text_for(model: str, param: str) -> TextModel:
        return encoder.text

    usage = VectorUsage()
    vectors = TextVectors(engine_for=engine_for, text_for=text_for, cache=cache)
    features = np.zeros((graph.info.num_nodes, encoder.info.hidden_size), dtype=np.float32)
    features[nodes] = asyncio.run(
        vectors.encode(
            graph, nodes, model=encoder.info.model, tenant=tenant, usage=usage, on_batch=on_batch
        )
    )
    return features, usage.num_encoded


def build_examples(
    task: TaskQuestions,
    split: str,
    template: Template,
    features: Float32s,
    laplacian: Float32s | None,
    text: AnswerText,
    folder: Path,
    on_batch: Callable[[], None],
) -> Examples:
    """Args: folder: where the vectors lie, memory-mapped: those of many questions are larger than memory."""
    questions = task.questions[split]
    shape = (*questions.shape, template.num_rows, template.width(features.shape[1]))
    vectors = _array(folder / f"{task.task}-{split}.npy", shape)
    is_pad = np.zeros(shape[:3], dtype=bool)
    for first in range(0, len(questions), _FILL_BATCH):
        span = slice(first, first + _FILL_BATCH)
        fillings = plan_questions(template, task.graph, task.task, questions[span])
        vectors[span], is_pad[span] = question_vectors(fillings, features, laplacian)
        on_batch()
    return Examples(
        prompt=text.prompt(task),
        vectors=lambda numbers: (np.asarray(vectors[numbers]), is_pad[numbers]),
        answers=[text.encode(task.task, answer) for answer in task.answers[split]],
    )


def check_length(source: ModelEntry, examples: Examples) -> None:
    """Raises: JobFailedError: a prompt with its answer is longer than the LLM reads."""
    if not examples.answers:
        return
    limit = read_config(source.path).get("max_position_embeddings")
    _, is_pad = examples.vectors(np.arange(1))
    num_texts = len(examples.prompt.before) + sum(map(len, examples.prompt.after))
    needed = num_texts + is_pad.size + max(map(len, examples.answers))
    if limit is not None and needed > limit:
        message = f"a prompt with its answer has {needed} tokens, {source.id} reads {limit}"
        raise JobFailedError("context_length_exceeded", message)


def _array(path: Path, shape: tuple[int, ...]) -> Float32s:
    if 0 in shape:
        return np.empty(shape, dtype=np.float32)
    array: Float32s = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    path.unlink()  # the file lives as long as it is mapped
    return array
