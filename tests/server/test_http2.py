"""HTTP/2 with a client that plays by the rules, and with those that do not."""

from __future__ import annotations

import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from random import Random
from typing import Any

import h2.settings
import hpack
import pytest
import trio
from hyperframe.frame import (
    DataFrame,
    HeadersFrame,
    PingFrame,
    PriorityFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

from kttrio.config import ServerConfig
from kttrio.server import connection, http2, http2_stream
from kttrio.server.http2_frames import IDLE_FRAMES, PREFACE
from kttrio.server.http2_stream import Code
from tests.http2_client import INFERENCE, Http2Client, http2_client, infer_request
from tests.http_front import ANSWER, Front, running_front

LIVE = f"{INFERENCE}/ServerLive"
STREAM = f"{INFERENCE}/ModelStreamInfer"
WATCH = "/grpc.health.v1.Health/Watch"


@asynccontextmanager
async def grpc_front(**config: Any) -> AsyncIterator[Front]:
    front_settings = {
        name: config.pop(name)
        for name in ("delay", "num_slots", "context_length")
        if name in config
    }
    async with running_front(config=ServerConfig(grpc_port=0, **config), **front_settings) as front:
        yield front


async def endless(client: Http2Client) -> int:
    """A stream that the server goes on writing to."""
    number = await client.open(STREAM)
    request = infer_request(stream=True, max_tokens=50_000)
    await client.send_message(number, request.SerializeToString(), end=False)
    return number


async def until(client: Http2Client, number: int, num_bytes: int) -> None:
    while len(client.answers[number].body) < num_bytes:
        assert await client.read()


async def test_calls_follow_each_other_and_run_side_by_side() -> None:
    async with grpc_front() as front, http2_client(front) as client:
        for _ in range(3):
            assert (await client.call(LIVE, b"")).status == 0
        numbers = [await client.open(LIVE) for _ in range(20)]
        for number in numbers:
            await client.send_message(number, b"")
        assert [(await client.answer(number)).status for number in numbers] == [0] * 20


async def test_a_body_in_many_pieces_is_read_as_one() -> None:
    async with grpc_front() as front, http2_client(front) as client:
        request = infer_request("word " * 100, max_tokens=1, exclude_input_in_output=True)
        message = request.SerializeToString()
        number = await client.open(f"{INFERENCE}/ModelInfer")
        await client.send(number, struct.pack(">BI", 0, len(message)))
        for i in range(0, len(message), 7):
            await client.send(number, message[i : i + 7], end=i + 7 >= len(message))
        assert (await client.answer(number)).status == 0


async def test_one_stream_that_is_not_read_does_not_hold_up_another() -> None:
    async with (
        grpc_front(context_length=65536, delay=0.0001) as front,
        http2_client(front, acknowledges=False) as client,
    ):
        front.script.endless = True
        # What fits into the windows of a stream is all that comes; the connection's has room.
        client.engine.increment_flow_control_window(1 << 24)
        await client.flush()
        stuck = await endless(client)
        await until(client, stuck, 65535)
        assert (await client.call(LIVE, b"")).status == 0


async def test_a_stream_that_is_not_read_is_reset() -> None:
    async with (
        grpc_front(context_length=65536, stream_write_timeout=0.2) as front,
        http2_client(front, acknowledges=False) as client,
    ):
        front.script.endless = True
        number = await endless(client)
        answer = await client.answer(number)
        assert answer.reset == Code.CANCEL
        await front.idle()
        assert (await client.call(LIVE, b"")).headers[":status"] == "200"


async def test_a_stream_with_too_much_unread_is_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http2_stream, "MAX_STREAM_UNSENT", 10_000)
    async with (
        grpc_front(context_length=65536) as front,
        http2_client(front, acknowledges=False) as client,
    ):
        front.script.endless = True
        answer = await client.answer(await endless(client))
        assert answer.reset == Code.ENHANCE_YOUR_CALM
        await front.idle()


async def test_a_connection_with_too_much_unread_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "MAX_UNSENT", 20_000)
    async with (
        grpc_front(context_length=65536) as front,
        http2_client(front, acknowledges=False) as client,
    ):
        front.script.endless = True
        for _ in range(4):
            await endless(client)
        await client.closed()
        await front.idle()


