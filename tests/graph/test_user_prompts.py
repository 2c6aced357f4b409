"""Registered prompts: numbers that no answer can hold, and those that one can."""

import json
from pathlib import Path
from typing import Any

import pytest

from engines.protocol import Constraint
from engines.structured import ConstraintCompiler
from graph.catalog import PromptError
from graph.generation import constraint_of, parse_answer
from graph.user_prompts import UserPrompts


def fields_of(schema: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": "mine",
        "kind": "mine",
        "description": "",
        "inputs": ["text"],
        "max_tokens": 64,
        "max_text_tokens": 100,
        "max_neighbors": 0,
        "max_neighbor_tokens": 0,
        "output": {
            "type": "json",
            "text": [],
            "schema": {"type": "object", "properties": {"a": schema}},
        },
        "messages": [{"role": "user", "content": "<text>{text}</text>"}],
    }


def written_under(constraint: Constraint) -> str:
    """The only text, but for spaces, that a constraint leaves."""
    from llguidance import LLTokenizer

    compiler = ConstraintCompiler(LLTokenizer("byte"))
    try:
        matcher, written = compiler.submit(constraint).result(), bytearray()
    finally:
        compiler.close()
    while not matcher.is_finished:
        (byte,) = set(matcher.allowed()[:256].nonzero()[0].tolist()) - {ord(" ")}
        matcher.take(byte)
        written.append(byte)
    return written.decode()


@pytest.mark.parametrize(
    "value", [0, -0.0, 1, -2.5, 0.3333333333333333, 1e-15, 10**9, 2**53, -(2**53), True, "x"]
)
def test_a_value_of_an_enum_is_an_answer(tmp_path: Path, value: Any) -> None:
    prompt, _ = UserPrompts(tmp_path).create("me", fields_of({"enum": [value]}))
    constraint = constraint_of(prompt, ())
    assert constraint is not None
    assert parse_answer(prompt, written_under(constraint), ()).fields == {"a": value}


@pytest.mark.parametrize(
    "value",
    [2**53 + 1, 2**64, -(2**63), 10**400, 1e308, -1e308, 1e-320, float("inf"), float("nan")],
)
def test_a_number_that_no_answer_can_hold_is_refused(tmp_path: Path, value: float) -> None:
    array = {"type": "array", "maxItems": 1, "items": {"enum": [1, value]}}
    for schema, place in (({"enum": [value]}, "properties.a"), (array, "properties.a.items")):
        with pytest.raises(PromptError, match="numbers of an enum") as caught:
            UserPrompts(tmp_path).create("me", fields_of(schema))
        assert caught.value.param == "output.schema"
        assert caught.value.message.startswith(f"{place}: ")


def test_what_was_registered_with_such_a_number_can_still_be_read(tmp_path: Path) -> None:
    UserPrompts(tmp_path).create("me", fields_of({"enum": [1]}))
    (tmp_path / "me" / "mine.v2.json").write_text(
        json.dumps({**fields_of({"enum": [2**64]}), "version": 2})
    )
    assert [prompt.version for prompt in UserPrompts(tmp_path).prompts("me")] == [2]
