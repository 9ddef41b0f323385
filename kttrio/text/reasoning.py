"""Splits a model's text into reasoning and answer at its `<think>` tags, as it streams.

The parsers differ in facts, not in code: `FORMATS` states them. Not here: tool calls; their parser
reads the answer that leaves this place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import Literal

from kttrio.config import ConfigError
from kttrio.text.markers import Markers, follows


class ReasoningStart(Enum):
    """What is known of the first token of the output before it comes."""

    OPEN = "it is reasoning"
    CLOSED = "it is answer"
    UNSAID = "the model may begin with <think> itself"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasoningFormat:
    """What tells one family's reasoning from another's."""

    sign: str
    """Stands in every chat template of the family and in no other's below it in the table."""
    opens: tuple[str, ...] = ("<think>",)
    closes: tuple[str, ...] = ("</think>",)
    calls: tuple[str, ...] = ("<tool_call>",)
    """A tool call's first tag: it ends the reasoning, also where the model forgot to close it."""
    calls_go_on: tuple[str, ...] = ()
    """What follows that tag where a call begins, and not where reasoning mentions it. None given:
    the tag alone tells."""
    bare_calls: tuple[str, ...] = ()
    """Tags with which a call may begin in the answer, but which reasoning may well mention."""
    unsaid: ReasoningStart = ReasoningStart.UNSAID
    """How the output begins where the prompt does not say it."""

    @property
    def tags(self) -> tuple[str, ...]:
        return self.opens + self.closes

    def start(self, prompt: str, *, said: str | None = None) -> ReasoningStart:
        """How the output of this rendered prompt begins. `said`: the text of the answer that it
        goes on with."""
        if said is not None:
            is_open = max(map(said.rfind, self.opens)) > max(map(said.rfind, self.closes))
            return ReasoningStart.OPEN if is_open else ReasoningStart.CLOSED
        end = prompt[-256:].rstrip()
        if end.endswith(self.opens):
            return ReasoningStart.OPEN
        return ReasoningStart.CLOSED if end.endswith(self.closes) else self.unsaid


_DEEPSEEK_CALLS = ("<｜tool▁calls▁begin｜>", "<｜DSML｜function_calls>")

FORMATS: Mapping[str, ReasoningFormat] = MappingProxyType(
    {
        "minimax": ReasoningFormat(
            sign="minimax:tool_call", calls=("<minimax:tool_call>",), calls_go_on=("<invoke",)
        ),
        "kimi": ReasoningFormat(
            sign="<|im_middle|>",
            opens=("<think>", "◁think▷"),  # the second pair before Kimi-K2
            closes=("</think>", "◁/think▷"),
            calls=("<|tool_calls_section_begin|>",),
        ),
        "glm45": ReasoningFormat(sign="<|observation|>"),
        "deepseek-r1": ReasoningFormat(
            sign="<｜Assistant｜><think>",
            calls=_DEEPSEEK_CALLS,
            unsaid=ReasoningStart.OPEN,  # it always reasons, and never writes the opening tag
        ),
        "deepseek-v3": ReasoningFormat(sign="<｜Assistant｜>", calls=_DEEPSEEK_CALLS),
        "qwen3": ReasoningFormat(
            sign="", calls_go_on=("<function=", "{"), bare_calls=("<function=",)
        ),
    }
)
"""By parser name; a checkpoint gets the first that knows it."""

OFF = "off"
_ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "deepseek_r1": "deepseek-r1",
        "deepseek_v3": "deepseek-v3",
        "kimi_k2": "kimi",
        "minimax_m2": "minimax",
        "qwen3-thinking": "qwen3",
    }
)
"""Names from other servers that need no format of their own: the prompt says how it starts."""


def detect(taught: str) -> str | None:
    """The parser for a checkpoint whose chat template, or what else taught it, is this text."""
    for name, format in FORMATS.items():
        if format.sign in taught and any(tag in taught for tag in format.tags):
            return name
    return None


def check_name(name: str) -> str:
    """Our name for the parser. Raises ConfigError that lists all."""
    name = _ALIASES.get(name, name)
    if name not in (*FORMATS, OFF):
        known = ", ".join((*sorted([*FORMATS, *_ALIASES]), OFF))
        raise ConfigError(f"--reasoning-parser {name}: unknown; known are {known}")
    return name


_State = Literal[
    "maybe opening",  # white space so far; <think> may come
    "opened",  # inside, nothing said yet
    "reasoning",
    "closed",  # outside, nothing said yet
    "answer",
    "plain",  # a tool call has begun: tags mean nothing any more
]


