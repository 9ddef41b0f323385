"""Grammars of a tool's argument in formats that write strings as plain text, without quotes.

They allow what the parser will read as a value that the schema allows (tool_schema says how it is
read). Not here: the tags around a value (call_lark.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from kttrio.text import lark
from kttrio.text.grammar_error import GrammarError
from kttrio.text.tool_schema import JSON, STRING, Kinds, follow, kinds, to_json

Schema = Mapping[str, Any]

_NOTES = frozenset(
    (
        *("type", "nullable", "$defs", "definitions", "$schema", "$id", "$comment"),
        *("title", "description", "default", "example", "examples", "deprecated"),
        *("readOnly", "writeOnly", "contentEncoding", "contentMediaType"),
    )
)
"""They bound no value; `type` and `nullable` are read as kinds."""
_CHOICES = ("anyOf", "oneOf", "allOf")
_NOT_FOR_TEXT = frozenset({*_CHOICES, "not", "if", "then", "else", "$ref", "$dynamicRef"})
_MAX_HOPS = 16
_NUMBERS: Mapping[str, str] = MappingProxyType(
    {  # what the parser reads as the same number
        "integer": "/-?(?:0|[1-9][0-9]{0,17})/",
        "number": r"/-?(?:0|[1-9][0-9]{0,17})(?:\.[0-9]{1,17})?(?:[eE][+-]?[0-9]{1,2})?/",
    }
)
_PLAINLY_TEXT = r"/[^\s\[\]{}()0-9+\-.'\"tfniTFNI](?s:.*)/"
"""No number, container, truth value or null begins so."""


@dataclass(frozen=True, slots=True)
class Value:
    """What an argument may be: one of the three, where it is given."""

    words: tuple[str, ...] = ()
    """Exactly these texts, which are strings."""
    texts: tuple[str, ...] = ()
    """Bodies of terminals: text that is a string. An empty one takes any text."""
    others: tuple[str, ...] = ()
    """Bodies of rules: JSON of other kinds."""


def read_value(schema: object, root: Schema, *, told: bool) -> Value:
    """Of the argument with this schema, which is a part of `root`. `told`: the format says which
    values are strings. Raises GrammarError that names what cannot be enforced."""
    known = kinds(schema, root)
    if not told and "string" in known:
        known = known[: known.index("string") + 1]  # what the parser tries before it takes all
    words: list[str] = []
    texts: list[str] = []
    others: list[str] = []
    for member in _members(schema, root, 0):
        kind = member.get("type", "string")
        if "enum" in member or "const" in member:
            for one in _fixed_values(member):
                told_kind = STRING if isinstance(one, str) else JSON
                _add_fixed(one, told_kind if told else known, words, others)
        elif kind == "string":
            texts.append(_text(member, plainly=not told and set(known) - {"null", "string"}))
        elif kind in known:
            others.append(_other(member, root))
    return Value(tuple(words), tuple(texts), tuple(others))


def _members(schema: object, root: Schema, depth: int) -> Iterator[Schema]:
    """The schema's alternatives: each of one type or none, or of fixed values."""
    if not isinstance(schema, Mapping):
        schema = {}
    if depth > _MAX_HOPS:
        raise GrammarError("'$ref' leads too far")
    bounds = [key for key in schema if key not in _NOTES]
    if bounds == ["$ref"]:
        yield from _members(follow(schema["$ref"], root), root, depth + 1)
    elif len(bounds) == 1 and bounds[0] in _CHOICES:
        yield from _chosen(schema[bounds[0]], bounds[0], root, depth)
    elif isinstance(schema.get("type"), list) and not {"enum", "const"} & set(bounds):
        yield from ({**schema, "type": kind} for kind in schema["type"])
    else:
        yield schema
    if schema.get("nullable") is True:
        yield {"type": "null"}


def _chosen(members: object, keyword: str, root: Schema, depth: int) -> Iterator[Schema]:
    if not isinstance(members, list) or not members:
        raise GrammarError(f"'{keyword}' must be a list of schemas")
    found = [list(_members(member, root, depth + 1)) for member in members]
    if keyword == "allOf" and len(members) > 1:
        raise GrammarError("'allOf' of several schemas cannot be enforced")
    if keyword == "oneOf" and not _disjoint([one for several in found for one in several]):
        raise GrammarError("'oneOf' of schemas for the same type cannot be enforced: use 'anyOf'")
    for several in found:
        yield from several


def _disjoint(members: list[Schema]) -> bool:
    types = ["number" if one.get("type") == "integer" else one.get("type") for one in members]
    return None not in types and len(set(types)) == len(types)


def _fixed_values(member: Schema) -> list[Any]:
    extra = set(member) - _NOTES - {"enum", "const"}
    values = [member["const"]] if "const" in member else member["enum"]
    if extra or {"enum", "const"} <= set(member):
        raise GrammarError(f"'{min(extra, default='const')}' beside 'enum' cannot be enforced")
    if not isinstance(values, list) or not values:
        raise GrammarError("'enum' must be a list of values")
    return values


def _add_fixed(one: Any, known: Kinds, words: list[str], others: list[str]) -> None:
    """Leaves out what the parser would read as another value."""
    text = one if isinstance(one, str) else json.dumps(one, ensure_ascii=False)
    if json.loads(to_json(text, known)) != one:
        return
    if isinstance(one, str):
        words.append(text)
    else:
        others.append(lark.literal(text))


def _text(member: Schema, *, plainly: object) -> str:
    extra = _NOT_FOR_TEXT & set(member)
    if extra:
        raise GrammarError(f"'{min(extra)}' beside other keywords cannot be enforced for text")
    parts = [_PLAINLY_TEXT] if plainly else []
    if "minLength" in member or "maxLength" in member:
        parts.append(f"/(?s:.{{{member.get('minLength', 0)},{member.get('maxLength', '')}}})/")
    if "pattern" in member:
        parts.append(lark.searched(str(member["pattern"])))
    if "format" in member:
        parts.append(lark.string_format(str(member["format"])))
    return " & ".join(parts)


def _other(member: Schema, root: Schema) -> str:
    number = _NUMBERS.get(member["type"])
    if number is not None and set(member) <= _NOTES:
        return number
    definitions = {key: root[key] for key in ("$defs", "definitions") if key in root}
    return lark.json_value({**definitions, **member})
