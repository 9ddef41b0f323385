"""What values of a request's JSON may be: each kind reads a value, and says the same as a schema.

A complaint names the field and what it must be. Records of fields are in records.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite
from types import MappingProxyType
from typing import Any, NoReturn, Protocol

from kttrio.server.errors import BadRequestError

INT64_MAX = 2**63 - 1
MAX_PATH = 200
"""Characters of a field's name in a complaint."""


class Kind(Protocol):
    """One kind of value. `null` never comes here: it counts as absent."""

    def read(self, value: Any, path: str) -> Any:
        """The value as the server uses it. Raises BadRequestError that blames `path`."""
        ...

    def schema(self) -> dict[str, Any]:
        """The same as JSON Schema: what it accepts `read` accepts, and nothing else."""
        ...


def refuse(path: str, complaint: str, code: str | None = "invalid_value") -> NoReturn:
    """Raise the 400 that blames this field: `complaint` follows its name."""
    path = path[:MAX_PATH]  # clients may have made up names of any length
    raise BadRequestError(f"'{path}' {complaint}.", path, code)


TYPE_WORDS: Mapping[type, str] = MappingProxyType(
    {dict: "an object", list: "an array", str: "a string", bool: "a boolean"}
)


def word(value: object) -> str:
    """What a JSON value is, for complaints."""
    return "null" if value is None else TYPE_WORDS.get(type(value), "a number")


def check_type(value: Any, kinds: type | tuple[type, ...], wanted: str, path: str) -> None:
    """Complain of another type; `true` is no number."""
    if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
        refuse(path, f"must be {wanted}, not {word(value)}", "invalid_type")


@dataclass(frozen=True, slots=True)
class Boolean:
    def read(self, value: Any, path: str) -> bool:
        check_type(value, bool, "a boolean", path)
        return bool(value)

    def schema(self) -> dict[str, Any]:
        return {"type": "boolean"}


