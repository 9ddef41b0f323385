"""POST /v1/messages: whole and streamed answers, their ends, errors, and the count of tokens."""

from __future__ import annotations

import json
from functools import partial

import pytest
import trio

from kttrio.config import EngineConfig, ServerConfig
from kttrio.server.anthropic_signature import seal
from tests.http_front import ANSWER, MODEL, Front, Reply, running_front
from tests.server.anthropic_front import (
    CALL,
    WEATHER,
    ask,
    assistant,
    last_prompt,
    named_events,
    put_together,
    streamed,
    user,
    whole,
    without_ids,
)
from tests.tokenizers_fake import make_family_tokenizer

THINKS = ServerConfig(reasoning_parser="qwen3")
THOUGHT = "<think>\nTwo and two.\n</think>\n\n"


def error_of(reply: Reply, status: int) -> tuple[str, str]:
    """Type and message of an error in Anthropic's shape."""
    assert reply.status == status, reply.body
    body = reply.json()
    assert body["type"] == "error"
    assert body["request_id"] == reply.headers["request-id"] == reply.headers["x-request-id"]
    return body["error"]["type"], body["error"]["message"]


async def test_a_whole_message_has_every_field() -> None:
    async with running_front() as front:
        message = await whole(front)
        num_tokens = len(front.tokenizer.encode(ANSWER)) + 1
        assert message["id"].startswith("msg")
        assert message["usage"].pop("input_tokens") > 0
        assert {**message, "id": ""} == {
            "id": "",
            "type": "message",
            "role": "assistant",
            "model": MODEL,
            "content": [{"type": "text", "text": ANSWER}],
            "stop_reason": "end_turn",
            "stop_sequence": None,
            "usage": {
                "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": 0,
                "output_tokens": num_tokens,
                "output_tokens_details": {"thinking_tokens": 0},
            },
        }


async def test_the_rules_of_streams() -> None:
    async with running_front() as front:
        reply = await ask(front, stream=True)
        assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
        start, ping, *_, last = named_events(reply.body)
        usage = (await whole(front))["usage"]
        assert start["message"]["usage"] == {**usage, "output_tokens": 0}
        assert ping == {"type": "ping"}
        assert last == {"type": "message_stop"}


@pytest.mark.parametrize(
    "said",
    [
        ANSWER,
        "",
        THOUGHT + "Four.",
        CALL.format("Rome"),
        "I look.\n" + CALL.format("Rome") + "\n" + CALL.format("東京") + "\nSo far.",
        THOUGHT + "I look." + CALL.format("Oslo"),
        '東京 "quoted" \\ back\nnew \u2028 line \x00 😀',
    ],
)
async def test_a_stream_tells_the_whole_message(said: str) -> None:
    async with running_front(config=THINKS, num_drafts=2) as front:
        front.script.text = said
        told = put_together(await streamed(front, tools=[WEATHER]))
        message = await whole(front, tools=[WEATHER])
        assert without_ids(told) == without_ids(message)


async def test_text_calls_and_thinking_are_blocks_in_their_order() -> None:
    async with running_front(config=THINKS) as front:
        front.script.text = THOUGHT + "I look." + CALL.format("Oslo") + CALL.format("Rome")
        message = await whole(front, tools=[WEATHER], thinking={"type": "adaptive"})
        thinking, said, *calls = message["content"]
        assert thinking == {"type": "thinking", "thinking": "Two and two.", "signature": seal()}
        assert said == {"type": "text", "text": "I look."}
        assert [(call["name"], call["input"]) for call in calls] == [
            ("get_weather", {"city": "Oslo"}),
            ("get_weather", {"city": "Rome"}),
        ]
        assert message["stop_reason"] == "tool_use"
        assert message["usage"]["output_tokens_details"]["thinking_tokens"] > 3


async def test_omitted_thinking_is_kept_in_its_signature_and_comes_back() -> None:
    checkpoint = partial(make_family_tokenizer, family="qwen3_5")
    async with running_front(write_checkpoint=checkpoint) as front:
        front.script.text = "Two and two.\n</think>\n\nFour."
        omitted = {"thinking": {"type": "adaptive", "display": "omitted"}}
        message = await whole(front, **omitted)
        told = put_together(await streamed(front, **omitted))
        assert told["content"] == message["content"]
        assert message["content"][0] == {
            "type": "thinking",
            "thinking": "",
            "signature": seal("Two and two."),
        }
        history = [user("Hi"), assistant(message["content"]), user("Go on.")]
        await whole(front, messages=history, **omitted)
        assert "<think>\nTwo and two.\n</think>" in last_prompt(front)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "stop"),
    [
        ({}, ("end_turn", None)),
        ({"max_tokens": 4}, ("max_tokens", None)),
        ({"stop_sequences": ["nope", "is well"]}, ("stop_sequence", "is well")),
    ],
)
async def test_why_an_answer_ends(
    fields: dict[str, object], stop: tuple[str, str | None], stream: bool
) -> None:
    async with running_front() as front:
        message = (
            put_together(await streamed(front, **fields))
            if stream
            else await whole(front, **fields)
        )
        assert (message["stop_reason"], message["stop_sequence"]) == stop


