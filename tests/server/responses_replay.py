"""Reads a response's events as a strict client would: nothing is missing or comes out of turn."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, get_args

from openai.types.responses import Response, ResponseStreamEvent

Event = dict[str, Any]

EVENTS = {
    get_args(kind.model_fields["type"].annotation)[0]: kind
    for kind in get_args(get_args(ResponseStreamEvent)[0])
}
ENDS = ("response.completed", "response.incomplete", "response.failed")
TEXTS = ("response.output_text", "response.reasoning_text", "response.reasoning_summary_text")


def read_named_events(body: bytes) -> list[Event]:
    """The events of a stream; each says its name twice, and there is no [DONE]."""
    text = body.decode()
    assert text.endswith("\n\n")
    events = []
    for block in text[:-2].split("\n\n"):
        if block.startswith(":"):
            continue
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        events.append(event)
    return events


def replay(events: Sequence[Event]) -> dict[str, Any]:
    """Check the events one by one; the response of the last."""
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    reader = _Reader()
    for event in events:
        EVENTS[event["type"]].model_validate(event)
        reader.read(event)
    last: dict[str, Any] = events[-1]["response"]
    assert events[-1]["type"] in ENDS
    assert last["output"] == reader.done
    assert reader.open is None
    Response.model_validate(last)
    return last


class _Reader:
    """What the events have said so far."""

    def __init__(self) -> None:
        self.done: list[dict[str, Any]] = []
        self.open: dict[str, Any] | None = None
        self._text = ""
        self._logprobs: list[Any] = []

    def read(self, event: Event) -> None:
        kind = event["type"]
        if "output_index" in event:
            assert event["output_index"] == len(self.done)
        if kind == "response.output_item.added":
            assert self.open is None
            self.open = event["item"]
            assert self.open["status"] == "in_progress"
            self._text, self._logprobs = "", []
        elif "item_id" in event:
            assert self.open is not None
            assert event["item_id"] == self.open["id"]
            self._read_growth(kind, event)
        elif kind == "response.output_item.done":
            self._end(event["item"])

    def _read_growth(self, kind: str, event: Event) -> None:
        if kind.endswith(".delta"):
            self._text += event["delta"]
            self._logprobs += event.get("logprobs", [])
        elif kind.removesuffix(".done") in TEXTS:
            assert event["text"] == self._text
            assert event.get("logprobs", []) == self._logprobs
        elif kind == "response.function_call_arguments.done":
            assert event["arguments"] == self._text
        elif kind.endswith("part.done"):
            assert event["part"]["text"] == self._text

    def _end(self, item: dict[str, Any]) -> None:
        assert self.open is not None
        assert (item["id"], item["type"]) == (self.open["id"], self.open["type"])
        assert self._text == item_text(item)
        self.done.append(item)
        self.open = None


def item_text(item: dict[str, Any]) -> str:
    if item["type"] == "function_call":
        return str(item["arguments"])
    return "".join(part["text"] for part in item.get("content") or item.get("summary") or ())


def without_ids(response: dict[str, Any]) -> dict[str, Any]:
    """The response, but for what differs from one to the next."""
    output = [
        {**item, "id": None, **({"call_id": None} if "call_id" in item else {})}
        for item in response["output"]
    ]
    changing = dict.fromkeys(("id", "created_at", "completed_at"))
    return {**response, **changing, "output": output}
