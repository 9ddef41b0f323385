"""The listening side: binds the port, accepts clients, and ends them in good order.

What a connection does is in connection.py, what the app answers in app.py.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio
from hypercorn.utils import wrap_app
from quart_trio import QuartTrio

from kttrio.config import ConfigError, ServerConfig
from kttrio.server.connection import Connections

BACKLOG = 2048
CLOSE_SECONDS = 5.0


async def serve_http(
    app: QuartTrio,
    config: ServerConfig,
    *,
    shutdown: Callable[[], Awaitable[object]],
    task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve `app` over HTTP/1.1 until `shutdown` returns; reports the URL once it listens.

    Then no client is accepted any more, idle connections end, and running requests may go on:
    the caller ends them (`AppState.finish_streams`) when their time is over. What still runs
    `drain_seconds` and a few seconds more after `shutdown` is cancelled. Raises ConfigError when
    the address cannot be bound.
    """
    connections = Connections(
        app=wrap_app(app, config.max_body_bytes, "asgi"),
        idle_timeout=config.idle_timeout,
        write_timeout=config.stream_write_timeout,
    )
    listeners = await open_listeners(config)
    async with trio.open_nursery() as clients:
        async with trio.open_nursery() as accepting:
            for listener in listeners:
                accepting.start_soon(_accept, listener, connections, clients)
            task_status.started(_url(listeners[0]))
            await shutdown()
            accepting.cancel_scope.cancel()
        await connections.begin_close()
        clients.cancel_scope.deadline = trio.current_time() + config.drain_seconds + CLOSE_SECONDS


async def open_listeners(config: ServerConfig) -> list[trio.SocketListener]:
    """Bind the address. Raises ConfigError that names it."""
    try:
        return await trio.open_tcp_listeners(config.port, host=config.host, backlog=BACKLOG)
    except OSError as error:
        raise ConfigError(
            f"--host {config.host} --port {config.port}: cannot listen there "
            f"({error.strerror or error}); choose another port (0 picks a free one) or address"
        ) from error


async def _accept(
    listener: trio.SocketListener, connections: Connections, clients: trio.Nursery
) -> None:
    async with listener:
        await trio.serve_listeners(connections.handle, [listener], handler_nursery=clients)


def _url(listener: trio.SocketListener) -> str:
    host, port = listener.socket.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
