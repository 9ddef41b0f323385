"""An answer that comes back as blocks makes the prompt that the chat API makes of it."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kttrio.config import ServerConfig
from kttrio.server.anthropic.request import MessagesBody, to_answer
from kttrio.server.openai.request import parse_chat
from kttrio.server.schema.records import read
from kttrio.server.served_model import ServedModel
from tests.http_front import Front, running_front
from tests.server.anthropic_front import ask, assistant, last_prompt, user, whole
from tests.text.family_calls import FAMILY_CALLS
from tests.tokenizers_fake import make_family_tokenizer, make_tiny_tokenizer

PARAMETERS = {"type": "object", "properties": {"s": {"type": "string"}}}
TOOL = {"name": "f", "input_schema": PARAMETERS}
FUNCTION = {"type": "function", "function": {"name": "f", "parameters": PARAMETERS}}
SWITCHES = {"chat_template_kwargs": {"thinking": True, "enable_thinking": True}}
OPENED_BY_PROMPT = ("qwen3_5", "deepseek_r1", "deepseek_v31", "deepseek_v32", "minimax_m2")


@pytest.mark.parametrize("family", FAMILY_CALLS)
async def test_a_round_with_a_tool_shows_the_model_the_same(family: str) -> None:
    opening = "" if family in OPENED_BY_PROMPT else "<think>"
    checkpoint = partial(make_family_tokenizer, family=family)
    async with running_front(write_checkpoint=checkpoint, context_length=4096) as front:
        front.script.text = opening + "Well.\n</think>\n\nI look." + FAMILY_CALLS[family][2]
        assert await by_blocks(front) == await by_chat(front)


async def by_blocks(front: Front) -> str:
    """The prompt of the second round with /v1/messages."""
    fields = {"tools": [TOOL], "thinking": {"type": "adaptive"}}
    message = await whole(front, "Weather?", **fields)
    *_, call = message["content"]
    result = {"type": "tool_result", "tool_use_id": call["id"], "content": "sunny"}
    history = [user("Weather?"), assistant(message["content"]), user([result])]
    assert (await ask(front, messages=history, **fields)).status == 200
    return without(call["id"], last_prompt(front))


async def by_chat(front: Front) -> str:
    """The same with /v1/chat/completions."""
    fields: dict[str, Any] = {"tools": [FUNCTION], **SWITCHES}
    message = (await front.chat("Weather?", **fields)).json()["choices"][0]["message"]
    (call,) = message["tool_calls"]
    result = {"role": "tool", "tool_call_id": call["id"], "content": "sunny"}
    body = {"messages": [user("Weather?"), message, result], **fields}
    assert (await front.ask("POST", "/v1/chat/completions", body)).status == 200
    return without(call["id"], last_prompt(front))


def without(id: str, prompt: str) -> str:
    """Ids are drawn anew for each answer; some templates show them."""
    return prompt.replace(id, "ID")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    directory = make_tiny_tokenizer(tmp_path_factory.mktemp("tiny"))
    return ServedModel.load(directory, ServerConfig())


WORDS = st.text(max_size=8)
SAID = st.text(min_size=1, max_size=8)
INPUTS = st.dictionaries(SAID, st.none() | st.booleans() | st.integers() | WORDS, max_size=3)
RESULTS = st.tuples(INPUTS, WORDS)
ROUNDS = st.lists(st.tuples(SAID, WORDS, WORDS, st.lists(RESULTS, max_size=3)), max_size=3)


@given(system=WORDS, rounds=ROUNDS, last=SAID)
def test_any_history_is_the_same_chat(
    model: ServedModel, system: str, rounds: list[Any], last: str
) -> None:
    blocks: list[dict[str, Any]] = []
    chat: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    for question, thought, answer, calls in rounds:
        named = [(f"call_{i}", *call) for i, call in enumerate(calls)]
        blocks += [user(question), assistant(answer_blocks(thought, answer, named))]
        blocks += [user([result_block(*call) for call in named])] if named else []
        chat += [user(question), answer_message(thought, answer, named)]
        chat += [{"role": "tool", "tool_call_id": id, "content": said} for id, _, said in named]
        blocks.append(user("On."))
        chat.append(user("On."))
        blocks.append(assistant("Yes."))
        chat.append(assistant("Yes."))
    body = {"max_tokens": 1, "system": system, "messages": [*blocks, user(last)]}
    asked = to_answer(read(MessagesBody, body), model)
    expected = parse_chat({"messages": [*chat, user(last)]}, model=model.name, vocab_size=1)
    assert asked.messages == expected.messages
    assert [str(one) for one in arguments(asked.messages)] == [
        str(one) for one in arguments(expected.messages)
    ]


def answer_blocks(thought: str, said: str, calls: list[Any]) -> list[dict[str, Any]]:
    thinking = {"type": "thinking", "thinking": thought, "signature": "kttrio:"}
    return [
        *([thinking] if thought else []),
        *([{"type": "text", "text": said}] if said else []),
        *({"type": "tool_use", "id": id, "name": "f", "input": given} for id, given, _ in calls),
    ]


def answer_message(thought: str, said: str, calls: list[Any]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": said}
    if thought:
        message["reasoning_content"] = thought
    if calls:
        message["tool_calls"] = [past_call(id, given) for id, given, _ in calls]
    return message


def past_call(id: str, given: dict[str, Any]) -> dict[str, Any]:
    function = {"name": "f", "arguments": json.dumps(given, ensure_ascii=False)}
    return {"id": id, "type": "function", "function": function}


def result_block(id: str, _: object, said: str) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": id, "content": said}


def arguments(messages: list[dict[str, Any]]) -> list[Any]:
    calls = [call for message in messages for call in message.get("tool_calls", ())]
    return [call["function"]["arguments"] for call in calls]
