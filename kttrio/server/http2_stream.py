"""One request of HTTP/2 and its answer, bounded both ways. What it says is not known here."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from typing import Protocol

import h2.errors
import trio

logger = logging.getLogger(__name__)

MAX_STREAM_UNSENT = 1 << 20
"""Bytes that may wait for a client to read one stream, beside the longest push."""

Headers = Sequence[tuple[bytes, bytes]]
Code = h2.errors.ErrorCodes


class ServerEnds(Exception):
    """The server ends, and waits for no more of a request."""


class Lines(Protocol):
    """What a stream asks of its connection. Nothing of it waits or raises."""

    @property
    def client(self) -> str:
        """The client's address."""
        ...

    @property
    def write_timeout(self) -> float:
        """Seconds after which a client that reads nothing of a stream loses it."""
        ...

    @property
    def closing(self) -> bool:
        """Whether the server ends."""
        ...

    def reserve(self, num_bytes: int) -> bool:
        """Make room for so many bytes of a request, or give some back; False when the requests of
        this connection would take too much together."""
        ...

    def acknowledge(self, stream: Stream, num_bytes: int) -> None:
        """So many bytes of the stream's body wait no more."""
        ...

    def send_headers(self, stream: Stream, headers: Headers, *, end: bool) -> None:
        """Send with the next frame of the stream, or now where it is the last."""
        ...

    def pump(self, stream: Stream) -> None:
        """Send what the stream has, as far as both windows and the kernel take it."""
        ...

    def weigh(self) -> None:
        """Cut a client that leaves too much unread on all its streams together."""
        ...

    def reset(self, stream: Stream, code: Code) -> None:
        """End the stream at once."""
        ...


class Stream:
    """One request and its answer. All but `receive` and `flush` is done at once.

    The handler is cancelled when the client resets the stream, or leaves, or is cut.
    """

    def __init__(self, session: Lines, number: int, headers: Headers) -> None:
        self.headers = dict(headers)
        self.number = number
        self.scope = trio.CancelScope()
        """The handler's."""
        self._session = session
        self._arrived: deque[tuple[bytes, int]] = deque()
        self._arriving = True
        self._reserved = 0
        self._news = trio.Event()
        self._unsent = bytearray()
        self._longest = 0
        self._trailers: Headers | None = None
        self._sending = True
        self._moved = trio.Event()

    @property
    def client(self) -> str:
        """Whose it is, as the log writes it."""
        return self._session.client

    # The request

    async def receive(self) -> bytes:
        """The next piece of the body, b"" at its end. Raises ServerEnds."""
        while not self._arrived:
            if not self._arriving:
                return b""
            if self._session.closing:
                raise ServerEnds
            self._news = trio.Event()
            await self._news.wait()
        data, num_bytes = self._arrived.popleft()
        self._session.acknowledge(self, num_bytes)
        return data

    def reserve(self, num_bytes: int) -> bool:
        """Make room for a part of the request of so many bytes, in the place of an earlier one;
        False when the requests of this connection would take too much together."""
        granted = self._session.reserve(num_bytes - self._reserved)
        if granted:
            self._reserved = num_bytes
        return granted

    def take(self, data: bytes, num_bytes: int) -> None:
        """A piece of the body has arrived; with its padding it took `num_bytes` of the window."""
        if self.scope.cancel_called or not self._sending or not data:
            self._session.acknowledge(self, num_bytes)
            return
        self._arrived.append((data, num_bytes))
        self._news.set()

    def take_end(self) -> None:
        self._arriving = False
        self._news.set()

    def begin_close(self) -> None:
        """Wake whoever waits for more of the request."""
        self._news.set()

    @property
    def complete(self) -> bool:
        """Whether both sides have said all."""
        return not (self._arriving or self._sending)

    # The answer

    @property
    def unsent(self) -> int:
        """Bytes that wait for the client's window or for the connection."""
        return len(self._unsent)

    @property
    def is_open(self) -> bool:
        """Whether something can be sent, or is still to be."""
        return self._sending

    def start(self, headers: Headers, *, end: bool = False) -> None:
        """Send the head of the answer; with `end` that is all of it."""
        if self._sending:
            self._sending = not end
            self._session.send_headers(self, headers, end=end)

    def push(self, data: bytes) -> bool:
        """Send now what the client takes; False when some waits for `flush`. Never raises."""
        if not self._sending:
            return True
        self._longest = max(self._longest, len(data))
        self._unsent += data
        self._session.pump(self)
        if len(self._unsent) > self._longest + MAX_STREAM_UNSENT:
            logger.warning("a client leaves %d bytes of a stream unread", len(self._unsent))
            self.reset(Code.ENHANCE_YOUR_CALM)
        if self._unsent:
            self._session.weigh()
        return not self._unsent

    def end(self, trailers: Headers) -> None:
        """Nothing follows but what waits, and `trailers`."""
        self._trailers = trailers
        self._session.pump(self)

    async def flush(self) -> None:
        """Wait until nothing waits. A client that takes nothing for the write timeout loses the
        stream."""
        while self._unsent:
            limit = self._session.write_timeout
            with trio.move_on_after(limit) as deadline:
                await self._moved.wait()
            if deadline.cancelled_caught:
                logger.warning("a client has read nothing of a stream for %g s", limit)
                self.reset(Code.CANCEL)
        await trio.lowlevel.checkpoint()  # goes no further where the stream is lost

    def send_frame(self, most: int) -> bytes:
        """Take what one frame holds from what waits."""
        data = bytes(self._unsent[:most])
        del self._unsent[:most]
        self._note_move()
        return data

    def take_trailers(self) -> Headers | None:
        """The trailers, once, when nothing waits any more."""
        if self._unsent or self._trailers is None or not self._sending:
            return None
        self._sending = False
        return self._trailers

    def reset(self, code: Code) -> None:
        """Give the stream up, and let the client know."""
        self._session.reset(self, code)

    def lose(self) -> None:
        """The stream is gone: cancel what runs for it."""
        self._sending = self._arriving = False
        self._unsent.clear()
        self.reserve(0)
        self._note_move()
        self.scope.cancel()

    def _note_move(self) -> None:
        self._moved.set()
        self._moved = trio.Event()
