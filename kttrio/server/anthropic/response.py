"""How Anthropic's clients are answered: whole messages, events made from deltas, and errors.

The streaming path is kept short: each block's delta is one prepared event, filled with new text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isfinite
from types import MappingProxyType
from typing import Any

from kttrio.server import sse
from kttrio.server.anthropic.signature import seal
from kttrio.server.completion import Usage
from kttrio.server.decoding import (
    Answer,
    Call,
    CallDelta,
    Change,
    Delta,
    Part,
    Said,
    Thought,
    changes,
)
from kttrio.server.errors import ApiError, aborted
from kttrio.server.visits import current_id

HOLE = "%text%"
ERROR_TYPES: Mapping[int, str] = MappingProxyType(
    {
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        413: "request_too_large",
        429: "rate_limit_error",
        503: "overloaded_error",
    }
)
STOP_REASONS: Mapping[str, str] = MappingProxyType(
    {"stop": "end_turn", "tool_calls": "tool_use", "length": "max_tokens"}
)
UNTHREADED: Mapping[str, Any] = MappingProxyType({"error_code": "thread_unsupported_request"})
"""Has Anthropic's tool runner send the whole history, instead of a thread to go on with."""


@dataclass(frozen=True, slots=True)
class Head:
    """What is known of an answer before it begins."""

    id: str
    model: str
    num_prompt_tokens: int
    max_tokens: int
    """As asked for; the context may have room for fewer."""
    shows_thinking: bool
    request_id: str | None
    """Of the HTTP request, which errors tell."""

    def message(self) -> dict[str, Any]:
        """The message before anything is said."""
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage_fields(Usage(self.num_prompt_tokens, 0, 0)),
        }


def message_object(head: Head, answer: Answer, usage: Usage) -> dict[str, Any]:
    """A whole message."""
    content = [_whole_block(part, shows_thinking=head.shows_thinking) for part in answer.parts]
    stop = stop_fields(answer.finish, answer.matched_stop, usage, head.max_tokens)
    return {**head.message(), "content": content, **stop, "usage": usage_fields(usage)}


def _whole_block(part: Part, *, shows_thinking: bool) -> dict[str, Any]:
    if isinstance(part, Said):
        return {"type": "text", "text": part.text}
    if isinstance(part, Call):
        return {**_begun_call(part.id, part.name), "input": read_input(part.arguments)}
    if shows_thinking:
        return {"type": "thinking", "thinking": part.text, "signature": seal()}
    return {"type": "thinking", "thinking": "", "signature": seal(part.text)}


def read_input(arguments: str) -> dict[str, Any]:
    """A call's arguments; none where the model was cut off before their end, for half of them must
    not be taken for all."""
    try:
        value = json.loads(arguments, parse_constant=str, parse_float=_number)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _number(spelled: str) -> float | str:
    """Models may write numbers that JSON cannot say again: those stay text."""
    number = float(spelled)
    return number if isfinite(number) else spelled


def _begun_call(id: str | None, name: str | None) -> dict[str, Any]:
    return {"type": "tool_use", "id": id, "name": name, "input": {}}


def stop_fields(
    finish: str | None, matched: int | str | None, usage: Usage, max_tokens: int
) -> dict[str, Any]:
    """Why the answer ended, in Anthropic's words."""
    if isinstance(matched, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": matched}
    reason = STOP_REASONS[finish or "stop"]
    if finish == "length" and usage.completion_tokens < max_tokens:
        reason = "model_context_window_exceeded"
    return {"stop_reason": reason, "stop_sequence": None}


def usage_fields(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"thinking_tokens": usage.reasoning_tokens},
    }


def event(value: dict[str, Any]) -> bytes:
    """An event, which has the name of its type."""
    return sse.event(value, value["type"])


PING = event({"type": "ping"})


