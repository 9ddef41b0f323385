"""Bodies of /v1/responses: what they come to, and what is refused by name."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest

from kttrio.server.errors import ApiError, BadRequestError
from kttrio.server.responses.request import AskedResponse, parse_response
from kttrio.text.grammar import Form

FUNCTION = {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": False}
OTHER = {"type": "function", "name": "g"}
SEARCH = {"type": "web_search"}
TOOLS = [FUNCTION, SEARCH, OTHER]


def parse(**fields: Any) -> AskedResponse:
    return parse_response({"input": "Hi", **fields}, model="m", vocab_size=400)


def echo(asked: AskedResponse) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(asked.echo)
    return told


def test_what_is_said_to_the_system_first_is_one_message() -> None:
    said = [("developer", "Now."), ("user", "Hi"), ("developer", "Then."), ("user", "Ho")]
    asked = [{"role": role, "content": text} for role, text in said]
    messages = parse(instructions="Be brief.", input=asked).chat.messages
    assert [(m["role"], m["content"]) for m in messages] == [
        ("system", "Be brief.\n\nNow."),
        *said[1:],
    ]
    assert parse(input=asked).chat.messages[0]["role"] == "developer"
    assert parse().chat.messages == [{"role": "user", "content": "Hi"}]


def test_functions_are_told_as_in_chats_and_other_tools_are_skipped(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    asked = parse(tools=TOOLS)
    first, second = asked.chat.tools
    assert first["function"] == {"name": "f", "parameters": {"type": "object"}}
    assert (second["type"], second["function"]) == ("function", {"name": "g"})
    unsaid = {"description": None, "parameters": None, "strict": None}
    assert echo(asked)["tools"] == [{"description": None, **FUNCTION}, {**OTHER, **unsaid}]
    assert "web_search" in caplog.text


@pytest.mark.parametrize(
    ("choice", "tools", "forced"),
    [
        ("auto", "fg", ()),
        ("none", "", ()),
        ("required", "fg", ("f", "g")),
        ({"type": "function", "name": "g"}, "fg", ("g",)),
        (
            {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "g"}]},
            "g",
            (),
        ),
        (
            {"type": "allowed_tools", "mode": "required", "tools": [OTHER]},
            "g",
            ("g",),
        ),
    ],
)
def test_choices_of_tools(choice: object, tools: str, forced: tuple[str, ...]) -> None:
    chat = parse(tools=TOOLS, tool_choice=choice).chat
    assert "".join(tool["function"]["name"] for tool in chat.tools) == tools
    assert chat.forced_calls == forced
    assert chat.parallel_tool_calls is not (choice == {"type": "function", "name": "g"})


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ({"format": {"type": "text"}}, None),
        ({"format": {"type": "json_object"}}, Form("json_object", "", "text.format")),
        (
            {"format": {"type": "json_schema", "name": "s", "schema": {"type": "object"}}},
            Form("json_schema", '{"type": "object"}', "text.format.schema"),
        ),
        ({"verbosity": "low"}, None),
    ],
)
def test_forms_of_the_text(text: dict[str, Any], form: Form | None) -> None:
    asked = parse(text=text)
    assert asked.chat.options.form == form
    assert echo(asked)["text"] == {"format": {"type": "text"}, **text}


def test_other_servers_words_for_a_form_serve_too() -> None:
    assert parse(regex="a+").chat.options.form == Form("regex", "a+", "regex")


def test_limits_and_sampling() -> None:
    options = parse(max_output_tokens=5, temperature=0, top_k=3, seed=4, stream=True).chat.options
    assert (options.max_tokens, options.temperature, options.top_k) == (5, 0, 3)
    assert (options.seed, options.stream, options.n) == (4, True, 1)


@pytest.mark.parametrize(
    ("fields", "logprobs"),
    [
        ({}, None),
        ({"top_logprobs": 0}, None),
        ({"top_logprobs": 2}, 2),
        ({"include": ["message.output_text.logprobs"]}, 0),
        ({"include": ["message.output_text.logprobs"], "top_logprobs": 3}, 3),
        ({"include": ["reasoning.encrypted_content"]}, None),
    ],
)
def test_log_probabilities_are_told_where_they_are_asked_for(
    fields: dict[str, Any], logprobs: int | None
) -> None:
    assert parse(**fields).chat.options.logprobs == logprobs


def test_effort_reaches_the_template_and_a_summary_its_place() -> None:
    asked = parse(reasoning={"effort": "none", "summary": "auto"})
    kwargs = {"reasoning_effort": "none", "enable_thinking": False, "thinking": False}
    assert asked.chat.template_kwargs == kwargs
    assert asked.summarize
    assert parse(reasoning={"generate_summary": "concise"}).summarize
    assert not parse(reasoning={"effort": "low"}).summarize


def test_what_codex_sends_is_taken() -> None:
    asked = parse(
        model="m",
        instructions="You are an agent.",
        tools=[*TOOLS, {"type": "custom", "name": "apply_patch"}],
        tool_choice="auto",
        parallel_tool_calls=False,
        reasoning={"effort": "medium", "summary": "auto"},
        store=False,
        stream=True,
        include=["reasoning.encrypted_content"],
        prompt_cache_key="1",
        client_metadata={"a": "b"},
        text={"verbosity": "medium"},
    )
    assert echo(asked)["store"] is False
    assert not asked.chat.parallel_tool_calls


def test_the_request_is_told_back() -> None:
    told = echo(parse(metadata={"a": "b"}, max_output_tokens=5, user="me", truncation="auto"))
    assert (told["metadata"], told["max_output_tokens"]) == ({"a": "b"}, 5)
    assert (told["user"], told["truncation"]) == ("me", "disabled")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"background": True}, "background"),
        ({"context_management": [{"type": "compaction"}]}, "context_management"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"include": ["everything"]}, "include[0]"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"truncation": "middle"}, "truncation"),
        ({"metadata": {"a": 5}}, "metadata.a"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
        ({"reasoning": {"context": "all_turns"}}, "reasoning.context"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "s"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_object"}}, "regex": "a"}, "regex"),
        ({"tools": [{"name": "f"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": TOOLS, "tool_choice": SEARCH}, "tool_choice.type"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "h"}}, "tool_choice.name"),
        ({"tools": [SEARCH], "tool_choice": "required"}, "tool_choice"),
        (
            {"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [OTHER]}},
            "tool_choice.tools",
        ),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        parse(**fields)
    assert caught.value.param == param


def test_another_model_is_not_found() -> None:
    with pytest.raises(ApiError) as caught:
        parse(model="gpt-99")
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")
