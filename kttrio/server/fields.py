"""Reading a request's JSON: strict types, ranges, and a complaint that names the field.

Knows no protocol. `null` counts as absent, as clients send it for their own defaults.
"""

from __future__ import annotations

import json
from math import isfinite
from typing import Any, NoReturn

from kttrio.server.errors import BadRequestError

INT64_MAX = 2**63 - 1


def parse_object(body: bytes) -> Fields:
    """The JSON object of a request body."""
    try:
        value = json.loads(body.decode(), parse_constant=_refuse_constant)
    except RecursionError:
        raise BadRequestError("The request body is nested too deeply.") from None
    except ValueError as error:
        raise BadRequestError(f"The request body is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadRequestError(f"The request body must be a JSON object, not {_kind(value)}.")
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


def _kind(value: object) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")


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

    def _typed(self, name: str, kinds: type | tuple[type, ...], wanted: str) -> Any:
        value = self.values.get(name)
        is_wrong = not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool)
        if value is not None and is_wrong:
            self.refuse(name, f"must be {wanted}, not {_kind(value)}", "invalid_type")
        return value

    def boolean(self, name: str, default: bool) -> bool:
        value = self._typed(name, bool, "a boolean")
        return default if value is None else bool(value)

    def string(self, name: str) -> str | None:
        value: str | None = self._typed(name, str, "a string")
        return value

    def required_string(self, name: str) -> str:
        value = self.string(name)
        if not value:
            self.refuse(name, "must be a string that is not empty", "missing_required_parameter")
        return value

    def integer(self, name: str, *, low: int, high: int = INT64_MAX) -> int | None:
        value = self._typed(name, int, "an integer")
        if value is not None and not low <= value <= high:
            self.refuse(name, f"must lie between {low} and {high}", "invalid_value")
        return None if value is None else int(value)

    def number(self, name: str, *, low: float, high: float, above: bool = False) -> float | None:
        """A number in [low, high], or in (low, high] with `above`."""
        value = self._typed(name, (int, float), "a number")
        if value is None:
            return None
        if abs(value) > INT64_MAX or not isfinite(value) or not low <= value <= high:
            self.refuse(name, f"must lie between {low:g} and {high:g}", "invalid_value")
        if above and value == low:
            self.refuse(name, f"must be above {low:g}", "invalid_value")
        return float(value)

    def array(self, name: str) -> list[Any] | None:
        value: list[Any] | None = self._typed(name, list, "an array")
        return value

    def object(self, name: str) -> Fields | None:
        value = self._typed(name, dict, "an object")
        return None if value is None else Fields(value, self.path(name))

    def objects(self, name: str) -> list[Fields]:
        """An array of objects; empty when absent."""
        items = []
        for index, value in enumerate(self.array(name) or ()):
            path = f"{name}[{index}]"
            if not isinstance(value, dict):
                self.refuse(path, f"must be an object, not {_kind(value)}", "invalid_type")
            items.append(Fields(value, self.path(path)))
        return items

    def strings(self, name: str, *, most: int) -> tuple[str, ...]:
        """A string or an array of strings, none of them empty."""
        value = self.values.get(name)
        values = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(text, str) for text in values):
            self.refuse(name, "must be a string or an array of strings", "invalid_type")
        if "" in values:
            self.refuse(name, "must not have an empty string", "invalid_value")
        if len(values) > most:
            self.refuse(name, f"must have at most {most} strings", "invalid_value")
        return tuple(values)

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
