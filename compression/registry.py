"""The model registry: the folder of checkpoints that may be served, by id. No id from a request becomes a
path unchecked."""

import os
import re
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path

from compression.checkpoint import MANIFEST_NAME, Manifest, read_manifest
from compression.safetensors_header import CheckpointError

MODEL_ID_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,95}$"
_MODEL_ID = re.compile(MODEL_ID_PATTERN[:-1] + r"\Z")


class ModelNotFoundError(Exception):
    """The registry has no model of this id."""


class ModelExistsError(Exception):
    """The registry has a model of this id already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelEntry:
    """Attributes: created_at: Unix seconds."""

    id: str
    path: Path
    manifest: Manifest
    created_at: float


class ModelRegistry:
    """Checkpoints under one folder; a model is there whole or not at all. Safe from several processes."""

    def __init__(self, models_dir: Path) -> None:
        self._dir = models_dir
        self._cache: dict[str, tuple[int, ModelEntry]] = {}

    def list_models(self) -> list[ModelEntry]:
        """All models, by id. A folder without a readable manifest is not a model."""
        entries: list[ModelEntry] = []
        if not self._dir.is_dir():
            return entries
        for path in sorted(self._dir.iterdir()):
            try:
                entries.append(self.get(path.name))
            except (ModelNotFoundError, CheckpointError):
                continue  # `lathe verify` tells what is wrong with it
        return entries

    def get(self, model_id: str) -> ModelEntry:
        """Raises: ModelNotFoundError: unknown or malformed id; CheckpointError: unreadable manifest."""
        if not is_model_id(model_id):
            raise ModelNotFoundError(model_id)
        path = self._dir / model_id
        try:
            stamp = (path / MANIFEST_NAME).stat().st_mtime_ns
        except (FileNotFoundError, NotADirectoryError):
            raise ModelNotFoundError(model_id) from None
        cached = self._cache.get(model_id)
        if cached is not None and cached[0] == stamp:
            return cached[1]
        manifest = read_manifest(path)
        entry = ModelEntry(
            id=model_id, path=path, manifest=manifest, created_at=manifest.created_at
        )
        self._cache[model_id] = (stamp, entry)
        return entry

    def new_folder(self) -> Path:
        """An empty folder on the registry's file system, for `register`; hidden from `list_models`."""
        path = self._dir / f".new-{secrets.token_hex(8)}"
        path.mkdir(parents=True)
        return path

    def register(self, folder: Path, model_id: str) -> ModelEntry:
        """Move a finished checkpoint in under its id, in one rename.

        Raises:
            ModelExistsError: the id is taken; the folder stays where it is.
            ValueError: the id is malformed.
        """
        if not is_model_id(model_id):
            raise ValueError(f"model id must match {MODEL_ID_PATTERN}")
        read_manifest(folder)
        self._dir.mkdir(parents=True, exist_ok=True)
        try:
            os.rename(folder, self._dir / model_id)  # refuses a folder that is not empty
        except OSError as error:
            if (self._dir / model_id).exists():
                raise ModelExistsError(model_id) from error
            raise
        return self.get(model_id)

    def delete(self, model_id: str) -> None:
        """Raises: ModelNotFoundError."""
        path = self.get(model_id).path
        hidden = self._dir / f".deleted-{secrets.token_hex(8)}"
        os.rename(path, hidden)
        self._cache.pop(model_id, None)
        shutil.rmtree(hidden)


def is_model_id(model_id: str) -> bool:
    return _MODEL_ID.match(model_id) is not None
