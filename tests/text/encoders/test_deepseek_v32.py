from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from kttrio.text.encoders.deepseek_v32 import DeepseekV32Encoder
from kttrio.text.messages import TemplateError

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, BOT = "<｜User｜>", "<｜Assistant｜>"
D = "｜DSML｜"
FORMAT_TEXT = "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"

HI = {"role": "user", "content": "Hi"}
MORE = {"role": "user", "content": "More"}
SYSTEM = {"role": "system", "content": "Be kind."}
ANSWER = {"role": "assistant", "content": "Hello!", "reasoning_content": "Well."}
TOOL = {"type": "function", "function": {"name": "f", "description": "Köln {x}"}}
THINK = {"thinking": True}


def call(id: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"id": id, "function": {"name": "f", "arguments": json.dumps(arguments)}}


def calls(*calls: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": list(calls), **fields}


def result(content: str, id: str) -> dict[str, Any]:
    return {"role": "tool", "content": content, "tool_call_id": id}


def render(
    *messages: dict[str, Any], always_thinks: bool = False, tools: Any = None, **kwargs: Any
) -> str:
    encoder = DeepseekV32Encoder(always_thinks=always_thinks)
    return encoder.render(messages, tools=tools, chat_template_kwargs=kwargs)


@pytest.mark.parametrize(
    ("messages", "kwargs", "prompt"),
    [
        ([HI], {}, f"{USER}Hi{BOT}</think>"),
        ([HI], THINK, f"{USER}Hi{BOT}<think>"),
        ([SYSTEM, HI], {}, f"Be kind.{USER}Hi{BOT}</think>"),
        (
            [HI, ANSWER, MORE],
            {},
            f"{USER}Hi{BOT}</think>Hello!{EOS}{USER}More{BOT}</think>",
        ),
        (  # the reasoning of earlier turns is gone, and they are closed
            [HI, ANSWER, MORE],
            THINK,
            f"{USER}Hi{BOT}</think>Hello!{EOS}{USER}More{BOT}<think>",
        ),
    ],
)
def test_turns(messages: list[dict[str, Any]], kwargs: dict[str, Any], prompt: str):
    assert render(*messages, **kwargs) == BOS + prompt


CALL_TEXT = (
    f"\n\n<{D}function_calls>\n"
    f'<{D}invoke name="f">\n'
    f'<{D}parameter name="city" string="true">Köln\n"\'</{D}parameter>\n'
    f'<{D}parameter name="n" string="false">[1, {{"ü": null}}]</{D}parameter>\n'
    f"</{D}invoke>\n"
    f'<{D}invoke name="f">\n\n</{D}invoke>\n'
    f"</{D}function_calls>"
)
RESULTS_TEXT = (
    "\n\n<function_results>\n<result>5</result>\n<result>six</result>\n</function_results>\n\n"
)
LOOP = (
    HI,
    calls(
        call("a", {"city": "Köln\n\"'", "n": [1, {"ü": None}]}),
        call("b", {}),
        reasoning_content="Look.",
    ),
    result("5", "a"),
    result("six", "b"),
)


def test_the_current_tool_loop_keeps_its_reasoning():
    assert render(*LOOP, **THINK) == (
        f"{BOS}{USER}Hi{BOT}<think>Look.</think>{CALL_TEXT}{EOS}{RESULTS_TEXT}<think>"
    )


def test_chat_mode_shows_no_reasoning():
    assert render(*LOOP) == f"{BOS}{USER}Hi{BOT}</think>{CALL_TEXT}{EOS}{RESULTS_TEXT}</think>"


def test_an_earlier_tool_loop_loses_its_reasoning():
    assert render(*LOOP, ANSWER, MORE, **THINK) == (
        f"{BOS}{USER}Hi{BOT}</think>{CALL_TEXT}{EOS}{RESULTS_TEXT}</think>Hello!{EOS}"
        f"{USER}More{BOT}<think>"
    )


def test_results_follow_the_order_of_the_calls():
    *head, first, second = LOOP
    assert render(*head, second, first) == render(*LOOP)


def test_results_without_telling_ids_stay_as_they_came():
    *head, first, second = LOOP
    swapped = render(*head, {**second, "tool_call_id": "?"}, first)
    assert "<result>six</result>\n<result>5</result>" in swapped


def test_tools_follow_the_system_message():
    text = render(SYSTEM, HI, tools=[TOOL, TOOL])
    assert text.startswith(f"{BOS}Be kind.\n\n## Tools\n\nYou have access")
    schema = '{"name": "f", "description": "Köln {x}"}'
    assert text.endswith(f"<functions>\n{schema}\n{schema}\n</functions>\n{USER}Hi{BOT}</think>")


def test_without_a_system_message_tools_come_first():
    assert render(HI, tools=[TOOL]).startswith(f"{BOS}\n\n## Tools\n\n")


def test_the_text_about_tools_is_the_published_one():
    """Equal to the copies of the checkpoint's encoder that have its blank lines."""
    text = render(HI, tools=[TOOL]).replace('{"name": "f", "description": "Köln {x}"}', "")
    text = text.removeprefix(f"{BOS}\n\n").removesuffix(f"{USER}Hi{BOT}</think>")
    assert hashlib.sha256(text.encode()).hexdigest() == (
        "8dc0ae780567338a686768374742d8690e8039d3ec6e3649ff94740764f5cca1"
    )
    assert [part.split(" ")[0] for part in text.partition("<functions>")[0].split("\n\n")] == [
        "##",
        "You",
        "String",
        "If",
        f"<{D}function_calls>\n...\n</{D}function_calls>",
        "<function_results>\n...\n</function_results>",
        "<think>...thinking",
        "Here",
    ]


def test_a_response_format_follows_tools():
    text = render(SYSTEM, HI, tools=[TOOL], response_format={"type": "object"})
    tail = f'</functions>\n\n\n{FORMAT_TEXT}{{"type": "object"}}{USER}Hi{BOT}</think>'
    assert text.endswith(tail)


def test_a_developer_is_the_system_where_a_user_speaks():
    developer = {"role": "developer", "content": "Be kind."}
    assert render(developer, HI, tools=[TOOL]) == render(SYSTEM, HI, tools=[TOOL])


def test_a_search_agents_developer_sets_the_task():
    developer = {"role": "developer", "content": "Find it."}
    text = render(developer, tools=[TOOL], **THINK)
    assert text.startswith(f"{BOS}{USER}\n\n## Tools\n\n")
    assert text.endswith(f"</functions>\n\n\n# The user's message is: Find it.{BOT}<think>")


@pytest.mark.parametrize(
    ("kwargs", "thinks"),
    [
        ({}, False),
        ({"enable_thinking": True}, True),
        ({"thinking": False, "enable_thinking": True}, False),
        ({"reasoning_effort": "high"}, True),
        ({"reasoning_effort": "none"}, False),
        ({"reasoning_effort": "high", "enable_thinking": False}, False),
    ],
)
def test_who_says_whether_it_thinks(kwargs: dict[str, Any], thinks: bool):
    assert render(HI, **kwargs).endswith("<think>" if thinks else "</think>")


def test_speciale_is_known_by_its_path_and_always_thinks(tmp_path: Path):
    directory = tmp_path / "DeepSeek-V3.2-Speciale"
    directory.mkdir()
    assert DeepseekV32Encoder.load(directory).render([HI]).endswith("<think>")
    plain = tmp_path / "DeepSeek-V3.2"
    plain.mkdir()
    assert DeepseekV32Encoder.load(plain).render([HI]).endswith("</think>")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"tools": [TOOL]}, "not trained to call tools"),
        ({"thinking": False}, "always thinks"),
        ({"reasoning_effort": "none"}, "always thinks"),
    ],
)
def test_speciale_refuses_what_it_cannot_do(kwargs: dict[str, Any], message: str):
    with pytest.raises(TemplateError, match=message):
        render(HI, always_thinks=True, **kwargs)


