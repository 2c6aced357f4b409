"""A model that is a script: token ids are code points, so every prompt and every vector can be read in a test."""

import asyncio
import itertools
import struct
from collections.abc import AsyncIterator, Callable, Mapping, Sequence

from engines.protocol import (
    EmbedRequest,
    EmbedResult,
    EngineError,
    EngineInfo,
    EngineStats,
    GenerateRequest,
    ScoreRequest,
    ScoreResult,
    TokenOutput,
)
from graph.node_text import TextError

EOS = 0
CLS, SEP = 1, 2


class CodePointText:
    """A `TextModel` whose tokens are code points."""

    max_token_chars = 1

    def __init__(self, *, chats: bool = True, marks: bool = False) -> None:
        self._chats = chats
        self._marks = marks

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        if not self._chats:
            raise TextError("the model has no chat template")
        return [ord(c) for m in messages for c in f"[{m['role']}]{m['content']}"]

    def encode_text(self, text: str) -> list[int]:
        return [ord(c) for c in text]

    def add_special_tokens(self, token_ids: Sequence[int]) -> list[int]:
        return [CLS, *token_ids, SEP] if self._marks else list(token_ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(chr(i) for i in token_ids if i > SEP)


def own_text(prompt: str) -> str:
    """The node's text in a prompt of the catalog."""
    return prompt.split("<text>\n", 1)[1].split("\n</text>", 1)[0]


class ScriptedEngine:
    """An `AsyncEngine`. Remembers what it was asked; `hold` makes generation wait for `release`.

    Attributes:
        prompts: of every accepted request, as text.
        aborted: request ids of streams that were left early.
        embedded: token ids of every embedded text; batches: their number per call.
    """

    def __init__(
        self,
        answer: Callable[[str], str] = lambda prompt: own_text(prompt).upper(),
        *,
        model: str = "writer",
        kind: str = "decoder",
        max_num_seqs: int = 4,
        max_model_len: int = 100_000,
        checkpoint_hash: str = "hash-1",
        dim: int = 3,
    ) -> None:
        self._answer = answer
        self.info = EngineInfo(
            model=model,
            kind=kind,  # type: ignore[arg-type]
            engine="scripted",
            checkpoint_hash=checkpoint_hash,
            vocab_size=0x110000,
            hidden_size=dim,
            max_model_len=max_model_len,
            eos_token_ids=(EOS,),
            max_num_seqs=max_num_seqs,
            device="cpu",
            dtype="float32",
            resident_bytes=0,
            load_seconds=0,
        )
        self.prompts: list[str] = []
        self.requests: list[GenerateRequest] = []
        self.aborted: list[str] = []
        self.embedded: list[tuple[int, ...]] = []
        self.batches: list[int] = []
        self._last: tuple[int, ...] = ()
        self.num_running = 0
        self.most_running = 0
        self.num_full = 0
        self.embed_error: EngineError | None = None
        self.arrived = asyncio.Event()
        self._gate = asyncio.Event()
        self._gate.set()

    def hold(self) -> None:
        self._gate.clear()

    def release(self) -> None:
        self._gate.set()

    async def generate(self, request: GenerateRequest) -> "ScriptedStream":
        if self.num_full > 0:
            self.num_full -= 1
            raise EngineError("queue_full", "the queue is full")
        prompt = "".join(map(chr, request.token_ids))
        self.prompts.append(prompt)
        self.requests.append(request)
        answer = self._answer(prompt)
        if answer == "REFUSE":
            raise EngineError("invalid_value", "refused by script")
        return ScriptedStream(self, request, answer)

    async def embed(self, request: EmbedRequest) -> EmbedResult:
        if self.embed_error is not None:
            raise self.embed_error
        self.embedded += request.token_ids
        self.batches.append(len(request.token_ids))
        dim = self.info.hidden_size
        rows = [[float(len(ids)), float(sum(ids)), *[0.5] * (dim - 2)] for ids in request.token_ids]
        return EmbedResult(
            dim=dim,
            vectors=b"".join(struct.pack(f"<{dim}f", *row) for row in rows),
            num_tokens=sum(map(len, request.token_ids)),
        )

    def tokens_of(self, request: GenerateRequest, answer: str) -> AsyncIterator[TokenOutput]:
        return self._tokens_of(request, answer)

    async def _tokens_of(self, request: GenerateRequest, answer: str) -> AsyncIterator[TokenOutput]:
        name = request.request_id
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        self.arrived.set()
        try:
            await self._gate.wait()
            await asyncio.sleep(0)
            if answer == "FAIL":
                yield TokenOutput(
                    request_id=name,
                    finish_reason="error",
                    error="failed by script",
                    error_code="out_of_memory",
                )
                return
            ids = tuple(map(ord, answer))[: request.params.max_tokens]
            yield TokenOutput(
                request_id=name, token_ids=ids[:2], num_cached_tokens=self._num_cached(request)
            )
            if len(ids) == request.params.max_tokens:
                yield TokenOutput(request_id=name, token_ids=ids[2:], finish_reason="length")
            else:
                yield TokenOutput(
                    request_id=name,
                    token_ids=(*ids[2:], EOS),
                    finish_reason="stop",
                    stop_token_id=EOS,
                )
        finally:
            self.num_running -= 1

    def _num_cached(self, request: GenerateRequest) -> int:
        """What a prefix cache of one prompt's length would find: the beginning shared with the request before."""
        before, self._last = self._last, request.token_ids
        pairs = zip(before, request.token_ids, strict=False)
        return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))

    async def score(self, request: ScoreRequest) -> ScoreResult:
        raise NotImplementedError

    async def sleep(self) -> None:
        raise NotImplementedError

    async def wake(self) -> None:
        raise NotImplementedError

    async def stats(self) -> EngineStats:
        raise NotImplementedError


class ScriptedStream:
    """A `TokenStream` that tells its engine when it is left before its end."""

    def __init__(self, engine: ScriptedEngine, request: GenerateRequest, answer: str) -> None:
        self._engine = engine
        self._request = request
        self._outputs = engine.tokens_of(request, answer)
        self._ended = False

    def __aiter__(self) -> AsyncIterator[TokenOutput]:
        return self

    async def __anext__(self) -> TokenOutput:
        try:
            return await anext(self._outputs)
        except StopAsyncIteration:
            self._ended = True
            raise

    async def aclose(self) -> None:
        if not self._ended:
            self._ended = True
            self._engine.aborted.append(self._request.request_id)
            await self._outputs.aclose()  # type: ignore[attr-defined]
