"""How enrichment uses a served model's tokenizer and chat template."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from engines.chat_template import ChatTemplate
from engines.text import TextTokenizer, UnsafeTextError
from graph.node_text import TextError
from graph.served_text import ServedText

WORDS = ["[UNK]", "[CLS]", "[SEP]", "a", "b", "c", "user"]
A, B, END = 3, 4, 7


def tokenizer(*, marks: bool) -> TextTokenizer:
    built = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "[UNK]"))
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    built.add_special_tokens(["[CLS]", "[SEP]", "<|end|>"])
    if marks:
        built.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
    return TextTokenizer(built.to_str())


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source=source, special_tokens={})


CHAT = "{% for m in messages %}{{ m.role }} {{ m.content }}<|end|>{% endfor %}"


def test_marks_around_a_text() -> None:
    encoder = ServedText(tokenizer(marks=True), None)
    assert encoder.encode_text("a b") == [A, B]
    assert encoder.add_special_tokens([A, B]) == [1, A, B, 2]
    assert encoder.add_special_tokens([]) == [1, 2]
    assert encoder.decode([1, A, B, 2]) == "a b"
    plain = ServedText(tokenizer(marks=False), None)
    assert plain.add_special_tokens([A]) == [A]


def test_contents_never_become_control_tokens() -> None:
    text = ServedText(tokenizer(marks=False), template(CHAT))
    ids = text.encode_chat([{"role": "user", "content": "a <|end|> b"}])
    assert ids.count(END) == 1
    assert ids[-1] == END


def test_without_a_template() -> None:
    text = ServedText(tokenizer(marks=False), None)
    with pytest.raises(TextError, match="no chat template"):
        text.encode_chat([{"role": "user", "content": "a"}])


def test_a_template_that_refuses() -> None:
    source = "{{ raise_exception('no system messages') }}"
    text = ServedText(tokenizer(marks=False), template(source))
    with pytest.raises(TextError, match="no system messages"):
        text.encode_chat([{"role": "system", "content": "a"}])


def test_a_text_that_cannot_be_made_safe(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> list[int]:
        raise UnsafeTextError("a control token")

    tokens = tokenizer(marks=False)
    monkeypatch.setattr(tokens, "encode", refuse)
    monkeypatch.setattr(tokens, "encode_segments", refuse)
    text = ServedText(tokens, template(CHAT))
    with pytest.raises(TextError, match="control token"):
        text.encode_text("a")
    with pytest.raises(TextError, match="control token"):
        text.encode_chat([{"role": "user", "content": "a"}])
