"""Splits a model's text into reasoning and answer at its `<think>` tags, as it streams.

Not here: tool calls; their parser reads the answer that leaves this place.
"""

from __future__ import annotations

from enum import Enum
from typing import Literal

from kttrio.config import ConfigError
from kttrio.text.markers import Markers

OPEN, CLOSE = "<think>", "</think>"
TAGS = (OPEN, CLOSE)
NAMES = ("qwen3", "off")
_TOOL_CALL = "<tool_call>"
_ENDS_OF_REASONING = Markers((CLOSE, _TOOL_CALL))
_TAGS_IN_ANSWER = Markers((OPEN, CLOSE, _TOOL_CALL, "<function="))


class ReasoningStart(Enum):
    """What the rendered prompt says about the first token of the output."""

    OPEN = "the prompt ends inside an open <think>"
    CLOSED = "the prompt ends with a closed <think></think>"
    UNSAID = "the model may begin with <think> itself"

    @classmethod
    def of(cls, prompt: str) -> ReasoningStart:
        end = prompt[-256:].rstrip()
        if end.endswith(OPEN):
            return cls.OPEN
        return cls.CLOSED if end.endswith(CLOSE) else cls.UNSAID


def detect(template_text: str) -> str | None:
    """The parser that a checkpoint's chat template asks for."""
    return "qwen3" if CLOSE in template_text or OPEN in template_text else None


def check_name(name: str) -> str:
    """The name, if it is one of ours. Raises ConfigError that lists them."""
    if name not in NAMES:
        raise ConfigError(f"--reasoning-parser {name}: unknown; known are {', '.join(NAMES)}")
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
    """Parser `qwen3` for one stream; pieces together do not depend on how the text was cut.

    `</think>` ends the reasoning, and so does a tool call; a second `</think>` is dropped unless
    the answer itself opened a `<think>`. Newlines around the reasoning are dropped.
    """

    __slots__ = ("_buffer", "_opened_in_answer", "_said", "_state")

    def __init__(self, start: ReasoningStart) -> None:
        states: dict[ReasoningStart, _State] = {
            ReasoningStart.OPEN: "opened",
            ReasoningStart.CLOSED: "answer",
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
        if not self._buffer and "<" not in text:
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
            if not self._begin(OPEN):
                self._state = "reasoning"
            return ""
        found = _ENDS_OF_REASONING.find(self._buffer)
        if found:
            place, tag = found
            said = self._take(place).rstrip("\n")
            if tag == CLOSE:
                self._take(len(CLOSE))
                self._state = "closed"
            else:
                self._state = "plain"
            return said
        kept = len(self._buffer) - _ENDS_OF_REASONING.held(self._buffer)
        return self._take(len(self._buffer[:kept].rstrip("\n")))

    def _answer(self) -> str:
        """One step outside the reasoning."""
        if self._state == "maybe opening":
            self._maybe_open()
            return ""
        if self._state == "closed":
            self._buffer = self._buffer.lstrip("\n")
            if self._buffer:
                self._state = "answer"
            return ""
        if self._state == "plain":
            return self._take(len(self._buffer))
        return self._answer_with_tags()

    def _answer_with_tags(self) -> str:
        found = _TAGS_IN_ANSWER.find(self._buffer)
        if not found:
            said = self._take(len(self._buffer) - _TAGS_IN_ANSWER.held(self._buffer))
            self._said = self._said or bool(said)
            return said
        place, tag = found
        if tag == CLOSE and not self._opened_in_answer:
            said = self._take(place)
            self._take(len(CLOSE))
            self._said = self._said or bool(said)
            if not self._said:
                self._state = "closed"
            return said
        self._said = True
        if tag in TAGS:
            self._opened_in_answer += 1 if tag == OPEN else -1
            return self._take(place + len(tag))
        self._state = "plain"
        return self._take(place)

    def _maybe_open(self) -> None:
        text = self._buffer.lstrip()
        if text.startswith(OPEN):
            self._buffer = text[len(OPEN) :]
            self._state = "opened"
        elif not OPEN.startswith(text):
            self._state = "answer"

    def _begin(self, tag: str) -> bool:
        """Drop the tag at the start of the buffer; True also while it may still come."""
        if self._buffer.startswith(tag):
            self._take(len(tag))
            return True
        return tag.startswith(self._buffer)

    def _take(self, size: int) -> str:
        taken, self._buffer = self._buffer[:size], self._buffer[size:]
        return taken