class ReasoningSplitter:
    """One stream; pieces together do not depend on how the text was cut.

    The closing tag ends the reasoning, and so does a tool call; a second one is dropped unless the
    answer itself opened another. Newlines around the reasoning are dropped.
    """

    __slots__ = (
        "_answer_state",
        "_buffer",
        "_ends",
        "_opened_in_answer",
        "_said",
        "_state",
        "_tags",
        "format",
    )

    def __init__(
        self,
        format: ReasoningFormat,
        start: ReasoningStart,
        *,
        calls: bool = True,
        forced: bool = False,
    ) -> None:
        """Without `calls` the model has no tools, and their tags are text like any other. The
        answer is `forced` where a grammar holds it: then tags of reasoning in it are text too."""
        self.format = format
        self._answer_state: _State = "plain" if forced else "answer"
        self._ends = Markers(format.closes + format.calls * calls)
        self._tags = Markers(format.tags + (format.calls + format.bare_calls) * calls)
        states: dict[ReasoningStart, _State] = {
            ReasoningStart.OPEN: "opened",
            ReasoningStart.CLOSED: "closed",
            ReasoningStart.UNSAID: "maybe opening",
        }
        self._state = states[start]
        self._buffer = ""
        self._said = False
        self._opened_in_answer = 0

    @property
    def in_reasoning(self) -> bool:
        """The next token is reasoning, as far as is known."""
        return self._state in ("opened", "reasoning")

    def push(self, text: str) -> tuple[str, str]:
        """(reasoning, content) that is certain now; the reasoning comes first."""
        if not self._buffer and not self._tags.may_begin(text):
            if self._state == "answer" or self._state == "plain":
                self._said = self._said or bool(text)
                return "", text
            if self._state == "reasoning" and not text.endswith("\n"):
                return text, ""
        self._buffer += text
        reasoning, content = [], []
        while self._buffer:
            state, size = self._state, len(self._buffer)
            if state in ("opened", "reasoning"):
                reasoning.append(self._reason())
            else:
                content.append(self._answer())
            if self._state is state and len(self._buffer) == size:
                break
        return "".join(reasoning), "".join(content)

    def finish(self) -> tuple[str, str]:
        """What was held back, a half tag included; newlines after reasoning are dropped."""
        text, self._buffer = self._buffer, ""
        if self.in_reasoning:
            return text.rstrip("\n"), ""
        return "", text

    def _reason(self) -> str:
        """One step inside the reasoning: what is certain of it leaves the buffer."""
        if self._state == "opened":
            self._buffer = self._buffer.lstrip("\n")
            if not self._begin_again():
                self._state = "reasoning"
            return ""
        found = self._ends.find(self._buffer)
        if not found:
            return self._take_thought(len(self._buffer) - self._ends.held(self._buffer))
        place, tag = found
        closes = tag in self.format.closes
        ends = closes or self._begins_call(place + len(tag))
        if ends is None:
            return self._take_thought(place)
        if not ends:
            return self._take(place + len(tag))
        said = self._take(place).rstrip("\n")
        self._take(len(tag) * closes)
        self._state = "closed" if closes else "plain"
        return said

    def _take_thought(self, size: int) -> str:
        """Newlines at the end stay until it is known whether reasoning follows them."""
        return self._take(len(self._buffer[:size].rstrip("\n")))

    def _begins_call(self, place: int) -> bool | None:
        """Whether a call goes on here, behind its first tag; None: not yet known."""
        if not self.format.calls_go_on:
            return True
        return follows(self._buffer[place:], self.format.calls_go_on)

    def _answer(self) -> str:
        """One step outside the reasoning."""
        if self._state == "maybe opening":
            self._maybe_open()
            return ""
        if self._state == "closed":
            self._buffer = self._buffer.lstrip("\n")
            if self._buffer:
                self._state = self._answer_state
            return ""
        if self._state == "plain":
            return self._take(len(self._buffer))
        return self._answer_with_tags()

    def _answer_with_tags(self) -> str:
        found = self._tags.find(self._buffer)
        if not found:
            said = self._take(len(self._buffer) - self._tags.held(self._buffer))
            self._said = self._said or bool(said)
            return said
        place, tag = found
        if tag in self.format.closes and not self._opened_in_answer:
            said = self._take(place)
            self._take(len(tag))
            self._said = self._said or bool(said)
            if not self._said:
                self._state = "closed"
            return said
        self._said = True
        if tag in self.format.tags:
            self._opened_in_answer += 1 if tag in self.format.opens else -1
            return self._take(place + len(tag))
        self._state = "plain"
        return self._take(place)

    def _maybe_open(self) -> None:
        text = self._buffer.lstrip()
        opening = self._opening(text)
        if opening:
            self._buffer = text[len(opening) :]
            self._state = "opened"
        elif opening is None:
            self._state = self._answer_state

    def _begin_again(self) -> bool:
        """Drop an opening tag at the start of the buffer; True also while it may still come."""
        opening = self._opening(self._buffer)
        self._take(len(opening or ""))
        return opening is not None

    def _opening(self, text: str) -> str | None:
        """The opening tag that the text starts with; empty while it may still become one."""
        for tag in self.format.opens:
            if text.startswith(tag):
                return tag
        return "" if any(tag.startswith(text) for tag in self.format.opens) else None

    def _take(self, size: int) -> str:
        taken, self._buffer = self._buffer[:size], self._buffer[size:]
        return taken
