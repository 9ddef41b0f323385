"""What is JSON, and what is not."""

from __future__ import annotations

import pytest

from kttrio.server.bodies import parse_object
from kttrio.server.errors import BadRequestError


def test_a_byte_order_mark_says_nothing() -> None:
    assert parse_object('\ufeff{"a": "\ufeff"}'.encode()) == {"a": "\ufeff"}


def test_the_last_of_two_values_counts_unless_names_must_be_unique() -> None:
    assert parse_object(b'{"a": 1, "a": 2}') == {"a": 2}
    with pytest.raises(BadRequestError, match="names a key twice"):
        parse_object(b'{"b": {"a": 1, "a": 2}}', unique=True)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "Expecting value"),
        (b"[1]", "must be a JSON object, not an array"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": "\xff"}', "invalid start byte"),
        (b'{"a": "\\ud800"}', "half a character"),
        (b'{"a": %b}' % (b"9" * 5000), r"value has 5000 digits$"),
        (b'{"a": %b}' % (b"[" * 100_000), "nested too deeply"),
        ('{"a": 1}'.encode("utf-16"), "invalid start byte"),
    ],
)
def test_what_is_refused(body: bytes, reason: str) -> None:
    with pytest.raises(BadRequestError, match=reason):
        parse_object(body)
