"""HTTP/1.1 over a connection: hypercorn's protocol, and the app behind it.

All that depends on hypercorn's version lives here. What is ours: idle connections and those whose
request does not arrive are closed; the end of a response survives the cancellation that it
causes. No HTTP/2: http2.py serves it on a port of its own.
"""

from __future__ import annotations

import logging
import ssl
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

from kttrio.server.wire.connection import SCOPE_KEY, Connection

logger = logging.getLogger(__name__)

ALPN = ["http/1.1"]
CLOSING_BODY_SECONDS = 1.0
TARGETS = (b"/", b"*", b"http://", b"https://")
FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\nretry-after: 1\r\n"
    b"content-type: text/plain\r\ncontent-length: 63\r\n\r\n"
    b"The server has as many connections as it takes; try again soon."
)


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

    @property
    def owes_head(self) -> bool:
        """A request has begun to arrive, and its head is not complete."""
        is_open = self.connection.their_state is h11.IDLE
        return is_open and bool(self.connection.trailing_data[0])

    @property
    def owes_body(self) -> bool:
        """The head of a request has arrived, and its body is not complete."""
        return self.connection.their_state is h11.SEND_BODY

    async def give_up(self) -> None:
        """The head did not arrive in time."""
        if self.connection.our_state is h11.IDLE:
            await self._send_error_response(408)

    async def stream_send(self, event: StreamEvent) -> None:
        if isinstance(event, Response) and self.owes_body:
            # What is left of the body would be read as the next request: announce the close.
            event = replace(event, headers=[*event.headers, (b"connection", b"close")])
        await super().stream_send(event)

    async def _check_protocol(self, event: h11.Request) -> None:
        """Let an offer of h2c or a websocket pass unanswered: the answer is in HTTP/1.1."""
        if event.http_version not in {b"1.0", b"1.1"}:
            await self._refuse(505)
        if not event.target.startswith(TARGETS) or not _splits(event.target):
            await self._refuse(400)
        if _has_two_ends(event):
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


def _has_two_ends(request: h11.Request) -> bool:
    """Whether a proxy before us may find the body's end elsewhere than we do, and so take what a
    client smuggles in behind it for another's request."""
    names = {name for name, _ in request.headers}
    if b"transfer-encoding" not in names:
        return False
    return b"content-length" in names or request.http_version == b"1.0"


def protocol_config() -> Config:
    """hypercorn's settings for every connection."""
    config = Config()
    config.errorlog = logger
    config.include_server_header = False
    return config


@dataclass(slots=True)
class Http1Speaker:
    """Serves the app over HTTP/1.1."""

    app: AppWrapper
    tls: ssl.SSLContext | None
    config: Config = field(default_factory=protocol_config)
    context: WorkerContext = field(default_factory=lambda: WorkerContext(None))

    @property
    def refusal(self) -> bytes:
        return FULL

    async def begin_close(self) -> None:
        await self.context.terminated.set()

    async def serve(self, connection: Connection) -> None:
        await Http1Client(self, connection).run()


class Http1Client:
    """One client, request by request."""

    def __init__(self, speaker: Http1Speaker, connection: Connection) -> None:
        self._speaker = speaker
        self._connection = connection
        self._limits = connection.pool.config
        self._idle = True
        self._owed_head = False
        self._protocol: Http1

    async def run(self) -> None:
        """Read requests and have them answered until either side closes."""
        connection = self._connection
        connection.on_closing = self._begin_close
        ends = connection.ends  # may raise, which inside a task group nobody would understand
        async with TaskGroup() as requests:
            self._protocol = self._open_protocol(requests, *ends)
            self._set_idle(True)
            with suppress(RefusedError, trio.BrokenResourceError), connection.reading:
                while data := await connection.receive():
                    await self._protocol.handle(RawData(data))
                    self._watch_request()
            if connection.reading.cancelled_caught and self._protocol.owes_head:
                await self._protocol.give_up()
            await self._protocol.handle(Closed())  # a request that still runs is cancelled
        if self._protocol.connection.their_state in {h11.SEND_BODY, h11.ERROR}:
            await connection.linger()

    def _open_protocol(
        self, requests: TaskGroup, client: tuple[str, int], server: tuple[str, int]
    ) -> Http1:
        return Http1(
            self._speaker.app,
            self._speaker.config,
            self._speaker.context,
            requests,
            ConnectionState({SCOPE_KEY: self._connection}),
            self._connection.sealed,
            client,
            server,
            self._on_event,
        )

    async def _on_event(self, event: Event) -> None:
        if isinstance(event, RawData):
            if not self._connection.push(event.data):
                await self._connection.flush()
        elif isinstance(event, Updated):
            self._set_idle(event.idle)
        elif isinstance(event, Closed):
            self._connection.stop_reading()

    def _set_idle(self, idle: bool) -> None:
        self._idle = idle
        self._connection.stop_reading_in(self._limits.idle_timeout if idle else inf)

    def _watch_request(self) -> None:
        """Bound the time that a head may still take, and while the server ends a body, too."""
        owes_head = self._protocol.owes_head
        if owes_head and not self._owed_head:
            self._connection.stop_reading_in(self._limits.header_timeout)
        elif self._connection.pool.closing and not self._idle:
            self._spare_only_whole()
        self._owed_head = owes_head

    def _begin_close(self) -> None:
        if self._idle:
            self._connection.stop_reading()
        else:
            self._spare_only_whole()

    def _spare_only_whole(self) -> None:
        """A request that is not all there would be refused anyway: it is not waited for."""
        owes = self._protocol.owes_body
        self._connection.stop_reading_in(CLOSING_BODY_SECONDS if owes else inf)
