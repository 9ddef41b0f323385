"""Reading a request's JSON: strict types, ranges, and a complaint that names the field.

Knows no protocol. `null` counts as absent, as clients send it for their own defaults.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn

from kttrio.server.errors import BadRequestError
from kttrio.server.kinds import (
    INT64_MAX,
    Boolean,
    Integer,
    Kind,
    Number,
    Object,
    Strings,
    Text,
    check_type,
    word,
)


def parse_object(body: bytes) -> Fields:
    """The JSON object of a request body."""
    try:
        value = json.loads(body.decode(), parse_constant=_refuse_constant)
    except RecursionError:
        raise BadRequestError("The request body is nested too deeply.") from None
    except ValueError as error:
        raise BadRequestError(f"The request body is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadRequestError(f"The request body must be a JSON object, not {word(value)}.")
    if b"\\u" in body:
        _refuse_surrogates(value)
    return Fields(value)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _refuse_surrogates(value: object) -> None:
    """Half a character, as only an escape can spell it, has no token and no UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        message = "The request body has an escape (\\ud800 to \\udfff) that is half a character."
        raise BadRequestError(message) from None
    except RecursionError:
        raise BadRequestError("The request body is nested too deeply.") from None


class Fields:
    """One JSON object, read field by field. `path` is where it stands in the body."""

    def __init__(self, values: dict[str, Any], path: str = "") -> None:
        self.values = values
        self._path = path

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def path(self, name: str) -> str:
        """The field's full name in the body, for complaints."""
        return f"{self._path}.{name}" if self._path else name

    def refuse(self, name: str, complaint: str, code: str | None = None) -> NoReturn:
        """Raise the 400 that blames this field: `complaint` follows its name."""
        path = self.path(name)
        raise BadRequestError(f"'{path}' {complaint}.", path, code)

    def _read(self, name: str, kind: Kind) -> Any:
        value = self.values.get(name)
        return None if value is None else kind.read(value, self.path(name))

    def boolean(self, name: str, default: bool) -> bool:
        value = self._read(name, Boolean())
        return default if value is None else bool(value)

    def string(self, name: str) -> str | None:
        value: str | None = self._read(name, Text())
        return value

    def required_string(self, name: str) -> str:
        value = self.string(name)
        if not value:
            self.refuse(name, "must be a string that is not empty", "missing_required_parameter")
        return value

    def integer(self, name: str, *, low: int, high: int = INT64_MAX) -> int | None:
        value: int | None = self._read(name, Integer(low, high))
        return value

    def number(self, name: str, *, low: float, high: float, above: bool = False) -> float | None:
        """A number in [low, high], or in (low, high] with `above`."""
        value: float | None = self._read(name, Number(low, high, above))
        return value

    def array(self, name: str) -> list[Any] | None:
        value: list[Any] | None = self.values.get(name)
        if value is not None:
            check_type(value, list, "an array", self.path(name))
        return value

    def object(self, name: str) -> Fields | None:
        value = self._read(name, Object())
        return None if value is None else Fields(value, self.path(name))

    def objects(self, name: str) -> list[Fields]:
        """An array of objects; empty when absent."""
        items = []
        for index, value in enumerate(self.array(name) or ()):
            path = f"{name}[{index}]"
            check_type(value, dict, "an object", self.path(path))
            items.append(Fields(value, self.path(path)))
        return items

    def strings(self, name: str, *, most: int) -> tuple[str, ...]:
        """A string or an array of strings, none of them empty."""
        value: tuple[str, ...] | None = self._read(name, Strings(most))
        return value or ()

    def token_ids(self, name: str, *, vocab_size: int) -> tuple[int, ...]:
        """An array of token ids; empty when absent."""
        values = self.array(name) or []
        for value in values:
            if not is_token_id(value, vocab_size):
                complaint = f"must be an array of token ids between 0 and {vocab_size - 1}"
                self.refuse(name, complaint, "invalid_value")
        return tuple(values)


def is_token_id(value: object, vocab_size: int) -> bool:
    """Whether a JSON value is an id of the vocabulary (`true` is not)."""
    return type(value) is int and 0 <= value < vocab_size
