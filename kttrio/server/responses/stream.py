"""Writes a response as numbered events: each item from its beginning to its end, then the whole.

The way of a text delta is kept short: a prepared event per item, filled with text and number.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from kttrio.server import sse
from kttrio.server.completion import Usage
from kttrio.server.decoding import Call, CallDelta, Change, Delta, Said, Thought, changes
from kttrio.server.errors import ApiError
from kttrio.server.ids import new_id
from kttrio.server.responses.output import (
    MESSAGE,
    Head,
    Item,
    Logprobs,
    TextShape,
    call_item,
    end_fields,
    last_status,
    text_item,
    write_response,
)
from kttrio.server.scores import token_logprobs
from kttrio.text.tokenizer import Tokenizer

LAST_EVENTS: Mapping[str, str] = MappingProxyType(
    {
        "completed": "response.completed",
        "incomplete": "response.incomplete",
        "cancelled": "response.incomplete",
    }
)
"""By the response's status; a cancelled one has no event of its own."""
TEXT = "%text%"
NUMBER = "%number%"


class EventWriter:
    """Numbers the events of one response, and sends those of one step together."""

    def __init__(self, stream: sse.EventStream) -> None:
        self._stream = stream
        self._number = 0
        self._held: list[bytes] = []

    def add(self, kind: str, **fields: object) -> None:
        """An event to be sent by `flush`."""
        event = {"type": kind, "sequence_number": self._number, **fields}
        self._held.append(sse.event(event, kind))
        self._number += 1

    def add_response(self, kind: str, response: str) -> None:
        """An event with the response as it stands, as JSON."""
        start = f'{{"type":"{kind}","sequence_number":{self._number},"response":'
        self._held.append(sse.frame(start + response + "}", kind))
        self._number += 1

    def add_delta(self, template: sse.NumberedTemplate, text: str) -> None:
        self._held.append(template.fill(text, self._number))
        self._number += 1

    def flush(self) -> None:
        if self._held:
            self._stream.put(b"".join(self._held))
            self._held.clear()

    def end(self) -> None:
        """Send what is held; nothing follows."""
        self.flush()
        self._stream.end()


def delta_template(kind: str, **fields: object) -> sse.NumberedTemplate:
    event = {"type": kind, "sequence_number": NUMBER, **fields, "delta": TEXT}
    return sse.NumberedTemplate(event, number=NUMBER, text=TEXT, name=kind)


class OpenText:
    """A message or a stretch of reasoning that grows."""

    def __init__(
        self, shape: TextShape, writer: EventWriter, index: int, tokenizer: Tokenizer
    ) -> None:
        """Writes the beginning. `index`: of the item in the response."""
        self.shape = shape
        self._writer = writer
        self._tokenizer = tokenizer
        self._id = new_id(shape.id_prefix)
        self._index = index
        self._place = {"item_id": self._id, "output_index": index, shape.index_name: 0}
        self._texts: list[str] = []
        self._logprobs: Logprobs = []
        event = f"{shape.text_event}.delta"
        self._template = delta_template(event, **self._place, **self._scores([]))
        item = text_item(shape, self._id, "in_progress", [])
        writer.add("response.output_item.added", output_index=index, item=item)
        writer.add(f"{shape.part_event}.added", **self._place, part=shape.part("", []))

    def _scores(self, logprobs: Logprobs) -> dict[str, Any]:
        return {"logprobs": logprobs} if self.shape.scores else {}

    def add_text(self, text: str) -> None:
        self._texts.append(text)
        self._writer.add_delta(self._template, text)

    def add(self, change: Said | Thought) -> None:
        if isinstance(change, Thought) or not change.logprobs:
            self.add_text(change.text)
            return
        logprobs = token_logprobs(self._tokenizer, change.logprobs)
        self._texts.append(change.text)
        self._logprobs += logprobs
        event = f"{self.shape.text_event}.delta"
        self._writer.add(event, **self._place, delta=change.text, logprobs=logprobs)

    def end(self, status: str) -> Item:
        """Write the end; the item as a whole."""
        text, shape, writer = "".join(self._texts), self.shape, self._writer
        part = shape.part(text, self._logprobs)
        scores = self._scores(self._logprobs)
        writer.add(f"{shape.text_event}.done", **self._place, text=text, **scores)
        writer.add(f"{shape.part_event}.done", **self._place, part=part)
        item = text_item(shape, self._id, status, [part])
        writer.add("response.output_item.done", output_index=self._index, item=item)
        return item


