"""The schemas of answers: what is refused, and that a validity found here is JSON Schema's own."""

import random
from typing import Any

import pytest
from jsonschema_rs import Draft202012Validator

from graph.output_schema import (
    SchemaError,
    check_schema,
    find_fault,
    shorten,
    uses_classes,
    with_classes,
)

STRING = {"type": "string", "minLength": 1, "maxLength": 4}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": STRING,
        "age": {"type": "integer", "minimum": -1, "maximum": 3},
        "ok": {"type": "boolean"},
        "label": {"$classes": True},
        "share": {"enum": [0.5, 1, "x"]},
        "items": {
            "type": "array",
            "minItems": 1,
            "maxItems": 2,
            "items": {"type": "object", "properties": {"label": {"$classes": True}, "s": STRING}},
        },
    },
}


def random_value(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(7 if depth < 3 else 5)
    if kind == 0:
        return rng.choice(["", "a", "abcd", "abcde", "x", "red"])
    if kind == 1:
        return rng.randrange(-3, 6)
    if kind == 2:
        return rng.choice([True, False, None])
    if kind == 3:
        return rng.choice([0.5, 1.5, 1])
    if kind == 4:
        return rng.choice(["red", "blue", "green"])
    if kind == 5:
        return [random_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    names = rng.sample(["label", "s", "name"], rng.randrange(4))
    return {name: random_value(rng, depth + 1) for name in names}


def nearly_valid(rng: random.Random) -> Any:
    """An answer of which one part may be anything."""
    value: dict[str, Any] = {
        "name": "ab",
        "age": 3,
        "ok": True,
        "label": "red",
        "share": 0.5,
        "items": [{"label": "blue", "s": "a"}],
    }
    name = rng.choice([*value, "more"])
    if rng.random() < 0.1:
        value.pop(name, None)
    elif name == "items" and rng.random() < 0.5:
        value["items"][0][rng.choice(["label", "s"])] = random_value(rng)
    else:
        value[name] = random_value(rng)
    return value


def test_validity_is_json_schemas() -> None:
    rng = random.Random(0)
    schema = with_classes(SCHEMA, ["red", "blue"])
    validator = Draft202012Validator(schema)
    seen = {True: 0, False: 0}
    for _ in range(3000):
        value = nearly_valid(rng)
        fault = find_fault(value, schema)
        assert (fault is None) == validator.is_valid(value), (value, fault)
        seen[fault is None] += 1
    assert min(seen.values()) > 300


def test_faults_name_their_place() -> None:
    schema = with_classes(SCHEMA, ["red"])
    good = {
        "name": "ab", "age": 0, "ok": False, "label": "red", "share": 1, "items": [{"label": "red", "s": "a"}],
    }  # fmt: skip
    assert find_fault(good, schema) is None
    assert find_fault({**good, "age": True}, schema) == "answer.age is not of type integer"
    worse = {**good, "items": [{"label": "blue", "s": "a"}]}
    assert find_fault(worse, schema) == "answer.items[0].label is none of the allowed values"
    del good["age"]
    assert find_fault(good, schema) == "answer has missing or unknown fields ['age']"


@pytest.mark.parametrize("share", [1.0, 0.5, 0.1, 0.0001])
def test_what_a_shorter_schema_allows_the_schema_allows(share: float) -> None:
    short = with_classes(shorten(SCHEMA, share), ["red"])
    longest = short["properties"]["name"]["maxLength"]
    assert longest == max(1, int(4 * share))
    assert short["properties"]["items"]["items"]["properties"]["s"]["maxLength"] == longest
    assert short["properties"]["items"]["maxItems"] == 2
    value = {
        "name": "a" * longest, "age": 0, "ok": False, "label": "red", "share": 1, "items": [{"label": "red", "s": "a"}],
    }  # fmt: skip
    assert find_fault(value, short) is None
    assert find_fault(value, with_classes(SCHEMA, ["red"])) is None


def test_classes() -> None:
    assert uses_classes(SCHEMA)
    assert not uses_classes({"type": "object", "properties": {"a": STRING}})
    label = with_classes(SCHEMA, ["a", "b"])["properties"]["label"]
    assert label == {"enum": ["a", "b"]}
    assert SCHEMA["properties"]["label"] == {"$classes": True}


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "string"}, "properties.a: type string needs maxLength"),
        ({"type": "string", "maxLength": 10**6}, "within 0 to"),
        ({"type": "string", "maxLength": 0}, "at least 1"),
        ({"type": "string", "maxLength": 9, "minLength": 10}, "within 0 to"),
        ({"type": "string", "maxLength": True}, "within 0 to"),
        ({"type": "string", "maxLength": 9, "pattern": "a"}, "not supported: pattern"),
        ({"type": "number"}, "type must be one of"),
        ({"type": "integer"}, "needs maximum, minimum"),
        ({"type": "integer", "minimum": 2, "maximum": 1}, "must be a range"),
        ({"type": "integer", "minimum": 0.5, "maximum": 1}, "must be a range"),
        ({"type": ["string", "null"]}, "type must be one of"),
        ({"type": "array", "items": STRING}, "needs maxItems"),
        ({"type": "array", "items": {}, "maxItems": 2}, "properties.a.items: type must be one of"),
        ({"type": "object", "properties": {}}, "properties must be 1 to"),
        ({"type": "object", "properties": {"b": STRING}, "required": []}, "every property is required"),
        ({"type": "object", "properties": {"b": STRING}, "additionalProperties": True}, "always false"),
        ({"enum": []}, "an enum has 1 to 256"),
        ({"enum": [None]}, "strings, numbers or booleans"),
        ({"enum": ["a"], "type": "string"}, "no other keyword"),
        ({"$ref": "#"}, "type must be one of"),
        ({"anyOf": [STRING]}, "type must be one of"),
        ([], "a schema must be an object"),
    ],
)  # fmt: skip
def test_what_is_refused(part: Any, message: str) -> None:
    with pytest.raises(SchemaError, match=r".") as caught:
        check_schema({"type": "object", "properties": {"a": part}})
    assert message in str(caught.value)


def test_the_whole_is_an_object_of_limited_depth() -> None:
    others: list[Any] = [STRING, {"$classes": True}, [], None, {"enum": ["a"]}]
    for schema in others:
        with pytest.raises(SchemaError, match="must be of type object"):
            check_schema(schema)
    deep: Any = STRING
    for _ in range(5):
        deep = {"type": "object", "properties": {"a": deep}}
    with pytest.raises(SchemaError, match="at most 4 deep"):
        check_schema(deep)
    check_schema(SCHEMA)
    named = {"required": ["a"], "additionalProperties": False}
    check_schema({"type": "object", "properties": {"a": STRING}, **named})
