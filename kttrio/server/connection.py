"""One client's socket: bytes in and bytes out, in clear or sealed, and the client's limits.

Bytes go to the kernel without a task switch, also from the engine's fan-out (`push`). A client
that stops reading is cut, and one too many is refused; an exception ends its connection and
nothing else. What the bytes say is known in http1.py and http2.py.
"""

from __future__ import annotations

import logging
import os
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from math import inf
from typing import Protocol

import trio

from kttrio.config import ServerConfig
from kttrio.server.failures import log_failure
from kttrio.server.meter import Meter
from kttrio.server.tls import Seal

logger = logging.getLogger(__name__)

SCOPE_KEY = "kttrio.connection"
"""Where the app finds its `Connection` in the state of an ASGI scope."""

MAX_RECV = 1 << 16
MAX_UNSENT = 8 << 20
"""Bytes that may wait for a slow client beside the longest push: one answer may be longer."""
DRAIN_WRITE_TIMEOUT = 1.0
LINGER_SECONDS = 2.0


class Speaker(Protocol):
    """Who serves the connections of one port, in its protocol."""

    tls: ssl.SSLContext | None
    """None: in clear."""

    @property
    def refusal(self) -> bytes:
        """What a client that is one too many is told, where the port speaks in clear."""
        ...

    async def serve(self, connection: Connection) -> None:
        """Serve one client until either side closes."""
        ...

    async def begin_close(self) -> None:
        """The server ends: take no new request."""
        ...


@dataclass(slots=True)
class Connections:
    """What the connections of one server share, over all its ports."""

    config: ServerConfig
    meter: Meter
    closing: bool = False
    open: set[Connection] = field(default_factory=set)

    def begin_close(self) -> None:
        """From now on every connection ends with what runs on it; idle ones end now."""
        self.closing = True
        for connection in list(self.open):
            connection.on_closing()

    async def handle(self, speaker: Speaker, stream: trio.SocketStream) -> None:
        """Serve one client to its end; never raises but `trio.Cancelled`."""
        connection = Connection(self, stream, speaker.tls)
        try:
            if len(self.open) >= self.config.max_connections:
                self.meter.refused_connections += 1
                await connection.refuse(speaker.refusal)
                return
            self.open.add(connection)
            self.meter.connections = len(self.open)
            await connection.serve(speaker)
        except Exception as error:
            log_failure(logger, "a connection failed and was closed", error)
        finally:
            self.open.discard(connection)
            self.meter.connections = len(self.open)
            connection.broken = True  # before its file descriptor is anyone else's
            await trio.aclose_forcefully(stream)


