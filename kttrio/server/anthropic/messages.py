"""What chat templates are shown of Anthropic's messages: turns, images, calls and results.

The records are in blocks.py, the rest of a body in request.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from typing import Any, NamedTuple

from kttrio.server.anthropic.blocks import (
    Blocks,
    ImageBlock,
    Message,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
)
from kttrio.server.anthropic.signature import unseal
from kttrio.server.asking.content import TemplateContent, template_content
from kttrio.server.requests import ImageSource
from kttrio.text.messages import read_arguments

BILLING = re.compile(r"\Ax-anthropic-billing-header:[^\n]*\n*")
"""A line with which coding agents begin their system prompt, new in every request: with it no two
prompts of a conversation would begin alike."""
FAILED = "Error: "
"""Leads the result of a call that failed: templates have no field for it."""


class Placed(NamedTuple):
    """A block, and where it stands in the body."""

    block: Any
    path: str


@dataclass(slots=True)
class Chat:
    """Messages as chat templates take them, and the images in them, in order."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    images: list[ImageSource] = field(default_factory=list)

    def add(self, role: str, blocks: Sequence[Placed]) -> None:
        """A turn: all that one role says in a row."""
        if role == "system":
            self._add_system(blocks)
        elif role == "assistant":
            self._add_assistant([placed.block for placed in blocks])
        else:
            self._add_user(blocks)

    def _add_system(self, blocks: Sequence[Placed]) -> None:
        texts = (BILLING.sub("", block.text) for block, _ in blocks)
        if prompt := "\n".join(text for text in texts if text):
            self.messages.append({"role": "system", "content": prompt})

    def _add_user(self, blocks: Sequence[Placed]) -> None:
        """Results of tools are messages of their own, between what the user says."""
        for results, run in groupby(blocks, _is_result):
            if results:
                for block, path in run:
                    self._add_result(block, path)
            else:
                self.messages.append({"role": "user", "content": self._content(list(run))})

    def _add_result(self, result: ToolResultBlock, path: str) -> None:
        content = self._content(_place(result.content, f"{path}.content"))
        if result.is_error:
            content = _failed(content)
        call = {"tool_call_id": result.tool_use_id}
        self.messages.append({"role": "tool", **call, "content": content})

    def _content(self, blocks: Sequence[Placed]) -> TemplateContent:
        self.images += (
            block.source.source(f"{path}.source")
            for block, path in blocks
            if isinstance(block, ImageBlock)
        )
        return template_content([block for block, _ in blocks], ImageBlock)

    def _add_assistant(self, blocks: Blocks) -> None:
        """The texts of an answer follow each other as the model wrote them."""
        said = "".join(block.text for block in blocks if isinstance(block, TextBlock))
        message: dict[str, Any] = {"role": "assistant", "content": said}
        calls = [_past_call(block) for block in blocks if isinstance(block, ToolUseBlock)]
        if calls:
            message["tool_calls"] = calls
        thoughts = (block for block in blocks if isinstance(block, ThinkingBlock))
        if reasoning := "".join(map(_thought, thoughts)):
            message["reasoning_content"] = reasoning
        self.messages.append(message)


def read_chat(system: str | Blocks, messages: Sequence[Message], *, late_system: bool) -> Chat:
    """The chat that the model is shown. `late_system`: its template knows system messages amid
    the chat; else the user says them."""
    chat = Chat()
    turns = _turns(system, messages, late_system)
    for role, run in groupby(turns, itemgetter(0)):
        chat.add(role, [block for _, blocks in run for block in blocks])
    return chat


def has_late_system(messages: Sequence[Message]) -> bool:
    """Whether the operator speaks amid the chat."""
    return any(message.role == "system" for message in messages[_num_leading(messages) :])


def _num_leading(messages: Sequence[Message]) -> int:
    """Messages that belong to the system prompt."""
    others = (i for i, message in enumerate(messages) if message.role != "system")
    return next(others, len(messages))


def _turns(
    system: str | Blocks, messages: Sequence[Message], late_system: bool
) -> Iterator[tuple[str, list[Placed]]]:
    yield "system", _place(system, "system")
    num_leading = _num_leading(messages)
    for i, message in enumerate(messages):
        role = message.role
        if role == "system" and i >= num_leading and not late_system:
            role = "user"
        yield role, _place(message.content, f"messages[{i}].content")


def _place(content: str | Blocks, path: str) -> list[Placed]:
    if isinstance(content, str):
        return [Placed(TextBlock(text=content), path)]
    return [Placed(block, f"{path}[{i}]") for i, block in enumerate(content)]


def _is_result(placed: Placed) -> bool:
    return isinstance(placed.block, ToolResultBlock)


def _failed(content: TemplateContent) -> TemplateContent:
    if isinstance(content, str):
        return FAILED + content
    return [{"type": "text", "text": FAILED}, *content]


def _past_call(call: ToolUseBlock) -> dict[str, Any]:
    function = {"name": call.name, "arguments": read_arguments(call.input)}
    return {"id": call.id, "type": "function", "function": function}


def _thought(block: ThinkingBlock) -> str:
    return block.thinking or unseal(block.signature)
