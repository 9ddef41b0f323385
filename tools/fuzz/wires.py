"""Bytes on a wire, as HTTP/1.1 and HTTP/2 of ours take them, without sockets: the protocols run
whole, over a connection that only gives and takes bytes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import trio
from hypercorn.utils import wrap_app

from kttrio.config import ServerConfig
from kttrio.server.wire.http1 import Http1Speaker
from kttrio.server.wire.http2 import Http2Speaker
from kttrio.server.wire.http2_frames import PREFACE
from kttrio.server.wire.http2_stream import Stream

ADDRESSES = (("127.0.0.1", 1), ("127.0.0.1", 2))
SECONDS = 5.0
PIECE = 61
"""Bytes that arrive at once, so that everything is cut somewhere."""


class Wire:
    """A `Connection` whose client sends `data` and leaves."""

    def __init__(self, data: bytes) -> None:
        self.reading = trio.CancelScope()
        self.on_closing: Callable[[], None] = self.stop_reading
        self.pool = SimpleNamespace(config=ServerConfig(), closing=False)
        self.sealed = self.broken = False
        self.ends, self.unsent, self.write_timeout = ADDRESSES, 0, SECONDS
        self._pieces = [data[at : at + PIECE] for at in range(0, len(data), PIECE)]

    def push(self, data: bytes) -> bool:
        return True

    async def flush(self) -> None:
        await trio.lowlevel.checkpoint()

    linger = flush

    async def receive(self) -> bytes:
        await trio.lowlevel.checkpoint()
        return self._pieces.pop(0) if self._pieces else b""

    def stop_reading(self) -> None:
        self.reading.cancel()

    def stop_reading_in(self, seconds: float) -> None:
        self.reading.deadline = trio.current_time() + seconds

    def cut(self) -> None:
        self.stop_reading()


async def _answer(scope: Any, receive: Any, send: Any) -> None:
    """An ASGI app that reads its request and answers with a byte."""
    if scope["type"] != "http":
        return
    while (message := await receive())["type"] == "http.request" and message["more_body"]:
        pass
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b".", "more_body": False})


async def _echo(stream: Stream) -> None:
    """A handler of HTTP/2 that gives back what it takes."""
    stream.start([(b":status", b"200")])
    while data := await stream.receive():
        stream.push(data)
    stream.end([(b"grpc-status", b"0")])


def _run(serve: Callable[[Any], Awaitable[None]], data: bytes) -> None:
    async def main() -> None:
        with trio.fail_after(SECONDS):
            await serve(Wire(data))

    trio.run(main)


def feed_http1(data: bytes) -> None:
    """Bytes of a client of HTTP/1.1."""
    _run(Http1Speaker(wrap_app(_answer, 1 << 20, "asgi"), None).serve, data)


def feed_http2(data: bytes) -> None:
    """Bytes of a client of HTTP/2, whose preface is its own if the first byte is odd."""
    begun = data[1:] if data[:1] and data[0] & 1 else PREFACE + data[1:]
    _run(Http2Speaker(_echo, None).serve, begun)
