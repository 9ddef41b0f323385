"""The `anthropic` Python client against a running server, and an agent that works with it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest

from tests.e2e.conftest import Server

WEATHER = {
    "name": "get_weather",
    "description": "Get the weather in a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
    },
}
TIME = {
    "name": "get_time",
    "description": "Get the time in a city",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
    },
}
QUESTION = [{"role": "user", "content": "What is kttrio?"}]
IN_PARIS = [{"role": "user", "content": "What is the weather in Paris?"}]
GREEDY: dict[str, Any] = {"max_tokens": 128, "extra_body": {"temperature": 0}}


@pytest.fixture(scope="module")
def claude(server: Server) -> Iterator[anthropic.Anthropic]:
    settings = {"base_url": server.url, "api_key": "unused", "max_retries": 0, "timeout": 120.0}
    with anthropic.Anthropic(**settings) as client:
        yield client


def said(message: anthropic.types.Message) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def test_a_message_answers_sensibly_and_stops_by_itself(
    claude: anthropic.Anthropic, model: str
) -> None:
    message = claude.messages.create(model=model, messages=QUESTION, **GREEDY)
    assert "experts" in said(message)
    assert (message.role, message.model, message.stop_reason) == ("assistant", model, "end_turn")
    assert message.usage.input_tokens > 0
    assert message.usage.output_tokens > 5


def test_a_stream_is_the_same_answer_in_pieces(claude: anthropic.Anthropic, model: str) -> None:
    whole = claude.messages.create(model=model, messages=QUESTION, **GREEDY)
    with claude.messages.stream(model=model, messages=QUESTION, **GREEDY) as stream:
        pieces = list(stream.text_stream)
        final = stream.get_final_message()
    assert len(pieces) > 3
    assert "".join(pieces) == said(final) == said(whole)
    assert final.stop_reason == "end_turn"
    assert final.usage.model_dump() == whole.usage.model_dump()


def test_a_stop_sequence_is_named(claude: anthropic.Anthropic, model: str) -> None:
    message = claude.messages.create(
        model=model, messages=QUESTION, stop_sequences=["nope", " language"], **GREEDY
    )
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", " language")
    assert "language" not in said(message)


def test_a_tool_call_copies_the_city(claude: anthropic.Anthropic, model: str) -> None:
    fields: dict[str, Any] = {"model": model, "messages": IN_PARIS, "tools": [WEATHER], **GREEDY}
    message = claude.messages.create(**fields)
    (call,) = message.content
    assert (call.type, call.name, call.input) == ("tool_use", "get_weather", {"city": "Paris"})
    assert message.stop_reason == "tool_use"
    with claude.messages.stream(**fields) as stream:
        events = list(stream)
        (streamed,) = stream.get_final_message().content
    assert streamed.input == call.input
    assert events[-1].type == "message_stop"
    assert "".join(e.partial_json for e in events if e.type == "input_json") == '{"city": "Paris"}'


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_time"}])
def test_a_call_can_be_forced(
    claude: anthropic.Anthropic, model: str, choice: dict[str, str]
) -> None:
    message = claude.messages.create(
        model=model, messages=QUESTION, tools=[WEATHER, TIME], tool_choice=choice, **GREEDY
    )
    calls = [block for block in message.content if block.type == "tool_use"]
    assert calls
    assert {call.name for call in calls} <= {choice.get("name", "get_weather"), "get_time"}
    assert all(isinstance(call.input["city"], str) for call in calls)


def test_an_answer_can_be_held_to_a_schema(claude: anthropic.Anthropic, model: str) -> None:
    schema = {
        "type": "object",
        "properties": {"kind": {"enum": ["server", "client"]}, "loud": {"type": "boolean"}},
        "required": ["kind", "loud"],
        "additionalProperties": False,
    }
    wanted = {"format": {"type": "json_schema", "schema": schema}}
    message = claude.messages.create(model=model, messages=QUESTION, output_config=wanted, **GREEDY)
    answer = json.loads(said(message))
    assert answer["kind"] in ("server", "client")
    assert isinstance(answer["loud"], bool)


def test_tokens_are_counted_as_they_are_used(claude: anthropic.Anthropic, model: str) -> None:
    fields: dict[str, Any] = {
        "model": model,
        "messages": IN_PARIS,
        "tools": [WEATHER],
        "system": "Use the tools to answer.",
    }
    counted = claude.messages.count_tokens(**fields)
    message = claude.messages.create(**fields, max_tokens=1)
    assert counted.input_tokens == message.usage.input_tokens > 10


def test_the_served_model_is_listed(claude: anthropic.Anthropic, model: str) -> None:
    page = claude.models.list()
    assert [(one.id, one.type, one.display_name) for one in page] == [(model, "model", model)]
    assert claude.models.retrieve(model).created_at.year > 2000


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"model": "gpt-99"}, anthropic.NotFoundError),
        ({"messages": []}, anthropic.BadRequestError),
        ({"extra_body": {"temperature": 3}}, anthropic.BadRequestError),
        ({"tools": [{"type": "web_search_20250305", "name": "w"}]}, anthropic.BadRequestError),
        ({"messages": [{"role": "user", "content": "word " * 9000}]}, anthropic.BadRequestError),
        ({"messages": [{"role": "user", "content": "a" * 2**24}]}, anthropic.RequestTooLargeError),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else value.__name__,
)
def test_bad_input_is_the_callers_error(
    claude: anthropic.Anthropic,
    model: str,
    change: dict[str, object],
    error: type[anthropic.APIStatusError],
) -> None:
    request: dict[str, Any] = {"model": model, "messages": QUESTION, "max_tokens": 4, **change}
    with pytest.raises(error) as caught:
        claude.messages.create(**request)
    assert caught.value.body["type"] == "error"
    assert caught.value.body["error"]["type"] == caught.value.type
    with pytest.raises(error), claude.messages.stream(**request) as stream:
        stream.get_final_message()


@anthropic.beta_tool
def get_weather(city: str) -> str:
    """Get the weather in a city."""
    return f'{{"city": "{city}", "temperature": 18, "condition": "sunny"}}'


def test_the_clients_own_loop_of_tools_comes_to_its_end(
    claude: anthropic.Anthropic, model: str
) -> None:
    """It begins with a thread, as servers may hold, and must be told to go on without."""
    runner = claude.beta.messages.tool_runner(
        model=model, messages=IN_PARIS, tools=[get_weather], **GREEDY
    )
    first, last = list(runner)
    assert (first.stop_reason, last.stop_reason) == ("tool_use", "end_turn")
    assert "18" in last.content[0].text


class Agent:
    """Asks, runs the tools that the model calls, and asks again, as coding agents do: a header of
    its own in every request, marks for a cache, thinking as the model likes, everything streamed,
    the whole history sent back each time."""

    def __init__(self, client: anthropic.Anthropic) -> None:
        self.history: list[dict[str, Any]] = []
        self.called: list[tuple[str, Any]] = []
        self.num_input_tokens: list[int] = []
        self._client = client

    def ask(self, question: str) -> str:
        self.history.append({"role": "user", "content": [_marked(question)]})
        for _ in range(4):
            answer = self._answer()
            self.history.append({"role": "assistant", "content": answer.to_dict()["content"]})
            calls = [block for block in answer.content if block.type == "tool_use"]
            assert (answer.stop_reason == "tool_use") is bool(calls)
            if not calls:
                return said(answer)
            self.history.append({"role": "user", "content": list(map(self._run, calls))})
        raise AssertionError(f"the agent never came to an end: {self.history}")

    def _answer(self) -> Any:
        number = len(self.num_input_tokens)
        header = f"x-anthropic-billing-header: cc_version=2.1.{number}; cch={number:05x};"
        with self._client.beta.messages.stream(
            model="claude-next",
            max_tokens=32000,
            extra_body={"temperature": 0},
            system=[{"type": "text", "text": header}, _marked("Use the tools to answer.")],
            messages=self.history,
            tools=[WEATHER, {**TIME, "cache_control": {"type": "ephemeral"}}],
            thinking={"type": "adaptive"},
            output_config={"effort": "medium"},
            metadata={"user_id": "someone"},
            context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
            betas=["context-management-2025-06-27", "interleaved-thinking-2025-05-14"],
        ) as stream:
            answer = stream.get_final_message()
        self.num_input_tokens.append(answer.usage.input_tokens)
        return answer

    def _run(self, call: Any) -> dict[str, Any]:
        self.called.append((call.name, call.input))
        told = {"get_weather": '{"temperature": 18, "condition": "sunny"}', "get_time": "12:34"}
        return {
            "type": "tool_result",
            "tool_use_id": call.id,
            "content": [{"type": "text", "text": told[call.name]}],
        }


def _marked(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text, "cache_control": {"type": "ephemeral"}}


def test_an_agent_works_through_several_turns(claude: anthropic.Anthropic) -> None:
    agent = Agent(claude)
    weather = agent.ask("What is the weather in Paris?")
    assert "18" in weather
    assert "sunny" in weather
    assert "12:34" in agent.ask("What time is it in Rome?")
    assert agent.called == [
        ("get_weather", {"city": "Paris"}),
        ("get_time", {"city": "Rome"}),
    ]
    assert agent.num_input_tokens == sorted(agent.num_input_tokens)
