"""Fields of other servers, beyond OpenAI's own: each changes the answer as its clients expect."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kttrio.config import ServerConfig
from kttrio.server.openai.request import parse_chat, parse_text
from kttrio.text.grammar import Form
from tests.http_front import ANSWER, Front, Reply, chat_body, running_front

THINKS = ServerConfig(reasoning_parser="qwen3")
THOUGHT = "<think>\nTwo and two.\n</think>\n\nFour."
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
TEXT = json.dumps(SCHEMA)
TOOLS = [{"type": "function", "function": {"name": name}} for name in ("f", "g")]


def choice(reply: Reply) -> dict[str, Any]:
    assert reply.status == 200, reply.body
    (found,) = reply.json()["choices"]
    return dict(found)


def chunks(reply: Reply) -> list[dict[str, Any]]:
    assert reply.status == 200, reply.body
    *found, done = reply.events()
    assert done == "[DONE]"
    return found


def said(reply: Reply, name: str) -> list[str]:
    """What the chunks' deltas say in this field."""
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks(reply) if chunk["choices"]]
    return [delta[name] for delta in deltas if delta.get(name)]


# The end of the answer


@pytest.mark.parametrize("word", ["include_stop_str_in_output", "no_stop_trim"])
async def test_the_text_that_ended_the_answer_is_kept_where_asked(word: str) -> None:
    async with running_front() as front:
        for fields, text in (({}, "Grüße, 東京"), ({word: True}, "Grüße, 東京!")):
            whole = choice(await front.chat(stop="!", **fields))
            assert (whole["message"]["content"], whole["matched_stop"]) == (text, "!")
            assert choice(await front.complete(stop="!", max_tokens=50, **fields))["text"] == text
            assert (
                "".join(said(await front.chat(stop="!", stream=True, **fields), "content")) == text
            )


async def test_the_token_that_ended_the_answer_is_kept_where_asked() -> None:
    async with running_front() as front:
        stop = front.tokenizer.encode(ANSWER)[3]
        piece = front.tokenizer.piece(stop)
        cut = choice(await front.chat(stop_token_ids=[stop]))["message"]["content"]
        kept = await front.chat(stop_token_ids=[stop], include_stop_str_in_output=True)
        assert choice(kept)["message"]["content"] == cut + piece
        # the model's own end is special: it has no text unless that is asked for, too
        whole = choice(await front.chat(include_stop_str_in_output=True))
        assert whole["message"]["content"] == ANSWER
        raw = await front.chat(include_stop_str_in_output=True, skip_special_tokens=False)
        assert choice(raw)["message"]["content"] == f"{ANSWER}<|im_end|>"


async def test_special_tokens_are_shown_where_asked() -> None:
    async with running_front() as front:
        front.script.text = "a<|im_start|>b"
        assert choice(await front.chat())["message"]["content"] == "ab"
        raw = choice(await front.chat(skip_special_tokens=False))
        assert raw["message"]["content"] == front.script.text
        assert choice(await front.complete(skip_special_tokens=False))["text"] == front.script.text


# Token ids and usage


