"""Whether an earlier attempt of a job had finished all but telling so."""

import json

from compression.registry import ModelNotFoundError, ModelRegistry
from jobs.context import RunnerContext
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
    report: JsonObject = json.loads(path.read_text())
    return report
