"""What a record's schema says, `read` does: of every body that any protocol takes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import jsonschema
import pytest
from hypothesis import given as drawn
from hypothesis import settings

from kttrio.server.app import PROTOCOLS
from kttrio.server.errors import BadRequestError
from kttrio.server.schema.kinds import (
    Anything,
    Boolean,
    Either,
    Integer,
    Kind,
    Many,
    Number,
    Object,
    OneOf,
    Strings,
    Tagged,
    Text,
)
from kttrio.server.schema.records import (
    Checked,
    FieldStance,
    Nested,
    Stance,
    given,
    ignored,
    read,
    refused,
    schema,
    stances,
)
from kttrio.server.triton.request import WHOLE_GENERATE_BODY
from tests.schema_values import ANY, nearly_valid, valid

BODIES = sorted(
    {one.body for protocol in PROTOCOLS for one in protocol.OPERATIONS if one.body is not None},
    key=lambda body: body.__name__,
)
LOOSE = (WHOLE_GENERATE_BODY,)
"""Where numbers come in strings, schemas tell how these are spelled, and not their range."""
EXAMPLES = 40
bodies = pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)


@cache
def validator(record: type) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(schema(record))


@bodies
def test_what_the_schema_describes_is_read(body: type) -> None:
    @settings(max_examples=EXAMPLES)
    @drawn(valid(schema(body)))
    def check(value: Any) -> None:
        assert validator(body).is_valid(value)
        assert body in LOOSE or isinstance(read(body, value), body)

    check()


@bodies
def test_what_it_does_not_is_refused_and_blamed(body: type) -> None:
    @settings(max_examples=EXAMPLES)
    @drawn(nearly_valid(schema(body)) | ANY)
    def check(value: Any) -> None:
        if validator(body).is_valid(value):
            assert body in LOOSE or isinstance(read(body, value), body)
            return
        with pytest.raises(BadRequestError) as caught:
            read(body, value)
        assert f"'{caught.value.param}'" in caught.value.message
        assert len(caught.value.message) < 500

    check()


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaf:
    size: int = given(Integer(1, 9), "how large", required=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    leaves: tuple[Leaf, ...] = given(Many(Nested(Leaf)), "on it", default=())
    raw: dict[str, Any] | None = given(Checked(Leaf), "one as it came")
    old: None = refused("cut it", harmless=(1, "dead"))
    colour: None = ignored("it is brown")


@pytest.mark.parametrize(
    ("kind", "value", "complaint"),
    [
        (Integer(1), 0, "must be at least 1."),
        (Integer(1), 2**63, "must lie between 1 and 9223372036854775807."),
        (Integer(1, 9), 0, "must lie between 1 and 9."),
        (Integer(1, 1), 2, "must be 1."),
        (Many(Integer(0), least=1), [], "must not be empty."),
        (Many(Integer(0), least=2), [1], "must have at least 2 items."),
        (Many(Integer(0), most=3), [1, 2, 3, 4], "must have at most 3 items."),
    ],
)
def test_limits_are_told_as_people_say_them(kind: Kind, value: object, complaint: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        kind.read(value, "size")
    assert caught.value.message == f"'size' {complaint}"


def test_a_record_is_made_of_what_is_served() -> None:
    value = {"leaves": [{"size": 2}, {"size": 3.0}], "raw": {"size": 1, "x": []}, "colour": 5}
    branch = read(Branch, value)
    assert branch.leaves == (Leaf(size=2), Leaf(size=3))
    assert branch.raw == {"size": 1, "x": []}
    assert read(Branch, {"leaves": None}) == Branch()


@pytest.mark.parametrize(
    ("value", "param"),
    [
        ({"leaves": [{"size": 2}, {"size": 10}]}, "leaves[1].size"),
        ({"leaves": [{}]}, "leaves[0].size"),
        ({"leaves": [None]}, "leaves[0]"),
        ({"raw": {"size": 0}}, "raw.size"),
        ({"old": 2}, "old"),
        ({"old": True}, "old"),
        ([], "body"),
    ],
)
def test_the_place_at_fault_is_named(value: Any, param: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        read(Branch, value)
    assert caught.value.param == param


@pytest.mark.parametrize("value", [None, False, 0, "", [], {}, 1, "dead"])
def test_what_asks_for_nothing_is_harmless(value: object) -> None:
    assert read(Branch, {"old": value}) == Branch()


def test_stances_are_told_in_order() -> None:
    assert list(stances(Branch)) == [
        FieldStance("leaves", Stance.DONE, "on it"),
        FieldStance("raw", Stance.DONE, "one as it came"),
        FieldStance("old", Stance.REFUSED, "cut it"),
        FieldStance("colour", Stance.IGNORED, "it is brown"),
    ]


KINDS: list[Kind] = [
    Boolean(),
    Integer(-2, 5),
    Number(0, 1),
    Number(0, 1, above=True),
    Text(),
    Text(1),
    OneOf(("auto", "user")),
    Strings(2),
    Many(Anything(), least=1, most=2),
    Many(Text()),
    Object(),
    Either({str: Text(1), list: Many(Boolean()), bool: Boolean()}),
    Tagged("kind", {"a": Nested(Leaf), "b": Checked(Leaf)}),
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: type(kind).__name__)
def test_each_kind_takes_what_it_says(kind: Kind) -> None:
    told = jsonschema.Draft202012Validator(kind.schema())
    values = (valid(kind.schema()) | nearly_valid(kind.schema()) | ANY).filter(
        lambda value: value is not None
    )

    @drawn(values)
    def check(value: Any) -> None:
        if told.is_valid(value):
            kind.read(value, "here")
            return
        with pytest.raises(BadRequestError, match="'here"):
            kind.read(value, "here")

    check()
