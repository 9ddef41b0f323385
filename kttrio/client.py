"""A small HTTP/1.1 client with server-sent events, for `kttrio chat`, tools/bench and image URLs.

Knows URLs, JSON and event streams; knows nothing of kttrio's own server, so that it can be pointed
at any OpenAI-compatible one. One `Client` is used by one task at a time and keeps its connection.
"""

from __future__ import annotations

import json
import ssl
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, cast
from urllib.parse import urlsplit

import h11
import trio

ACCEPTED = "application/json, text/event-stream, */*;q=0.5"
MAX_ERROR_BYTES = 64 * 1024
MAX_BODY_BYTES = 256 * 1024 * 1024
MAX_EVENT_BYTES = 16 * 1024 * 1024


class ClientError(Exception):
    """No usable answer came; the message says what happened and, where known, the mend."""


class ConnectionLost(ClientError):
    """The server closed the connection before its answer was complete."""


class StatusError(ClientError):
    """The server answered with an error status; `message` is the body's own text."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str]) -> None:
        super().__init__(f"the server answered {status}: {message}")
        self.status = status
        self.message = message
        self.headers = headers


@dataclass(frozen=True, slots=True)
class Event:
    """One server-sent event; `name` is "message" where the server gave none."""

    data: str
    name: str = "message"


class EventParser:
    """Bytes in, events out, cut anywhere. Comments and ids are dropped."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._data: list[str] = []
        self._name = ""

    def feed(self, data: bytes) -> list[Event]:
        """The events completed by `data`."""
        self._buffer += data
        if len(self._buffer) > MAX_EVENT_BYTES:
            raise ClientError(f"an event line exceeds {MAX_EVENT_BYTES} bytes")
        *lines, rest = self._buffer.split(b"\n")
        self._buffer = bytearray(rest)
        events = []
        for line in lines:
            event = self._line(line.removesuffix(b"\r").decode("utf-8", "replace"))
            if event is not None:
                events.append(event)
        return events

    def _line(self, line: str) -> Event | None:
        if not line:
            event = Event("\n".join(self._data), self._name or "message") if self._data else None
            self._data, self._name = [], ""
            return event
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
        elif name == "event":
            self._name = value
        return None


class EventStream:
    """The events of one answer, for `async for`; read to the end, it keeps its connection."""

    def __init__(self, link: _Link) -> None:
        self._link = link
        self._parser = EventParser()
        self._ready: deque[Event] = deque()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        while not self._ready:
            part = await self._link.receive_body()
            if part is None:
                raise StopAsyncIteration
            self._ready.extend(self._parser.feed(part))
        return self._ready.popleft()

    async def chunk(self) -> dict[str, Any] | None:
        """The next JSON chunk of an OpenAI stream; None after its end.

        Raises ClientError for an error event, and when the stream ends without its [DONE].
        """
        async for event in self:
            if event.data == "[DONE]":
                async for _ in self:
                    pass
                return None
            return _decode_chunk(event.data)
        raise ConnectionLost("the stream ended without its [DONE]")


def _decode_chunk(data: str) -> dict[str, Any]:
    try:
        chunk = json.loads(data)
    except ValueError:
        raise ClientError(f"an event is no JSON: {data[:200]!r}") from None
    if not isinstance(chunk, dict):
        raise ClientError(f"an event is no JSON object: {data[:200]!r}")
    if chunk.get("error"):
        error = chunk["error"]
        message = error.get("message") if isinstance(error, dict) else error
        raise ClientError(f"the server ended the stream: {message}")
    return chunk