async def test_more_tokens_than_the_context_holds_are_cut_to_what_it_holds() -> None:
    async with running_front(context_length=128) as front:
        front.script.endless = True
        message = await whole(front, max_tokens=32000)
        assert message["stop_reason"] == "model_context_window_exceeded"
        usage = message["usage"]
        assert usage["input_tokens"] + usage["output_tokens"] == 128
        reply = await ask(front, "word " * 50, stream=True)
        kind, said = error_of(reply, 400)
        assert kind == "invalid_request_error"
        assert said.startswith("prompt is too long: ")


async def test_a_call_cut_off_by_the_limit_has_no_input_that_could_be_run() -> None:
    async with running_front() as front:
        front.script.text = CALL.format("Paris and a long tail")
        begun = "<tool_call>\n<function=get_weather>\n<parameter=city>\nPar"
        limit = len(front.tokenizer.encode(begun))
        message = await whole(front, tools=[WEATHER], max_tokens=limit)
        assert message["stop_reason"] == "max_tokens"
        (call,) = message["content"]
        assert call["input"] == {}
        events = await streamed(front, tools=[WEATHER], max_tokens=limit)
        pieces = [
            event["delta"]["partial_json"]
            for event in events
            if "index" in event and event["type"] == "content_block_delta"
        ]
        with pytest.raises(ValueError, match=r"Unterminated|Expecting"):
            json.loads("".join(pieces))


async def test_a_silent_stream_is_kept_alive_by_pings() -> None:
    config = ServerConfig(stream_keepalive_seconds=0.1)
    async with running_front(config=config, delay=0.35) as front:
        front.script.text = "ab"
        reply = await ask(front, stream=True)
        pings = [event for event in named_events(reply.body) if event["type"] == "ping"]
        assert len(pings) > 2
        assert b"keep-alive" not in reply.body


async def test_a_failed_step_is_an_error_event_in_streams_and_a_500_else() -> None:
    async with running_front(fail_steps=(3, 7)) as front:
        *_, error = await streamed(front)
        assert error["request_id"].startswith("req")
        assert error["error"]["type"] == "api_error"
        assert "scripted failure" in error["error"]["message"]
        kind, said = error_of(await ask(front), 500)
        assert (kind, "scripted failure" in said) == ("api_error", True)
        assert (await whole(front))["content"][0]["text"] == ANSWER


async def test_an_aborted_answer_is_an_error_for_the_api_has_no_word_for_it() -> None:
    async with running_front(delay=0.002) as front:
        front.script.endless = True
        clients = [await front.connect(), await front.connect()]
        for client, stream in zip(clients, (True, False), strict=True):
            body = {"max_tokens": 900, "messages": [user("Hi")], "stream": stream}
            await client.send("POST", "/v1/messages", body)
        while front.state.engine.stats.generated_tokens < 10:
            await trio.lowlevel.checkpoint()
        await front.ask("POST", "/abort_request", {"abort_all": True})
        *_, error = named_events((await clients[0].receive()).body)
        assert error["error"]["type"] == "invalid_request_error"
        assert error_of(await clients[1].receive(), 410) == tuple(error["error"].values())


@pytest.mark.parametrize("stream", [False, True])
async def test_a_full_queue_is_a_rate_limit(stream: bool) -> None:
    engine = EngineConfig(max_running_requests=1, max_queued_requests=0)
    async with running_front(engine_config=engine, delay=0.002) as front:
        front.script.endless = True
        client = await front.connect()
        body = {"max_tokens": 500, "messages": [user("Hi")], "stream": True}
        await client.send("POST", "/v1/messages", body)
        await client.begin()
        reply = await ask(front, stream=stream)
        assert error_of(reply, 429)[0] == "rate_limit_error"
        assert int(reply.headers["retry-after"]) >= 1
        await client.stream.aclose()
        await front.idle()


async def test_who_may_ask_and_where() -> None:
    async with running_front(config=ServerConfig(api_key=("k",))) as front:
        assert error_of(await ask(front), 401)[0] == "authentication_error"
        body = {"max_tokens": 9, "messages": [user("Hi")]}
        for headers in ({"x_api_key": "k"}, {"Authorization": "Bearer k"}):
            version = {"anthropic_version": "2023-06-01", "anthropic_beta": "a,b"}
            path = "/v1/messages?beta=true"
            reply = await front.ask("POST", path, body, **headers, **version)
            assert reply.status == 200
        reply = await front.ask("GET", "/v1/messages", x_api_key="k")
        assert error_of(reply, 405)[0] == "invalid_request_error"
        reply = await front.ask("POST", "/v1/messages/batches", body, x_api_key="k")
        assert error_of(reply, 404)[0] == "not_found_error"


