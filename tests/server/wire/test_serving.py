"""Listening, and ending in good order."""

from __future__ import annotations

from math import inf

import pytest
import trio

from kttrio.config import ConfigError, ServerConfig
from kttrio.server.wire import serving
from tests.http_front import ANSWER, chat_body, raw_request, running_front

STREAM = chat_body(stream=True)


async def test_a_taken_port_is_a_config_error_that_names_it() -> None:
    ((taken,),) = await serving.open_ports(ServerConfig(port=0))
    async with taken:
        port = taken.socket.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--port {port}"):
            await serving.open_ports(ServerConfig(port=port))
        with pytest.raises(ConfigError, match=f"--grpc-port {port}"):
            await serving.check_listening(ServerConfig(port=0, grpc_port=port))
    with pytest.raises(ConfigError, match="--host 203"):
        await serving.open_ports(ServerConfig(host="203.0.113.1", port=0))


async def test_shutdown_lets_streams_finish_and_closes_idle_connections() -> None:
    async with running_front(delay=0.005) as front:
        idle, streaming, whole = [await front.connect() for _ in range(3)]
        assert (await idle.ask("GET", "/health")).status == 200
        await streaming.send("POST", "/v1/chat/completions", STREAM)
        await streaming.begin()
        await whole.send("POST", "/v1/chat/completions", chat_body())
        while front.state.engine.stats.running < 2:
            await trio.lowlevel.checkpoint()
        front.state.begin_drain()
        front.shutdown.set()
        assert await idle.is_closed()
        with pytest.raises(OSError, match="refused"):
            await front.connect()
        assert (await streaming.receive()).events()[-1] == "[DONE]"
        assert await streaming.is_closed()
        reply = await whole.receive()
        assert reply.json()["choices"][0]["message"]["content"] == ANSWER
        await front.closed.wait()


async def test_a_request_that_is_not_all_there_does_not_delay_the_end() -> None:
    async with running_front() as front:
        half, late = [await front.connect() for _ in range(2)]
        request = raw_request(STREAM)
        for client in (half, late):
            await client.stream.send_all(request[:-5])
        while sum(one.reading.deadline == inf for one in front.connections.open) < 2:
            await trio.lowlevel.checkpoint()
        front.state.begin_drain()
        front.shutdown.set()
        await late.stream.send_all(request[-5:])
        assert (await late.receive()).status == 503
        with trio.fail_after(serving.CLOSE_SECONDS - 1):
            assert await half.is_closed()
            await front.closed.wait()


async def test_requests_during_the_drain_are_refused() -> None:
    async with running_front() as front:
        client = await front.connect()
        assert (await client.ask("GET", "/health")).status == 200
        front.state.begin_drain()
        reply = await client.ask("POST", "/v1/chat/completions", STREAM)
        assert reply.status == 503
        assert "shuts down" in reply.error()["message"]
        assert reply.headers["retry-after"]
        health = await client.ask("GET", "/health")
        assert health.status == 503
        assert "shutting down" in health.json()["reason"]


async def test_what_outlasts_the_drain_ends_with_an_error() -> None:
    async with running_front(delay=0.005) as front:
        front.script.endless = True
        streaming, whole = [await front.connect() for _ in range(2)]
        await streaming.send("POST", "/v1/chat/completions", STREAM)
        await streaming.begin()
        await whole.send("POST", "/v1/chat/completions", chat_body())
        while len(front.state.live) < 2:
            await trio.lowlevel.checkpoint()
        front.state.begin_drain()
        front.shutdown.set()
        front.state.finish_streams("The server is shutting down.")
        *_, error = (await streaming.receive()).events()
        assert error["error"]["code"] == "shutting_down"
        assert error["error"]["type"] == "service_unavailable_error"
        assert (await whole.receive()).status == 503
        await front.closed.wait()
        await front.idle()


async def test_the_last_resort_is_to_cancel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "CLOSE_SECONDS", 0.0)
    async with running_front(config=ServerConfig(drain_seconds=0.1), delay=0.005) as front:
        front.script.endless = True
        client = await front.connect()
        await client.send("POST", "/v1/chat/completions", STREAM)
        await client.begin()
        front.shutdown.set()
        await front.closed.wait()
        await front.idle()


async def test_a_silent_stream_carries_comments() -> None:
    config = ServerConfig(stream_keepalive_seconds=0.05)
    async with running_front(config=config, delay=0.4) as front:
        reply = await front.chat(stream=True, max_tokens=2)
        events = reply.events()
        assert events[0] == ": keep-alive"
        assert 4 <= events.count(": keep-alive") <= 20
        assert events[-1] == "[DONE]"


async def test_a_stream_that_speaks_carries_no_comment() -> None:
    config = ServerConfig(stream_keepalive_seconds=5)
    async with running_front(config=config, delay=0.005) as front:
        assert ": keep-alive" not in (await front.chat(stream=True)).events()
