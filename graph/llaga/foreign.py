"""Brings in a projector that was trained elsewhere: its layers, and for the tree its Laplacian embedding.

The authors' code (LLaGA, arXiv:2402.08170) names a linear projector `model.mm_projector.weight` and `.bias`, and the
layers of an MLP `model.mm_projector.0`, `.2`, `.4`, a GELU between them. Both, and the names of our own folders, are
read from safetensors; a pickle is not read. The Laplacian embedding must come along: eigenvectors computed again are
turned ones.

What is brought in answers our prompts. One that was trained with others, as the authors' released ones are, has to be
measured before it is believed.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from graph.llaga.filling import Float32s, Template
from graph.llaga.projector import (
    ProjectorError,
    ProjectorManifest,
    ProjectorRegistry,
    load_tensors,
    write_projector,
)
from graph.llaga.prompts import Task

_FOREIGN = re.compile(r"(?:.*\.)?mm_projector\.(?:(\d+)\.)?(weight|bias)\Z")


def load_laplacian(path: Path, template: Template) -> Float32s:
    """The structural embedding of a projector trained elsewhere: the one tensor of a safetensors file (N, N).

    Raises:
        ProjectorError: unreadable, more than one tensor, another shape, not finite.
    """
    tensors = load_tensors(path)
    size = template.num_rows
    if len(tensors) != 1:
        raise ProjectorError(f"{path.name} must have one tensor, got {len(tensors)}")
    (laplacian,) = tensors.values()
    if laplacian.shape != (size, size):
        raise ProjectorError(
            f"the Laplacian embedding must be ({size}, {size}), got {laplacian.shape}"
        )
    found: Float32s = laplacian.astype(np.float32)
    if not np.isfinite(found).all():
        raise ProjectorError("the Laplacian embedding is not finite")
    return found


def import_projector(
    registry: ProjectorRegistry,
    projector_id: str,
    layers: Path,
    laplacian: Path | None,
    *,
    owner: str,
    model: tuple[str, str],
    hidden_size: int,
    encoder: tuple[str, str] | None,
    template: Template,
    tasks: Sequence[Task],
    classes: Sequence[str],
) -> ProjectorManifest:
    """Register it.

    Args:
        layers: safetensors file.
        laplacian: of "nd", and only of it.
        model, encoder: id and `checkpoint_hash` of each; without an encoder the graph's own features are read.
        hidden_size: of the LLM.

    Raises:
        ProjectorError: the tensors do not fit together, or to the template.
        ProjectorExistsError: the id is taken.
        ValueError: the id is malformed.
    """
    if (laplacian is None) == (template.kind == "nd"):
        raise ProjectorError("a Laplacian embedding goes with the nd template, and only with it")
    if "node_classification" in tasks and len(classes) < 2:
        raise ProjectorError("node_classification needs the classes that it was trained with")
    tensors = _our_names(load_tensors(layers))
    first = tensors.get("layers.0.weight")
    if first is None or first.ndim != 2:
        raise ProjectorError(f"{layers.name} has no first layer")
    if first.shape[0] != hidden_size:
        raise ProjectorError(
            f"the projector makes rows of {first.shape[0]}, {model[0]} reads rows of {hidden_size}"
        )
    manifest = ProjectorManifest(
        owner=owner,
        model=model[0],
        model_hash=model[1],
        encoder=None if encoder is None else encoder[0],
        encoder_hash=None if encoder is None else encoder[1],
        encoder_dim=first.shape[1] - template.width(0),
        hidden_size=hidden_size,
        num_layers=sum(name.endswith(".weight") for name in tensors),
        template=template,
        tasks=tuple(tasks),
        classes=tuple(classes),
        training={"imported_from": layers.name},
    )
    if laplacian is not None:
        tensors["laplacian"] = load_laplacian(laplacian, template)
    folder = registry.new_folder()
    try:
        write_projector(folder, manifest, tensors)
        registry.register(folder, projector_id)
    finally:
        registry.discard(folder)  # gone already where it was registered
    return manifest


def _our_names(tensors: Mapping[str, Float32s]) -> dict[str, Float32s]:
    """`layers.I.weight` and `.bias`, float32."""
    renamed: dict[str, Float32s] = {}
    for name, tensor in tensors.items():
        match = _FOREIGN.match(name)
        if match is not None:
            place = int(match[1] or 0)
            if place % 2:
                raise ProjectorError(f"{name} stands where the GELU is")
            name = f"layers.{place // 2}.{match[2]}"
        if not np.isfinite(tensor).all():
            raise ProjectorError(f"{name} is not finite")
        renamed[name] = tensor.astype(np.float32)
    return renamed
