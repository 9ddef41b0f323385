"""JSON schemas as their authors mean them: an object has the properties that they list, and an
integer fits into 64 bits.

Standard JSON schema lets any others come too, and digits without end, and a weak model goes on
inventing some for ever.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_COMBINING = frozenset(
    (
        *("allOf", "oneOf", "not", "if", "then", "else", "$dynamicRef"),
        *("dependentSchemas", "dependentRequired", "dependencies", "unevaluatedProperties"),
    )
)
"""Several schemas speak of one object: what one of them lists another may add to."""
_ELSEWHERE = frozenset(("$ref", "anyOf"))
"""They combine as well, where one object's schema has more than them."""
_OF_OBJECTS = frozenset(
    ("properties", "required", "additionalProperties", "patternProperties", "minProperties")
)
_OWN_RULE = frozenset(
    ("additionalProperties", "patternProperties", "minProperties", "propertyNames", "enum", "const")
)
_LEAST, _MOST = ("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")
MAX_INTEGER = 2**63 - 1024
"""The largest of 64 bits that a double holds exactly, which is what grammars reckon with."""
_BY_NAME = frozenset(("properties", "patternProperties", "$defs", "definitions"))
_IN_TURN = frozenset(("anyOf", "prefixItems"))
_ALONE = frozenset(("items", "additionalProperties"))


def bounded(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema whose objects have no properties but those that they list, if they list some and
    do not speak of others themselves, and whose integers have an end. What fits it fits the given
    one, too.

    One that combines schemas comes back as it is. Raises RecursionError where it is too deep.
    """
    return schema if _combines(schema) else _bound(schema)


def _combines(schema: object) -> bool:
    """Whether schemas are combined anywhere. A property with such a name is as good a reason."""
    left = [schema]
    while left:
        part = left.pop()
        if isinstance(part, Mapping):
            elsewhere = part.keys() & _ELSEWHERE
            mixed = len(elsewhere) > 1 or (elsewhere and part.keys() & _OF_OBJECTS)
            if mixed or part.keys() & _COMBINING:
                return True
            left += part.values()
        elif isinstance(part, list):
            left += part
    return False


def _bound(schema: Any) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    parts = {key: _bound_part(key, value) for key, value in schema.items()}
    shut = {"additionalProperties": False} if _lists_all(schema) else {}
    return {**parts, **shut, **_integer_limits(schema)}


def _bound_part(key: str, value: Any) -> Any:
    if key in _BY_NAME and isinstance(value, Mapping):
        return {name: _bound(part) for name, part in value.items()}
    if key in _IN_TURN and isinstance(value, list):
        return [_bound(part) for part in value]
    return _bound(value) if key in _ALONE else value


def _integer_limits(schema: Mapping[str, Any]) -> dict[str, int]:
    """Those that an integer's schema leaves out."""
    if schema.get("type") != "integer" or schema.keys() & {"enum", "const"}:
        return {}
    given = [schema[name] for name in (*_LEAST, *_MOST) if name in schema]
    if not all(isinstance(end, int | float) and abs(end) <= MAX_INTEGER for end in given):
        return {}
    ends = ((_LEAST, -MAX_INTEGER), (_MOST, MAX_INTEGER))
    return {names[0]: end for names, end in ends if not schema.keys() & set(names)}


def _lists_all(schema: Mapping[str, Any]) -> bool:
    listed, required = schema.get("properties"), schema.get("required", [])
    if not listed or not isinstance(listed, Mapping) or _OWN_RULE & schema.keys():
        return False
    return isinstance(required, list) and all(
        isinstance(name, str) and name in listed for name in required
    )
