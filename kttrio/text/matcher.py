"""One answer under a grammar: which tokens may come next, as it is written.

Not here: threads; one at a time may use a matcher.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from llguidance import LLMatcher

from kttrio.text.gate import Gate
from kttrio.text.grammar_error import GrammarError, told
from kttrio.text.vocabulary import Vocabulary


class Entrance(Protocol):
    def __call__(self, gate: Gate) -> bytes:
        """What may come before the answer begins."""
        ...


class Matcher:
    """What may come behind the tokens so far. A mask has token i in bit i % 8 of byte i // 8."""

    def __init__(
        self, vocabulary: Vocabulary, grammar: LLMatcher, gate: Gate | None, entrance: Entrance
    ) -> None:
        """`grammar` is at its start, and this matcher's own. `gate`: None where it is open."""
        self._vocabulary = vocabulary
        self._grammar = grammar
        self._gate = gate
        self._entrance = entrance
        self.ended = False
        """An end token has come: nothing may follow."""

    def masks(self, drafts: Sequence[int] = ()) -> list[bytes | None]:
        """A mask for the next token, and one behind each of the drafts; None behind one that may
        not come, or that is the end. Raises GrammarError where the grammar is too costly here."""
        gate, taken = self._gate, 0
        masks: list[bytes | None] = []
        for draft in (*drafts, None):
            mask = self._mask(gate)
            masks.append(mask)
            if draft is None or draft in self._vocabulary.end_ids or not _allows(mask, draft):
                break
            gate, tokens = self._step(gate, draft)
            self._consume(tokens)
            taken += len(tokens)
        if taken:
            self._grammar.rollback(taken)
        return masks + [None] * (len(drafts) + 1 - len(masks))

    def advance(self, tokens: Sequence[int]) -> None:
        """These tokens have come. Raises GrammarError if they may not."""
        for token in tokens:
            if token in self._vocabulary.end_ids:
                self.ended = True
                return
            self._gate, answer = self._step(self._gate, token)
            self._consume(answer)

    def _mask(self, gate: Gate | None) -> bytes:
        if gate is not None:
            return self._entrance(gate)
        mask = self._grammar.compute_bitmask()
        self._check()
        if not any(mask):
            raise GrammarError("no token of this model goes on from here")
        return mask

    def _step(self, gate: Gate | None, token: int) -> tuple[Gate | None, list[int]]:
        """Where the token leads to, and what there is of the answer by it."""
        if gate is None:
            return None, [token]
        place = gate.push(self._vocabulary.text_of(token, gate.way.skipped_ids))
        return (place, []) if isinstance(place, Gate) else (None, self._vocabulary.spell(place))

    def _consume(self, tokens: list[int]) -> None:
        if tokens and not self._grammar.consume_tokens(tokens):
            self._check()

    def _check(self) -> None:
        if self._grammar.is_error():
            raise GrammarError(told(self._grammar.get_error()))


def _allows(mask: bytes, token: int) -> bool:
    place = token // 8
    return place < len(mask) and bool(mask[place] >> token % 8 & 1)
