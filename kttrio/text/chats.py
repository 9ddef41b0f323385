"""How a checkpoint's chats become prompts: by its jinja template, or by an encoder of ours.

Not here: either of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from kttrio.text.encoders.deepseek_v32 import DeepseekV32Encoder
from kttrio.text.files import read_json_object
from kttrio.text.messages import Message, TemplateError, Tool
from kttrio.text.template import ChatTemplate

NOTICE = "Be brief."
"""A system message to try a template with."""


class ChatFormat(Protocol):
    """Renders chats. Immutable; render may run in any thread."""

    @property
    def text(self) -> str:
        """What the model was taught, to see which parsers read its answers."""
        ...

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] | None = None,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt as text, special tokens included, and with `add_generation_prompt` the words
        that begin an answer. Raises TemplateError."""
        ...


def load_chat_format(directory: Path, *, override: Path | None = None) -> ChatFormat | None:
    """The template file given, else the checkpoint's own, else the encoder for its `model_type`,
    else None. Raises ConfigError."""
    template = ChatTemplate.load(directory, override=override)
    if template is not None:
        return template
    if read_json_object(directory / "config.json").get("model_type") == "deepseek_v32":
        return DeepseekV32Encoder.load(directory)
    return None


def knows_late_system(format: ChatFormat) -> bool:
    """Whether the model's chats may have system messages after the first: many templates refuse
    them, or leave them out."""
    chat = [
        {"role": "user", "content": "Hello"},
        {"role": "system", "content": NOTICE},
        {"role": "user", "content": "Go on."},
    ]
    try:
        return NOTICE in format.render(chat)
    except TemplateError:
        return False


def knows_switches(format: ChatFormat, switches: Mapping[str, bool]) -> bool:
    """Whether the model's chats can be had so: some always think."""
    try:
        format.render([{"role": "user", "content": "Hello"}], chat_template_kwargs=switches)
    except TemplateError:
        return False
    return True
