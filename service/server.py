"""The HTTP server: uvicorn, and what it lacks. It drains before it closes its port, and gives up on clients that send
no request or read no answer."""

import asyncio
import resource
import select
import socket
import time
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.drain import POLL_SECONDS, draining

if TYPE_CHECKING:
    from service.deps import AppState

HEADER_SECONDS = 20.0
"""How long a request's head may take."""
LAST_WORDS_SECONDS = 1.0
"""What requests get to say that they are stopped, twice, and idle clients to be told."""


class Config(uvicorn.Config):
    """uvicorn's, with the seconds after which a connection that does not move is given up."""

    silence_seconds: float = 600.0


class Server(uvicorn.Server):
    """Serves until SIGTERM or SIGINT; then new requests get 503, and those that run have `drain_seconds`, or until a
    second signal."""

    def __init__(self, config: Config, state: "AppState") -> None:
        super().__init__(config)
        self._state = state

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._state.drain.is_hurried = self.should_exit
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        state, drain = self._state, self._state.drain
        drain.begin()
        state.feeds.close(draining())
        await drain.wait(state.settings.drain_seconds)
        await state.engines.drain()
        await drain.wait(LAST_WORDS_SECONDS)
        drain.end()
        await drain.wait(LAST_WORDS_SECONDS)
        await self._let_clients_go()
        await super().shutdown(sockets)

    async def _let_clients_go(self) -> None:
        """Clients that go on asking are told to leave by their next answer. Then idle connections are closed, but for
        those on which a request has just arrived: closed unread, it would be cut."""
        ends_at = time.monotonic() + LAST_WORDS_SECONDS
        while self.server_state.connections and time.monotonic() < ends_at:  # noqa: ASYNC110 -- uvicorn's set
            await asyncio.sleep(POLL_SECONDS)
        for server in self.servers:
            server.close()
        ends_at = time.monotonic() + LAST_WORDS_SECONDS
        while self.server_state.connections and time.monotonic() < ends_at:
            for connection in list(self.server_state.connections):
                if isinstance(connection, Protocol) and connection.is_idle:
                    connection.transport.close()
            await asyncio.sleep(POLL_SECONDS)


class Protocol(HttpToolsProtocol):
    """A connection that ends when its client neither sends a whole head nor takes what was written to it."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        assert isinstance(self.config, Config)
        self._made_at = self.loop.time()
        self._silence_seconds = self.config.silence_seconds
        self._head_timer = self._give_up_after(min(HEADER_SECONDS, self._silence_seconds))
        self._stall_timer: asyncio.TimerHandle | None = None

    @property
    def is_idle(self) -> bool:
        """Whether no request is under way, waits to be read, or is about to come from a client that just connected."""
        if self.cycle is None and self.loop.time() - self._made_at < LAST_WORDS_SECONDS:
            return False
        if self.cycle is not None and not self.cycle.response_complete:
            return False
        poll = select.poll()
        poll.register(self.transport.get_extra_info("socket").fileno(), select.POLLIN)
        return not poll.poll(0)

    def _give_up_after(self, seconds: float) -> asyncio.TimerHandle:
        return self.loop.call_later(seconds, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_timer.cancel()
        self.resume_writing()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_timer.cancel()
        self._head_timer = self._give_up_after(min(HEADER_SECONDS, self._silence_seconds))

    def on_headers_complete(self) -> None:
        self._head_timer.cancel()
        super().on_headers_complete()

    def pause_writing(self) -> None:
        self._stall_timer = self._give_up_after(self._silence_seconds)
        super().pause_writing()

    def resume_writing(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None
        super().resume_writing()


def raise_file_limit() -> None:
    """A connection is a file: take as many as the system lets us have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
