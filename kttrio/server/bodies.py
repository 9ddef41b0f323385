"""A request's body and the JSON in it: how they are read, and what could not be served.

Knows no protocol; which fields a body has stands in its record.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import trio
from quart import current_app, request

from kttrio.server.encodings import decoded
from kttrio.server.errors import BadRequestError
from kttrio.server.off_loop import off_loop
from kttrio.server.schema.kinds import word

T = TypeVar("T")


async def read_bytes(build: Callable[[bytes], T]) -> tuple[T, int]:
    """What `build` makes of the request's body, unpacked where it comes packed, and the length of
    that in bytes. Long ones are read in a thread. Raises ApiError."""
    body = await request.get_data(cache=False, as_text=False, parse_form_data=False)
    if encoding := request.headers.get("Content-Encoding", ""):
        most_bytes = current_app.config["MAX_CONTENT_LENGTH"]
        body = await trio.to_thread.run_sync(decoded, body, encoding, most_bytes)
    return await off_loop(len(body), lambda: build(body)), len(body)


async def read_body(build: Callable[[dict[str, Any]], T]) -> tuple[T, int]:
    """The same of the JSON object that the body is, whatever its content type says."""
    return await read_bytes(lambda body: _build(body, build))


def _build(body: bytes, build: Callable[[dict[str, Any]], T]) -> T:
    """What can just be parsed may be nested too deeply for what comes after."""
    try:
        return build(parse_object(body))
    except RecursionError:
        raise BadRequestError("The request body is nested too deeply.") from None


def parse_object(
    body: bytes, *, what: str = "The request body", unique: bool = False
) -> dict[str, Any]:
    """The JSON object of a request body, or whatever `what` calls it. `unique`: it names nothing
    twice. Raises BadRequestError."""
    pairs = _refuse_duplicates if unique else None
    try:
        value = json.loads(
            body.decode("utf-8-sig"), parse_constant=_refuse_constant, object_pairs_hook=pairs
        )
        if b"\\u" in body:
            _refuse_surrogates(value, what)
    except RecursionError:
        raise BadRequestError(f"{what} is nested too deeply.") from None
    except ValueError as error:
        reason = str(error).partition(";")[0]  # behind it Python says how its own limits are lifted
        raise BadRequestError(f"{what} is not valid JSON: {reason}") from None
    if not isinstance(value, dict):
        raise BadRequestError(f"{what} must be a JSON object, not {word(value)}.")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object names a key twice")
    return found


def _refuse_surrogates(value: object, what: str) -> None:
    """Half a character, as only an escape can spell it, has no token and no UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        message = f"{what} has an escape (\\ud800 to \\udfff) that is half a character."
        raise BadRequestError(message) from None
