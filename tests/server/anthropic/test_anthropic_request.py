"""Bodies of /v1/messages: what the model is shown of them, and what is refused or left alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jsonschema
import pytest

from kttrio.config import ServerConfig
from kttrio.server.anthropic.request import CountBody, MessagesBody, to_answer, to_count
from kttrio.server.errors import BadRequestError
from kttrio.server.requests import ChatRequest
from kttrio.server.schema.records import read, schema
from kttrio.server.served_model import ServedModel
from kttrio.text.encoders.deepseek_v32 import DeepseekV32Encoder
from kttrio.text.grammar import Form
from tests.server.anthropic_front import WEATHER, assistant, text, user
from tests.tokenizers_fake import make_tiny_tokenizer

PNG = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}}
URL = {"type": "image", "source": {"type": "url", "url": "https://example.org/a.png"}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    directory = make_tiny_tokenizer(tmp_path_factory.mktemp("tiny"))
    return ServedModel.load(directory, ServerConfig(served_model_name="tiny"))


def asked(model: ServedModel, *messages: object, **fields: object) -> ChatRequest:
    body = {"max_tokens": 9, "messages": list(messages) or [user("Hi")], **fields}
    return to_answer(read(MessagesBody, body), model)


def chat(model: ServedModel, *messages: object, **fields: object) -> list[dict[str, Any]]:
    return asked(model, *messages, **fields).messages


def call(name: str = "f", id: str = "call_1", **input: object) -> dict[str, object]:
    return {"type": "tool_use", "id": id, "name": name, "input": input}


def result(content: object, id: str = "call_1", **fields: object) -> dict[str, object]:
    return {"type": "tool_result", "tool_use_id": id, "content": content, **fields}


# The conversation.


def test_strings_and_blocks_of_text_are_the_same(model: ServedModel) -> None:
    assert chat(model, user("one\ntwo")) == chat(model, user([text("one"), text("two")]))


def test_all_system_prompts_are_one(model: ServedModel) -> None:
    told = {"role": "system", "content": "one\ntwo\nthree"}
    blocks = [text("one", cache_control={"type": "ephemeral"}), text("two")]
    leading = {"role": "system", "content": [text("three")]}
    assert chat(model, leading, user("Hi"), system=blocks)[0] == told
    assert chat(model, user("Hi"), system="one\ntwo\nthree")[0] == told
    assert chat(model, user("Hi"), system=[]) == chat(model, user("Hi"))


HEADER = "x-anthropic-billing-header: cc_version=2.1.37.{0}; cc_entrypoint=cli; cch={0};"


@pytest.mark.parametrize(
    "system",
    [
        lambda n: [text(HEADER.format(n)), text("You are an agent."), text("Be brief.")],
        lambda n: HEADER.format(n) + "\nYou are an agent.\nBe brief.",
    ],
)
def test_what_changes_with_every_request_is_no_part_of_the_prompt(
    model: ServedModel, system: Any
) -> None:
    prompts = [chat(model, system=system(number)) for number in ("1f2", "9ab")]
    plain = chat(model, system="You are an agent.\nBe brief.")
    assert prompts == [plain, plain]


def test_only_the_beginning_of_a_system_prompt_is_taken_for_the_header(model: ServedModel) -> None:
    said = "Never send x-anthropic-billing-header: yes."
    assert chat(model, system=said)[0]["content"] == said


def test_results_and_text_of_one_message_are_messages_in_their_order(model: ServedModel) -> None:
    told = chat(
        model,
        user("Weather?"),
        assistant([text("I look."), call(city="Rome"), call("g", "call_2")]),
        user([result("sunny"), result([text("a"), text("b")], "call_2"), text("And?")]),
    )
    assert [message["role"] for message in told] == ["user", "assistant", "tool", "tool", "user"]
    assert told[1]["content"] == "I look."
    assert [one["id"] for one in told[1]["tool_calls"]] == ["call_1", "call_2"]
    assert told[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"city": "Rome"}}
    assert told[2] == {"role": "tool", "tool_call_id": "call_1", "content": "sunny"}
    assert told[3] == {"role": "tool", "tool_call_id": "call_2", "content": "a\nb"}
    assert told[4] == {"role": "user", "content": "And?"}


def test_messages_of_one_role_in_a_row_are_one_turn(model: ServedModel) -> None:
    told = chat(model, user("a"), user([text("b")]), assistant("c"), assistant("d"), user("e"))
    assert [(one["role"], one["content"]) for one in told] == [
        ("user", "a\nb"),
        ("assistant", "cd"),
        ("user", "e"),
    ]


def test_a_failed_call_is_told_as_such(model: ServedModel) -> None:
    history = [user("a"), assistant([call()]), user([result("no file", is_error=True)])]
    assert chat(model, *history)[2]["content"] == "Error: no file"
    history[2] = user([result([PNG], is_error=True)])
    assert chat(model, *history)[2]["content"] == [
        {"type": "text", "text": "Error: "},
        {"type": "image"},
    ]
    empty = {"type": "tool_result", "tool_use_id": "call_1"}
    assert chat(model, *history[:2], user([empty]))[2]["content"] == ""


def test_thinking_is_reasoning_and_what_none_can_read_is_left_out(model: ServedModel) -> None:
    blocks = [
        {"type": "thinking", "thinking": "Well.", "signature": "EqQBCkYIB"},
        {"type": "redacted_thinking", "data": "EmwKAhgB"},
        {"type": "thinking", "thinking": "", "signature": "kttrio:SG0u"},
        {"type": "thinking", "thinking": "", "signature": "kttrio:not base64"},
        {"type": "thinking", "thinking": "", "signature": "EqQBCkYIB"},
        text("Yes."),
    ]
    told = chat(model, user("a"), assistant(blocks), user("b"))[1]
    assert told == {"role": "assistant", "content": "Yes.", "reasoning_content": "Well.Hm."}


def test_images_are_found_wherever_they_stand(model: ServedModel) -> None:
    request = asked(
        model,
        user([text("a"), PNG]),
        assistant([call()]),
        user([result([URL, text("b")]), text("c")]),
    )
    assert [(image.url, image.path) for image in request.images] == [
        ("data:image/png;base64,aGk=", "messages[0].content[1].source.data"),
        ("https://example.org/a.png", "messages[2].content[0].content[0].source.url"),
    ]
    assert request.messages[0]["content"] == [{"type": "text", "text": "a"}, {"type": "image"}]
    assert request.messages[2]["content"] == [{"type": "image"}, {"type": "text", "text": "b"}]


def test_system_messages_amid_the_chat_stay_where_the_template_knows_them(
    model: ServedModel,
) -> None:
    late = [user("a"), {"role": "system", "content": "note"}, assistant("b"), user("c")]
    roles = [(one["role"], one["content"]) for one in chat(model, *late)]
    assert roles == [("user", "a"), ("system", "note"), ("assistant", "b"), ("user", "c")]


def test_else_the_user_says_them(model: ServedModel) -> None:
    class Early:
        text = ""

        def render(self, messages: Any, **_: Any) -> str:
            return messages[0]["content"]

    strict = replace(model, template=Early())
    late = [user("a"), {"role": "system", "content": [text("note")]}, assistant("b"), user("c")]
    assert [(one["role"], one["content"]) for one in chat(strict, *late)] == [
        ("user", "a\nnote"),
        ("assistant", "b"),
        ("user", "c"),
    ]


# Tools, thinking, format.


def test_tools_are_told_as_functions(model: ServedModel) -> None:
    (tool,) = asked(model, tools=[{**WEATHER, "type": "custom", "cache_control": {}}]).tools
    function = {name: WEATHER[name] for name in ("name", "description")}
    parameters = WEATHER["input_schema"]
    assert tool == {"type": "function", "function": {**function, "parameters": parameters}}
    (bare,) = asked(model, tools=[{"name": "f", "input_schema": {"type": "object"}}]).tools
    assert bare["function"] == {"name": "f", "parameters": {"type": "object"}}


@pytest.mark.parametrize(
    ("choice", "forced", "parallel"),
    [
        ({"type": "auto"}, (), True),
        ({"type": "auto", "disable_parallel_tool_use": True}, (), False),
        ({"type": "any"}, ("get_weather", "f"), True),
        ({"type": "any", "disable_parallel_tool_use": True}, ("get_weather", "f"), False),
        ({"type": "tool", "name": "f"}, ("f",), True),
    ],
)
def test_choices_of_tools(
    model: ServedModel, choice: object, forced: tuple[str, ...], parallel: bool
) -> None:
    tools = [WEATHER, {"name": "f", "input_schema": {}}]
    request = asked(model, tools=tools, tool_choice=choice)
    assert (request.forced_calls, request.parallel_tool_calls) == (forced, parallel)
    assert len(request.tools) == 2


def test_no_tools_where_none_may_be_called(model: ServedModel) -> None:
    request = asked(model, tools=[WEATHER], tool_choice={"type": "none"})
    assert (request.tools, request.forced_calls) == ([], ())


@pytest.mark.parametrize(
    ("fields", "kwargs"),
    [
        ({}, {"enable_thinking": False, "thinking": False}),
        ({"thinking": {"type": "disabled"}}, {"enable_thinking": False, "thinking": False}),
        (
            {"thinking": {"type": "enabled", "budget_tokens": 2048}},
            {"enable_thinking": True, "thinking": True},
        ),
        (
            {"thinking": {"type": "adaptive"}, "output_config": {"effort": "xhigh"}},
            {"enable_thinking": True, "thinking": True, "reasoning_effort": "xhigh"},
        ),
    ],
)
def test_thinking_and_effort_reach_the_template(
    model: ServedModel, fields: dict[str, object], kwargs: dict[str, object]
) -> None:
    assert asked(model, **fields).template_kwargs == kwargs


def test_a_model_that_always_thinks_is_told_so_only_where_the_client_wants_none(
    model: ServedModel,
) -> None:
    always = replace(model, template=DeepseekV32Encoder(always_thinks=True))
    assert asked(always).template_kwargs == {}
    off = {"enable_thinking": False, "thinking": False}
    assert asked(always, thinking={"type": "disabled"}).template_kwargs == off


@pytest.mark.parametrize("name", ["output_config", "output_format"])
def test_a_schema_is_a_form(model: ServedModel, name: str) -> None:
    wanted: dict[str, Any] = {"type": "json_schema", "schema": {"type": "object"}}
    place = "output_format.schema"
    if name == "output_config":
        wanted, place = {"format": wanted}, "output_config.format.schema"
    form = asked(model, **{name: wanted}).options.form
    assert form == Form("json_schema", '{"type": "object"}', place)


def test_an_answer_that_is_begun_goes_on(model: ServedModel) -> None:
    assert asked(model, user("a"), assistant("The answer is (")).continues
    assert not asked(model, user("a"), assistant("b"), user("c")).continues
    body = read(CountBody, {"messages": [user("a"), assistant([call()])]})
    assert not to_count(body, model).continues


# Refusals.

FILE = {"type": "image", "source": {"type": "file", "file_id": "f"}}
SEARCH = {"type": "web_search_20250305", "name": "web_search"}
FORM = {"type": "json_schema", "schema": {}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role"),
        ({"messages": [user(None)]}, "messages[0].content"),
        ({"messages": [user([{"text": "a"}])]}, "messages[0].content[0].type"),
        ({"messages": [user([{"type": "document"}])]}, "messages[0].content[0].type"),
        ({"messages": [user([call()])]}, "messages[0].content[0].type"),
        (
            {"messages": [user("a"), assistant([{"type": "server_tool_use"}]), user("b")]},
            "messages[1].content[0].type",
        ),
        ({"messages": [user([FILE])]}, "messages[0].content[0].source.type"),
        ({"messages": [user([result([FILE])])]}, "messages[0].content[0].content[0].source.type"),
        ({"messages": [user("a"), assistant([call()])]}, "messages[1].content"),
        ({"system": [PNG]}, "system[0].type"),
        ({"temperature": 1.5}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"stop_sequences": "x"}, "stop_sequences"),
        ({"stop_sequences": [""]}, "stop_sequences[0]"),
        ({"tools": [SEARCH]}, "tools[0].type"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
        ({"tools": [{**WEATHER, "input_examples": [{}]}]}, "tools[0].input_examples"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "g"}},
            "tool_choice.name",
        ),
        ({"tool_choice": {"type": "required"}}, "tool_choice.type"),
        ({"thinking": {"type": "always"}}, "thinking.type"),
        ({"output_config": {"effort": "none"}}, "output_config.effort"),
        ({"output_config": {"task_budget": {"total": 1}}}, "output_config.task_budget"),
        ({"output_config": {"format": FORM}, "output_format": FORM}, "output_format"),
        ({"container": "c"}, "container"),
        ({"mcp_servers": [{"name": "m"}]}, "mcp_servers"),
        ({"thread": {"type": "create"}}, "thread"),
        ({"compaction": {"type": "x"}}, "compaction"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals_name_the_field(model: ServedModel, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        asked(model, **fields)
    assert caught.value.param == param
    assert f"'{param}'" in caught.value.message


FULL: dict[str, Any] = {
    "model": "claude-next",
    "max_tokens": 5,
    "stream": True,
    "temperature": 0.5,
    "stop_sequences": ["a"],
    "system": [text("a")],
    "messages": [
        user([text("a"), PNG, URL, result([text("b")], is_error=True)]),
        assistant([{"type": "thinking", "thinking": "a", "signature": "b"}, call(c=1)]),
        {"role": "system", "content": "a"},
    ],
    "tools": [{**WEATHER, "type": "custom"}],
    "tool_choice": {"type": "tool", "name": "get_weather"},
    "thinking": {"type": "enabled", "budget_tokens": 2048, "display": "omitted"},
    "output_config": {"effort": "low", "format": FORM},
    "container": None,
    "thread": False,
}
VALUES = (None, True, 0, -1, 5.0, 2**70, 1e300, "", "x", [], [None], {}, {"type": "text"})


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where every value of a body stands."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for name, item in inner:
        yield (*place, name)
        if isinstance(item, dict | list):
            yield from places(item, (*place, name))


def with_value(body: Any, place: tuple[Any, ...], value: object) -> Any:
    if not place:
        return value
    changed = body.copy()
    changed[place[0]] = with_value(body[place[0]], place[1:], value)
    return changed


def is_read(body: object) -> bool:
    try:
        read(MessagesBody, body)
    except BadRequestError:
        return False
    return True


def test_the_schema_takes_what_is_read_and_nothing_else() -> None:
    told = jsonschema.Draft202012Validator(schema(MessagesBody))
    assert told.is_valid(FULL)
    for place in places(FULL):
        for value in VALUES:
            body = with_value(FULL, place, value)
            assert told.is_valid(body) is is_read(body), (place, value)


def test_what_changes_nothing_is_taken(model: ServedModel) -> None:
    taken = {
        "metadata": {"user_id": "x"},
        "service_tier": "auto",
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "cache_control": {"type": "ephemeral"},
        "fallbacks": "default",
        "mcp_servers": [],
        "brand_new": 1,
    }
    assert asked(model, **taken) == asked(model)
