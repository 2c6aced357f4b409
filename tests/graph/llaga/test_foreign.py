"""Projectors trained elsewhere: the authors' names and ours, the Laplacian that comes along, and what does not fit."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch import nn

from graph.llaga.filling import Template
from graph.llaga.foreign import import_projector, load_laplacian
from graph.llaga.projector import (
    LoadedProjector,
    ProjectorError,
    ProjectorExistsError,
    ProjectorRegistry,
    load_projector,
)
from tests.graph.llaga.test_projector import HO, ND

DIM, HIDDEN = 5, 8
PREFIX = "model.mm_projector."


def bring_in(folder: Path, tensors: Any, template: Template, **changes: Any) -> LoadedProjector:
    save_file(tensors, folder / "mm_projector.safetensors")
    registry = ProjectorRegistry(folder / "projectors")
    options: dict[str, Any] = {
        "laplacian": None, "owner": "me", "model": ("m", "a" * 64), "hidden_size": HIDDEN, "encoder": ("e", "b" * 64),
        "template": template, "tasks": ["node_classification"], "classes": ["x", "y"],
    }  # fmt: skip
    options |= changes
    import_projector(registry, "theirs", folder / "mm_projector.safetensors", **options)
    return load_projector(registry.path("theirs", "me"))


def foreign(modules: nn.Module) -> dict[str, Any]:
    return {f"{PREFIX}{name}": tensor.numpy() for name, tensor in modules.state_dict().items()}


@pytest.mark.parametrize("num_layers", [1, 3])
def test_the_authors_names(tmp_path: Path, num_layers: int) -> None:
    """Linear layers with a GELU between them, as nn.Sequential numbers them."""
    torch.manual_seed(0)
    module: nn.Module = nn.Linear(DIM, HIDDEN)
    if num_layers > 1:
        parts: list[nn.Module] = [module]
        for _ in range(num_layers - 1):
            parts += [nn.GELU(), nn.Linear(HIDDEN, HIDDEN)]
        module = nn.Sequential(*parts)
    loaded = bring_in(tmp_path, foreign(module), HO)
    assert loaded.manifest.num_layers == num_layers
    assert (loaded.manifest.encoder_dim, loaded.manifest.hidden_size) == (DIM, HIDDEN)
    vectors = np.random.default_rng(0).normal(size=(2, 3, DIM)).astype(np.float32)
    with torch.no_grad():
        expected = module(torch.from_numpy(vectors)).numpy()
    assert np.allclose(loaded.project(vectors, np.zeros((2, 3), bool)), expected, atol=1e-5)


def test_the_laplacian_comes_along(tmp_path: Path) -> None:
    laplacian = np.random.default_rng(1).normal(size=(13, 13)).astype(np.float16)
    save_file({"u": laplacian}, tmp_path / "u.safetensors")
    layer = nn.Linear(DIM + 13, HIDDEN).half()
    loaded = bring_in(
        tmp_path, foreign(layer), ND, laplacian=tmp_path / "u.safetensors", encoder=None
    )
    assert loaded.laplacian is not None
    assert np.array_equal(loaded.laplacian, laplacian.astype(np.float32))
    assert (loaded.manifest.encoder, loaded.manifest.encoder_dim) == (None, DIM)
    with pytest.raises(ProjectorExistsError):
        bring_in(tmp_path, foreign(layer), ND, laplacian=tmp_path / "u.safetensors")
    assert [path.name for path in (tmp_path / "projectors").iterdir()] == ["theirs"]


def test_a_laplacian_that_does_not_fit(tmp_path: Path) -> None:
    laplacian = np.random.default_rng(0).normal(size=(13, 13))
    path = tmp_path / "u.safetensors"
    for bad in (
        {"u": laplacian[:12]},
        {"u": laplacian, "v": laplacian},
        {"u": laplacian * np.nan},
    ):
        save_file(bad, path)
        with pytest.raises(ProjectorError):
            load_laplacian(path, ND)
    path.write_bytes(b"no tensors")
    with pytest.raises(ProjectorError, match="no safetensors"):
        load_laplacian(path, ND)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"template": ND}, "goes with the nd template"),
        ({}, {"classes": ["x"]}, "needs the classes"),
        ({"weight": None}, {}, "no first layer"),
        ({}, {"hidden_size": 64}, "rows of 8, m reads rows of 64"),
        ({"bias": None}, {}, "'layers.0.bias' is missing"),
        ({"1.weight": np.zeros((2, 2), np.float32)}, {}, "where the GELU is"),
        ({"weight": np.full((HIDDEN, DIM), np.nan, np.float32)}, {}, "not finite"),
        ({"2.weight": np.zeros((3, HIDDEN), np.float32)}, {}, "layers.1.weight"),
    ],
)
def test_what_does_not_fit(tmp_path: Path, change: Any, options: Any, message: str) -> None:
    tensors = foreign(nn.Linear(DIM, HIDDEN))
    for name, value in change.items():
        tensors.pop(PREFIX + name, None)
        if value is not None:
            tensors[PREFIX + name] = value
    with pytest.raises(ProjectorError, match=message):
        bring_in(tmp_path, tensors, options.pop("template", HO), **options)
    found = tmp_path / "projectors"
    assert not found.exists() or list(found.iterdir()) == []


def test_our_own_names_are_read(tmp_path: Path) -> None:
    tensors = {
        f"layers.0.{name}": tensor.numpy()
        for name, tensor in nn.Linear(DIM, HIDDEN).state_dict().items()
    }
    loaded = bring_in(tmp_path, tensors, replace(HO, hops=1), tasks=["link_prediction"], classes=[])
    assert np.array_equal(loaded.layers[0][0], tensors["layers.0.weight"])
