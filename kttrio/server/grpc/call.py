"""One call of gRPC over a stream of HTTP/2: messages in and out, its deadline, and how it ends.

What messages mean is not known here; they are bytes.
"""

from __future__ import annotations

import logging
import re
import struct
import zlib
from collections.abc import Awaitable, Callable
from math import inf

import trio

from kttrio.config import ServerConfig
from kttrio.server.errors import ApiError
from kttrio.server.failures import FAILED, log_failure
from kttrio.server.grpc.status import RpcError, Status, rpc_error, status_fields
from kttrio.server.visits import Visit, named
from kttrio.server.wire.http2_stream import Headers, ServerEnds, Stream

logger = logging.getLogger(__name__)

PREFIX = struct.Struct(">BI")
"""Before each message: whether it is compressed, and its length in bytes."""
HEAD = (
    (b":status", b"200"),
    (b"content-type", b"application/grpc"),
    (b"grpc-accept-encoding", b"identity,gzip"),
)
NOT_GRPC = ((b":status", b"415"), (b"content-length", b"0"))
GZIP = 16 + zlib.MAX_WBITS
TIMEOUT = re.compile(rb"([0-9]{1,8})([HMSmun])")
UNITS = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}

Run = Callable[["Call"], Awaitable[None]]


class Call:
    """A call that came in. Messages are pushed as they are made, by whoever makes them."""

    def __init__(self, stream: Stream, visit: Visit, limits: ServerConfig) -> None:
        self.path = stream.headers.get(b":path", b"").decode("latin-1")
        self._stream = stream
        self._visit = visit
        self._max_message_bytes = limits.max_body_bytes
        self._body_timeout = limits.body_timeout
        self._arrived = bytearray()
        self._started = False

    def metadata(self, name: str) -> str:
        """What the client sent beside the messages; empty when nothing under that name."""
        return self._stream.headers.get(name.encode(), b"").decode("latin-1")

    # Messages in

    async def receive(self) -> bytes | None:
        """The client's next message; None after its last. Raises RpcError."""
        arrived = self._arrived
        if not await self._fill(PREFIX.size, begun=False):
            return None
        is_compressed, num_bytes = PREFIX.unpack_from(arrived)
        if is_compressed > 1:
            raise RpcError(Status.INTERNAL, "A message begins with 0 or 1.")
        if num_bytes > self._max_message_bytes:
            raise self._too_large(num_bytes)
        if not self._stream.reserve(num_bytes):
            text = "This connection sends too much at once: send one after the other."
            raise RpcError(Status.RESOURCE_EXHAUSTED, text)
        await self._fill(PREFIX.size + num_bytes, begun=True)
        message = bytes(arrived[PREFIX.size : PREFIX.size + num_bytes])
        del arrived[: PREFIX.size + num_bytes]
        return self._unpacked(message) if is_compressed else message

    async def receive_only(self) -> bytes:
        """The message of a call that has one. Raises RpcError when it has another number."""
        message = await self.receive()
        if message is None or await self.receive() is not None:
            raise RpcError(Status.INVALID_ARGUMENT, "Send one message for this method.")
        return message

    async def _fill(self, num_bytes: int, *, begun: bool) -> bool:
        """Read until there are so many bytes; False when there are none at all. What has begun
        must go on."""
        arrived = self._arrived
        while len(arrived) < num_bytes:
            with trio.move_on_after(self._body_timeout if begun or arrived else inf) as deadline:
                data = await self._stream.receive()
            if deadline.cancelled_caught:
                message = f"A message did not arrive within {self._body_timeout:g} s."
                raise RpcError(Status.DEADLINE_EXCEEDED, message)
            if not data:
                if arrived:
                    raise RpcError(Status.INTERNAL, "The last message is not complete.")
                return False
            arrived += data
        return True

    def _too_large(self, num_bytes: int) -> RpcError:
        return RpcError(
            Status.RESOURCE_EXHAUSTED,
            f"A message of {num_bytes} bytes is above the limit of {self._max_message_bytes} "
            "(--max-body-bytes).",
        )

    def _unpacked(self, message: bytes) -> bytes:
        encoding = self.metadata("grpc-encoding") or "identity"
        if encoding == "identity":
            text = "A message is marked as compressed, but 'grpc-encoding' does not say how."
            raise RpcError(Status.INTERNAL, text)
        if encoding != "gzip":
            text = f"Messages compressed by '{encoding[:40]}' are not read: send gzip or identity."
            raise RpcError(Status.UNIMPLEMENTED, text)
        most = self._max_message_bytes
        unzip = zlib.decompressobj(GZIP)
        try:
            data = unzip.decompress(message, most)
        except zlib.error as error:
            raise RpcError(Status.INTERNAL, f"A message is no gzip: {error}.") from error
        if unzip.unconsumed_tail:
            raise self._too_large(most + 1)
        if not unzip.eof:
            raise RpcError(Status.INTERNAL, "A message is no whole gzip.")
        return data

    # Messages out

    def send(self, message: bytes) -> bool:
        """Send a message now; False when some of it waits for the client. Never raises."""
        self._start()
        return self._stream.push(PREFIX.pack(0, len(message)) + message)

    def finish(self, status: Status = Status.OK, message: str = "") -> None:
        """End the call, after what still waits."""
        self._visit.status = status
        if self._started:
            self._stream.end(status_fields(status, message))
        else:
            self._started = True
            self._stream.start([*self._head, *status_fields(status, message)], end=True)

    @property
    def unsent(self) -> int:
        """Bytes that wait for the client."""
        return self._stream.unsent

    async def flush(self) -> None:
        """Wait for the client to read what waits."""
        await self._stream.flush()

    def _start(self) -> None:
        if not self._started:
            self._started = True
            self._stream.start(self._head)

    @property
    def _head(self) -> Headers:
        return [*HEAD, (b"x-request-id", self._visit.id.encode())]

    # The whole

    async def run(self, run: Run) -> None:
        """Run the call and end it as it deserves, within the client's deadline."""
        try:
            with trio.fail_after(self._seconds()):
                await run(self)
            self.finish()
        except RpcError as error:
            self.finish(error.status, error.message)
        except ApiError as error:
            told = rpc_error(error)
            self.finish(told.status, told.message)
        except ServerEnds:
            self.finish(Status.UNAVAILABLE, "The server is shutting down.")
        except trio.TooSlowError:
            self.finish(Status.DEADLINE_EXCEEDED, "The deadline of the call has passed.")
        except Exception as error:
            log_failure(logger, f"{named()} failed", error)
            self.finish(Status.INTERNAL, FAILED)

    def _seconds(self) -> float:
        """Until the client's deadline."""
        text = self.metadata("grpc-timeout").encode()
        if not text:
            return inf
        if (found := TIMEOUT.fullmatch(text)) is None:
            raise RpcError(Status.INVALID_ARGUMENT, "'grpc-timeout' is no time, such as 10S.")
        return int(found[1]) * UNITS[found[2]]


def is_grpc(stream: Stream) -> bool:
    """Whether the request is a call at all; if not, it is told so as HTTP has it."""
    headers = stream.headers
    kind = headers.get(b"content-type", b"")
    if headers.get(b":method") == b"POST" and kind.startswith(b"application/grpc"):
        return True
    stream.start(NOT_GRPC, end=True)
    return False
