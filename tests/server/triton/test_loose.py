"""Values in the spelling of Triton's clients."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest
from hypothesis import given

from kttrio.server.errors import BadRequestError
from kttrio.server.schema.kinds import Boolean, Integer, Kind, Many, Number, OneOf, Strings, Text
from kttrio.server.schema.tokens import Biases, TokenIds
from kttrio.server.triton.loose import Loose, alone, spelled
from tests.schema_values import ANY, nearly_valid, valid

KINDS: list[Kind] = [
    Boolean(),
    Integer(-5, 5),
    Number(0, 2),
    Text(),
    OneOf(("json", "regex")),
    Strings(3),
    TokenIds(),
    Many(Text(1), least=1),
    Biases(),
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: type(kind).__name__)
def test_the_schema_tells_what_is_read(kind: Kind) -> None:
    schema = Loose(kind).schema()
    told = jsonschema.Draft202012Validator(schema)

    @given((valid(schema) | nearly_valid(schema) | ANY).filter(lambda value: value is not None))
    def check(value: Any) -> None:
        if told.is_valid(value):
            Loose(kind).read(value, "here")
            return
        with pytest.raises(BadRequestError, match="'here"):
            Loose(kind).read(value, "here")

    check()


@pytest.mark.parametrize(
    ("kind", "value", "wanted"),
    [
        (Integer(0), ["16"], 16),
        (Integer(0), "+16", 16),
        (Integer(0), [[16]], 16),
        (Number(0, 2), "0.1", 0.1),
        (Number(0, 2), "1e-1", 0.1),
        (Number(0, 2), ".5", 0.5),
        (Number(0, 2), "1.", 1.0),
        (Boolean(), "True", True),
        (Boolean(), ["false"], False),
        (Text(), [["1"]], "1"),
        (Strings(4), "a", ("a",)),
        (Strings(4), [["a", "b"]], ("a", "b")),
        (Strings(4), ["", "1"], ("1",)),
        (TokenIds(), "7", (7,)),
        (TokenIds(), [[7, "8"]], (7, 8)),
        (Many(Text(1)), "a", ("a",)),
        (Biases(), '{"5": 1}', ((5, 1.0),)),
        (Biases(), [{"5": 1}], ((5, 1.0),)),
    ],
)
def test_words_for_values(kind: Kind, value: Any, wanted: Any) -> None:
    assert kind.read(spelled(kind, value, "here", words=True), "here") == wanted


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (Integer(0), "1.5"),
        (Integer(0), "-1"),
        (Integer(0), "1_0"),
        (Integer(0), "\N{ARABIC-INDIC DIGIT ONE}"),
        (Integer(0), "9" * 5000),
        (Integer(0), [1, 2]),
        (Integer(0), []),
        (Integer(0), [[[1]]]),
        (Number(0, 2), "nan"),
        (Number(0, 2), "1e999"),
        (Number(0, 2), "0x1"),
        (Boolean(), "yes"),
        (Boolean(), 1),
        (Text(), 1),
        (Strings(1), ["a", ""]),
        (Strings(1), [None]),
        (TokenIds(), "-1"),
        (Biases(), "[]"),
        (Biases(), '{"5": NaN}'),
        (Biases(), "{" * 9),
    ],
)
def test_no_other_spelling(kind: Kind, value: Any) -> None:
    with pytest.raises(BadRequestError, match="'here"):
        kind.read(spelled(kind, value, "here", words=True), "here")


@pytest.mark.parametrize("kind", [Integer(0), Number(0, 2), TokenIds()])
def test_strings_are_no_numbers_elsewhere(kind: Kind) -> None:
    with pytest.raises(BadRequestError, match="'here'"):
        kind.read(spelled(kind, "1", "here", words=False), "here")


def test_alone() -> None:
    assert alone([["a"]]) == "a"
    assert alone([]) == []
    assert alone([1, 2]) == [1, 2]
