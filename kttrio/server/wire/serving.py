"""The listening side: binds the ports, accepts clients, and ends them in good order.

What a connection does is in connection.py, what the app answers in app.py, and what the gRPC port
answers in grpc/server.py.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial

import trio
from hypercorn.typing import AppWrapper
from hypercorn.utils import wrap_app
from quart_trio import QuartTrio

from kttrio.config import ConfigError, ServerConfig
from kttrio.server.meter import Meter
from kttrio.server.wire import http1, http2
from kttrio.server.wire.connection import Connections, Speaker
from kttrio.server.wire.tls import server_context

BACKLOG = 2048
CLOSE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where a server listens."""

    url: str
    grpc: str | None
    """HOST:PORT; None: it does not."""


@dataclass(frozen=True, slots=True)
class Door:
    """A port that is open, and who serves those who come in."""

    speaker: Speaker
    listeners: list[trio.SocketListener]


async def serve_http(
    app: QuartTrio,
    config: ServerConfig,
    *,
    calls: http2.Handler,
    meter: Meter,
    shutdown: Callable[[], Awaitable[object]],
    task_status: trio.TaskStatus[Addresses] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve `app` over HTTP/1.1, and `calls` over HTTP/2 where the settings ask for it, until
    `shutdown` returns; reports the addresses once it listens.

    Then no client is accepted any more, idle connections end, and running requests may go on:
    the caller ends them (`AppState.finish_streams`) when their time is over. What still runs
    `drain_seconds` and a few seconds more after `shutdown` is cancelled. Raises ConfigError when
    an address cannot be bound or a certificate not used.
    """
    doors = await _open_doors(wrap_app(app, config.max_body_bytes, "asgi"), calls, config)
    connections = Connections(config=config, meter=meter)
    async with trio.open_nursery() as clients:
        async with trio.open_nursery() as accepting:
            for door in doors:
                for listener in door.listeners:
                    handle = partial(connections.handle, door.speaker)
                    accepting.start_soon(_accept, listener, handle, clients)
            task_status.started(_addresses(doors, "https" if config.ssl_certfile else "http"))
            await shutdown()
            accepting.cancel_scope.cancel()
        for door in doors:
            await door.speaker.begin_close()
        connections.begin_close()
        clients.cancel_scope.deadline = trio.current_time() + config.drain_seconds + CLOSE_SECONDS


async def _open_doors(app: AppWrapper, calls: http2.Handler, config: ServerConfig) -> list[Door]:
    http = http1.Http1Speaker(app, server_context(config, http1.ALPN))
    grpc = http2.Http2Speaker(calls, server_context(config, http2.ALPN))
    speakers: tuple[Speaker, ...] = (http, grpc)
    ports = await open_ports(config)
    return [Door(who, listeners) for who, listeners in zip(speakers, ports, strict=False)]


async def open_ports(config: ServerConfig) -> list[list[trio.SocketListener]]:
    """Bind the port of HTTP, then that of gRPC, if there is one. Raises ConfigError that names the
    address."""
    ports = [await _bind(config.host, config.port, "--port")]
    if config.grpc_port is not None:
        try:
            ports.append(await _bind(config.host, config.grpc_port, "--grpc-port"))
        except ConfigError:
            await _close(ports)
            raise
    return ports


async def check_listening(config: ServerConfig) -> None:
    """Find out whether the server can listen as the settings ask. Raises ConfigError if not."""
    server_context(config, http1.ALPN)
    await _close(await open_ports(config))


async def _close(ports: list[list[trio.SocketListener]]) -> None:
    for listeners in ports:
        for listener in listeners:
            await listener.aclose()


async def _bind(host: str, port: int, flag: str) -> list[trio.SocketListener]:
    try:
        return await trio.open_tcp_listeners(port, host=host, backlog=BACKLOG)
    except OSError as error:
        raise ConfigError(
            f"--host {host} {flag} {port}: cannot listen there "
            f"({error.strerror or error}); choose another port (0 picks a free one) or address"
        ) from error


async def _accept(
    listener: trio.SocketListener,
    handle: Callable[[trio.SocketStream], Awaitable[None]],
    clients: trio.Nursery,
) -> None:
    async with listener:
        await trio.serve_listeners(handle, [listener], handler_nursery=clients)


def _addresses(doors: Sequence[Door], scheme: str) -> Addresses:
    http, *grpc = [_address(door.listeners[0]) for door in doors]
    return Addresses(f"{scheme}://{http}", grpc[0] if grpc else None)


def _address(listener: trio.SocketListener) -> str:
    host, port = listener.socket.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
