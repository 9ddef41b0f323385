"""`litellm` with `openai/` models against a running server: chats, streams, tools, texts."""

from __future__ import annotations

import json
from functools import partial
from types import ModuleType
from typing import Any

import pytest

from tests.e2e.conftest import WEATHER, Server

# what pydantic says of litellm's own types
pytestmark = [
    pytest.mark.filterwarnings("ignore:Item '.*' on TypedDict class:UserWarning"),
    pytest.mark.filterwarnings("ignore:Accessing the 'model_:DeprecationWarning"),
]

QUESTION = [{"role": "user", "content": "What is kttrio?"}]


@pytest.fixture
def where(server: Server, model: str) -> dict[str, Any]:
    """Which model, and where it is."""
    address = {"api_base": f"{server.url}/v1", "api_key": "unused"}
    # its gateway for tools, which these do not come from, needs a package of its own
    plain = {"temperature": 0, "num_retries": 0, "_skip_mcp_handler": True}
    return {"model": f"openai/{model}", **address, **plain}


def test_chat(litellm: ModuleType, where: dict[str, Any]) -> None:
    answer = litellm.completion(messages=QUESTION, **where)
    assert "kttrio" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


def test_a_stream_is_the_same_answer(litellm: ModuleType, where: dict[str, Any]) -> None:
    ask = partial(litellm.completion, messages=QUESTION, **where)
    chunks = list(ask(stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == ask().choices[0].message.content
    assert len([piece for piece in pieces if piece]) > 3
    assert chunks[-1].usage.completion_tokens > 0


def test_tools_and_their_results(litellm: ModuleType, where: dict[str, Any]) -> None:
    history: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
    ask = partial(litellm.completion, tools=[WEATHER], **where)
    message = ask(messages=history).choices[0].message
    (call,) = message.tool_calls
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    result = {"role": "tool", "tool_call_id": call.id, "content": '{"temperature": 18}'}
    answer = ask(messages=[*history, message, result], max_tokens=64)
    assert answer.choices[0].message.content


def test_a_streamed_call_adds_up(litellm: ModuleType, where: dict[str, Any]) -> None:
    question = [{"role": "user", "content": "What is the weather in Rome?"}]
    chunks = litellm.completion(
        messages=question, tools=[WEATHER], tool_choice="required", stream=True, **where
    )
    whole = litellm.stream_chunk_builder(list(chunks), messages=question)
    (call,) = whole.choices[0].message.tool_calls
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Rome"}


def test_a_form(litellm: ModuleType, where: dict[str, Any]) -> None:
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "green"]}},
        "required": ["colour"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "choice", "schema": schema}}
    answer = litellm.completion(messages=QUESTION, response_format=form, **where)
    assert json.loads(answer.choices[0].message.content)["colour"] in ("red", "green")


def test_text(litellm: ModuleType, where: dict[str, Any]) -> None:
    where["model"] = where["model"].replace("openai/", "text-completion-openai/")
    del where["_skip_mcp_handler"]
    ask = partial(litellm.text_completion, prompt="What is", max_tokens=8, **where)
    whole = ask().choices[0].text
    assert whole
    assert "".join(chunk.choices[0].text or "" for chunk in ask(stream=True)) == whole


def test_bad_input_is_the_callers_error(litellm: ModuleType, where: dict[str, Any]) -> None:
    with pytest.raises(litellm.BadRequestError):
        litellm.completion(messages=[{"role": "wizard", "content": "x"}], **where)
