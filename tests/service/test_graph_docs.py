"""The examples of docs/graphs.md: every request is sent, every answer is what the page says."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.service.test_graph_routes import Service

PAGE = Path(__file__).parents[2] / "docs" / "graphs.md"
_EXAMPLE = re.compile(r"```http\n(\w+) (\S+)\n(.*?)```\n```json\n(.*?)```", re.DOTALL)


def matches(found: Any, shown: Any) -> bool:
    """Equal, but for `…`, and for the last digits of a number."""
    if shown == "…":
        return True
    if isinstance(shown, dict):
        same = isinstance(found, dict) and found.keys() == shown.keys()
        return same and all(matches(found[key], shown[key]) for key in shown)
    if isinstance(shown, list):
        same = isinstance(found, list) and len(found) == len(shown)
        return same and all(matches(f, s) for f, s in zip(found, shown, strict=True))
    if isinstance(shown, float):
        return isinstance(found, float | int) and found == pytest.approx(shown, abs=5e-5)
    return bool(found == shown and type(found) is type(shown))


def test_every_example_answers_as_it_says(tmp_path: Path) -> None:
    text = PAGE.read_text()
    examples = _EXAMPLE.findall(text)
    assert len(examples) == text.count("```http") == 7
    service = Service(tmp_path)
    graph_id = ""
    with service.client:
        for method, path, body, answer in examples:
            response = service.client.request(
                method, path.replace("{id}", graph_id), json=json.loads(body)
            )
            found = response.json()
            graph_id = graph_id or found["id"]
            assert response.is_success, found
            assert matches(found, json.loads(answer)), json.dumps(found, indent=2)
