"""Input items: whichever way a history is sent, the model reads what a chat would show it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kttrio.server.completion import Usage
from kttrio.server.decoding import Answer, Call, Part, Said, Thought
from kttrio.server.errors import BadRequestError
from kttrio.server.openai.request import parse_chat
from kttrio.server.openai.response import Extras, Whole, chat_object
from kttrio.server.openai.response import Head as ChatHead
from kttrio.server.prompting import EchoedPrompt
from kttrio.server.requests import ImageSource
from kttrio.server.responses.input import INPUT, image_sources, template_messages
from kttrio.server.responses.output import REASONING, SUMMARY, Head, TextShape, whole_response
from kttrio.server.responses.reasoning import carry
from kttrio.server.responses.request import parse_response
from kttrio.text.template import ChatTemplate
from kttrio.text.tokenizer import Tokenizer
from tests.tokenizers_fake import make_tiny_tokenizer

USAGE = Usage(prompt_tokens=3, completion_tokens=5, reasoning_tokens=2)
TEMPLATE = ChatTemplate({"default": "{{ messages | tojson(sort_keys=true) }}"})
"""Shows everything that a template is given."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(make_tiny_tokenizer(Path(tmp_path_factory.mktemp("tokenizer"))))


def read(*items: dict[str, Any]) -> list[dict[str, Any]]:
    return template_messages(INPUT.read(list(items), "input"))


def text_part(text: str) -> dict[str, Any]:
    return {"type": "input_text", "text": text}


def said(text: str | list[dict[str, Any]], role: str = "assistant") -> dict[str, Any]:
    return {"role": role, "content": text}


def call(number: int) -> dict[str, Any]:
    return {"type": "function_call", "call_id": f"c{number}", "name": "f", "arguments": "{}"}


def result(number: int) -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": f"c{number}", "output": "5"}


def thought(text: str) -> dict[str, Any]:
    content = [{"type": "reasoning_text", "text": text}]
    return {"type": "reasoning", "summary": [], "content": content}


WORDS = st.text(max_size=4)
CALLS = st.builds(Call, st.uuids().map(str), st.just("f"), st.sampled_from(["{}", '{"a": 1e3}']))
ANSWERS = st.tuples(
    st.lists(WORDS.filter(bool).map(Thought), max_size=1),
    st.lists(st.one_of(CALLS, WORDS.filter(bool).map(lambda text: Said(text, ()))), max_size=4),
).map(lambda parts: [*parts[0], *_one_text_at_a_time(parts[1])])
"""What a model may answer: reasoning first, and no two texts without a call between them."""


def _one_text_at_a_time(parts: list[Part]) -> list[Part]:
    kept: list[Part] = []
    for part in parts:
        if not (isinstance(part, Said) and kept and isinstance(kept[-1], Said)):
            kept.append(part)
    return kept


def as_codex_sends_it(item: dict[str, Any]) -> dict[str, Any]:
    """Without ids, and of reasoning only what is not for the eyes of its user."""
    hidden = ("id", "status", "content") if item["type"] == "reasoning" else ("id", "status")
    return {name: entry for name, entry in item.items() if name not in hidden}


@settings(deadline=None, max_examples=200)
@given(
    turns=st.lists(st.tuples(WORDS, ANSWERS), min_size=1, max_size=3),
    shape=st.sampled_from([REASONING, SUMMARY]),
    codex=st.booleans(),
)
def test_answers_come_back_as_they_would_in_a_chat(
    tokenizer: Tokenizer, turns: list[tuple[str, list[Part]]], shape: TextShape, codex: bool
) -> None:
    messages: list[dict[str, Any]] = []
    items: list[dict[str, Any]] = []
    for question, parts in turns:
        messages.append(said(question, "user"))
        items.append(said(question, "user"))
        answer = Answer(parts=parts, finish="stop")
        messages.append(_chat_message(tokenizer, answer))
        items += [
            as_codex_sends_it(item) if codex else item for item in _items(tokenizer, answer, shape)
        ]
        for one in answer.calls:
            messages.append({"role": "tool", "tool_call_id": one.id, "content": "5"})
            items.append({"type": "function_call_output", "call_id": one.id, "output": "5"})
    chat = parse_chat({"messages": messages}, model="m", vocab_size=400)
    asked = parse_response({"input": items}, model="m", vocab_size=400)
    assert TEMPLATE.render(asked.chat.messages) == TEMPLATE.render(chat.messages)


