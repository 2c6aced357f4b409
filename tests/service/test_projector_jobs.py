"""Submitting a train_projector job: what is refused before it is queued, and what is stored of it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from compression.import_model import import_folder
from compression.registry import ModelRegistry
from graph.llaga.projector import ProjectorRegistry, write_projector
from service.app import build_app
from service.settings import Settings
from tests.graph.llaga.test_projector import HO, manifest_of, tensors_of
from tests.service.openai_app import error_of

GRAPH: dict[str, Any] = {
    "name": "letters",
    "nodes": [{"id": name, "text": name, "label": name, "features": [1.0, 2.0]} for name in "abc"],
    "edges": [["a", "b"]],
}


@pytest.fixture(scope="module")
def models(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    import_folder(ModelRegistry(folder), "tiny", tiny_llama, report=lambda _: None)
    return folder


@pytest.fixture
def client(models: Path, tmp_path: Path) -> Iterator[TestClient]:
    (tmp_path / "models").symlink_to(models)
    with TestClient(build_app(Settings(home=tmp_path)), raise_server_exceptions=False) as found:
        yield found


def body_of(client: TestClient, graph: Any = GRAPH) -> dict[str, Any]:
    graph_id = client.post("/v1/graphs", json=graph).json()["id"]
    return {"type": "train_projector", "graph": graph_id, "model": "tiny", "output": "mine"}


def test_a_job_is_stored_with_its_defaults(client: TestClient) -> None:
    response = client.post("/v1/jobs", json=body_of(client))
    assert response.status_code == 201, response.text
    job = response.json()
    assert (job["type"], job["status"], job["memory"]) == ("train_projector", "queued", None)
    assert job["spec"]["template"] == {"kind": "ho", "hops": 4, "operator": "sym_selfloop"}
    assert job["spec"]["tasks"] == ["node_classification"]
    assert job["spec"]["settings"]["epochs"] == 3
    assert "embedding_model" not in job["spec"]


@pytest.mark.parametrize(
    ("change", "status", "code", "param"),
    [
        ({"graph": "graph-none"}, 404, "graph_not_found", "graph"),
        ({"model": "nobody"}, 404, "model_not_found", "model"),
        ({"embedding_model": "nobody"}, 404, "model_not_found", "embedding_model"),
        ({"embedding_model": "tiny"}, 400, "invalid_value", "embedding_model"),
        ({"output": "taken"}, 409, "projector_exists", "output"),
        ({"template": {"kind": "nd", "operator": "mean"}}, 400, "invalid_value", "template"),
        ({"settings": {"momentum": 0.9}}, 400, "unsupported_parameter", "settings.momentum"),
    ],
)
def test_refusals(
    client: TestClient, tmp_path: Path, change: Any, status: int, code: str, param: str
) -> None:
    registry = ProjectorRegistry(tmp_path / "projectors")
    folder = registry.new_folder()
    write_projector(folder, manifest_of(HO), tensors_of(manifest_of(HO))[1])
    registry.register(folder, "taken")  # somebody else's: an id is one projector's
    response = client.post("/v1/jobs", json=body_of(client) | change)
    assert error_of(response, status) == (code, param)


def test_a_graph_without_what_is_asked_about(client: TestClient) -> None:
    bare = {
        "name": "bare",
        "nodes": [{"id": "a", "text": "x"}, {"id": "b", "text": ""}],
        "edges": [],
    }
    featured = bare | {"nodes": [node | {"features": [0.5]} for node in bare["nodes"]]}  # type: ignore[operator]
    for graph, tasks, param in (
        (bare, ["node_description"], "embedding_model"),
        (featured, ["node_classification"], "tasks"),
        (featured, ["link_prediction"], "tasks"),
    ):
        response = client.post("/v1/jobs", json=body_of(client, graph) | {"tasks": tasks})
        assert error_of(response) == ("invalid_value", param)
