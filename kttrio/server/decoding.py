"""One sequence's way from token events to deltas: text, stop strings, reasoning, tool calls.

No protocol's JSON shape and no task: `feed` is called once per step from the engine's fan-out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from kttrio.request import FinishReason, TokenEvent, TokenLogprob
from kttrio.text.detokenizer import Detokenizer
from kttrio.text.reasoning import ReasoningSplitter
from kttrio.text.stops import StopStrings
from kttrio.text.tool_parsers.base import (
    Content,
    ParsedPiece,
    ToolCallArguments,
    ToolParser,
)

PromptLogprobs = tuple[TokenLogprob | None, ...]


class CallDelta(NamedTuple):
    """A piece of a tool call. `name` and `id` come with the first one only."""

    index: int
    id: str | None
    name: str | None
    arguments: str


class Delta(NamedTuple):
    """What one step added to an answer."""

    text: str = ""
    reasoning: str = ""
    calls: Sequence[CallDelta] = ()
    logprobs: Sequence[TokenLogprob] = ()
    prompt_logprobs: PromptLogprobs | None = None
    finish: str | None = None
    """Why the answer ends, in OpenAI's words; nothing follows."""
    matched_stop: int | str | None = None
    is_text: bool = False
    """`text` is all there is."""


NO_CALLS: Sequence[CallDelta] = ()


@dataclass(slots=True, kw_only=True)
class Decoder:
    """The text side of one sequence, and its count of tokens."""

    detokenizer: Detokenizer
    stops: StopStrings | None = None
    splitter: ReasoningSplitter | None = None
    tool_parser: ToolParser | None = None
    min_tokens: int = 0
    """Stop strings count only after so many tokens."""
    one_call: bool = False
    """The answer ends after its first tool call."""
    num_tokens: int = 0
    num_reasoning_tokens: int = 0
    _num_calls: int = 0
    _scores: list[TokenLogprob] = field(default_factory=list)

    def feed(self, event: TokenEvent) -> Delta | None:
        """What the event adds, None when that is nothing yet."""
        token, finish = event.token, event.finish
        text = ""
        if token is not None:
            self.num_tokens += 1
            if self.splitter is not None and self.splitter.in_reasoning:
                self.num_reasoning_tokens += 1
            if finish is not FinishReason.STOP:
                text = self.detokenizer.push(token)
        if event.logprob is not None:
            self._scores.append(event.logprob)
        if finish is not None:
            return self._finish(text, event)
        matched = None
        if self.stops is not None and self.num_tokens >= self.min_tokens:
            text, matched = self.stops.push(text)
        if matched is not None:
            return self._last(text, event, "stop", matched)
        if self.splitter is None and self.tool_parser is None and not self._scores:
            return Delta(text, is_text=True) if text else None
        return self._part(text, event)

    def _part(self, text: str, event: TokenEvent) -> Delta | None:
        reasoning, calls, finish = "", NO_CALLS, None
        if self.splitter is not None:
            reasoning, text = self.splitter.push(text)
        if self.tool_parser is not None:
            text, calls, is_over = self._sort(self.tool_parser.push(text))
            finish = "tool_calls" if is_over else None
        if not (text or reasoning or calls or finish or event.prompt_logprobs):
            return None
        is_text = not (reasoning or calls or finish or self._scores or event.prompt_logprobs)
        if is_text:
            return Delta(text, is_text=True)
        return self._delta(text, reasoning, calls, event, finish=finish)

    def _finish(self, text: str, event: TokenEvent) -> Delta:
        """The engine's last event: whatever is held back anywhere comes out."""
        text += self.detokenizer.finish()
        if self.stops is not None:
            matched = None
            if self.num_tokens >= self.min_tokens:
                text, matched = self.stops.push(text)
            if matched is not None:
                return self._last(text, event, "stop", matched)
            text += self.stops.finish()
        is_stop = event.finish is FinishReason.STOP
        return self._last(text, event, str(event.finish), event.token if is_stop else None)

    def _last(self, text: str, event: TokenEvent, reason: str, matched: int | str | None) -> Delta:
        reasoning, calls = "", NO_CALLS
        if self.splitter is not None:
            reasoning, text = self.splitter.push(text)
            more_reasoning, more_text = self.splitter.finish()
            reasoning, text = reasoning + more_reasoning, text + more_text
        if self.tool_parser is not None:
            by_itself = isinstance(matched, int)
            pieces = list(self.tool_parser.push(text))
            pieces += self.tool_parser.finish(cut_off=not by_itself)
            text, calls, is_over = self._sort(pieces)
            if is_over or (by_itself and self._num_calls):
                reason = "tool_calls"
        return self._delta(text, reasoning, calls, event, finish=reason, matched=matched)

    def _sort(self, pieces: Sequence[ParsedPiece]) -> tuple[str, Sequence[CallDelta], bool]:
        """(content, call pieces, whether the answer is over: its one call is made)."""
        content: list[str] = []
        calls: list[CallDelta] = []
        for piece in pieces:
            if isinstance(piece, Content):
                content.append(piece.text)
            elif isinstance(piece, ToolCallArguments):
                calls.append(CallDelta(piece.index, None, None, piece.json_fragment))
            elif self.one_call and self._num_calls:
                return "".join(content), calls, True
            else:
                self._num_calls += 1
                calls.append(CallDelta(piece.index, piece.id, piece.name, ""))
        return "".join(content), calls, False

    def _delta(
        self,
        text: str,
        reasoning: str,
        calls: Sequence[CallDelta],
        event: TokenEvent,
        *,
        finish: str | None = None,
        matched: int | str | None = None,
    ) -> Delta:
        scores, self._scores = self._scores, []
        return Delta(text, reasoning, calls, scores, event.prompt_logprobs, finish, matched)


@dataclass(slots=True)
class Answer:
    """The deltas of one choice, put together."""

    text: str = ""
    reasoning: str = ""
    calls: list[CallDelta] = field(default_factory=list)
    """One per call, complete."""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: PromptLogprobs | None = None
    finish: str | None = None
    matched_stop: int | str | None = None

    @classmethod
    def of(cls, deltas: Sequence[Delta]) -> Answer:
        answer = cls(
            text="".join(delta.text for delta in deltas),
            reasoning="".join(delta.reasoning for delta in deltas),
            logprobs=[score for delta in deltas for score in delta.logprobs],
        )
        for delta in deltas:
            answer.prompt_logprobs = answer.prompt_logprobs or delta.prompt_logprobs
            answer.finish = delta.finish
            answer.matched_stop = delta.matched_stop
            for call in delta.calls:
                answer._add_call(call)
        return answer

    def _add_call(self, call: CallDelta) -> None:
        if call.name is not None:
            self.calls.append(call)
        else:
            open_call = self.calls[-1]
            self.calls[-1] = open_call._replace(arguments=open_call.arguments + call.arguments)
