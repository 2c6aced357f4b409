"""What happens to every request before a route sees it: id, host, key and size checks, access log, the last safety net.

Pure ASGI. JSON bodies are read here, up to the limit, so that an oversized or mislabelled one is refused before
anything parses it; uploads (multipart) are counted as they stream.
"""

import asyncio
import contextlib
import json
import logging
import re
import secrets
import time
from collections.abc import Coroutine, MutableMapping
from dataclasses import replace
from typing import Any, TypeVar

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engines.origin import caused_by, current_origin, parse_traceparent
from engines.tracing import Span, span
from service.auth import KeyStore, authenticate, is_loopback
from service.drain import Drain
from service.errors import ApiError
from service.metrics import Metrics
from service.settings import Settings

T = TypeVar("T")
logger = logging.getLogger("lathe.http")
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}\Z")
_DISCARD_SECONDS = 1.0
_PROBES = frozenset({"/health", "/metrics", "/version"})
"""Answered while draining as well, and ahead of whoever waits to begin."""
_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]", "::1", "testserver"})


class RequestMiddleware:
    """The outermost layer; everything inside it runs with a request id.

    Args:
        keys: nobody else's body is read; who may do what is the routes' to say.
        drain: whom it still admits.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: Settings,
        keys: KeyStore | None = None,
        metrics: Metrics | None = None,
        drain: Drain | None = None,
    ) -> None:
        self._app = app
        self._settings = settings
        self._keys = keys
        self._metrics = metrics
        self._drain = drain or Drain()
        self._turnstile = _Turnstile()
        self._allowed_hosts = frozenset(name.lower() for name in settings.allowed_hosts)
        self._hosts = _LOOPBACK_NAMES | {settings.host.lower()} | self._allowed_hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = _headers(scope)
        given = headers.get(b"x-request-id", b"")
        request_id = given.decode() if _REQUEST_ID.match(given) else f"req-{secrets.token_hex(12)}"
        caller = current_origin()  # of a job that asks our routes itself
        given_trace = parse_traceparent(headers.get(b"traceparent", b"").decode("latin-1"))
        traceparent = given_trace or caller.traceparent
        exchange = _Exchange(scope, send, request_id, self._drain)
        body = _Body(receive)
        with (
            caused_by(replace(caller, request_id=request_id, traceparent=traceparent)),
            span(scope["method"], serves=True) as traced,
        ):
            try:
                if scope["path"] in _PROBES:
                    await self._handle(scope, body.receive, exchange, headers)
                else:
                    await self._turnstile.enter()
                    async with self._drain.admitted():
                        await self._handle(scope, body.receive, exchange, headers)
            except ApiError as error:
                if self._drain.has_begun:
                    await body.discard()
                await exchange.fail(error)
            except Exception:
                logger.exception("unhandled error")
                await exchange.fail(
                    ApiError("internal_error", f"internal error; request id {request_id}")
                )
            finally:
                exchange.log(traced, self._metrics)

    async def _handle(
        self, scope: Scope, receive: Receive, exchange: "_Exchange", headers: dict[bytes, bytes]
    ) -> None:
        self._check_host(scope, headers)
        if scope["method"] not in ("GET", "HEAD", "OPTIONS") and self._keys is not None:
            authenticate(self._keys, scope["headers"])
        content_type = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        is_upload = content_type == b"multipart/form-data"
        limit = self._settings.max_upload_bytes if is_upload else self._settings.max_body_bytes
        declared = headers.get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > limit:
            raise ApiError("request_too_large", f"a body here has at most {limit} bytes")
        if is_upload:
            receive = _counted(receive, limit)
        elif scope["method"] in ("POST", "PUT", "PATCH", "DELETE"):
            try:
                async with asyncio.timeout(self._settings.request_timeout_seconds):
                    body = await _read_body(receive, limit)
            except TimeoutError:
                raise ApiError("request_timeout", "the body took too long to arrive") from None
            if body and content_type != b"application/json":
                raise ApiError("unsupported_media_type", "the body must be application/json")
            receive = _replay(body, receive)
        await self._app(scope, receive, exchange.send)

    def _check_host(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        """Against pages in a browser on this machine: none may reach a loopback server by another name (DNS rebinding),
        nor from another origin (a browser sends a form, or a POST without a body, without asking first).

        A server on a public address is reached by names that it cannot know, so there, where every request needs a key,
        only an explicit `allowed_hosts` limits them.
        """
        if not is_loopback(self._settings.host) and not self._settings.allowed_hosts:
            return
        if sum(name == b"host" for name, _ in scope["headers"]) > 1:
            raise ApiError("host_not_allowed", "a request has one Host")
        host = headers.get(b"host")
        if host is not None and _host_name(host) not in self._hosts:
            raise ApiError(
                "host_not_allowed", "this Host is not served here (see LATHE_ALLOWED_HOSTS)"
            )
        origin = headers.get(b"origin")
        if origin is None:
            return
        source = origin.partition(b"://")[2].lower()
        if source != (host or b"").lower() and _host_name(source) not in self._allowed_hosts:
            raise ApiError(
                "origin_not_allowed",
                "pages of this origin are not served (see LATHE_ALLOWED_HOSTS)",
            )


class _Exchange:
    """One request's answer: adds the id header, remembers status and time; while draining, the connection's last."""

    def __init__(self, scope: Scope, send: Send, request_id: str, drain: Drain) -> None:
        self._drain = drain
        self._scope = scope
        self._send = send
        self._request_id = request_id
        self._start = time.monotonic()
        self._status: int | None = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            state = self._scope.get("state", {})
            extra = {"x-request-id": self._request_id, **state.get("headers", {})}
            if self._drain.has_begun:
                extra["connection"] = "close"
            message["headers"] = [
                *message.get("headers", []),
                *((name.encode(), value.encode()) for name, value in extra.items()),
            ]
        await self._send(message)

    async def fail(self, error: ApiError) -> None:
        """Answer with an error; if the answer has begun, the connection can only end."""
        if self._status is not None:
            logger.error("the answer had begun: %s", error.code)
            raise error
        body = json.dumps(error.body(), ensure_ascii=False).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        headers += [(k.lower().encode(), v.encode()) for k, v in error.headers().items()]
        start = {"type": "http.response.start", "status": error.status, "headers": headers}
        await self.send(start)
        await self._send({"type": "http.response.body", "body": body})

    def log(self, traced: Span, metrics: Metrics | None) -> None:
        """Say how it ended, in the log, in the request's span and in the metrics."""
        seconds = time.monotonic() - self._start
        route = getattr(self._scope.get("route"), "path", None)
        method = self._scope["method"]
        traced.rename(f"{method} {route}" if route else method)
        attributes = {"http.request.method": method, "lathe.request_id": self._request_id}
        if route is not None:
            attributes["http.route"] = route
        if self._status is not None:
            traced.describe({"http.response.status_code": self._status})
            if self._status >= 500:
                traced.fail(str(self._status))
            if metrics is not None:
                metrics.http_answered(method, route, self._status, seconds)
        traced.describe(attributes)
        state = self._scope.get("state", {})
        identity = state.get("identity") if isinstance(state, MutableMapping) else None
        logger.info(
            "request",
            extra={
                "method": method,
                "route": route,
                "status": self._status,
                "seconds": round(seconds, 4),
                "key_id": getattr(identity, "key_id", None),
            },
        )


