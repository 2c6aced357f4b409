"""Random requests of which each has exactly one thing wrong, made from the OpenAPI document's own examples."""

import copy
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

JSON = "application/json"
UNKNOWN_IDS = ("zz", "..", "%2e%2e%2fetc%2fpasswd", "%00", "-1", "x" * 300, "caf%C3%A9", "%f0%28")
NOT_JSON = (b"", b"{", b"[1,", b'{"a":NaN}', b"\xff\xfe", b'{"a":1}x', b"null", b'"text"', b"[[]]")
NEVER_VALID: dict[str, tuple[Any, ...]] = {
    "model": ("", "../../etc/passwd", "no-such-model", 3),
    "prompt": ("\ud800", [1.5], [[]], {}),
    "messages": ([], [{"role": "pirate", "content": ""}], "hi"),
    "input": ([], {}, [[None]]),
    "recipe": ([], [{"int4": {"group_size": 7}}], [{"melt": {}}], [{"wanda": {}}], [{}]),
    "output": ("../x", "", "UPPER CASE", "smollm2-135m/../x"),
    "type": ("", "melt", "finetune", None),
    "training_file": ("", "../x", "file-none", 3),
    "input_file_id": ("", "../x", "file-none", 3),
    "endpoint": ("", "/v1/score", "http://127.0.0.1/v1/completions", 3),
    "completion_window": ("", "1h", 24),
    "method": ({"type": "melt"}, {}, 3, {"type": "lora", "lora": {"rank": 0}}),
    "suffix": ("", "UPPER CASE", "../x", 3),
    "tokens": ([2**40], [-1], "abc", [1.5]),
    "continuations": ([], [""], [[]]),
    "nodes": ([], [{"id": "a"}], [{"id": 1.5, "text": ""}], [{"id": "a", "text": ""}] * 2),
    "node_ids": ([], [{}], ["no-such-node"]),
    "budget": ({"nodes": 0}, {"nodes": 1, "fraction": 0.5}, {}, {"fraction": 1.1}),
    "strategy": ("", "melt"),
}


@dataclass(frozen=True, slots=True)
class BadRequest:
    method: str
    path: str
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


def bad_requests(openapi: dict[str, Any], count: int, seed: int) -> Iterator[BadRequest]:
    """Each must get a 4xx. The paths of the document are hit in turn."""
    draw = random.Random(seed)
    paths = sorted(openapi["paths"])
    for index in range(count):
        path = paths[index % len(paths)]
        yield _bad_request(openapi, path, draw)


def _bad_request(openapi: dict[str, Any], path: str, draw: random.Random) -> BadRequest:
    operations = openapi["paths"][path]
    method = draw.choice(sorted(operations))
    kinds = [_wrong_method, _wrong_host, _no_such_path]
    if "{" in path:
        kinds.append(_unknown_id)
    if any(p["in"] == "query" for p in operations[method].get("parameters", ())):
        kinds.append(_wrong_query)
    content = operations[method].get("requestBody", {}).get("content", {})
    if content and JSON not in content:
        kinds += [_not_json, _wrong_type]
    elif content:
        kinds += [_wrong_body, _wrong_body, _unknown_field, _missing_field, _not_json, _wrong_type]
    return draw.choice(kinds)(openapi, path, method, draw)


def _filled(path: str, draw: random.Random) -> str:
    parts = path.split("/")
    return "/".join(draw.choice(UNKNOWN_IDS) if part[:1] == "{" else part for part in parts)


def _schema(openapi: dict[str, Any], path: str, method: str) -> dict[str, Any]:
    schema: dict[str, Any]
    schema = openapi["paths"][path][method]["requestBody"]["content"][JSON]["schema"]
    if "$ref" in schema:
        schema = openapi["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]]
    return schema


def _example(openapi: dict[str, Any], path: str, method: str) -> dict[str, Any]:
    schema = _schema(openapi, path, method)
    example: dict[str, Any] = copy.deepcopy(schema.get("examples", [{}])[0])
    for name in schema.get("required", ()):
        example.setdefault(name, "x")
    return example


def _json(path: str, method: str, body: Any, draw: random.Random) -> BadRequest:
    content = json.dumps(body).encode()
    return BadRequest(method, _filled(path, draw), content, {"content-type": JSON})


def _wrong_method(
    openapi: dict[str, Any], path: str, method: str, draw: random.Random
) -> BadRequest:
    allowed = {name.upper() for name in openapi["paths"][path]} | {"HEAD", "OPTIONS"}
    others = sorted({"GET", "POST", "PUT", "DELETE", "PATCH"} - allowed)
    return BadRequest(draw.choice(others), _filled(path, draw))


def _wrong_host(openapi: dict[str, Any], path: str, method: str, draw: random.Random) -> BadRequest:
    host = draw.choice(["evil.example", "127.0.0.1.evil.example", "localhost@evil", "[::"])
    return BadRequest(method, _filled(path, draw), headers={"host": host})


def _no_such_path(
    openapi: dict[str, Any], path: str, method: str, draw: random.Random
) -> BadRequest:
    rest = "/".join(draw.choice(UNKNOWN_IDS) for _ in range(draw.randint(4, 6)))
    return BadRequest(method, f"/v1/nothing/{rest}")


def _unknown_id(openapi: dict[str, Any], path: str, method: str, draw: random.Random) -> BadRequest:
    if "requestBody" not in openapi["paths"][path][method]:
        return BadRequest(method, _filled(path, draw))
    return _json(path, method, _example(openapi, path, method), draw)


def _wrong_query(
    openapi: dict[str, Any], path: str, method: str, draw: random.Random
) -> BadRequest:
    query = draw.choice(["limit=0", "limit=x", "limit=1e9", "after=%00", "after=-1", "status=no"])
    names = {p["name"] for p in openapi["paths"][path][method]["parameters"]}
    if query.split("=")[0] not in names or "{" in path:
        return _no_such_path(openapi, path, method, draw)
    return BadRequest(method, f"{_filled(path, draw)}?{query}")


def _wrong_body(openapi: dict[str, Any], path: str, method: str, draw: random.Random) -> BadRequest:
    body = _example(openapi, path, method)
    names = [name for name in body if name in NEVER_VALID]
    if not names:
        return _unknown_field(openapi, path, method, draw)
    name = draw.choice(names)
    body[name] = draw.choice(NEVER_VALID[name])
    return _json(path, method, body, draw)


def _unknown_field(
    openapi: dict[str, Any], path: str, method: str, draw: random.Random
) -> BadRequest:
    body = _example(openapi, path, method) | {draw.choice(["bad", "", "é"]): draw.choice([1, {}])}
    return _json(path, method, body, draw)


def _missing_field(
    openapi: dict[str, Any], path: str, method: str, draw: random.Random
) -> BadRequest:
    required = _schema(openapi, path, method).get("required")
    if not required:
        return _unknown_field(openapi, path, method, draw)
    body = _example(openapi, path, method)
    del body[draw.choice(required)]
    return _json(path, method, body, draw)


def _not_json(openapi: dict[str, Any], path: str, method: str, draw: random.Random) -> BadRequest:
    return BadRequest(method, _filled(path, draw), draw.choice(NOT_JSON), {"content-type": JSON})


def _wrong_type(openapi: dict[str, Any], path: str, method: str, draw: random.Random) -> BadRequest:
    content_type = draw.choice(
        ["text/plain", "application/x-www-form-urlencoded", "", "multipart/form-data"]
    )
    return BadRequest(method, _filled(path, draw), b"a=b", {"content-type": content_type})