async def test_a_body_too_large_is_told_in_anthropics_words() -> None:
    async with running_front(config=ServerConfig(max_body_bytes=2048)) as front:
        assert error_of(await ask(front, "x" * 4096), 413)[0] == "request_too_large"


@pytest.mark.parametrize("name", [MODEL, "claude-sonnet-4-5", None])
async def test_names_that_mean_the_served_model(name: str | None) -> None:
    async with running_front() as front:
        assert (await whole(front, model=name, max_tokens=1))["model"] == MODEL


async def test_a_thread_is_refused_so_that_the_client_goes_on_without_it() -> None:
    async with running_front() as front:
        reply = await ask(front, thread={"type": "create"})
        assert error_of(reply, 400)[0] == "invalid_request_error"
        details = reply.json()["error"]["details"]
        assert details == {"error_code": "thread_unsupported_request"}


async def test_an_unknown_model_is_not_found() -> None:
    async with running_front() as front:
        kind, said = error_of(await ask(front, model="gpt-5"), 404)
        assert kind == "not_found_error"
        assert MODEL in said


async def test_sampling_fields_reach_the_engine_and_defaults_come_from_the_checkpoint() -> None:
    async with running_front() as front:
        await whole(front, max_tokens=1)
        sampling = front.runner.history[-1].chunks[0].sampling
        assert (sampling.temperature, sampling.top_k) == (0.7, 20)
        await whole(front, max_tokens=1, temperature=0.2, top_p=0.5, top_k=3)
        sampling = front.runner.history[-1].chunks[0].sampling
        assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.2, 0.5, 3)


async def test_one_call_at_a_time_when_asked() -> None:
    async with running_front() as front:
        front.script.text = "\n".join(map(CALL.format, ["Paris", "Rome"]))
        choice = {"type": "auto", "disable_parallel_tool_use": True}
        message = await whole(front, tools=[WEATHER], tool_choice=choice)
        (call,) = message["content"]
        assert call["input"] == {"city": "Paris"}
        assert message["stop_reason"] == "tool_use"
        message = await whole(front, tools=[WEATHER], tool_choice={"type": "none"})
        assert message["content"][0]["type"] == "text"
        await front.idle()


async def test_an_answer_that_is_begun_goes_on_where_it_ends() -> None:
    async with running_front() as front:
        history = [user("Sun in Greek?"), assistant("It is (")]
        message = await whole(front, messages=history)
        assert last_prompt(front).endswith("<|im_start|>assistant\nIt is (")
        assert message["content"][0]["text"] == ANSWER
        assert message["usage"]["input_tokens"] == await count(front, messages=history)


async def test_requests_that_differ_in_their_header_alone_have_the_same_tokens() -> None:
    async with running_front() as front:
        for number in ("1f2", "9ab0c"):
            header = f"x-anthropic-billing-header: cc_version=2.1.37.{number}; cch={number};"
            system = [{"type": "text", "text": header}, {"type": "text", "text": "Be brief."}]
            await whole(front, system=system, max_tokens=1)
        first, second = (plan.chunks[0].token_ids for plan in front.runner.history)
        assert first == second


async def count(front: Front, **fields: object) -> int:
    reply = await front.ask("POST", "/v1/messages/count_tokens", fields)
    assert reply.status == 200, reply.body
    assert set(reply.json()) == {"input_tokens"}
    num_tokens: int = reply.json()["input_tokens"]
    return num_tokens


async def test_tokens_are_counted_as_they_are_answered() -> None:
    async with running_front() as front:
        fields = {"system": "Be brief.", "tools": [WEATHER], "thinking": {"type": "adaptive"}}
        counted = await count(front, messages=[user("Hi")], **fields)
        assert counted == (await whole(front, max_tokens=1, **fields))["usage"]["input_tokens"]
        assert counted > await count(front, messages=[user("Hi")])
        assert front.runner.num_steps > 0
        begun = await count(front, messages=[user("Hi"), assistant("Hello")])
        assert begun > await count(front, messages=[user("Hi")])


async def test_counting_refuses_what_answering_refuses() -> None:
    async with running_front() as front:
        for fields in ({}, {"messages": [user(7)]}, {"messages": [user("a")], "thread": {"a": 1}}):
            reply = await front.ask("POST", "/v1/messages/count_tokens", fields)
            assert error_of(reply, 400)[0] == "invalid_request_error"
        body = {"messages": [user("a")], "model": "gpt-5"}
        assert error_of(await front.ask("POST", "/v1/messages/count_tokens", body), 404)


async def test_a_client_that_leaves_frees_its_place() -> None:
    async with running_front(delay=0.002) as front:
        front.script.endless = True
        client = await front.connect()
        body = {"max_tokens": 900, "messages": [user("Hi")], "stream": True}
        await client.send("POST", "/v1/messages", body)
        await client.begin()
        await client.stream.aclose()
        with trio.fail_after(5):
            await front.idle()
        stats = front.state.engine.stats
        assert stats.free_slots == stats.num_slots
