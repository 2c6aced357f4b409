"""Request fields that completions and chat have in common, checked so that a refusal names the field."""

import json
import re
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from engines.protocol import Constraint, EngineInfo, SamplingParams, Skip
from service.deps import RequestModel
from service.errors import ApiError

MAX_N = 16
MAX_STOP_STRINGS = 4
MAX_STOP_CHARS = 256
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 300
MAX_STOP_TOKEN_IDS = 64
MAX_TOKEN_ID = 2**31 - 1
MAX_COUNT = 2**31 - 1
MAX_PROMPT_TOKENS = 2**20
"""Of one request; looked at before its token ids are, each of which costs time."""
MAX_SCHEMA_CHARS = 2**16
MAX_REGEX_CHARS = 4096
INT64 = 2**63
_TOKEN_ID = re.compile(r"[0-9]{1,10}\Z")
_SURROGATE = re.compile("[\ud800-\udfff]")


def invalid(message: str) -> PydanticCustomError:
    return PydanticCustomError("invalid_value", "{message}", {"message": message})


def present(name: str) -> dict[str, Any]:
    """JSON Schema for a body in which `name` is given; for choices between fields."""
    return {"required": [name], "properties": {name: {"not": {"type": "null"}}}}


def absent(name: str) -> dict[str, Any]:
    return {"not": present(name)}


def check_text(value: str, name: str = "text") -> str:
    if not value.isascii() and _SURROGATE.search(value):
        raise invalid(f"{name} must be valid Unicode, it has a lone surrogate")
    return value


def is_token_id(value: object) -> bool:
    return type(value) is int and 0 <= value <= MAX_TOKEN_ID


def _stop(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or not all(isinstance(s, str) for s in strings):
        raise invalid("stop must be a string or a list of strings")
    if len(strings) > MAX_STOP_STRINGS:
        raise invalid(f"stop has at most {MAX_STOP_STRINGS} strings, got {len(strings)}")
    if not all(1 <= len(s) <= MAX_STOP_CHARS for s in strings):
        raise invalid(f"a stop string must have 1 to {MAX_STOP_CHARS} characters")
    return tuple(check_text(s, "stop") for s in strings)


_STOP_STRING = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS}
StopField = Annotated[
    tuple[str, ...],
    PlainValidator(_stop),
    WithJsonSchema(
        {
            "anyOf": [
                _STOP_STRING,
                {"type": "array", "items": _STOP_STRING, "maxItems": MAX_STOP_STRINGS},
                {"type": "null"},
            ]
        }
    ),
]


def _logit_bias(value: object) -> dict[int, float]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise invalid("logit_bias must be an object of token id to number")
    if len(value) > MAX_LOGIT_BIAS:
        raise invalid(f"logit_bias has at most {MAX_LOGIT_BIAS} entries, got {len(value)}")
    biases: dict[int, float] = {}
    for key, bias in value.items():
        if not _TOKEN_ID.match(key) or int(key) > MAX_TOKEN_ID:
            raise invalid(f"logit_bias keys must be token ids, got {key[:40]!r}")
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise invalid("logit_bias values must be numbers from -100 to 100")
        biases[int(key)] = float(bias)
    return biases


LogitBiasField = Annotated[
    dict[int, float],
    PlainValidator(_logit_bias),
    WithJsonSchema(
        {
            "anyOf": [
                {
                    "type": "object",
                    "propertyNames": {"pattern": "^[0-9]{1,9}$"},
                    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
                    "maxProperties": MAX_LOGIT_BIAS,
                },
                {"type": "null"},
            ]
        }
    ),
]


def _skip(value: object) -> Skip | None:
    try:
        return None if value is None else Skip.from_json(value)
    except ValueError as error:
        raise invalid(str(error)) from None


SkipField = Annotated[
    Skip | None,
    PlainValidator(_skip),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "enum": ["off", "profile"]},
                {
                    "type": "object",
                    "properties": {
                        "target_ratio": {
                            "type": "number",
                            "exclusiveMinimum": 0,
                            "exclusiveMaximum": 1,
                        }
                    },
                    "required": ["target_ratio"],
                    "additionalProperties": False,
                },
                {"type": "null"},
            ]
        }
    ),
]

TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]
ModelField = Annotated[
    str, Field(min_length=1, max_length=200, description="Id of a loaded model.")
]


class StreamOptions(RequestModel):
    include_usage: bool | None = Field(
        default=None, description="Send a last chunk with the usage and no choices."
    )