class Client:
    """Requests to one server. Use as `async with Client(url) as client`.

    `timeout` bounds each silence (connecting, waiting for the next byte), not the whole answer.
    `address` is connected to instead of what the URL's host is known as.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout: float = 60.0,
        address: str | None = None,
    ) -> None:
        try:
            parts = urlsplit(url if "//" in url else f"http://{url}")
            port = parts.port
        except ValueError as error:  # a port beyond 65535, half a bracket
            raise ClientError(f"{url!r} is no http:// or https:// address: {error}") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ClientError(f"{url!r} is no http:// or https:// address")
        self._host = parts.hostname
        self._address = address or parts.hostname
        self._tls = parts.scheme == "https"
        self._port = port or (443 if self._tls else 80)
        self._netloc = parts.netloc.rpartition("@")[2]
        self._base = parts.path.rstrip("/").removesuffix("/v1")
        self._api_key = api_key
        self._timeout = timeout
        self._link: _Link | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            await trio.aclose_forcefully(link.stream)

    async def get_json(self, path: str) -> Any:
        """The decoded body of a GET; StatusError when the status is not 2xx."""
        return await self._json("GET", path, None)

    async def get_bytes(self, path: str, *, limit: int) -> bytes:
        """The body of a GET, cut a little beyond `limit` bytes; StatusError when the status is not
        2xx."""
        async with self._exchange("GET", path, None) as link:
            return await link.read_body(limit + 1)

    async def post_json(self, path: str, body: Any) -> Any:
        """The decoded answer to a JSON body; StatusError when the status is not 2xx."""
        return await self._json("POST", path, body)

    async def _json(self, method: str, path: str, body: Any) -> Any:
        async with self._exchange(method, path, body) as link:
            text = await link.read_body(MAX_BODY_BYTES)
        try:
            return json.loads(text)
        except ValueError:
            raise ClientError(f"the answer to {path} is no JSON: {text[:200]!r}") from None

    @asynccontextmanager
    async def stream(self, path: str, body: Any) -> AsyncIterator[EventStream]:
        """POST and read server-sent events: `async with client.stream(...) as events`.

        Leaving the block early closes the connection, which is how a server learns that nobody
        listens any more.
        """
        async with self._exchange("POST", path, body) as link:
            yield EventStream(link)

    @asynccontextmanager
    async def _exchange(self, method: str, path: str, body: Any) -> AsyncIterator[_Link]:
        payload = b"" if body is None else json.dumps(body).encode()
        link = await self._send(method, path, payload)
        try:
            if not 200 <= link.status < 300:
                raise StatusError(link.status, await _error_text(link), link.headers)
            yield link
        finally:
            if link.reusable():
                self._link = link
            else:
                await trio.aclose_forcefully(link.stream)

    async def _send(self, method: str, path: str, payload: bytes) -> _Link:
        """Send on the kept connection; on a fresh one when the server has closed that meanwhile."""
        kept, self._link = self._link, None
        if kept is not None:
            try:
                await kept.request(method, self._base + path, self._headers(payload), payload)
                return kept
            except ConnectionLost:
                await trio.aclose_forcefully(kept.stream)
            except BaseException:
                await trio.aclose_forcefully(kept.stream)
                raise
        link = _Link(await self._connect(), self._timeout)
        try:
            await link.request(method, self._base + path, self._headers(payload), payload)
        except BaseException:
            await trio.aclose_forcefully(link.stream)
            raise
        return link

    def _headers(self, payload: bytes) -> list[tuple[str, str]]:
        headers = [("Host", self._netloc), ("Accept", ACCEPTED), ("User-Agent", "kttrio")]
        if payload:
            headers += [("Content-Type", "application/json"), ("Content-Length", str(len(payload)))]
        if self._api_key:
            headers.append(("Authorization", f"Bearer {self._api_key}"))
        return headers

    async def _connect(self) -> trio.abc.Stream:
        where = f"{self._host}:{self._port}"
        try:
            with trio.fail_after(self._timeout):
                stream = await trio.open_tcp_stream(self._address, self._port)
                return await _secured(stream, self._host) if self._tls else stream
        except trio.TooSlowError:
            raise ClientError(f"{where} did not accept within {self._timeout:g} s") from None
        except (OSError, trio.BrokenResourceError) as error:
            reason = error.__cause__ or error
            if isinstance(reason, BaseExceptionGroup):  # one for each address of the host
                reason = reason.exceptions[0]
            raise ClientError(f"cannot connect to {where} ({reason}); is it running?") from error


async def _secured(stream: trio.abc.Stream, host: str) -> trio.abc.Stream:
    """TLS over `stream`, which is closed where there can be none."""
    try:
        # In a thread: reading all certificates takes 20 ms, which a server's event loop has not.
        context = await trio.to_thread.run_sync(ssl.create_default_context)
        tls = trio.SSLStream(stream, context, server_hostname=host, https_compatible=True)
        await tls.do_handshake()
    except BaseException:
        await trio.aclose_forcefully(stream)
        raise
    return tls


class _Link:
    """One connection and the HTTP state of the exchange that runs on it."""

    def __init__(self, stream: trio.abc.Stream, timeout: float) -> None:
        self.stream = stream
        self.status = 0
        self.headers: dict[str, str] = {}
        self._timeout = timeout
        self._http = h11.Connection(h11.CLIENT)

    async def request(
        self, method: str, target: str, headers: list[tuple[str, str]], payload: bytes
    ) -> None:
        """Send a request and read the answer's head."""
        try:
            fields = [(name.encode(), value.encode()) for name, value in headers]
            asked = h11.Request(method=method, target=target, headers=fields)
        except (h11.LocalProtocolError, UnicodeEncodeError) as error:
            raise ClientError(f"the address or the key cannot stand in HTTP: {error}") from None
        head = self._http.send(asked)
        data = self._http.send(h11.Data(data=payload)) if payload else b""
        end = self._http.send(h11.EndOfMessage())
        try:
            await self.stream.send_all((head or b"") + (data or b"") + (end or b""))
        except (trio.BrokenResourceError, OSError):
            raise ConnectionLost("the connection broke while the request was sent") from None
        event = await self._next()
        while isinstance(event, h11.InformationalResponse):
            event = await self._next()
        if not isinstance(event, h11.Response):
            raise ConnectionLost("the server ended the connection without an answer")
        self.status = event.status_code
        self.headers = {name.decode(): value.decode("latin-1") for name, value in event.headers}

    async def receive_body(self) -> bytes | None:
        """The next bytes of the answer's body; None when it is complete."""
        event = await self._next()
        if isinstance(event, h11.Data):
            return bytes(event.data)
        if isinstance(event, h11.EndOfMessage):
            return None
        raise ConnectionLost("the server closed the connection in the middle of an answer")

    async def read_body(self, limit: int) -> bytes:
        """The whole body, cut when it exceeds `limit` bytes."""
        parts, size = [], 0
        while size < limit and (part := await self.receive_body()) is not None:
            parts.append(part)
            size += len(part)
        return b"".join(parts)

    def reusable(self) -> bool:
        """True when the exchange is over on both sides; the link is then ready for the next."""
        if self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
            return False
        self._http.start_next_cycle()
        return True

    async def _next(self) -> h11.Event | type[h11.PAUSED]:
        data: bytes | None = None
        try:
            while True:
                event = self._http.next_event()
                if event is not h11.NEED_DATA:
                    return cast("h11.Event | type[h11.PAUSED]", event)
                data = await self._receive()
                self._http.receive_data(data)
        except h11.RemoteProtocolError as error:
            if data == b"":
                raise ConnectionLost("the server closed the connection too early") from None
            raise ClientError(f"the server does not speak clean HTTP/1.1: {error}") from None

    async def _receive(self) -> bytes:
        try:
            with trio.fail_after(self._timeout):
                return bytes(await self.stream.receive_some())
        except trio.TooSlowError:
            raise ClientError(f"no answer for {self._timeout:g} s") from None
        except (trio.BrokenResourceError, OSError):
            return b""


async def _error_text(link: _Link) -> str:
    """What the error body says: `error.message` of the OpenAI shape, else its first bytes."""
    text = await link.read_body(MAX_ERROR_BYTES)
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text[:500].decode("utf-8", "replace").strip()