async def test_token_ids_are_told_where_asked() -> None:
    async with running_front() as front:
        ids = [*front.tokenizer.encode(ANSWER), front.script.end_id]
        prompt = front.tokenizer.encode("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
        chat = await front.chat(return_token_ids=True)
        assert choice(chat)["token_ids"] == ids
        assert chat.json()["prompt_token_ids"] == prompt
        text = choice(await front.complete("Hi", max_tokens=50, return_token_ids=True))
        assert (text["prompt_token_ids"], text["token_ids"]) == (front.tokenizer.encode("Hi"), ids)
        assert "token_ids" not in choice(await front.chat())


async def test_streams_tell_token_ids_where_asked() -> None:
    async with running_front() as front:
        ids = [*front.tokenizer.encode(ANSWER), front.script.end_id]
        chat = chunks(await front.chat(return_token_ids=True, stream=True))
        entries = [chunk["choices"][0] for chunk in chat]
        assert [i for entry in entries for i in entry.get("token_ids", ())] == ids
        assert sum("prompt_token_ids" in chunk for chunk in chat) == 1
        asked = {"max_tokens": 50, "return_token_ids": True, "stream": True}
        entries = [chunk["choices"][0] for chunk in chunks(await front.complete(**asked))]
        assert [i for entry in entries for i in entry.get("token_ids", ())] == ids
        assert entries[0]["prompt_token_ids"] == front.tokenizer.encode("Hi")
        assert sum("prompt_token_ids" in entry for entry in entries) == 1


async def test_usage_grows_from_chunk_to_chunk_where_asked() -> None:
    options = {"stream": True, "stream_options": {"continuous_usage_stats": True}}
    async with running_front() as front:
        for reply in (await front.chat(**options), await front.complete(max_tokens=50, **options)):
            told = [chunk["usage"]["completion_tokens"] for chunk in chunks(reply)]
            assert told == sorted(told)
            assert told[-1] == len(front.tokenizer.encode(ANSWER)) + 1
            assert len(set(told)) > 5


# Reasoning


async def test_reasoning_can_be_left_out() -> None:
    async with running_front(config=THINKS) as front:
        front.script.text = THOUGHT
        whole = await front.chat(include_reasoning=False)
        assert choice(whole)["message"]["reasoning_content"] is None
        assert choice(whole)["message"]["content"] == "Four."
        assert whole.json()["usage"]["reasoning_tokens"] > 0
        streamed = await front.chat(include_reasoning=False, stream=True)
        assert said(streamed, "reasoning_content") == []
        assert "".join(said(streamed, "content")) == "Four."


@pytest.mark.parametrize("stream", [False, True])
async def test_what_is_left_out_is_told_by_no_score_and_no_id_either(stream: bool) -> None:
    asked = {"include_reasoning": False, "logprobs": True, "return_token_ids": True}
    async with running_front(config=THINKS) as front:
        front.script.text = THOUGHT
        reply = await front.chat(**asked, stream=stream)
        entries = [one["choices"][0] for one in (chunks(reply) if stream else [reply.json()])]
        scores = [s["token"] for e in entries for s in (e["logprobs"] or {}).get("content", ())]
        ids = [id for entry in entries for id in entry.get("token_ids", ())]
        whole = front.tokenizer.decode(ids, skip_special_tokens=True)
        assert (whole.strip(), "".join(scores).strip()) == ("Four.", "Four.<|im_end|>")
        front.script.text = THOUGHT.partition("</think>")[0]
        cut = choice(await front.chat(**asked, max_tokens=3))
        assert (cut["logprobs"], cut["token_ids"]) == (None, [])


async def test_reasoning_can_stay_in_the_text() -> None:
    async with running_front(config=THINKS) as front:
        front.script.text = THOUGHT
        whole = choice(await front.chat(separate_reasoning=False))["message"]
        assert (whole["content"], whole["reasoning_content"]) == (THOUGHT, None)


async def test_reasoning_can_come_at_once() -> None:
    async with running_front(config=THINKS) as front:
        front.script.text = THOUGHT
        pieces = said(await front.chat(stream=True), "reasoning_content")
        assert len(pieces) > 2
        streamed = await front.chat(stream=True, stream_reasoning=False)
        assert said(streamed, "reasoning_content") == ["Two and two."]
        assert "".join(said(streamed, "content")) == "Four."
        cut = await front.chat(stream=True, stream_reasoning=False, max_tokens=5)
        assert len(said(cut, "reasoning_content")) == 1


# Prompts


async def prompt_of(front: Front, *messages: dict[str, str], **fields: Any) -> str:
    body = {"messages": list(messages), "return_token_ids": True, **fields}
    reply = await front.ask("POST", "/v1/chat/completions", body)
    assert reply.status == 200, reply.body
    return front.tokenizer.decode(reply.json()["prompt_token_ids"])


async def test_an_answer_goes_on_with_the_last_message() -> None:
    user = {"role": "user", "content": "Count."}
    begun = {"role": "assistant", "content": "One, two, \n"}
    async with running_front(config=THINKS) as front:
        front.script.text = "\n three."
        prompt = await prompt_of(front, user, begun, continue_final_message=True)
        assert prompt.endswith("<|im_start|>assistant\nOne, two, \n")
        whole = await front.ask(
            "POST",
            "/v1/chat/completions",
            {"messages": [user, begun], "continue_final_message": True},
        )
        assert choice(whole)["message"]["content"] == front.script.text


async def test_reasoning_goes_on_where_the_last_message_is_in_it() -> None:
    messages = [
        {"role": "user", "content": "Count."},
        {"role": "assistant", "content": "<think>\nTwo"},
    ]
    async with running_front(config=THINKS) as front:
        front.script.text = " and two.\n</think>\n\nFour."
        body = {"messages": messages, "continue_final_message": True}
        whole = choice(await front.ask("POST", "/v1/chat/completions", body))["message"]
        assert (whole["reasoning_content"], whole["content"]) == (" and two.", "Four.")


async def test_a_prompt_can_end_with_its_last_message() -> None:
    async with running_front() as front:
        message = {"role": "user", "content": "Hi"}
        prompt = await prompt_of(front, message, add_generation_prompt=False)
        assert prompt == "<|im_start|>user\nHi<|im_end|>\n"


# Forms: what each spelling asks for


@pytest.mark.parametrize(
    ("fields", "form"),
    [
        ({"response_format": {"type": "text"}}, None),
        (
            {"response_format": {"type": "json_object"}},
            Form("json_object", "", "response_format"),
        ),
        (
            {"response_format": {"type": "json_object", "schema": SCHEMA}},
            Form("json_schema", TEXT, "response_format.schema"),
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": SCHEMA, "strict": True},
                }
            },
            Form("json_schema", TEXT, "response_format.json_schema.schema"),
        ),
        ({"regex": "a+"}, Form("regex", "a+", "regex")),
        ({"ebnf": "root ::= 'a'"}, Form("ebnf", "root ::= 'a'", "ebnf")),
        ({"json_schema": TEXT}, Form("json_schema", TEXT, "json_schema")),
        ({"json_schema": SCHEMA}, Form("json_schema", TEXT, "json_schema")),
        ({"guided_json": SCHEMA}, Form("json_schema", TEXT, "guided_json")),
        ({"guided_regex": "a+"}, Form("regex", "a+", "guided_regex")),
        ({"guided_choice": ["a", "b"]}, Form("choice", '["a", "b"]', "guided_choice")),
        ({"guided_grammar": 'start: "a"'}, Form("lark", 'start: "a"', "guided_grammar")),
        ({"guided_grammar": "root ::= 'a'"}, Form("ebnf", "root ::= 'a'", "guided_grammar")),
        ({"guided_json_object": True}, Form("json_object", "", "guided_json_object")),
        (
            {"structured_outputs": {"json": SCHEMA}},
            Form("json_schema", TEXT, "structured_outputs.json"),
        ),
        ({"structured_outputs": {"regex": "a"}}, Form("regex", "a", "structured_outputs.regex")),
        (
            {"structured_outputs": {"choice": ["a"]}},
            Form("choice", '["a"]', "structured_outputs.choice"),
        ),
        (
            {"structured_outputs": {"grammar": 'start: "a"'}},
            Form("lark", 'start: "a"', "structured_outputs.grammar"),
        ),
        (
            {"structured_outputs": {"json_object": True}},
            Form("json_object", "", "structured_outputs.json_object"),
        ),
    ],
)
def test_every_spelling_of_a_form(fields: dict[str, Any], form: Form | None) -> None:
    chat = parse_chat(chat_body(**fields), model="m", vocab_size=10)
    text = parse_text({"prompt": "Hi", **fields}, model="m", vocab_size=10)
    assert chat.options.form == text.options.form == form


