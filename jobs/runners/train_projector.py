"""The train_projector job: questions of a graph, a projector learnt before a frozen LLM, its accuracy, registration.

After LLaGA (Chen et al. 2024, arXiv:2402.08170). Safe to kill at any moment: vectors of nodes are kept as they are
made, training goes on from its newest sound checkpoint, and one rename puts the projector into the registry. The graph
is read from the files that were open when the attempt began: one that is deleted meanwhile is trained on to the end.
"""

import dataclasses
import json
import time
from typing import Any

import numpy as np
import torch

from compression.checkpoint import checkpoint_hash, verify_checkpoint
from compression.hf import load_model
from compression.registry import ModelEntry, ModelNotFoundError, ModelRegistry
from compression.safetensors_header import CheckpointError
from engines.protocol import EngineError
from graph.cache import EnrichmentCache
from graph.llaga.filling import Float32s, Template, nodes_within
from graph.llaga.projector import (
    ProjectorError,
    ProjectorExistsError,
    ProjectorManifest,
    ProjectorNotFoundError,
    ProjectorRegistry,
    write_projector,
)
from graph.llaga.prompts import Task
from graph.llaga.questions import QuestionError, TaskQuestions, make_all_questions
from graph.llaga.templates import laplacian_embedding
from graph.store import SPLITS, Graph, GraphNotFoundError, GraphStore
from jobs.context import JobCancelledError, JobFailedError, RunnerContext, finite
from jobs.runners.projector_examples import (
    AnswerText,
    TextEncoder,
    build_examples,
    check_length,
    encode_nodes,
)
from jobs.runners.projector_results import judge, to_markdown
from jobs.runners.registration import REPORT_NAME
from jobs.store import JsonObject
from training.checkpointing import CheckpointFolder
from training.projector import (
    Examples,
    FrozenReader,
    LossNotFiniteError,
    Projector,
    ProjectorProgress,
    ProjectorSettings,
    ProjectorStoppedError,
    num_steps,
    train_projector,
)

MARKDOWN_NAME = "report.md"
JUDGED = ("val", "test")
EVENT_SECONDS = 1.0
"""Of two steps that end closer together than this, the first has no event."""


def run(context: RunnerContext) -> JsonObject:
    """Run one attempt; returns the job's result.

    Raises:
        JobFailedError: graph or models are gone or unsound, the graph has no such questions, a prompt is too long, the
            loss is not finite, or the output id was taken meanwhile.
        JobCancelledError: asked to stop; a checkpoint is kept.
    """
    projectors = ProjectorRegistry(context.home / "projectors")
    finished = _earlier_report(context, projectors)
    if finished is not None:
        return _result(context, finished)
    try:
        report = _train(context, projectors)
    except ModelNotFoundError as error:
        raise JobFailedError("model_not_found", f"model {str(error)!r} is gone") from None
    except GraphNotFoundError:
        message = f"graph {context.spec['graph']!r} is gone"
        raise JobFailedError("graph_not_found", message) from None
    except (CheckpointError, QuestionError) as error:
        raise JobFailedError("bad_data", str(error)) from error
    except LossNotFiniteError as error:
        raise JobFailedError("loss_not_finite", str(error)) from error
    except EngineError as error:
        raise JobFailedError(error.code, error.message) from error
    except ProjectorStoppedError as stopped:
        context.event(f"stopped after step {stopped.step}; its checkpoint is kept")
        raise JobCancelledError(context.job_id) from None
    return _result(context, report)


def _earlier_report(context: RunnerContext, projectors: ProjectorRegistry) -> JsonObject | None:
    """The report of the attempt that registered the job's own projector; None where none did."""
    path = context.artifacts / REPORT_NAME
    try:
        manifest = projectors.manifest(context.spec["output"], context.owner)
    except (ProjectorNotFoundError, ProjectorError):
        return None
    if manifest.training.get("job_id") != context.job_id or not path.is_file():
        return None
    context.event("an earlier attempt had finished; its projector is registered")
    report: JsonObject = json.loads(path.read_text())
    return report


