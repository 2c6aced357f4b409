"""The examples of docs/enrichment.md: every request is sent, and every answer has the shape that the page says."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from compression.import_model import import_folder
from compression.registry import ModelRegistry
from service.app import build_app
from service.settings import DEFAULT_EMBEDDING_MODEL, DEFAULT_MODEL, Settings
from tests.jobs.test_enrich import Host

PAGE = Path(__file__).parents[2] / "docs" / "enrichment.md"
_EXAMPLE = re.compile(r"```http\n(\w+) (\S+)\n(.*?)```\n```json\n(.*?)```", re.DOTALL)


@pytest.fixture
def http(tiny_llama: Path, tmp_path: Path) -> Iterator[TestClient]:
    hosts = []
    for model in (DEFAULT_MODEL, DEFAULT_EMBEDDING_MODEL):
        registry = ModelRegistry(tmp_path / "models")
        import_folder(registry, model, tiny_llama, report=lambda _: None)
        hosts.append(Host(tmp_path, model))
    settings = Settings(home=tmp_path, cost_per_million_tokens=0.2)
    with TestClient(build_app(settings), raise_server_exceptions=False) as client:
        yield client
    for host in hosts:
        host.kill()


def same_shape(found: Any, shown: Any) -> bool:
    """The same fields, of the same kinds where none is null; a list shows some of its items, "…" anything."""
    if shown == "…" or found is None or shown is None:
        return True
    if isinstance(shown, dict):
        if "…" in shown:
            shown = {name: value for name, value in shown.items() if name != "…"}
        elif found.keys() != shown.keys():
            return False
        return all(name in found and same_shape(found[name], shown[name]) for name in shown)
    if isinstance(shown, list):
        return isinstance(found, list) and bool(found) and all(
            same_shape(found[min(i, len(found) - 1)], item) for i, item in enumerate(shown)
        )  # fmt: skip
    if isinstance(shown, int | float) and not isinstance(shown, bool):
        return isinstance(found, int | float)
    return type(found) is type(shown)


def test_every_example_answers_as_it_says(http: TestClient) -> None:
    text = PAGE.read_text()
    examples = _EXAMPLE.findall(text)
    assert len(examples) == text.count("```http") == 5
    graph_id = ""
    for method, path, body, answer in examples:
        given = json.loads(body.replace("{graph}", graph_id)) or None
        response = http.request(method, path, json=given)
        found = response.json()
        assert response.is_success, found
        if path == "/v1/graphs":
            graph_id = found["id"]
        assert same_shape(found, json.loads(answer)), json.dumps(found, indent=1)
