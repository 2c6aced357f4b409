"""Checkpoints of an unfinished run: a folder per step of safetensors and JSON, written whole or not at all.

`state.json` comes last and has the sha256 of the other files; one rename puts the folder in its place. A folder that
does not verify, of a disk that filled up or a machine that died, is passed over for the one before.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from compression.checkpoint import hash_file
from compression.disk import sync

JsonObject = dict[str, Any]
STATE_NAME, IDENTITY_NAME = "state.json", "identity.json"
WEIGHTS_NAME, OPTIMIZER_NAME = "weights.safetensors", "optimizer.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunCheckpoint:
    """Attributes: state: what is no tensor, such as the losses so far."""

    step: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: JsonObject


class CheckpointFolder:
    """The checkpoints of one run, in one folder."""

    def __init__(self, work: Path, identity: list[Any]) -> None:
        """Args: identity: of the run; what another one left in the folder is thrown away."""
        self._work = work
        text = json.dumps(identity, sort_keys=True)
        path = work / IDENTITY_NAME
        if not (path.is_file() and path.read_text() == text):
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
            _write_text(path, text)
        for unfinished in work.glob(".new-*"):
            shutil.rmtree(unfinished)

    def steps(self) -> list[int]:
        """Of all checkpoints, ascending; whether they verify is not known yet."""
        return sorted(int(path.name.removeprefix("step-")) for path in self._work.glob("step-*"))

    def save(self, checkpoint: RunCheckpoint, *, keep: set[int], keep_last: int) -> None:
        """Write one, then drop all but the newest `keep_last` and those of `keep`."""
        from safetensors.torch import save_file

        folder = self._work / f".new-{checkpoint.step}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        hashes = {}
        for name, tensors in (
            (WEIGHTS_NAME, checkpoint.weights),
            (OPTIMIZER_NAME, checkpoint.optimizer),
        ):
            save_file({key: t.contiguous() for key, t in tensors.items()}, folder / name)
            sync(folder / name)
            hashes[name] = hash_file(folder / name)
        state = {"step": checkpoint.step, "sha256": hashes, "state": checkpoint.state}
        _write_text(folder / STATE_NAME, json.dumps(state))
        sync(folder)
        path = self._path(checkpoint.step)
        shutil.rmtree(path, ignore_errors=True)  # of the same step: the same bytes, or unsound
        folder.rename(path)
        sync(self._work)
        for step in set(self.steps()[:-keep_last]) - keep:
            shutil.rmtree(self._path(step))

    def newest_sound(self) -> RunCheckpoint | None:
        """The newest one that verifies; those behind it that do not are deleted."""
        for step in reversed(self.steps()):
            found = self._read(step)
            if found is not None:
                return found
            shutil.rmtree(self._path(step))
        return None

    def _path(self, step: int) -> Path:
        return self._work / f"step-{step:08d}"

    def _read(self, step: int) -> RunCheckpoint | None:
        from safetensors.torch import load_file

        folder = self._path(step)
        try:
            data = json.loads((folder / STATE_NAME).read_bytes())
            hashes, state = data["sha256"], data["state"]
            sound = data["step"] == step and all(
                hash_file(folder / name) == hashes[name] for name in (WEIGHTS_NAME, OPTIMIZER_NAME)
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if not sound:
            return None
        return RunCheckpoint(
            step=step,
            weights=load_file(folder / WEIGHTS_NAME),
            optimizer=load_file(folder / OPTIMIZER_NAME),
            state=state,
        )


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    sync(temporary)
    temporary.replace(path)
