"""The measured traps of HTTP/1.1, each with real sockets."""

from __future__ import annotations

from contextlib import suppress

import pytest
import trio
import trio.testing

from kttrio.config import ServerConfig
from tests.http_front import (
    ANSWER,
    Client,
    chat_body,
    raw_request,
    read_all,
    running_front,
)

STREAM = chat_body(stream=True)


async def test_a_stream_with_connection_close_is_closed() -> None:
    async with running_front() as front:
        client = await front.connect()
        await client.stream.send_all(raw_request(STREAM, "Connection: close"))
        received = await read_all(client)
        assert received.lower().count(b"connection: close") == 1
        assert received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


async def test_a_stream_over_http_1_0_is_plain_and_closed() -> None:
    async with running_front() as front:
        client = await front.connect()
        await client.stream.send_all(raw_request(STREAM, version="1.0"))
        head, _, body = (await read_all(client)).partition(b"\r\n\r\n")
        assert b"transfer-encoding" not in head.lower()
        assert body.startswith(b'data: {"id"')
        assert body.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_a_whole_answer_with_connection_close_is_closed(version: str) -> None:
    async with running_front() as front:
        client = await front.connect()
        await client.stream.send_all(raw_request(chat_body(), "Connection: close", version=version))
        received = await read_all(client)
        assert received.startswith(b"HTTP/1.1 200")
        assert ANSWER.encode() in received


async def test_a_kept_connection_serves_streams_and_whole_answers_in_turn() -> None:
    async with running_front() as front:
        client = await front.connect()
        for _ in range(3):
            stream = await client.ask("POST", "/v1/chat/completions", STREAM)
            assert stream.events()[-1] == "[DONE]"
            whole = await client.ask("POST", "/v1/chat/completions", chat_body())
            assert whole.json()["choices"][0]["message"]["content"] == ANSWER


async def test_pipelined_requests_are_answered_in_order() -> None:
    async with running_front() as front:
        client = await front.connect()
        first = raw_request(chat_body(max_tokens=1))
        second = raw_request(chat_body(max_tokens=2), "Connection: close")
        await client.stream.send_all(first + second)
        received = await read_all(client)
        assert received.count(b"HTTP/1.1 200") == 2
        assert received.index(b'"completion_tokens": 1') < received.index(b'"completion_tokens": 2')


async def test_a_stream_with_a_pipelined_request_behind_it_notices_that_its_client_left() -> None:
    async with running_front(delay=0.001) as front:
        front.script.endless = True
        client = await front.connect()
        await client.stream.send_all(raw_request(STREAM) + raw_request(STREAM))
        await client.stream.receive_some(100)
        await client.stream.aclose()
        await front.idle()


async def test_an_idle_connection_is_closed() -> None:
    async with running_front(config=ServerConfig(idle_timeout=0.05)) as front:
        client = await front.connect()
        assert (await client.ask("GET", "/health")).status == 200
        assert await client.is_closed()
        assert await (await front.connect()).is_closed()


async def test_a_running_request_is_not_idle() -> None:
    async with running_front(config=ServerConfig(idle_timeout=0.02), delay=0.01) as front:
        reply = await front.chat()
        assert reply.json()["choices"][0]["message"]["content"] == ANSWER


async def test_an_unread_body_does_not_poison_the_connection() -> None:
    async with running_front() as front:
        client = await front.connect()
        for _ in range(3):
            reply = await client.ask("POST", "/nowhere", {"some": "body"})
            assert reply.status == 404
        assert (await client.ask("GET", "/health")).status == 200


async def test_a_body_that_is_still_under_way_closes_the_connection() -> None:
    async with running_front() as front:
        client = await front.connect()
        head = b"POST /nowhere HTTP/1.1\r\nHost: test\r\nContent-Length: 100000\r\n\r\n{"
        await client.stream.send_all(head)
        received = b""
        while b"\r\n\r\n" not in received:
            received += await client.stream.receive_some(65536)
        await client.stream.send_all(b"GET /health HTTP/1.1\r\nHost: test\r\n\r\n")
        received += await read_all(client)
        assert received.startswith(b"HTTP/1.1 404")
        assert b"connection: close" in received.lower()
        assert received.count(b"HTTP/1.1") == 1


@pytest.mark.parametrize("framing", ["length", "chunks"])
async def test_a_body_that_is_too_large_is_refused_with_the_limit(framing: str) -> None:
    async with running_front(config=ServerConfig(max_body_bytes=2048)) as front:
        client = await front.connect()
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: test\r\n"
        data = b" " * 100_000
        if framing == "length":
            wire = head + b"Content-Length: 200000\r\n\r\n" + data
        else:
            wire = head + b"Transfer-Encoding: chunked\r\n\r\n186a0\r\n" + data
        await client.stream.send_all(wire)
        received = await read_all(client)
        assert received.startswith(b"HTTP/1.1 413")
        assert b"2048 bytes" in received


