"""What is closed and bounded, and that nothing comes to fit that did not fit before."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kttrio.text.json_schema import MAX_INTEGER, bounded

A, B = {"properties": {"a": {"type": "null"}}}, {"properties": {"b": True}}
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
def test_objects_that_list_properties_are_bounded(schema: object, expected: object) -> None:
    assert bounded(schema) == expected  # type: ignore[arg-type]


INTEGER = {"type": "integer"}
LEAST, MOST = {"minimum": -MAX_INTEGER}, {"maximum": MAX_INTEGER}


@pytest.mark.parametrize(
    ("schema", "limits"),
    [
        ({}, {**LEAST, **MOST}),
        ({"multipleOf": 5}, {**LEAST, **MOST}),
        ({"minimum": 0}, MOST),
        ({"maximum": 9}, LEAST),
        ({"exclusiveMinimum": 0}, MOST),
        ({"exclusiveMaximum": 9}, LEAST),
        ({"minimum": 2**63}, {}),
        ({"minimum": "0"}, {}),
        ({"enum": [10**30]}, {}),
    ],
)
def test_integers_have_an_end(schema: dict[str, Any], limits: dict[str, int]) -> None:
    assert bounded({**INTEGER, **schema}) == {**INTEGER, **schema, **limits}
    assert bounded({"type": "number", **schema}) == {"type": "number", **schema}


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
    assert bounded(schema) == schema


NAMES = st.sampled_from("abc")
REFERENCE = {"$ref": "#/$defs/d"}
SCHEMAS: st.SearchStrategy[dict[str, Any]] = st.recursive(
    st.sampled_from([{}, {"type": "integer"}, {"type": "integer", "minimum": 1}, REFERENCE]),
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
    st.sampled_from([0, 2**63, -(2**64), None]),
    lambda inner: st.one_of(st.dictionaries(NAMES, inner, max_size=3), st.lists(inner, max_size=2)),
    max_leaves=5,
)


@given(SCHEMAS, st.sampled_from([A, B, {}]), VALUES)
def test_what_fits_the_closed_schema_fits_the_given_one(
    schema: dict[str, Any], definition: dict[str, Any], value: object
) -> None:
    whole = {**schema, "$defs": {"d": definition}}
    if jsonschema.Draft202012Validator(bounded(whole)).is_valid(value):
        jsonschema.validate(value, whole)


def test_what_is_too_deep_says_so() -> None:
    schema: dict[str, Any] = {}
    for _ in range(5000):
        schema = {"items": schema}
    with pytest.raises(RecursionError):
        bounded(schema)
