"""Prompts over HTTP: the shipped ones, one's own and their versions, and enrichment by them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from graph import user_prompts
from graph.arrow_stream import MEDIA_TYPE
from graph.catalog import PromptNotFoundError
from graph.user_prompts import UserPrompts
from tests.conftest import REPOSITORY
from tests.service.test_graph_routes import ENRICH, Service, error_of

PURPOSE: dict[str, Any] = {
    "id": "purpose",
    "inputs": ["text", "audience"],
    "defaults": {"audience": "engineers"},
    "max_tokens": 80,
    "output": {
        "type": "json",
        "text": ["purpose"],
        "schema": {"type": "object", "properties": {"purpose": {"type": "string", "maxLength": 200}}},
    },
    "messages": [
        {"role": "user", "content": "<text>\n{text}\n</text> <audience>{audience}</audience> What is it for? JSON."}
    ],
}  # fmt: skip
PLAIN: dict[str, Any] = {
    "id": "plain",
    "max_tokens": 8,
    "output": {"type": "text"},
    "messages": [{"role": "user", "content": "<text>\n{text}\n</text>"}],
}


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    service = Service(tmp_path)
    with service.client:
        yield service


def post(service: Service, body: Any, **options: Any) -> Any:
    return service.client.post("/v1/prompts", json=body, **options)


def test_the_documented_prompt_is_one(service: Service) -> None:
    page = (REPOSITORY / "docs" / "prompts.md").read_text()
    body = page.split("POST /v1/prompts\n", 1)[1].split("\n-> 201", 1)[0]
    registered = post(service, json.loads(body))
    assert (registered.status_code, registered.json()["version"]) == (201, 1)


def test_register_get_list_delete(service: Service) -> None:
    created = post(service, PURPOSE)
    assert created.status_code == 201, created.text
    prompt = created.json()
    assert (prompt["id"], prompt["version"], prompt["versions"]) == ("purpose", 1, [1])
    assert (prompt["shipped"], prompt["variables"]) == (False, ["audience"])
    assert len(prompt["hash"]) == 64
    assert prompt["output"] == PURPOSE["output"]
    for ref in ("purpose", "purpose@1"):
        assert service.client.get(f"/v1/prompts/{ref}").json() == prompt
    listed = service.client.get("/v1/prompts").json()["data"]
    assert prompt in listed
    assert [p["id"] for p in listed if p["shipped"]] == sorted(p["id"] for p in listed[:-1])
    deleted = service.client.delete("/v1/prompts/purpose")
    assert deleted.json() == {"id": "purpose", "object": "prompt", "deleted": True}
    for method in ("get", "delete"):
        gone = getattr(service.client, method)("/v1/prompts/purpose")
        assert error_of(gone, 404) == ("prompt_not_found", "prompt_id")


def test_versions_never_change(service: Service) -> None:
    first = post(service, PURPOSE).json()
    again = post(service, PURPOSE)
    assert (again.json(), again.headers["Idempotent-Replayed"]) == (first, "true")
    second = post(service, PURPOSE | {"max_tokens": 81}).json()
    assert (second["version"], second["versions"]) == (2, [1, 2])
    assert second["hash"] != first["hash"]
    assert service.client.get("/v1/prompts/purpose").json() == second
    assert service.client.get("/v1/prompts/purpose@1").json() == first | {"versions": [1, 2]}
    # a number is not given again, nor is a version before the newest taken up
    service.client.delete("/v1/prompts/purpose@2")
    assert service.client.get("/v1/prompts/purpose").json()["version"] == 1
    assert error_of(service.client.get("/v1/prompts/purpose@2"), 404)[0] == "prompt_not_found"
    assert post(service, PURPOSE | {"max_tokens": 81}).json()["version"] == 3


def test_prompts_belong_to_their_key(service: Service) -> None:
    keys = [service.state.keys.create(name, ("inference",))[1] for name in "ab"]
    keys.append(service.state.keys.create("root", ("admin",))[1])
    mine, theirs, admin = ({"Authorization": f"Bearer {key}"} for key in keys)
    assert post(service, PLAIN, headers=mine).json()["version"] == 1
    for headers in (theirs, admin):
        assert service.client.get("/v1/prompts/plain", headers=headers).status_code == 404
        assert service.client.delete("/v1/prompts/plain", headers=headers).status_code == 404
        listed = service.client.get("/v1/prompts", headers=headers).json()["data"]
        assert all(prompt["shipped"] for prompt in listed)
        enriched = service.client.post(
            "/v1/enrich", json=ENRICH | {"prompt": "plain"}, headers=headers
        )
        assert error_of(enriched, 404) == ("prompt_not_found", "prompt")
    assert post(service, PLAIN, headers=theirs).json()["version"] == 1  # one of its own
    used = service.client.post("/v1/enrich", json=ENRICH | {"prompt": "plain"}, headers=mine)
    assert used.status_code == 200
    jobs_key = service.state.keys.create("jobs", ("jobs",))[1]
    other_role = post(service, PLAIN, headers={"Authorization": f"Bearer {jobs_key}"})
    assert error_of(other_role, 403)[0] == "insufficient_scope"


def test_shipped_prompts_stay(service: Service) -> None:
    assert error_of(post(service, PLAIN | {"id": "summary"})) == ("invalid_value", "id")
    for ref in ("summary", "summary@1"):
        response = service.client.delete(f"/v1/prompts/{ref}")
        assert error_of(response) == ("invalid_value", "prompt_id")
    assert service.client.get("/v1/prompts/summary").json()["shipped"] is True


def with_output(**changes: Any) -> dict[str, Any]:
    return PURPOSE | {"output": PURPOSE["output"] | changes}


def schema_of(purpose: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": {"purpose": purpose}}


def with_message(content: str, **changes: Any) -> dict[str, Any]:
    return PLAIN | {"messages": [{"role": "user", "content": content}]} | changes


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        (PLAIN | {"id": "../x"}, "invalid_value", "id"),
        (PLAIN | {"id": "X"}, "invalid_value", "id"),
        (PLAIN | {"id": "a" * 65}, "invalid_value", "id"),
        (PLAIN | {"version": 3}, "unsupported_parameter", "version"),
        (PLAIN | {"max_tokens": 0}, "invalid_value", "max_tokens"),
        (PLAIN | {"max_tokens": 10_000}, "invalid_value", "max_tokens"),
        (PLAIN | {"inputs": ["neighbors"]}, "invalid_value", "inputs"),
        (PLAIN | {"inputs": ["text", "Bad-Name"]}, "invalid_value", "inputs"),
        (PLAIN | {"max_neighbors": 3}, "invalid_value", "max_neighbors"),
        (PLAIN | {"defaults": {"x": "y"}}, "invalid_value", "defaults"),
        (PLAIN | {"messages": []}, "invalid_value", "messages"),
        (PLAIN | {"messages": [{"role": "tool", "content": "a"}]}, "invalid_value", "messages[0].role"),
        (PLAIN | {"messages": PLAIN["messages"] + [{"role": "system", "content": "a"}]}, "invalid_value", "messages"),
        (with_message("{text}"), "invalid_value", "messages[0]"),
        (with_message("nothing"), "invalid_value", "messages"),
        (with_message("<text>{text}</text><label>{label}</label>"), "invalid_value", "messages"),
        (PLAIN | {"output": {"type": "yaml"}}, "invalid_value", "output"),
        (with_output(text=["other"]), "invalid_value", "output.text"),
        (with_output(label="other"), "invalid_value", "output.label"),
        (with_output(label="purpose"), "invalid_value", "output.text"),
        (with_output(schema={"type": "string", "maxLength": 3}), "invalid_value", "output.schema"),
        (with_output(schema=schema_of({"type": "string"})), "invalid_value", "output.schema"),
        (with_output(schema=schema_of({"$classes": True})), "invalid_value", "output.schema"),
        (with_output(more=1), "unsupported_parameter", "output.json.more"),
    ],
)  # fmt: skip
def test_what_is_no_prompt(service: Service, body: Any, code: str, param: str) -> None:
    assert error_of(post(service, body)) == (code, param)


def test_too_many_prompts(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(user_prompts, "MAX_PROMPTS", 2)
    for number in (5, 6):
        assert post(service, PLAIN | {"max_tokens": number}).status_code == 201
    assert error_of(post(service, PLAIN), 429)[0] == "insufficient_quota"


def test_a_race_for_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process takes the number between the look and the link."""
    mine, theirs = UserPrompts(tmp_path), UserPrompts(tmp_path)
    fields = {
        "kind": "k", "description": "", "inputs": ["text"], "max_text_tokens": 8, "max_neighbors": 0,
        "max_neighbor_tokens": 0, **PLAIN,
    }  # fmt: skip
    write = mine._write
    raced: list[bool] = []

    def late(*args: Any) -> bool:
        if not raced:
            raced.append(True)
            theirs.create("local", fields | {"max_tokens": 3})
        return write(*args)

    monkeypatch.setattr(mine, "_write", late)
    prompt, created = mine.create("local", fields)
    assert (prompt.version, created) == (2, True)
    assert mine.get("local", "plain@1").max_tokens == 3
    with pytest.raises(PromptNotFoundError):
        mine.get("local", "../local/plain@1")
    with pytest.raises(ValueError, match="an owner is a key's id"):
        mine.get("..", "plain@1")


