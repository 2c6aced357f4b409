"""The Engine protocol: what an engine promises, and the messages that cross its socket.

Imports nothing but the standard library, so that the API process, the engine host and an engine on a bare
GPU machine share it. `wire.py` alone knows how these become bytes.

Two views of one engine: `Engine` is the synchronous object that a host's engine thread owns and steps;
`AsyncEngine` is what the API process and jobs see of it through `client.EngineClient`.
"""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

ROW_PLACEHOLDER = -1
"""Token id that marks a prompt position filled by the next embedding row (LLaGA's graph tokens)."""

FinishReason = Literal["stop", "length", "abort", "error"]
ErrorCode = Literal[
    "invalid_value",
    "unsupported_parameter",
    "context_length_exceeded",
    "queue_full",
    "out_of_memory",
    "sleeping",
    "engine_dead",
    "draining",
    "internal_error",
]


class EngineError(Exception):
    """A request that an engine refuses or loses.

    Attributes:
        code: machine-readable reason; `service/errors.py` maps it to an HTTP status.
        message: what, got, allowed. Safe to show to a client.
        param: the request field at fault, as OpenAI names it, or None.
    """

    def __init__(self, code: ErrorCode, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code: ErrorCode = code
        self.message = message
        self.param = param


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose tokens. Defaults are neutral; validation of ranges is the HTTP layer's.

    Attributes:
        max_tokens: at most so many generated tokens; 0 only together with `prompt_logprobs`.
        min_tokens: neither EOS nor a stop token before so many generated tokens.
        temperature: 0 is greedy.
        top_p: nucleus mass in (0, 1].
        top_k: 0 keeps all.
        min_p: keep tokens with at least this share of the top probability, in [0, 1].
        repetition_penalty: 1 is off (Keskar et al. 2019, arXiv:1909.05858), over prompt and output.
        presence_penalty, frequency_penalty: OpenAI's, over generated tokens only.
        logit_bias: token id to an addend on its logit.
        seed: a request with a seed and the same batch-independent logits gives the same tokens.
        stop_token_ids: end with finish_reason "stop", besides the model's own EOS ids.
        ignore_eos: go on past the model's own EOS ids.
        logprobs: number of alternatives to report per generated token (0: the chosen one only);
            None reports nothing. Log-probabilities are of the raw logits, before temperature.
        prompt_logprobs: the same for prompt tokens; the first prompt token has none.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Skip:
    """Feed-forward skipping asked for by a request (FFN-SkipLLM, arXiv:2404.03865).

    Attributes:
        mode: "off", the checkpoint's own "profile", or a "target" share of rows.
        target_ratio: share of (row, layer) pairs to skip in (0, 1); only with mode "target".
    """

    mode: Literal["off", "profile", "target"] = "off"
    target_ratio: float | None = None

    @classmethod
    def from_json(cls, value: object) -> "Skip":
        """Parse "off", "profile" or {"target_ratio": share}.

        Raises:
            ValueError: it is none of them; the message tells what it must be.
        """
        if value == "off":
            return cls()
        if value == "profile":
            return cls(mode="profile")
        if not isinstance(value, dict) or set(value) != {"target_ratio"}:
            raise ValueError('skip must be "off", "profile" or {"target_ratio": number}')
        ratio = value["target_ratio"]
        if type(ratio) is not float or not 0 < ratio < 1:
            raise ValueError("skip.target_ratio must be a number above 0 and below 1")
        return cls(mode="target", target_ratio=ratio)


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraint:
    """Structured output asked for by a request.

    Attributes:
        kind: which language `text` is in.
        text: the JSON schema, or the regular expression; empty for "json_object".
    """

    kind: Literal["json_schema", "json_object", "regex"]
    text: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """One prompt to continue. `n` completions are n requests.

    Stop strings are not here: `engines.text.TextStream` matches them on the decoded text and aborts.

    Attributes:
        request_id: unique among the running requests of all clients of the host.
        token_ids: the prompt; `ROW_PLACEHOLDER` where an embedding row goes.
        embedding_rows: float32 little-endian rows (num_placeholders, hidden_size), row-major.
        priority: lower runs first.
        tenant: salt of every cache shared between requests.
    """

    request_id: str
    token_ids: tuple[int, ...]
    params: SamplingParams
    embedding_rows: bytes | None = None
    priority: int = 0
    tenant: str = ""
    skip: Skip = Skip()
    constraint: Constraint | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """Log-probability of one token, and of the likeliest at its position.

    Attributes:
        token_id: the token that stands there.
        logprob: natural logarithm; None for the first token of a prompt.
        top: (token id, logprob) pairs, likeliest first.
    """

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenOutput:
    """What one step gave one request; the last one has a `finish_reason`.

    Attributes:
        token_ids: new tokens, in order; may be empty in the first (prompt logprobs) and last output.
            An EOS or stop token that ended the request is included as the last id.
        logprobs: one per new token where asked for.
        prompt_logprobs: one per prompt token, once, in the request's first output.
        stop_token_id: the EOS or stop token that ended the request.
        num_cached_tokens: prompt tokens whose KV came from the prefix cache.
        ffn_rows_skipped, ffn_rows_total: (row, layer) counts so far; 0 where skipping is off.
        queue_seconds: from its arrival to its first step; with the request's first token only.
        prefill_seconds: from there to the first token; with that only.
        error: set exactly when finish_reason is "error".
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    num_cached_tokens: int = 0
    ffn_rows_skipped: int = 0
    ffn_rows_total: int = 0
    queue_seconds: float | None = field(default=None, compare=False)
    prefill_seconds: float | None = field(default=None, compare=False)
    error: str | None = None
    error_code: ErrorCode | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedRequest:
    """Texts, as token ids, to turn into one vector each.

    Attributes:
        token_ids: one tuple per text, special tokens included.
        pooling: "default" is the model's own (mean for all-MiniLM-L6-v2); a decoder offers "mean" and "last".
        normalize: scale each vector to unit L2 norm.
    """

    request_id: str
    token_ids: tuple[tuple[int, ...], ...]
    pooling: Literal["default", "mean", "last"] = "default"
    normalize: bool = True
    tenant: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedResult:
    """Attributes: vectors: float32 little-endian (num_texts, dim), row-major."""

    dim: int
    vectors: bytes
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRequest:
    """Continuations of one context to give log-probabilities to.

    Attributes:
        context_ids: at least one token.
        continuation_ids: each at least one token.
        embedding_rows: as in `GenerateRequest`, for placeholders in the context.
    """

    request_id: str
    context_ids: tuple[int, ...]
    continuation_ids: tuple[tuple[int, ...], ...]
    embedding_rows: bytes | None = None
    tenant: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ContinuationScore:
    """Attributes: logprob: sum over tokens, natural log; is_greedy: every token was the likeliest."""

    logprob: float
    is_greedy: bool
    token_logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreResult:
    """One score per continuation, in order."""

    scores: tuple[ContinuationScore, ...]
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What a loaded model is and can do; fixed for the life of a host.

    Attributes:
        kind: "decoder" generates, scores and embeds; "encoder" embeds only.
        engine: name of the implementation.
        checkpoint_hash: sha256 of the manifest's file hashes; part of every cache key.
        max_model_len: prompt plus generated tokens.
        unsupported: request parameters, by OpenAI's or our HTTP name, that are refused with a 400.
        resident_bytes: memory of the weights as held.
        kernels: op name to the implementation chosen at load.
    """

    model: str
    kind: Literal["decoder", "encoder"]
    engine: str
    checkpoint_hash: str
    vocab_size: int
    hidden_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    max_num_seqs: int
    device: str
    dtype: str
    resident_bytes: int
    load_seconds: float
    unsupported: tuple[str, ...] = ()
    kernels: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Counters since load (…_total) and gauges now.

    Attributes:
        last_output_at: when a step, an embed or a score last ended well; a step of prompt tokens counts. By
            `time.monotonic`, which all processes of a machine share and which no change of the clock moves.
    """

    num_requests_running: int
    num_requests_waiting: int
    kv_cache_usage_ratio: float
    prompt_tokens_total: int
    generation_tokens_total: int
    preemptions_total: int
    prefix_cache_queries_total: int
    prefix_cache_hits_total: int
    ffn_rows_skipped_total: int
    ffn_rows_total: int
    last_output_at: float | None
    sleeping: bool
    rss_bytes: int


class Engine(Protocol):
    """An engine as its host sees it. Every method is called from the one engine thread."""

    @property
    def info(self) -> EngineInfo: ...

    def submit(self, request: GenerateRequest) -> None:
        """Accept a request for the coming steps.

        Raises:
            EngineError: refused; nothing of the request remains.
        """

    def abort(self, request_id: str) -> None:
        """Forget a request; its blocks are free before the next step. Unknown ids are ignored."""

    def has_work(self) -> bool:
        """Whether `step` would advance anything."""

    def step(self) -> list[TokenOutput]:
        """Advance every scheduled request by one step; a failing request ends with an error output."""

    def embed(self, request: EmbedRequest) -> EmbedResult: ...

    def score(self, request: ScoreRequest) -> ScoreResult: ...

    def sleep(self) -> None:
        """Free weights and caches of the device; requests are refused with "sleeping" until `wake`."""

    def wake(self) -> None: ...

    def stats(self) -> EngineStats: ...

    def close(self) -> None:
        """Stop whatever runs in the background; nothing is called afterwards."""


class TokenStream(Protocol):
    """Outputs of one accepted request. Leaving early must go through `aclose`, which aborts it."""

    def __aiter__(self) -> AsyncIterator[TokenOutput]: ...

    async def __anext__(self) -> TokenOutput: ...

    async def aclose(self) -> None: ...


class AsyncEngine(Protocol):
    """An engine as its users see it, from an event loop. All methods raise `EngineError`."""

    @property
    def info(self) -> EngineInfo: ...

    async def generate(self, request: GenerateRequest) -> TokenStream:
        """Submit; returns once the engine accepted the request, so refusals are raised here."""

    async def embed(self, request: EmbedRequest) -> EmbedResult: ...

    async def score(self, request: ScoreRequest) -> ScoreResult: ...

    async def sleep(self) -> None: ...

    async def wake(self) -> None: ...

    async def stats(self) -> EngineStats: ...


def num_placeholders(token_ids: Sequence[int]) -> int:
    """Count the prompt positions that embedding rows must fill."""
    return sum(1 for token_id in token_ids if token_id == ROW_PLACEHOLDER)
