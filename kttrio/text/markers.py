"""Finds fixed strings in text that arrives in pieces: what is there, and what may still come.

Used for stop strings and tags alike. Not here: what to do with a find.
"""

from __future__ import annotations

import re
from collections.abc import Iterable


class Markers:
    """A fixed set of non-empty strings to look for. Holds no text, so streams may share it."""

    __slots__ = ("_firsts", "_longest", "_pattern", "_strings")

    def __init__(self, strings: Iterable[str]) -> None:
        self._strings = tuple(sorted(set(strings), key=len, reverse=True))
        if not all(self._strings):
            raise ValueError("an empty string is found everywhere; remove it")
        self._longest = len(self._strings[0]) if self._strings else 0
        self._firsts = frozenset(string[0] for string in self._strings)
        self._pattern = re.compile("|".join(map(re.escape, self._strings)) or r"(?!)")

    def find(self, text: str, start: int = 0) -> tuple[int, str] | None:
        """Place and string of the first one from `start`, the longest where several begin."""
        match = self._pattern.search(text, start)
        return (match.start(), match[0]) if match else None

    def find_first_complete(self, text: str) -> tuple[int, str] | None:
        """The one whose last character comes first, the longest where several end.

        That is the one a reader of single characters meets, so the answer does not depend on how
        the text was cut.
        """
        ends = [
            (place + len(string), place, string)
            for string in self._strings
            if (place := text.find(string)) >= 0
        ]
        return min(ends)[1:] if ends else None

    def may_begin(self, text: str) -> bool:
        """Whether one of the strings may begin somewhere in the text; a quick look."""
        return not self._firsts.isdisjoint(text)

    def held(self, text: str) -> int:
        """Length of the longest end of the text with which one of the strings may begin."""
        first = max(0, len(text) - self._longest + 1)
        if self._firsts.isdisjoint(text[first:]):
            return 0
        for place in range(first, len(text)):
            if text[place] in self._firsts:
                tail = text[place:]
                if any(string.startswith(tail) for string in self._strings):
                    return len(tail)
        return 0


def follows(text: str, strings: tuple[str, ...]) -> bool | None:
    """Whether the text, after white space, goes on with one of the strings; None: not yet known."""
    text = text.lstrip()
    if text.startswith(strings):
        return True
    if any(string.startswith(text) for string in strings):
        return None
    return False
