"""One request from its head to its end: its id, who asked, what came of it, and the line in
the log that says so. Wraps the app, so that errors and streams pass here like all else.

Never written down: bodies, query strings, header fields, anything that may be a secret.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Awaitable, Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from kttrio.config import ServerConfig
from kttrio.server.cors import Cors, Headers
from kttrio.server.failures import log_failure
from kttrio.server.ids import new_id
from kttrio.server.meter import Meter

logger = logging.getLogger("kttrio.access")

Send = Callable[[Any], Awaitable[None]]
App = Callable[[Any, Any, Any], Awaitable[None]]

ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")
ID_FIELDS = (b"x-request-id", b"request-id")
"""Where clients look for it; the second are Anthropic's."""
NOT_PLAIN = re.compile(r"[^!-~]")
"""What a path may bring over HTTP/2: spaces, of which the line is made, and ends of lines."""
NO_ROUTE = "none"
LEFT = 499
"""The status of a request whose client left before the answer, as nginx writes it."""
SHOWN_PATH = 200
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"})
POLLED = frozenset({"/health", "/metrics", "/ping", "/v2/health/live", "/v2/health/ready"})
"""Paths that monitors ask."""


@dataclass(slots=True)
class Visit:
    """One request; the app adds what it finds out."""

    id: str
    method: str
    path: str
    client: str
    began: float = field(default_factory=perf_counter)
    route: str = NO_ROUTE
    """The rule that the path matches: there are few of them, whatever clients send."""
    status: int = LEFT
    polled: bool = False
    """Such requests come every few seconds: their lines are for debugging."""
    outcome: str = ""
    """What the model did, as words of the log line."""

    def line(self, seconds: float) -> str:
        path = NOT_PLAIN.sub("?", self.path)
        words = f"method={self.method} path={path} status={self.status}"
        words += f" seconds={seconds:.4f} client={self.client} request={self.id}"
        return f"{words} {self.outcome}" if self.outcome else words


VISIT: ContextVar[Visit | None] = ContextVar("visit", default=None)
"""The request that this task works for."""


def current_id() -> str | None:
    """Of the request that this task works for."""
    visit = VISIT.get()
    return None if visit is None else visit.id


def named() -> str:
    """The request that this task works for, as the log calls it."""
    visit = VISIT.get()
    if visit is None:
        return "a request"
    return f"{visit.method} {NOT_PLAIN.sub('?', visit.path)} (request {visit.id})"


class Journal:
    """Where visits are counted and written down when they end."""

    def __init__(self, config: ServerConfig, meter: Meter) -> None:
        self._logs = config.access_log
        self._meter = meter

    def note(self, visit: Visit) -> None:
        self._meter.visits[visit.method, visit.route, visit.status] += 1
        if self._logs:
            level = logging.DEBUG if visit.polled else logging.INFO
            logger.log(level, "%s", visit.line(perf_counter() - visit.began))


def request_id(fields: Mapping[bytes, bytes]) -> str:
    """The id that a request brings in its header, where that is one, or a new one."""
    given = fields.get(b"x-request-id", b"")
    return given.decode() if ID.fullmatch(given) else new_id("req-")


def address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Reception:
    """Where every request comes in and every answer goes out."""

    def __init__(self, config: ServerConfig, meter: Meter) -> None:
        self._cors = Cors(config.allowed_origins)
        self._journal = Journal(config, meter)

    async def receive(self, app: App, scope: Any, receive: Any, send: Send) -> None:
        """Have `app` answer the request of `scope`."""
        fields = dict(scope["headers"])
        visit = self._open(scope, fields)
        added = [(name, visit.id.encode()) for name in ID_FIELDS]
        added += self._cors.headers(fields)

        async def answer(message: Any) -> None:
            if message["type"] == "http.response.start":
                visit.status = message["status"]
                message = {**message, "headers": [*message["headers"], *added]}
            await send(message)

        VISIT.set(visit)
        try:
            permission = self._cors.preflight(scope["method"], fields)
            if permission is None:
                await app(scope, receive, answer)
            else:
                await _permit(permission, answer)
        except Exception as error:  # inside an answer: hypercorn closes what is left open
            log_failure(logger, f"{named()} broke off", error)
        finally:
            self._journal.note(visit)

    def _open(self, scope: Any, fields: Mapping[bytes, bytes]) -> Visit:
        path = scope["raw_path"].decode("ascii", "replace")[:SHOWN_PATH]
        return Visit(
            id=request_id(fields),
            method=scope["method"] if scope["method"] in METHODS else "OTHER",
            path=path,
            client=address(*(scope["client"] or ("unknown", 0))),
            polled=path in POLLED,
        )


async def _permit(permission: Headers, answer: Send) -> None:
    await answer({"type": "http.response.start", "status": 204, "headers": permission})
    await answer({"type": "http.response.body", "body": b"", "more_body": False})
