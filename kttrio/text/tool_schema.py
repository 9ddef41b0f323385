"""Argument values written as plain text become JSON by the tool's own JSON schema.

Used by formats that write values without their type. Not here: checking a call against its
schema; a value that does not fit is sent on as a string.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Kinds = tuple[str, ...]
"""JSON types that a value may have, in the order in which they are tried."""

STRING: Kinds = ("string",)
NULLABLE_STRING: Kinds = ("null", "string")
JSON: Kinds = ("json",)
"""Any JSON: not of a schema, but for formats that mark such values themselves."""

_MAX_DEPTH = 16
_MAX_LITERAL_CHARS = 1 << 16
_MAX_EXACT = 1 << 53
_INTEGER = re.compile(r"[+-]?[0-9]+")
_KNOWN = frozenset({"null", "boolean", "integer", "number", "object", "array", "string"})


def argument_kinds(tools: Sequence[Mapping[str, Any]], function: str) -> dict[str, Kinds]:
    """Kinds of the function's named arguments; empty for an unknown function."""
    for description in descriptions(tools):
        if description.get("name") == function:
            root = description.get("parameters")
            properties = root.get("properties") if isinstance(root, Mapping) else None
            if not isinstance(properties, Mapping):
                return {}
            return {str(key): kinds(schema, root) for key, schema in properties.items()}
    return {}


def function_names(tools: Sequence[Mapping[str, Any]]) -> frozenset[str]:
    """Names of the functions that a model may call."""
    return frozenset(str(description.get("name")) for description in descriptions(tools))


def kinds(schema: object, root: object) -> Kinds:
    """Kinds a schema allows; null comes first, because any text is a string too."""
    found = list(dict.fromkeys(_kinds(schema, root, 0)))
    found.sort(key=lambda kind: kind != "null")
    return tuple(found) or STRING


def to_json(value: str, allowed: Kinds) -> str:
    """The value as JSON of the first kind that it can be read as, else as a JSON string."""
    for kind in allowed:
        text = _read(value, kind, allowed)
        if text is not None:
            return text
    return json.dumps(value, ensure_ascii=False)


def read_object(text: str) -> dict[str, Any] | None:
    """The JSON object that the text is; None if it is none."""
    try:
        value = _parse(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def descriptions(tools: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """The functions that the tools describe, with or without the `function` level."""
    for tool in tools:
        inner = tool.get("function")
        yield inner if isinstance(inner, Mapping) else tool


def _kinds(schema: object, root: object, depth: int) -> Iterator[str]:
    if not isinstance(schema, Mapping) or depth > _MAX_DEPTH:
        return
    if schema.get("nullable") is True:
        yield "null"
    declared = schema.get("type")
    for kind in declared if isinstance(declared, list) else [declared]:
        if isinstance(kind, str):
            yield kind if kind in _KNOWN else "string"
    for key in ("anyOf", "oneOf", "allOf"):
        members = schema.get(key)
        for member in members if isinstance(members, list) else []:
            yield from _kinds(member, root, depth + 1)
    if "$ref" in schema:
        yield from _kinds(follow(schema["$ref"], root), root, depth + 1)
    if declared is None:
        values = schema.get("enum", [schema["const"]] if "const" in schema else [])
        yield from (_kind_of(value) for value in values if isinstance(values, list))


def follow(reference: object, root: object) -> object:
    """What a reference inside the same schema points to; None for any other."""
    if not isinstance(reference, str) or not reference.startswith("#"):
        return None
    for part in reference[1:].split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        root = root.get(name) if isinstance(root, Mapping) else None
    return root


def _kind_of(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    for types, kind in ((int, "integer"), (float, "number"), (dict, "object"), (list, "array")):
        if isinstance(value, types):
            return kind
    return "string"


def _read(value: str, kind: str, allowed: Kinds) -> str | None:
    text = value.strip()
    match kind:
        case "string":
            return json.dumps(value, ensure_ascii=False)
        case "null":
            is_null = value == "null" if "string" in allowed else text.lower() in ("null", "none")
            return "null" if is_null else None
        case "boolean":
            return text.lower() if text.lower() in ("true", "false") else None
        case "integer" | "number":
            return _read_number(text, fraction=kind == "number")
        case "json":
            return _read_json(text)
        case _:
            return _read_container(text, dict if kind == "object" else list)


def _read_number(text: str, *, fraction: bool) -> str | None:
    try:
        if _INTEGER.fullmatch(text):
            return str(int(text))
        number = float(text)
    except ValueError:
        return None
    if "_" in text or not text.isascii() or abs(number) == float("inf") or number != number:
        return None
    if number.is_integer() and abs(number) < _MAX_EXACT:
        return str(int(number))
    return repr(number) if fraction else None


def _read_json(text: str) -> str | None:
    try:
        _parse(text)
    except ValueError:
        return None
    return text


def _read_container(text: str, wanted: type) -> str | None:
    """JSON stays as the model wrote it; a Python literal is written anew."""
    try:
        return text if isinstance(_parse(text), wanted) else None
    except ValueError:
        return _read_literal(text, wanted)


def _read_literal(text: str, wanted: type) -> str | None:
    if len(text) > _MAX_LITERAL_CHARS:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes in the model's text
            value = ast.literal_eval(text)
        if not isinstance(value, (wanted, tuple) if wanted is list else wanted):
            return None
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def _parse(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
