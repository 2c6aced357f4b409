"""How a job's result becomes a model that is served, and whether an earlier attempt had got as far."""

import json
from pathlib import Path

from compression.registry import ModelExistsError, ModelNotFoundError, ModelRegistry
from jobs.context import JobFailedError, RunnerContext
from jobs.store import JsonObject

REPORT_NAME = "report.json"


def earlier_report(context: RunnerContext, registry: ModelRegistry) -> JsonObject | None:
    """The report of the attempt that registered the job's own model; None where none did."""
    try:
        entry = registry.get(context.spec["output"])
    except ModelNotFoundError:
        return None
    path = context.artifacts / REPORT_NAME
    if entry.manifest.job_id != context.job_id or not path.is_file():
        return None
    context.event("an earlier attempt had finished; its model is registered")
    report: JsonObject = json.loads(path.read_text())
    return report


def register_output(context: RunnerContext, registry: ModelRegistry, folder: Path) -> None:
    """Move the finished checkpoint into the registry under the job's output id, unless the job was cancelled.

    Raises:
        JobFailedError: the id was taken meanwhile.
        JobCancelledError
    """
    context.check_cancelled()
    output = context.spec["output"]
    try:
        registry.register(folder, output)
    except ModelExistsError:
        raise JobFailedError("model_exists", f"model {output!r} exists already") from None
    context.event(f"registered {output}")
