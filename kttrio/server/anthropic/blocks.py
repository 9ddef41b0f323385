"""Anthropic's messages as records: roles, and the blocks that each may have.

What chat templates make of them is in messages.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from kttrio.server.requests import ImageSource
from kttrio.server.schema.kinds import Boolean, Either, Kind, Many, Object, Tagged, Text
from kttrio.server.schema.records import Nested, given, ignored

UNCACHED = "nothing is billed, so there is nothing to mark"
MEND = "send documents and other results as text; this server runs no tools of its own"

Blocks = Sequence[Any]
"""Of the kinds that their place may have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextBlock:
    """A piece of text."""

    text: str = given(Text(), "the text", required=True)
    cache_control: None = ignored(UNCACHED)
    citations: None = ignored("the model reads the text alone")


@dataclass(frozen=True, slots=True, kw_only=True)
class Base64Source:
    """An image in the body itself."""

    media_type: str = given(Text(1), "image/png, image/jpeg or image/webp", required=True)
    data: str = given(Text(1), "the file in base64", required=True)

    def source(self, path: str) -> ImageSource:
        url = f"data:{self.media_type};base64,{self.data}"
        return ImageSource(url, f"{path}.data", low_detail=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class UrlSource:
    """An image that the server is to fetch."""

    url: str = given(Text(1), "data:, or http: and https: where allowed", required=True)

    def source(self, path: str) -> ImageSource:
        return ImageSource(self.url, f"{path}.url", low_detail=False)


IMAGE_SOURCE = Tagged(
    "type", {"base64": Nested(Base64Source), "url": Nested(UrlSource)}, mend="no files are kept"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageBlock:
    """An image."""

    source: Base64Source | UrlSource = given(IMAGE_SOURCE, "where the image is", required=True)
    cache_control: None = ignored(UNCACHED)


def _content(**kinds: type) -> Kind:
    """Text, or blocks of these kinds."""
    blocks = {name: Nested(kind) for name, kind in kinds.items()}
    return Either({str: Text(), list: Many(Tagged("type", blocks, mend=MEND))})


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolResultBlock:
    """What a tool answered."""

    tool_use_id: str = given(Text(1), "the call that is answered", required=True)
    content: str | Blocks = given(
        _content(text=TextBlock, image=ImageBlock), "text, or blocks of text and images", default=""
    )
    is_error: bool = given(Boolean(), "the model is told that the call failed", default=False)
    cache_control: None = ignored(UNCACHED)


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUseBlock:
    """A past call."""

    id: str = given(Text(1), "the call's id, as the answer had it", required=True)
    name: str = given(Text(1), "the tool", required=True)
    input: dict[str, Any] = given(Object(), "its arguments", required=True)
    cache_control: None = ignored(UNCACHED)
    caller: None = ignored("the model is the only caller")


@dataclass(frozen=True, slots=True, kw_only=True)
class ThinkingBlock:
    """Past reasoning; the model sees it again where its chat template keeps it."""

    thinking: str = given(Text(), "the reasoning", required=True)
    signature: str = given(Text(), "the reasoning, where it was not shown", default="")


@dataclass(frozen=True, slots=True, kw_only=True)
class RedactedThinkingBlock:
    """Reasoning that another server has encrypted."""

    data: None = ignored("no one but its writer can read it")


@dataclass(frozen=True, slots=True, kw_only=True)
class UserMessage:
    """What the user says, and what tools answer."""

    role: ClassVar = "user"
    content: str | Blocks = given(
        _content(text=TextBlock, image=ImageBlock, tool_result=ToolResultBlock),
        "text, or blocks of text, images and tool results",
        required=True,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class AssistantMessage:
    """What the model has said."""

    role: ClassVar = "assistant"
    content: str | Blocks = given(
        _content(
            text=TextBlock,
            tool_use=ToolUseBlock,
            thinking=ThinkingBlock,
            redacted_thinking=RedactedThinkingBlock,
        ),
        "text, or blocks of text, calls and reasoning",
        required=True,
    )


SYSTEM = _content(text=TextBlock)


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemMessage:
    """What the operator says amid the conversation."""

    role: ClassVar = "system"
    content: str | Blocks = given(SYSTEM, "text, or blocks of text", required=True)


MESSAGES = Many(
    Tagged(
        "role",
        {
            "user": Nested(UserMessage),
            "assistant": Nested(AssistantMessage),
            "system": Nested(SystemMessage),
        },
    ),
    least=1,
)
Message = UserMessage | AssistantMessage | SystemMessage
