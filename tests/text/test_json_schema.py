"""Which objects are closed, and that nothing comes to fit that did not fit before."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kttrio.text.json_schema import closed

A, B = {"properties": {"a": {"type": "integer"}}}, {"properties": {"b": True}}
SHUT: dict[str, Any] = {"additionalProperties": False}


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        (A, {**A, **SHUT}),
        ({"properties": {"x": A}}, {"properties": {"x": {**A, **SHUT}}, **SHUT}),
        (
            {"items": A, "prefixItems": [B]},
            {"items": {**A, **SHUT}, "prefixItems": [{**B, **SHUT}]},
        ),
        ({"anyOf": [A, B]}, {"anyOf": [{**A, **SHUT}, {**B, **SHUT}]}),
        (
            {"$defs": {"a": A}, "additionalProperties": {"$ref": "#/$defs/a"}},
            {"$defs": {"a": {**A, **SHUT}}, "additionalProperties": {"$ref": "#/$defs/a"}},
        ),
    ],
)
def test_objects_that_list_properties_are_closed(schema: object, expected: object) -> None:
    assert closed(schema) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object"},
        {"type": "object", "properties": {}},
        {**A, "additionalProperties": True},
        {**A, "additionalProperties": {"type": "string"}},
        {**A, "required": ["b"]},
        {**A, "required": "a"},
        {**A, "required": [[]]},
        {**A, "minProperties": 2},
        {**A, "patternProperties": {"^x": True}},
        {"allOf": [A, B]},
        {"oneOf": [A, B]},
        {"not": A},
        {"$ref": "#/$defs/a", "$defs": {"a": A}, "properties": {"c": A}},
        {"$defs": {"a": A}, "items": {"$ref": "#/$defs/a", "required": ["b"]}},
        {"anyOf": [A, B], "required": ["c"]},
        {"const": A, "default": A, "examples": [A]},
        {"properties": 3},
        {"properties": {"oneOf": A}},
    ],
)
def test_others_stay_as_they_are(schema: dict[str, Any]) -> None:
    assert closed(schema) == schema


NAMES = st.sampled_from("abc")
SCHEMAS: st.SearchStrategy[dict[str, Any]] = st.recursive(
    st.sampled_from([{}, {"type": "integer"}, {"$ref": "#/$defs/d"}]),
    lambda inner: st.one_of(
        st.fixed_dictionaries(
            {"properties": st.dictionaries(NAMES, inner, max_size=2)},
            optional={
                "required": st.lists(NAMES, unique=True, max_size=2),
                "additionalProperties": inner,
                "anyOf": st.lists(inner, min_size=1, max_size=2),
            },
        ),
        st.builds(
            lambda key, members: {key: members},
            st.sampled_from(["anyOf", "oneOf", "allOf"]),
            st.lists(inner, min_size=1, max_size=2),
        ),
        st.builds(lambda part: {"not": part}, inner),
        st.builds(lambda part: {"items": part}, inner),
    ),
    max_leaves=8,
)
VALUES = st.recursive(
    st.sampled_from([0, None]),
    lambda inner: st.one_of(st.dictionaries(NAMES, inner, max_size=3), st.lists(inner, max_size=2)),
    max_leaves=5,
)


@given(SCHEMAS, st.sampled_from([A, B, {}]), VALUES)
def test_what_fits_the_closed_schema_fits_the_given_one(
    schema: dict[str, Any], definition: dict[str, Any], value: object
) -> None:
    whole = {**schema, "$defs": {"d": definition}}
    if jsonschema.Draft202012Validator(closed(whole)).is_valid(value):
        jsonschema.validate(value, whole)


def test_what_is_too_deep_says_so() -> None:
    schema: dict[str, Any] = {}
    for _ in range(5000):
        schema = {"items": schema}
    with pytest.raises(RecursionError):
        closed(schema)
