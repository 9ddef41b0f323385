"""Builds the app: routes of every protocol, who may call, how errors look, how much may be sent.

Runs no task of its own: what fails here fails a request, and the server goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from itertools import chain
from types import MappingProxyType
from typing import Any

from quart import Response, current_app, request
from quart_trio import QuartTrio
from quart_trio.asgi import TrioASGIHTTPConnection
from werkzeug.exceptions import HTTPException

from kttrio.config import ServerConfig
from kttrio.server.anthropic import response as anthropic_response
from kttrio.server.anthropic import routes as anthropic
from kttrio.server.errors import ApiError, ErrorShape, body_too_large, error_body
from kttrio.server.failures import FAILED, log_failure
from kttrio.server.keys import Keys, presented
from kttrio.server.openai import routes as openai
from kttrio.server.openai import tokens, unserved
from kttrio.server.operators import admin, control, metrics, placement, recording
from kttrio.server.replies import LiveResponse, error_response
from kttrio.server.responses import routes as responses
from kttrio.server.schema import openapi
from kttrio.server.state import AppState
from kttrio.server.triton import response as triton_response
from kttrio.server.triton import routes as triton
from kttrio.server.visits import POLLED, VISIT, Reception, named

logger = logging.getLogger(__name__)

PROTOCOLS = (
    *(openai, responses, anthropic, triton, tokens),
    *(admin, control, metrics, recording, placement),
)
"""Each has a `blueprint` of routes, and `OPERATIONS` that tells of them."""
OPERATORS = frozenset({"control", "recording", "placement"})
"""Blueprints whose routes need the admin key, if there is one."""

SHAPES: Mapping[str, ErrorShape] = MappingProxyType(
    {"/v1/messages": anthropic_response.error_body, "/v2": triton_response.error_body}
)
"""How errors look under the paths that begin so; OpenAI's way elsewhere."""


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

    def __init__(self, reception: Reception) -> None:
        super().__init__("kttrio", static_folder=None)
        self._reception = reception

    async def asgi_app(self, scope: Any, receive: Any, send: Any) -> None:
        app = super().asgi_app
        if scope["type"] == "http":
            await self._reception.receive(app, scope, receive, send)
        else:
            await app(scope, receive, send)


def build_app(state: AppState) -> QuartTrio:
    """The ASGI app over a running engine; `serve_http` serves it."""
    app = App(Reception(state.config, state.meter))
    # Quart would answer a path with `//` by a redirect, in HTML and to http: behind a proxy for TLS
    # that leads nowhere.
    app.url_map.merge_slashes = False
    app.config["MAX_CONTENT_LENGTH"] = state.config.max_body_bytes
    app.config["BODY_TIMEOUT"] = state.config.body_timeout
    # Quart would cut an answer after a minute, without a word; slow readers are cut by the
    # connection's own deadline.
    app.config["RESPONSE_TIMEOUT"] = None
    for protocol in PROTOCOLS:
        app.register_blueprint(protocol.blueprint(state))
    operations = chain.from_iterable(protocol.OPERATIONS for protocol in PROTOCOLS)
    app.register_blueprint(openapi.blueprint(operations, keyed=bool(state.config.api_key)))
    app.before_request(_note_route)
    app.before_request(_Guard(state.config).check)
    app.register_error_handler(ApiError, _answer_api_error)
    app.register_error_handler(HTTPException, _answer_http_error)
    app.register_error_handler(Exception, _answer_failure)
    return app


async def _note_route() -> None:
    if (visit := VISIT.get()) is not None and request.url_rule is not None:
        visit.route = request.url_rule.rule


class _Guard:
    """Lets nobody pass without the key that the route needs."""

    def __init__(self, config: ServerConfig) -> None:
        self._keys = Keys(config)

    async def check(self) -> None:
        # What is polled tells nothing that is worth a key, and monitors seldom have one; browsers
        # send none with the question whether they may.
        if request.path in POLLED or request.method == "OPTIONS":
            return
        fields = request.headers
        given = presented(fields.get("Authorization", ""), fields.get("X-Api-Key", ""))
        self._keys.check(given, admin=request.blueprint in OPERATORS)


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
        408: f"The request body did not arrive within {request.body_timeout:g} s (--body-timeout).",
        413: body_too_large(request.max_content_length or 0).message,
    }
    status = error.code or 500
    message = messages.get(status, error.description or error.name)
    response = _shaped(ApiError(status, message), request.path)
    for name, value in error.get_headers():
        if name == "Allow":
            response.headers[name] = value
    return response


def _nothing_at(path: str) -> str:
    served = {rule.rule for rule in current_app.url_map.iter_rules()}
    if meant := unserved.meant(path, served):
        told = f": you want {meant}; check the client's base URL"
    elif reason := unserved.reason(path):
        told = f": {reason}"
    else:
        told = f"; {openapi.PATH} lists what there is"
    return f"There is no {path[:200]} here{told}."


async def _answer_failure(error: Exception) -> Response:
    log_failure(logger, f"{named()} failed", error)
    return _shaped(ApiError(500, FAILED), request.path)
