"""The JSON schemas that a prompt may ask answers in: a small part of JSON Schema, in which every answer ends.

A small model that may go on for ever does. So objects are closed and have all their properties, strings and arrays
have a greatest length, integers a range, and other numbers are chosen from an `enum`. Whatever else JSON Schema has is
refused by name. `{"$classes": true}` stands for one of the classes of the request.
"""

from collections.abc import Iterator, Sequence
from typing import Any

MAX_STRING_CHARS = 2000
MAX_ITEMS = 32
MAX_PROPERTIES = 16
MAX_DEPTH = 4
MAX_INTEGER = 10**9
MAX_ENUM_NUMBER = 2**53
MIN_ENUM_FRACTION = 1e-15
"""Besides 0. Engines write numbers out as doubles: what is outside comes back as another number, or is cut."""
CLASSES = {"$classes": True}
_KEYS: dict[str, tuple[set[str], set[str]]] = {
    "object": ({"type", "properties"}, {"required", "additionalProperties"}),
    "array": ({"type", "items", "maxItems"}, {"minItems"}),
    "string": ({"type", "maxLength"}, {"minLength"}),
    "integer": ({"type", "minimum", "maximum"}, set()),
    "boolean": ({"type"}, set()),
}
"""By type: the keywords that must be there, and those that may."""

_TYPES = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}


class SchemaError(ValueError):
    """Not a schema that answers may be asked in. Attributes: path: the place at fault, as "properties.a.items"."""

    def __init__(self, path: str, message: str) -> None:
        super().__init__(f"{path}: {message}" if path else message)
        self.path = path


def check_schema(schema: Any) -> None:
    """Raises: SchemaError: not an object's schema, or more than this part of JSON Schema."""
    if not isinstance(schema, dict) or schema.get("type") != "object":
        raise SchemaError("", "the schema must be of type object")
    _check(schema, "", 0)


def check_enum_numbers(schema: Any, path: str = "") -> None:
    """Of a schema that is one for answers; apart from `check_schema`, as what is registered stays readable.

    Raises:
        SchemaError: no answer could hold a number of an enum.
    """
    for value in schema.get("enum", ()):
        if isinstance(value, int | float) and not _is_writable(value):
            limits = f"0, or from {MIN_ENUM_FRACTION} to {MAX_ENUM_NUMBER} in size"
            raise SchemaError(path, f"the numbers of an enum are {limits}, got {value!r:.40}")
    for name, part in schema.get("properties", {}).items():
        check_enum_numbers(part, f"{path}.properties.{name}".lstrip("."))
    if "items" in schema:
        check_enum_numbers(schema["items"], f"{path}.items")


def uses_classes(schema: Any) -> bool:
    return any(part == CLASSES for part in _parts(schema))


def with_classes(schema: Any, classes: Sequence[str]) -> Any:
    """The schema with the classes in their places, and objects closed: plain JSON Schema."""
    if schema == CLASSES:
        return {"enum": list(classes)}
    if schema.get("type") == "object":
        properties = {k: with_classes(v, classes) for k, v in schema["properties"].items()}
        return {
            **schema,
            "properties": properties,
            "required": list(properties),
            "additionalProperties": False,
        }
    if schema.get("type") == "array":
        return {**schema, "items": with_classes(schema["items"], classes)}
    return schema


def shorten(schema: Any, share: float) -> Any:
    """The same with strings of a share of the greatest length: what is valid by it is valid by the schema."""
    kind = schema.get("type")
    if kind == "object":
        properties = {k: shorten(v, share) for k, v in schema["properties"].items()}
        return {**schema, "properties": properties}
    if kind == "array":
        return {**schema, "items": shorten(schema["items"], share)}
    if kind == "string":
        longest = max(schema.get("minLength", 0), 1, int(schema["maxLength"] * share))
        return {**schema, "maxLength": longest}
    return schema


