"""Prompts that end in the assistant's last message, through templates and the encoder of ours."""

from __future__ import annotations

from typing import Any

import pytest

from kttrio.text.continuation import render_open
from kttrio.text.encoders.deepseek_v32 import DeepseekV32Encoder
from kttrio.text.messages import TemplateError
from kttrio.text.template import ChatTemplate

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
USER = {"role": "user", "content": "Count."}


def said(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


@pytest.mark.parametrize("text", ["One,", "One, \n", "\ufffd</assistant>", "0"])
def test_the_prompt_ends_where_the_message_does(text: str) -> None:
    prompt = render_open(ChatTemplate({"default": CHAT}), [USER, said(text)])
    assert prompt == f"<user>Count.</user><assistant>{text}"


def test_earlier_messages_are_whole() -> None:
    messages = [USER, said("One."), USER, said("Two")]
    prompt = render_open(ChatTemplate({"default": CHAT}), messages)
    assert prompt.count("<assistant>One.</assistant>") == 1
    assert prompt.endswith("<assistant>Two")


def test_kwargs_and_tools_reach_the_template() -> None:
    template = ChatTemplate({"default": "{{ tools[0].name }}{{ mood }}" + CHAT})
    prompt = render_open(
        template, [said("So")], tools=[{"name": "f"}], chat_template_kwargs={"mood": "!"}
    )
    assert prompt == "f!<assistant>So"


def test_the_encoder_goes_on_as_well() -> None:
    prompt = render_open(DeepseekV32Encoder(), [USER, said("One, ")])
    assert prompt.endswith("<｜User｜>Count.<｜Assistant｜></think>One, ")


def test_a_template_that_hides_the_message_is_told() -> None:
    with pytest.raises(TemplateError, match="leaves out"):
        render_open(ChatTemplate({"default": "always the same"}), [said("So")])


def test_only_text_can_go_on() -> None:
    with pytest.raises(TemplateError, match="must be text"):
        render_open(ChatTemplate({"default": CHAT}), [said([{"type": "image"}])])
