"""One HTTP/1.1 client on a TCP socket: hypercorn's protocol over our own reading and writing.

All that depends on hypercorn's version lives here. What is ours: bytes go to the kernel without a
task switch, also from the engine's fan-out (`push`); a client that stops reading is cut; idle
connections are closed; the end of a response survives the cancellation that it causes; an
exception ends its connection and nothing else. No HTTP/2: it would buffer without limit.
"""

from __future__ import annotations

import logging
import os
import socket
from contextlib import suppress
from dataclasses import dataclass, field, replace
from math import inf
from typing import NoReturn
from urllib.parse import urlsplit

import h11
import trio
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.protocol.events import Event as StreamEvent
from hypercorn.protocol.events import Request, Response
from hypercorn.protocol.h11 import STREAM_ID, H11Protocol
from hypercorn.protocol.http_stream import HTTPStream
from hypercorn.trio.task_group import TaskGroup
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import AppWrapper, ConnectionState
from hypercorn.utils import parse_socket_addr

logger = logging.getLogger(__name__)

SCOPE_KEY = "kttrio.connection"
"""Where the app finds its `Connection` in the state of an ASGI scope."""

TARGETS = (b"/", b"*", b"http://", b"https://")
MAX_RECV = 1 << 16
MAX_UNSENT = 8 << 20
"""Bytes that may wait for a slow client beside the longest push: one answer may be longer."""
DRAIN_WRITE_TIMEOUT = 1.0
LINGER_SECONDS = 2.0


class RefusedError(Exception):
    """The client speaks another protocol, or nonsense; it has been told."""


class ResponseStream(HTTPStream):
    """One request and its response."""

    async def _send_closed(self) -> None:
        # Ending the response tells the app that its client is gone; quart-trio then cancels the
        # very task that is here, before the connection is recycled or closed.
        with trio.CancelScope(shield=True):
            await super()._send_closed()


class Http1(H11Protocol):
    """hypercorn's HTTP/1.1, which neither upgrades nor leaves half a body on a kept connection."""

    async def stream_send(self, event: StreamEvent) -> None:
        if isinstance(event, Response) and self.connection.their_state is h11.SEND_BODY:
            # What is left of the body would be read as the next request: announce the close.
            event = replace(event, headers=[*event.headers, (b"connection", b"close")])
        await super().stream_send(event)

    async def _check_protocol(self, event: h11.Request) -> None:
        """Let an offer of h2c or a websocket pass unanswered: the answer is in HTTP/1.1."""
        if event.http_version not in {b"1.0", b"1.1"}:
            await self._refuse(505)
        if not event.target.startswith(TARGETS) or not _splits(event.target):
            await self._refuse(400)

    async def _refuse(self, status: int) -> NoReturn:
        await self._send_error_response(status)
        raise RefusedError

    async def _create_stream(self, request: h11.Request) -> None:
        self.stream = ResponseStream(
            self.app,
            self.config,
            self.context,
            self.task_group,
            self.ssl,
            self.client,
            self.server,
            self.stream_send,
            STREAM_ID,
        )
        await self.stream.handle(
            Request(
                stream_id=STREAM_ID,
                headers=list(request.headers),
                http_version=request.http_version.decode(),
                method=request.method.decode("ascii").upper(),
                raw_path=request.target,
                state=self.connection_state,
            )
        )
        self.keep_alive_requests += 1


def _splits(target: bytes) -> bool:
    """Whether quart can find the path in it: `http://[` has none."""
    try:
        urlsplit(target)
    except ValueError:
        return False
    return True


def protocol_config() -> Config:
    """hypercorn's settings for every connection."""
    config = Config()
    config.errorlog = logger
    config.include_server_header = False
    config.alpn_protocols = ["http/1.1"]
    return config


@dataclass(slots=True)
class Connections:
    """What the connections of one server share; `serving.py` opens and closes it."""

    app: AppWrapper
    idle_timeout: float
    write_timeout: float
    config: Config = field(default_factory=protocol_config)
    context: WorkerContext = field(default_factory=lambda: WorkerContext(None))
    open: set[Connection] = field(default_factory=set)

    @property
    def closing(self) -> bool:
        return self.context.terminated.is_set()

    async def begin_close(self) -> None:
        """From now on every connection ends with its current response; idle ones end now."""
        await self.context.terminated.set()
        for connection in self.open:
            connection.close_if_idle()

    async def handle(self, stream: trio.SocketStream) -> None:
        """Serve one client to its end; never raises but `trio.Cancelled`."""
        connection = Connection(self, stream)
        self.open.add(connection)
        try:
            await connection.run()
        except Exception:
            logger.exception("a connection failed and was closed")
        finally:
            self.open.discard(connection)
            connection.broken = True  # before its file descriptor is anyone else's
            await trio.aclose_forcefully(stream)