def _result(context: RunnerContext, report: JsonObject) -> JsonObject:
    artifacts = sorted(path.name for path in context.artifacts.iterdir())
    return {
        "projector": context.spec["output"],
        "report": _without_losses(report),
        "artifacts": artifacts,
    }


def _without_losses(report: JsonObject) -> JsonObject:
    return {key: value for key, value in report.items() if key != "losses"}


def _train(context: RunnerContext, projectors: ProjectorRegistry) -> JsonObject:
    spec = context.spec
    template = Template(**spec["template"])
    choices = dict(spec["settings"])
    dtype: torch.dtype = getattr(torch, choices.pop("dtype"))
    settings = ProjectorSettings(**choices)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = ModelRegistry(context.home / "models")
    source = _sound(models.get(spec["model"]))
    encoder = None
    if "embedding_model" in spec:
        encoder = TextEncoder(_sound(models.get(spec["embedding_model"])))
    graph = GraphStore(context.home / "graphs").get(spec["graph"], context.owner)
    tasks = make_all_questions(
        graph, spec["tasks"], seed=settings.seed, max_questions=spec.get("max_questions")
    )
    features = _features(context, graph, tasks, template, encoder)
    laplacian = None
    if template.fanout is not None:
        laplacian = laplacian_embedding(template.hops, template.fanout)
    model = load_model(source.path, dtype=dtype, device=device)
    text = AnswerText(source.path, model)
    examples: dict[Task, dict[str, Examples]] = {
        task.task: {
            split: build_examples(
                task,
                split,
                template,
                features,
                laplacian,
                text,
                context.folder,
                context.check_cancelled,
            )
            for split in SPLITS
        }
        for task in tasks
    }
    for part in (part for splits in examples.values() for part in splits.values()):
        check_length(source, part)
    progress = _Progress(context, [splits["train"] for splits in examples.values()], settings)
    reader = FrozenReader(model)
    started = time.monotonic()
    projector, losses = train_projector(
        reader,
        progress.train,
        settings,
        width=template.width(features.shape[1]),
        checkpoints=_checkpoints(context, graph, source, encoder),
        on_step=progress.on_step,
        stop_requested=context.cancelled,
    )
    trained = time.monotonic()
    results = _judge(context, tasks, examples, reader, projector, text, encoder)
    report: JsonObject = {
        "template": spec["template"],
        "settings": spec["settings"],
        "device": device,
        "graph": {"id": graph.info.id, "content_hash": graph.info.content_hash},
        "num_examples": {
            name: {split: len(part.answers) for split, part in splits.items()}
            for name, splits in examples.items()
        },
        "num_parameters": sum(parameter.numel() for parameter in projector.parameters()),
        "steps": len(losses),
        "last_loss": float(np.mean(losses[-20:])),
        "results": results,
        "seconds": {
            "training": round(trained - started, 1),
            "evaluation": round(time.monotonic() - trained, 1),
        },
        "losses": losses,
    }
    manifest = ProjectorManifest(
        owner=context.owner,
        model=source.id,
        model_hash=checkpoint_hash(source.manifest),
        encoder=None if encoder is None else encoder.info.model,
        encoder_hash=None if encoder is None else encoder.info.checkpoint_hash,
        encoder_dim=features.shape[1],
        hidden_size=reader.hidden_size,
        num_layers=settings.num_layers,
        template=template,
        tasks=tuple(spec["tasks"]),
        classes=next((task.choices for task in tasks if task.task == "node_classification"), ()),
        training={"job_id": context.job_id, **finite(_without_losses(report))},
    )
    _write_report(context, report)
    _register(context, projectors, manifest, projector, laplacian)
    return report


def _sound(entry: ModelEntry) -> ModelEntry:
    """Raises: CheckpointError."""
    problems = verify_checkpoint(entry.path).problems
    if problems:
        raise CheckpointError(f"{entry.id} is unsound: {problems[0]}")
    return entry