def find_fault(value: Any, schema: Any, path: str = "answer") -> str | None:
    """What is wrong with an answer, by a schema without `$classes`; None if it is valid."""
    if "enum" in schema:
        same = (
            value == item and isinstance(value, bool) == isinstance(item, bool)
            for item in schema["enum"]
        )
        return None if any(same) else f"{path} is none of the allowed values"
    kind = schema["type"]
    if not _is_of(value, kind):
        return f"{path} is not of type {kind}"
    if kind == "object":
        names = set(schema["properties"])
        if set(value) != names:
            odd = sorted(names.symmetric_difference(value))
            return f"{path} has missing or unknown fields {odd}"
        faults = (find_fault(value[n], s, f"{path}.{n}") for n, s in schema["properties"].items())
        return next((fault for fault in faults if fault), None)
    if kind == "array":
        if not schema.get("minItems", 0) <= len(value) <= schema["maxItems"]:
            return f"{path} has {len(value)} items"
        faults = (find_fault(v, schema["items"], f"{path}[{i}]") for i, v in enumerate(value))
        return next((fault for fault in faults if fault), None)
    if kind == "string" and not schema.get("minLength", 0) <= len(value) <= schema["maxLength"]:
        return f"{path} has {len(value)} characters"
    if kind == "integer" and not schema["minimum"] <= value <= schema["maximum"]:
        return f"{path} is {value}"
    return None


def _is_writable(value: float) -> bool:
    return value == 0 or MIN_ENUM_FRACTION <= abs(value) <= MAX_ENUM_NUMBER


def _is_of(value: Any, kind: str) -> bool:
    return type(value) is _TYPES[kind]  # a boolean is no integer here


def _parts(schema: Any) -> Iterator[Any]:
    if isinstance(schema, dict):
        yield schema
        for part in schema.values():
            yield from _parts(part)


def _check(schema: Any, path: str, depth: int) -> None:
    if not isinstance(schema, dict):
        raise SchemaError(path, "a schema must be an object")
    if depth > MAX_DEPTH:
        raise SchemaError(path, f"a schema is at most {MAX_DEPTH} deep")
    if schema == CLASSES:
        return
    if "enum" in schema:
        _check_enum(schema, path)
        return
    kind = schema.get("type")
    if not isinstance(kind, str) or kind not in _KEYS:
        raise SchemaError(path, f"type must be one of {', '.join(_KEYS)}; or give an enum")
    needed, allowed = _KEYS[kind]
    if missing := needed - set(schema):
        raise SchemaError(path, f"type {kind} needs {', '.join(sorted(missing))}")
    if unknown := set(schema) - needed - allowed:
        raise SchemaError(path, f"not supported: {', '.join(sorted(map(str, unknown)))}")
    if kind == "object":
        _check_object(schema, path, depth)
    elif kind == "array":
        _check_range(schema, path, "minItems", "maxItems", MAX_ITEMS)
        _check(schema["items"], f"{path}.items".lstrip("."), depth + 1)
    elif kind == "string":
        _check_range(schema, path, "minLength", "maxLength", MAX_STRING_CHARS)
    elif kind == "integer":
        low, high = schema["minimum"], schema["maximum"]
        if type(low) is not int or type(high) is not int or not -MAX_INTEGER <= low <= high <= MAX_INTEGER:  # fmt: skip
            raise SchemaError(path, f"minimum and maximum must be a range within ±{MAX_INTEGER}")


def _check_object(schema: Any, path: str, depth: int) -> None:
    properties = schema["properties"]
    if not isinstance(properties, dict) or not 1 <= len(properties) <= MAX_PROPERTIES:
        raise SchemaError(path, f"properties must be 1 to {MAX_PROPERTIES}")
    if not all(isinstance(name, str) and 1 <= len(name) <= 64 for name in properties):
        raise SchemaError(path, "property names have 1 to 64 characters")
    required = schema.get("required", list(properties))
    if not isinstance(required, list) or set(map(str, required)) != set(properties):
        raise SchemaError(path, "every property is required: leave out required, or name all")
    if schema.get("additionalProperties", False) is not False:
        raise SchemaError(path, "additionalProperties is always false here")
    for name, part in properties.items():
        _check(part, f"{path}.properties.{name}".lstrip("."), depth + 1)


def _check_range(schema: Any, path: str, low: str, high: str, limit: int) -> None:
    least, most = schema.get(low, 0), schema[high]
    if type(least) is not int or type(most) is not int or not 0 <= least <= most <= limit:
        raise SchemaError(path, f"{low} and {high} must be a range within 0 to {limit}")
    if most == 0:
        raise SchemaError(path, f"{high} must be at least 1")


def _check_enum(schema: Any, path: str) -> None:
    values = schema["enum"]
    if set(schema) != {"enum"} or not isinstance(values, list) or not 1 <= len(values) <= 256:
        raise SchemaError(path, "an enum has 1 to 256 values and no other keyword beside it")
    if not all(type(value) in (str, int, float, bool) for value in values):
        raise SchemaError(path, "the values of an enum are strings, numbers or booleans")
