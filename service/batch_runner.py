"""The batch job: each line of a file is one request to the service's own routes, in the job's own process.

The process holds no model. It has the routes of the API process without its network, so a line is checked and answered
exactly as the request would be, and reaches the engine hosts at `run/<model>.sock` like any client, behind those that
wait for an answer. An engine that is away is waited for; whatever else comes back is the line's answer.
"""

import asyncio
import hashlib
import json
import secrets
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import httpx
from fastapi import FastAPI

from compression.registry import ModelRegistry
from engines.metering import ForwardingEngine
from engines.protocol import AsyncEngine, GenerateRequest, TokenStream
from graph.enrich_types import PRIORITIES
from graph.store import GraphStore
from jobs.context import JobCancelledError, JobFailedError, RunnerContext
from jobs.file_check import FileContentError, read_batch
from jobs.files import FileStore, UploadNotFoundError
from jobs.store import JsonObject
from jobs.usage import UsageStore
from service.app import handle_errors
from service.auth import Identity, KeyStore
from service.batch_ledger import BatchLedger
from service.batches import MAX_REQUESTS, BatchState
from service.deps import AppState, identify
from service.engine_pool import EnginePool
from service.metrics import Metrics
from service.middleware import RequestMiddleware
from service.routes import chat, completions, embeddings
from service.settings import Settings
from service.supervisor_client import SupervisorClient
from service.tokenizers import TokenizerCache

WATCH_SECONDS = 0.5
MAX_ERRORS = 100
"""Of an input file, that are named."""
MAX_WAIT_SECONDS = 5.0
"""Between two tries at an engine that is away."""
AWAY = frozenset(
    {
        "draining",
        "engine_dead",
        "model_loading",
        "model_not_loaded",
        "model_sleeping",
        "out_of_memory",
        "server_overloaded",
        "supervisor_unavailable",
    }
)
"""Codes of answers that say nothing of the request."""
EXPIRED = {
    "code": "batch_expired",
    "message": "This request could not be executed before the completion window expired.",
}


def run(context: RunnerContext) -> JsonObject:
    """Run one attempt; returns the job's result.

    Raises:
        JobFailedError: the input file is gone or wrong, or the owner's files hold too much.
        JobCancelledError: its answers so far are in its files.
    """
    return asyncio.run(_Batch(context).run())


class _Behind(ForwardingEngine):
    """An engine whose requests of this client come after those that somebody waits for."""

    async def generate(self, request: GenerateRequest) -> TokenStream:
        return await super().generate(replace(request, priority=PRIORITIES["bulk"]))


class _Pool(EnginePool):
    async def get(self, model_id: str, *, load: bool = True) -> AsyncEngine:
        return _Behind(await super().get(model_id, load=load))


def build_routes(settings: Settings, owner: str, used: UsageStore) -> FastAPI:
    """The OpenAI routes for one tenant, who needs no key here: the job was accepted with it."""
    registry = ModelRegistry(settings.models_dir)
    app = FastAPI()
    absent: Any = None
    app.state.lathe = AppState(
        settings=settings,
        registry=registry,
        engines=_Pool(settings, registry, SupervisorClient(settings.supervisor_socket), used.used),
        jobs=absent,
        files=FileStore(settings.files_dir),
        keys=KeyStore(settings.keys_file),
        metrics=Metrics(),
        tokenizers=TokenizerCache(),
        graphs=GraphStore(settings.graphs_dir),
        cache=absent,
        enricher=absent,
        text_vectors=absent,
        usage=used,
    )
    for router in (chat.router, completions.router, embeddings.router):
        app.include_router(router)
    identity = Identity(key_id=owner, roles=frozenset({"inference"}))
    app.dependency_overrides[identify] = lambda: identity
    handle_errors(app)
    app.add_middleware(RequestMiddleware, settings=settings)
    return app