async def test_a_client_that_reads_nothing_from_its_socket_is_cut() -> None:
    async with (
        grpc_front(context_length=65536, stream_write_timeout=0.2) as front,
        http2_client(front, receive_buffer=2048) as client,
    ):
        front.script.endless = True
        client.engine.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 2**31 - 1})
        client.engine.increment_flow_control_window(2**30)
        await endless(client)
        server_side = await front.only_connection()
        server_side._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        while not front.state.live:
            await trio.lowlevel.checkpoint()
        await front.idle()
        assert front.state.engine.stats.generated_tokens > 10


async def test_a_slow_reader_gets_every_byte_in_order() -> None:
    async with (
        grpc_front(context_length=8192) as front,
        http2_client(front, receive_buffer=2048) as client,
    ):
        front.script.endless = True
        request = infer_request(stream=True, max_tokens=1500)
        number = await client.open(STREAM)
        await client.send_message(number, request.SerializeToString())
        answer = await client.answer(number)
        assert answer.status == 0
        replies = answer.messages("ModelStreamInferResponse")
        text = b"".join(reply.infer_response.raw_output_contents[0][4:] for reply in replies)
        ids = front.tokenizer.encode(front.script.text)
        assert text.decode() == front.tokenizer.decode([ids[i % len(ids)] for i in range(1500)])


@pytest.mark.parametrize("how", ["reset", "leave"])
async def test_a_client_that_goes_away_ends_its_request(how: str) -> None:
    async with grpc_front(context_length=65536, delay=0.001) as front:
        front.script.endless = True
        async with http2_client(front) as client:
            number = await endless(client)
            await until(client, number, 100)
            if how == "reset":
                client.engine.reset_stream(number)
                await client.flush()
                await front.idle()
                assert (await client.call(LIVE, b"")).status == 0
        await front.idle()
        stats = front.state.engine.stats
        assert stats.free_pages == stats.num_pages


async def test_rapid_resets_close_the_connection() -> None:
    async with grpc_front() as front:
        async with http2_client(front) as client:
            for _ in range(IDLE_FRAMES + 200):
                number = client.begin(LIVE)
                client.engine.reset_stream(number)
            await client.flush()
            assert await client.closed() == Code.ENHANCE_YOUR_CALM
        await front.idle()
        async with http2_client(front) as other:
            assert (await other.call(LIVE, b"")).status == 0


@pytest.mark.parametrize("flood", ["ping", "settings", "empty data", "window"])
async def test_floods_of_frames_close_the_connection(flood: str) -> None:
    async with grpc_front() as front, http2_client(front) as client:
        number = await client.open(LIVE)
        frames = {
            "ping": b"\0\0\x08\x06\0\0\0\0\0" + bytes(8),
            "settings": b"\0\0\0\x04\0\0\0\0\0",
            "empty data": b"\0\0\0\0\0" + struct.pack(">I", number),
            "window": b"\0\0\x04\x08\0\0\0\0\0" + struct.pack(">I", 1),
        }
        with trio.move_on_after(5):
            await client.stream.send_all(frames[flood] * (IDLE_FRAMES + 500))
        assert await client.closed() in (Code.ENHANCE_YOUR_CALM, None)
        await front.idle()
        async with http2_client(front) as other:
            assert (await other.call(LIVE, b"")).status == 0


async def test_streams_beyond_the_limit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http2, "MAX_STREAMS", 2)
    async with grpc_front() as front, http2_client(front) as client:
        numbers = [await client.open(WATCH) for _ in range(3)]  # the limit has not arrived yet
        assert (await client.answer(numbers[2])).reset == Code.REFUSED_STREAM
        client.engine.reset_stream(numbers[0])
        await client.flush()
        assert (await client.call(LIVE, b"")).status == 0


