"""The process that runs one attempt of one job: `python -m jobs.child FD`, with the attempt as JSON on standard input.

Messages go to the worker as JSON lines over the pipe FD: progress and events, and at the end one of "result", "failed",
"cancelled". JSON has no NaN or infinity, so such a number arrives as null. The child never touches the job store: one
whose lease was lost can do no harm there.
"""

import errno
import importlib
import json
import logging
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engines.logs import set_up_logging
from engines.origin import Origin, caused_by
from engines.process import die_with_parent, set_torch_environment
from jobs.context import JobCancelledError, JobFailedError, RunnerContext, finite
from jobs.store import JsonObject

RUNNERS = {
    "calibrate_skip": "jobs.runners.calibrate_skip:run",
    "compress": "jobs.runners.compress:run",
    "enrich": "jobs.runners.enrich:run",
    "export": "jobs.runners.export:run",
    "finetune": "jobs.runners.finetune:run",
    "train_projector": "jobs.runners.train_projector:run",
}
MAX_MESSAGE_CHARS = 500

logger = logging.getLogger("lathe.job")


def main(argv: list[str]) -> int:
    die_with_parent()
    if os.getppid() != int(os.environ["LATHE_PARENT_PID"]):
        return 1  # the worker ended before the kernel was asked to watch it
    set_torch_environment()
    pipe = os.fdopen(int(argv[0]), "w", buffering=1)
    attempt = json.loads(sys.stdin.read())
    cancelled = False

    def on_terminate(*_: object) -> None:
        nonlocal cancelled
        cancelled = True

    signal.signal(signal.SIGTERM, on_terminate)

    def send(message: JsonObject) -> None:
        pipe.write(encode(message) + "\n")

    folder = Path(attempt["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    context = RunnerContext(
        job_id=attempt["job_id"],
        owner=attempt["owner"],
        attempt=attempt["attempt"],
        spec=attempt["spec"],
        folder=folder,
        home=Path(attempt["home"]),
        send=send,
        cancelled=lambda: cancelled,
    )
    set_up_logging(attempt["log_level"])
    with caused_by(Origin(**attempt["origin"])):
        logger.info("attempt %d of %s starts", context.attempt, context.job_id)
        pipe.write(_outcome(context, attempt["runner"]) + "\n")
    pipe.close()
    return 0


def encode(message: JsonObject) -> str:
    """One line of JSON.

    Raises:
        TypeError: it holds what JSON has not.
    """
    try:
        return json.dumps(message, allow_nan=False)
    except ValueError:
        return json.dumps(finite(message), allow_nan=False)


def _outcome(context: RunnerContext, target: str) -> str:
    """Run, and say how it ended. The traceback goes to the job's log, one line of it to the job."""
    module, _, function = target.partition(":")
    try:
        run: Any = getattr(importlib.import_module(module), function)
        return encode({"result": run(context)})
    except JobCancelledError:
        return encode({"cancelled": True})
    except JobFailedError as error:
        failed = {"code": error.code, "message": error.message}
        return encode({"failed": failed, "found": error.result})
    except Exception as error:
        logger.exception("the job failed")
        code, message = _classify(error)
        return encode({"failed": {"code": code, "message": message}})


def _classify(error: Exception) -> tuple[str, str]:
    """Machine code and message of a failure; a library may have wrapped what really happened."""
    for cause in _chain(error):
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return "disk_full", "the disk is full"
        if "No space left on device" in str(cause):  # from a library not written in Python
            return "disk_full", "the disk is full"
        names = {base.__name__ for base in type(cause).__mro__}
        if isinstance(cause, MemoryError) or "OutOfMemoryError" in names:
            return "out_of_memory", "the job ran out of memory"
        if "DefaultCPUAllocator: can't allocate memory" in str(cause):
            return "out_of_memory", "the job ran out of memory"
    return "runner_crashed", f"{type(error).__name__}: {error}"[:MAX_MESSAGE_CHARS]


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