class Connection:
    """One client. `push` and `flush` are the only ways to its socket."""

    def __init__(
        self, pool: Connections, stream: trio.SocketStream, tls: ssl.SSLContext | None
    ) -> None:
        self.pool = pool
        self.broken = False
        """Nothing is written any more."""
        self.reading = trio.CancelScope()
        """Ends when nothing more is to be read: `receive` belongs in it."""
        self.on_closing: Callable[[], None] = self.stop_reading
        """What the server's shutdown means here."""
        self._stream = stream
        self._socket = stream.socket
        self._fd = stream.socket.fileno()
        _find_out_who_vanishes(self._socket)
        self._seal = Seal(tls) if tls is not None else None
        self._unsent = bytearray()
        self._longest = 0
        self._has_left = False
        self._flushing = trio.Lock()

    @property
    def sealed(self) -> bool:
        """Whether it runs over TLS."""
        return self._seal is not None

    @property
    def ends(self) -> tuple[tuple[str, int], tuple[str, int]]:
        """The addresses of the client and of the server. OSError when the client is gone."""
        client, server = self._socket.getpeername(), self._socket.getsockname()
        return (client[0], client[1]), (server[0], server[1])

    async def serve(self, speaker: Speaker) -> None:
        """The whole life of a connection."""
        try:
            await self._greet()
            await speaker.serve(self)
            await self._take_leave()
        except (OSError, trio.BrokenResourceError, trio.TooSlowError) as error:
            logger.debug("a client is gone or never arrived: %s", error)

    async def refuse(self, message: bytes) -> None:
        """Tell a client that is one too many, as far as it can be told."""
        if not self.sealed and message:
            self.push(message)
            await self.linger()

    # Writing

    @property
    def unsent(self) -> int:
        """Bytes that wait for `flush`."""
        return len(self._unsent)

    def push(self, data: bytes) -> bool:
        """Hand `data` to the kernel now; False when some of it waits for `flush`.

        Runs in the event loop's thread, never blocks, never raises.
        """
        if self._seal is not None and not self.broken:
            data = self._seal.close_in(data)
        return self._write(data)

    def _write(self, data: bytes) -> bool:
        if self.broken or not data:
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
                limit = self.write_timeout
                with trio.move_on_after(limit) as deadline:
                    await self._send_some()
                if deadline.cancelled_caught:
                    logger.warning("a client has read nothing for %g s and is cut", limit)
                    self.cut()

    @property
    def write_timeout(self) -> float:
        """Seconds after which a client that reads nothing is cut."""
        closing = self.pool.closing
        return DRAIN_WRITE_TIMEOUT if closing else self.pool.config.stream_write_timeout

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
        self.stop_reading()
        # Linger 0: what the kernel still holds for this client is dropped, too.
        with suppress(OSError):
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    # Reading

    async def receive(self) -> bytes:
        """What has arrived, or b"" at the end. BrokenResourceError when it broke."""
        if self._seal is None:
            return bytes(await self._stream.receive_some(MAX_RECV))
        data = self._open(self._seal, b"")  # may have come with the end of the greeting
        while not (data or self._seal.ended):
            if not (sealed := await self._stream.receive_some(MAX_RECV)):
                return b""
            data = self._open(self._seal, sealed)
        return data

    def _open(self, seal: Seal, sealed: bytes) -> bytes:
        try:
            return seal.take_out(sealed)
        except ssl.SSLError as error:
            raise trio.BrokenResourceError("what came is not what was sealed") from error
        finally:
            self._write_pending()

    def stop_reading(self) -> None:
        """End the connection; what runs on it is cancelled."""
        self.reading.cancel()

    def stop_reading_in(self, seconds: float) -> None:
        """End the connection unless it is told otherwise until then; `inf`: not at all."""
        self.reading.deadline = trio.current_time() + seconds if seconds < inf else inf

    # Beginning and end

    async def _greet(self) -> None:
        """Shake hands over TLS, in the time that the head of a request may take."""
        if self._seal is None:
            return
        with trio.fail_after(self.pool.config.header_timeout), self.reading:
            data = b""
            while not self._shakes(data):
                if not (data := await self._stream.receive_some(MAX_RECV)):
                    raise trio.BrokenResourceError("the client left during the TLS handshake")
        if self.reading.cancelled_caught:
            raise trio.BrokenResourceError("the server ends")
        self.reading = trio.CancelScope()

    def _shakes(self, data: bytes) -> bool:
        assert self._seal is not None
        try:
            return self._seal.shake_hands(data)
        finally:
            self._write_pending()  # also why it failed

    def _write_pending(self) -> None:
        if self._seal is not None and (pending := self._seal.pending()):
            self._write(pending)

    async def _take_leave(self) -> None:
        """Write what is left; over TLS the client is told that this is all."""
        if self._seal is not None and not self._has_left:
            self._write(self._seal.last_words())
        self._has_left = True
        await self.flush()

    async def linger(self) -> None:
        """Swallow what is still under way: closing on unread bytes would reset the connection,
        and the client might never see why it was refused."""
        if self.broken:
            return
        await self._take_leave()
        limit = min(LINGER_SECONDS, self.write_timeout)
        with suppress(OSError, trio.BrokenResourceError), trio.move_on_after(limit):
            self._socket.shutdown(socket.SHUT_WR)
            while await self._stream.receive_some(MAX_RECV):
                pass


def _find_out_who_vanishes(sock: trio.socket.SocketType) -> None:
    """Have the kernel ask a silent client after a minute whether it is there: one whose network
    failed says no goodbye, and a stream of requests that is open may be silent for long."""
    with suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4)):
            if (option := getattr(socket, name, None)) is not None:
                sock.setsockopt(socket.IPPROTO_TCP, option, value)