@pytest.mark.parametrize(
    "wire",
    [
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 40,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\x04\x01\x05\0\0\0\x01" + b"\xff" * 4,
    ],
)
async def test_nonsense_ends_its_connection_only(
    wire: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with grpc_front() as front, http2_client(front) as client:
        async with http2_client(front) as other:
            await other.stream.send_all(wire)
            await other.closed()
        assert (await client.call(LIVE, b"")).status == 0
    assert "Traceback" not in caplog.text


async def test_headers_beyond_the_limit_end_the_connection() -> None:
    async with grpc_front() as front, http2_client(front) as client:
        await client.call(LIVE, b"")  # the limit has arrived
        await client.open(LIVE, *((f"x-{i}", "a" * 1000) for i in range(20)))
        assert await client.closed() is not None


async def test_connections_without_a_stream_are_closed() -> None:
    async with grpc_front(idle_timeout=0.1, header_timeout=0.1) as front:
        async with http2_client(front) as client:
            assert (await client.call(LIVE, b"")).status == 0
            assert await client.closed() == Code.NO_ERROR
        silent = await front.connect(port=int((front.grpc or "").rsplit(":", 1)[1]))
        with trio.fail_after(5):
            while await silent.stream.receive_some(100):
                pass


async def test_a_stream_keeps_its_connection_open() -> None:
    async with grpc_front(idle_timeout=0.05, delay=0.02) as front, http2_client(front) as client:
        assert ANSWER in (await client.infer(max_tokens=30)).body.decode(errors="replace")


async def test_shutdown_says_goodbye_and_lets_running_calls_finish() -> None:
    async with grpc_front(delay=0.005) as front:
        async with http2_client(front) as idle, http2_client(front) as client:
            assert (await idle.call(LIVE, b"")).status == 0
            watching = await client.open(WATCH)
            await client.send_message(watching, b"")
            number = await client.open(STREAM)
            request = infer_request(stream=True, max_tokens=20)
            await client.send_message(number, request.SerializeToString(), end=False)
            await until(client, number, 10)
            front.state.begin_drain()
            front.shutdown.set()
            assert await idle.closed() == Code.NO_ERROR
            answer = await client.answer(number)  # although its client might send more
            assert answer.status == 14
            final = answer.messages("ModelStreamInferResponse")[-1].infer_response
            assert final.parameters["triton_final_response"].bool_param
            assert (await client.answer(watching)).status == 14
            assert await client.closed() == Code.NO_ERROR
        await front.closed.wait()


async def test_a_request_during_the_shutdown_is_refused() -> None:
    async with grpc_front(delay=0.01) as front, http2_client(front) as client:
        running = await client.open(STREAM)
        request = infer_request(stream=True, max_tokens=30)
        await client.send_message(running, request.SerializeToString())
        await until(client, running, 10)
        front.state.begin_drain()
        front.shutdown.set()
        await trio.sleep(0.01)
        late = await client.open(LIVE, end=True)
        assert (await client.answer(late)).reset == Code.REFUSED_STREAM
        assert (await client.answer(running)).status == 0


def wild_wire(random: Random) -> bytes:
    """Requests, with frames among them that are wrong in one way or another."""
    head = [(":method", "POST"), (":scheme", "http"), (":authority", "a"), ("te", "trailers")]
    head.append(("content-type", "application/grpc"))
    message = infer_request(stream=True, max_tokens=3).SerializeToString()
    wire = PREFACE + SettingsFrame(0).serialize()
    for number in range(1, 2 * random.randrange(1, 12), 2):
        path = random.choice([LIVE, STREAM, WATCH, "/x"])
        block = hpack.Encoder().encode([*head, (":path", path)])
        frames = [
            HeadersFrame(number, block, flags=["END_HEADERS"]),
            DataFrame(number, struct.pack(">BI", 0, len(message)) + message),
            DataFrame(number, b"", flags=random.choice([[], ["END_STREAM"]])),
            RstStreamFrame(random.choice([number, 1]), error_code=random.randrange(99)),
            WindowUpdateFrame(
                random.choice([0, number]), window_increment=1 << random.randrange(31)
            ),
            SettingsFrame(0, settings={random.randrange(9): random.randrange(1 << 31)}),
            PingFrame(0, opaque_data=bytes(8)),
            PriorityFrame(number, depends_on=random.choice([0, 1])),
        ]
        for frame in [*frames[:2], *random.sample(frames[2:], random.randrange(3))]:
            data = bytearray(frame.serialize())
            if random.random() < 0.03:
                data[random.randrange(len(data))] = random.randrange(256)
            wire += data
    return wire


@pytest.mark.parametrize("seed", range(4))
async def test_wild_frames_end_their_connection_only(
    seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    random = Random(seed)
    async with grpc_front(header_timeout=0.2, idle_timeout=0.2, body_timeout=0.2) as front:

        async def run_wild(wire: bytes) -> None:
            async with http2_client(front, greets=False) as client:
                with suppress(trio.BrokenResourceError), trio.move_on_after(0.2):
                    await client.stream.send_all(wire)
                    while await client.stream.receive_some(65536):
                        pass

        async with trio.open_nursery() as nursery:
            for _ in range(25):
                nursery.start_soon(run_wild, wild_wire(random))
        await front.idle()
        async with http2_client(front) as client:
            assert (await client.call(LIVE, b"")).status == 0
        stats = front.state.engine.stats
        assert stats.free_pages == stats.num_pages
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