def whole(value: Any) -> int | None:
    """The integer that a JSON number is, however it is spelled: 5 and 5.0 are the same."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if type(value) is int else None


@dataclass(frozen=True, slots=True)
class Integer:
    low: int
    high: int = INT64_MAX

    def read(self, value: Any, path: str) -> int:
        number = whole(value)
        if number is None:
            given = f"{value:g}" if isinstance(value, float) else word(value)
            refuse(path, f"must be an integer, not {given}", "invalid_type")
        if not self.low <= number <= self.high:
            refuse(path, self._limits(number))
        return number

    def _limits(self, number: int) -> str:
        if self.low == self.high:
            return f"must be {self.low}"
        if number < self.low and self.high == INT64_MAX:  # which is nobody's own limit
            return f"must be at least {self.low}"
        return f"must lie between {self.low} and {self.high}"

    def schema(self) -> dict[str, Any]:
        return {"type": "integer", "minimum": self.low, "maximum": self.high}


@dataclass(frozen=True, slots=True)
class Number:
    """A number in [low, high], or in (low, high] with `above`."""

    low: float
    high: float
    above: bool = False

    def read(self, value: Any, path: str) -> float:
        check_type(value, (int, float), "a number", path)
        if abs(value) > INT64_MAX or not isfinite(value) or not self.low <= value <= self.high:
            refuse(path, f"must lie between {self.low:g} and {self.high:g}")
        if self.above and value == self.low:
            refuse(path, f"must be above {self.low:g}")
        return float(value)

    def schema(self) -> dict[str, Any]:
        least = "exclusiveMinimum" if self.above else "minimum"
        return {"type": "number", least: self.low, "maximum": self.high}


@dataclass(frozen=True, slots=True)
class Text:
    """A string; with `least` 1 not an empty one."""

    least: int = 0

    def read(self, value: Any, path: str) -> str:
        check_type(value, str, "a string", path)
        if len(value) < self.least:
            refuse(path, "must be a string that is not empty")
        return str(value)

    def schema(self) -> dict[str, Any]:
        return {"type": "string", **({"minLength": self.least} if self.least else {})}


@dataclass(frozen=True, slots=True)
class OneOf:
    """One of some words."""

    words: tuple[str, ...]

    def read(self, value: Any, path: str) -> str:
        check_type(value, str, "a string", path)
        if value not in self.words:
            refuse(path, f"must be one of {', '.join(self.words)}")
        return str(value)

    def schema(self) -> dict[str, Any]:
        return {"type": "string", "enum": list(self.words)}


@dataclass(frozen=True, slots=True)
class Strings:
    """A string or an array of strings, none of them empty; read as a tuple."""

    most: int

    def read(self, value: Any, path: str) -> tuple[str, ...]:
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(text, str) for text in values):
            refuse(path, "must be a string or an array of strings", "invalid_type")
        if "" in values:
            refuse(path, "must not have an empty string")
        if len(values) > self.most:
            refuse(path, f"must have at most {self.most} strings")
        return tuple(values)

    def schema(self) -> dict[str, Any]:
        text = {"type": "string", "minLength": 1}
        return {"anyOf": [text, {"type": "array", "items": text, "maxItems": self.most}]}


@dataclass(frozen=True, slots=True)
class Many:
    """An array; read as a tuple."""

    kind: Kind
    least: int = 0
    most: int | None = None

    def read(self, value: Any, path: str) -> tuple[Any, ...]:
        check_type(value, list, "an array", path)
        if len(value) < self.least:
            few = "not be empty" if self.least == 1 else f"have at least {self.least} items"
            refuse(path, f"must {few}", "missing_required_parameter")
        if self.most is not None and len(value) > self.most:
            refuse(path, f"must have at most {self.most} items")
        return tuple(self._items(value, path))

    def _items(self, values: list[Any], path: str) -> list[Any]:
        items = []
        for index, value in enumerate(values):
            place = f"{path}[{index}]"
            if value is None:
                refuse(place, "must not be null", "invalid_type")
            items.append(self.kind.read(value, place))
        return items

    def schema(self) -> dict[str, Any]:
        limits = {"minItems": self.least} if self.least else {}
        if self.most is not None:
            limits["maxItems"] = self.most
        items = self.kind.schema() or {"not": {"type": "null"}}
        return {"type": "array", "items": items, **limits}


@dataclass(frozen=True, slots=True)
class Either:
    """Values of several types: the type, one of `TYPE_WORDS`, tells the kind."""

    kinds: Mapping[type, Kind]

    def read(self, value: Any, path: str) -> Any:
        kind = self.kinds.get(type(value))
        if kind is None:
            wanted = " or ".join(TYPE_WORDS[one] for one in self.kinds)
            refuse(path, f"must be {wanted}, not {word(value)}", "invalid_type")
        return kind.read(value, path)

    def schema(self) -> dict[str, Any]:
        return {"anyOf": [kind.schema() for kind in self.kinds.values()]}


@dataclass(frozen=True, slots=True)
class Tagged:
    """An object that says in its field `tag` of which kind it is; each of `kinds` takes objects."""

    tag: str
    kinds: Mapping[str, Kind]
    default: str | None = None
    """What an object is that does not say it."""
    mend: str = ""
    """What to send instead of any other kind."""

    def read(self, value: Any, path: str) -> Any:
        check_type(value, dict, "an object", path)
        name, place = value.get(self.tag), f"{path}.{self.tag}"
        name = self.default if name is None else name
        if name is None:
            refuse(place, "is missing", "missing_required_parameter")
        kind = self.kinds.get(name) if isinstance(name, str) else None
        if kind is None:
            given = f"'{name[:40]}'" if isinstance(name, str) else word(name)
            mend = f": {self.mend}" if self.mend else ""
            refuse(place, f"must be one of {', '.join(self.kinds)}, not {given}{mend}")
        return kind.read(value, path)

    def schema(self) -> dict[str, Any]:
        return {"oneOf": [self._tagged(name, kind) for name, kind in self.kinds.items()]}

    def _tagged(self, name: str, kind: Kind) -> dict[str, Any]:
        told, said = kind.schema(), name != self.default
        word = {"const": name} if said else {"enum": [name, None]}
        properties = {**told.get("properties", {}), self.tag: word}
        required = sorted({*told.get("required", ()), *([self.tag] if said else [])})
        return {**told, "properties": properties, **({"required": required} if required else {})}


@dataclass(frozen=True, slots=True)
class Object:
    """Any JSON object, as it is."""

    def read(self, value: Any, path: str) -> dict[str, Any]:
        check_type(value, dict, "an object", path)
        return dict(value)

    def schema(self) -> dict[str, Any]:
        return {"type": "object"}


@dataclass(frozen=True, slots=True)
class Anything:
    """Any JSON value, as it is."""

    def read(self, value: Any, path: str) -> Any:
        return value

    def schema(self) -> dict[str, Any]:
        return {}


@dataclass(frozen=True, slots=True)
class Told:
    """A kind of its own: `reader` reads it and `told` is what it accepts, as JSON Schema."""

    reader: Callable[[Any, str], Any]
    told: Mapping[str, Any]

    def read(self, value: Any, path: str) -> Any:
        return self.reader(value, path)

    def schema(self) -> dict[str, Any]:
        return dict(self.told)
