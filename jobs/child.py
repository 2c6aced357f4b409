"""The process that runs one attempt of one job: `python -m jobs.child FD`, with the attempt as JSON on standard input.

Messages go to the worker as JSON lines over the pipe FD: progress and events, and at the end one of "result", "failed",
"cancelled". The child never touches the job store, so a stale one can do no harm there.
"""

import errno
import importlib
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from engines.process import die_with_parent, set_openmp_environment
from jobs.context import JobCancelledError, JobFailedError, RunnerContext
from jobs.store import JsonObject

RUNNERS = {"compress": "jobs.runners.compress:run"}


def main(argv: list[str]) -> int:
    die_with_parent()
    set_openmp_environment()
    pipe = os.fdopen(int(argv[0]), "w", buffering=1)
    attempt = json.loads(sys.stdin.read())
    cancelled = False

    def on_terminate(*_: object) -> None:
        nonlocal cancelled
        cancelled = True

    signal.signal(signal.SIGTERM, on_terminate)

    def send(message: JsonObject) -> None:
        pipe.write(json.dumps(message) + "\n")

    folder = Path(attempt["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    context = RunnerContext(
        job_id=attempt["job_id"],
        attempt=attempt["attempt"],
        spec=attempt["spec"],
        folder=folder,
        home=Path(attempt["home"]),
        send=send,
        cancelled=lambda: cancelled,
    )
    send(_outcome(context, attempt.get("runner") or RUNNERS[context.spec["type"]]))
    pipe.close()
    return 0


def _outcome(context: RunnerContext, target: str) -> JsonObject:
    """Run, and say how it ended. The traceback goes to the job's log, not to its owner."""
    module, _, function = target.partition(":")
    try:
        run: Any = getattr(importlib.import_module(module), function)
        return {"result": run(context)}
    except JobCancelledError:
        return {"cancelled": True}
    except JobFailedError as error:
        return {"failed": {"code": error.code, "message": error.message}, "found": error.result}
    except MemoryError:
        traceback.print_exc()
        return {"failed": {"code": "out_of_memory", "message": "the job ran out of memory"}}
    except OSError as error:
        traceback.print_exc()
        if error.errno == errno.ENOSPC:
            return {"failed": {"code": "disk_full", "message": "the disk is full"}}
        return {"failed": {"code": "runner_crashed", "message": f"{type(error).__name__}"}}
    except Exception as error:
        traceback.print_exc()
        code = "out_of_memory" if type(error).__name__ == "OutOfMemoryError" else "runner_crashed"
        return {"failed": {"code": code, "message": f"{type(error).__name__}: {error}"[:500]}}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