def _features(
    context: RunnerContext,
    graph: Graph,
    tasks: list[TaskQuestions],
    template: Template,
    encoder: TextEncoder | None,
) -> Float32s:
    """Of every node that a template reads: the graph's own features, or the encoder's vectors."""
    if encoder is None:
        if graph.features is None:
            raise QuestionError("the graph has no features of its own")
        return graph.features
    centres = np.concatenate([q.ravel() for task in tasks for q in task.questions.values()])
    nodes = nodes_within(graph, centres, template.hops)
    cache = EnrichmentCache(context.home / "cache.db")
    try:
        features, num_encoded = encode_nodes(
            graph, nodes, encoder, cache, context.owner, context.progress
        )
    finally:
        cache.close()
    context.event(
        f"{len(nodes):,} nodes are in reach; {num_encoded:,} texts were encoded",
        data={"nodes": len(nodes), "encoded": num_encoded},
    )
    return features


def _checkpoints(
    context: RunnerContext, graph: Graph, source: ModelEntry, encoder: TextEncoder | None
) -> CheckpointFolder:
    identity = [
        context.spec,
        graph.info.content_hash,
        checkpoint_hash(source.manifest),
        None if encoder is None else encoder.info.checkpoint_hash,
    ]
    return CheckpointFolder(context.folder / "work", identity)


class _Progress:
    """Steps as the API shows them."""

    def __init__(
        self, context: RunnerContext, train: list[Examples], settings: ProjectorSettings
    ) -> None:
        self._context = context
        self._told_at = float("-inf")
        self.train = train
        context.progress(0, num_steps(train, settings))

    def on_step(self, progress: ProjectorProgress) -> None:
        self._context.send({"progress": [progress.step, progress.total]})
        now = time.monotonic()
        if now - self._told_at < EVENT_SECONDS and progress.step < progress.total:
            return
        self._told_at = now
        self._context.event(
            f"step {progress.step}/{progress.total}: loss {progress.loss:.4f}",
            kind="metrics",
            data=dataclasses.asdict(progress),
        )


def _judge(
    context: RunnerContext,
    tasks: list[TaskQuestions],
    examples: dict[Task, dict[str, Examples]],
    reader: FrozenReader,
    projector: Projector,
    text: AnswerText,
    encoder: TextEncoder | None,
) -> JsonObject:
    """What the projector makes of held-out questions, by task and split."""
    results: JsonObject = {task.task: {} for task in tasks}
    for task in tasks:
        for split in JUDGED:
            found = judge(
                reader,
                projector,
                task,
                split,
                examples[task.task][split],
                text,
                encoder,
                lambda _: context.check_cancelled(),
            )
            results[task.task][split] = found
            shown = ", ".join(f"{k} {v:.4f}" for k, v in (found or {}).items() if v is not None)
            context.event(f"{task.task}, {split}: {shown or 'no questions'}", data={"found": found})
    return results


def _write_report(context: RunnerContext, report: JsonObject) -> None:
    title = (
        f"{context.spec['model']} on {context.spec['graph']} -> {context.spec['output']}: projector"
    )
    contents: dict[str, Any] = {
        REPORT_NAME: json.dumps(finite(report), indent=1),
        MARKDOWN_NAME: to_markdown(title, report),
    }
    for name, content in contents.items():
        temporary = context.folder / f".{name}.tmp"
        temporary.write_text(content)
        temporary.replace(context.artifacts / name)


def _register(
    context: RunnerContext,
    projectors: ProjectorRegistry,
    manifest: ProjectorManifest,
    projector: Projector,
    laplacian: Float32s | None,
) -> None:
    tensors = {name: t.detach().cpu().numpy() for name, t in projector.state_dict().items()}
    if laplacian is not None:
        tensors["laplacian"] = laplacian
    folder = projectors.new_folder()
    output = context.spec["output"]
    try:
        write_projector(folder, manifest, tensors)
        context.check_cancelled()
        projectors.register(folder, output)
    except ProjectorExistsError:
        message = f"projector {output!r} exists already"
        raise JobFailedError("projector_exists", message) from None
    finally:
        projectors.discard(folder)  # gone already where it was registered
    context.event(f"registered {output}")
