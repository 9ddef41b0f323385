"""Server-sent events over one connection: framing, and the pace at which they leave.

An event is pushed to the socket by whoever makes it, normally the engine's fan-out, once per
step. The request's own task sleeps unless the client is slow or the stream silent. What the
events say is not known here.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from json.encoder import encode_basestring
from time import perf_counter
from typing import Any

import trio

from kttrio.server.errors import ApiError
from kttrio.server.wire.connection import Connection

HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)
KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"

Send = Callable[[Any], Awaitable[None]]


def event(value: object, name: str | None = None) -> bytes:
    """`value` as one event, with an `event:` line where it has a name. Half characters, which a
    model may write, become question marks."""
    return frame(json.dumps(value, ensure_ascii=False, separators=(",", ":")), name)


def frame(text: str, name: str | None = None) -> bytes:
    """An event whose data, of one line, is already written."""
    line = b"" if name is None else b"event: %b\n" % name.encode()
    return b"%bdata: %b\n\n" % (line, text.encode(errors="replace"))


class EventTemplate:
    """An event of which one string changes: everything around it is written only once."""

    def __init__(self, value: object, hole: str, name: str | None = None) -> None:
        """`hole`: the string in `value` that marks the place, and occurs nowhere else."""
        prefix, suffix = event(value, name).decode().split(json.dumps(hole))
        self._prefix = prefix
        self._suffix = suffix

    def fill(self, text: str) -> bytes:
        return (self._prefix + encode_basestring(text) + self._suffix).encode(errors="replace")


class NumberedTemplate:
    """An event of which a number changes, and behind it a string."""

    def __init__(self, value: object, *, number: str, text: str, name: str) -> None:
        """`number` and `text`: the strings in `value` that mark the places, and occur nowhere
        else."""
        prefix, rest = event(value, name).decode().split(json.dumps(number))
        middle, suffix = rest.split(json.dumps(text))
        self._prefix = prefix
        self._middle = middle
        self._suffix = suffix

    def fill(self, text: str, number: int) -> bytes:
        filled = f"{self._prefix}{number}{self._middle}{encode_basestring(text)}{self._suffix}"
        return filled.encode(errors="replace")


class EventStream:
    """The response body of one streaming request."""

    def __init__(
        self,
        connection: Connection,
        *,
        chunked: bool,
        keep_alive: bytes = KEEP_ALIVE,
        patient: bool = False,
    ) -> None:
        """`chunked`: frame for HTTP/1.1; an HTTP/1.0 body ends with the connection. `keep_alive`:
        what a silent stream carries. `patient`: the head waits for the first event."""
        self._connection = connection
        self._chunked = chunked
        self._keep_alive = keep_alive
        self._patient = patient
        self._refusal: ApiError | None = None
        self._held: list[bytes] | None = []
        self._ended = False
        self._attention = trio.Event()
        self._last_put = perf_counter()

    @property
    def begun(self) -> bool:
        """The head of the response is out."""
        return self._held is None

    def put(self, events: bytes) -> None:
        """Send now, in the caller's time slice. Before `run` and behind a slow client: keep."""
        if not events:
            return  # an empty chunk would end the response
        if self._held is not None:
            self._held.append(events)
            self._attention.set()
            return
        self._last_put = perf_counter()
        if self._chunked:
            events = b"%x\r\n%b\r\n" % (len(events), events)
        if not self._connection.push(events):
            self._attention.set()

    def fail(self, error: ApiError, told: bytes) -> None:
        """End with the event `told`. Where a patient stream has not begun, `run` raises the error
        instead."""
        if self._patient and self._held == []:
            self._refusal = error
        else:
            self.put(told)
        self.end()

    def end(self) -> None:
        """No event follows; `run` returns when the last one is written."""
        self._ended = True
        self._attention.set()

    async def run(self, send: Send, keep_alive_seconds: float) -> None:
        """Write the response from its head on until `end` was called.

        Ends early, without complaint, when the client is gone: quart cancels the request.
        """
        if self._patient:
            await self._attention.wait()
            if self._refusal is not None:
                raise self._refusal
        await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        held, self._held = self._held or [], None
        self.put(b"".join(held))
        while self._connection.unsent or not self._ended:
            if self._connection.unsent:
                await self._connection.flush()
                continue
            remaining = keep_alive_seconds - (perf_counter() - self._last_put)
            if remaining <= 0:
                self.put(self._keep_alive)
                continue
            self._attention = trio.Event()
            with trio.move_on_after(remaining):
                await self._attention.wait()
        await send({"type": "http.response.body", "body": b"", "more_body": False})