@pytest.mark.parametrize(
    ("messages", "kwargs", "message"),
    [
        ([HI, ANSWER], {}, "the last message must be a user's or a tool's"),
        ([SYSTEM], {}, "the last message must be"),
        ([HI, {"role": "developer", "content": "?"}], {}, "the last message must be"),
        ([], {}, "the last message must be"),
        ([result("5", "a")], {}, r"messages\[0\]: 1 tool results follow 0 tool calls"),
        ([HI, result("5", "a")], {}, r"messages\[1\]: 1 tool results follow 0"),
        ([*LOOP[:3]], {}, r"messages\[2\]: 1 tool results follow 2"),
        ([*LOOP, result("7", "c")], {}, r"messages\[2\]: 3 tool results follow 2"),
        (
            [HI, {"role": "assistant", "content": "Hello!"}, LOOP[1], *LOOP[2:]],
            THINK,
            r"messages\[1\]: .*needs its reasoning_content or tool_calls",
        ),
        ([{"role": "developer", "content": ""}], {}, "developer message must not be empty"),
        ([{"role": "latest_reminder", "content": ""}, HI], {}, "no role 'latest_reminder'"),
        ([{"role": "user", "content": 5}], {}, r"messages\[0\]\.content must be a string"),
        ([HI], {"thinking": "yes"}, "thinking must be true or false"),
        ([HI], {"preserve": 1}, "chat_template_kwargs has preserve, and .* only thinking"),
    ],
)
def test_what_the_model_was_not_taught_is_refused(
    messages: list[dict[str, Any]], kwargs: dict[str, Any], message: str
):
    with pytest.raises(TemplateError, match=message):
        render(*messages, **kwargs)


def test_a_deeply_nested_tool_is_refused():
    schema: dict[str, Any] = {}
    for _ in range(100_000):
        schema = {"items": schema}
    with pytest.raises(TemplateError, match="nested so deeply"):
        render(HI, tools=[{"function": schema}])


def test_the_callers_messages_stay():
    developer = {"role": "developer", "content": "Be kind."}
    render(developer, HI)
    assert developer == {"role": "developer", "content": "Be kind."}


def test_the_words_that_begin_an_answer_belong_to_the_message_before() -> None:
    encoder = DeepseekV32Encoder()
    with pytest.raises(TemplateError, match="begin the answer"):
        encoder.render([HI], add_generation_prompt=False)
    whole = encoder.render([HI, ANSWER], add_generation_prompt=False)
    assert whole.endswith(f"{BOT}</think>Hello!{EOS}")
