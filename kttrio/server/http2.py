"""HTTP/2 over a connection: its streams, bounded in both directions, and a handler for each.

Of hypercorn only its engine, h2, is used: hypercorn's own HTTP/2 buffers without limit what a
client does not read, and one request that is slow to read its body stalls all others of its
connection. Here nothing waits while frames are taken in, so no stream waits for another. A stream
whose client reads nothing is reset, a connection with too much unread or too many frames that ask
for nothing is closed. What the streams say is not known here.
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from math import inf

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h2.settings
import trio

from kttrio.server import connection as connections
from kttrio.server.connection import Connection
from kttrio.server.failures import log_failure
from kttrio.server.http2_frames import FrameScan, Patience, RuleBroken, goodbye
from kttrio.server.http2_stream import Code, Headers, Stream
from kttrio.server.visits import address

logger = logging.getLogger(__name__)

ALPN = ["h2"]
MAX_STREAMS = 128
STREAM_WINDOW = 1 << 18
"""Bytes of a stream's body that may wait for its handler."""
BIG_REQUESTS = 4
"""Requests of the largest size that one connection may send at once; more small ones."""
MAX_HEADER_BYTES = 1 << 14

Handler = Callable[[Stream], Awaitable[None]]


@dataclass(slots=True)
class Http2Speaker:
    """Serves a handler over HTTP/2, with prior knowledge or by ALPN."""

    handler: Handler
    tls: ssl.SSLContext | None

    @property
    def refusal(self) -> bytes:
        """A server's preface and its farewell."""
        engine = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))
        engine.initiate_connection()
        engine.close_connection(Code.ENHANCE_YOUR_CALM)
        return engine.data_to_send()

    async def begin_close(self) -> None:
        """Each connection says so itself."""

    async def serve(self, connection: Connection) -> None:
        await Session(connection, self.handler).run()


