"""Requests of Anthropic's clients to a front, and answers read as these clients read them."""

from __future__ import annotations

import json
from typing import Any

from anthropic.types import Message, RawMessageStreamEvent
from pydantic import TypeAdapter

from tests.http_front import Front, Reply

EVENTS: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
WEATHER = {
    "name": "get_weather",
    "description": "Get the weather in a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    },
}
CALL = (
    "<tool_call>\n<function=get_weather>\n<parameter=city>\n{}\n</parameter>\n</function>\n"
    "</tool_call>"
)


def user(content: object) -> dict[str, object]:
    return {"role": "user", "content": content}


def assistant(content: object) -> dict[str, object]:
    return {"role": "assistant", "content": content}


def text(said: str, **fields: object) -> dict[str, object]:
    return {"type": "text", "text": said, **fields}


async def ask(front: Front, content: object = "Hi", **fields: object) -> Reply:
    body = {"max_tokens": 200, "messages": [user(content)], **fields}
    return await front.ask("POST", "/v1/messages", body)


async def whole(front: Front, content: object = "Hi", **fields: object) -> dict[str, Any]:
    """A whole message, which is what the client's types say."""
    reply = await ask(front, content, **fields)
    assert reply.status == 200, reply.body
    Message.model_validate_json(reply.body, strict=True)
    message: dict[str, Any] = reply.json()
    return message


async def streamed(front: Front, content: object = "Hi", **fields: object) -> list[dict[str, Any]]:
    """The events of a message but pings, each of its name and of the client's types."""
    reply = await ask(front, content, stream=True, **fields)
    assert reply.status == 200, reply.body
    events = [event for event in named_events(reply.body) if event["type"] != "ping"]
    for event in events:
        if event["type"] != "error":
            EVENTS.validate_json(json.dumps(event), strict=True)
    return events


def named_events(body: bytes) -> list[dict[str, Any]]:
    events = []
    for block in body.decode().removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def put_together(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that a stream tells, by the rules of Anthropic's streams."""
    start, *middle, delta, stop = events
    assert (start["type"], delta["type"], stop["type"]) == (
        "message_start",
        "message_delta",
        "message_stop",
    )
    message: dict[str, Any] = start["message"]
    assert (message["content"], message["stop_reason"]) == ([], None)
    pieces: list[str] = []
    for event in middle:
        if event["type"] == "content_block_start":
            assert event["index"] == len(message["content"])
            message["content"].append(event["content_block"])
            pieces = []
            continue
        assert event["index"] == len(message["content"]) - 1
        block = message["content"][-1]
        if event["type"] == "content_block_delta":
            _, name = event["delta"]  # its type, and the field that it adds to
            pieces += [event["delta"][name]] if name == "partial_json" else []
            block[name] = block.get(name, "") + event["delta"][name]
        else:
            assert event["type"] == "content_block_stop"
            if block.pop("partial_json", None):
                block["input"] = json.loads("".join(pieces))
    return {**message, **delta["delta"], "usage": delta["usage"]}


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    """What two answers to one request have in common."""
    content = [
        {name: block[name] for name in block if name != "id"} for block in message["content"]
    ]
    return {**message, "id": "", "content": content}


def last_prompt(front: Front) -> str:
    """What the model was shown last."""
    prompts = [chunk for plan in front.runner.history for chunk in plan.chunks if chunk.start == 0]
    return front.tokenizer.decode(list(prompts[-1].token_ids))