class JsonSchemaFormat(RequestModel):
    name: Annotated[str, Field(min_length=1, max_length=64)]
    description: Annotated[str, Field(max_length=1024)] | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(RequestModel):
    """Anything but `text` needs an engine that can constrain its output."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class GenerationBody(RequestModel):
    """Sampling and streaming. `null` is the default everywhere."""

    model: ModelField
    stream: bool | None = Field(default=False, description="Answer with server-sent events.")
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = Field(
        default=1, description="Choices per prompt; choice i has seed + i."
    )
    stop: StopField = Field(
        default=(), description="The text ends before the first of these strings."
    )
    seed: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(
        default=1.0, description="0 is greedy."
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = 0.0
    logit_bias: LogitBiasField = Field(
        default={}, description="Token id to an addend on its logit."
    )
    user: Annotated[str, Field(max_length=512)] | None = Field(
        default=None, description="Accepted and not used."
    )
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
            Field(max_length=16),
        ]
        | None
    ) = Field(default=None, description="Accepted and not used.")
    store: Literal[False] | None = Field(default=None, description="Nothing is stored.")
    top_k: Annotated[int, Field(ge=-1, le=MAX_COUNT)] | None = Field(
        default=0, description="Draw from the k likeliest tokens; 0 and -1 keep all."
    )
    min_p: Annotated[float, Field(ge=0, le=1)] | None = Field(
        default=0.0, description="Keep tokens with this share of the top probability."
    )
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = 1.0
    min_tokens: Annotated[int, Field(ge=0, le=MAX_COUNT)] | None = 0
    ignore_eos: bool | None = False
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKEN_IDS)] | None = None
    skip_special_tokens: bool | None = Field(
        default=True, description="Leave special tokens out of the text."
    )
    response_format: ResponseFormat | None = None
    regex: Annotated[str, Field(min_length=1, max_length=MAX_REGEX_CHARS)] | None = Field(
        default=None, description="The whole output matches it; no look-around, no back-references."
    )
    skip: SkipField = Field(
        default=None,
        description="Feed-forward skipping (FFN-SkipLLM), where the model has a skip profile; by default as the"
        " server is set for the model.",
    )

    @model_validator(mode="after")
    def _check_stream_options(self) -> "GenerationBody":
        if self.stream_options is not None and not self.stream:
            raise ApiError(
                "invalid_value",
                "stream_options is allowed only with stream: true",
                "stream_options",
            )
        return self

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def includes_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling_params(
        self, *, max_tokens: int, logprobs: int | None, prompt_logprobs: int | None = None
    ) -> SamplingParams:
        if (self.min_tokens or 0) > max_tokens:
            raise ApiError(
                "invalid_value",
                f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({max_tokens})",
                "min_tokens",
            )
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=self.min_tokens or 0,
            temperature=_given(self.temperature, 1.0),
            top_p=_given(self.top_p, 1.0),
            top_k=max(0, self.top_k or 0),
            min_p=_given(self.min_p, 0.0),
            repetition_penalty=_given(self.repetition_penalty, 1.0),
            presence_penalty=_given(self.presence_penalty, 0.0),
            frequency_penalty=_given(self.frequency_penalty, 0.0),
            logit_bias=self.logit_bias,
            seed=self.seed,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )

    def check_supported(self, info: EngineInfo) -> None:
        """Refuse by name what the engine cannot honour and this request asks for.

        Raises:
            ApiError: unsupported_parameter; invalid_value, a token id that the model has not.
        """
        if info.kind != "decoder":
            raise ApiError(
                "invalid_value", f"{info.model!r} is an encoder: it cannot generate", "model"
            )
        for name in info.unsupported:
            if self.asks_for(name):
                raise ApiError(
                    "unsupported_parameter",
                    f"{name} is not supported by the engine of {info.model!r} ({info.engine})",
                    name,
                )
        for name, ids in (
            ("logit_bias", self.logit_bias),
            ("stop_token_ids", self.stop_token_ids or ()),
        ):
            for token_id in ids:
                check_token_id(token_id, info, name)

    def asks_for(self, name: str) -> bool:
        """Whether a field is there and says something else than its default."""
        if name == "response_format":
            return self.response_format is not None and self.response_format.type != "text"
        field = type(self).model_fields.get(name)
        value = getattr(self, name, None)
        return field is not None and value is not None and value != field.default

    def constraint(self) -> Constraint | None:
        """Raises: ApiError: invalid_value, two constraints, no schema, or one that is too large."""
        if self.regex is not None:
            if self.asks_for("response_format"):
                raise ApiError("invalid_value", "regex cannot go with response_format", "regex")
            return Constraint(kind="regex", text=check_text(self.regex, "regex"))
        form = self.response_format
        if form is None or form.type == "text":
            return None
        if form.type == "json_object":
            return Constraint(kind="json_object")
        if form.json_schema is None or form.json_schema.schema_ is None:
            raise ApiError(
                "invalid_value", "json_schema.schema is needed", "response_format.json_schema"
            )
        text = json.dumps(form.json_schema.schema_)
        if len(text) > MAX_SCHEMA_CHARS:
            raise ApiError(
                "invalid_value",
                f"a schema has at most {MAX_SCHEMA_CHARS} characters, got {len(text)}",
                "response_format.json_schema",
            )
        return Constraint(kind="json_schema", text=text)


def _given(value: float | None, default: float) -> float:
    return default if value is None else value


def check_token_id(token_id: int, info: EngineInfo, param: str) -> None:
    """Raises: ApiError."""
    if token_id >= info.vocab_size:
        raise ApiError(
            "invalid_value",
            f"token ids of {info.model!r} are below {info.vocab_size}, got {token_id}",
            param,
        )


def check_fits(
    info: EngineInfo, num_prompt_tokens: int, max_tokens: int, param: str, what: str
) -> None:
    """Refuse a request beyond the context, in OpenAI's words.

    Args:
        param: the field that holds the prompt; named if the prompt alone is too long, otherwise max_tokens is.
        what: the prompt, as the message calls it.

    Raises:
        ApiError: context_length_exceeded.
    """
    limit = info.max_model_len
    total = num_prompt_tokens + max_tokens
    if total <= limit:
        return
    prompt_too_long = num_prompt_tokens + min(max_tokens, 1) > limit
    raise ApiError(
        "context_length_exceeded",
        f"This model's maximum context length is {limit} tokens. However, you requested {total} tokens "
        f"({num_prompt_tokens} in {what}, {max_tokens} in the completion). Please reduce the length of "
        f"{what if prompt_too_long else what + ' or the completion'}.",
        param if prompt_too_long else "max_tokens",
    )
