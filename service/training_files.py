"""Whether a training file suits a model: its examples, encoded as the run will encode them, before a job is accepted.

The run does this with transformers' tokenizer; here it is done without torch, by the service's own chat template, which
renders the same.
"""

import json
from pathlib import Path

from tokenizers import Tokenizer

from compression.registry import ModelEntry
from engines.chat_template import ChatTemplateError, load_chat_template
from engines.text import find_control_tokens, read_json
from service.errors import ApiError
from training.data import DataError, Encoder, read_examples

MAX_CHECKED_TOKENS = 4 * 2**20
"""Of a longer file the rest is checked when the job has begun, before its first step."""


def check_examples(entry: ModelEntry, path: Path, max_length: int, param: str) -> None:
    """Raises: ApiError: an example is too long, has nothing to learn, or cannot be rendered; it names the line."""
    encoder = _encoder(entry.path, max_length)
    num_tokens = 0
    try:
        for example in read_examples(path):
            try:
                pieces = encoder(example)
            except ChatTemplateError as error:
                raise DataError(example.line, "chat_template", str(error)) from None
            num_tokens += sum(len(piece.ids) for piece in pieces)
            if num_tokens > MAX_CHECKED_TOKENS:
                return
    except DataError as error:
        raise ApiError("invalid_file", str(error), param) from None


def _encoder(folder: Path, max_length: int) -> Encoder:
    raw = (folder / "tokenizer.json").read_text()
    tokenizer = Tokenizer.from_str(raw)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    control_tokens = find_control_tokens(json.loads(raw))
    template = load_chat_template(folder, control_tokens)

    def render(messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        assert template is not None
        segments = template.render(messages, add_generation_prompt=add_generation_prompt)
        return "".join(segment.text for segment in segments)

    end = read_json(folder / "tokenizer_config.json").get("eos_token")
    end = end.get("content") if isinstance(end, dict) else end
    return Encoder(
        tokenizer=tokenizer,
        end_id=None if end is None else tokenizer.token_to_id(end),
        max_length=max_length,
        render=None if template is None else render,
        control_spellings=tuple(control_tokens),
    )
