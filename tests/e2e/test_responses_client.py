"""The `openai` client's responses against a running server, and an agent that lives on them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

import openai
import pydantic
import pytest

WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "Get the weather in a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
    },
    "strict": False,
}
DEGREES = {"Paris": 18, "Rome": 24, "Oslo": 7}

Items = list[dict[str, Any]]


def test_a_response_is_text_with_its_usage(client: openai.OpenAI, model: str) -> None:
    response = client.responses.create(model=model, input="What is kttrio?", temperature=0)
    assert response.status == "completed"
    assert "server" in response.output_text
    assert response.usage.input_tokens > 0
    assert response.usage.output_tokens_details.reasoning_tokens == 0
    assert response.model == model


def test_a_stream_is_the_same_response_in_pieces(client: openai.OpenAI, model: str) -> None:
    asked = {"model": model, "input": "What is kttrio?", "temperature": 0}
    whole = client.responses.create(**asked)
    with client.responses.stream(**asked) as stream:
        events = list(stream)
        final = stream.get_final_response()
    pieces = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(pieces) == final.output_text == whole.output_text
    assert len(pieces) > 3
    assert final.usage == whole.usage
    assert [event.sequence_number for event in events] == list(range(len(events)))


def test_a_response_and_a_chat_answer_alike(client: openai.OpenAI, model: str) -> None:
    system, question = "You are a helpful assistant.", "Hello!"
    response = client.responses.create(
        model=model, instructions=system, input=question, temperature=0
    )
    messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    chat = client.chat.completions.create(model=model, messages=messages, temperature=0)
    assert response.output_text == chat.choices[0].message.content
    assert response.usage.input_tokens == chat.usage.prompt_tokens
    counted = client.responses.input_tokens.count(model=model, instructions=system, input=question)
    assert counted.input_tokens == response.usage.input_tokens


def test_a_limit_makes_it_incomplete(client: openai.OpenAI, model: str) -> None:
    response = client.responses.create(model=model, input="What is kttrio?", max_output_tokens=3)
    assert response.status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.usage.output_tokens == 3


def test_log_probabilities(client: openai.OpenAI, model: str) -> None:
    response = client.responses.create(
        model=model,
        input="What is kttrio?",
        include=["message.output_text.logprobs"],
        top_logprobs=2,
        temperature=0,
    )
    (item,) = response.output
    scores = item.content[0].logprobs
    assert "".join(score.token for score in scores) == response.output_text
    assert all(score.top_logprobs[0].logprob == score.logprob for score in scores)


Send = Callable[[openai.OpenAI, dict[str, Any]], Items]


def whole(client: openai.OpenAI, asked: dict[str, Any]) -> Items:
    response = client.responses.create(**asked)
    assert response.status == "completed"
    return [item.model_dump(exclude_none=True) for item in response.output]


def streamed(client: openai.OpenAI, asked: dict[str, Any]) -> Items:
    """As coding agents read it: items when they are done, and the end."""
    items, kinds = [], []
    for event in client.responses.create(**asked, stream=True):
        kinds.append(event.type)
        if event.type == "response.output_item.done":
            items.append(event.item.model_dump(exclude_none=True, exclude={"id", "status"}))
    assert kinds[-1] == "response.completed"
    return items


def run_agent(client: openai.OpenAI, asked: dict[str, Any], send: Send) -> Iterator[Items]:
    """One question: calls are run and the whole history is sent again, until an answer is text."""
    for _ in range(3):
        items = send(client, asked)
        asked["input"] += items
        yield items
        calls = [item for item in items if item["type"] == "function_call"]
        if not calls:
            return
        for call in calls:
            degrees = DEGREES[json.loads(call["arguments"])["city"]]
            output = json.dumps({"temperature": degrees})
            answer = {"call_id": call["call_id"], "output": output}
            asked["input"].append({"type": "function_call_output", **answer})
    raise AssertionError("the agent got no answer")


@pytest.mark.parametrize("send", [whole, streamed])
def test_an_agent_calls_a_tool_in_every_turn(client: openai.OpenAI, model: str, send: Send) -> None:
    asked: dict[str, Any] = {
        "model": model,
        "input": [],
        "tools": [WEATHER, {"type": "custom", "name": "apply_patch"}],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "store": False,
        "include": ["reasoning.encrypted_content"],
        "temperature": 0,
    }
    for city, degrees in DEGREES.items():
        asked["input"].append({"role": "user", "content": f"What is the weather in {city}?"})
        called, said = run_agent(client, asked, send)
        assert [(item["type"], json.loads(item["arguments"])) for item in called] == [
            ("function_call", {"city": city})
        ]
        assert str(degrees) in said[0]["content"][0]["text"]


class Colour(pydantic.BaseModel):
    name: Literal["red", "green"]
    amounts: Annotated[
        list[Annotated[int, pydantic.Field(ge=0, le=9)]], pydantic.Field(min_length=1, max_length=2)
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_text_that_is_parsed_has_its_form(client: openai.OpenAI, model: str, stream: bool) -> None:
    asked = {"model": model, "input": "Name a colour.", "text_format": Colour}
    if stream:
        with client.responses.stream(**asked) as events:
            response = events.until_done().get_final_response()
    else:
        response = client.responses.parse(**asked)
    assert isinstance(response.output_parsed, Colour)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "get_weather"}])
def test_a_call_can_be_forced(client: openai.OpenAI, model: str, choice: object) -> None:
    response = client.responses.create(
        model=model, input="Hello!", tools=[WEATHER], tool_choice=choice, max_output_tokens=64
    )
    assert response.output[0].type == "function_call"
    if response.status == "completed":
        assert set(json.loads(response.output[0].arguments)) == {"city"}


def test_nothing_is_stored(client: openai.OpenAI, model: str) -> None:
    response = client.responses.create(model=model, input="Hello!", store=True, max_output_tokens=4)
    with pytest.raises(openai.NotFoundError, match="stores none"):
        client.responses.retrieve(response.id)
    with pytest.raises(openai.BadRequestError, match="send the whole history"):
        client.responses.create(model=model, input="And?", previous_response_id=response.id)
