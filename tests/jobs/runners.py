"""Runners for tests of the worker."""

import json
import os
import signal
import time

from jobs.context import JobCancelledError, RunnerContext
from jobs.store import JsonObject


def crash_once(context: RunnerContext) -> JsonObject:
    context.progress(1, 2)
    if context.attempt == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return {"attempt": context.attempt, "owner": context.owner}


def stubborn(context: RunnerContext) -> JsonObject:
    """Never looks whether it was cancelled."""
    context.event("started")
    time.sleep(600)
    return {}


def broken(context: RunnerContext) -> JsonObject:
    raise ZeroDivisionError("on purpose")


def who_sleeps(context: RunnerContext) -> JsonObject:
    path = context.home / "run" / "asleep.json"
    return {"asleep": sorted(json.loads(path.read_text())) if path.is_file() else []}


def slow_to_stop(context: RunnerContext) -> JsonObject:
    """Takes a while to write a checkpoint; the second attempt has nothing left to do."""
    checkpoint = context.folder / "checkpoint"
    if checkpoint.is_file():
        return {"attempt": context.attempt}
    context.event("started")
    while not context.cancelled():
        time.sleep(0.01)
    time.sleep(1.5)
    checkpoint.touch()
    raise JobCancelledError(context.job_id)
