"""Operators end requests, and are told the truth about caches and settings."""

from __future__ import annotations

import json

import pytest
import trio
from openai.types.responses import Response

from kttrio.config import EngineConfig
from tests.http_front import ANSWER, MODEL, Client, Front, chat_body, running_front
from tests.server.responses_replay import read_named_events, replay

ABORT = "/abort_request"


async def begin(front: Front, path: str = "/v1/chat/completions", **fields: object) -> Client:
    """An endless request that runs."""
    num_live = len(front.state.live)
    client = await front.connect()
    await client.send("POST", path, chat_body(**fields), X_Request_Id=f"visit-{num_live}")
    while len(front.state.live) == num_live:
        await trio.lowlevel.checkpoint()
    return client


async def some_tokens(front: Front) -> None:
    count = front.state.engine.stats.generated_tokens
    while front.state.engine.stats.generated_tokens < count + 10:
        await trio.lowlevel.checkpoint()


@pytest.mark.parametrize("name", ["rid", "request_id", "visit"])
async def test_an_aborted_stream_ends_with_what_it_has(name: str) -> None:
    async with running_front(delay=0.001) as front:
        front.script.endless = True
        named = {} if name == "visit" else {name: "mine"}
        client, other = await begin(front, stream=True, n=2, **named), await begin(front)
        await some_tokens(front)
        rid = "visit-0" if name == "visit" else "mine"
        assert (await front.ask("POST", ABORT, {"rid": rid})).json() == {"aborted": 1}
        events = (await client.receive()).events()
        assert events[-1] == "[DONE]"
        ends = [choice["finish_reason"] for event in events[:-1] for choice in event["choices"]]
        assert [end for end in ends if end] == ["abort", "abort"]
        assert len(front.state.live) == 1
        await other.stream.aclose()
        await front.idle()
        assert front.state.meter.ends == {"abort": 3}


async def test_an_aborted_answer_is_known_by_its_own_id() -> None:
    async with running_front(delay=0.001) as front:
        front.script.endless = True
        client = await begin(front)
        await some_tokens(front)
        ((own, *_),) = [one.names for one in front.state.live]
        assert own.startswith("chatcmpl-")
        assert (await front.ask("POST", ABORT, {"rid": own})).json() == {"aborted": 1}
        reply = await client.receive()
        assert reply.json()["id"] == own
        (choice,) = reply.json()["choices"]
        assert choice["finish_reason"] == "abort"
        assert choice["message"]["content"].startswith(ANSWER[:5])
        assert reply.json()["usage"]["completion_tokens"] >= 10


@pytest.mark.parametrize("stream", [False, True])
async def test_anthropics_clients_learn_of_it_as_an_error(stream: bool) -> None:
    """There is no reason to stop that says so; and none tries again by itself."""
    async with running_front(delay=0.001) as front:
        front.script.endless = True
        client = await begin(front, "/v1/messages", max_tokens=900, stream=stream)
        await some_tokens(front)
        await front.ask("POST", ABORT, {"abort_all": True})
        reply = await client.receive()
        told = reply.body.decode().split("data: ")[-1] if stream else reply.body
        error = json.loads(told)
        assert (reply.status, error["type"]) == (200 if stream else 410, "error")
        assert "aborted this request" in error["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
async def test_an_aborted_response_is_cancelled(stream: bool) -> None:
    async with running_front(delay=0.001) as front:
        front.script.endless = True
        client = await begin(front, "/v1/responses", input="Hi", messages=None, stream=stream)
        await some_tokens(front)
        await front.ask("POST", ABORT, {"abort_all": True})
        reply = await client.receive()
        if stream:
            events = read_named_events(reply.body)
            assert events[-1]["type"] == "response.incomplete"
            response = replay(events)
        else:
            response = reply.json()
            Response.model_validate(response)
        assert (response["status"], response["incomplete_details"]) == ("cancelled", None)
        assert response["output"][0]["status"] == "incomplete"
        assert response["output"][0]["content"][0]["text"].startswith(ANSWER[:5])


@pytest.mark.parametrize("word", ["generate", "generate_stream"])
async def test_tritons_clients_are_told_the_reason(word: str) -> None:
    async with running_front(delay=0.001) as front:
        front.script.endless = True
        asked = {"text_input": "Hi", "max_tokens": 900, "return_finish_reason": True}
        asked["stream"] = word == "generate_stream"
        client = await begin(front, f"/v2/models/{MODEL}/{word}", messages=None, **asked)
        await some_tokens(front)
        await front.ask("POST", ABORT, {"abort_all": True})
        reply = await client.receive()
        last = json.loads(reply.body.decode().rstrip().split("data: ")[-1])
        assert (reply.status, last["finish_reason"]) == (200, "abort")


async def test_one_that_waits_is_aborted_without_a_token() -> None:
    async with running_front(engine_config=EngineConfig(max_running_requests=1), delay=0.001) as f:
        f.script.endless = True
        runs, waits = await begin(f), await begin(f)
        assert (await f.ask("POST", ABORT, {"rid": "visit-1"})).json() == {"aborted": 1}
        reply = (await waits.receive()).json()
        assert reply["usage"]["completion_tokens"] == 0
        assert reply["choices"][0]["finish_reason"] == "abort"
        assert f.state.engine.stats.running == 1
        await runs.stream.aclose()
        await f.idle()


async def test_all_are_aborted_at_once() -> None:
    async with running_front(delay=0.001) as front:
        front.script.endless = True
        clients = [await begin(front) for _ in range(5)]
        assert (await front.ask("POST", ABORT, {"abort_all": True})).json() == {"aborted": 5}
        for client in clients:
            assert (await client.receive()).status == 200
        await front.idle()
        assert front.state.engine.stats.free_slots == 8


async def test_who_is_not_there_is_no_error_but_nobody_is() -> None:
    async with running_front() as front:
        assert (await front.ask("POST", ABORT, {"rid": "gone"})).json() == {"aborted": 0}
        for body in ({}, {"abort_all": False}, {"rid": ""}, {"rid": 7}, {"abort_all": "yes"}):
            assert (await front.ask("POST", ABORT, body)).status == 400


async def test_what_was_held_back_comes_out() -> None:
    """It might have become a stop string, had it gone on."""
    async with running_front(delay=0.001) as front:
        front.script.text, front.script.endless = "a", True
        client = await begin(front, stop="a" * 900 + "b")
        await some_tokens(front)
        await front.ask("POST", ABORT, {"abort_all": True})
        reply = (await client.receive()).json()
        text, usage = reply["choices"][0]["message"]["content"], reply["usage"]
        assert text == "a" * usage["completion_tokens"]
        assert len(text) >= 10


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_flushing_tells_that_nothing_is_kept(method: str) -> None:
    async with running_front() as front:
        reply = (await front.ask(method, "/flush_cache")).json()
        assert reply["success"] is True
        assert "No prefixes are kept" in reply["message"]


async def test_settings_and_version() -> None:
    async with running_front() as front:
        front.state.settings = {"isa": "avx2"}
        front.state.count = lambda: {"expert_swaps": 3}
        info = (await front.ask("GET", "/server_info")).json()
        assert info["isa"] == "avx2"
        assert info["expert_swaps"] == 3
        assert info["version"] == (await front.ask("GET", "/version")).json()["version"]
