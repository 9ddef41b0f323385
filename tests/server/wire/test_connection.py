"""One client's socket: bytes are bounded, clients that do not read are cut."""

from __future__ import annotations

import errno
import socket

import pytest
import trio
import trio.testing

from kttrio.config import ServerConfig
from kttrio.server.wire import connection as connection_module
from kttrio.server.wire import http1
from kttrio.server.wire.connection import Connection
from tests.http_front import (
    Front,
    chat_body,
    raw_request,
    read_all,
    running_front,
)

STREAM = chat_body(stream=True)


async def test_a_client_that_reads_nothing_is_cut() -> None:
    config = ServerConfig(stream_write_timeout=0.2)
    async with running_front(config=config, context_length=65536) as front:
        front.script.endless = True
        client = await front.connect(receive_buffer=2048)
        await shrink_send_buffer(front)
        await client.send("POST", "/v1/chat/completions", STREAM)
        await client.stream.receive_some(100)
        await front.idle()
        assert front.state.engine.stats.generated_tokens > 10
        with pytest.raises(trio.BrokenResourceError):
            await read_all(client)


async def shrink_send_buffer(front: Front) -> None:
    """Let the kernel take little for a client, so that a test need not fill megabytes."""
    connection = await front.only_connection()
    connection._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)


async def test_a_slow_client_gets_every_byte_in_order() -> None:
    async with running_front(context_length=8192) as front:
        front.script.endless = True
        client = await front.connect(receive_buffer=2048)
        await client.send("POST", "/v1/chat/completions", chat_body(stream=True, max_tokens=1500))
        await shrink_send_buffer(front)
        reply = await client.receive()
        *chunks, end, done = reply.events()
        assert end["choices"][0]["finish_reason"] == "length"
        assert done == "[DONE]"
        text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
        ids = front.tokenizer.encode(front.script.text)
        expected = front.tokenizer.decode([ids[i % len(ids)] for i in range(1500)])
        assert text == expected


async def test_an_exception_in_a_connection_is_logged_and_ends_it_only(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with running_front() as front:
        with monkeypatch.context() as broken:
            broken.setattr(http1.Http1, "handle", None)
            client = await front.connect()
            await client.stream.send_all(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
            assert await client.is_closed()
        assert (await front.ask("GET", "/health")).status == 200
    assert "a connection failed" in caplog.text


async def test_who_is_gone_at_once_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_more(_: Connection) -> None:
        raise OSError(errno.ENOTCONN, "gone")

    async with running_front() as front:
        with monkeypatch.context() as leaving:
            leaving.setattr(Connection, "ends", property(no_more))
            assert await (await front.connect()).is_closed()
        assert (await front.ask("GET", "/health")).status == 200
    assert "failed" not in caplog.text


async def no_connections(front: Front) -> None:
    while front.connections.open:
        await trio.lowlevel.checkpoint()
    await trio.testing.wait_all_tasks_blocked()


async def test_clients_that_vanish_leave_nothing_behind() -> None:
    async with running_front(num_slots=64, delay=0.001) as front:
        front.script.endless = True
        assert (await front.ask("GET", "/health")).status == 200
        await no_connections(front)
        tasks_before = trio.lowlevel.current_statistics().tasks_living

        async def vanish(number: int) -> None:
            client = await front.connect()
            stream = number % 4 != 0
            await client.send("POST", "/v1/chat/completions", chat_body(stream=stream))
            if stream:
                await client.stream.receive_some(1000)
            if number % 2:
                linger = b"\1\0\0\0\0\0\0\0"  # reset instead of an orderly end
                client.stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            await client.stream.aclose()

        async with trio.open_nursery() as nursery:
            for number in range(200):
                nursery.start_soon(vanish, number)
        await front.idle()
        await no_connections(front)
        stats = front.state.engine.stats
        assert (stats.running, stats.waiting) == (0, 0)
        assert stats.free_pages == stats.num_pages
        assert stats.free_slots == stats.num_slots
        assert trio.lowlevel.current_statistics().tasks_living == tasks_before


async def test_a_client_with_too_much_unread_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "MAX_UNSENT", 10_000)
    async with running_front(context_length=65536) as front:
        front.script.endless = True
        client = await front.connect(receive_buffer=2048)
        await client.send("POST", "/v1/chat/completions", STREAM)
        await client.stream.receive_some(100)
        await front.idle()  # although the client is still connected
        assert front.state.engine.stats.generated_tokens > 10


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_beyond_that_limit_is_sent_whole(
    stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "MAX_UNSENT", 10_000)
    async with running_front(context_length=65536) as front:
        client = await front.connect(receive_buffer=2048)
        await shrink_send_buffer(front)
        prompt = "word " * 6000
        body = {"prompt": prompt, "echo": True, "max_tokens": 1, "stream": stream}
        reply = await client.ask("POST", "/v1/completions", body)
        answer = reply.events()[0] if stream else reply.json()
        assert answer["choices"][0]["text"].startswith(prompt)


async def test_one_client_too_many_is_told_and_let_go() -> None:
    async with running_front(config=ServerConfig(max_connections=2)) as front:
        kept = [await front.connect() for _ in range(2)]
        for client in kept:
            assert (await client.ask("GET", "/health")).status == 200
        refused = await (await front.connect()).receive()
        assert refused.status == 503
        assert refused.headers["retry-after"] == "1"
        assert b"as many connections as it takes" in refused.body
        await kept[0].stream.aclose()
        while len(front.connections.open) > 1:
            await trio.lowlevel.checkpoint()
        assert (await front.ask("GET", "/health")).status == 200


async def test_slow_clients_of_all_kinds_do_not_hold_up_others() -> None:
    async with running_front(num_slots=32, context_length=8192, delay=0.001) as front:
        front.script.endless = True
        for _ in range(4):
            deaf = await front.connect(receive_buffer=2048)
            await deaf.send("POST", "/v1/chat/completions", STREAM)
            loris = await front.connect()
            await loris.stream.send_all(b"POST /v1/completions HTTP/1.1\r\nHost:")
            half = await front.connect()
            await half.stream.send_all(raw_request(STREAM)[:-5])
        with trio.fail_after(5):
            for _ in range(5):
                reply = await front.chat(stream=True, max_tokens=20)
                assert reply.events()[-1] == "[DONE]"