# Tools: what each choice comes to


def choose(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def allow(mode: str, *names: str) -> dict[str, Any]:
    allowed = {"mode": mode, "tools": [choose(name) for name in names]}
    return {"type": "allowed_tools", "allowed_tools": allowed}


@pytest.mark.parametrize(
    ("wanted", "told", "forced", "parallel"),
    [
        (None, "fg", "", True),
        ("auto", "fg", "", True),
        ("none", "", "", True),
        ("required", "fg", "fg", True),
        (choose("g"), "fg", "g", False),
        (allow("auto", "f"), "f", "", True),
        (allow("required", "f", "g"), "fg", "fg", True),
    ],
)
def test_every_choice_of_tools(wanted: object, told: str, forced: str, parallel: bool) -> None:
    asked = parse_chat(chat_body(tools=TOOLS, tool_choice=wanted), model="m", vocab_size=10)
    assert [tool["function"]["name"] for tool in asked.tools] == list(told)
    assert asked.forced_calls == tuple(forced)
    assert asked.parallel_tool_calls is parallel


def test_a_tool_is_told_to_the_model_as_the_client_sent_it() -> None:
    tool = {"type": "function", "function": {"name": "f", "strict": True, "own": [1]}, "x": None}
    assert parse_chat(chat_body(tools=[tool]), model="m", vocab_size=10).tools == [tool]


def test_the_clients_name_for_a_request_has_two_spellings() -> None:
    for name in ("rid", "request_id"):
        asked = parse_chat(chat_body(**{name: "mine"}), model="m", vocab_size=10)
        assert asked.options.client_id == "mine"
