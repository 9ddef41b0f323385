"""The two kinds of answer that every route gives: JSON at once, or a body that writes itself."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

from quart import Response
from quart_trio.wrappers import TrioResponse

from kttrio.server.errors import ApiError, ErrorShape, error_body
from kttrio.server.sse import Send

Run = Callable[[Any, Send], Awaitable[None]]


class LiveResponse(TrioResponse):
    """A response that `run(scope, send)` writes, head and all, in the request's own task.

    Until its first byte `run` may raise ApiError instead.
    """

    def __init__(self, run: Run) -> None:
        super().__init__(b"")
        self.timeout = None
        self.run = run


def json_response(value: object, status: int = 200) -> Response:
    """`value` as JSON. Half characters, which a model may write, become question marks."""
    return written_response(json.dumps(value, ensure_ascii=False), status)


def written_response(text: str, status: int = 200) -> Response:
    """JSON that is already written."""
    body = text.encode(errors="replace")
    return TrioResponse(body, status, content_type="application/json")


def error_response(error: ApiError, shape: ErrorShape = error_body) -> Response:
    """The error in a protocol's shape."""
    response = json_response(shape(error), error.status)
    response.headers.update(error.headers)
    return response
