"""/v1/responses over HTTP: whole and streamed answers, their ends, and what is not stored."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from openai.types.responses import Response

from kttrio.config import EngineConfig, ServerConfig
from tests.http_front import ANSWER, MODEL, Front, Reply, running_front
from tests.server.responses_replay import read_named_events, replay, without_ids
from tests.server.test_family_chats import OPENED_BY_PROMPT
from tests.server.test_server_images import front_that_sees, plain
from tests.text.family_calls import FAMILY_CALLS
from tests.tokenizers_fake import make_family_tokenizer

PATH = "/v1/responses"
THINKS = ServerConfig(reasoning_parser="qwen3")
WEATHER = {
    "type": "function",
    "name": "get_weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
CALL = (
    "<tool_call>\n<function=get_weather>\n<parameter=city>\n{}\n</parameter>\n</function>\n"
    "</tool_call>"
)


async def ask(front: Front, **fields: Any) -> Reply:
    return await front.ask("POST", PATH, {"input": "Hi", **fields})


async def both(front: Front, **fields: Any) -> dict[str, Any]:
    """The response, the same whole and streamed, and as OpenAI's client reads it."""
    whole = await ask(front, **fields)
    assert whole.status == 200, whole.body
    Response.model_validate(whole.json())
    streamed = replay(read_named_events((await ask(front, **fields, stream=True)).body))
    assert without_ids(streamed) == without_ids(whole.json())
    response: dict[str, Any] = whole.json()
    return response


async def test_a_response_has_every_field() -> None:
    async with running_front() as front:
        response = await both(front, instructions="Be brief.")
        assert response["id"].startswith("resp_")
        assert (response["object"], response["status"]) == ("response", "completed")
        assert (response["model"], response["instructions"]) == (MODEL, "Be brief.")
        assert (response["temperature"], response["top_p"]) == (0.7, 1.0)
        (item,) = response["output"]
        assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "completed")
        assert item["content"] == [
            {"type": "output_text", "text": ANSWER, "annotations": [], "logprobs": []}
        ]
        num_tokens = len(front.tokenizer.encode(ANSWER)) + 1
        usage = response["usage"]
        assert usage["output_tokens"] == num_tokens
        assert usage["total_tokens"] == usage["input_tokens"] + num_tokens
        assert usage["input_tokens_details"] == {"cached_tokens": 0, "cache_write_tokens": 0}
        assert usage["output_tokens_details"] == {"reasoning_tokens": 0}


async def test_a_streams_head() -> None:
    async with running_front() as front:
        reply = await ask(front, stream=True)
        assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert b"[DONE]" not in reply.body


async def test_reasoning_is_an_item_of_its_own() -> None:
    async with running_front(config=THINKS) as front:
        front.script.text = "<think>\nTwo and two.\n</think>\n\nFour."
        thought, said = (await both(front))["output"]
        assert thought["content"] == [{"type": "reasoning_text", "text": "Two and two."}]
        assert thought["summary"] == []
        assert said["content"][0]["text"] == "Four."
        usage = (await both(front))["usage"]
        assert usage["output_tokens_details"]["reasoning_tokens"] > 0


async def test_reasoning_takes_the_place_of_a_summary_that_is_asked_for() -> None:
    async with running_front(config=THINKS) as front:
        front.script.text = "<think>\nTwo and two.\n</think>\n\nFour."
        thought, _ = (await both(front, reasoning={"summary": "auto"}))["output"]
        assert thought["summary"] == [{"type": "summary_text", "text": "Two and two."}]
        assert "content" not in thought


async def test_calls_and_text_are_items_in_order() -> None:
    async with running_front() as front:
        front.script.text = f"First.\n{CALL.format('Paris')}\n{CALL.format('Rome')}"
        text, paris, rome = (await both(front, tools=[WEATHER]))["output"]
        assert text["content"][0]["text"].strip() == "First."
        assert (paris["type"], paris["name"]) == ("function_call", "get_weather")
        assert paris["arguments"] == '{"city": "Paris"}'
        assert paris["call_id"].startswith("call_")
        assert paris["call_id"] != rome["call_id"]
        assert rome["arguments"] == '{"city": "Rome"}'


async def test_only_one_call_without_parallel_ones() -> None:
    async with running_front() as front:
        front.script.text = CALL.format("Paris") + CALL.format("Rome")
        (call,) = (await both(front, tools=[WEATHER], parallel_tool_calls=False))["output"]
        assert call["arguments"] == '{"city": "Paris"}'


@pytest.mark.parametrize("family", FAMILY_CALLS)
async def test_every_familys_answers_are_items(family: str) -> None:
    checkpoint = partial(make_family_tokenizer, family=family)
    tool = {"type": "function", "name": "f", "parameters": {"type": "object"}}
    async with running_front(write_checkpoint=checkpoint, context_length=4096) as front:
        opening = "" if family in OPENED_BY_PROMPT else "<think>"
        front.script.text = f"{opening}Well.\n</think>\n\nI look." + FAMILY_CALLS[family][2]
        response = await both(front, tools=[tool], chat_template_kwargs={"thinking": True})
        assert [item["type"] for item in response["output"]] == [
            "reasoning",
            "message",
            "function_call",
        ]


