"""A checkpoint's tokenizer and chat template as enrichment uses them: `graph.node_text`'s `TextModel`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from engines.chat_template import ChatTemplate, ChatTemplateError, load_chat_template
from engines.text import TextTokenizer, UnsafeTextError
from graph.node_text import TextError, TextModel


class ServedText(TextModel):
    """Args: chat_template: None where the model has none."""

    def __init__(self, tokenizer: TextTokenizer, chat_template: ChatTemplate | None) -> None:
        self._tokenizer = tokenizer
        self._template = chat_template
        self.max_token_chars = tokenizer.max_token_chars

    @classmethod
    def load(cls, folder: Path) -> "ServedText":
        """That of a checkpoint's folder."""
        tokenizer = TextTokenizer.load(folder)
        return cls(tokenizer, load_chat_template(folder, tokenizer.control_tokens))

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        if self._template is None:
            raise TextError("the model has no chat template")
        try:
            return self._tokenizer.encode_segments(self._template.render(messages))
        except (ChatTemplateError, UnsafeTextError) as error:
            raise TextError(str(error)) from error

    def encode_text(self, text: str) -> list[int]:
        try:
            return self._tokenizer.encode(text)
        except UnsafeTextError as error:
            raise TextError(str(error)) from error

    def add_special_tokens(self, token_ids: Sequence[int]) -> list[int]:
        tokenizer = self._tokenizer
        return [*tokenizer.special_prefix, *token_ids, *tokenizer.special_suffix]

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)
