"""Values as Triton's clients spell them: alone or in arrays of one, as tensors have them; objects
also in strings, and in some places numbers and booleans, too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from kttrio.server.bodies import parse_object
from kttrio.server.schema.kinds import Boolean, Integer, Kind, Many, Number, Strings, Tagged, Text
from kttrio.server.schema.records import Nested
from kttrio.server.schema.tokens import MAX_ID, Biases, TokenIds

INTEGER = re.compile(r"[+-]?[0-9]{1,20}")
NUMBER = re.compile(r"[+-]?([0-9]{1,20}(\.[0-9]{0,20})?|\.[0-9]{1,20})([eE][+-]?[0-9]{1,3})?")
BOOLEANS: Mapping[str, bool] = MappingProxyType({"true": True, "false": False})
LISTS = (Strings, TokenIds, Many)
OBJECTS = (Biases, Nested, Tagged)
DEPTH = 2
"""Dimensions of a tensor with one element: some clients have one for a batch."""


@dataclass(frozen=True, slots=True)
class Loose:
    """A kind whose values stand alone or in arrays of one. Objects may stand in strings, which are
    looked into later."""

    kind: Kind

    def read(self, value: Any, path: str) -> Any:
        if isinstance(self.kind, LISTS):
            return self.kind.read(listed(self.kind, value, path), path)
        value = alone(value)
        in_string = isinstance(value, str) and isinstance(self.kind, OBJECTS)
        return value if in_string else self.kind.read(value, path)

    def schema(self) -> dict[str, Any]:
        if isinstance(self.kind, LISTS):
            item, items = _items(self.kind)
            return {"anyOf": [item, items, _single(items)]}
        one = self.kind.schema()
        if isinstance(self.kind, OBJECTS):
            one = {"anyOf": [one, Text().schema()]}
        return {"anyOf": [one, _single(one), _single(_single(one))]}


def _items(kind: Strings | TokenIds | Many) -> tuple[dict[str, Any], dict[str, Any]]:
    """An item and an array of them."""
    if isinstance(kind, Strings):
        return Text().schema(), Many(Text(), most=kind.most).schema()
    if isinstance(kind, Many):
        return kind.kind.schema(), kind.schema()
    return Integer(0, MAX_ID).schema(), kind.schema()


def _single(told: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": told, "minItems": 1, "maxItems": 1}


def alone(value: Any) -> Any:
    """What stands alone in an array, or two."""
    for _ in range(DEPTH):
        if isinstance(value, list) and len(value) == 1:
            (value,) = value
    return value


def listed(kind: Strings | TokenIds | Many, value: Any, path: str) -> list[Any]:
    """The items of an array, which may stand alone in another; or of a value that is the only one.
    An empty string is none: it stands where a tensor must have an element."""
    if not isinstance(value, list):
        value = [value]
    elif len(value) == 1 and isinstance(value[0], list):
        (value,) = value
    if isinstance(kind, Strings):
        return [text for text in Many(Text(), most=kind.most).read(value, path) if text]
    return list(value)


def spelled(kind: Kind, value: Any, path: str, *, words: bool) -> Any:
    """The value as `kind` reads it. `words`: strings may stand for numbers and booleans. Raises
    BadRequestError for a string that is no object."""
    if isinstance(kind, LISTS):
        items = listed(kind, value, path)
        ids = words and isinstance(kind, TokenIds)
        return [_word(Integer(0), item) for item in items] if ids else items
    value = alone(value)
    if isinstance(kind, OBJECTS) and isinstance(value, str):
        return parse_object(value.encode(errors="replace"), what=f"'{path}'")
    return _word(kind, value) if words else value


def _word(kind: Kind, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if isinstance(kind, Integer):
        return _number(value, INTEGER, int)
    if isinstance(kind, Number):
        return _number(value, NUMBER, float)
    return BOOLEANS.get(value.lower(), value) if isinstance(kind, Boolean) else value


def _number(value: str, spelling: re.Pattern[str], number: Callable[[str], float]) -> Any:
    return number(value) if spelling.fullmatch(value) else value