# Enrichment by them


def enrich(service: Service, **fields: Any) -> Any:
    return service.client.post("/v1/enrich", json=ENRICH | fields)


def test_enrich_by_a_registered_prompt(service: Service) -> None:
    post(service, PURPOSE)
    service.writer._answer = lambda prompt: json.dumps({"purpose": "to test"})
    nodes = [
        {"id": "n1", "text": "one"},
        {"id": "n2", "text": "two", "variables": {"audience": "children"}},
    ]
    body = enrich(service, prompt="purpose", nodes=nodes, variables={"audience": "poets"}).json()
    row = body["data"][0]
    assert (row["status"], row["text"], row["fields"]) == ("ok", "to test", {"purpose": "to test"})
    assert (row["label"], row["repaired"]) == (None, False)
    assert (row["prompt_id"], row["prompt_version"]) == ("purpose", 1)
    audiences = [("poets" in p, "children" in p) for p in service.writer.prompts]
    assert sorted(audiences) == [(False, True), (True, False)]
    assert enrich(service, prompt="purpose", nodes=nodes[:1]).status_code == 200
    assert "<audience>engineers</audience>" in service.writer.prompts[-1]


def test_arrow_has_fields_and_label(service: Service) -> None:
    service.writer._answer = lambda prompt: json.dumps({"label": "b", "confidence": 0.5})
    response = service.client.post(
        "/v1/enrich",
        json=ENRICH | {"prompt": "pseudo_label", "classes": ["a", "b"]},
        headers={"Accept": MEDIA_TYPE},
    )
    table = pa.ipc.open_stream(response.content).read_all()
    assert table.column("label").to_pylist() == ["b", "b"]
    assert table.column("repaired").to_pylist() == [False, False]
    assert json.loads(table.column("fields")[0].as_py()) == {"label": "b", "confidence": 0.5}
    plain = service.client.post("/v1/enrich", json=ENRICH, headers={"Accept": MEDIA_TYPE})
    assert "fields" not in pa.ipc.open_stream(plain.content).read_all().column_names


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": "explain"}, "classes"),
        ({"prompt": "summary", "classes": ["a"]}, "classes"),
        ({"prompt": "explain", "classes": []}, "classes"),
        ({"prompt": "explain", "classes": ["a", "a"]}, "classes"),
        ({"prompt": "edge"}, "variables"),
        ({"prompt": "edge", "variables": {"other": "o", "label": "l"}}, "variables"),
        ({"prompt": "edge", "variables": {"other": 1}}, "variables.other"),
    ],
)
def test_inputs_that_do_not_suit(service: Service, fields: dict[str, Any], param: str) -> None:
    assert error_of(enrich(service, **fields)) == ("invalid_value", param)


