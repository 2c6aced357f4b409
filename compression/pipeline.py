"""Runs a recipe over a checkpoint, stage by stage and block by block, into a new checkpoint.

Every stage turns a checkpoint into a checkpoint, so a recipe of two stages gives what two recipes of one stage give.
In memory are one block, the hidden states between two blocks where a stage is calibrated, and at the end one shard.
What is finished is on disk: a run that was killed goes on after its last finished block, and ends in the same bytes.
Nothing of the source is changed.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from compression.block import Block, BlockNames, is_finite, list_blocks, load_block
from compression.calibration import BlockRunner, CalibrationTokens
from compression.checkpoint import (
    LAYER_SHAPES,
    Checkpoint,
    CheckpointWriter,
    Manifest,
    Matrix,
    checkpoint_hash,
    head_dim,
    open_checkpoint,
    write_manifest,
)
from compression.disk import sync
from compression.hf import LATHE_ONLY, check_config, is_lathe_only, read_config
from compression.memory import trim_heap
from compression.quantization.int4 import quantization_config
from compression.recipe import Int4, Int8, Recipe, RecipeError, Stage, parse_recipe
from compression.safetensors_header import CheckpointError
from compression.stages import (
    HEADS,
    StageContext,
    StageError,
    apply_stage,
    needs_gram,
    needs_statistics,
    plan_stage,
    read_plan,
)

JsonObject = dict[str, Any]
Progress = Callable[[int, int], None]
# Raised whenever the same recipe would give other bytes; unfinished work of another version is thrown away.
PIPELINE_VERSION = 3


def compress(
    source: Path,
    destination: Path,
    recipe: Recipe,
    *,
    source_id: str,
    job_id: str | None = None,
    calibration: CalibrationTokens | None = None,
    work: Path | None = None,
    cache: Path | None = None,
    progress: Progress = lambda step, total: None,
) -> Manifest:
    """Apply a recipe.

    Args:
        destination: an empty folder; it is a checkpoint once this returns.
        calibration: needed exactly where the recipe is calibrated.
        work: what is finished is kept here for a later call with the same arguments; None to keep nothing. What a
            stage leaves for the report stays in `stage-N` of it.
        cache: folder for singular values by weight hash.
        progress: called with (matrices done, matrices in all) between steps; may raise to stop.

    Raises:
        CheckpointError: the source is unsound, or compressed in a way that the recipe cannot start from.
        StageError: a stage asks for what this model has not.
        CalibrationError: the model's blocks are not known, or samples exceed its context.
    """
    if recipe.calibrated != (calibration is not None):
        raise ValueError("calibration tokens are needed exactly where the recipe is calibrated")
    checkpoint = open_checkpoint(source)
    if checkpoint.manifest.kind != "decoder":
        raise CheckpointError("only decoders can be compressed")
    try:
        parse_recipe(recipe.to_json(), done=checkpoint.manifest.recipe)
    except RecipeError as error:
        raise CheckpointError(f"{error.param}: {error.message}") from None
    check_config(checkpoint)
    if work is None:
        with tempfile.TemporaryDirectory(dir=destination.parent, prefix=".work-") as temporary:
            return compress(
                source,
                destination,
                recipe,
                source_id=source_id,
                job_id=job_id,
                calibration=calibration,
                work=Path(temporary),
                cache=cache,
                progress=progress,
            )
    origin = {"model": source_id, "checkpoint_hash": checkpoint_hash(checkpoint.manifest)}
    provenance = None if calibration is None else calibration.provenance
    resumes = _start_or_resume(work, [PIPELINE_VERSION, origin, recipe.to_json(), provenance])
    if not resumes and destination.is_dir() and any(destination.iterdir()):
        raise CheckpointError(f"{destination.name}: not empty")
    num_matrices = len(checkpoint.manifest.matrices)
    results: list[JsonObject] = []
    current = source
    for index, stage in enumerate(recipe.stages):
        last = index == len(recipe.stages) - 1
        run = _StageRun(
            source=current,
            destination=destination if last else work / f"stage-{index}" / "checkpoint",
            stage=stage,
            work=work / f"stage-{index}",
            cache=cache,
            calibration=calibration,
            progress=lambda done, offset=index * num_matrices: progress(  # type: ignore[misc]
                offset + done, num_matrices * len(recipe.stages)
            ),
        )
        results.append({stage.name: run.run()})
        current = run.destination
    progress(num_matrices * len(recipe.stages), num_matrices * len(recipe.stages))
    return _complete(destination, checkpoint.manifest, recipe, results, origin, job_id, provenance)


def _start_or_resume(work: Path, identity: list[Any]) -> bool:
    """Empty the folder unless it holds the unfinished work of exactly this; whether it does."""
    path = work / "identity.json"
    text = json.dumps(identity, sort_keys=True)
    if path.is_file() and path.read_text() == text:
        return True
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    _write_text(path, text)
    return False


def _complete(
    folder: Path,
    before: Manifest,
    recipe: Recipe,
    results: list[JsonObject],
    origin: JsonObject,
    job_id: str | None,
    calibration: JsonObject | None,
) -> Manifest:
    after = open_checkpoint(folder).manifest
    ratios = {
        "bytes": after.tensor_bytes / before.tensor_bytes,
        "parameters": after.parameters / before.parameters,
    }
    for result in results:
        for found in result.values():
            if "effective_rank_reduction" in found:
                ratios["effective_rank_reduction"] = found["effective_rank_reduction"]
    manifest = replace(
        after,
        source=origin,
        recipe=[*before.recipe, *recipe.to_json()],
        ratios=ratios,
        stage_results=[*before.stage_results, *results],
        calibration=calibration or before.calibration,
        job_id=job_id,
    )
    write_manifest(folder, manifest)
    return manifest


@dataclass(slots=True, kw_only=True)
class _StageRun:
    """One stage from checkpoint to checkpoint. Files in `work`, each renamed into place when whole:

    plan.json; then per block block-N.safetensors, hidden-N.safetensors (only the newest stays) and, last, block-N.json.
    """

    source: Path
    destination: Path
    stage: Stage
    work: Path
    cache: Path | None
    calibration: CalibrationTokens | None
    progress: Callable[[int], None]
    _done: int = 0

    def run(self) -> JsonObject:
        """Returns the stage's plan."""
        self.work.mkdir(exist_ok=True)
        checkpoint = open_checkpoint(self.source)
        blocks = list_blocks(checkpoint)
        plan = self._plan(checkpoint, blocks)
        removed = set(plan.get("remove", ()))
        kept = [names for names in blocks if names.index not in removed]
        if (self.destination / "lathe.json").is_file():
            return plan  # finished before an interruption
        self._walk(checkpoint, kept, plan)
        trim_heap()
        shutil.rmtree(self.destination, ignore_errors=True)
        self._assemble(checkpoint, kept, plan)
        for path in self.work.glob("block-*"):
            path.unlink()
        return plan

    def _check(self) -> None:
        self.progress(self._done)

    def _new_runner(self, checkpoint: Checkpoint) -> BlockRunner:
        assert self.calibration is not None
        return BlockRunner(self.source, checkpoint, self.calibration.ids_NS, check=self._check)

    def _plan(self, checkpoint: Checkpoint, blocks: list[BlockNames]) -> JsonObject:
        path = self.work / "plan.json"
        plan = read_plan(path)
        if plan is None:
            calibrated = self.stage.calibrated
            context = StageContext(
                checkpoint=checkpoint,
                blocks=blocks,
                new_runner=(lambda: self._new_runner(checkpoint)) if calibrated else None,
                cache=self.cache,
                work=self.work,
                check=self._check,
                head_dim=head_dim(read_config(self.source)),
            )
            plan = plan_stage(self.stage, context)
            _write_text(path, json.dumps(plan))
        return plan

    def _walk(self, checkpoint: Checkpoint, blocks: list[BlockNames], plan: JsonObject) -> None:
        num_done = 0
        while num_done < len(blocks) and (self.work / f"block-{num_done}.json").is_file():
            self._done += len(blocks[num_done].rows)
            num_done += 1
        walks = needs_statistics(self.stage)
        config = read_config(self.source)
        runner = None
        if walks and num_done < len(blocks):
            runner = self._new_runner(checkpoint)
            if num_done:
                runner.hidden_NSH = _read(self.work / f"hidden-{num_done - 1}.safetensors")[
                    "hidden"
                ]
        for position in range(num_done, len(blocks)):
            self._check()
            block = load_block(checkpoint, blocks[position])
            statistics = {}
            if runner is not None:
                statistics = runner.statistics(block, gram=needs_gram(self.stage))
            try:
                apply_stage(self.stage, block, plan, statistics, head_dim=head_dim(config))
            except ValueError as error:  # the pure functions refuse what is not finite
                raise StageError(f"{self.stage.name}: {block.prefix}: {error}") from error
            if runner is not None:
                runner.advance(block)
                hidden = self.work / f"hidden-{position}.safetensors"
                _write(hidden, {"hidden": runner.hidden_NSH})
            self._save(block, position)
            (self.work / f"hidden-{position - 1}.safetensors").unlink(missing_ok=True)
            self._done += len(block.linears)
        (self.work / f"hidden-{len(blocks) - 1}.safetensors").unlink(missing_ok=True)

    def _save(self, block: Block, position: int) -> None:
        prefix = f"{block.prefix.rpartition('.')[0]}.{position}."
        rows: list[JsonObject] = []
        tensors: dict[str, Tensor] = {}
        for name, linear in block.linears.items():
            row, stored = linear.encode()
            rows.append(replace(row, name=prefix + name).to_json())
            tensors |= {f"{prefix}{name}.{suffix}": tensor for suffix, tensor in stored.items()}
        others = {prefix + name: tensor for name, tensor in block.others.items()}
        _write(self.work / f"block-{position}.safetensors", tensors | others)
        record = {"rows": rows, "others": sorted(others)}
        _write_text(self.work / f"block-{position}.json", json.dumps(record))

    def _assemble(self, checkpoint: Checkpoint, kept: list[BlockNames], plan: JsonObject) -> None:
        writer = CheckpointWriter(self.destination)
        in_blocks = {row.name for names in list_blocks(checkpoint) for row in names.rows}
        in_blocks |= {name for names in list_blocks(checkpoint) for name in names.others}
        matrices = []
        for row, others, tensors in self._saved_blocks(len(kept)):
            for matrix in row:
                stored = {s: tensors[f"{matrix.name}.{s}"] for s in matrix.linear.tensors()}
                writer.add_linear(matrix, stored)
            for name in others:
                writer.add_other(name, _finite(name, tensors[name]))
            matrices += row
        for matrix in checkpoint.manifest.matrices:
            if matrix.name not in in_blocks:
                stored = {
                    s: checkpoint.tensor(f"{matrix.name}.{s}") for s in matrix.linear.tensors()
                }
                matrix = replace(
                    matrix,
                    dense_reason="outside the decoder blocks: the output head stays in full precision",
                )
                writer.add_linear(matrix, stored)
                matrices.append(matrix)
        for name in sorted(checkpoint.manifest.other_tensors):
            if name not in in_blocks:
                writer.add_other(name, _finite(name, checkpoint.tensor(name)))
        writer.copy_files(self.source)
        config = _configure(read_config(self.source), self.stage, plan, kept, matrices, checkpoint)
        writer.write_json("config.json", config)
        before = checkpoint.manifest
        writer.finish(
            kind="decoder",
            source=before.source,
            stage_results=before.stage_results,
            calibration=before.calibration,
        )

    def _saved_blocks(
        self, count: int
    ) -> Iterator[tuple[list[Matrix], list[str], dict[str, Tensor]]]:
        for position in range(count):
            record = json.loads((self.work / f"block-{position}.json").read_text())
            rows = [Matrix.from_json(row) for row in record["rows"]]
            yield rows, record["others"], _read(self.work / f"block-{position}.safetensors")


