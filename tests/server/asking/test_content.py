"""What chat templates are given of a message in parts."""

from __future__ import annotations

from dataclasses import dataclass

from kttrio.server.asking.content import RefusalPart, template_content
from kttrio.server.schema.records import read


@dataclass(frozen=True)
class Said:
    text: str


class Image:
    """A part without text."""


def test_text_alone_is_a_string() -> None:
    assert template_content([Said("a"), Said(""), Said("b")], Image) == "a\n\nb"
    assert template_content([], Image) == ""


def test_with_images_all_parts_keep_their_order() -> None:
    assert template_content([Said("a"), Image(), Said("b")], Image) == [
        {"type": "text", "text": "a"},
        {"type": "image"},
        {"type": "text", "text": "b"},
    ]


def test_a_refusal_is_text() -> None:
    refusal = read(RefusalPart, {"refusal": "No."})
    assert template_content([Said("a"), refusal], Image) == "a\nNo."