class Session:
    """One client and its streams."""

    def __init__(self, connection: Connection, handler: Handler) -> None:
        self._connection = connection
        self._handler = handler
        self._engine = h2.connection.H2Connection(
            h2.config.H2Configuration(client_side=False, header_encoding=None)
        )
        self._streams: dict[int, Stream] = {}
        self._last = 0
        self._reserved = 0
        self._scan = FrameScan()
        self._patience = Patience()
        self._farewell = Code.NO_ERROR
        self._attention = trio.Event()
        self._client = ""
        self._tasks: trio.Nursery

    async def run(self) -> None:
        """Serve streams until either side closes, or the server ends and the last one is over."""
        connection = self._connection
        self._client = address(*connection.ends[0])
        connection.on_closing = self._begin_close
        connection.stop_reading_in(connection.pool.config.header_timeout)
        async with trio.open_nursery() as self._tasks:
            self._tasks.start_soon(self._write)
            self._greet()
            with suppress(trio.BrokenResourceError), connection.reading:
                while data := await connection.receive():
                    self._take(data)
            for stream in list(self._streams.values()):
                self._drop(stream)
            self._tasks.cancel_scope.cancel()
        connection.push(goodbye(self._last, self._farewell))
        await connection.linger()

    def _greet(self) -> None:
        """Say what is allowed. It binds the client, and h2, once the client has agreed."""
        codes = h2.settings.SettingCodes
        self._engine.initiate_connection()
        self._engine.update_settings(
            {
                codes.MAX_CONCURRENT_STREAMS: MAX_STREAMS,
                codes.MAX_HEADER_LIST_SIZE: MAX_HEADER_BYTES,
                codes.INITIAL_WINDOW_SIZE: STREAM_WINDOW,
            }
        )
        # The connection's window holds all streams' together: none takes another's.
        self._engine.increment_flow_control_window((MAX_STREAMS - 1) * STREAM_WINDOW)
        self._send()

    # Taking frames in: nothing waits here

    def _take(self, data: bytes) -> None:
        try:
            self._patience.bear(self._scan.count_idle(data))
            for event in self._engine.receive_data(data):
                self._on_event(event)
        except RuleBroken as error:
            self._dismiss(error.code, str(error))
        except h2.exceptions.ProtocolError as error:
            self._dismiss(error.error_code, str(error))
        self._send()
        self._pump_all()

    def _dismiss(self, code: Code, why: str) -> None:
        """Close the connection of a client that breaks the rules."""
        # Who floods may be a good client that is bounded too tightly; noise is not worth a line.
        level = logging.WARNING if code is Code.ENHANCE_YOUR_CALM else logging.DEBUG
        logger.log(level, "a client of HTTP/2 is let go: %s", why)
        self._farewell = code
        self._connection.stop_reading()

    def _on_event(self, event: h2.events.Event) -> None:
        match event:
            case h2.events.RequestReceived():
                self._open(event)
            case h2.events.DataReceived():
                self._take_data(event)
            case h2.events.StreamEnded():
                if stream := self._streams.get(event.stream_id or 0):
                    stream.take_end()
            case h2.events.StreamReset():
                self._drop(self._streams.get(event.stream_id or 0))
            case h2.events.ConnectionTerminated():
                self._connection.stop_reading()
            case h2.events.SettingsAcknowledged():
                self._set_idle()

    def _open(self, event: h2.events.RequestReceived) -> None:
        number = self._last = event.stream_id or 0
        if len(self._streams) >= MAX_STREAMS or self._connection.pool.closing:
            self._patience.bear(1)
            self._engine.reset_stream(number, Code.REFUSED_STREAM)
            return
        stream = self._streams[number] = Stream(self, number, _fields(event))
        self._connection.stop_reading_in(inf)
        self._tasks.start_soon(self._serve, stream)

    def _take_data(self, event: h2.events.DataReceived) -> None:
        num_bytes = event.flow_controlled_length or 0
        if stream := self._streams.get(event.stream_id or 0):
            stream.take(event.data or b"", num_bytes)
        else:
            self._acknowledge(event.stream_id or 0, num_bytes)

    # Streams

    async def _serve(self, stream: Stream) -> None:
        with stream.scope:
            try:
                await self._handler(stream)
                await stream.flush()
            except Exception as error:
                log_failure(logger, "a request over HTTP/2 failed", error)
        if stream.is_open:
            self.reset(stream, Code.INTERNAL_ERROR)
        elif not stream.complete:
            self.reset(stream, Code.NO_ERROR)  # its body is not needed any more
        self._drop(stream)

    def _drop(self, stream: Stream | None) -> None:
        if stream is None:
            return
        stream.lose()
        self._streams.pop(stream.number, None)
        self._set_idle()

    def _set_idle(self) -> None:
        if self._streams:
            return
        if self._connection.pool.closing:
            self._connection.stop_reading()
        else:
            self._connection.stop_reading_in(self._connection.pool.config.idle_timeout)

    def _begin_close(self) -> None:
        # Not by h2, which would then let no stream go on.
        self._connection.push(goodbye(self._last, Code.NO_ERROR))
        for stream in self._streams.values():
            stream.begin_close()
        self._set_idle()

    # What streams ask for

    @property
    def client(self) -> str:
        return self._client

    @property
    def write_timeout(self) -> float:
        return self._connection.write_timeout

    @property
    def closing(self) -> bool:
        return self._connection.pool.closing

    def reserve(self, num_bytes: int) -> bool:
        most = self._connection.pool.config.max_body_bytes * BIG_REQUESTS
        if num_bytes > 0 and self._reserved + num_bytes > most:
            return False
        self._reserved += num_bytes
        return True

    def acknowledge(self, stream: Stream, num_bytes: int) -> None:
        self._acknowledge(stream.number, num_bytes)
        self._send()

    def _acknowledge(self, number: int, num_bytes: int) -> None:
        if num_bytes:
            with suppress(h2.exceptions.ProtocolError):
                self._engine.acknowledge_received_data(num_bytes, number)

    def send_headers(self, stream: Stream, headers: Headers, *, end: bool) -> None:
        with suppress(h2.exceptions.ProtocolError):
            self._engine.send_headers(stream.number, headers, end_stream=end)
        if end:
            self._send()

    def reset(self, stream: Stream, code: Code) -> None:
        with suppress(h2.exceptions.ProtocolError):
            self._engine.reset_stream(stream.number, code)
        self._send()
        self._drop(stream)

    def pump(self, stream: Stream) -> None:
        while stream.unsent and not self._connection.unsent and (most := self._room(stream)):
            with suppress(h2.exceptions.ProtocolError):
                self._engine.send_data(stream.number, stream.send_frame(most))
            self._patience.earn(2)
            if stream.unsent:
                self._send()
        if (trailers := stream.take_trailers()) is not None:
            self.send_headers(stream, trailers, end=True)
        self._send()

    def weigh(self) -> None:
        unsent = [stream.unsent for stream in self._streams.values() if stream.unsent]
        if sum(unsent) > connections.MAX_UNSENT + max(unsent, default=0):
            logger.warning("a client leaves %d bytes of its streams unread", sum(unsent))
            self._connection.cut()

    def _room(self, stream: Stream) -> int:
        try:
            window = self._engine.local_flow_control_window(stream.number)
        except h2.exceptions.ProtocolError:
            return 0  # closed; the event is on its way
        return max(0, min(window, self._engine.max_outbound_frame_size))

    # Writing

    def _send(self) -> None:
        data = self._engine.data_to_send()
        if data and not self._connection.push(data):
            self._attention.set()

    async def _write(self) -> None:
        """Write what the kernel did not take at once; then the streams may go on."""
        while True:
            await self._attention.wait()
            self._attention = trio.Event()
            await self._connection.flush()
            self._pump_all()

    def _pump_all(self) -> None:
        for stream in list(self._streams.values()):
            if stream.unsent:
                self.pump(stream)


def _fields(event: h2.events.RequestReceived) -> Headers:
    return [(bytes(name), bytes(value)) for name, value in event.headers or ()]
