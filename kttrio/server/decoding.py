"""One sequence's way from token events to deltas, and deltas to a whole answer.

No protocol's JSON shape and no task: `feed` is called once per step from the engine's fan-out.
How text, stops, reasoning and tool calls are found is known to `text/output.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

from kttrio.request import FinishReason, TokenEvent, TokenLogprob
from kttrio.server.requests import ReasoningView
from kttrio.text.output import OutputPipeline, Piece, Reasoning
from kttrio.text.tool_parsers.base import Content, ToolCallStart

HELD = (ReasoningView.AT_ONCE, ReasoningView.HIDDEN)
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
    """What one step added to an answer: the reasoning first, then the text, then the calls."""

    text: str = ""
    reasoning: str = ""
    calls: Sequence[CallDelta] = ()
    logprobs: Sequence[TokenLogprob] = ()
    prompt_logprobs: PromptLogprobs | None = None
    finish: str | None = None
    """Why the answer ends, in OpenAI's words; nothing follows."""
    matched_stop: int | str | None = None
    token_ids: Sequence[int] = ()
    """Where they are asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What a client wants to see of an answer, beside its text and calls."""

    reasoning: ReasoningView = ReasoningView.STREAMED
    kept_stops: frozenset[int] = frozenset()
    """Tokens that end the answer and still leave their text."""
    token_ids: bool = False


class Decoder:
    """The text side of one sequence, and its count of tokens."""

    def __init__(
        self, pipeline: OutputPipeline, *, one_call: bool = False, view: View | None = None
    ) -> None:
        """`one_call`: the answer ends before a second tool call."""
        self.num_tokens = 0
        self.num_accepted = 0  # tokens that had been drafted
        self.num_rejected = 0  # drafts that became no token
        self._pipeline = pipeline
        self._one_call = one_call
        self._view = view or View()
        self._holds_reasoning = self._view.reasoning in HELD
        self._hides_reasoning = self._view.reasoning is ReasoningView.HIDDEN
        self._thought = ""
        self._scores: list[TokenLogprob] = []
        self._ids: list[int] = []

    @property
    def num_reasoning_tokens(self) -> int:
        return self._pipeline.num_reasoning_tokens

    def feed(self, event: TokenEvent) -> Sequence[Delta] | str:
        """What the event adds: nothing but text, or nothing yet, comes as a string. More than one
        delta only where text follows a call."""
        token, finish, score, prompt_scores, _, accepted, rejected = event
        hidden = self._hides_reasoning and self._pipeline.in_reasoning
        found: list[Piece] | str = ""
        if token is not None:
            self.num_tokens += 1
            self.num_accepted += accepted
            self.num_rejected += rejected
            if finish is not FinishReason.STOP or token in self._view.kept_stops:
                found = self._pipeline.push(token)
            if self._view.token_ids:
                self._ids.append(token)
        if score is not None:
            self._scores.append(score)
        if self._hides_reasoning:
            self._forget_hidden(hidden)
        ends = finish is not None or self._pipeline.matched_stop is not None
        if isinstance(found, str):
            told = found and (self._scores or self._ids)
            if not (ends or told or prompt_scores or self._holds_reasoning):
                return found
            found = [Content(found)] if found else []
        if ends:
            return self._last(found, event)
        if self._holds_reasoning:
            found = self._shown(found)
        return self._deltas(found, event) if found or prompt_scores else ""

    def _forget_hidden(self, was_hidden: bool) -> None:
        """Scores and ids would tell the reasoning as its text does; so would those of the tag that
        has just opened it."""
        if was_hidden or self._pipeline.in_reasoning:
            self._scores, self._ids = [], []

    def _last(self, pieces: list[Piece], event: TokenEvent) -> Sequence[Delta]:
        """Whatever is held back anywhere comes out."""
        stop = self._pipeline.matched_stop
        cut_off = stop is not None or event.finish in CUT_OFF
        pieces = pieces + self._pipeline.finish(cut_off=cut_off)
        if self._holds_reasoning:
            pieces = self._shown(pieces, last=True)
        deltas = self._deltas(pieces, event)
        deltas[-1] = self._ended(deltas[-1], event)
        return deltas

    def _ended(self, delta: Delta, event: TokenEvent) -> Delta:
        """The last delta, with the reason why it is."""
        stop = self._pipeline.matched_stop  # the held-back end may have completed one
        if delta.finish is not None:
            return delta
        if stop is not None:
            return delta._replace(finish="stop", matched_stop=stop)
        if event.finish is not FinishReason.STOP:
            return delta._replace(finish=str(event.finish))
        finish = "tool_calls" if self._pipeline.num_calls else "stop"
        return delta._replace(finish=finish, matched_stop=event.token)

    def _deltas(self, pieces: Sequence[Piece], event: TokenEvent) -> list[Delta]:
        """At least one, and the scores with the first."""
        deltas = []
        for run in _runs(pieces):
            deltas.append(self._delta(run))
            if deltas[-1].finish is not None:
                break
        scores, self._scores = self._scores, []
        ids, self._ids = self._ids, []
        deltas[0] = deltas[0]._replace(
            logprobs=scores, prompt_logprobs=event.prompt_logprobs, token_ids=ids or ()
        )
        return deltas

    def _shown(self, pieces: Sequence[Piece], *, last: bool = False) -> list[Piece]:
        """The pieces without reasoning, or with all of it as soon as it is complete."""
        rest: list[Piece] = [piece for piece in pieces if not isinstance(piece, Reasoning)]
        if self._hides_reasoning:
            return rest
        self._thought += "".join(piece.text for piece in pieces if isinstance(piece, Reasoning))
        if not self._thought or not (rest or last):
            return rest
        thought, self._thought = self._thought, ""
        return [Reasoning(thought), *rest]

    def _delta(self, pieces: Sequence[Piece]) -> Delta:
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
        return Delta(text, reasoning, calls, finish=finish)


