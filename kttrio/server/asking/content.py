"""The content of messages: parts that several protocols have, and what chat templates take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kttrio.server.schema.kinds import Text
from kttrio.server.schema.records import given

TemplateContent = str | list[dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class RefusalPart:
    """What a model said when it would not answer."""

    refusal: str = given(Text(), "the text", required=True)

    @property
    def text(self) -> str:
        return self.refusal


def template_content(parts: Sequence[Any], image: type) -> TemplateContent:
    """Their text, joined by newlines, as most templates know only strings; with an `image` among
    them all the parts. Whatever is no image has a `text`."""
    if any(isinstance(part, image) for part in parts):
        return [_template_part(part, image) for part in parts]
    return "\n".join(part.text for part in parts)


def _template_part(part: Any, image: type) -> dict[str, Any]:
    if isinstance(part, image):
        return {"type": "image"}
    return {"type": "text", "text": part.text}
