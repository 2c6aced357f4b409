"""Logs as JSON lines, each with the ids of the request, job and trace that caused it. Never a body, a prompt or a key.

Every process of Lathe writes them: API, engine hosts, workers, jobs.
"""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Literal, get_args

from engines.origin import current_origin

LogLevel = Literal["debug", "info", "warning", "error"]
LEVELS: tuple[LogLevel, ...] = get_args(LogLevel)
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message"}


class JsonFormatter(logging.Formatter):
    """One JSON object a line; control characters cannot leave it, since JSON escapes them."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        origin = current_origin()
        ids = {name: getattr(origin, name) for name in ("request_id", "job_id", "trace_id")}
        fields |= {name: value for name, value in ids.items() if value is not None}
        fields |= {k: v for k, v in vars(record).items() if k not in _STANDARD}
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=str)


def set_up_logging(level: str) -> None:
    """Send every logger of this process, uvicorn's included, to stderr as JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    for name in ("uvicorn", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers = []
        logger.propagate = True
    logging.getLogger("httpx").setLevel("WARNING")
