"""Training files: defects are refused with their line, labels fall where OpenAI says, rows keep examples whole."""

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from training.data import (
    ChatExample,
    CompletionExample,
    DataError,
    DataLimits,
    Encoded,
    Encoder,
    TextExample,
    pack_rows,
    read_examples,
    split_evaluation,
)

GOOD = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}
WORDS = ["<end>", "<s>", *"abcdefghijklmnopqrstuvwxyz .:\n"]


@pytest.fixture
def write(tmp_path: Path) -> Callable[[bytes], Path]:
    def to_file(content: bytes) -> Path:
        path = tmp_path / "train.jsonl"
        path.write_bytes(content)
        return path

    return to_file


def encoder(**changes: Any) -> Encoder:
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.add_special_tokens(["<end>", "<s>"])

    def render(messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        turns = "".join(f"<s>{m['role']}:{m['content']}<end>\n" for m in messages)
        return turns + ("<s>assistant:" if add_generation_prompt else "")

    settings: dict[str, Any] = {
        "tokenizer": tokenizer, "end_id": 0, "max_length": 200, "render": render,
        "control_spellings": ("<end>", "<s>"),
    }  # fmt: skip
    return Encoder(**{**settings, **changes})


def spell(ids: list[int]) -> str:
    return "".join(WORDS[i] for i in ids)


def test_the_three_forms_are_read(write: Callable[[bytes], Path]) -> None:
    rows = [GOOD, {"prompt": "", "completion": "a"}, {"text": "b"}]
    path = write("\n".join(json.dumps(row) for row in rows).encode())
    chat, completion, text = read_examples(path)
    assert isinstance(chat, ChatExample)
    assert [(m.role, m.trained) for m in chat.messages] == [("user", False), ("assistant", True)]
    assert completion == CompletionExample(2, "", "a")
    assert text == TextExample(3, "b")


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b'{"messages": [', "invalid_json"),
        (b"[" * 100_000, "invalid_json"),
        (b"[1]", "invalid_example"),
        (b"{}", "invalid_example"),
        (b'{"text": "\xff"}', "invalid_encoding"),
        (rb'{"text": "\ud800"}', "invalid_encoding"),
        (b"", "empty_line"),
        (b'{"text": ""}', "no_labels"),
        (b'{"text": 3}', "invalid_example"),
        (b'{"text": "a", "id": 1}', "unsupported_field"),
        (b'{"prompt": "a"}', "invalid_example"),
        (b'{"prompt": "a", "completion": ""}', "no_labels"),
        (b'{"messages": []}', "invalid_example"),
        (b'{"messages": ["hi"]}', "invalid_example"),
        (b'{"messages": [{"role": "robot", "content": "a"}]}', "unknown_role"),
        (b'{"messages": [{"role": "user", "content": "a"}]}', "no_assistant_message"),
        (b'{"messages": [{"role": "assistant", "content": "a", "weight": 0}]}', "no_labels"),
        (b'{"messages": [{"role": "assistant", "content": "a", "weight": 2}]}', "invalid_weight"),
        (b'{"messages": [{"role": "user", "content": "a", "weight": 1}]}', "unsupported_field"),
        (b'{"messages": [{"role": "assistant", "content": null}]}', "invalid_example"),
        (b'{"messages": [{"role": "assistant", "tool_calls": []}]}', "unsupported_field"),
    ],
)
def test_a_bad_line_is_named(write: Callable[[bytes], Path], line: bytes, code: str) -> None:
    good = json.dumps(GOOD).encode()
    path = write(b"\n".join([good] * 16 + [line] + [good]))
    with pytest.raises(DataError) as caught:
        list(read_examples(path))
    assert (caught.value.line, caught.value.code) == (17, code)


def test_an_empty_file_is_refused(write: Callable[[bytes], Path]) -> None:
    with pytest.raises(DataError) as caught:
        list(read_examples(write(b"")))
    assert (caught.value.line, caught.value.code) == (0, "empty_file")


def test_too_many_examples_are_refused(write: Callable[[bytes], Path]) -> None:
    path = write(b'{"text": "a"}\n' * 3)
    with pytest.raises(DataError, match="more than 2 examples"):
        list(read_examples(path, DataLimits(max_examples=2)))


