"""One sequence's way from token events to deltas, and deltas to a whole answer.

No protocol's JSON shape and no task: `feed` is called once per step from the engine's fan-out.
How text, stops, reasoning and tool calls are found is known to `text/output.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from kttrio.request import FinishReason, TokenEvent, TokenLogprob
from kttrio.text.output import OutputPipeline, Piece, Reasoning
from kttrio.text.tool_parsers.base import Content, ToolCallStart

CUT_OFF = (FinishReason.LENGTH, FinishReason.ABORT)

PromptLogprobs = tuple[TokenLogprob | None, ...]


class CallDelta(NamedTuple):
    """A piece of a tool call. `id` and `name` come with its first one only."""

    number: int
    """Of the call within its answer, from 0."""
    arguments: str
    id: str | None = None
    name: str | None = None


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


class Decoder:
    """The text side of one sequence, and its count of tokens."""

    def __init__(self, pipeline: OutputPipeline, *, one_call: bool = False) -> None:
        """`one_call`: the answer ends before a second tool call."""
        self.num_tokens = 0
        self.num_accepted = 0  # tokens that had been drafted
        self.num_rejected = 0  # drafts that became no token
        self._pipeline = pipeline
        self._one_call = one_call
        self._scores: list[TokenLogprob] = []

    @property
    def num_reasoning_tokens(self) -> int:
        return self._pipeline.num_reasoning_tokens

    def feed(self, event: TokenEvent) -> Delta | str | None:
        """What the event adds: nothing but text comes as a string; None: nothing yet."""
        token, finish, score, prompt_scores, _, accepted, rejected = event
        pieces: list[Piece] = []
        if token is not None:
            self.num_tokens += 1
            self.num_accepted += accepted
            self.num_rejected += rejected
            if finish is not FinishReason.STOP:
                pieces = self._pipeline.push(token)
        if score is not None:
            self._scores.append(score)
        if finish is not None or self._pipeline.matched_stop is not None:
            return self._last(pieces, event)
        if not pieces and prompt_scores is None:
            return None
        if len(pieces) == 1 and not self._scores and prompt_scores is None:
            piece = pieces[0]
            if isinstance(piece, Content):
                return piece.text
        return self._delta(pieces, event)

    def _last(self, pieces: list[Piece], event: TokenEvent) -> Delta:
        """Whatever is held back anywhere comes out."""
        stop = self._pipeline.matched_stop
        cut_off = stop is not None or event.finish in CUT_OFF
        delta = self._delta(pieces + self._pipeline.finish(cut_off=cut_off), event)
        stop = self._pipeline.matched_stop  # the held-back end may complete one
        if delta.finish is not None:
            return delta
        if stop is not None:
            return delta._replace(finish="stop", matched_stop=stop)
        if event.finish is not FinishReason.STOP:
            return delta._replace(finish=str(event.finish))
        finish = "tool_calls" if self._pipeline.num_calls else "stop"
        return delta._replace(finish=finish, matched_stop=event.token)

    def _delta(self, pieces: Sequence[Piece], event: TokenEvent) -> Delta:
        text, reasoning, calls, finish = "", "", [], None
        for piece in pieces:
            if isinstance(piece, Content):
                text += piece.text
            elif isinstance(piece, Reasoning):
                reasoning += piece.text
            elif not isinstance(piece, ToolCallStart):
                calls.append(CallDelta(piece.index, piece.json_fragment))
            elif piece.index and self._one_call:
                finish = "tool_calls"
                break
            else:
                calls.append(CallDelta(piece.index, "", piece.id, piece.name))
        scores, self._scores = self._scores, []
        return Delta(text, reasoning, calls, scores, event.prompt_logprobs, finish)


@dataclass(frozen=True, slots=True)
class Call:
    """A whole tool call."""

    id: str
    name: str
    arguments: str


@dataclass(slots=True)
class Answer:
    """The deltas of one choice, put together."""

    text: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: PromptLogprobs | None = None
    finish: str | None = None
    matched_stop: int | str | None = None

    @classmethod
    def of(cls, deltas: Sequence[Delta]) -> Answer:
        """`deltas` of one choice, to its last."""
        return cls(
            text="".join(delta.text for delta in deltas),
            reasoning="".join(delta.reasoning for delta in deltas),
            calls=_whole_calls([call for delta in deltas for call in delta.calls]),
            logprobs=[score for delta in deltas for score in delta.logprobs],
            prompt_logprobs=next((d.prompt_logprobs for d in deltas if d.prompt_logprobs), None),
            finish=deltas[-1].finish,
            matched_stop=deltas[-1].matched_stop,
        )


def _whole_calls(pieces: Sequence[CallDelta]) -> list[Call]:
    arguments: dict[int, list[str]] = {}
    for piece in pieces:
        arguments.setdefault(piece.number, []).append(piece.arguments)
    return [
        Call(piece.id or "", piece.name, "".join(arguments[piece.number]))
        for piece in pieces
        if piece.name is not None
    ]
