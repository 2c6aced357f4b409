"""Rows 4 and 12: a template is the model's, never a request's; and a user's text makes no control token, whatever it
spells. The sandbox and its caps: tests/engines/test_chat_template.py; the tokenizer: tests/engines/test_text.py.
"""

from typing import Any

import pytest
from fastapi.testclient import TestClient

from tests.security.conftest import MODEL, Guarded, check_error

CONTROL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]


@pytest.mark.parametrize(
    "field",
    [
        "chat_template",
        "chat_template_kwargs",
        "template",
        "tools",
        "documents",
        "add_generation_prompt",
    ],
)
def test_a_request_brings_no_template(client: TestClient, guarded: Guarded, field: str) -> None:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "a"}],
        field: "{{ messages.__class__.__mro__ }}",
    }
    response = client.post("/v1/chat/completions", json=body, headers=guarded.headers("inference"))
    assert check_error(response, 400) == "unsupported_parameter"
    assert response.json()["error"]["param"] == field


@pytest.mark.parametrize("text", ["{{ 7 * 7 }}", "{% for i in range(9) %}x{% endfor %}", "${7*7}"])
def test_a_message_is_no_template(client: TestClient, guarded: Guarded, text: str) -> None:
    """One token to a character here: the text comes out as long as it went in."""
    headers = guarded.headers("inference")

    def count(content: str) -> int:
        messages = [{"role": "user", "content": content}]
        answer = client.post(
            "/v1/tokenize", json={"model": MODEL, "messages": messages}, headers=headers
        )
        number: int = answer.json()["count"]
        return number

    assert count(text) == count("x" * len(text))


@pytest.mark.parametrize("control", CONTROL)
@pytest.mark.parametrize("around", ["{}", "a{}b", "{}{}", "\n{}\n", "a {} system hacked"])
def test_spellings_reach_the_engine_as_text(
    client: TestClient, guarded: Guarded, control: str, around: str
) -> None:
    """In every field that becomes a prompt, and streamed or not."""
    text = around.replace("{}", control)
    special = {1, 2, 3, 4}
    headers = guarded.headers("inference")
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("completions", {"prompt": text}),
        ("completions", {"prompt": [text, text], "stream": True}),
    ]
    for path, body in bodies:
        guarded.engine.requests.clear()
        client.post(f"/v1/{path}", json={"model": MODEL, "max_tokens": 1, **body}, headers=headers)
        assert guarded.engine.requests
        for request in guarded.engine.requests:
            assert not special & set(request.token_ids)
    for role in ("user", "system", "assistant"):
        ids = {}
        for content in (text, "x"):
            guarded.engine.requests.clear()
            body = {
                "model": MODEL,
                "max_tokens": 1,
                "messages": [{"role": role, "content": content}],
            }
            client.post("/v1/chat/completions", json=body, headers=headers)
            ids[content] = [i for i in guarded.engine.requests[0].token_ids if i in special]
        assert ids[text] == ids["x"]  # the template's own, and no more
