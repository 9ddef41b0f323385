"""What a response is made of: its output items, its usage, and the object around them.

Whole answers are made here, and every piece of a streamed one (stream.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kttrio.server.completion import Usage
from kttrio.server.decoding import Answer, Call, Part, Said, Thought
from kttrio.server.ids import new_id
from kttrio.server.responses.reasoning import carry
from kttrio.server.scores import token_logprobs
from kttrio.text.tokenizer import Tokenizer

Item = dict[str, Any]
Logprobs = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Head:
    """What every state of one response repeats."""

    id: str
    created_at: int
    echo: str
    """The request's settings as they were taken: a JSON object, written once."""


def write_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def join_objects(first: str, second: str) -> str:
    """One JSON object with the members of both, neither of which is empty."""
    return f"{first[:-1]},{second[1:]}"


def write_response(
    head: Head,
    status: str,
    output: Sequence[Item],
    *,
    usage: Usage | None = None,
    **changes: object,
) -> str:
    """The response as it stands, as JSON. `changes`: fields that are null but in this state."""
    state = {
        "id": head.id,
        "object": "response",
        "created_at": head.created_at,
        "status": status,
        "completed_at": None,
        "error": None,
        "incomplete_details": None,
        "output": list(output),
        "usage": usage and usage_fields(usage),
        **changes,
    }
    return join_objects(write_json(state), head.echo)


def usage_fields(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


@dataclass(frozen=True, slots=True)
class TextShape:
    """How an item that holds text looks, and what the events of its growth are called."""

    id_prefix: str
    text_event: str
    part_event: str
    index_name: str
    part: Callable[[str, Logprobs], dict[str, Any]]
    item: Callable[[Sequence[dict[str, Any]]], Item]
    """Of its parts: none while it is open, then one."""
    scores: bool = False
    """Events of its text have log-probabilities."""


def _message(parts: Sequence[dict[str, Any]]) -> Item:
    return {"type": "message", "role": "assistant", "content": list(parts)}


def _output_text(text: str, logprobs: Logprobs) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _reasoning(parts: Sequence[dict[str, Any]]) -> Item:
    return {**_thought(parts), "summary": [], "content": list(parts)}


def _summary(parts: Sequence[dict[str, Any]]) -> Item:
    return {**_thought(parts), "summary": list(parts)}


def _thought(parts: Sequence[dict[str, Any]]) -> Item:
    text = "".join(part["text"] for part in parts)
    return {"type": "reasoning", "encrypted_content": carry(text) if parts else None}


MESSAGE = TextShape(
    id_prefix="msg_",
    text_event="response.output_text",
    part_event="response.content_part",
    index_name="content_index",
    part=_output_text,
    item=_message,
    scores=True,
)
REASONING = TextShape(
    id_prefix="rs_",
    text_event="response.reasoning_text",
    part_event="response.content_part",
    index_name="content_index",
    part=lambda text, _: {"type": "reasoning_text", "text": text},
    item=_reasoning,
)
SUMMARY = TextShape(
    id_prefix="rs_",
    text_event="response.reasoning_summary_text",
    part_event="response.reasoning_summary_part",
    index_name="summary_index",
    part=lambda text, _: {"type": "summary_text", "text": text},
    item=_summary,
)
"""Reasoning where a summary was asked for: in full, as nobody here sums it up."""


def text_item(shape: TextShape, item_id: str, status: str, parts: Sequence[dict[str, Any]]) -> Item:
    return {"id": item_id, **shape.item(parts), "status": status}


def call_item(item_id: str, status: str, call: Call) -> Item:
    return {
        "id": item_id,
        "type": "function_call",
        "call_id": call.id,
        "name": call.name,
        "arguments": call.arguments,
        "status": status,
    }


def end_fields(finish: str | None, now: int) -> dict[str, Any]:
    """The status of a response that ended by itself, at its limit or by an operator, and what goes
    with it."""
    if finish == "abort":
        return {"status": "cancelled"}
    if finish == "length":
        return {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
    return {"status": "completed", "completed_at": now}


def last_status(finish: str | None, *, calls: bool) -> str:
    """The status of the last item. `calls`: it is a call, which a stop string has cut off where the
    response does not end with calls."""
    is_whole = finish == "tool_calls" or (finish == "stop" and not calls)
    return "completed" if is_whole else "incomplete"


def whole_response(
    head: Head,
    answer: Answer,
    usage: Usage,
    *,
    tokenizer: Tokenizer,
    reasoning: TextShape,
    now: int,
) -> str:
    """A response that has ended, as JSON. `now`: Unix time in seconds."""
    parts = answer.parts or [Said("", ())]
    last = last_status(answer.finish, calls=isinstance(parts[-1], Call))
    statuses = ["completed"] * (len(parts) - 1) + [last]
    items = [
        _item(part, status, tokenizer, reasoning)
        for part, status in zip(parts, statuses, strict=True)
    ]
    return write_response(head, output=items, usage=usage, **end_fields(answer.finish, now))


def _item(part: Part, status: str, tokenizer: Tokenizer, reasoning: TextShape) -> Item:
    if isinstance(part, Call):
        return call_item(new_id("fc_"), status, part)
    shape = reasoning if isinstance(part, Thought) else MESSAGE
    scores = part.logprobs if isinstance(part, Said) else ()
    content = shape.part(part.text, token_logprobs(tokenizer, scores))
    return text_item(shape, new_id(shape.id_prefix), status, [content])
