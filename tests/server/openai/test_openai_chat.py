"""POST /v1/chat/completions: fields, streaming rules, reasoning and tool calls."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kttrio.config import EngineConfig, ServerConfig
from kttrio.server.openai.request import parse_chat
from tests.http_front import ANSWER, MODEL, Client, Front, Reply, chat_body, running_front

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        },
    },
}
CALL = (
    "<tool_call>\n<function=get_weather>\n<parameter=city>\n{}\n</parameter>\n</function>\n"
    "</tool_call>"
)


def choices(reply: Reply) -> list[dict[str, Any]]:
    assert reply.status == 200, reply.body
    found: list[dict[str, Any]] = reply.json()["choices"]
    return found


def message(reply: Reply) -> dict[str, Any]:
    (choice,) = choices(reply)
    found: dict[str, Any] = choice["message"]
    return found


def deltas(events: list[Any], index: int = 0) -> list[dict[str, Any]]:
    return [
        choice["delta"]
        for event in events
        if isinstance(event, dict)
        for choice in event["choices"]
        if choice["index"] == index
    ]


def joined(events: list[Any], name: str = "content", index: int = 0) -> str:
    return "".join(delta.get(name) or "" for delta in deltas(events, index))


async def test_a_whole_answer_has_every_field() -> None:
    async with running_front() as front:
        answer = (await front.chat()).json()
        assert answer["id"].startswith("chatcmpl-")
        assert answer["object"] == "chat.completion"
        assert answer["model"] == MODEL
        assert answer["choices"] == [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": ANSWER,
                    "refusal": None,
                    "reasoning_content": None,
                    "tool_calls": None,
                },
                "logprobs": None,
                "finish_reason": "stop",
                "matched_stop": front.script.end_id,
            }
        ]
        usage = answer["usage"]
        num_tokens = len(front.tokenizer.encode(ANSWER)) + 1
        assert usage["completion_tokens"] == num_tokens
        assert usage["total_tokens"] == usage["prompt_tokens"] + num_tokens
        assert usage["reasoning_tokens"] == 0
        assert usage["prompt_tokens_details"] == {"cached_tokens": 0}
        assert answer["metadata"] == {"weight_version": "default"}


async def test_the_rules_of_streams() -> None:
    async with running_front() as front:
        reply = await front.chat(stream=True, stream_options={"include_usage": True})
        assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert reply.headers["cache-control"] == "no-cache"
        assert "content-length" not in reply.headers
        *chunks, usage, done = reply.events()
        assert done == "[DONE]"
        assert len({(c["id"], c["created"], c["model"], c["object"]) for c in chunks}) == 1
        first, *middle, last = [chunk["choices"][0] for chunk in chunks]
        assert first["delta"] == {"role": "assistant", "content": ""}
        assert all("role" not in choice["delta"] for choice in middle)
        assert all(choice["finish_reason"] is None for choice in [first, *middle])
        assert (last["delta"], last["finish_reason"]) == ({}, "stop")
        assert last["matched_stop"] == front.script.end_id
        assert joined(chunks) == ANSWER
        assert usage["choices"] == []
        assert usage["usage"] == (await front.chat()).json()["usage"]


async def test_a_stream_says_nothing_about_usage_unless_asked() -> None:
    async with running_front() as front:
        events = (await front.chat(stream=True)).events()
        assert not any("usage" in event for event in events if isinstance(event, dict))


async def test_text_is_raw_utf_8_and_never_split() -> None:
    async with running_front() as front:
        front.script.text = '東京 "quoted" \\ back\nnew \u2028 line \x00 😀'
        reply = await front.chat(stream=True)
        assert "東京".encode() in reply.body
        assert joined(reply.events()) == front.script.text
        assert message(await front.chat())["content"] == front.script.text


async def test_n_choices() -> None:
    async with running_front() as front:
        whole = await front.chat(n=3, seed=5)
        assert [choice["index"] for choice in choices(whole)] == [0, 1, 2]
        assert {choice["message"]["content"] for choice in choices(whole)} == {ANSWER}
        usage = whole.json()["usage"]
        assert usage["completion_tokens"] == 3 * (len(front.tokenizer.encode(ANSWER)) + 1)
        assert usage["prompt_tokens"] == (await front.chat()).json()["usage"]["prompt_tokens"]
        seeds = {chunk.sampling.seed for plan in front.runner.history for chunk in plan.chunks}
        assert len(seeds) >= 3
        assert 5 in seeds
        events = (await front.chat(n=3, stream=True)).events()
        for index in range(3):
            assert joined(events, index=index) == ANSWER
            ends = [
                choice
                for event in events[:-1]
                for choice in event["choices"]
                if choice["index"] == index and choice["finish_reason"]
            ]
            assert len(ends) == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("stop", "shown"),
    [
        ("is well", "Grüße, 東京! All "),
        (["nope", ", 東"], "Grüße"),
        ("😀.", "Grüße, 東京! All is well "),
    ],
)
async def test_stop_strings_across_tokens(stop: object, shown: str, stream: bool) -> None:
    async with running_front() as front:
        reply = await front.chat(stop=stop, stream=stream)
        if stream:
            *chunks, last, _ = reply.events()
            assert joined(chunks) == shown
            end = last["choices"][0]
        else:
            (end,) = choices(reply)
            assert end["message"]["content"] == shown
        assert end["finish_reason"] == "stop"
        assert end["matched_stop"] == (stop if isinstance(stop, str) else stop[-1])
        await front.idle()
        assert front.state.engine.stats.free_slots == front.state.engine.stats.num_slots


async def test_held_back_text_is_released_at_the_length_limit() -> None:
    async with running_front() as front:
        limit = len(front.tokenizer.encode("Grüße, 東京! All is"))
        reply = await front.chat(stop="is well", max_tokens=limit, stream=True)
        *chunks, last, _ = reply.events()
        assert joined(chunks) == "Grüße, 東京! All is"
        assert last["choices"][0]["finish_reason"] == "length"
        assert last["choices"][0]["matched_stop"] is None


async def test_max_tokens_in_both_spellings_and_by_default() -> None:
    async with running_front(context_length=128) as front:
        front.script.endless = True
        (choice,) = choices(await front.chat(max_tokens=3))
        assert choice["finish_reason"] == "length"
        usage = (await front.chat(max_completion_tokens=2, max_tokens=5)).json()["usage"]
        assert usage["completion_tokens"] == 2
        usage = (await front.chat()).json()["usage"]
        assert usage["total_tokens"] == 128


async def test_sampling_fields_reach_the_engine_and_defaults_come_from_the_checkpoint() -> None:
    async with running_front() as front:
        await front.chat(max_tokens=1)
        sampling = front.runner.history[-1].chunks[0].sampling
        assert (sampling.temperature, sampling.top_k) == (0.7, 20)
        assert sampling.stop_token_ids == front.state.model.end_ids
        await front.chat(
            max_tokens=9,
            min_tokens=2,
            temperature=0,
            top_p=0.5,
            top_k=-1,
            min_p=0.1,
            repetition_penalty=1.1,
            presence_penalty=-1,
            frequency_penalty=0.5,
            logit_bias={"5": -100, "7": 2.5},
            seed=-3,
            stop_token_ids=[9],
            ignore_eos=True,
        )
        sampling = front.runner.history[-1].chunks[0].sampling
        assert (sampling.max_tokens, sampling.min_tokens) == (9, 2)
        assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.0, 0.5, 0)
        assert (sampling.min_p, sampling.repetition_penalty) == (0.1, 1.1)
        assert (sampling.presence_penalty, sampling.frequency_penalty) == (-1.0, 0.5)
        assert sampling.logit_bias == ((5, -100.0), (7, 2.5))
        assert sampling.stop_token_ids == {9}
        assert sampling.seed == -3 & (2**63 - 1)


async def test_null_means_absent_and_unknown_fields_are_ignored() -> None:
    async with running_front() as front:
        nulls = dict.fromkeys(
            ["temperature", "n", "stop", "stream", "tools", "logit_bias", "max_tokens", "seed"]
        )
        ignored = {"user": "x", "metadata": {"a": "b"}, "store": True, "service_tier": "auto"}
        reply = await front.chat(**nulls, **ignored, brand_new_field=[1])
        assert message(reply)["content"] == ANSWER


async def test_logprobs() -> None:
    async with running_front() as front:
        (choice,) = choices(await front.chat(logprobs=True, top_logprobs=2))
        content = choice["logprobs"]["content"]
        assert bytes(b for entry in content[:-1] for b in entry["bytes"]).decode() == ANSWER
        assert content[-1]["token"] == "<|im_end|>"
        assert all(len(entry["top_logprobs"]) == 2 for entry in content)
        assert all(entry["logprob"] < 0 for entry in content)
        (choice,) = choices(await front.chat(logprobs=True))
        assert choice["logprobs"]["content"][0]["top_logprobs"] == []
        events = (await front.chat(logprobs=True, stream=True)).events()
        streamed = [
            entry
            for event in events[:-1]
            for entry in (event["choices"][0]["logprobs"] or {"content": []})["content"]
        ]
        assert streamed == choice["logprobs"]["content"]


async def test_conversations_reach_the_template() -> None:
    async with running_front() as front:
        messages = [
            {"role": "developer", "content": "Be brief."},
            {
                "role": "user",
                "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}],
            },
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {
                        "id": "call_1",
                        "type": "function",
                        "function": {"name": "f", "arguments": '{"city": "Rome"}'},
                    }
                ],
            },
            {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
        ]
        body = {"messages": messages, "max_tokens": 1}
        assert (await front.ask("POST", "/v1/chat/completions", body)).status == 200
        prompt = front.tokenizer.decode(list(front.runner.history[-1].chunks[0].token_ids))
        assert "<|im_start|>system\nBe brief.<|im_end|>" in prompt
        assert "one\ntwo" in prompt
        assert "<parameter=city>\nRome\n</parameter>" in prompt
        assert prompt.endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize("cities", [["Paris"], ["Paris", "東京"]])
async def test_tool_calls_whole_and_streamed(cities: list[str]) -> None:
    async with running_front() as front:
        front.script.text = "Let me see.\n" + "\n".join(map(CALL.format, cities))
        whole = await front.chat(tools=[WEATHER])
        (choice,) = choices(whole)
        assert choice["finish_reason"] == "tool_calls"
        calls = choice["message"]["tool_calls"]
        assert [json.loads(call["function"]["arguments"]) for call in calls] == [
            {"city": city} for city in cities
        ]
        assert {call["function"]["name"] for call in calls} == {"get_weather"}
        assert choice["message"]["content"].strip() == "Let me see."
        events = (await front.chat(tools=[WEATHER], stream=True)).events()
        pieces = [call for delta in deltas(events) for call in delta.get("tool_calls", [])]
        for index, city in enumerate(cities):
            first, *rest = [piece for piece in pieces if piece["index"] == index]
            assert first["id"].startswith("call_")
            assert first["type"] == "function"
            assert first["function"] == {"name": "get_weather", "arguments": ""}
            assert all(set(piece) == {"index", "function"} for piece in rest)
            arguments = "".join(piece["function"]["arguments"] for piece in rest)
            assert json.loads(arguments) == {"city": city}
        assert events[-2]["choices"][0]["finish_reason"] == "tool_calls"


async def test_an_answer_of_calls_only_has_no_content() -> None:
    async with running_front() as front:
        front.script.text = CALL.format("Paris")
        assert message(await front.chat(tools=[WEATHER]))["content"] is None


async def test_a_call_cut_off_by_the_limit_ends_with_length() -> None:
    async with running_front() as front:
        front.script.text = CALL.format("Paris and a long tail")
        limit = len(
            front.tokenizer.encode("<tool_call>\n<function=get_weather>\n<parameter=city>\nPar")
        )
        (choice,) = choices(await front.chat(tools=[WEATHER], max_tokens=limit))
        assert choice["finish_reason"] == "length"
        (call,) = choice["message"]["tool_calls"]
        with pytest.raises(ValueError, match=r"Unterminated|Expecting"):
            json.loads(call["function"]["arguments"])


async def test_one_call_at_a_time_when_asked() -> None:
    async with running_front() as front:
        front.script.text = "\n".join(map(CALL.format, ["Paris", "Rome", "Oslo"]))
        (choice,) = choices(await front.chat(tools=[WEATHER], parallel_tool_calls=False))
        (call,) = choice["message"]["tool_calls"]
        assert json.loads(call["function"]["arguments"]) == {"city": "Paris"}
        assert choice["finish_reason"] == "tool_calls"
        await front.idle()


async def test_without_tools_or_with_choice_none_a_call_is_text() -> None:
    async with running_front() as front:
        front.script.text = CALL.format("Paris")
        for fields in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
            reply = message(await front.chat(**fields))
            assert reply["content"] == CALL.format("Paris")
            assert reply["tool_calls"] is None


async def test_reasoning_is_told_from_content_and_counted() -> None:
    async with running_front(config=ServerConfig(reasoning_parser="qwen3")) as front:
        front.script.text = "<think>\nTwo and two.\n</think>\n\nFour."
        whole = await front.chat()
        assert message(whole)["reasoning_content"] == "Two and two."
        assert message(whole)["content"] == "Four."
        usage = whole.json()["usage"]
        assert 5 < usage["reasoning_tokens"] < usage["completion_tokens"]
        details = usage["completion_tokens_details"]
        assert details == {"reasoning_tokens": usage["reasoning_tokens"]}
        events = (await front.chat(stream=True)).events()
        assert joined(events, "reasoning_content") == "Two and two."
        assert joined(events) == "Four."


async def test_usage_tells_what_became_of_drafts() -> None:
    async with running_front(num_drafts=2) as front:
        front.script.text = "One, two, three, four and five."
        whole = await front.chat(n=2)
        texts = [choice["message"]["content"] for choice in choices(whole)]
        assert texts == [front.script.text] * 2
        details = whole.json()["usage"]["completion_tokens_details"]
        assert details["accepted_prediction_tokens"] > 0
        assert details["rejected_prediction_tokens"] > 0
        assert details["accepted_prediction_tokens"] < whole.json()["usage"]["completion_tokens"]
        options = {"stream_options": {"include_usage": True}}
        *_, last, _ = (await front.chat(stream=True, n=2, **options)).events()
        assert last["usage"]["completion_tokens_details"] == details


@pytest.mark.parametrize(
    ("kwargs", "effort", "switches"),
    [
        ({"a": 1}, "none", {"enable_thinking": False, "thinking": False}),
        ({}, "low", {"enable_thinking": True, "thinking": True}),
        ({"thinking": False}, "low", {}),
        ({"enable_thinking": True}, "none", {}),
    ],
)
async def test_template_kwargs_and_effort(
    kwargs: dict[str, Any], effort: str, switches: dict[str, bool]
) -> None:
    body = chat_body(chat_template_kwargs=kwargs, reasoning_effort=effort)
    asked = parse_chat(body, model=MODEL, vocab_size=10)
    assert asked.template_kwargs == {**kwargs, "reasoning_effort": effort, **switches}


async def test_a_failed_step_is_an_error_event_in_streams_and_a_500_else() -> None:
    async with running_front(fail_steps=(3, 7)) as front:
        *chunks, error = (await front.chat(stream=True)).events()
        assert deltas(chunks)[0]["role"] == "assistant"
        assert error["error"]["type"] == "server_error"
        assert "scripted failure" in error["error"]["message"]
        reply = await front.chat()
        assert reply.status == 500
        assert reply.error()["code"] == "engine_error"
        assert message(await front.chat())["content"] == ANSWER


async def test_the_engines_death_ends_every_stream_with_an_error() -> None:
    async with running_front(delay=0.002) as front:
        front.script.endless = True
        client = await front.connect()
        await begin_stream(front, client)
        front.engine_scope.cancel()
        *_, error = (await client.receive()).events()
        assert error["error"]["code"] == "engine_error"
        reply = await front.chat()
        assert reply.status == 503
        assert reply.error()["type"] == "service_unavailable_error"
        health = await front.ask("GET", "/health")
        assert health.status == 503


@pytest.mark.parametrize("stream", [False, True])
async def test_a_full_queue_is_429_with_retry_after(stream: bool) -> None:
    engine = EngineConfig(max_running_requests=1, max_queued_requests=0)
    async with running_front(engine_config=engine, delay=0.002) as front:
        front.script.endless = True
        client = await front.connect()
        await begin_stream(front, client)
        reply = await front.chat(stream=stream)
        assert reply.status == 429
        assert int(reply.headers["retry-after"]) >= 1
        assert reply.error()["type"] == "rate_limit_error"
        await client.stream.aclose()
        await front.idle()


async def begin_stream(front: Front, client: Client) -> None:
    await client.send("POST", "/v1/chat/completions", chat_body(stream=True))
    await client.begin()
    assert front.state.engine.stats.running == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_an_over_long_prompt_is_refused_with_the_numbers(stream: bool) -> None:
    async with running_front(context_length=64) as front:
        reply = await front.chat("word " * 50, stream=stream)
        assert reply.status == 400
        error = reply.error()
        assert error["code"] == "context_length_exceeded"
        assert "64 tokens" in error["message"]
        reply = await front.chat("Hi", max_tokens=10**6)
        assert reply.error()["code"] == "context_length_exceeded"


async def test_long_bodies_are_encoded_in_a_thread_with_the_same_result() -> None:
    async with running_front(context_length=4096) as front:
        short = (await front.chat("a" * 3000, max_tokens=1)).json()["usage"]
        padded = await front.chat("a" * 3000, max_tokens=1, user="x" * 100_000)
        assert padded.json()["usage"] == short


async def test_long_bodies_are_read_in_a_thread_with_the_same_complaints() -> None:
    async with running_front() as front:
        padding = "x" * 100_000
        assert (await front.chat(user=padding, n=0)).error()["param"] == "n"
        assert (await front.complete("Hi", user=padding, model="other")).status == 404
        deep = b'{"messages":' + b"[" * 100_000
        reply = await front.ask("POST", "/v1/chat/completions", deep)
        assert "nested too deeply" in reply.error()["message"]
