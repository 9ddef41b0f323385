"""One stream's way from token ids to pieces for the reader: text, stops, reasoning, tool calls.

Composes the parts of this folder. Not here: usage, log-probabilities and finish reasons, which
the server tells.
"""

from __future__ import annotations

from dataclasses import dataclass

from kttrio.text.detokenizer import Detokenizer
from kttrio.text.reasoning import ReasoningSplitter
from kttrio.text.stops import StopStrings
from kttrio.text.tokenizer import Tokenizer
from kttrio.text.tool_parsers.base import (
    Content,
    ParsedPiece,
    ToolCallStart,
    ToolParser,
)


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text of the model's reasoning."""

    text: str


Piece = Reasoning | ParsedPiece


def skipped_ids(
    tokenizer: Tokenizer, *, kept_tags: tuple[str, ...] = (), calls: bool
) -> frozenset[int]:
    """Special tokens that leave no text, except the `kept_tags` of the reasoning that is read.
    While tools are read none is left out: an argument may contain any of them."""
    if calls:
        return frozenset()
    return tokenizer.special_ids - {tokenizer.token_id(tag) for tag in kept_tags}


class OutputPipeline:
    """The text side of one stream. Pieces together do not depend on how tokens arrive."""

    __slots__ = (
        "_detokenizer",
        "_plain",
        "_reasoning",
        "_stops",
        "_tools",
        "_unstopped",
        "num_calls",
        "num_reasoning_tokens",
    )

    def __init__(
        self,
        detokenizer: Detokenizer,
        *,
        stops: StopStrings | None = None,
        reasoning: ReasoningSplitter | None = None,
        tools: ToolParser | None = None,
        min_tokens: int = 0,
    ) -> None:
        """`min_tokens`: stop strings are looked for in the text behind so many tokens."""
        self._detokenizer = detokenizer
        self._stops = stops
        self._reasoning = reasoning
        self._tools = tools
        self._unstopped = min_tokens
        self._plain = stops is None and reasoning is None and tools is None
        self.num_calls = 0
        """Tool calls begun so far."""
        self.num_reasoning_tokens = 0
        """Tokens pushed while inside the reasoning, its closing tag included."""

    @property
    def matched_stop(self) -> str | None:
        """The stop string that ended the text: later tokens leave no piece, call finish()."""
        return self._stops.matched if self._stops else None

    @property
    def in_reasoning(self) -> bool:
        """The next token is reasoning, as far as is known."""
        return self._reasoning is not None and self._reasoning.in_reasoning

    def push(self, token_id: int) -> list[Piece] | str:
        """What this token makes certain: nothing but text, or nothing yet, comes as a string. The
        token that ended the sequence is not pushed."""
        text = self._detokenizer.push(token_id)
        if self._plain:
            return text
        if self.in_reasoning:
            self.num_reasoning_tokens += 1
        if self._stops is not None:
            text = self._before_stop(self._stops, text)
        if not text:
            return ""
        thought, said = self._split(text)
        if not thought and self._tools is None:
            return said
        return self._pieces(thought, said)

    def finish(self, *, cut_off: bool = False) -> list[Piece]:
        """All that was held back. `cut_off`: the length limit ended the text, so an open tool
        call keeps its arguments incomplete; otherwise it is closed to valid JSON."""
        text = self._detokenizer.finish()
        if self._stops is not None and not self._unstopped:
            text = self._stops.push(text)[0] + self._stops.finish()
        pieces = self._pieces(*self._split(text)) if text else []
        if self._reasoning is not None:
            thought, said = self._reasoning.finish()
            pieces += self._pieces(thought, said)
        if self._tools is not None:
            self._add_parsed(self._tools.finish(cut_off=cut_off), pieces)
        return pieces

    def _before_stop(self, stops: StopStrings, text: str) -> str:
        """What of a token's text may be shown."""
        if self._unstopped:
            self._unstopped -= 1
            return text
        return stops.push(text)[0] if text else text

    def _split(self, text: str) -> tuple[str, str]:
        """Reasoning and answer."""
        return ("", text) if self._reasoning is None else self._reasoning.push(text)

    def _pieces(self, thought: str, said: str) -> list[Piece]:
        pieces: list[Piece] = [Reasoning(thought)] if thought else []
        if said and self._tools is None:
            pieces.append(Content(said))
        elif said and self._tools is not None:
            self._add_parsed(self._tools.push(said), pieces)
        return pieces

    def _add_parsed(self, parsed: list[ParsedPiece], pieces: list[Piece]) -> None:
        for piece in parsed:
            if isinstance(piece, ToolCallStart):
                self.num_calls += 1
            pieces.append(piece)
