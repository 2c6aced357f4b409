"""A scripted AsyncEngine in this process: tests say what it answers, and read what it was asked."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

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
from tests.fakes.echo_engine import (
    ECHO_INFO,
    EMPTY_STATS,
    echo_embed,
    echo_outputs,
    echo_score,
    echo_token,
)


@dataclass
class FakeAsyncEngine:
    """By default it answers as `EchoEngine` does: the prompt again, then EOS.

    Attributes:
        reply: generated token ids, for every request or computed from it. EOS, stop tokens, `min_tokens` and
            `max_tokens` cut them as an engine would; a reply that ends before gives finish_reason "length".
        refuse: raised by `generate`, `embed` and `score`.
        fail_after: after so many outputs a stream raises EngineError("internal_error").
        die_after: after so many outputs a stream raises EngineError("engine_dead").
        gate: a stream waits for this event before its second output and after (see `hold`).
        requests, embed_requests, score_requests: what was asked, in order.
        aborted: ids of streams closed before their last output.
    """

    info: EngineInfo = ECHO_INFO
    reply: Sequence[int] | Callable[[GenerateRequest], Iterable[int]] | None = None
    refuse: EngineError | None = None
    fail_after: int | None = None
    die_after: int | None = None
    gate: asyncio.Event | None = None
    is_dead: bool = False
    sleeping: bool = False
    requests: list[GenerateRequest] = field(default_factory=list)
    embed_requests: list[EmbedRequest] = field(default_factory=list)
    score_requests: list[ScoreRequest] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    num_running: int = 0

    def hold(self) -> asyncio.Event:
        """Make streams stop after their first output until the returned event is set."""
        self.gate = asyncio.Event()
        return self.gate

    async def generate(self, request: GenerateRequest) -> "FakeTokenStream":
        self._check()
        self.requests.append(request)
        self.num_running += 1
        return FakeTokenStream(self, request)

    async def embed(self, request: EmbedRequest) -> EmbedResult:
        self._check()
        self.embed_requests.append(request)
        return echo_embed(request, self.info.hidden_size)

    async def score(self, request: ScoreRequest) -> ScoreResult:
        self._check()
        self.score_requests.append(request)
        return echo_score(request)

    async def sleep(self) -> None:
        self.sleeping = True

    async def wake(self) -> None:
        self.sleeping = False

    async def stats(self) -> EngineStats:
        if self.is_dead:
            raise EngineError("engine_dead", "the engine died")
        return replace(EMPTY_STATS, num_requests_running=self.num_running, sleeping=self.sleeping)

    async def aclose(self) -> None:
        self.is_dead = True

    def _check(self) -> None:
        if self.is_dead:
            raise EngineError("engine_dead", "the engine died")
        if self.sleeping:
            raise EngineError("sleeping", "the model sleeps")
        if self.refuse is not None:
            raise self.refuse

    def reply_ids(self, request: GenerateRequest) -> Iterable[int]:
        if self.reply is None:
            return (
                echo_token(request.token_ids, request.params, index, self.info.eos_token_ids[0])
                for index in range(request.params.max_tokens)
            )
        return self.reply(request) if callable(self.reply) else self.reply


class FakeTokenStream:
    """The TokenStream of one request of a `FakeAsyncEngine`."""

    def __init__(self, engine: FakeAsyncEngine, request: GenerateRequest) -> None:
        self._engine = engine
        self._request = request
        reply = engine.reply_ids(request)
        self._outputs: Iterator[TokenOutput] = iter(
            echo_outputs(request, reply, engine.info.eos_token_ids)
        )
        self._num_yielded = 0
        self._ended = False

    def __aiter__(self) -> AsyncIterator[TokenOutput]:
        return self

    async def __anext__(self) -> TokenOutput:
        if self._ended:
            raise StopAsyncIteration
        engine = self._engine
        await asyncio.sleep(0)
        if engine.gate is not None and self._num_yielded:
            await engine.gate.wait()
        if engine.is_dead or self._num_yielded == engine.die_after:
            self._end()
            raise EngineError("engine_dead", "the engine died")
        if self._num_yielded == engine.fail_after:
            self._end()
            raise EngineError("internal_error", "told to fail")
        output = next(self._outputs)
        self._num_yielded += 1
        if output.finish_reason is not None:
            self._end()
        return output

    async def aclose(self) -> None:
        if not self._ended:
            self._end()
            self._engine.aborted.append(self._request.request_id)

    def _end(self) -> None:
        self._ended = True
        self._engine.num_running -= 1