def test_a_huge_line_is_refused_without_being_read(write: Callable[[bytes], Path]) -> None:
    path = write(b'{"text": "a"}\n{"text": "' + b"a" * 100_000_000 + b'"}\n')
    tracemalloc.start()
    with pytest.raises(DataError) as caught:
        list(read_examples(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (caught.value.line, caught.value.code) == (2, "line_too_long")
    assert peak < 20_000_000


def test_a_line_of_exactly_the_limit_is_read(write: Callable[[bytes], Path]) -> None:
    line = b'{"text": "abc"}'
    path = write(line + b"\r\n" + line)
    assert len(list(read_examples(path, DataLimits(max_line_bytes=len(line))))) == 2
    with pytest.raises(DataError, match="longer than"):
        list(read_examples(path, DataLimits(max_line_bytes=len(line) - 1)))


def test_chat_learns_the_assistants_words_and_ends(write: Callable[[bytes], Path]) -> None:
    messages = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": "four", "weight": 0},
        {"role": "user", "content": "five"},
        {"role": "assistant", "content": "six", "weight": 1},
    ]
    (example,) = read_examples(write(json.dumps({"messages": messages}).encode()))
    (encoded,) = encoder()(example)
    learnt = [i for i, yes in zip(encoded.ids, encoded.learnt, strict=True) if yes]
    assert spell(learnt) == "two<end>\nsix<end>\n"
    assert spell(encoded.ids).startswith("<s>user:one<end>\n<s>assistant:two<end>\n")


def test_a_completion_is_learnt_with_its_end() -> None:
    (encoded,) = encoder()(CompletionExample(1, "ab", "cd"))
    assert spell(encoded.ids) == "abcd<end>"
    assert encoded.learnt == [False, False, True, True, True]


def test_long_text_is_cut_and_nothing_is_lost() -> None:
    text = "abcdefghij"
    pieces = encoder(max_length=4)(TextExample(1, text))
    assert [len(piece.ids) for piece in pieces] == [4, 4, 3]
    assert spell([i for piece in pieces for i in piece.ids]) == text + "<end>"


@pytest.mark.parametrize(
    ("example", "changes", "code"),
    [
        (CompletionExample(7, "ab", "cd"), {"max_length": 4}, "too_long"),
        (CompletionExample(7, "a<end>", "cd"), {}, "control_token"),
        (CompletionExample(7, "", "a"), {"end_id": None}, "no_labels"),
        (TextExample(7, "a"), {"end_id": None}, "no_labels"),
        (ChatExample(7, ()), {"render": None}, "no_chat_template"),
    ],
)
def test_what_only_tokens_tell_is_refused(example: Any, changes: dict[str, Any], code: str) -> None:
    with pytest.raises(DataError) as caught:
        encoder(**changes)(example)
    assert (caught.value.line, caught.value.code) == (7, code)


def test_a_template_that_rewrites_the_past_is_refused(write: Callable[[bytes], Path]) -> None:
    (example,) = read_examples(write(json.dumps(GOOD).encode()))

    def render(messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        return f"{len(messages)}: " + " ".join(m["content"] for m in messages)

    with pytest.raises(DataError) as caught:
        encoder(render=render)(example)
    assert caught.value.code == "chat_template"


def example_of(length: int, line: int = 1) -> Encoded:
    return Encoded(line, [1] * length, [True] * length)


def test_rows_hold_what_fits_in_order() -> None:
    lengths = [3, 4, 4, 8, 1]
    rows = pack_rows([example_of(n) for n in lengths], 8, packing=True)
    assert [[len(e.ids) for e in row] for row in rows] == [[3, 4], [4], [8], [1]]
    rows = pack_rows([example_of(n) for n in lengths], 8, packing=False)
    assert [[len(e.ids) for e in row] for row in rows] == [[3], [4], [4], [8], [1]]


def test_pieces_of_a_line_stay_together_when_examples_are_kept_back() -> None:
    examples = [example_of(2, line) for line in range(1, 21) for _ in range(3)]
    training, kept_back = split_evaluation(examples, 0.1, seed=3)
    assert len(training) + len(kept_back) == 60
    assert len({e.line for e in kept_back}) == 2
    assert not {e.line for e in kept_back} & {e.line for e in training}
    assert split_evaluation(examples, 0.1, seed=3)[1] == kept_back
    assert split_evaluation(examples, 0.0, seed=3) == (examples, [])
    with pytest.raises(DataError, match="kept back"):
        split_evaluation(examples[:3], 0.5, seed=3)
