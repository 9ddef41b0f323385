"""Prompts that end inside the assistant's last message, for the model to go on with it.

Not here: rendering whole chats (chats.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kttrio.text.chats import ChatFormat
from kttrio.text.messages import Message, TemplateError, Tool

_MARK = "\uf8ff the answer goes on here \uf8ff"
"""Stands behind the content, so that no template trims what the client wrote."""


def render_open(
    format: ChatFormat,
    messages: Sequence[Message],
    *,
    tools: Sequence[Tool] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> str:
    """The prompt up to the end of the last message's text. Raises TemplateError."""
    *before, last = messages
    marked = {**last, "content": _text(last) + _MARK}
    text = format.render(
        [*before, marked],
        tools=tools,
        add_generation_prompt=False,
        chat_template_kwargs=chat_template_kwargs,
    )
    prompt, mark, _ = text.rpartition(_MARK)
    if not mark:
        raise TemplateError("the model's chat template leaves out the message to go on with")
    return prompt


def _text(message: Message) -> str:
    content = message["content"]
    if not isinstance(content, str):
        raise TemplateError("the message to go on with must be text")
    return content