def _finite(name: str, tensor: Tensor) -> Tensor:
    if not is_finite(tensor):
        raise CheckpointError(f"{name} has values that are not finite")
    return tensor


def _configure(
    config: JsonObject,
    stage: Stage,
    plan: JsonObject,
    kept: list[BlockNames],
    matrices: list[Matrix],
    checkpoint: Checkpoint,
) -> JsonObject:
    """config.json after a stage: its dimensions, and how others may read the weights."""
    for name in LATHE_ONLY:
        config.pop(name, None)
    if "remove" in plan:
        config["num_hidden_layers"] = len(kept)
        for per_block in ("layer_types", LAYER_SHAPES):
            if config.get(per_block):
                config[per_block] = [config[per_block][names.index] for names in kept]
        if "max_window_layers" in config:
            config["max_window_layers"] = min(config["max_window_layers"], len(kept))
    if "intermediate_size" in plan:
        config["intermediate_size"] = plan["intermediate_size"]
    if plan.keys() & HEADS:
        config |= {name: plan[name] for name in HEADS}
    if LAYER_SHAPES in plan:
        config[LAYER_SHAPES] = plan[LAYER_SHAPES]
    kinds = {matrix.linear.kind for matrix in matrices}
    if is_lathe_only(config, kinds):
        config |= LATHE_ONLY
    elif isinstance(stage, Int4 | Int8):
        ignore = [matrix.name for matrix in matrices if matrix.linear.kind == "dense"]
        if "lm_head.weight" not in checkpoint.manifest.promised_tensors():
            ignore.append("lm_head")  # tied: no tensor of its own, but a Linear to loaders
        config["quantization_config"] = quantization_config(
            bits=4 if isinstance(stage, Int4) else 8,
            group_size=stage.group_size if isinstance(stage, Int4) else None,
            symmetric=not isinstance(stage, Int4) or stage.symmetric,
            ignore=ignore,
        )
    return config


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    temporary = path.with_suffix(".tmp")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
    _replace(temporary, path)


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    _replace(temporary, path)


def _replace(temporary: Path, path: Path) -> None:
    sync(temporary)
    temporary.replace(path)


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = load_file(path)
    return tensors
