from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kttrio.text.stops import StopStrings
from tests.text.cuts import all_cuts, pieces_of

CASES = [
    # stops, text, shown, matched
    ((), "abc", "abc", None),
    (("END",), "one END two", "one ", "END"),
    (("END",), "one EN", "one EN", None),
    (("END",), "one ENEND", "one EN", "END"),
    (("\n\n", "User:"), "a\nUser: b", "a\n", "User:"),
    (("\n\n", "User:"), "a\n\nb", "a", "\n\n"),
    (("abc", "b"), "xabc", "xa", "b"),
    (("b", "ab"), "xab", "x", "ab"),
    (("aab",), "aaab", "a", "aab"),
    (("ß😀",), "groß😀", "gro", "ß😀"),
    (("END",), "END", "", "END"),
]


def run(stops: StopStrings, pieces: list[str]) -> str:
    text = "".join(stops.push(piece)[0] for piece in pieces)
    return text + stops.finish()


@pytest.mark.parametrize(("stops", "text", "shown", "matched"), CASES)
def test_every_cut_gives_the_same(
    stops: tuple[str, ...], text: str, shown: str, matched: str | None
):
    for pieces in all_cuts(text):
        watch = StopStrings(stops)
        assert (run(watch, pieces), watch.matched) == (shown, matched), pieces


@pytest.mark.parametrize(("stops", "text", "shown", "matched"), CASES)
def test_the_stop_string_can_be_shown(
    stops: tuple[str, ...], text: str, shown: str, matched: str | None
):
    for pieces in all_cuts(text):
        assert run(StopStrings(stops, include_in_output=True), pieces) == shown + (matched or "")


@given(
    pieces_of(st.text(alphabet="abc", max_size=30)),
    st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3),
)
def test_random_cuts_give_the_same(pieces: list[str], stops: list[str]):
    whole, cut = StopStrings(stops), StopStrings(stops)
    assert run(cut, pieces) == run(whole, ["".join(pieces)])
    assert cut.matched == whole.matched


@given(st.text(alphabet="abc"), st.text(alphabet="abc", min_size=1, max_size=5))
def test_holds_back_only_what_may_begin_a_stop(text: str, stop: str):
    watch = StopStrings([stop])
    shown, matched = watch.push(text)
    held = watch.finish()
    if matched:
        assert (shown, held) == (text[: text.index(stop)], "")
    else:
        assert shown + held == text
        assert stop.startswith(held)
        assert stop not in text


def test_nothing_comes_after_the_match():
    watch = StopStrings(["x"])
    assert watch.push("ax") == ("a", "x")
    assert watch.push("more") == ("", "x")
    assert watch.finish() == ""


def test_empty_stop_is_refused():
    with pytest.raises(ValueError, match="empty"):
        StopStrings([""])
