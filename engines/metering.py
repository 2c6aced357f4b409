"""What engines did for whom: tokens, and each request's share of the device's time.

A device works on many requests at once, so the time of one is a share: every second with n requests on the engine,
running or waiting, is 1/n of a second of each (processor sharing). Shares of all requests add up to the time that the
engine was busy for this process.
"""

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

from engines.protocol import (
    AsyncEngine,
    EmbedRequest,
    EmbedResult,
    EngineInfo,
    EngineStats,
    GenerateRequest,
    ScoreRequest,
    ScoreResult,
    TokenOutput,
    TokenStream,
)

Operation = Literal["generate", "embed", "score"]
Whole = TypeVar("Whole", EmbedResult, ScoreResult)
"""An answer that comes at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineUse:
    """A part of what a request cost: its prompt when the engine has accepted it, the rest when it has ended.

    Attributes:
        num_requests: 1 in the first part.
        prefix_hit_tokens: of the prompt, those that the engine had computed before.
    """

    tenant: str
    model: str
    operation: Operation
    num_requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prefix_hit_tokens: int = 0
    device_seconds: float = 0.0


class DeviceClock:
    """Divides an engine's time among the requests that are on it. Belongs to one event loop.

    Args:
        clock: seconds; replaced in tests.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._num_requests = 0
        self._share = 0.0
        """What a request that was on the engine all the time would have had by now."""
        self._at = clock()

    def enter(self) -> float:
        """A request begins. Returns a mark for `leave`."""
        self._advance()
        self._num_requests += 1
        return self._share

    def leave(self, mark: float) -> float:
        """It has ended. Returns its share, in seconds."""
        self._advance()
        self._num_requests -= 1
        return self._share - mark

    def _advance(self) -> None:
        now = self._clock()
        if self._num_requests:
            self._share += (now - self._at) / self._num_requests
        self._at = now


class ForwardingEngine(AsyncEngine):
    """Does nothing but ask another one; for those that change a part."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    @property
    def info(self) -> EngineInfo:
        return self._engine.info

    async def generate(self, request: GenerateRequest) -> TokenStream:
        return await self._engine.generate(request)

    async def embed(self, request: EmbedRequest) -> EmbedResult:
        return await self._engine.embed(request)

    async def score(self, request: ScoreRequest) -> ScoreResult:
        return await self._engine.score(request)

    async def sleep(self) -> None:
        await self._engine.sleep()

    async def wake(self) -> None:
        await self._engine.wake()

    async def stats(self) -> EngineStats:
        return await self._engine.stats()


class MeteredEngine(ForwardingEngine):
    """An engine that tells what it does for the tenants that its requests name.

    Args:
        model: what its users call it.
        clock: of the engine; all that meter it share one.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        model: str,
        tell: Callable[[EngineUse], None],
        clock: DeviceClock,
    ) -> None:
        super().__init__(engine)
        self._model = model
        self._tell = tell
        self._clock = clock

    async def generate(self, request: GenerateRequest) -> TokenStream:
        mark = self._clock.enter()
        try:
            stream = await self._engine.generate(request)
        except BaseException:
            self._clock.leave(mark)  # refused, or not waited for: it was nobody's work
            raise
        self._use(request.tenant, "generate", num_requests=1, prompt_tokens=len(request.token_ids))
        return _MeteredStream(
            stream, lambda tokens, hits: self._settle(request, mark, tokens, hits)
        )

    async def embed(self, request: EmbedRequest) -> EmbedResult:
        return await self._metered("embed", request.tenant, super().embed(request))

    async def score(self, request: ScoreRequest) -> ScoreResult:
        return await self._metered("score", request.tenant, super().score(request))

    def _settle(self, request: GenerateRequest, mark: float, num_tokens: int, hits: int) -> None:
        self._use(
            request.tenant,
            "generate",
            completion_tokens=num_tokens,
            prefix_hit_tokens=hits,
            device_seconds=self._clock.leave(mark),
        )

    async def _metered(self, operation: Operation, tenant: str, work: Awaitable[Whole]) -> Whole:
        """Not counted where it fails."""
        mark = self._clock.enter()
        try:
            result = await work
        except BaseException:
            self._clock.leave(mark)
            raise
        seconds = self._clock.leave(mark)
        if result.num_tokens:
            self._use(
                tenant,
                operation,
                num_requests=1,
                prompt_tokens=result.num_tokens,
                device_seconds=seconds,
            )
        return result

    def _use(self, tenant: str, operation: Operation, **amounts: float) -> None:
        self._tell(EngineUse(tenant=tenant, model=self._model, operation=operation, **amounts))  # type: ignore[arg-type]


class _MeteredStream(TokenStream):
    """Tells once what was generated, when the stream ends, however it ends."""

    def __init__(self, stream: TokenStream, settle: Callable[[int, int], None]) -> None:
        self._stream = stream
        self._settle_once: Callable[[int, int], None] | None = settle
        self._num_tokens = 0
        self._num_hits = 0

    def __aiter__(self) -> AsyncIterator[TokenOutput]:
        return self

    async def __anext__(self) -> TokenOutput:
        try:
            output = await anext(self._stream)
        except BaseException:
            self._settle()
            raise
        self._num_tokens += len(output.token_ids)
        self._num_hits = max(self._num_hits, output.num_cached_tokens)
        if output.finish_reason is not None:
            self._settle()
        return output

    async def aclose(self) -> None:
        self._settle()
        await self._stream.aclose()

    def _settle(self) -> None:
        settle, self._settle_once = self._settle_once, None
        if settle is not None:
            settle(self._num_tokens, self._num_hits)