async def test_a_body_shorter_than_it_says_times_out() -> None:
    async with running_front(config=ServerConfig(body_timeout=0.1)) as front:
        client = await front.connect()
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: test\r\nContent-Length: 50\r\n\r\n{"
        await client.stream.send_all(head)
        received = await read_all(client)
        assert received.startswith(b"HTTP/1.1 408")
        assert b"connection: close" in received.lower()


async def test_bytes_beyond_the_content_length_are_the_next_request() -> None:
    async with running_front() as front:
        client = await front.connect()
        await client.stream.send_all(raw_request(chat_body()) + b"garbage\r\n\r\n")
        received = await read_all(client)
        assert received.startswith(b"HTTP/1.1 200")
        assert b"HTTP/1.1 400" in received


async def test_offers_of_http_2_are_answered_in_http_1_1() -> None:
    async with running_front() as front:
        client = await front.connect()
        upgrade = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk"
        request = f"GET /health HTTP/1.1\r\nHost: test\r\n{upgrade}\r\n\r\n".encode()
        for _ in range(2):
            await client.stream.send_all(request)
            reply = await client.stream.receive_some(65536)
            assert reply.startswith(b"HTTP/1.1 200")


async def test_http_2_with_prior_knowledge_is_refused() -> None:
    async with running_front() as front:
        client = await front.connect()
        await client.stream.send_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9))
        assert (await read_all(client)).startswith(b"HTTP/1.1 505")


async def test_a_websocket_is_no_websocket_here() -> None:
    async with running_front() as front:
        client = await front.connect()
        key = "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAA"
        head = f"GET /v1/models HTTP/1.1\r\nHost: test\r\nConnection: Upgrade\r\n{key}\r\n\r\n"
        await client.stream.send_all(head.encode())
        assert (await client.stream.receive_some(65536)).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "wire",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET  /  HTTP/1.1\r\nHost: a\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /" + b"a" * 70000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET ? HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET http://[/health HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /%ff%fe HTTP/1.1\r\nHost: a\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n",
    ],
)
async def test_malformed_requests_end_their_connection_only(
    wire: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with running_front() as front:
        client = await front.connect()
        await client.stream.send_all(wire)
        await client.stream.send_eof()
        received = await read_all(client)
        assert not received or 400 <= int(received[9:12]) < 600 or b"OPTIONS" in wire
        assert (await front.ask("GET", "/health")).status == 200
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize(
    ("version", "fields"),
    [
        ("1.1", "Content-Length: 4\r\nTransfer-Encoding: chunked"),
        ("1.1", "Transfer-Encoding: chunked\r\nContent-Length: 0"),
        ("1.0", "Transfer-Encoding: chunked"),
    ],
)
async def test_a_body_with_two_ends_smuggles_nothing(version: str, fields: str) -> None:
    async with running_front() as front:
        client = await front.connect()
        head = f"POST /tokenize HTTP/{version}\r\nHost: a\r\n{fields}\r\n\r\n0\r\n\r\n"
        await client.stream.send_all(head.encode() + b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
        received = await read_all(client)
        assert received.startswith(b"HTTP/1.1 400")
        assert received.count(b"HTTP/1.1") == 1


async def test_quarts_own_timeout_does_not_apply() -> None:
    async with running_front() as front:
        assert front.app.config["RESPONSE_TIMEOUT"] is None


async def test_a_head_that_does_not_end_is_answered_408() -> None:
    async with running_front(config=ServerConfig(header_timeout=0.1)) as front:
        client = await front.connect()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(drip, client, b"GET /health HTTP/1.1\r\nHost: test\r\nX: ")
            received = await read_all(client)
            nursery.cancel_scope.cancel()
        assert received.startswith(b"HTTP/1.1 408")
        assert b"connection: close" in received.lower()


async def drip(client: Client, head: bytes) -> None:
    """A loris: it never stops, and never ends."""
    with suppress(trio.BrokenResourceError):
        for _ in range(10_000):
            for byte in (head, b"a"):
                await client.stream.send_all(byte)
                await trio.sleep(0.01)
            head = b"a"


async def test_a_head_may_come_in_pieces() -> None:
    async with running_front() as front:
        client = await front.connect()
        for byte in b"GET /health HTTP/1.1\r\nHost: test\r\n\r\n":
            await client.stream.send_all(bytes([byte]))
            await trio.lowlevel.checkpoint()
        assert (await client.stream.receive_some(65536)).startswith(b"HTTP/1.1 200")


async def test_the_next_head_has_its_own_time() -> None:
    async with running_front(config=ServerConfig(header_timeout=0.15), delay=0.01) as front:
        client = await front.connect()
        for _ in range(2):
            await trio.sleep(0.1)
            reply = await client.ask("POST", "/v1/chat/completions", chat_body())
            assert reply.json()["choices"][0]["message"]["content"] == ANSWER
