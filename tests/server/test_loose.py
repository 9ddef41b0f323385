"""Values in the spelling of Triton's clients."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kttrio.server.errors import BadRequestError
from kttrio.server.kinds import Boolean, Integer, Kind, Many, Number, OneOf, Strings, Text
from kttrio.server.loose import Loose, alone
from kttrio.server.openai_sampling import Biases, TokenIds

KINDS: list[Kind] = [
    Boolean(),
    Integer(-5, 5),
    Number(0, 2),
    Text(),
    OneOf(("json", "regex")),
    Strings(9),
    TokenIds(),
    Many(Text(1), least=1),
    Biases(),
]
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-9, 9)
    | st.floats(-3, 3)
    | st.sampled_from(["", "1", "-2", "0.5", "true", "False", "json", "x", "{}", '{"5": 1}'])
)
VALUES = st.recursive(SCALARS, lambda one: st.lists(one, max_size=2), max_leaves=4)


@given(st.sampled_from(KINDS), VALUES)
def test_what_is_read_is_told_by_the_schema(kind: Kind, value: Any) -> None:
    try:
        Loose(kind).read(value, "f")
    except BadRequestError:
        return
    if _depth(value) <= 2:
        jsonschema.validate(value, Loose(kind).schema())


def _depth(value: Any) -> int:
    return 1 + max(map(_depth, value), default=0) if isinstance(value, list) else 0


@pytest.mark.parametrize(
    ("kind", "value", "read"),
    [
        (Integer(0), "16", 16),
        (Integer(0), ["16"], 16),
        (Integer(0), [[16]], 16),
        (Integer(0), 16.0, 16),
        (Number(0, 2), "0.1", 0.1),
        (Number(0, 2), "1e-1", 0.1),
        (Number(0, 2), ".5", 0.5),
        (Number(0, 2), "1", 1.0),
        (Boolean(), "True", True),
        (Boolean(), ["false"], False),
        (Text(), [["a"]], "a"),
        (Strings(4), "a", ("a",)),
        (Strings(4), [["a", "b"]], ("a", "b")),
        (Strings(4), [""], ()),
        (TokenIds(), "7", (7,)),
        (TokenIds(), [[7], "8"], (7, 8)),
        (Many(Text(1)), "a", ("a",)),
        (Biases(), '{"5": 1}', ((5, 1.0),)),
        (Biases(), {"5": 1}, ((5, 1.0),)),
    ],
)
def test_spellings(kind: Kind, value: Any, read: Any) -> None:
    assert Loose(kind).read(value, "f") == read


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
        (Number(0, 2), "nan"),
        (Number(0, 2), "1e999"),
        (Number(0, 2), "0x1"),
        (Boolean(), "yes"),
        (Boolean(), 1),
        (Text(), 1),
        (Strings(1), ["a", "b"]),
        (TokenIds(), "-1"),
        (Biases(), "[]"),
        (Biases(), '{"5": NaN}'),
        (Biases(), "{" * 9),
    ],
)
def test_no_other_spelling(kind: Kind, value: Any) -> None:
    with pytest.raises(BadRequestError, match="'f'"):
        Loose(kind).read(value, "f")


def test_alone() -> None:
    assert alone([[["a"]]]) == "a"
    assert alone([]) == []
    assert alone([1, 2]) == [1, 2]
