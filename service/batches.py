"""What is known of a batch besides its job: how far its requests are, and which files it made.

The job's process writes it to the job's folder, and the API process shows it.
"""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from jobs.store import JsonObject

JOB_TYPE = "batch"
RUNNER = "service.batch_runner:run"
Endpoint = Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings"]
MAX_REQUESTS = 50_000
_FILE = "batch.json"


@dataclass(slots=True, kw_only=True)
class BatchState:
    """Times are Unix seconds.

    Attributes:
        in_progress_at: when the input file had been checked.
        errors: what is wrong with the input file: code, line, message, param.
    """

    total: int = 0
    completed: int = 0
    failed: int = 0
    in_progress_at: float | None = None
    finalizing_at: float | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    errors: list[JsonObject] = field(default_factory=list)

    @classmethod
    def load(cls, folder: Path) -> "BatchState":
        """Of the job with this folder; one that never ran has made nothing yet."""
        try:
            return cls(**json.loads((folder / _FILE).read_text()))
        except FileNotFoundError:
            return cls()

    def save(self, folder: Path) -> None:
        temporary = folder / f".{_FILE}.tmp"
        temporary.write_text(json.dumps(asdict(self)))
        os.replace(temporary, folder / _FILE)
