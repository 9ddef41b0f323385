"""Builds the app: routes of every protocol, who may call, how errors look, how much may be sent.

Runs no task of its own: what fails here fails a request, and the server goes on.
"""

from __future__ import annotations

import hmac
import logging
from collections.abc import Awaitable, Callable, Mapping
from itertools import chain
from types import MappingProxyType
from typing import Any

from quart import Response, request
from quart_trio import QuartTrio
from quart_trio.asgi import TrioASGIHTTPConnection
from werkzeug.exceptions import HTTPException

from kttrio.server import (
    admin,
    anthropic,
    anthropic_response,
    openai,
    openapi,
    placement,
    recording,
    responses,
    tokens,
    unserved,
)
from kttrio.server.errors import ApiError, ErrorShape, error_body
from kttrio.server.replies import LiveResponse, error_response
from kttrio.server.state import AppState

logger = logging.getLogger(__name__)

BODY_SECONDS = 30
OPEN_PATHS = frozenset({"/health"})
PROTOCOLS = (openai, responses, anthropic, tokens, admin, recording, placement)
"""Each has a `blueprint` of routes, and `OPERATIONS` that tells of them."""

SHAPES: Mapping[str, ErrorShape] = MappingProxyType({"/v1/messages": anthropic_response.error_body})
"""How errors look under the paths that begin so; OpenAI's way elsewhere."""

Guard = Callable[[], Awaitable[None]]


class LiveConnection(TrioASGIHTTPConnection):
    """Lets a `LiveResponse` write itself instead of being iterated over."""

    async def _send_response(self, send: Any, response: Any) -> None:
        if not isinstance(response, LiveResponse):
            await super()._send_response(send, response)
            return
        try:
            await response.run(self.scope, send)
        except ApiError as error:  # refused by the engine, before the first byte
            await super()._send_response(send, _shaped(error, self.scope["path"]))


class App(QuartTrio):
    asgi_http_class = LiveConnection


def build_app(state: AppState) -> QuartTrio:
    """The ASGI app over a running engine; `serve_http` serves it."""
    app = App("kttrio", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = state.config.max_body_bytes
    app.config["BODY_TIMEOUT"] = BODY_SECONDS
    # Quart would cut an answer after a minute, without a word; slow readers are cut by the
    # connection's own deadline.
    app.config["RESPONSE_TIMEOUT"] = None
    for protocol in PROTOCOLS:
        app.register_blueprint(protocol.blueprint(state))
    operations = chain.from_iterable(protocol.OPERATIONS for protocol in PROTOCOLS)
    app.register_blueprint(openapi.blueprint(operations, keyed=state.config.api_key is not None))
    if state.config.api_key is not None:
        app.before_request(_guard(state.config.api_key))
    app.register_error_handler(ApiError, _answer_api_error)
    app.register_error_handler(HTTPException, _answer_http_error)
    app.register_error_handler(Exception, _answer_failure)
    return app


def _guard(api_key: str) -> Guard:
    """Refuse requests without the key, in a time that does not depend on how wrong it is."""
    expected = api_key.encode()

    async def check() -> None:
        if request.path in OPEN_PATHS:
            return
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        given = (
            token.strip() if scheme.lower() == "bearer" else request.headers.get("X-Api-Key", "")
        )
        # quart reads header fields as latin-1, which gives every byte back
        if not hmac.compare_digest(given.encode("latin-1", "replace"), expected):
            message = "Wrong or missing API key: send it as 'Authorization: Bearer KEY'."
            raise ApiError(401, message, code="invalid_api_key")

    return check


def _shaped(error: ApiError, path: str) -> Response:
    """The error as clients of the protocol at `path` know it."""
    shapes = (shape for prefix, shape in SHAPES.items() if path.startswith(prefix))
    return error_response(error, next(shapes, error_body))


async def _answer_api_error(error: ApiError) -> Response:
    return _shaped(error, request.path)


async def _answer_http_error(error: HTTPException) -> Response:
    """What quart itself refuses: unknown paths and methods, bodies too large or too slow."""
    messages = {
        404: _nothing_at(request.path),
        405: f"{request.method} is not allowed for {request.path[:200]}.",
        408: f"The request body did not arrive within {BODY_SECONDS} s.",
        413: f"The request body is larger than the limit of {request.max_content_length} bytes "
        "(--max-body-bytes).",
    }
    status = error.code or 500
    message = messages.get(status, error.description or error.name)
    response = _shaped(ApiError(status, message), request.path)
    for name, value in error.get_headers():
        if name == "Allow":
            response.headers[name] = value
    return response


def _nothing_at(path: str) -> str:
    known = unserved.reason(path)
    return f"There is no {path[:200]} here{f': {known}' if known else ''}."


async def _answer_failure(error: Exception) -> Response:
    logger.error("%s %s failed", request.method, request.path, exc_info=error)
    error = ApiError(500, "The server failed to answer; its log says why.")
    return _shaped(error, request.path)