async def test_an_answer_cut_off_is_incomplete() -> None:
    async with running_front() as front:
        front.script.text = CALL.format("Paris")
        cut = len(front.tokenizer.encode(CALL.split("}")[0].removesuffix("{"))) + 1
        response = await both(front, tools=[WEATHER], max_output_tokens=cut)
        assert response["status"] == "incomplete"
        assert response["incomplete_details"] == {"reason": "max_output_tokens"}
        (call,) = response["output"]
        assert call["status"] == "incomplete"
        assert call["arguments"].startswith('{"city": "')
        assert not call["arguments"].endswith("}")


async def test_a_call_that_a_stop_string_cut_off_is_incomplete() -> None:
    """Whoever runs calls must not take its half for the whole."""
    async with running_front() as front:
        front.script.text = CALL.format("Paris and Rome")
        response = await both(front, tools=[WEATHER], stop="and")
        assert response["status"] == "completed"
        (call,) = response["output"]
        assert (call["status"], call["arguments"]) == ("incomplete", '{"city": "Paris ')


async def test_log_probabilities_come_with_their_text() -> None:
    async with running_front() as front:
        response = await both(front, include=["message.output_text.logprobs"], top_logprobs=2)
        (part,) = response["output"][0]["content"]
        assert "".join(score["token"] for score in part["logprobs"]) == ANSWER
        assert {len(score["top_logprobs"]) for score in part["logprobs"]} == {2}


async def test_input_tokens_are_those_of_the_answer() -> None:
    async with running_front(context_length=64) as front:
        body = {"input": "Hi", "instructions": "Be brief."}
        counted = (await front.ask("POST", f"{PATH}/input_tokens", body)).json()
        used = (await front.ask("POST", PATH, body)).json()["usage"]
        assert counted == {
            "object": "response.input_tokens",
            "input_tokens": used["input_tokens"],
        }
        beyond = await front.ask("POST", f"{PATH}/input_tokens", {"input": "word " * 100})
        assert beyond.json()["input_tokens"] > 64


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/input_items")],
)
async def test_no_response_is_stored(method: str, path: str) -> None:
    async with running_front() as front:
        stored = (await ask(front, store=True)).json()
        assert stored["store"] is False
        reply = await front.ask(method, f"{PATH}/{stored['id']}{path}")
        assert reply.status == 404
        assert "stores none" in reply.error()["message"]


@pytest.mark.parametrize("stream", [False, True])
async def test_what_is_nested_deeply_is_told_back_or_refused(stream: bool) -> None:
    async with running_front() as front:
        front.script.text = "Hi"
        statuses = []
        for depth in range(900, 1000, 4):
            nested = '{"a":' * depth + "1" + "}" * depth
            fields = f'"input":"Hi","stream":{"true" if stream else "false"},"user":{nested}'
            reply = await front.ask("POST", PATH, f"{{{fields}}}".encode())
            statuses.append(reply.status)
        assert set(statuses) == {200, 400}
        assert statuses == sorted(statuses)


@pytest.mark.parametrize("stream", [False, True])
async def test_refusals_are_real_http_errors(stream: bool) -> None:
    engine = EngineConfig(max_running_requests=1, max_queued_requests=0)
    async with running_front(engine_config=engine, context_length=64, delay=0.002) as front:
        assert (await ask(front, n=2, stream=stream)).error()["param"] == "n"
        long = await ask(front, input="word " * 100, stream=stream)
        assert long.error()["code"] == "context_length_exceeded"
        front.script.endless = True
        client = await front.connect()
        await client.send("POST", PATH, {"input": "Hi", "stream": True})
        await client.begin()
        reply = await ask(front, stream=stream)
        assert (reply.status, reply.error()["type"]) == (429, "rate_limit_error")
        await client.stream.aclose()
        await front.idle()


async def test_what_the_template_refuses_is_blamed_on_the_input() -> None:
    checkpoint = partial(make_family_tokenizer, family="deepseek_v32")
    result = {"type": "function_call_output", "call_id": "x", "output": "5"}
    async with running_front(write_checkpoint=checkpoint) as front:
        for path in (PATH, f"{PATH}/input_tokens"):
            reply = await front.ask("POST", path, {"input": [result]})
            assert (reply.status, reply.error()["param"]) == (400, "input")


async def test_an_image_that_a_tool_gave_back_is_what_a_chat_would_show() -> None:
    picture = {"type": "input_image", "image_url": plain()}
    async with front_that_sees() as front:
        told = {"type": "input_text", "text": "Look: "}
        items = [
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": [told, picture]},
            {"role": "user", "content": "What is it?"},
        ]
        assert (await ask(front, input=items)).status == 200
        (image,) = front.runner.history[0].chunks[0].images
        assert (image.rows, image.columns) == (2, 3)
    async with running_front() as front:
        reply = await ask(front, input=[{"role": "user", "content": [picture]}])
        assert reply.error()["param"] == "input[0].content[0].image_url"


async def test_a_failing_engine_ends_the_stream_with_the_reason() -> None:
    async with running_front(fail_steps=(4,)) as front:
        events = read_named_events((await ask(front, stream=True)).body)
        response = replay(events)
        assert response["status"] == "failed"
        assert events[-2]["type"] == "error"
        assert response["error"]["message"] == events[-2]["message"]
        assert response["output"][0]["status"] == "incomplete"


async def test_a_client_that_leaves_stops_the_engine() -> None:
    async with running_front(delay=0.002) as front:
        front.script.endless = True
        client = await front.connect()
        await client.send("POST", PATH, {"input": "Hi", "stream": True})
        await client.begin()
        assert front.state.engine.stats.running == 1
        await client.stream.aclose()
        await front.idle()
