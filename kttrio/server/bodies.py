"""A request's body as JSON: how it is read, and what is no JSON that could be served.

Knows no protocol; which fields a body has stands in its record.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from quart import request

from kttrio.server.errors import BadRequestError
from kttrio.server.off_loop import off_loop
from kttrio.server.schema.kinds import word

T = TypeVar("T")


async def read_body(build: Callable[[dict[str, Any]], T]) -> tuple[T, int]:
    """What `build` makes of the request's JSON object, whatever its content type says, and the
    length of the body in bytes. Long ones are read in a thread. Raises ApiError."""
    body = await request.get_data(cache=False, as_text=False, parse_form_data=False)
    return await off_loop(len(body), lambda: _build(body, build)), len(body)


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
        value = json.loads(body.decode(), parse_constant=_refuse_constant, object_pairs_hook=pairs)
        if b"\\u" in body:
            _refuse_surrogates(value, what)
    except RecursionError:
        raise BadRequestError(f"{what} is nested too deeply.") from None
    except ValueError as error:
        raise BadRequestError(f"{what} is not valid JSON: {error}") from None
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
