"""Values that a JSON Schema of our records describes, and values a step beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hypothesis import strategies as st

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from([0, 1, 1.0, -1, 0.5, "", "text", "auto", "user", "function", 2**63])
    | st.text(max_size=5)
)
ANY = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)
LENGTH = 3
"""Arrays are not made longer, unless they must be."""


def valid(schema: Mapping[str, Any]) -> st.SearchStrategy[Any]:
    """Values that the schema describes."""
    for word in ("anyOf", "oneOf"):
        if word in schema:
            return st.one_of([valid(one) for one in schema[word]])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if "const" in schema:
        return st.just(schema["const"])
    kinds = schema.get("type")
    if isinstance(kinds, list):
        return st.one_of([valid({**schema, "type": kind}) for kind in kinds])
    return _typed(kinds, schema)


def _typed(kind: str | None, schema: Mapping[str, Any]) -> st.SearchStrategy[Any]:
    if kind == "object":
        return _objects(schema)
    if kind == "array":
        least = schema.get("minItems", 0)
        most = min(schema.get("maxItems", LENGTH), max(LENGTH, least))
        items = schema.get("items", {})
        inner = ANY.filter(lambda value: value is not None) if "not" in items else valid(items)
        return st.lists(inner, min_size=least, max_size=most)
    if kind == "string":
        if "pattern" in schema:
            return st.from_regex(schema["pattern"], fullmatch=True)
        least = schema.get("minLength", 0)
        return st.text(min_size=least, max_size=least + 5)
    if kind == "integer":
        return st.integers(schema.get("minimum"), schema.get("maximum"))
    if kind == "number":
        return _numbers(schema)
    return {"boolean": st.booleans(), "null": st.none(), None: ANY}[kind]


def _numbers(schema: Mapping[str, Any]) -> st.SearchStrategy[Any]:
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    return st.floats(
        low,
        schema.get("maximum"),
        exclude_min="exclusiveMinimum" in schema,
        allow_nan=False,
        allow_infinity=False,
    )


def _objects(schema: Mapping[str, Any]) -> st.SearchStrategy[Any]:
    told = schema.get("properties", {})
    if not told:
        names = valid({"type": "string", **schema.get("propertyNames", {})})
        values = valid(schema.get("additionalProperties", {}))
        return st.dictionaries(names, values, max_size=LENGTH)
    required = set(schema.get("required", ()))
    # a body has a hundred fields, and an example a few of them
    return st.lists(st.sampled_from(sorted(told)), max_size=4, unique=True).flatmap(
        lambda names: st.fixed_dictionaries(
            {name: valid(told[name]) for name in {*names, *required}}
        )
    )


@st.composite
def nearly_valid(draw: st.DrawFn, schema: Mapping[str, Any]) -> Any:
    """A value that the schema describes, with one place in it changed to anything."""
    value = draw(valid(schema))
    path = draw(st.sampled_from(_places(value)))
    return _replaced(value, path, draw(ANY))


def _places(value: Any) -> list[tuple[Any, ...]]:
    """The paths of everything in it, its own first."""
    inner: Sequence[Any] = ()
    if isinstance(value, dict):
        inner = list(value)
    elif isinstance(value, list):
        inner = range(len(value))
    return [(), *((key, *path) for key in inner for path in _places(value[key]))]


def _replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    changed = dict(value) if isinstance(value, dict) else list(value)
    changed[path[0]] = _replaced(value[path[0]], path[1:], new)
    return changed