class _Batch:
    """One attempt. Belongs to the event loop that runs it."""

    def __init__(self, context: RunnerContext) -> None:
        self._context = context
        self._endpoint: str = context.spec["endpoint"]
        self._expires_at: float = context.spec["expires_at"]
        self._settings = Settings(home=context.home)
        self._files = FileStore(self._settings.files_dir)
        self._state = BatchState()
        self._ledger = BatchLedger(context.folder / "ledger.jsonl")
        self._used = UsageStore(self._settings.usage_database)
        self._told: str | None = None

    async def run(self) -> JsonObject:
        try:
            await asyncio.to_thread(self._prepare)
            expired = await self._answer_all()
            self._context.check_cancelled()
            await asyncio.to_thread(self._finish, expired=expired)
            return {
                "expired": expired,
                "output_file_id": self._state.output_file_id,
                "error_file_id": self._state.error_file_id,
                "total": self._state.total,
                "completed": self._state.completed,
                "failed": self._state.failed,
            }
        except JobCancelledError:
            if self._state.in_progress_at is not None:
                self._finish(expired=False)
            raise
        finally:
            self._ledger.close()
            self._used.close()

    def _prepare(self) -> None:
        """Forget what earlier attempts made of the ledger, and check the input file."""
        for attempt in range(1, self._context.attempt + 1):
            for kind in ("output", "error"):
                with suppress(UploadNotFoundError):
                    self._files.delete(self._file_id(kind, attempt), None, lambda: {})
        self._state.save(self._context.folder)
        try:
            _, self._input = self._files.open_for_job(self._context.spec["input_file_id"])
        except UploadNotFoundError as error:
            raise JobFailedError("file_not_found", str(error)) from None
        self._state.errors = self._wrong_lines()
        if self._state.errors:
            self._state.save(self._context.folder)
            first = self._state.errors[0]
            raise JobFailedError(first["code"], f"line {first['line']}: {first['message']}")
        self._state.in_progress_at = time.time()
        self._count()

    def _wrong_lines(self) -> list[JsonObject]:
        """What keeps the batch from beginning, and sets how many requests there are."""
        errors: list[JsonObject] = []

        def wrong(line: int | None, code: str, message: str, param: str | None) -> None:
            errors.append({"code": code, "line": line, "message": message, "param": param})

        try:
            for line, row in read_batch(self._input):
                self._state.total += 1
                if self._state.total > MAX_REQUESTS:
                    message = f"a batch has at most {MAX_REQUESTS} requests"
                    wrong(line, "too_many_requests", message, None)
                    break
                if row["url"] != self._endpoint:
                    message = (
                        f"url is {row['url'][:100]!r}, the batch's endpoint {self._endpoint!r}"
                    )
                    wrong(line, "mismatched_url", message, "url")
                elif row["body"].get("stream"):
                    wrong(line, "unsupported_parameter", "a batch cannot stream", "body.stream")
                if len(errors) == MAX_ERRORS:
                    break
        except FileContentError as error:
            message = str(error).removeprefix(f"line {error.line}: ")
            wrong(error.line, "invalid_file", message, None)
        return errors

    async def _answer_all(self) -> bool:
        """Every request that has no answer yet. Returns whether time ran out; also ends early where cancelled."""
        if len_before := self._ledger.num_succeeded + self._ledger.num_failed:
            self._context.event(f"going on behind {len_before} answered requests")
        app = build_routes(self._settings, self._context.owner, self._used)
        rows = read_batch(self._input)
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app, raise_app_exceptions=False),
            base_url="http://localhost",
            timeout=None,
        ) as client:
            work = [
                asyncio.create_task(self._answer_some(client, rows))
                for _ in range(self._settings.max_num_seqs)
            ]
            try:
                while not all(task.done() for task in work):
                    await asyncio.wait(work, timeout=WATCH_SECONDS)
                    self._count()
                    await asyncio.to_thread(self._ledger.sync)
                    if self._context.cancelled():
                        return False
                    self._context.progress(
                        self._state.completed + self._state.failed, self._state.total
                    )
                    if time.time() >= self._expires_at:
                        return not all(task.done() for task in work)
                for task in work:
                    task.result()
                return False
            finally:
                for task in work:
                    task.cancel()
                await asyncio.gather(*work, return_exceptions=True)
                await app.state.lathe.engines.aclose()

    async def _answer_some(
        self, client: httpx.AsyncClient, rows: Iterator[tuple[int, JsonObject]]
    ) -> None:
        """Requests from what is left, one after the other; several of these share it."""
        for line, row in rows:
            if line in self._ledger:
                continue
            response = await self._ask(client, row["body"])
            record = {
                "id": f"batch_req_{secrets.token_hex(12)}",
                "custom_id": row["custom_id"],
                "response": {
                    "status_code": response.status_code,
                    "request_id": response.headers["x-request-id"],
                    "body": response.json(),
                },
                "error": None,
            }
            self._ledger.add(line, record, succeeded=response.status_code == 200)

    async def _ask(self, client: httpx.AsyncClient, body: JsonObject) -> httpx.Response:
        wait_seconds = 1.0
        while True:
            response = await client.post(self._endpoint, json=body)
            if response.status_code == 200:
                return response
            error = response.json()["error"]
            if error["code"] not in AWAY:
                return response
            if self._told != error["message"]:
                self._told = error["message"]
                self._context.event(f"waiting: {self._told}", level="warn")
            await asyncio.sleep(wait_seconds)
            wait_seconds = min(2 * wait_seconds, MAX_WAIT_SECONDS)

    def _count(self) -> None:
        self._state.completed = self._ledger.num_succeeded
        self._state.failed = self._ledger.num_failed
        self._state.save(self._context.folder)
        self._used.flush()

    def _finish(self, *, expired: bool) -> None:
        """Turn the ledger into the batch's files."""
        self._state.finalizing_at = time.time()
        self._count()
        self._state.output_file_id = self._write("output", self._ledger.records(succeeded=True))
        errors = self._ledger.records(succeeded=False)
        if expired:
            errors = self._with_expired(errors)
        self._state.error_file_id = self._write("error", errors)
        self._state.save(self._context.folder)

    def _with_expired(self, errors: Iterator[bytes]) -> Iterator[bytes]:
        yield from errors
        for line, row in read_batch(self._input):
            if line not in self._ledger:
                self._state.failed += 1
                record = {
                    "id": f"batch_req_{secrets.token_hex(12)}",
                    "custom_id": row["custom_id"],
                    "response": None,
                    "error": EXPIRED,
                }
                yield json.dumps(record).encode() + b"\n"

    def _write(self, kind: str, lines: Iterator[bytes]) -> str | None:
        """Store a file for the batch's owner; None where it would be empty."""
        context = self._context
        file_id = self._file_id(kind, context.attempt)
        with self._files.begin() as upload:
            for line in lines:
                upload.write(line)
            if not upload.num_bytes:
                return None
            self._files.add(  # whatever the owner's quota: the answers are there
                upload,
                file_id=file_id,
                owner=context.owner,
                filename=f"{context.job_id}_{kind}.jsonl",
                purpose="batch_output",
                request_hash=upload.finish(),
                lifetime_seconds=context.spec.get("output_seconds"),
            )
        return file_id

    def _file_id(self, kind: str, attempt: int) -> str:
        """Of an attempt: one that is cancelled in the middle makes files too, and the job may yet be run again."""
        name = f"{self._context.job_id} {attempt} {kind}"
        return f"file-{hashlib.sha256(name.encode()).hexdigest()[:24]}"
