"""What is refused: each bad input with its status and the field that is blamed."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.http_front import Front, encode, running_front
from tests.pictures import image_part

USER = {"role": "user", "content": "Hi"}
TOOL = {"type": "function", "function": {"name": "f"}}
HUGE = 10**30


def call(arguments: object) -> dict[str, Any]:
    function = {"name": "f", "arguments": arguments}
    return {
        "role": "assistant",
        "tool_calls": [{"id": "c", "type": "function", "function": function}],
    }


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def choose(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def allow(mode: str, *names: str) -> dict[str, Any]:
    return {
        "type": "allowed_tools",
        "allowed_tools": {"mode": mode, "tools": [choose(name) for name in names]},
    }


def schema_format(named: dict[str, Any]) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": named}}


CHAT: list[tuple[dict[str, Any], str | None]] = [
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "Hi"}, "messages"),
    ({"messages": ["Hi"]}, "messages[0]"),
    ({"messages": [{}]}, "messages[0].role"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": 1, "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "function", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [5]}]}, "messages[0].content[0]"),
    (
        {"messages": [{"role": "user", "content": [{"type": "video_url"}]}]},
        "messages[0].content[0].type",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "messages[0].content[0].image_url",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": 5}]}]},
        "messages[0].content[0].image_url",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content[0].image_url.url",
    ),
    (
        {"messages": [{"role": "user", "content": [image_part("data:", detail="huge")]}]},
        "messages[0].content[0].image_url.detail",
    ),
    (
        {"messages": [{"role": "user", "content": [image_part("data:image/png;base64,")]}]},
        "messages[0].content[0].image_url.url",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "messages[0].content[0].text",
    ),
    ({"messages": [USER, call([1])]}, "messages[1].tool_calls[0].function.arguments"),
    ({"messages": [USER, call(7)]}, "messages[1].tool_calls[0].function.arguments"),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{}]}]},
        "messages[0].tool_calls[0].function",
    ),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": HUGE}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.01}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"top_k": HUGE}, "top_k"),
    ({"min_p": -1}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"repetition_penalty": 1e-300}, "repetition_penalty"),
    ({"presence_penalty": 2.5}, "presence_penalty"),
    ({"frequency_penalty": "1"}, "frequency_penalty"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"999999": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5"),
    ({"logit_bias": {"5": "1"}}, "logit_bias.5"),
    ({"seed": 0.5}, "seed"),
    ({"seed": HUGE}, "seed"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"n": True}, "n"),
    ({"stop": 5}, "stop"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", ""]}, "stop"),
    ({"stop": ["a", 1]}, "stop"),
    ({"stop": ["a"] * 65}, "stop"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"stop_token_ids": [1.5]}, "stop_token_ids"),
    ({"stop_token_ids": [999999]}, "stop_token_ids"),
    ({"stop_token_ids": 3}, "stop_token_ids"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"max_tokens": HUGE}, "max_tokens"),
    ({"max_tokens": 10**9}, None),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"min_tokens": 9, "max_tokens": 3}, "min_tokens"),
    ({"ignore_eos": 1}, "ignore_eos"),
    ({"logprobs": 1}, "logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"stream": True, "stream_options": []}, "stream_options"),
    ({"tools": {}}, "tools"),
    ({"tools": [1]}, "tools[0]"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": 1}}]},
        "tools[0].function.parameters",
    ),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice.function"),
    ({"tools": [TOOL], "tool_choice": {"type": "custom"}}, "tool_choice.type"),
    ({"tools": [TOOL], "tool_choice": choose("g")}, "tool_choice.function.name"),
    ({"tools": [TOOL], "tool_choice": allow("sometimes", "f")}, "tool_choice.allowed_tools.mode"),
    ({"tools": [TOOL], "tool_choice": allow("auto", "g")}, "tool_choice.allowed_tools.tools"),
    ({"tools": [TOOL], "tool_choice": allow("auto")}, "tool_choice.allowed_tools.tools"),
    ({"tools": [TOOL], "tool_choice": "required", "ignore_eos": True}, "ignore_eos"),
    ({"regex": "a", "ignore_eos": True}, "ignore_eos"),
    ({"tool_choice": "sometimes"}, "tool_choice"),
    ({"tool_choice": []}, "tool_choice"),
    ({"parallel_tool_calls": "no"}, "parallel_tool_calls"),
    ({"response_format": "text"}, "response_format"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    (schema_format({"schema": {}}), "response_format.json_schema.name"),
    (schema_format({"name": "x"}), "response_format.json_schema.schema"),
    (schema_format({"name": "x", "schema": []}), "response_format.json_schema.schema"),
    ({"regex": "a", "ebnf": "root ::= 'a'"}, "ebnf"),
    ({"response_format": {"type": "json_object"}, "regex": "a"}, "regex"),
    ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs.regex"),
    ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag"),
    ({"structured_outputs": []}, "structured_outputs"),
    ({"guided_json": "{"}, "guided_json"),
    ({"guided_json": "[]"}, "guided_json"),
    ({"json_schema": 5}, "json_schema"),
    ({"guided_choice": []}, "guided_choice"),
    ({"guided_choice": ["a", 1]}, "guided_choice[1]"),
    ({"structural_tag": "{}"}, "structural_tag"),
    ({"stop_regex": "a+"}, "stop_regex"),
    ({"use_beam_search": True}, "use_beam_search"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"modalities": ["audio"]}, "modalities"),
    ({"chat_template_kwargs": []}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"messages": []}}, "messages"),
    ({"reasoning_effort": "extreme"}, "reasoning_effort"),
    ({"continue_final_message": True}, "continue_final_message"),
    (
        {"messages": [said("So")], "continue_final_message": True, "add_generation_prompt": True},
        "continue_final_message",
    ),
    ({"model": 5}, "model"),
]
TEXT: list[tuple[dict[str, Any], str | None]] = [
    ({"prompt": None}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [999999]}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": [[1], 2]}, "prompt"),
    ({"prompt": [None]}, "prompt"),
    ({"prompt": ["a"] * 1025}, "prompt"),
    ({"prompt": ["a"] * 100, "n": 100}, "prompt"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"echo": "yes"}, "echo"),
    ({"suffix": "end"}, "suffix"),
    ({"best_of": 3}, "best_of"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 1024}, None),
]
BODIES = [
    b"",
    b"{",
    b"[]",
    b"null",
    b'"text"',
    b"{'messages': 1}",
    b'{"messages": [], }',
    b'{"temperature": NaN}',
    b'{"temperature": Infinity}',
    b'{"seed": ' + b"9" * 5000 + b"}",
    b"[" * 100_000,
    b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    b"\xff\xfe{\x00}\x00",
    b'{"messages": "\xff"}',
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    b'{"messages": [{"role": "user", "content": "x", "name": "\\udfff"}]}',
]


async def check(front: Front, path: str, body: dict[str, Any], param: str | None) -> None:
    reply = await front.ask("POST", path, body)
    error = reply.error()
    assert reply.status == 400, error
    assert error["param"] == param, error
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) < 500


async def test_bad_fields_of_chats_are_blamed_by_name() -> None:
    async with running_front() as front:
        for fields, param in CHAT:
            await check(front, "/v1/chat/completions", {"messages": [USER], **fields}, param)
            streamed = {"messages": [USER], "stream": True, **fields}
            if "stream_options" not in fields:
                await check(front, "/v1/chat/completions", streamed, param)
        assert front.runner.num_steps == 0


async def test_bad_fields_of_text_completions_are_blamed_by_name() -> None:
    async with running_front() as front:
        for fields, param in TEXT:
            await check(front, "/v1/completions", {"prompt": "Hi", **fields}, param)
        assert front.runner.num_steps == 0


@pytest.mark.parametrize("body", BODIES, ids=lambda body: str(body[:30]))
async def test_bodies_that_are_no_request(body: bytes) -> None:
    async with running_front() as front:
        for path in ("/v1/chat/completions", "/v1/completions"):
            reply = await front.ask("POST", path, body)
            assert reply.status == 400
            assert len(reply.error()["message"]) < 300


async def test_nesting_that_parses_but_cannot_be_rendered() -> None:
    deep = b'{"a":' * 900 + b"1" + b"}" * 900
    body = b'{"messages":[{"role":"user","content":"x"}],"tools":[{"type":"function","function":'
    body += b'{"name":"f","parameters":' + deep + b"}}]}"
    async with running_front() as front:
        reply = await front.ask("POST", "/v1/chat/completions", body)
        assert reply.status in (200, 400)
        assert (await front.ask("GET", "/health")).status == 200


async def test_an_unknown_model_is_404_and_none_is_the_served_one() -> None:
    async with running_front() as front:
        for path, body in (
            ("/v1/chat/completions", {"messages": [USER]}),
            ("/v1/completions", {"prompt": "Hi"}),
        ):
            assert (await front.ask("POST", path, body)).status == 200
            reply = await front.ask("POST", path, {"model": "gpt" * 1000, **body})
            assert reply.status == 404
            assert reply.error()["code"] == "model_not_found"
            assert reply.error()["param"] == "model"
            assert len(reply.body) < 1000


async def test_any_content_type_is_read_as_json() -> None:
    async with running_front() as front:
        body = encode({"messages": [USER]})
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
            reply = await front.ask("POST", "/v1/chat/completions", body, Content_Type=kind)
            assert reply.status == 200, json.loads(reply.body)


async def test_what_a_template_refuses_is_a_400() -> None:
    async with running_front() as front:
        template = front.state.model.template
        assert template is not None
        for name in ("default",):
            refusing = "{{ raise_exception('roles must alternate') }}"
            template._templates[name] = template._templates[name].environment.from_string(refusing)
        reply = await front.chat()
        assert reply.status == 400
        assert "roles must alternate" in reply.error()["message"]