class Connection:
    """One client. `push` and `flush` are the only ways to its socket."""

    def __init__(self, pool: Connections, stream: trio.SocketStream) -> None:
        self.broken = False
        """Nothing is written any more."""
        self._pool = pool
        self._stream = stream
        self._socket = stream.socket
        self._fd = stream.socket.fileno()
        self._unsent = bytearray()
        self._longest = 0
        self._flushing = trio.Lock()
        self._reading = trio.CancelScope()
        self._idle = True
        self._protocol: Http1

    # Writing

    @property
    def unsent(self) -> int:
        """Bytes that wait for `flush`."""
        return len(self._unsent)

    def push(self, data: bytes) -> bool:
        """Hand `data` to the kernel now; False when some of it waits for `flush`.

        Runs in the event loop's thread, never blocks, never raises.
        """
        if self.broken:
            return True
        if self._unsent:
            self._keep(data)
            return False
        try:
            sent = os.write(self._fd, data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.cut()
            return True
        if sent == len(data):
            return True
        self._keep(data[sent:])
        return False

    def _keep(self, data: bytes) -> None:
        self._longest = max(self._longest, len(data))
        self._unsent += data
        if len(self._unsent) > self._longest + MAX_UNSENT:
            logger.warning("a client leaves %d bytes unread and is cut", len(self._unsent))
            self.cut()

    async def flush(self) -> None:
        """Write what is left. A client that takes nothing for the write timeout is cut."""
        async with self._flushing:
            while self._unsent:
                limit = DRAIN_WRITE_TIMEOUT if self._pool.closing else self._pool.write_timeout
                with trio.move_on_after(limit) as deadline:
                    await self._send_some()
                if deadline.cancelled_caught:
                    logger.warning("a client has read nothing for %g s and is cut", limit)
                    self.cut()

    async def _send_some(self) -> None:
        try:
            sent = await self._socket.send(self._unsent)
        except OSError:
            self.cut()
        else:
            del self._unsent[:sent]

    def cut(self) -> None:
        """Give the client up: nothing more is written, and a running request learns of it."""
        self.broken = True
        self._unsent.clear()
        self._reading.cancel()
        # Linger 0: what the kernel still holds for this client is dropped, too.
        with suppress(OSError):
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    # Reading

    async def run(self) -> None:
        """Read requests and have them answered until either side closes."""
        try:
            client = parse_socket_addr(self._socket.family, self._socket.getpeername())
            server = parse_socket_addr(self._socket.family, self._socket.getsockname())
        except OSError:
            return  # gone before it was greeted
        async with TaskGroup() as requests:
            self._protocol = Http1(
                self._pool.app,
                self._pool.config,
                self._pool.context,
                requests,
                ConnectionState({SCOPE_KEY: self}),
                False,
                client,
                server,
                self._on_event,
            )
            self._set_idle(True)
            with suppress(RefusedError, trio.BrokenResourceError), self._reading:
                while data := await self._stream.receive_some(MAX_RECV):
                    await self._protocol.handle(RawData(bytes(data)))
            await self._protocol.handle(Closed())  # a request that still runs is cancelled
        await self._linger()

    async def _on_event(self, event: Event) -> None:
        if isinstance(event, RawData):
            if not self.push(event.data):
                await self.flush()
        elif isinstance(event, Updated):
            self._set_idle(event.idle)
        elif isinstance(event, Closed):
            self._reading.cancel()

    def _set_idle(self, idle: bool) -> None:
        self._idle = idle
        idle_end = trio.current_time() + self._pool.idle_timeout
        self._reading.deadline = idle_end if idle else inf

    def close_if_idle(self) -> None:
        """End the connection unless a request is running."""
        if self._idle:
            self._reading.cancel()

    async def _linger(self) -> None:
        """Swallow the rest of a refused body: closing on unread bytes would reset the
        connection, and the client might never see why it was refused."""
        if self.broken or self._protocol.connection.their_state not in {h11.SEND_BODY, h11.ERROR}:
            return
        with suppress(OSError, trio.BrokenResourceError), trio.move_on_after(LINGER_SECONDS):
            self._socket.shutdown(socket.SHUT_WR)
            while await self._stream.receive_some(MAX_RECV):
                pass
