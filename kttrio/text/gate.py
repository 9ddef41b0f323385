"""How an output leads to its answer: through reasoning, or at once.

A twin of ReasoningSplitter that can be taken back: the gate opens where that one begins to tell
content. Not here: what the answer must be, and what may come before it (entrance.py).
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import Literal

from kttrio.text.markers import Markers, follows
from kttrio.text.reasoning import ReasoningFormat, ReasoningStart

Phase = Literal["unsaid", "reasoning", "closed"]
_PHASES: Mapping[ReasoningStart, Phase] = MappingProxyType(
    {
        ReasoningStart.UNSAID: "unsaid",
        ReasoningStart.OPEN: "reasoning",
        ReasoningStart.CLOSED: "closed",
    }
)


@dataclass(frozen=True)
class Way:
    """What is the same for every output of a model."""

    format: ReasoningFormat
    calls: bool
    """Tool calls are read, so they end the reasoning too."""
    skipped_ids: frozenset[int] = frozenset()
    """Tokens that leave no text."""

    @cached_property
    def ends(self) -> Markers:
        """What may end the reasoning."""
        return Markers(self.format.closes + self.format.calls * self.calls)

    def gate(self, start: ReasoningStart) -> Gate:
        """The gate of an output that begins so."""
        return Gate(self, _PHASES[start])


@dataclass(frozen=True, slots=True)
class Gate:
    """A place before the answer. The same place leads on in the same ways."""

    way: Way
    phase: Phase
    text: str = ""
    """What does not yet tell where it belongs; newlines that are dropped, once it is closed."""
    part: bytes = b""
    """Of a character."""

    def push(self, raw: bytes) -> Gate | bytes:
        """The place behind these bytes of the output; or what there is of the answer, some bytes
        at least."""
        raw = self.part + raw
        text, size = codecs.utf_8_decode(raw, "replace", False)
        return self._steps[self.phase](self, self.text + text, raw[size:])

    def _leave_unsaid(self, text: str, part: bytes) -> Gate | bytes:
        said = text.lstrip()
        for tag in self.way.format.opens:
            if said.startswith(tag):
                inside = Gate(self.way, "reasoning")
                return inside.push(said[len(tag) :].encode() + part)
        if any(tag.startswith(said) for tag in self.way.format.opens):
            return replace(self, text=text, part=part)
        return text.encode() + part

    def _leave_reasoning(self, text: str, part: bytes) -> Gate | bytes:
        place = 0
        while found := self.way.ends.find(text, place):
            place = found[0] + len(found[1])
            if found[1] in self.way.format.closes:
                return Gate(self.way, "closed").push(text[place:].encode() + part)
            begins = self._begins_call(text[place:])
            if begins:
                return text[found[0] :].encode() + part
            if begins is None:
                return replace(self, text=text[found[0] :], part=part)
        held = self.way.ends.held(text[place:])
        return replace(self, text=text[len(text) - held :], part=part)

    def _begins_call(self, text: str) -> bool | None:
        signs = self.way.format.calls_go_on
        return follows(text, signs) if signs else True

    def _leave_closed(self, text: str, part: bytes) -> Gate | bytes:
        said = text.lstrip("\n")
        return said.encode() + part if said or part else replace(self, text=text, part=b"")

    _steps = MappingProxyType(
        {"unsaid": _leave_unsaid, "reasoning": _leave_reasoning, "closed": _leave_closed}
    )