def _chat_message(tokenizer: Tokenizer, answer: Answer) -> dict[str, Any]:
    extras = Extras(prompts=[EchoedPrompt((1,), "")])
    head = ChatHead("chatcmpl", 1, "m")
    told = Whole(head=head, answers=[answer], usage=USAGE, extras=extras, version="1")
    whole = chat_object(told, tokenizer)
    message: dict[str, Any] = whole["choices"][0]["message"]
    return {name: entry for name, entry in message.items() if entry is not None}


def _items(tokenizer: Tokenizer, answer: Answer, shape: TextShape) -> list[dict[str, Any]]:
    whole = whole_response(
        Head("resp", 1, '{"model":"m"}'), answer, USAGE, tokenizer=tokenizer, reasoning=shape, now=2
    )
    items: list[dict[str, Any]] = json.loads(whole)["output"]
    return items


def test_parallel_calls_are_one_message_of_the_assistant() -> None:
    read_ = read(said("Two?", "user"), thought("Hm."), call(1), call(2), result(1), result(2))
    assert [message["role"] for message in read_] == ["user", "assistant", "tool", "tool"]
    assert read_[1]["reasoning_content"] == "Hm."
    assert [one["id"] for one in read_[1]["tool_calls"]] == ["c1", "c2"]
    assert read_[1]["content"] is None


def test_what_belongs_to_another_answer_begins_another_message() -> None:
    apart = read(said("a"), said("b"), thought("why"), said("c"), call(1), thought("so"))
    assert [message.get("content") for message in apart] == ["a", "b", "c", None]
    assert [message.get("reasoning_content") for message in apart] == [None, None, "why", "so"]


def test_reasoning_that_says_nothing_leaves_no_trace() -> None:
    assert read(said("a"), {"type": "reasoning", "summary": []}, said("b", "user")) == [
        said("a"),
        said("b", "user"),
    ]


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"content": [{"type": "reasoning_text", "text": "a"}], "encrypted_content": "x"}, "a"),
        ({"encrypted_content": carry("Grüße")}, "Grüße"),
        ({"encrypted_content": "gAAAA", "summary": [{"type": "summary_text", "text": "s"}]}, "s"),
        ({"summary": [{"type": "summary_text", "text": text} for text in "st"]}, "s\nt"),
    ],
)
def test_reasoning_is_read_from_wherever_it_is(fields: dict[str, Any], text: str) -> None:
    (message,) = read({"type": "reasoning", **fields})
    assert message == {"role": "assistant", "content": None, "reasoning_content": text}


def test_parts_and_images_of_messages_and_of_results() -> None:
    image = {"type": "input_image", "image_url": "data:,x", "detail": "low"}
    asked = INPUT.read(
        [
            said(
                [{"type": "input_text", "text": "a"}, {"type": "refusal", "refusal": "b"}], "user"
            ),
            {**result(1), "output": [text_part("c"), image]},
        ],
        "input",
    )
    first, second = template_messages(asked)
    assert first["content"] == "a\nb"
    assert second["content"] == [{"type": "text", "text": "c"}, {"type": "image"}]
    assert list(image_sources(asked)) == [
        ImageSource("data:,x", "input[1].output[1].image_url", True)
    ]


@pytest.mark.parametrize(
    ("item", "param"),
    [
        ({"type": "item_reference", "id": "msg_1"}, "input[0]"),
        ({"type": "web_search_call", "id": "ws_1"}, "input[0].type"),
        ({"content": "Hi"}, "input[0].role"),
        ({"role": "tool", "content": "Hi"}, "input[0].role"),
        ({"role": "user"}, "input[0].content"),
        ({"role": "user", "content": [{"type": "input_file"}]}, "input[0].content[0].type"),
        ({**call(1), "call_id": None}, "input[0].call_id"),
        ({**call(1), "arguments": 5}, "input[0].arguments"),
        ({**result(1), "output": None}, "input[0].output"),
    ],
)
def test_other_items_are_refused_by_their_place(item: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        read(item)
    assert caught.value.param == param
