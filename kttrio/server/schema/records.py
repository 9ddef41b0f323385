"""Request bodies as records: one declaration reads a body, describes it, and lists what is refused.

A body is a frozen dataclass whose fields are made by `given`, `refused` or `ignored`. `read` makes
the record from JSON, `schema` its JSON Schema for /openapi.json, and `stances` the lines of the
README's table. What depends on two fields, or on the model, is checked by the protocol afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any, NamedTuple, TypeVar

from kttrio.server.schema.kinds import Kind, check_type, refuse

T = TypeVar("T")

EMPTY: tuple[Any, ...] = (None, False, 0, "", [], {})
"""What asks for nothing."""


class Stance(StrEnum):
    """What the server does with a field."""

    DONE = "done"
    REFUSED = "refused"
    IGNORED = "ignored"


class FieldStance(NamedTuple):
    """A field as the README tells it."""

    name: str
    stance: Stance
    help: str


def given(kind: Kind, help: str, *, default: Any = None, required: bool = False) -> Any:
    """A field that is served. `default` stands for an absent one, or null."""
    told = {"kind": kind, "help": help, "stance": Stance.DONE, "required": required}
    return field(default=default, metadata=told)


def refused(help: str, *, harmless: tuple[Any, ...] = ()) -> Any:
    """A field that would change the answer and is not served: 400, with `help` as the reason, which
    follows "is not supported: ". Harmless are false, empty and the values listed."""
    told = {"help": help, "stance": Stance.REFUSED, "harmless": harmless}
    return field(default=None, init=False, metadata=told)


def ignored(help: str) -> Any:
    """A field that changes nothing about the answer: taken, and not looked at."""
    return field(default=None, init=False, metadata={"help": help, "stance": Stance.IGNORED})


def read(record: type[T], value: Any, path: str = "") -> T:
    """The record of a JSON object at `path` of the body. Unknown fields are ignored. Raises
    BadRequestError that names the field at fault."""
    check_type(value, dict, "an object", path or "body")
    found = {}
    for one in fields(record):  # type: ignore[arg-type]  # a dataclass by the rule above
        told, place = one.metadata, f"{path}.{one.name}" if path else one.name
        entry = value.get(one.name)
        if told["stance"] is Stance.REFUSED and not _harmless(entry, told["harmless"]):
            refuse(place, f"is not supported: {told['help']}", "unsupported_value")
        if told["stance"] is not Stance.DONE:
            continue
        if entry is not None:
            found[one.name] = told["kind"].read(entry, place)
        elif told["required"]:
            refuse(place, "is missing", "missing_required_parameter")
    return record(**found)


def _harmless(entry: Any, values: tuple[Any, ...]) -> bool:
    """Whether leaving the field out means the same. `true` is not 1."""
    return not entry or any(
        entry == value and isinstance(entry, bool) is isinstance(value, bool) for value in values
    )


def schema(record: type) -> dict[str, Any]:
    """The record as JSON Schema (draft 2020-12, as OpenAPI 3.1 has it)."""
    properties: dict[str, Any] = {}
    required = []
    for one in fields(record):
        told = one.metadata
        if told["stance"] is Stance.DONE:
            properties[one.name] = _property(told["kind"], told["help"], told["required"])
        elif told["stance"] is Stance.REFUSED:
            harmless = [*EMPTY, *(value for value in told["harmless"] if value)]
            about = f"Not supported: {told['help']}"
            properties[one.name] = {"enum": harmless, "description": about}
        if told.get("required"):
            required.append(one.name)
    return {
        "type": "object",
        "properties": properties,
        **({"required": required} if required else {}),
    }


def _property(kind: Kind, help: str, required: bool) -> dict[str, Any]:
    told = kind.schema()
    if not required and told:
        told = {"anyOf": [told, {"type": "null"}]}
    return {**told, "description": help}


def stances(record: type) -> Iterator[FieldStance]:
    """What becomes of each field, in the order of their declaration."""
    for one in fields(record):
        yield FieldStance(one.name, one.metadata["stance"], one.metadata["help"])


@dataclass(frozen=True, slots=True)
class Nested:
    """The kind of a field that is a record itself."""

    record: type

    def read(self, value: Any, path: str) -> Any:
        return read(self.record, value, path)

    def schema(self) -> dict[str, Any]:
        return schema(self.record)


@dataclass(frozen=True, slots=True)
class Checked:
    """The kind of an object that must be such a record, and is kept as it came."""

    record: type

    def read(self, value: Any, path: str) -> dict[str, Any]:
        read(self.record, value, path)
        return dict(value)

    def schema(self) -> dict[str, Any]:
        return schema(self.record)
