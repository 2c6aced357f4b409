"""A projector written, read and used: the product against torch, PAD, hidden partners, and every mismatch by name."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from graph.llaga import projector
from graph.llaga.filling import Template, plan_filling
from graph.llaga.projector import (
    MANIFEST_NAME,
    TENSORS_NAME,
    ProjectorError,
    ProjectorExistsError,
    ProjectorManifest,
    ProjectorNotFoundError,
    ProjectorRegistry,
    load_projector,
    write_projector,
)
from graph.llaga.templates import laplacian_embedding
from tests.graph.llaga.test_templates import everyone, random_graph
from training.projector import Projector

ND = Template(kind="nd", hops=2, fanout=3)
HO = Template(kind="ho", hops=2, operator="mean")
DIM, HIDDEN = 5, 8


def manifest_of(template: Template, num_layers: int = 2) -> ProjectorManifest:
    return ProjectorManifest(
        owner="me", model="m", model_hash="a" * 64, encoder="e", encoder_hash="b" * 64,
        encoder_dim=DIM, hidden_size=HIDDEN, num_layers=num_layers, template=template,
        tasks=("node_classification",), classes=("x", "y"),
    )  # fmt: skip


def tensors_of(manifest: ProjectorManifest) -> tuple[Projector, dict[str, Any]]:
    torch.manual_seed(0)
    width = manifest.template.width(DIM)
    module = Projector(width, HIDDEN, manifest.num_layers)
    tensors = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
    if manifest.template.kind == "nd":
        tensors["laplacian"] = laplacian_embedding(2, 3)
    return module, tensors


def test_values_are_activated_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    whole = projector._gelu(values)
    assert np.allclose(whole, torch.nn.functional.gelu(torch.from_numpy(values)), atol=1e-6)
    monkeypatch.setattr(projector, "_VALUES_AT_ONCE", 7)
    assert np.array_equal(projector._gelu(values), whole)


@pytest.mark.parametrize("template", [ND, HO])
@pytest.mark.parametrize("num_layers", [1, 3])
def test_rows_are_those_of_torch(tmp_path: Path, template: Template, num_layers: int) -> None:
    manifest = manifest_of(template, num_layers)
    module, tensors = tensors_of(manifest)
    write_projector(tmp_path, manifest, tensors)
    loaded = load_projector(tmp_path)
    assert loaded.manifest == manifest
    graph = random_graph(tmp_path / "graphs")
    features = np.random.default_rng(0).normal(size=(60, DIM)).astype(np.float32)
    vectors, is_pad = plan_filling(template, graph, everyone(graph)).vectors(
        features, tensors.get("laplacian")
    )
    rows = loaded.project(vectors, is_pad)
    with torch.no_grad():
        expected = module(torch.from_numpy(vectors), torch.from_numpy(is_pad))
    assert np.allclose(rows, expected.numpy(), atol=1e-5)
    assert np.all(rows[is_pad] == 0)
    assert is_pad.any() == (template.kind == "nd")
    alone = plan_filling(template, graph, np.array([7]))
    alone_rows = loaded.project(*alone.vectors(features, tensors.get("laplacian")))
    assert np.allclose(alone_rows[0], rows[7], atol=1e-6)


def test_vectors_of_the_tree(tmp_path: Path) -> None:
    graph = random_graph(tmp_path)
    features = np.random.default_rng(0).normal(size=(60, DIM)).astype(np.float32)
    places = laplacian_embedding(2, 3)
    filling = plan_filling(ND, graph, np.array([0, 59]))
    vectors, _ = filling.vectors(features, places)
    assert np.array_equal(vectors[0, 0], np.concatenate([features[0], places[0]]))
    assert np.array_equal(vectors[1, 4, :DIM], np.zeros(DIM))  # 59 is isolated
    assert np.array_equal(vectors[1, 4, DIM:], places[4])
    assert filling.nodes[1].tolist() == [59]


@pytest.mark.parametrize("template", [ND, HO])
def test_the_partner_fills_no_template(tmp_path: Path, template: Template) -> None:
    graph = random_graph(tmp_path)
    centres, partners = graph.edges.astype(np.int64).T
    filling = plan_filling(template, graph, centres, hidden=partners)
    for centre, partner, nodes in zip(centres, partners, filling.nodes, strict=True):
        assert centre in nodes
        assert partner not in nodes


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("laplacian", lambda tensor: None),
        ("layers.0.weight", lambda tensor: tensor[:, 1:]),
        ("layers.1.bias", lambda tensor: tensor.astype(np.float16)),
        ("surplus", lambda tensor: np.zeros(1, dtype=np.float32)),
    ],
)
def test_damaged_tensors_are_refused(tmp_path: Path, name: str, change: Any) -> None:
    manifest = manifest_of(ND)
    write_projector(tmp_path, manifest, tensors_of(manifest)[1])
    tensors = load_file(tmp_path / TENSORS_NAME)
    changed = change(tensors.pop(name, None))
    if changed is not None:
        tensors[name] = changed
    save_file(tensors, tmp_path / TENSORS_NAME)
    with pytest.raises(ProjectorError, match=name):
        load_projector(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format_version must be 1"),
        ({"template": {"kind": "ho", "hops": 2, "operator": "median"}}, "operator must be one of"),
        ({"unknown": 1}, "malformed"),
    ],
)
def test_damaged_manifests_are_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    manifest = manifest_of(HO)
    write_projector(tmp_path, manifest, tensors_of(manifest)[1])
    path = tmp_path / MANIFEST_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ProjectorError, match=message):
        load_projector(tmp_path)


@pytest.mark.parametrize(
    ("use", "param"),
    [
        ({"task": "link_prediction"}, "task"),
        ({"model_hash": "c" * 64}, "model"),
        ({"encoder_hash": "c" * 64}, "encoder"),
        ({"operator": "sym"}, "operator"),
    ],
)
def test_mismatches_are_refused(use: dict[str, Any], param: str) -> None:
    right: dict[str, Any] = {
        "task": "node_classification", "model_hash": "a" * 64, "encoder_hash": "b" * 64, "operator": "mean",
    }  # fmt: skip
    manifest = manifest_of(HO)
    manifest.check_use(**right)
    with pytest.raises(ProjectorError) as caught:
        manifest.check_use(**(right | use))
    assert caught.value.param == param
    with pytest.raises(ProjectorError, match="prompts of version 0"):
        replace(manifest, prompt_version=0).check_use(**right)


def test_one_that_was_trained_with_other_text_vectors_is_refused(tmp_path: Path) -> None:
    """A file that names no version is of the first."""
    manifest = manifest_of(HO)
    write_projector(tmp_path, manifest, tensors_of(manifest)[1])
    path = tmp_path / MANIFEST_NAME
    data = json.loads(path.read_text())
    del data["vector_version"]
    path.write_text(json.dumps(data))
    old = load_projector(tmp_path).manifest
    use: Any = {"task": "node_classification", "model_hash": "a" * 64}
    with pytest.raises(ProjectorError, match="vectors of texts of version 1"):
        old.check_use(**use, encoder_hash="b" * 64)
    # the graph's own features are what they were
    replace(old, encoder=None, encoder_hash=None).check_use(**use, encoder_hash=None)


@pytest.mark.parametrize(
    "bad",
    [
        {"kind": "tree", "hops": 2},
        {"kind": "ho", "hops": 0, "operator": "mean"},
        {"kind": "ho", "hops": 2},
        {"kind": "ho", "hops": 2, "operator": "mean", "fanout": 3},
        {"kind": "nd", "hops": 2},
        {"kind": "nd", "hops": 2, "fanout": 3, "operator": "mean"},
        {"kind": "nd", "hops": 4, "fanout": 10},
    ],
)
def test_bad_templates(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"template|hops|operator|fanout|tree"):
        Template(**bad)


def test_registry(tmp_path: Path) -> None:
    registry = ProjectorRegistry(tmp_path / "projectors")
    assert registry.list_projectors("me") == []
    manifest = manifest_of(HO)
    for _ in range(2):
        folder = registry.new_folder()
        write_projector(folder, manifest, tensors_of(manifest)[1])
        assert [name for name, _ in registry.list_projectors("me")] in ([], ["mine"])
        if registry.list_projectors("me"):
            with pytest.raises(ProjectorExistsError):
                registry.register(folder, "mine")
        else:
            registry.register(folder, "mine")
    with pytest.raises(ValueError, match="must match"):
        registry.register(folder, "../x")
    assert registry.list_projectors("me") == [("mine", manifest)]
    assert registry.list_projectors("you") == []
    for projector_id, owner in (("mine", "you"), ("other", "me"), ("../projectors/mine", "me")):
        with pytest.raises(ProjectorNotFoundError):
            registry.path(projector_id, owner)
    registry.delete("mine", "me")
    assert registry.list_projectors("me") == []