class OpenCall:
    """A tool call that grows."""

    def __init__(self, start: CallDelta, writer: EventWriter, index: int) -> None:
        """Writes the beginning. `index`: of the item in the response."""
        self.number = start.number
        self._call = Call(start.id or "", start.name or "", "")
        self._writer = writer
        self._id = new_id("fc_")
        self._index = index
        self._place = {"item_id": self._id, "output_index": index}
        self._arguments: list[str] = []
        self._template = delta_template("response.function_call_arguments.delta", **self._place)
        item = call_item(self._id, "in_progress", self._call)
        writer.add("response.output_item.added", output_index=index, item=item)

    def add(self, change: CallDelta) -> None:
        if change.arguments:
            self._arguments.append(change.arguments)
            self._writer.add_delta(self._template, change.arguments)

    def end(self, status: str) -> Item:
        """Write the end; the item as a whole."""
        call = self._call._replace(arguments="".join(self._arguments))
        event = "response.function_call_arguments.done"
        self._writer.add(event, **self._place, name=call.name, arguments=call.arguments)
        item = call_item(self._id, status, call)
        self._writer.add("response.output_item.done", output_index=self._index, item=item)
        return item


class ResponsesStream:
    """The listener of a streamed response. One item is open at a time."""

    def __init__(
        self, head: Head, stream: sse.EventStream, tokenizer: Tokenizer, *, reasoning: TextShape
    ) -> None:
        self._head = head
        self._tokenizer = tokenizer
        self._reasoning = reasoning
        self._writer = EventWriter(stream)
        self._output: list[Item] = []
        self._text: OpenText | None = None
        self._call: OpenCall | None = None
        self._finish: str | None = None
        for event in ("response.created", "response.in_progress"):
            self._writer.add_response(event, write_response(head, "in_progress", ()))
        self._writer.flush()

    def on_text(self, choice: int, text: str) -> None:
        if self._text is None or self._text.shape is not MESSAGE:
            self._open_text(MESSAGE).add_text(text)
        else:
            self._text.add_text(text)
        self._writer.flush()

    def on_delta(self, choice: int, delta: Delta) -> None:
        for change in changes(delta):
            self._add(change)
        self._finish = delta.finish
        self._writer.flush()

    def _add(self, change: Change) -> None:
        if isinstance(change, CallDelta):
            self._open_call(change).add(change)
        else:
            shape = self._reasoning if isinstance(change, Thought) else MESSAGE
            self._open_text(shape).add(change)

    def _open_text(self, shape: TextShape) -> OpenText:
        """The open item of that shape, which may be a new one."""
        if self._text is None or self._text.shape is not shape:
            self._close("completed")
            self._text = OpenText(shape, self._writer, len(self._output), self._tokenizer)
        return self._text

    def _open_call(self, change: CallDelta) -> OpenCall:
        if self._call is None or self._call.number != change.number:
            self._close("completed")
            self._call = OpenCall(change, self._writer, len(self._output))
        return self._call

    def _close(self, status: str) -> None:
        """End the item that is open."""
        if item := self._text or self._call:
            self._output.append(item.end(status))
        self._text = self._call = None

    def on_end(self, error: ApiError | None, usage: Usage) -> None:
        if error is None:
            self._complete(usage)
        else:
            self._fail(error, usage)
        self._writer.end()

    def _complete(self, usage: Usage) -> None:
        if not self._output and not self._text and not self._call:
            self._open_text(MESSAGE)
        self._close(last_status(self._finish, calls=self._call is not None))
        end = end_fields(self._finish, int(time.time()))
        response = write_response(self._head, output=self._output, usage=usage, **end)
        self._writer.add_response(LAST_EVENTS[end["status"]], response)

    def _fail(self, error: ApiError, usage: Usage) -> None:
        """Both ways in which clients look for an error; the second is the end of the response."""
        self._close("incomplete")
        self._writer.add(
            "error", code=error.code or "server_error", message=error.message, param=error.param
        )
        response = write_response(
            self._head,
            "failed",
            self._output,
            usage=usage,
            error={"code": "server_error", "message": error.message},
        )
        self._writer.add_response("response.failed", response)
