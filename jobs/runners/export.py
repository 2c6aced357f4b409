"""The export job: a model as other programs read it, one tar archive among the job's artifacts.

An attempt that was killed leaves nothing that the next one does not write anew.
"""

import shutil
import tarfile
from pathlib import Path

from compression.checkpoint import verify_checkpoint
from compression.export import export
from compression.registry import ModelNotFoundError, ModelRegistry
from compression.safetensors_header import CheckpointError
from jobs.context import JobFailedError, RunnerContext
from jobs.store import JsonObject

ARCHIVE_NAME = "model.tar"
_STEPS = 3


def run(context: RunnerContext) -> JsonObject:
    """Run one attempt; returns the job's result.

    Raises:
        JobFailedError: the source is unsound, or the format cannot say what it is.
        JobCancelledError
    """
    model, format_ = context.spec["model"], context.spec["format"]
    folder = context.folder / "export"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        source = ModelRegistry(context.home / "models").get(model).path
        _check_sound(source, model)
        context.progress(1, _STEPS)
        manifest = export(source, folder, source_id=model, format=format_)
        context.progress(2, _STEPS)
        _check_sound(folder, "the copy")
    except ModelNotFoundError:
        raise JobFailedError("model_not_found", f"model {model!r} is gone") from None
    except CheckpointError as error:
        raise JobFailedError("bad_data", str(error)) from error
    temporary = context.artifacts / f".{ARCHIVE_NAME}.tmp"
    with tarfile.open(temporary, "w") as archive:
        archive.add(folder, arcname=model)
    temporary.replace(context.artifacts / ARCHIVE_NAME)
    shutil.rmtree(folder)
    context.progress(_STEPS, _STEPS)
    context.event(f"exported {model} as {format_}: {manifest.tensor_bytes:,} bytes")
    return {"format": format_, "bytes": manifest.tensor_bytes, "artifacts": [ARCHIVE_NAME]}


def _check_sound(folder: Path, name: str) -> None:
    problems = verify_checkpoint(folder).problems
    if problems:
        raise CheckpointError(f"{name} is unsound: {problems[0]}")
