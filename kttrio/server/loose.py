"""Values as Triton's clients spell them: alone or in arrays of one, as tensors have them; numbers,
booleans and objects also in strings.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from kttrio.server.bodies import parse_object
from kttrio.server.kinds import Boolean, Integer, Kind, Many, Number, Strings, Tagged
from kttrio.server.openai_sampling import MAX_ID, Biases, TokenIds
from kttrio.server.records import Nested
from kttrio.server.tensors import flat

INTEGER = re.compile(r"[+-]?[0-9]{1,20}")
NUMBER = re.compile(r"[+-]?([0-9]{1,20}(\.[0-9]{0,20})?|\.[0-9]{1,20})([eE][+-]?[0-9]{1,3})?")
BOOLEANS: Mapping[str, bool] = MappingProxyType({"true": True, "false": False})
LISTS = (Strings, TokenIds, Many)
OBJECTS = (Biases, Nested, Tagged)


@dataclass(frozen=True, slots=True)
class Loose:
    """A kind whose values may be spelled so."""

    kind: Kind

    def read(self, value: Any, path: str) -> Any:
        return self.kind.read(self.spelled(value, path), path)

    def spelled(self, value: Any, path: str) -> Any:
        """The value as `kind` reads it. Raises BadRequestError for a string that is no object."""
        if isinstance(self.kind, LISTS):
            return self._items(value)
        value = alone(value)
        if not isinstance(value, str):
            return value
        if isinstance(self.kind, OBJECTS):
            return parse_object(value.encode(errors="replace"), what=f"'{path}'")
        return self._word(value)

    def _items(self, value: Any) -> list[Any]:
        values = list(flat(value)) if isinstance(value, list) else [value]
        if isinstance(self.kind, TokenIds):
            return [_number(item, INTEGER, int) for item in values]
        # an empty string stands where a tensor must have an element
        return [item for item in values if item != ""]

    def _word(self, value: str) -> Any:
        if isinstance(self.kind, Integer):
            return _number(value, INTEGER, int)
        if isinstance(self.kind, Number):
            return _number(value, NUMBER, float)
        if isinstance(self.kind, Boolean):
            return BOOLEANS.get(value.lower(), value)
        return value

    def schema(self) -> dict[str, Any]:
        """Of arrays as deep as clients send them; a number's range is not told of its string."""
        if isinstance(self.kind, LISTS):
            item = self._item()
            return {"anyOf": [item, _array({"anyOf": [item, _array(item)]})]}
        told, spelled = self.kind.schema(), self._spelling()
        one = {"anyOf": [told, {"type": "string", **spelled}]} if spelled else told
        return {"anyOf": [one, _array(one, 1), _array(_array(one, 1), 1)]}

    def _item(self) -> dict[str, Any]:
        if isinstance(self.kind, TokenIds):
            return Loose(Integer(0, MAX_ID)).schema()
        return self.kind.kind.schema() if isinstance(self.kind, Many) else {"type": "string"}

    def _spelling(self) -> dict[str, Any] | None:
        if isinstance(self.kind, Integer):
            return {"pattern": f"^{INTEGER.pattern}$"}
        if isinstance(self.kind, Number):
            return {"pattern": f"^{NUMBER.pattern}$"}
        if isinstance(self.kind, Boolean):
            return {"pattern": "^([tT][rR][uU][eE]|[fF][aA][lL][sS][eE])$"}
        return {"contentMediaType": "application/json"} if isinstance(self.kind, OBJECTS) else None


def _array(told: dict[str, Any], length: int | None = None) -> dict[str, Any]:
    limits = {} if length is None else {"minItems": length, "maxItems": length}
    return {"type": "array", "items": told, **limits}


def alone(value: Any) -> Any:
    """What stands alone in arrays: tensors have them where others have a value."""
    while isinstance(value, list) and len(value) == 1:
        (value,) = value
    return value


def _number(value: Any, spelling: re.Pattern[str], number: Callable[[str], float]) -> Any:
    """`value`, or the number that it spells."""
    spelled = isinstance(value, str) and spelling.fullmatch(value)
    return number(value) if spelled else value
