"""Objects and chunks are what the clients' own types say, and streams add up to whole answers."""

from __future__ import annotations

from typing import Any

import pytest
from anthropic.types import ModelInfo
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from kttrio.config import ServerConfig
from tests.http_front import Front, encode, running_front
from tests.server.openai.test_openai_chat import CALL, WEATHER

THOUGHT = "<think>\nTwo and two.\n</think>\n\n"
USAGE = {"include_usage": True}
ENDS: dict[str, tuple[str, dict[str, Any], str]] = {
    "eos": (f"{THOUGHT}Four.", {}, "stop"),
    "nothing": ("", {}, "stop"),
    "length": (f"{THOUGHT}Four.", {"max_tokens": 4}, "length"),
    "context": ("Four. " * 200, {}, "length"),
    "stop": (f"{THOUGHT}Four or five.", {"stop": "r or f"}, "stop"),
    "stop token": (f"{THOUGHT}Four!", {"stop_token_ids": [36]}, "stop"),
    "stop in the reasoning": (f"{THOUGHT}Four.", {"stop": "and"}, "stop"),
    "calls": (f"Look.\n{CALL.format('Paris')}\n{CALL.format('Rome')}", {}, "tool_calls"),
    "one call": (CALL.format("A") * 2, {"parallel_tool_calls": False}, "tool_calls"),
    "stop in a call": (CALL.format("Paris and Rome"), {"stop": "and"}, "stop"),
}
ASKED = ({}, {"logprobs": True, "top_logprobs": 2, "n": 2}, {"stream_reasoning": False})


def put_together(chunks: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The choices of a stream, as a whole answer has them."""
    found: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        ChatCompletionChunk.model_validate_json(encode(chunk), strict=True)
        for choice in chunk["choices"]:
            _add(found.setdefault(choice["index"], {"calls": [], "tokens": []}), choice)
    return found


def _add(told: dict[str, Any], choice: dict[str, Any]) -> None:
    assert "finish_reason" not in told, "nothing follows the end"
    for name in ("role", "content", "reasoning_content"):
        told[name] = told.get(name, "") + choice["delta"].get(name, "")
    for call in choice["delta"].get("tool_calls", ()):
        if "id" in call:
            assert call["index"] == len(told["calls"])
            told["calls"].append(dict(call["function"]))
        else:
            told["calls"][call["index"]]["arguments"] += call["function"]["arguments"]
    told["tokens"] += (choice["logprobs"] or {}).get("content", [])
    if choice["finish_reason"] is not None:
        told |= {name: choice[name] for name in ("finish_reason", "matched_stop")}


def in_one(choice: dict[str, Any]) -> dict[str, Any]:
    """A choice of a whole answer in the same words."""
    message = choice["message"]
    return {
        "role": message["role"],
        "content": message["content"] or "",
        "reasoning_content": message["reasoning_content"] or "",
        "calls": [call["function"] for call in message["tool_calls"] or ()],
        "tokens": (choice["logprobs"] or {}).get("content", []),
        "finish_reason": choice["finish_reason"],
        "matched_stop": choice["matched_stop"],
    }


@pytest.mark.parametrize("end", ENDS)
async def test_chats_however_they_end(end: str) -> None:
    text, fields, finish = ENDS[end]
    config = ServerConfig(reasoning_parser="qwen3")
    async with running_front(config=config, context_length=256) as front:
        front.script.text = text
        for asked in ASKED:
            request = {"tools": [WEATHER], **fields, **asked}
            whole = await front.chat(**request)
            ChatCompletion.model_validate_json(whole.body, strict=True)
            *chunks, done = (
                await front.chat(**request, stream=True, stream_options=USAGE)
            ).events()
            answer = whole.json()
            assert done == "[DONE]"
            assert chunks[-1]["usage"] == answer["usage"]
            told = {choice["index"]: in_one(choice) for choice in answer["choices"]}
            assert put_together(chunks) == told
            assert {choice["finish_reason"] for choice in answer["choices"]} == {finish}


async def test_texts() -> None:
    async with running_front() as front:
        for fields in ({}, {"logprobs": 2}, {"stop": "ü"}, {"max_tokens": 2, "n": 2}):
            whole = await front.complete(**{"max_tokens": 100, **fields})
            Completion.model_validate_json(whole.body, strict=True)
            await _check_text_stream(front, {"max_tokens": 100, **fields}, whole.json())


async def _check_text_stream(front: Front, fields: dict[str, Any], whole: dict[str, Any]) -> None:
    reply = await front.complete(**fields, stream=True, stream_options=USAGE)
    *chunks, usage, _ = reply.events()
    for choice in whole["choices"]:
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert "".join(one["text"] for one in mine) == choice["text"]
        assert [one["finish_reason"] for one in mine if one["finish_reason"]] == [
            choice["finish_reason"]
        ]
    for told in (chunks[-1], usage):  # the type has no word for an end that is still to come
        Completion.model_validate_json(encode(told), strict=True)
    assert usage["usage"] == whole["usage"]


async def test_the_model_is_one_to_both_clients() -> None:
    async with running_front() as front:
        reply = await front.ask("GET", "/v1/models/tiny")
        Model.model_validate_json(reply.body, strict=True)
        ModelInfo.model_validate_json(reply.body, strict=True)