class MessageStream:
    """Writes a message as events: its start, its blocks one after the other, its end."""

    def __init__(self, head: Head, stream: sse.EventStream) -> None:
        self._head = head
        self._stream = stream
        self._index = -1
        self._key: object = None  # which block is open: a kind of text, or a call's number
        self._template = _template(0, "text_delta", "text")
        self._hidden: list[str] = []
        self._finish: str | None = None
        self._matched: int | str | None = None
        stream.put(event({"type": "message_start", "message": head.message()}) + PING)

    def on_text(self, choice: int, text: str) -> None:
        if self._key is Said:
            self._stream.put(self._template.fill(text))
        else:
            self.on_delta(choice, Delta(text))

    def on_delta(self, choice: int, delta: Delta) -> None:
        self._stream.put(b"".join(self._events(delta)))
        self._finish, self._matched = delta.finish, delta.matched_stop

    def _events(self, delta: Delta) -> Iterator[bytes]:
        for change in changes(delta):
            key = change.number if isinstance(change, CallDelta) else type(change)
            if key != self._key:
                yield from self._close()
                yield self._open(key, change)
            if isinstance(change, Thought) and not self._head.shows_thinking:
                self._hidden.append(change.text)
            elif text := change.arguments if isinstance(change, CallDelta) else change.text:
                yield self._template.fill(text)

    def _open(self, key: object, change: Change) -> bytes:
        self._key = key
        self._index += 1
        if isinstance(change, CallDelta):
            block, delta = _begun_call(change.id, change.name), ("input_json_delta", "partial_json")
        elif isinstance(change, Thought):
            block = {"type": "thinking", "thinking": "", "signature": ""}
            delta = ("thinking_delta", "thinking")
        else:
            block, delta = {"type": "text", "text": ""}, ("text_delta", "text")
        self._template = _template(self._index, *delta)
        return self._block_event("start", content_block=block)

    def _close(self) -> Iterator[bytes]:
        if self._key is Thought:
            signature = {"type": "signature_delta", "signature": seal("".join(self._hidden))}
            yield self._block_event("delta", delta=signature)
            self._hidden = []
        if self._key is not None:
            yield self._block_event("stop")

    def _block_event(self, what: str, **fields: object) -> bytes:
        return event({"type": f"content_block_{what}", "index": self._index, **fields})

    def on_end(self, error: ApiError | None, usage: Usage) -> None:
        if error is None and self._finish == "abort":
            error = aborted()
        if error is not None:
            self._stream.put(event(error_fields(error, self._head.request_id)))
        else:
            self._stream.put(b"".join([*self._close(), *self._last(usage)]))
        self._stream.end()

    def _last(self, usage: Usage) -> Iterator[bytes]:
        stop = stop_fields(self._finish, self._matched, usage, self._head.max_tokens)
        yield event({"type": "message_delta", "delta": stop, "usage": usage_fields(usage)})
        yield event({"type": "message_stop"})


def _template(index: int, kind: str, field: str) -> sse.EventTemplate:
    """The event of a piece of a block's text."""
    delta = {"type": kind, field: HOLE}
    value = {"type": "content_block_delta", "index": index, "delta": delta}
    return sse.EventTemplate(value, HOLE, "content_block_delta")


def error_body(error: ApiError) -> dict[str, Any]:
    """Anthropic's error object, for the request that this task works for."""
    return error_fields(error, current_id())


def error_fields(error: ApiError, request_id: str | None) -> dict[str, Any]:
    """Anthropic's error object, also the content of an error event in a stream."""
    usual = "invalid_request_error" if error.status < 500 else "api_error"
    kind, message = ERROR_TYPES.get(error.status, usual), error.message
    if error.code == "context_length_exceeded":
        message = f"prompt is too long: {message}"  # agents look for it, and shorten their history
    details = {"details": dict(UNTHREADED)} if error.param == "thread" else {}
    told = {"type": kind, "message": message, **details}
    return {"type": "error", "error": told, "request_id": request_id}
