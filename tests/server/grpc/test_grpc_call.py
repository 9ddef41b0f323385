"""One call of gRPC: its messages, its deadline, and how it ends."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio

from kttrio.config import ServerConfig
from kttrio.server.grpc.messages import MESSAGES
from tests.http2_client import INFERENCE, PREFIX, Answer, Http2Client, http2_client, infer_request
from tests.http_front import Front, running_front

INFER = f"{INFERENCE}/ModelInfer"
STREAM = f"{INFERENCE}/ModelStreamInfer"
LIVE = f"{INFERENCE}/ServerLive"


@pytest.fixture
async def front() -> AsyncIterator[Front]:
    config = ServerConfig(grpc_port=0, max_body_bytes=4096, body_timeout=0.3)
    async with running_front(config=config, delay=0.001) as running:
        yield running


@pytest.fixture
async def client(front: Front) -> AsyncIterator[Http2Client]:
    async with http2_client(front) as connected:
        yield connected


async def sent(client: Http2Client, path: str, wire: bytes, *fields: tuple[str, str]) -> Answer:
    """A call whose bytes are as the test has them."""
    number = await client.open(path, *fields)
    await client.send(number, wire, end=True)
    return await client.answer(number)


def framed(message: bytes, *, is_compressed: int = 1) -> bytes:
    return PREFIX.pack(is_compressed, len(message)) + message


async def test_an_answer_is_a_head_messages_and_trailers(client: Http2Client) -> None:
    answer = await client.call(LIVE, b"")
    assert answer.headers[":status"] == "200"
    assert answer.headers["content-type"] == "application/grpc"
    assert [message.live for message in answer.messages("ServerLiveResponse")] == [True]
    assert answer.trailers == {"grpc-status": "0"}


async def test_a_refusal_has_only_a_head(client: Http2Client) -> None:
    answer = await client.call(f"{INFERENCE}/LogSettings", b"")
    assert (answer.status, answer.trailers, answer.body) == (12, {}, b"")
    assert "LogSettings" in answer.complaint


async def test_messages_of_a_complaint_are_percent_encoded(client: Http2Client) -> None:
    request = MESSAGES["ModelMetadataRequest"](name="100% Grüße\n")
    answer = await client.call(f"{INFERENCE}/ModelMetadata", request.SerializeToString())
    assert answer.status == 5
    assert "100%25 Gr%C3%BC%C3%9Fe%0A" in answer.complaint


async def test_compressed_messages_are_read(client: Http2Client) -> None:
    message = gzip.compress(infer_request(max_tokens=1).SerializeToString())
    answer = await sent(client, INFER, framed(message), ("grpc-encoding", "gzip"))
    assert answer.status == 0
    plain = framed(b"", is_compressed=0)
    assert (await sent(client, LIVE, plain, ("grpc-encoding", "gzip"))).status == 0


@pytest.mark.parametrize(
    ("encoding", "message", "status", "complaint"),
    [
        ("br", b"x", 12, "send gzip or identity"),
        ("identity", b"", 13, "does not say how"),
        ("gzip", b"no gzip", 13, "no gzip"),
        ("gzip", gzip.compress(bytes(100), mtime=0)[:-3], 13, "no whole gzip"),
        ("gzip", gzip.compress(bytes(1 << 20), mtime=0), 8, "--max-body-bytes"),
    ],
)
async def test_what_is_compressed_otherwise_is_refused(
    client: Http2Client, encoding: str, message: bytes, status: int, complaint: str
) -> None:
    answer = await sent(client, INFER, framed(message), ("grpc-encoding", encoding))
    assert answer.status == status
    assert complaint in answer.complaint


def test_the_window_is_gzips_own() -> None:
    """A zlib stream without gzip's head is another encoding, called deflate."""
    with pytest.raises(zlib.error):
        zlib.decompressobj(16 + zlib.MAX_WBITS).decompress(zlib.compress(b"x"))


@pytest.mark.parametrize(
    ("wire", "status"),
    [
        (b"", 3),
        (framed(b"", is_compressed=0) * 2, 3),
        (framed(b"", is_compressed=7), 13),
        (b"\0\0", 13),
        (PREFIX.pack(0, 100) + b"short", 13),
        (framed(b"\xff\xff\xff", is_compressed=0), 3),
        (PREFIX.pack(0, 5000) + bytes(5000), 8),
        (PREFIX.pack(0, 2**32 - 1), 8),
    ],
)
async def test_bytes_that_are_not_one_message_are_refused(
    client: Http2Client, wire: bytes, status: int
) -> None:
    answer = await sent(client, INFER, wire)
    assert answer.status == status
    assert (await client.call(LIVE, b"")).status == 0


async def test_a_message_that_does_not_go_on_is_given_up(client: Http2Client) -> None:
    number = await client.open(INFER)
    await client.send(number, PREFIX.pack(0, 100) + b"begun")
    answer = await client.answer(number)
    assert answer.status == 4
    assert "did not arrive" in answer.complaint


async def test_a_connection_sends_only_so_much_at_once(client: Http2Client) -> None:
    numbers = [await client.open(INFER) for _ in range(5)]
    for number in numbers:
        await client.send(number, PREFIX.pack(0, 4000) + b"begun")
    answers = [await client.answer(number) for number in numbers]
    assert sorted(answer.status for answer in answers) == [4, 4, 4, 4, 8]
    assert (await client.infer(max_tokens=1)).status == 0  # there is room again


async def test_a_client_may_stay_silent_between_messages(client: Http2Client) -> None:
    number = await client.open(STREAM)
    await trio.sleep(0.4)
    await client.send_message(number, infer_request(max_tokens=1).SerializeToString())
    assert (await client.answer(number)).status == 0


@pytest.mark.parametrize("allowed", ["20m", "20000u", "00000020m"])
async def test_a_call_ends_at_its_deadline(front: Front, client: Http2Client, allowed: str) -> None:
    front.script.endless = True
    request = infer_request(max_tokens=500).SerializeToString()
    answer = await client.call(INFER, request, ("grpc-timeout", allowed))
    assert answer.status == 4
    await front.idle()


@pytest.mark.parametrize("allowed", ["5", "S", "-1S", "123456789S", "1.5S", "1x"])
async def test_a_deadline_that_is_none_is_refused(client: Http2Client, allowed: str) -> None:
    answer = await client.call(LIVE, b"", ("grpc-timeout", allowed))
    assert answer.status == 3
    assert "grpc-timeout" in answer.complaint


async def test_a_failure_is_told_without_its_words(
    client: Http2Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    words = "a client's " + "secret"

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError(words)

    monkeypatch.setattr("kttrio.server.triton.inference.server_metadata", fail)
    answer = await client.call(f"{INFERENCE}/ServerMetadata", b"")
    assert answer.status == 13
    assert words not in answer.complaint + caplog.text
    assert "RuntimeError" in caplog.text


@pytest.mark.parametrize(
    "fields", [{":method": "GET"}, {"content-type": "application/json"}, {"content-type": None}]
)
async def test_what_is_no_call_is_told_so_in_http(
    client: Http2Client, fields: dict[str, str | None]
) -> None:
    answer = await client.answer(await client.open(LIVE, replaced=fields, end=True))
    assert answer.headers[":status"] == "415"


async def test_an_answer_before_the_end_of_the_request_ends_it(client: Http2Client) -> None:
    number = await client.open(f"{INFERENCE}/Nothing")
    answer = await client.answer(number)
    assert answer.status == 12
    while answer.reset is None:
        assert await client.read()
    assert answer.reset == 0
