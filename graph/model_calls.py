"""Calls of the engines for graph work: an answer whose queue may be full, and texts that are encoded together."""

import asyncio
import secrets
from contextlib import aclosing

from engines.protocol import AsyncEngine, EmbedRequest, EngineError, FinishReason, GenerateRequest

EMBED_BATCH = 64
_QUEUE_FULL_WAITS_SECONDS = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4)


async def generate_tokens(
    engine: AsyncEngine, request: GenerateRequest
) -> tuple[list[int], FinishReason, int]:
    """Generated tokens without the one that ended them, and how many prompt tokens were found computed.

    A full queue is waited for.

    Raises:
        EngineError
    """
    for seconds in (*_QUEUE_FULL_WAITS_SECONDS, None):
        try:
            stream = await engine.generate(request)
            break
        except EngineError as error:
            if error.code != "queue_full" or seconds is None:
                raise
            await asyncio.sleep(seconds)
    token_ids: list[int] = []
    finish_reason: FinishReason = "abort"  # of a stream that just ends
    num_hits = 0
    async with aclosing(stream):  # leaving early aborts the request
        async for output in stream:
            token_ids += output.token_ids
            if output.stop_token_id is not None and token_ids[-1:] == [output.stop_token_id]:
                token_ids.pop()
            if output.finish_reason == "error":
                raise EngineError(output.error_code or "internal_error", output.error or "")
            finish_reason = output.finish_reason or finish_reason
            num_hits = max(num_hits, output.num_cached_tokens)
    if finish_reason == "abort":
        raise EngineError("internal_error", "the engine aborted the request")
    return token_ids, finish_reason, num_hits


class EmbedBatcher:
    """Collects texts that are ready together into one call of the encoder."""

    def __init__(self, engine: AsyncEngine, tenant: str) -> None:
        self._engine = engine
        self._tenant = tenant
        self._waiting: list[tuple[tuple[int, ...], asyncio.Future[bytes]]] = []
        self._task: asyncio.Task[None] | None = None

    async def embed(self, token_ids: tuple[int, ...]) -> bytes:
        """Raises: EngineError."""
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiting.append((token_ids, future))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        return await future

    async def _run(self) -> None:
        await asyncio.sleep(0)  # those that are ready in this turn of the loop come along
        while self._waiting:
            batch, self._waiting = self._waiting[:EMBED_BATCH], self._waiting[EMBED_BATCH:]
            wanted = [(ids, future) for ids, future in batch if not future.done()]
            if not wanted:
                continue
            try:
                vectors = await self._embed([ids for ids, _ in wanted])
            except Exception as error:
                for _, future in wanted:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), vector in zip(wanted, vectors, strict=True):
                if not future.done():
                    future.set_result(vector)

    async def _embed(self, token_ids: list[tuple[int, ...]]) -> list[bytes]:
        result = await self._engine.embed(
            EmbedRequest(
                request_id=f"enrich-{secrets.token_hex(12)}",
                token_ids=tuple(token_ids),
                tenant=self._tenant,
            )
        )
        size = 4 * result.dim
        return [result.vectors[i * size : (i + 1) * size] for i in range(len(token_ids))]