def _runs(pieces: Sequence[Piece]) -> list[Sequence[Piece]]:
    """The pieces, cut where one comes before its predecessor in the order of a delta."""
    starts = [i for i in range(1, len(pieces)) if _place(pieces[i]) < _place(pieces[i - 1])]
    return [pieces[i:j] for i, j in zip([0, *starts], [*starts, len(pieces)], strict=True)]


def _place(piece: Piece) -> int:
    return 0 if isinstance(piece, Reasoning) else 1 if isinstance(piece, Content) else 2


class Thought(NamedTuple):
    """A stretch of reasoning."""

    text: str


class Said(NamedTuple):
    """A stretch of text."""

    text: str
    logprobs: Sequence[TokenLogprob]


class Call(NamedTuple):
    """A whole tool call."""

    id: str
    name: str
    arguments: str


Part = Thought | Said | Call


@dataclass(slots=True)
class Answer:
    """The deltas of one choice, put together."""

    parts: list[Part] = field(default_factory=list)
    """In the order in which the model wrote them."""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: PromptLogprobs | None = None
    finish: str | None = None
    matched_stop: int | str | None = None
    token_ids: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, deltas: Sequence[Delta]) -> Answer:
        """`deltas` of one choice, to its last."""
        return cls(
            parts=_parts(deltas),
            logprobs=[score for delta in deltas for score in delta.logprobs],
            prompt_logprobs=next((d.prompt_logprobs for d in deltas if d.prompt_logprobs), None),
            finish=deltas[-1].finish,
            matched_stop=deltas[-1].matched_stop,
            token_ids=[token for delta in deltas for token in delta.token_ids],
        )

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.parts if isinstance(part, Said))

    @property
    def reasoning(self) -> str:
        return "".join(part.text for part in self.parts if isinstance(part, Thought))

    @property
    def calls(self) -> list[Call]:
        return [part for part in self.parts if isinstance(part, Call)]


Change = Thought | Said | CallDelta


def changes(delta: Delta) -> Iterator[Change]:
    """What a delta adds, one after the other. Its scores go with its text."""
    if delta.reasoning:
        yield Thought(delta.reasoning)
    if delta.text:
        yield Said(delta.text, delta.logprobs)
    yield from delta.calls


def _parts(deltas: Sequence[Delta]) -> list[Part]:
    every = (change for delta in deltas for change in changes(delta))
    return [_part(list(run)) for _, run in groupby(every, _part_key)]


def _part_key(change: Change) -> object:
    """The same for the changes of one part."""
    return change.number if isinstance(change, CallDelta) else type(change)


def _part(run: Sequence[Any]) -> Part:
    """All that was added to one part."""
    first = run[0]
    if isinstance(first, CallDelta):
        return Call(first.id or "", first.name or "", "".join(piece.arguments for piece in run))
    text = "".join(change.text for change in run)
    if isinstance(first, Thought):
        return Thought(text)
    return Said(text, [score for change in run for score in change.logprobs])