def test_graph_enrichment_reads_classes_named_neighbours_and_variables(service: Service) -> None:
    graph_id = service.graph_id()
    path = f"/v1/graphs/{graph_id}/enrich"
    base: dict[str, Any] = {"node_ids": ["a", "b"], "model": "writer"}
    service.writer._answer = lambda prompt: json.dumps({"label": "x", "confidence": 1.0})
    rows = service.client.post(path, json=base | {"prompt": "pseudo_label"}).json()["data"]
    assert [row["label"] for row in rows] == ["x", "x"]
    for prompt in service.writer.prompts:  # "y" is the label of a node without a split
        assert "<classes>\nx\n</classes>" in prompt
    service.writer._answer = lambda prompt: json.dumps({"digest": "d"})
    named = base | {"prompt": "digest", "neighbors": [["c"], []]}
    rows = service.client.post(path, json=named).json()["data"]
    assert [row["neighbors_used"] for row in rows] == [1, 0]
    wrong = base | {"prompt": "digest", "neighbors": [["d"], []]}
    assert error_of(service.client.post(path, json=wrong)) == ("invalid_value", "neighbors[0][0]")
    service.writer._answer = lambda prompt: json.dumps({"text": "t"})
    given = base | {"prompt": "rewrite", "node_variables": [{"digest": "one"}, {"digest": "two"}]}
    assert service.client.post(path, json=given).status_code == 200
    seen = ["<digest>\none\n</digest>" in prompt for prompt in service.writer.prompts[-2:]]
    assert sorted(seen) == [False, True]
    short = base | {"prompt": "rewrite", "node_variables": [{"digest": "one"}]}
    assert error_of(service.client.post(path, json=short)) == ("invalid_value", "node_variables")
    estimate = {"graph": graph_id, "prompt": "explain", "model": "writer"}
    assert service.client.post("/v1/enrich/estimate", json=estimate).json()["num_calls"] == 3
