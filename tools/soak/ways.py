"""How each protocol over HTTP asks a question, and where the text stands in its answer."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from kttrio.client import Client, ClientError, ConnectionLost
from tools.soak.questions import Question

Json = dict[str, Any]
LAST = frozenset({"response.completed", "response.incomplete", "message_stop"})


@dataclass(frozen=True, slots=True)
class Way:
    """One endpoint, streamed or not."""

    name: str
    path: str
    body: Callable[[Question], Json | None]
    """Of a greedy request; None: the question cannot be asked so."""
    text: Callable[[Json], str]
    """What an event, or the whole answer, adds: text, names of called tools, their arguments."""
    ends: Callable[[str], bool] = lambda data: True
    """Whether the data of a stream's last event may be its last."""
    streams: bool = True

    async def ask(self, client: Client, question: Question) -> AsyncIterator[str]:
        """The text, piece by piece. Raises ClientError for all that is no whole answer."""
        body = self.body(question)
        assert body is not None
        if not self.streams:
            yield self.text(await client.post_json(self.path, body))
            return
        data = ""
        async with client.stream(self.path, body) as events:
            async for event in events:
                data = event.data
                if data != "[DONE]":
                    yield self.text(_healthy(json.loads(data)))
        if not self.ends(data):
            raise ConnectionLost(f"the stream of {self.name} ended early, with {data[:100]}")


def _healthy(value: Json) -> Json:
    if value.get("error") or value.get("type") in ("error", "response.failed"):
        raise ClientError(f"an error in the stream: {json.dumps(value)[:300]}")
    return value


def _is_done(data: str) -> bool:
    return data == "[DONE]"


def _is_last(data: str) -> bool:
    return json.loads(data or "{}").get("type") in LAST


# OpenAI's chat and completions


def _chat(question: Question, *, stream: bool) -> Json | None:
    if question.prompt:
        return None
    named = {"name": "form", "schema": question.form}
    form = {"response_format": {"type": "json_schema", "json_schema": named}}
    return {
        "messages": list(question.messages),
        "max_tokens": question.max_tokens,
        "temperature": 0,
        "stream": stream,
        **({"tools": list(question.tools)} if question.tools else {}),
        **(form if question.form else {}),
        **question.fields,
    }


def _said(message: Json) -> str:
    calls = (call["function"] for call in message.get("tool_calls") or ())
    called = "".join(call.get("name", "") + call.get("arguments", "") for call in calls)
    return (message.get("content") or "") + called


def _chat_event(chunk: Json) -> str:
    return "".join(_said(choice["delta"]) for choice in chunk["choices"])


def _chat_answer(answer: Json) -> str:
    return _said(answer["choices"][0]["message"])


def _completion(question: Question) -> Json | None:
    if not question.prompt:
        return None
    return {
        "prompt": question.prompt,
        "max_tokens": question.max_tokens,
        "temperature": 0,
        "stream": True,
        **question.fields,
    }


def _completion_event(chunk: Json) -> str:
    return "".join(choice["text"] for choice in chunk["choices"])


# OpenAI's responses


def _response(question: Question) -> Json | None:
    if question.prompt or question.fields:
        return None
    form = {"type": "json_schema", "name": "form", "schema": question.form, "strict": True}
    tools = [{"type": "function", **tool["function"]} for tool in question.tools]
    return {
        "input": list(question.messages),
        "max_output_tokens": question.max_tokens,
        "temperature": 0,
        "stream": True,
        **({"tools": tools} if tools else {}),
        **({"text": {"format": form}} if question.form else {}),
    }


def _response_event(event: Json) -> str:
    match event["type"]:
        case "response.output_text.delta" | "response.function_call_arguments.delta":
            return str(event["delta"])
        case "response.output_item.added":
            return str(event["item"].get("name", ""))
    return ""


# Anthropic's messages


def _message(question: Question) -> Json | None:
    if question.prompt or question.fields or question.form:
        return None
    system = [one["content"] for one in question.messages if one["role"] == "system"]
    tools = [_anthropic_tool(tool["function"]) for tool in question.tools]
    return {
        "model": "claude-any",
        "messages": [one for one in question.messages if one["role"] != "system"],
        "max_tokens": question.max_tokens,
        "temperature": 0,
        "stream": True,
        **({"system": system[0]} if system else {}),
        **({"tools": tools} if tools else {}),
    }


def _anthropic_tool(function: Json) -> Json:
    told = {name: function[name] for name in ("name", "description") if name in function}
    return {**told, "input_schema": function["parameters"]}


def _message_event(event: Json) -> str:
    match event:
        case {"type": "content_block_start", "content_block": {"name": name}}:
            return str(name)
        case {"type": "content_block_delta", "delta": delta}:
            return str(delta.get("text") or delta.get("partial_json") or "")
    return ""


# Triton


def _generate(question: Question) -> Json | None:
    if not question.prompt:
        return None
    return {
        "text_input": question.prompt,
        "max_tokens": question.max_tokens,
        "temperature": 0,
        "stream": True,
        **question.fields,
    }


def _generate_event(event: Json) -> str:
    return str(event["text_output"])


def _infer(question: Question) -> Json | None:
    if not question.prompt or question.fields:
        return None
    tensors = (
        ("text_input", "BYTES", question.prompt),
        ("max_tokens", "INT32", question.max_tokens),
        ("temperature", "FP32", 0.0),
        ("exclude_input_in_output", "BOOL", True),
    )
    inputs = [
        {"name": name, "datatype": datatype, "shape": [1], "data": [value]}
        for name, datatype, value in tensors
    ]
    return {"inputs": inputs, "outputs": [{"name": "text_output"}]}


def _infer_answer(answer: Json) -> str:
    return str(answer["outputs"][0]["data"][0])


def ways(model: str) -> tuple[Way, ...]:
    """All that there are to ask `model` over HTTP."""
    chat, triton = "/v1/chat/completions", f"/v2/models/{model}"
    return (
        Way("chat", chat, lambda q: _chat(q, stream=True), _chat_event, _is_done),
        Way("chat, whole", chat, lambda q: _chat(q, stream=False), _chat_answer, streams=False),
        Way("completions", "/v1/completions", _completion, _completion_event, _is_done),
        Way("responses", "/v1/responses", _response, _response_event, _is_last),
        Way("messages", "/v1/messages", _message, _message_event, _is_last),
        Way("generate_stream", f"{triton}/generate_stream", _generate, _generate_event),
        Way("infer", f"{triton}/infer", _infer, _infer_answer, streams=False),
    )
