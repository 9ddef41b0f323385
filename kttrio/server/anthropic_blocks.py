"""Anthropic's messages as records: roles, and the blocks that each may have.

What chat templates make of them is in anthropic_messages.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from kttrio.server.kinds import Boolean, Many, Object, Text, TextOr
from kttrio.server.records import Tagged, given, ignored
from kttrio.server.requests import ImageSource

UNCACHED = "nothing is billed, so there is nothing to mark"


@dataclass(frozen=True, slots=True)
class TextBlock:
    """A piece of text."""

    text: str = given(Text(), "the text", required=True)
    cache_control: None = ignored(UNCACHED)
    citations: None = ignored("the model reads the text alone")


@dataclass(frozen=True, slots=True)
class Base64Source:
    """An image in the body itself."""

    media_type: str = given(Text(least=1), "image/png, image/jpeg or image/webp", required=True)
    data: str = given(Text(least=1), "the file in base64", required=True)

    def source(self, path: str) -> ImageSource:
        url = f"data:{self.media_type};base64,{self.data}"
        return ImageSource(url, f"{path}.data", low_detail=False)


@dataclass(frozen=True, slots=True)
class UrlSource:
    """An image that the server is to fetch."""

    url: str = given(Text(least=1), "data:, or http: and https: where allowed", required=True)

    def source(self, path: str) -> ImageSource:
        return ImageSource(self.url, f"{path}.url", low_detail=False)


@dataclass(frozen=True, slots=True)
class ImageBlock:
    """An image."""

    source: Base64Source | UrlSource = given(
        Tagged(
            records=(("base64", Base64Source), ("url", UrlSource)),
            served="images as 'base64' or by 'url': it keeps no files",
        ),
        "where the image is",
        required=True,
    )
    cache_control: None = ignored(UNCACHED)


@dataclass(frozen=True, slots=True)
class ToolResultBlock:
    """What a tool answered."""

    tool_use_id: str = given(Text(least=1), "the call that is answered", required=True)
    content: str | tuple[TextBlock | ImageBlock, ...] = given(
        TextOr(
            Many(
                Tagged(
                    records=(("text", TextBlock), ("image", ImageBlock)),
                    served="'text' and 'image' in a tool's result; send documents as text",
                )
            )
        ),
        "text, or blocks of text and images",
        default="",
    )
    is_error: bool = given(Boolean(), "the model is told that the call failed", default=False)
    cache_control: None = ignored(UNCACHED)


@dataclass(frozen=True, slots=True)
class ToolUseBlock:
    """A past call."""

    id: str = given(Text(least=1), "the call's id, as the answer had it", required=True)
    name: str = given(Text(least=1), "the tool", required=True)
    input: dict[str, Any] = given(Object(), "its arguments", required=True)
    cache_control: None = ignored(UNCACHED)


@dataclass(frozen=True, slots=True)
class ThinkingBlock:
    """Past reasoning; the model sees it again where its chat template keeps it."""

    thinking: str = given(Text(), "the reasoning", required=True)
    signature: str = given(
        Text(), "holds the reasoning where the answer did not show it", default=""
    )


@dataclass(frozen=True, slots=True)
class RedactedThinkingBlock:
    """Reasoning that another server has encrypted."""

    data: None = ignored("no one but its writer can read it")


Block = TextBlock | ImageBlock | ToolResultBlock | ToolUseBlock | ThinkingBlock
Blocks = Sequence[Any]  # of the kinds that the role may have


@dataclass(frozen=True, slots=True)
class UserMessage:
    """What the user says, and what tools answer."""

    role: ClassVar = "user"
    content: str | Blocks = given(
        TextOr(
            Many(
                Tagged(
                    records=(
                        ("text", TextBlock),
                        ("image", ImageBlock),
                        ("tool_result", ToolResultBlock),
                    ),
                    served="'text', 'image' and 'tool_result' of a user; send documents as text",
                )
            )
        ),
        "text, or blocks of text, images and tool results",
        required=True,
    )


@dataclass(frozen=True, slots=True)
class AssistantMessage:
    """What the model has said."""

    role: ClassVar = "assistant"
    content: str | Blocks = given(
        TextOr(
            Many(
                Tagged(
                    records=(
                        ("text", TextBlock),
                        ("tool_use", ToolUseBlock),
                        ("thinking", ThinkingBlock),
                        ("redacted_thinking", RedactedThinkingBlock),
                    ),
                    served="'text', 'tool_use', 'thinking' and 'redacted_thinking' of an "
                    "assistant: it runs no tools of its own",
                )
            )
        ),
        "text, or blocks of text, calls and reasoning",
        required=True,
    )


@dataclass(frozen=True, slots=True)
class SystemMessage:
    """What the operator says amid the conversation."""

    role: ClassVar = "system"
    content: str | Blocks = given(
        TextOr(Many(Tagged(records=(("text", TextBlock),), served="'text' of a system"))),
        "text, or blocks of text",
        required=True,
    )


MESSAGE = Tagged(
    tag="role",
    records=(("user", UserMessage), ("assistant", AssistantMessage), ("system", SystemMessage)),
    served="messages of 'user', 'assistant' and 'system'",
)
SYSTEM = TextOr(Many(Tagged(records=(("text", TextBlock),), served="'text' in the system prompt")))
Message = UserMessage | AssistantMessage | SystemMessage
