"""The messages of OpenAI's chats: roles, parts of content, images, past calls.

The rest of a body is read in request.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kttrio.server.asking.content import RefusalPart, TemplateContent, template_content
from kttrio.server.asking.tools import PastFunction
from kttrio.server.requests import ImageSource
from kttrio.server.schema.kinds import Either, Many, OneOf, Tagged, Text, refuse
from kttrio.server.schema.records import Nested, given, ignored, refused
from kttrio.text.messages import read_arguments

DETAILS = ("auto", "low", "high")


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPart:
    """A piece of text."""

    text: str = given(Text(), "the text", required=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageUrl:
    """An image as OpenAI has it."""

    url: str = given(Text(1), "a data: URL, or one that may be fetched", required=True)
    detail: str | None = given(OneOf(DETAILS), "low: a small image will do")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImagePart:
    """An image: an object with the URL, as OpenAI has it, or the URL alone."""

    image_url: ImageUrl | str = given(
        Either({str: Text(1), dict: Nested(ImageUrl)}), "where it is", required=True
    )


Part = TextPart | RefusalPart | ImagePart
PARTS = Tagged(
    "type",
    {"text": Nested(TextPart), "image_url": Nested(ImagePart), "refusal": Nested(RefusalPart)},
)
CONTENT = Either({str: Text(), list: Many(PARTS)})
Content = str | tuple[Part, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PastCall:
    """A call in the history."""

    id: str | None = given(Text(), "of the call")
    function: PastFunction = given(Nested(PastFunction), "what was called", required=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """What the system, a developer or a user said."""

    role: str = given(Text(), "who speaks", required=True)
    content: Content = given(CONTENT, "a string, or parts", required=True)
    name: str | None = given(Text(), "of who speaks; some templates show it")


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolMessage(Message):
    """What a tool gave back."""

    tool_call_id: str | None = given(Text(), "the call's id")


@dataclass(frozen=True, slots=True, kw_only=True)
class AssistantMessage:
    """What the model said and called before."""

    role: str = given(Text(), "who speaks", required=True)
    content: Content | None = given(CONTENT, "a string, or parts")
    name: str | None = given(Text(), "of who speaks; some templates show it")
    tool_calls: tuple[PastCall, ...] = given(Many(Nested(PastCall)), "its calls", default=())
    reasoning_content: str | None = given(Text(), "its reasoning")
    reasoning: str | None = given(Text(), "the same in vLLM's words")
    refusal: str | None = given(Text(), "what it said instead of content")
    function_call: None = refused("use 'tool_calls'")
    audio: None = refused("this server hears nothing")
    annotations: None = ignored("the model sees no annotations")


MESSAGES = Many(
    Tagged(
        "role",
        {
            "system": Nested(Message),
            "developer": Nested(Message),
            "user": Nested(Message),
            "assistant": Nested(AssistantMessage),
            "tool": Nested(ToolMessage),
        },
    ),
    least=1,
)
AnyMessage = Message | AssistantMessage


def goes_on(messages: Sequence[AnyMessage]) -> bool:
    """True where an answer can go on with the last message. Raises BadRequestError else."""
    last = messages[-1]
    if not isinstance(last, AssistantMessage) or last.tool_calls or not last.content:
        refuse("continue_final_message", "needs a last message of the assistant, with content")
    return True


def template_messages(messages: Sequence[AnyMessage]) -> list[dict[str, Any]]:
    """The messages as chat templates take them."""
    return [_template_message(message) for message in messages]


def _template_message(message: AnyMessage) -> dict[str, Any]:
    told: dict[str, Any] = {"role": message.role, "content": _content(message.content)}
    if isinstance(message, AssistantMessage):
        told["content"] = told["content"] or message.refusal or told["content"]
        if message.tool_calls:
            told["tool_calls"] = [_past_call(call) for call in message.tool_calls]
        if reasoning := message.reasoning_content or message.reasoning:
            told["reasoning_content"] = reasoning
    if message.name is not None:
        told["name"] = message.name
    if isinstance(message, ToolMessage) and message.tool_call_id is not None:
        told["tool_call_id"] = message.tool_call_id
    return told


def _past_call(call: PastCall) -> dict[str, Any]:
    function = {
        "name": call.function.name,
        "arguments": read_arguments(call.function.arguments),
    }
    return {"id": call.id, "type": "function", "function": function}


def _content(content: Content | None) -> TemplateContent | None:
    return template_content(content, ImagePart) if isinstance(content, tuple) else content


def image_sources(messages: Sequence[AnyMessage]) -> tuple[ImageSource, ...]:
    """The images of all messages, in order."""
    return tuple(_images(messages))


def _images(messages: Sequence[AnyMessage]) -> Iterator[ImageSource]:
    for i, message in enumerate(messages):
        parts = message.content if isinstance(message.content, tuple) else ()
        for j, part in enumerate(parts):
            if isinstance(part, ImagePart):
                yield _image(part, f"messages[{i}].content[{j}].image_url")


def _image(part: ImagePart, path: str) -> ImageSource:
    image = part.image_url
    if isinstance(image, str):
        return ImageSource(image, path, False)
    return ImageSource(image.url, f"{path}.url", image.detail == "low")
