"""Request ids and the line in the log: on every answer, and without a word of anyone's."""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from kttrio.config import ServerConfig
from kttrio.server.visits import Visit, request_id
from tests.http2_client import INFERENCE, http2_client, infer_request
from tests.http_front import Front, Reply, chat_body, running_front

ACCESS = "kttrio.access"
CANARY = "c4nary"
KEY = f"key-{CANARY}"
TOOL = {
    "type": "function",
    "function": {"name": CANARY, "parameters": {"type": "object", "properties": {CANARY: {}}}},
}


@pytest.fixture(autouse=True)
def _levels(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, str]]:
    """The access log, each line's words by name."""
    return [
        dict(word.split("=", 1) for word in record.getMessage().split(" "))
        for record in caplog.records
        if record.name == ACCESS
    ]


async def last_line(caplog: pytest.LogCaptureFixture, number: int = 1) -> dict[str, str]:
    """As soon as there are so many: a task may still be on its way out when its client has all."""
    while len(lines(caplog)) < number:
        await trio.lowlevel.checkpoint()
    return lines(caplog)[-1]


@pytest.mark.parametrize("given", ["mine-1", "a" * 128, "01JB/x:y=z+w@h.example"])
async def test_a_clients_id_comes_back(given: str) -> None:
    async with running_front() as front:
        reply = await front.ask("GET", "/v1/models", X_Request_Id=given)
        assert reply.headers["x-request-id"] == given


@pytest.mark.parametrize(
    "given", [{}, {"X_Request_Id": ""}, {"X_Request_Id": "a b"}, {"X_Request_Id": "a" * 129}]
)
async def test_another_is_made_where_there_is_none_or_a_strange_one(given: dict[str, str]) -> None:
    async with running_front() as front:
        ids = {
            (await front.ask("GET", "/v1/models", **given)).headers["x-request-id"] for _ in "12"
        }
        assert len(ids) == 2
        assert all(re.fullmatch(r"req-[0-9a-f]{32}", one) for one in ids)


