from __future__ import annotations

import pytest

from kttrio.text.markers import Markers, follows


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("no tag", None),
        ("a<b>c", (1, "<b>")),
        ("a<bb>c<b>", (1, "<bb>")),
        ("<b", None),
    ],
)
def test_find(text: str, found: tuple[int, str] | None):
    assert Markers(["<b>", "<bb>"]).find(text) == found


def test_find_takes_the_longest_at_one_place():
    assert Markers(["ab", "abc"]).find("xabcd") == (1, "abc")


def test_find_starts_where_told():
    assert Markers(["ab"]).find("abab", 1) == (2, "ab")


@pytest.mark.parametrize(
    ("strings", "text", "found"),
    [
        (["abc", "b"], "abc", (1, "b")),
        (["b", "ab"], "ab", (0, "ab")),
        (["xyz"], "xy", None),
        ([], "anything", None),
    ],
)
def test_first_complete(strings: list[str], text: str, found: tuple[int, str] | None):
    assert Markers(strings).find_first_complete(text) == found


@pytest.mark.parametrize(
    ("text", "held"),
    [("", 0), ("abc", 0), ("abc<", 1), ("<th<", 1), ("x<think", 6), ("<think>", 0), ("aab", 0)],
)
def test_held(text: str, held: int):
    assert Markers(["<think>", "<t"]).held(text) == held


def test_held_finds_the_longest_beginning():
    assert Markers(["aab"]).held("xaa") == 2
    assert Markers([]).held("xaa") == 0


def test_may_begin():
    assert Markers(["<a>"]).may_begin("b<")
    assert not Markers(["<a>"]).may_begin("ba>")
    assert not Markers([]).may_begin("a")


def test_empty_strings_are_refused():
    with pytest.raises(ValueError, match="empty string"):
        Markers(["a", ""])


@pytest.mark.parametrize(
    ("text", "verdict"),
    [(" \n<a>", True), (" \n<", None), ("", None), ("  ", None), (" x", False), ("<ax", False)],
)
def test_follows(text: str, verdict: bool | None):
    assert follows(text, ("<a>",)) is verdict
