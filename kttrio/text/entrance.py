"""Which tokens may come before an answer that a grammar holds: any in the reasoning, but for those
that would end it in a way that the grammar does not go on from.

Not here: how an output leads to its answer (gate.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cached_property

from llguidance import LLMatcher

from kttrio.text.gate import Gate, Way
from kttrio.text.vocabulary import Vocabulary

MAX_NEWLINES = 4
"""Between the reasoning and the answer."""


class Turns:
    """The tokens of a vocabulary that may change where an output is on its way."""

    def __init__(self, vocabulary: Vocabulary, way: Way) -> None:
        self._vocabulary = vocabulary
        self._skipped_ids = way.skipped_ids
        self._opens = way.format.opens
        self._ends = way.format.closes + way.format.calls * way.calls
        self._signs = way.format.calls_go_on * way.calls

    @cached_property
    def ends(self) -> Sequence[int]:
        """They have the whole of a tag that ends the reasoning."""
        return self._ids(rf"(?s:.*)(?:{_any_of(self._ends)})")

    @cached_property
    def last_parts(self) -> Sequence[int]:
        """They begin with the last part of what ends the reasoning."""
        return self._ids(rf"\s*(?:{_any_of(_tails(self._ends + self._signs))})")

    @cached_property
    def openings(self) -> Sequence[int]:
        """They are a part of a tag that opens the reasoning, or begin with its last part."""
        heads = (tag[:end] for tag in self._opens for end in range(1, len(tag)))
        inner = _any_of(_tails(heads))
        return self._ids(rf"\s*(?:{_any_of(_tails(self._opens))}|(?:{inner})\Z)")

    @cached_property
    def newlines(self) -> Sequence[int]:
        """They begin with one."""
        return self._ids(r"\n")

    def _ids(self, pattern: str) -> Sequence[int]:
        begins = re.compile(pattern.encode()).match
        return [
            id
            for id, token in enumerate(self._vocabulary.tokens)
            if begins(token) and id not in self._skipped_ids
        ]


def last_place(way: Way) -> Gate:
    """Where the answer must begin at last."""
    return Gate(way, "closed", "\n" * MAX_NEWLINES)


def mask(gate: Gate, turns: Turns, vocabulary: Vocabulary, grammar: LLMatcher) -> bytes:
    """What may come at this place. `grammar` is at its start, and stays there."""
    if gate.phase == "reasoning":
        allowed = bytearray(vocabulary.all_but_ends)
        looked_at = {*turns.ends, *(turns.last_parts if gate.text else ())}
    elif gate.phase == "closed":
        allowed = bytearray(grammar.compute_bitmask())
        looked_at = {*turns.newlines}
    else:
        allowed = bytearray(_mask_behind(gate.text.encode() + gate.part, vocabulary, grammar))
        looked_at = {*turns.openings}
    for id in looked_at:
        bit = 1 << id % 8
        allowed[id // 8] |= bit
        if not _goes_on(gate.push(vocabulary.tokens[id]), vocabulary, grammar):
            allowed[id // 8] ^= bit
    return bytes(allowed)


def _goes_on(place: Gate | bytes, vocabulary: Vocabulary, grammar: LLMatcher) -> bool:
    if isinstance(place, Gate):
        return place.phase != "closed" or len(place.text) <= MAX_NEWLINES
    return grammar.validate_tokens(vocabulary.spell(place)) == len(place)


def _mask_behind(answer: bytes, vocabulary: Vocabulary, grammar: LLMatcher) -> bytes:
    """What may come behind the beginning of an answer; nothing, where it is none."""
    if not _goes_on(answer, vocabulary, grammar):
        return bytes(len(vocabulary.all_but_ends))
    matcher = grammar.deep_copy()
    matcher.consume_tokens(vocabulary.spell(answer))
    return matcher.compute_bitmask()


def _any_of(strings: Iterable[str]) -> str:
    return "|".join(map(re.escape, strings)) or "(?!)"


def _tails(strings: Iterable[str]) -> list[str]:
    """Each of them, and all that they end with."""
    return [string[start:] for string in strings for start in range(len(string))]