async def test_every_answer_has_an_id(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ServerConfig(api_key=("k",))
    async with running_front(config=config) as front:
        chat, key = "/v1/chat/completions", {"X_Api_Key": "k", "X_Request_Id": "me"}
        for reply, status in (
            (await front.ask("POST", chat, chat_body(), **key), 200),
            (await front.ask("POST", chat, chat_body(stream=True), **key), 200),
            (await front.ask("POST", chat, b"{", **key), 400),
            (await front.ask("POST", chat, chat_body(), X_Request_Id="me"), 401),
            (await front.ask("GET", chat, **key), 405),
            (await front.ask("GET", "/nowhere", **key), 404),
            (await front.ask("HEAD", "/health", **key), 200),
            (await front.ask("POST", chat, chat_body(max_tokens=5000, stream=True), **key), 400),
        ):
            assert (reply.status, reply.headers["x-request-id"]) == (status, "me")
        monkeypatch.setattr("kttrio.server.openai.routes.prepare_chat", None)
        reply = await front.ask("POST", chat, chat_body(), **key)
        assert (reply.status, reply.headers["x-request-id"]) == (500, "me")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_line_tells_what_was_asked_and_what_came_of_it(
    stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async with running_front() as front:
        body = chat_body(stream=stream, max_tokens=5, n=2)
        path = "/v1/chat/completions"
        await front.ask("POST", f"{path}?api_key=secret", body, X_Request_Id="me")
        await front.idle()
        line = await last_line(caplog)
    assert float(line.pop("seconds")) > 0
    assert re.fullmatch(r"127\.0\.0\.1:\d+", line.pop("client"))
    assert int(line.pop("prompt_tokens")) > 0
    assert line == {
        "method": "POST",
        "path": path,
        "status": "200",
        "request": "me",
        "completion_tokens": "10",
        "finish": "length",
    }


async def test_a_client_that_leaves_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    async with running_front(delay=0.01) as front:
        front.script.endless = True
        for stream, status in ((False, "499"), (True, "200")):
            client = await front.connect()
            await client.send("POST", "/v1/chat/completions", chat_body(stream=stream))
            while not front.state.live:
                await trio.lowlevel.checkpoint()
            if stream:
                await client.begin()
            await client.stream.aclose()
            await front.idle()
            line = await last_line(caplog)
            assert (line["status"], line["finish"]) == (status, "abort")
            caplog.clear()


async def test_what_is_polled_is_for_debugging(caplog: pytest.LogCaptureFixture) -> None:
    async with running_front() as front:
        for path in ("/health", "/metrics", "/ping"):
            await front.ask("GET", path)
        await front.ask("GET", "/v1/models")
        await last_line(caplog)
        assert [line["path"] for line in lines(caplog)] == ["/v1/models"]


async def test_it_can_be_left_out(caplog: pytest.LogCaptureFixture) -> None:
    async with running_front(config=ServerConfig(access_log=False)) as front:
        await front.ask("GET", "/v1/models")
    assert lines(caplog) == []


async def test_a_path_forges_no_line(caplog: pytest.LogCaptureFixture) -> None:
    async with running_front() as front:
        for number, path in enumerate(("/a%0Amethod=GET%20status=200", "/" + "long" * 100)):
            assert (await front.ask("GET", path)).status == 404
            line = await last_line(caplog, number + 1)
            assert line["status"] == "404"
            assert len(line["path"]) <= 200


@given(path=st.text(), name=st.binary(max_size=200))
def test_a_line_is_one_line_of_as_many_words(path: str, name: bytes) -> None:
    """Whatever comes over HTTP/2, where a path may hold anything."""
    made = request_id({b"x-request-id": name})
    line = Visit(id=made, method="gRPC", path=path, client="c").line(0.1)
    assert line.isprintable()
    assert [word.partition("=")[0] for word in line.split(" ")] == [
        *("method", "path", "status", "seconds", "client", "request")
    ]


async def everything(front: Front) -> list[Reply]:
    """The canary in every field that is a client's, on every route, well and ill."""
    headers = {"X_Api_Key": KEY}
    said = chat_body(CANARY, tools=[TOOL], user=CANARY)
    replies = [
        await front.ask("POST", path, body, **headers)
        for path, body in (
            ("/v1/chat/completions", said),
            ("/v1/chat/completions", {**said, "stream": True, "stop": CANARY}),
            ("/v1/chat/completions", {**said, "temperature": CANARY}),
            ("/v1/chat/completions", {**said, "model": CANARY}),
            ("/v1/chat/completions", {**said, "tool_choice": CANARY}),
            ("/v1/chat/completions", {"messages": [{"role": CANARY, "content": CANARY}]}),
            ("/v1/chat/completions", {**said, "max_tokens": 10**6}),
            ("/v1/chat/completions", {**said, "response_format": {"type": CANARY}}),
            ("/v1/chat/completions", CANARY.encode()),
            ("/v1/completions", {"prompt": [CANARY] * 2, "echo": True}),
            ("/v1/completions", {"prompt": CANARY, "suffix": CANARY}),
            ("/tokenize", {"prompt": CANARY}),
            ("/abort_request", {"rid": CANARY}),
        )
    ]
    replies.append(
        await front.ask("GET", f"/v1/models?key={CANARY}", Authorization=f"Bearer {KEY}")
    )
    replies.append(await front.ask("GET", "/v1/models", Authorization=f"Bearer x{CANARY}"))
    replies.append(await front.ask("GET", "/v1/models", Cookie=CANARY, X_Api_Key=KEY))
    return replies


async def test_nothing_that_anyone_says_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    config = ServerConfig(api_key=(KEY,))
    async with running_front(config=config) as front:
        front.script.text = f"I heard {CANARY}."
        statuses = {reply.status for reply in await everything(front)}
    assert statuses >= {200, 400, 401, 404}
    assert len(lines(caplog)) >= 10
    assert CANARY not in caplog.text


def fail(*_: Any, **__: Any) -> None:
    raise ValueError(f"cannot make sense of {CANARY}") from KeyError(CANARY)


@pytest.mark.parametrize(
    "broken",
    [
        "kttrio.server.openai.routes.prepare_chat",
        "kttrio.text.output.OutputPipeline.push",
        "kttrio.server.sse.EventStream.run",
        "kttrio.server.prompting._encode_chat",
        "kttrio.text.output.OutputPipeline.finish",
    ],
)
async def test_nor_when_it_makes_us_fail(
    broken: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = ServerConfig(api_key=(KEY,))
    async with running_front(config=config) as front:
        client = await front.connect()
        with monkeypatch.context() as patched:
            patched.setattr(broken, fail)
            body = chat_body(CANARY, tools=[TOOL], stream=True)
            await client.send("POST", "/v1/chat/completions", body, X_Api_Key=KEY)
            while await client.stream.receive_some(4096) and "ValueError" not in caplog.text:
                pass
        await front.idle()
    assert "builtins.ValueError" in caplog.text
    assert "builtins.KeyError" in caplog.text
    assert "in fail" in caplog.text
    assert CANARY not in caplog.text.replace("{CANARY}", "").replace("(CANARY)", "")


async def test_calls_of_grpc_have_ids_lines_and_counts(caplog: pytest.LogCaptureFixture) -> None:
    config = ServerConfig(grpc_port=0, api_key=(KEY,))
    async with running_front(config=config) as front, http2_client(front) as client:
        front.script.text = f"I heard {CANARY}."
        request = infer_request(CANARY, request_id=CANARY, max_tokens=3).SerializeToString()
        key, name = ("x-api-key", KEY), ("x-request-id", "mine")
        answer = await client.call(f"{INFERENCE}/ModelInfer", request, key, name)
        assert (answer.status, answer.headers["x-request-id"]) == (0, "mine")
        refused = await client.call(f"{INFERENCE}/ModelInfer", request, name)
        assert (refused.status, refused.headers["x-request-id"]) == (16, "mine")
        unknown = await client.call("/A b\u00fc/Nothing", b"", key)
        assert unknown.headers["x-request-id"].startswith("req-")
        await client.call(f"{INFERENCE}/ServerLive", b"")
        route = f"{INFERENCE}/ModelInfer"
        assert set(front.state.meter.visits) == {
            ("gRPC", route, 0),
            ("gRPC", route, 16),
            ("gRPC", "none", 12),
            ("gRPC", f"{INFERENCE}/ServerLive", 0),
        }
        assert front.state.meter.connections == 1
    told, *others = lines(caplog)
    assert (told["path"], told["status"], told["request"]) == (route, "0", "mine")
    assert (told["completion_tokens"], told["finish"]) == ("3", "length")
    assert [line["status"] for line in others] == ["16", "12"]
    assert others[1]["path"] == "/A?b??/Nothing"
    assert CANARY not in caplog.text