class _Turnstile:
    """Lets one request begin in each turn of the event loop, in the order of their arrival: where hundreds come at
    once, whoever else has work there, /health among them, need not wait for all of them."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()

    async def enter(self) -> None:
        async with self._lock:
            await asyncio.sleep(0)


class _Body:
    """A request's body as it arrives."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._is_read = False

    async def receive(self) -> Message:
        message = await self._receive()
        self._is_read = not message.get("more_body", False)
        return message

    async def discard(self) -> None:
        """Take what is left of it: a connection that closes with data unread is reset, and its answer lost."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DISCARD_SECONDS):
                while not self._is_read:
                    await self.receive()


def _host_name(host: bytes) -> str:
    """Without the port, in lower case."""
    text = host.decode("latin-1").lower()
    return text if text.endswith("]") else text.rsplit(":", 1)[0]


def _headers(scope: Scope) -> dict[bytes, bytes]:
    headers: dict[bytes, bytes] = {}
    for name, value in scope["headers"]:
        headers.setdefault(name, value)
    return headers


async def _read_body(receive: Receive, limit: int) -> bytes:
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ApiError("invalid_json", "the client left before its body was complete")
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > limit:
            raise ApiError("request_too_large", f"a body here has at most {limit} bytes")
        chunks.append(chunk)
        if not message.get("more_body", False):
            return b"".join(chunks)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Hand the body on in one piece; later messages are the connection's own."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return replay


def _counted(receive: Receive, limit: int) -> Receive:
    size = 0

    async def counted() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > limit:
            raise ApiError("request_too_large", f"an upload has at most {limit} bytes")
        return message

    return counted


async def cancel_on_disconnect(request: Any, work: Coroutine[Any, Any, T]) -> T:
    """Await `work`, cancelling it when the client goes away; FastAPI does not do so by itself.

    Raises:
        ApiError: request_timeout, the client has gone (nobody reads the answer).
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ApiError("request_timeout", "the client closed the connection")
    finally:
        for pending in (task, watcher):
            if not pending.done():
                pending.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def answer_in_time(
    request: Any, work: Coroutine[Any, Any, T], seconds: float, what: str
) -> T:
    """As `cancel_on_disconnect`, and no longer than so many seconds. Args: what: is too slow, for the message.

    Raises:
        ApiError: request_timeout.
    """
    try:
        async with asyncio.timeout(seconds):
            return await cancel_on_disconnect(request, work)
    except TimeoutError:
        raise ApiError("request_timeout", f"{what} took too long") from None


async def _disconnected(request: Any) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
