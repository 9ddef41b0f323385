"""Cutting one text in every way a stream may deliver it."""

from __future__ import annotations

from collections.abc import Iterator

from hypothesis import strategies as st


def pairs(text: str) -> Iterator[list[str]]:
    """The text cut once, at every place."""
    for place in range(len(text) + 1):
        yield [text[:place], text[place:]]


def all_cuts(text: str) -> Iterator[list[str]]:
    """Whole, cut once at every place, in single characters, in twos and in fives."""
    yield [text]
    yield from pairs(text)
    for size in (1, 2, 5):
        yield [text[i : i + size] for i in range(0, len(text), size)]


@st.composite
def pieces_of(draw: st.DrawFn, texts: st.SearchStrategy[str]) -> list[str]:
    """A drawn text in random pieces."""
    text = draw(texts)
    places = sorted(draw(st.sets(st.integers(0, len(text)), max_size=12)))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]
