"""A trained projector on disk and at work: `projector.json`, `projector.safetensors`, and the product without torch.

What a projector was trained with is part of it, and `check_use` refuses everything else by name: the LLM and the
encoder by their hashes, the hop operator, the versions of prompts and of text vectors. The Laplacian embedding of the
ND template is one of its tensors and is never computed again, since another solver may turn the eigenvectors.

Tensors: `layers.I.weight` (out, in) and `layers.I.bias`, float32; `laplacian` (N, N) for the ND template alone.
"""

import json
import math
import os
import re
import secrets
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from graph.llaga.filling import Bools, Float32s, Template
from graph.llaga.prompts import PROMPT_VERSION, TASKS, Task
from graph.text_vectors import VECTOR_VERSION

PROJECTOR_ID_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,95}$"
_PROJECTOR_ID = re.compile(PROJECTOR_ID_PATTERN[:-1] + r"\Z")
MANIFEST_NAME, TENSORS_NAME = "projector.json", "projector.safetensors"
FORMAT_VERSION = 1

JsonObject = dict[str, Any]
_VALUES_AT_ONCE = 2**16
_erf = np.frompyfunc(math.erf, 1, 1)


class ProjectorError(Exception):
    """A projector that cannot be read or used; the message says what, got, allowed.

    Attributes:
        param: what does not fit, as "model", "encoder", "operator"; None for unreadable files.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class ProjectorNotFoundError(Exception):
    """The registry has no projector of this id, or none of this owner."""


class ProjectorExistsError(Exception):
    """The registry has a projector of this id already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectorManifest:
    """What `projector.json` says.

    Attributes:
        model_hash, encoder_hash: `checkpoint_hash` of each.
        encoder: whose vectors of the nodes' texts it was trained with; None: the graph's own features.
        encoder_dim: of those vectors.
        hidden_size: of the LLM.
        classes: the answers that node classification was trained with.
        training: provenance, as the job tells it.
    """

    owner: str
    created_at: float = field(default_factory=time.time)
    model: str
    model_hash: str
    encoder: str | None
    encoder_hash: str | None
    encoder_dim: int
    hidden_size: int
    num_layers: int
    template: Template
    tasks: tuple[Task, ...]
    classes: tuple[str, ...]
    prompt_version: int = PROMPT_VERSION
    vector_version: int = VECTOR_VERSION
    training: JsonObject = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "ProjectorManifest":
        """Raises: ProjectorError."""
        if data.get("format_version") != FORMAT_VERSION:
            raise ProjectorError(
                f"format_version must be {FORMAT_VERSION}, got {data.get('format_version')!r}"
            )
        try:
            return cls(
                **{
                    "vector_version": 1,  # of files that do not say
                    **data,
                    "template": Template(**data["template"]),
                    "tasks": tuple(data["tasks"]),
                    "classes": tuple(data["classes"]),
                }
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ProjectorError(f"{MANIFEST_NAME} is malformed: {error}") from None

    def check_use(
        self,
        *,
        task: Task,
        model_hash: str,
        encoder_hash: str | None,
        operator: str | None = None,
    ) -> None:
        """Whether it may be used so. `operator`: what the caller believes it to be; None asks for nothing.

        Raises:
            ProjectorError
        """
        if task not in self.tasks:
            raise ProjectorError(
                f"the projector was trained for {', '.join(self.tasks)}, not for {task}", "task"
            )
        for name, got, known in (
            ("model", model_hash, self.model_hash),
            ("encoder", encoder_hash, self.encoder_hash),
        ):
            if got != known:
                wanted = getattr(self, name)
                raise ProjectorError(
                    f"the projector was trained with the {name} {wanted!r} of hash {str(known)[:12]},"
                    f" this one has {str(got)[:12]}",
                    name,
                )
        if operator is not None and operator != self.template.operator:
            raise ProjectorError(
                f"the projector was trained with the operator {self.template.operator},"
                f" got {operator}",
                "operator",
            )
        if self.encoder is not None and self.vector_version != VECTOR_VERSION:
            raise ProjectorError(
                f"the projector was trained with vectors of texts of version {self.vector_version},"
                f" this is version {VECTOR_VERSION}",
                "projector",
            )
        if self.prompt_version != PROMPT_VERSION:
            raise ProjectorError(
                f"the projector was trained with prompts of version {self.prompt_version},"
                f" this is version {PROMPT_VERSION}",
                "projector",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedProjector:
    """Attributes: layers: (weight, bias) of each."""

    manifest: ProjectorManifest
    layers: tuple[tuple[Float32s, Float32s], ...]
    laplacian: Float32s | None

    def project(self, vectors: Float32s, is_pad: Bools) -> Float32s:
        """Rows (..., N, H) of vectors (..., N, D); rows of PAD are zero."""
        rows = vectors
        for index, (weight, bias) in enumerate(self.layers):
            if index:
                rows = _gelu(rows)
            rows = rows @ weight.T + bias
        return np.where(is_pad[..., None], np.float32(0), rows)


def write_projector(
    folder: Path, manifest: ProjectorManifest, tensors: Mapping[str, Float32s]
) -> None:
    """Write a projector into an empty folder.

    Raises:
        ProjectorError: the tensors are not what the manifest promises.
    """
    from safetensors.numpy import save_file

    _check_tensors(manifest, tensors)
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, folder / TENSORS_NAME)
    (folder / MANIFEST_NAME).write_text(json.dumps(asdict(manifest), indent=1))


def read_projector_manifest(folder: Path) -> ProjectorManifest:
    """Raises: ProjectorError; FileNotFoundError."""
    try:
        data = json.loads((folder / MANIFEST_NAME).read_bytes())
    except ValueError:
        raise ProjectorError(f"{MANIFEST_NAME} is not JSON") from None
    if not isinstance(data, dict):
        raise ProjectorError(f"{MANIFEST_NAME} is not an object")
    return ProjectorManifest.from_json(data)


def load_projector(folder: Path) -> LoadedProjector:
    """Raises: ProjectorError; FileNotFoundError."""
    manifest = read_projector_manifest(folder)
    tensors = load_tensors(folder / TENSORS_NAME)
    _check_tensors(manifest, tensors)
    return LoadedProjector(
        manifest=manifest,
        layers=tuple(
            (tensors[f"layers.{index}.weight"], tensors[f"layers.{index}.bias"])
            for index in range(manifest.num_layers)
        ),
        laplacian=tensors.get("laplacian"),
    )


class ProjectorRegistry:
    """Projectors under one folder, each of one owner; one is there whole or not at all. Safe from several processes."""

    def __init__(self, folder: Path) -> None:
        self._dir = folder

    def path(self, projector_id: str, owner: str) -> Path:
        """Raises: ProjectorNotFoundError: unknown or malformed id, or another owner's; ProjectorError: unreadable."""
        self.manifest(projector_id, owner)
        return self._dir / projector_id

    def manifest(self, projector_id: str, owner: str) -> ProjectorManifest:
        """Raises: as `path`."""
        if not _PROJECTOR_ID.match(projector_id):
            raise ProjectorNotFoundError(projector_id)
        try:
            manifest = read_projector_manifest(self._dir / projector_id)
        except FileNotFoundError:
            raise ProjectorNotFoundError(projector_id) from None
        if manifest.owner != owner:
            raise ProjectorNotFoundError(projector_id)
        return manifest

    def list_projectors(self, owner: str) -> list[tuple[str, ProjectorManifest]]:
        """By id. A folder that cannot be read is no projector."""
        found = []
        for path in sorted(self._dir.iterdir()) if self._dir.is_dir() else []:
            try:
                found.append((path.name, self.manifest(path.name, owner)))
            except (ProjectorNotFoundError, ProjectorError):
                continue
        return found

    def is_taken(self, projector_id: str) -> bool:
        """Whether the id is anybody's."""
        return (self._dir / projector_id).exists()

    def new_folder(self) -> Path:
        """An empty folder on the registry's file system, for `register`."""
        path = self._dir / f".new-{secrets.token_hex(8)}"
        path.mkdir(parents=True)
        return path

    def discard(self, folder: Path) -> None:
        """Remove a folder that `new_folder` made, unless it was registered."""
        shutil.rmtree(folder, ignore_errors=True)

    def register(self, folder: Path, projector_id: str) -> None:
        """Move a finished projector in under its id, in one rename.

        Raises:
            ProjectorExistsError: the id is taken; the folder stays where it is.
            ProjectorError: it is unsound.
            ValueError: the id is malformed.
        """
        if not _PROJECTOR_ID.match(projector_id):
            raise ValueError(f"projector id must match {PROJECTOR_ID_PATTERN}")
        load_projector(folder)
        try:
            os.rename(folder, self._dir / projector_id)  # refuses a folder that is not empty
        except OSError as error:
            if (self._dir / projector_id).exists():
                raise ProjectorExistsError(projector_id) from error
            raise

    def delete(self, projector_id: str, owner: str) -> None:
        """Raises: ProjectorNotFoundError."""
        hidden = self._dir / f".deleted-{secrets.token_hex(8)}"
        self.path(projector_id, owner).rename(hidden)
        shutil.rmtree(hidden)


def load_tensors(path: Path) -> dict[str, Float32s]:
    """Raises: ProjectorError: it is no safetensors file."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors: dict[str, Float32s] = load_file(path)
    except SafetensorError as error:
        raise ProjectorError(f"{path.name} is no safetensors file: {error}") from None
    return tensors


def _check_tensors(manifest: ProjectorManifest, tensors: Mapping[str, Float32s]) -> None:
    if unknown := set(manifest.tasks) - set(TASKS):
        raise ProjectorError(f"unknown tasks: {', '.join(sorted(unknown))}")
    width = manifest.template.width(manifest.encoder_dim)
    promised: dict[str, tuple[int, ...]] = {}
    for index in range(manifest.num_layers):
        promised[f"layers.{index}.weight"] = (manifest.hidden_size, width)
        promised[f"layers.{index}.bias"] = (manifest.hidden_size,)
        width = manifest.hidden_size
    if manifest.template.kind == "nd":
        promised["laplacian"] = (manifest.template.num_rows,) * 2
    if surplus := sorted(tensors.keys() - promised.keys()):
        raise ProjectorError(f"unknown tensor {surplus[0]!r}")
    for name, shape in promised.items():
        tensor = tensors.get(name)
        if tensor is None:
            raise ProjectorError(f"tensor {name!r} is missing")
        if tensor.shape != shape or tensor.dtype != np.float32:
            raise ProjectorError(
                f"tensor {name!r} must be float32 {shape}, got {tensor.dtype} {tensor.shape}"
            )


def _gelu(values: Float32s) -> Float32s:
    """The exact one, with the error function; in pieces, as the interpreter's lock is held for each."""
    flat = values.reshape(-1)
    activated = np.empty_like(flat)
    for start in range(0, len(flat), _VALUES_AT_ONCE):
        piece = flat[start : start + _VALUES_AT_ONCE]
        share: Float32s = _erf(piece / math.sqrt(2)).astype(np.float32)
        activated[start : start + _VALUES_AT_ONCE] = (piece * (1 + share) / 2).astype(np.float32)
    return activated.reshape(values.shape)
