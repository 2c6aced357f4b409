"""Row 11: schemas and expressions that explode are refused, or cost their own request alone: the engine goes on."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engines.engine import NativeEngine
from engines.protocol import Constraint, EngineError, SamplingParams
from engines.structured import check_constraint
from tests.engines.decoding import build_request, run, token_ids_of
from tests.engines.test_structured import load_json_engine


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def doubling(depth: int) -> dict[str, Any]:
    def twice(i: int) -> dict[str, Any]:
        return {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2}

    ends = {f"d{depth}": {"type": "string"}}
    return {"$defs": {f"d{i}": twice(i) for i in range(depth)} | ends, "$ref": "#/$defs/d0"}


SCHEMAS: dict[str, dict[str, Any]] = {
    "a reference to itself": {"$ref": "#"},
    "references in a circle": {
        "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a",
    },
    "a tree without end": {
        "type": "object", "properties": {"l": {"$ref": "#"}, "r": {"$ref": "#"}}, "required": ["l", "r"],
    },
    "2**30 by doubling": doubling(30),
    "thousands of values": {"enum": [f"v{i}" for i in range(7000)]},
    "one long value": {"enum": ["a" * 60_000]},
    "a thousand patterns": {"anyOf": [{"type": "string", "pattern": f"(a|b)*c{{1,{i}}}"} for i in range(1, 1000)]},
    "a product of choices": {
        "allOf": [{"anyOf": [{"properties": {f"p{i}_{j}": {"type": "string"}}} for j in range(8)]} for i in range(16)],
    },
    "200 levels": nested(200),
    "a thousand million items": {"type": "array", "minItems": 10**9, "items": {"type": "integer"}},
    "ten million characters": {"type": "string", "minLength": 10**6, "maxLength": 10**7},
    "a fine multiple": {"type": "number", "multipleOf": 1e-9},
    "a large multiple": {"type": "integer", "multipleOf": 999_999_937},
    "backtracking": {"type": "string", "pattern": "^(a+)+$"},
    "a remote reference": {"$ref": "http://127.0.0.1:1/schema.json"},
    "a file": {"$ref": "file:///etc/passwd"},
}  # fmt: skip
EXPRESSIONS = [
    "(a+)+$", "(a|a)*b", "(a|ab|b)*(c|d){0,999}", "a{1000}{1000}", "(a{0,1000}){0,1000}",
    "((a{1,100}){1,100}){1,100}", r"[\w]{1,1000}", r"\p{L}{1,4000}", "(.*a.*b.*c.*d.*e){40}",
    "(.*a){20}.{20}", "[ab]*a[ab]{30}", "x{4294967295}", "(" * 500 + ")" * 500, "a" * 4096,
    r"(\p{L}|\d|[^a]){500}", "(?i)" + "ß" * 1000, "[^\x00-\U0010ffff]", "\\", "(?P<a>x)(?P=a)",
]  # fmt: skip
CONSTRAINTS = [
    *(Constraint(kind="json_schema", text=json.dumps(schema)) for schema in SCHEMAS.values()),
    *(Constraint(kind="regex", text=text) for text in EXPRESSIONS),
]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NativeEngine]:
    made = load_json_engine(tmp_path_factory.mktemp("json"))
    yield made
    made.close()


@pytest.mark.parametrize(
    "constraint", CONSTRAINTS, ids=[*SCHEMAS, *(text[:20] for text in EXPRESSIONS)]
)
def test_a_bomb_is_its_own_requests_end_at_most(
    engine: NativeEngine, constraint: Constraint
) -> None:
    """Beside it a request without one says what it says alone."""
    params = SamplingParams(max_tokens=6, temperature=1.0, seed=7)
    free = build_request("free", [3, 4, 5], params)
    alone = token_ids_of(run(engine, [free])["free"])
    bomb = build_request("bomb", [3, 4], params, constraint=constraint)
    outputs = run(engine, [bomb, dataclasses.replace(free, request_id="other")])
    assert token_ids_of(outputs["other"]) == alone
    last = outputs["bomb"][-1]
    assert last.finish_reason in ("stop", "length", "error")
    if last.finish_reason == "error":
        assert last.error_code == "invalid_value"
        assert len(last.error or "") < 2000


@pytest.mark.parametrize(
    "name", ["a remote reference", "a file", "a product of choices", "200 levels"]
)
def test_what_cannot_be_enforced_is_refused_before_the_engine(name: str) -> None:
    with pytest.raises(EngineError, match="cannot be enforced"):
        check_constraint(Constraint(kind="json_schema", text=json.dumps(SCHEMAS[name])))


def test_a_refused_file_is_not_quoted(tmp_path: Path) -> None:
    (tmp_path / "secret.json").write_text('{"type": "secret-of-a-file"}')
    schema = json.dumps({"$ref": f"file://{tmp_path}/secret.json"})
    with pytest.raises(EngineError) as refused:
        check_constraint(Constraint(kind="json_schema", text=schema))
    assert "secret-of-a-file" not in refused.value.message
