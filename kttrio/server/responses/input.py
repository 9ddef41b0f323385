"""The input of a response: items of the past, and the chat messages that they come to.

Reasoning, text and calls of one answer are items of their own here, and one message of the
assistant in a chat: whichever way a history comes, the model reads the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kttrio.server.asking.content import RefusalPart, TemplateContent, template_content
from kttrio.server.asking.tools import PastFunction
from kttrio.server.requests import ImageSource
from kttrio.server.responses.reasoning import carried
from kttrio.server.schema.kinds import Either, Many, OneOf, Tagged, Text, refuse
from kttrio.server.schema.records import Nested, given, ignored, refused

ROLES = ("system", "developer", "user", "assistant")
DETAILS = ("auto", "low", "high", "original")


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPart:
    """A piece of text."""

    text: str = given(Text(), "the text", required=True)
    annotations: None = ignored("the model sees no annotations")
    logprobs: None = ignored("the model sees text")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImagePart:
    """An image."""

    image_url: str = given(Text(1), "a data: URL, or one that may be fetched", required=True)
    detail: str | None = given(OneOf(DETAILS), "low: a small image will do")
    file_id: None = refused("no files are kept here, send 'image_url'")


Part = TextPart | RefusalPart | ImagePart
PARTS = Tagged(
    "type",
    {
        "input_text": Nested(TextPart),
        "output_text": Nested(TextPart),
        "text": Nested(TextPart),
        "refusal": Nested(RefusalPart),
        "input_image": Nested(ImagePart),
    },
)
CONTENT = Either({str: Text(), list: Many(PARTS)})
Content = str | tuple[Part, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """What somebody said."""

    role: str = given(OneOf(ROLES), "who speaks", required=True)
    content: Content = given(CONTENT, "a string, or parts", required=True)
    id: None = ignored("nothing is stored")
    status: None = ignored("it is past")
    phase: None = ignored("the model is told of none")


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionCall(PastFunction):
    """A call that the model made."""

    call_id: str = given(Text(1), "of the call", required=True)
    id: None = ignored("nothing is stored")
    status: None = ignored("it is past")


@dataclass(frozen=True, slots=True, kw_only=True)
class CallOutput:
    """What a call gave back."""

    call_id: str = given(Text(1), "of the call", required=True)
    output: Content = given(CONTENT, "a string, or parts", required=True)
    id: None = ignored("nothing is stored")
    status: None = ignored("it is past")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasoningText:
    """A stretch of it."""

    text: str = given(Text(), "the text", required=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reasoning:
    """What the model thought."""

    content: tuple[ReasoningText, ...] = given(
        Many(Tagged("type", dict.fromkeys(("reasoning_text", "text"), Nested(ReasoningText)))),
        "the reasoning itself",
        default=(),
    )
    encrypted_content: str | None = given(
        Text(), "the same as this server wrote it; another's says nothing here"
    )
    summary: tuple[ReasoningText, ...] = given(
        Many(Tagged("type", {"summary_text": Nested(ReasoningText)})),
        "stands for reasoning that is not told otherwise",
        default=(),
    )
    id: None = ignored("nothing is stored")
    status: None = ignored("it is past")


Item = Message | FunctionCall | CallOutput | Reasoning
MESSAGE = Nested(Message)
TYPED_ITEM = Tagged(
    "type",
    {
        "message": MESSAGE,
        "function_call": Nested(FunctionCall),
        "function_call_output": Nested(CallOutput),
        "reasoning": Nested(Reasoning),
    },
)


class InputItem:
    """An item; one that does not say its type is a message."""

    def read(self, value: Any, path: str) -> Item:
        named = value.get("type") if isinstance(value, dict) else None
        if named == "item_reference":
            refuse(path, "is a reference, but nothing is stored here: send the item itself")
        item: Item = (TYPED_ITEM if named is not None else MESSAGE).read(value, path)
        return item

    def schema(self) -> dict[str, Any]:
        message = MESSAGE.schema()
        unnamed = {**message["properties"], "type": {"type": "null"}}
        return {"anyOf": [TYPED_ITEM.schema(), {**message, "properties": unnamed}]}


INPUT = Either({str: Text(), list: Many(InputItem(), least=1)})
Input = str | tuple[Item, ...]


def template_messages(asked: Input) -> list[dict[str, Any]]:
    """The messages as chat templates take them."""
    if isinstance(asked, str):
        return [{"role": "user", "content": asked}]
    messages: list[dict[str, Any]] = []
    turn: _Turn | None = None
    for item in asked:
        if isinstance(item, CallOutput) or (isinstance(item, Message) and not _is_models(item)):
            turn = None
            messages.append(_others_message(item))
        elif not isinstance(item, Reasoning) or _thought(item):
            if turn is None or not turn.takes(item):
                turn = _Turn()
                messages.append(turn.message)
            turn.add(item)
    return messages


def _is_models(item: Message) -> bool:
    return item.role == "assistant"


def _others_message(item: Message | CallOutput) -> dict[str, Any]:
    """What the model did not write."""
    if isinstance(item, CallOutput):
        return {"role": "tool", "content": _content(item.output), "tool_call_id": item.call_id}
    return {"role": item.role, "content": _content(item.content)}


class _Turn:
    """A message of the assistant that grows by the items of one answer."""

    def __init__(self) -> None:
        self.message: dict[str, Any] = {"role": "assistant", "content": None}
        self._said_last = False

    def takes(self, item: Message | FunctionCall | Reasoning) -> bool:
        """Whether the item is of the same answer: reasoning begins one, and two texts are two."""
        if isinstance(item, Reasoning):
            return self.message["content"] is None and "tool_calls" not in self.message
        return not (isinstance(item, Message) and self._said_last)

    def add(self, item: Message | FunctionCall | Reasoning) -> None:
        self._said_last = isinstance(item, Message)
        if isinstance(item, Reasoning):
            before = self.message.get("reasoning_content", "")
            self.message["reasoning_content"] = before + _thought(item)
        elif isinstance(item, Message):
            self.message["content"] = _joined(self.message["content"], _content(item.content))
        else:
            self.message.setdefault("tool_calls", []).append(_past_call(item))


def _past_call(call: FunctionCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.call_id, "type": "function", "function": function}


def _thought(item: Reasoning) -> str:
    """The reasoning itself, or else what stands for it."""
    text = "".join(part.text for part in item.content)
    text = text or carried(item.encrypted_content or "") or ""
    return text or "\n".join(part.text for part in item.summary)


def _joined(before: TemplateContent | None, after: TemplateContent) -> TemplateContent:
    """Text behind a call goes on with the text before it."""
    if before is None:
        return after
    if isinstance(before, str) and isinstance(after, str):
        return before + after
    return [*_as_parts(before), *_as_parts(after)]


def _as_parts(content: TemplateContent) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _content(content: Content) -> TemplateContent:
    return content if isinstance(content, str) else template_content(content, ImagePart)


def image_sources(asked: Input) -> Iterator[ImageSource]:
    """The images of all items, in order."""
    if isinstance(asked, str):
        return
    for i, item in enumerate(asked):
        if isinstance(item, Message):
            yield from _images(item.content, f"input[{i}].content")
        elif isinstance(item, CallOutput):
            yield from _images(item.output, f"input[{i}].output")


def _images(content: Content, path: str) -> Iterator[ImageSource]:
    if isinstance(content, str):
        return
    for j, part in enumerate(content):
        if isinstance(part, ImagePart):
            yield ImageSource(part.image_url, f"{path}[{j}].image_url", part.detail == "low")
